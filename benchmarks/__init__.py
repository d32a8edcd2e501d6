"""Measurements of what sdmerge promises: see README.md in this folder."""
