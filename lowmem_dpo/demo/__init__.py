"""A whole run on a small model made on the spot, offline."""
