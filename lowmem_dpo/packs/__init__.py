"""Pairs as token trees, and trees in packs of a fixed number of tokens."""
