"""Prepared films: what depends on a film alone, its faces and their latents, kept for the next voice.

    Recorder → folder → PreparedFilm

A folder holds film.json and safetensors files of CHUNK frames each, so that memory does not grow with the film. Either
class is given to `pipeline.lipsync`. On a processor the result is the one without it, to the bit: a frame's face does
not depend on where the sound ends, see `faces.lookahead_frames`, nor its latents on the frames that are encoded with
it, see `painting.Painter`.
"""
