"""Kinds of models, each in a folder behind the surface of `family.py`; and what all of them share."""
