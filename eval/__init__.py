"""Measure checkpoints, compare them in pairs, and draw quality against size."""
