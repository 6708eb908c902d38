"""Every setting of every verb as a typed, frozen dataclass, by concern; `load.py` reads and writes them. No torch."""
