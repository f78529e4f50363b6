"""Prepare a film before there is a voice for it: `prepare_film`."""

import os
import sys
from contextlib import closing
from functools import partial
from itertools import repeat

import torch

from latentsync.checkpoints.load import Models
from latentsync.choice import SPEAKING
from latentsync.errors import UserError
from latentsync.faces import no_face_error, track_person
from latentsync.hooks import NO_HOOKS, Hooks, RunHooks
from latentsync.media import probe_video, read_frames
from latentsync.painting import Painter
from latentsync.people import find_people
from latentsync.prefetch import prefetch
from latentsync.prepared.film import film_key
from latentsync.prepared.recording import Recorder
from latentsync.settings import WINDOW, Settings
from latentsync.windows import align_frames


@torch.inference_mode()
def prepare_film(
    video: str | os.PathLike,
    folder: str | os.PathLike,
    models: Models,
    settings: Settings,
    hooks: Hooks = NO_HOOKS,
    video_track: int | None = None,
) -> tuple[int, int]:
    """Follow the face through the whole film and encode it, into a new folder; returns frames, and those with a face.

    hooks: on_progress, with the stage "faces" and the frames to expect, and on_wait are called; what they raise ends it
    and leaves nothing. Raises UserError for a film that cannot be used or shows no face, and where the folder exists or
    cannot be written.
    """
    if settings.face == SPEAKING:
        raise UserError("A film is prepared for one face; who speaks is found in the runs themselves. Choose a face.")
    info = probe_video(video, video_track).at_choice(settings.fps)
    run_hooks = RunHooks(hooks)
    status = os.stat(info.path)

    (person,) = find_people(info, settings)
    track = partial(track_person, person=person, rate=info.rate)
    with Recorder(folder, film_key(info, settings, models, run_hooks.wait)) as recorder:
        painter = Painter(models, settings, film=recorder)
        frames = prefetch(read_frames(info), 2 * WINDOW, "reading")
        followed = prefetch(recorder.follow(frames, track, sys.maxsize), WINDOW, "faces")
        done = faces = 0
        with closing(frames), closing(followed):
            crops = prefetch(
                align_frames(followed, repeat(torch.empty(0)), models.resolution), WINDOW, "crops", run_hooks.wait
            )
            with closing(crops):
                for aligned in crops:
                    done += 1
                    if aligned.crop is not None:
                        faces += 1
                        if not models.retargets:
                            painter.cached_conditioning([aligned], painter.stack_crops([aligned]))
                    run_hooks.progress("faces", done, max(info.n_frames, done))
        if not faces:
            raise no_face_error(video)
        now = os.stat(info.path)
        if (now.st_size, now.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
            raise UserError(f"'{video}' has changed while it was prepared: start again when nothing writes it.")
        recorder.finish()
    return done, faces
