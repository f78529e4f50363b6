"""Measures of lip sync on real clips: `python -m latentsync.evaluation`."""
