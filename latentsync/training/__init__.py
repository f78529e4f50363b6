"""Training of a small LatentSync from scratch; `python -m latentsync.training --help`."""
