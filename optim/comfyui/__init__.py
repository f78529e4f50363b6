"""Nodes for ComfyUI, a front end beside the command line and the page. Only ComfyUI can import the modules here.

`nodes` declares them, `run` does the work of LatentSync, `models` finds and holds checkpoints, `media` brings what
flows through ComfyUI's graph to files and back.
"""
