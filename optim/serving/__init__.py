"""What the page asks of the engine: jobs in the background, preview and curves, speeds, and the models there are."""
