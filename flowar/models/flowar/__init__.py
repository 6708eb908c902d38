"""FlowAR (arXiv:2412.15205). Read `family.py` first: what the rest of the program uses."""
