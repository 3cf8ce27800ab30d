"""Ways to run a compressed folder."""
