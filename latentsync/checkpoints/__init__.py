"""The networks' files: which models are released, fetching and converting them, and loading them exactly.

`load.resolve(name, device)` finds a checkpoint, `load.load_models(checkpoint, device)` loads it;
`python -m latentsync.checkpoints` lists, fetches, verifies and removes the released models.
"""
