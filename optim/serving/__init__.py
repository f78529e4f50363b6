"""The page's side of the engine: jobs and their previews, curves, models, uploads, endpoints, and the HTTP guard."""
