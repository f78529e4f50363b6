"""Who of a film's people is painted when, for the face `speaking`: `find_turns`."""

import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from latentsync import FPS, SAMPLE_RATE, SPEAKERS
from latentsync.choice import SPEAKING
from latentsync.errors import UserError
from latentsync.evaluation.judge import WEIGHTS, load_judge
from latentsync.faces import Face, no_face_error, track_people
from latentsync.following import FADE, Person
from latentsync.hooks import RunHooks
from latentsync.media import VideoInfo, probe_audio, read_audio, read_frames
from latentsync.media.tracks import list_tracks
from latentsync.people import Sighted, everyone_in
from latentsync.prefetch import prefetch
from latentsync.rates import scale_frames
from latentsync.speaking import MouthReader, on_grid, who_speaks

DECODED_FRAMES = 8  # that wait to be looked at


@dataclass(frozen=True, eq=False)
class Turns:
    """Who speaks in which frame of a film.

    people: of the film, as they were found; speaker (n,): the number of the one who is painted in each frame, −1 where
    nobody is; opacity (n,): over 0 to 1, it rises and falls in the frames before and after the speech of a turn;
    summary: see `Report.turns`; remark: the same in a sentence.
    """

    people: list[Person]
    speaker: np.ndarray
    opacity: np.ndarray
    summary: list[dict[str, Any]]

    @property
    def remark(self) -> str:
        seconds: dict[str, float] = {}
        for turn in self.summary:
            seconds[turn["face"]] = seconds.get(turn["face"], 0.0) + turn["to"] - turn["from"]
        times = ", ".join(f"the face at {face} for {time:.1f} s" for face, time in seconds.items())
        return f"Of the film's people, who speaks was painted: {times}."

    def is_silent(self, number: int) -> bool:
        """Whether nobody is painted in the film's frame of that number."""
        return number >= len(self.speaker) or self.speaker[number] < 0

    def only_speakers(
        self, tracked: Iterable[tuple[np.ndarray, tuple[Face | None, ...]]]
    ) -> Iterator[tuple[np.ndarray, tuple[Face | None, ...]]]:
        """The frames of the film, in order, with the face of the person who speaks in each, and None for the others."""
        before = -1
        for number, (frame, faces) in enumerate(tracked):
            who = -1 if self.is_silent(number) else int(self.speaker[number])
            shown: list[Face | None] = [None] * len(faces)
            if who >= 0 and (face := faces[who]) is not None:
                opacity = face.opacity * float(self.opacity[number])
                shown[who] = replace(face, opacity=opacity, first=face.first or who != before)
            before = who
            yield frame, tuple(shown)


def find_turns(info: VideoInfo, count: int, hooks: RunHooks) -> Turns:
    """Find out who speaks when in the first `count` frames of a film, or of its part, at the rate of a run.

    The film is read twice: for its people, and to follow their mouths. A frame takes 400 bytes for each of them. hooks:
    its progress, of the stage SPEAKERS, counts both readings. Raises UserError where the film has no sound, shows no
    face, or nobody is seen speaking.
    """
    wav = film_sound(info)
    done = 0

    def frames() -> Generator[np.ndarray, None, None]:
        nonlocal done
        cancel = threading.Event()
        with closing(
            prefetch(read_frames(info, 0, count, cancel), DECODED_FRAMES, "reading", hooks.wait, cancel.set)
        ) as read:
            for frame in read:
                yield frame
                done += 1
                hooks.progress(SPEAKERS, min(done, 2 * count), 2 * count)

    with closing(frames()) as film:
        sighted = everyone_in(film, info.rate)
    if not sighted:
        raise no_face_error(info.path)
    people = [Person(look=person.look, recognised=True) for person in sighted]
    judge = load_judge(WEIGHTS, torch.device("cpu"))
    readers = [MouthReader(judge) for _ in people]
    before = done
    with closing(frames()) as film:
        followed = track_people(film, deepcopy(people), rate=info.rate)
        for frame, faces in on_grid(followed, info.rate):
            for reader, face in zip(readers, faces, strict=True):
                reader.add(frame, face)
    mouths = [reader.finish() for reader in readers]
    speaker = who_speaks(judge, mouths, wav)
    if (speaker < 0).all():
        raise UserError(
            f"Nobody is seen speaking in '{info.path}' while its sound has speech: choose a face with --face."
        )
    return make_turns(people, sighted, speaker, info.rate, done - before)


def film_sound(info: VideoInfo) -> np.ndarray:
    """The film's own sound from the time of its first frame on: (samples,) at 16 kHz. Raises UserError without one."""
    if info.still or not list_tracks(info.path, "video").audio:
        raise UserError(
            f"'{info.path}' has no sound of its own, by which --face {SPEAKING} finds who speaks: choose a face."
        )
    start = probe_audio(info.path).start - float(info.start_pts * info.time_base + info.first / info.rate)
    wav, late = read_audio(info.path), round(start * SAMPLE_RATE)
    return wav[-late:] if late < 0 else np.pad(wav, (late, 0))


def make_turns(
    people: list[Person], sighted: list[Sighted], speaker: np.ndarray, rate: Fraction, n_frames: int
) -> Turns:
    """The turns of a film of `n_frames` frames, `rate` a second; speaker: (n,) at FPS a second, see `decide`."""
    owner = speaker[np.minimum(np.rint(np.arange(n_frames) * float(FPS / rate)).astype(int), len(speaker) - 1)]
    opacity = np.ones(n_frames, np.float32)
    fade = scale_frames(FADE, rate)
    edges = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), n_frames]
    summary: list[dict[str, Any]] = []
    painted = owner.copy()
    for first, last in zip(edges, edges[1:], strict=False):
        who = int(owner[first])
        if who < 0:
            continue
        # The mouth comes and goes in frames in which nobody speaks, as far as there are any.
        for end, direction in ((first, -1), (last - 1, 1)):
            for step in range(1, fade + 1):
                number = end + direction * step
                if not 0 <= number < n_frames or painted[number] >= 0:
                    break
                painted[number], opacity[number] = who, 1 - step / (fade + 1)
        point = sighted[who].first.centre
        face = f"{point[0]:.0f},{point[1]:.0f}@{float(sighted[who].number / rate):.2f}"
        turn = {"face": face, "from": round(float(first / rate), 2), "to": round(float(last / rate), 2)}
        summary.append(turn)
    return Turns(people, painted, opacity, summary)
