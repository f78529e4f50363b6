"""LatentSync: make the mouth in a video say the words of a recording. See `latentsync.pipeline.lipsync`."""

__version__ = "0.2.0.dev0"
STAGES = ("faces", "mouths", "writing")  # of a run, in which its progress is reported
SPEAKERS = "speakers"  # a stage before these, in which a run with `choice.SPEAKING` finds who speaks
FPS = 25  # frames per second inside the program (LatentSync reference)
SAMPLE_RATE = 16_000  # samples per second for the audio encoder (Whisper)
