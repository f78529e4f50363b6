"""LatentSync: give a filmed face new words. See `latentsync.pipeline.lipsync`."""

__version__ = "0.1.0"
