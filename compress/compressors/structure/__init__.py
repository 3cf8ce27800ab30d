"""Models of another shape: fewer blocks, or narrower ones."""
