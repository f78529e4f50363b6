"""What a run calls while it works: `Hooks`, and `StopEarly` for one of them to raise."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from latentsync.settings import Settings


class StopEarly(Exception):
    """For a hook of `lipsync` to raise: end the run here, and keep what is finished as a video of its own."""


def do_nothing(*_: object) -> None:
    """A hook that is not needed."""


@dataclass(frozen=True)
class Hooks:
    """What `lipsync` calls while it runs, all in the caller's thread. What they raise stops the run.

    on_progress(stage, frames done, frames in all): as the stages of `latentsync.STAGES` advance, and at every denoising
    step; before them, where it is to be found who speaks, with the stage `latentsync.SPEAKERS` and the frames of two
    readings. on_frame(frame): with every finished frame, uint8 (H, W, 3), in order; it must not change it. on_wait():
    several times a second while the caller's thread waits for others or for ffmpeg. on_out_of_memory(): when the
    device's memory ran out; returns settings that need less, or None to give up. on_message(line): what the user should
    know before the end. before_painting(): once, when the first faces have been found and are to be painted; until then
    the models may be without weights, see `checkpoints.load.load_outline`.
    """

    on_progress: Callable[[str, int, int], None] = do_nothing
    on_frame: Callable[[np.ndarray], None] = do_nothing
    on_wait: Callable[[], None] = do_nothing
    on_out_of_memory: Callable[[], Settings | None] | None = None
    on_message: Callable[[str], None] = do_nothing
    before_painting: Callable[[], None] = do_nothing


NO_HOOKS = Hooks()


class RunHooks:
    """The caller's hooks, as far as they still apply to a run."""

    def __init__(self, hooks: Hooks):
        self._hooks = hooks
        self.frames_complete = False  # all frames have been handed to the writer: nothing is left to end early

    def silence(self) -> None:
        """Call neither on_progress nor on_wait from now on."""
        self._hooks = replace(self._hooks, on_progress=do_nothing, on_wait=do_nothing)

    def progress(self, stage: str, done: int, total: int) -> None:
        self._hooks.on_progress(stage, done, total)

    def before_painting(self) -> None:
        self._hooks.before_painting()

    def frame(self, frame: np.ndarray) -> None:
        self._hooks.on_frame(frame)

    def wait(self) -> None:
        try:
            self._hooks.on_wait()
        except StopEarly:
            if not self.frames_complete:
                raise
            self._hooks = replace(self._hooks, on_wait=do_nothing)
