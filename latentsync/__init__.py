"""LatentSync: give a filmed face new words. See `latentsync.pipeline.lipsync`."""

__version__ = "0.1.0"
STAGES = ("faces", "mouths", "writing")  # of a run, by which its progress is told
FPS = 25  # frames a second of everything inside (LatentSync reference)
SAMPLE_RATE = 16_000  # samples a second that the audio encoder takes (Whisper)
