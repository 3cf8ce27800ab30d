"""Scaling laws: what a compressed model is worth in parameters, what one not made would lose."""
