"""Ways to run a compressed folder: as it is stored, not unpacked."""
