"""Compressed folders in other formats: one file a format, each a plug-in (base.py)."""
