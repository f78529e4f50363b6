"""Model files: which models are released, downloading, converting, finding and loading them.

`find.resolve_model(name, device)` finds a checkpoint, `load.load_models(checkpoint, device)` loads it;
`python -m latentsync.checkpoints` lists, fetches, verifies and removes the released models.
"""
