"""The first half of the pipeline: decode, follow the faces, encode the sound, cut the faces out.

Every stage has a thread of its own, a bounded number of frames away from the next one.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import chain, islice, tee
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from latentsync import FPS
from latentsync.audio import audio_chunks, on_side_stream
from latentsync.checkpoints.load import Models
from latentsync.faces import Face, track_people, track_person
from latentsync.following import Person
from latentsync.placing import Placement, fade_ends, pass_by
from latentsync.prefetch import close, prefetch
from latentsync.prepared.film import PreparedFilm
from latentsync.prepared.recording import Recorder
from latentsync.retarget import MouthBank
from latentsync.settings import Settings
from latentsync.timing import StageClock
from latentsync.turns import Turns
from latentsync.windows import EMPTY, AlignedFrame, align_frames, until_repeated

MAX_CROP_BYTES = 512 * 2**20  # of crops that are stored of a video that is played more than once: 26 s at 512 px
DECODED_FRAMES = 8  # that wait for the face tracker
TRACKED_FRAMES = 8  # that wait for their faces to be cut out
T = TypeVar("T")
Faces = tuple[Face | None, ...]  # of one frame, of every person


@dataclass(frozen=True)
class Source:
    """A video and a voice, opened.

    frames: numbered, uint8 (H, W, 3), `rate` a second, writable, `total` of them, and of
    a longer video some more, by which the last faces are found; wav: (samples,) float32 at 16 kHz;
    person: who says `wav`, if not `Settings.face`; others: further people, each with the wav of a voice of its own;
    place: where the voice lies in a longer film, whose other frames pass by; the second reading has only those with the
    voice, and there are no other people; repeats: the video is shorter than the sound and played forward and backward;
    turns: who of all of them is painted when, while each says `wav`;
    second_reading: for a model with a face of its own, the frames until they repeat, once more: they are followed up to
    ten seconds early; cancel: ends both from another thread, whatever they wait for.
    """

    frames: Iterator[tuple[int, np.ndarray]]
    wav: Tensor
    total: int
    repeats: bool = False
    second_reading: Iterator[np.ndarray] | None = None
    cancel: Callable[[], None] = lambda: None
    rate: Fraction = Fraction(FPS)
    person: Person | None = None
    others: Sequence[tuple[Person, Tensor]] = ()
    place: Placement | None = None
    turns: Turns | None = None

    @property
    def said(self) -> int:
        """Frames that say the voice."""
        return self.total if self.place is None else self.place.count


class FaceQueue:
    """The faces of a further person, from where all are followed to where the frames with the faces before are painted.

    Both sides run in threads of their own, and no more frames lie between them than the stages hold.
    """

    def __init__(self) -> None:
        self.numbers: deque[int] = deque()  # of the frames, see `Source.frames`
        self.faces: deque[Face | None] = deque()  # of the frames until they repeat
        self._earlier: deque[AlignedFrame] = deque()  # without pixels

    def align(
        self, painted: Iterable[AlignedFrame], tokens: Iterator[Tensor], resolution: int, repeats: bool
    ) -> Iterator[AlignedFrame]:
        """Cut this person's face out of painted frames. A crop may show an earlier person's mouth: none is stored."""
        repeated: list[tuple[int, np.ndarray]] = []

        def numbered() -> Iterator[tuple[int, np.ndarray]]:
            for aligned in painted:
                self._earlier.append(replace(aligned, frame=EMPTY, tokens=torch.empty(0), generated=None))
                yield self.numbers.popleft(), aligned.frame

        frames = numbered()
        first_time = ((frame, self.faces.popleft()) for frame in until_repeated(frames, repeated))
        return align_frames(first_time, tokens, resolution, 0 if repeats else None, chain(repeated, frames))

    def merge(self, frames: Iterable[AlignedFrame]) -> Iterator[AlignedFrame]:
        """The finished frames, with what is counted of the people before."""
        for aligned in frames:
            earlier = self._earlier.popleft()
            aligned.recomputed |= earlier.recomputed
            aligned.outside = earlier.outside
            if aligned.crop is None:
                aligned.crop = earlier.crop
            yield aligned


def tokens_of(source: Source, wav: Tensor, models: Models, settings: Settings) -> Iterator[Tensor]:
    """The audio of every frame, (50, d) each."""
    chunks = audio_chunks(
        models.audio_encoder,
        wav,
        source.said,
        models.mel_range,
        models.speech_level,
        settings.silence_gate,
        source.rate,
    )
    return on_side_stream(chunks, models.device)


def read_aligned(
    source: Source,
    people: Sequence[Person],
    models: Models,
    settings: Settings,
    banks: Sequence[MouthBank],
    later: Sequence[FaceQueue],
    clock: StageClock,
    film: PreparedFilm | Recorder | None = None,
) -> Iterator[AlignedFrame]:
    """The first half of the chain: decode, follow the faces, encode the sound, cut out the first person's face.

    banks: of every person, collect the mouths of the source's second reading, up to ten seconds early; later: get the
    faces of the other people; film: of one person, faces from an earlier run or for a later one.
    """
    max_crops = MAX_CROP_BYTES // (3 * models.resolution**2) if source.repeats else None
    repeated: list[tuple[int, np.ndarray]] = []
    place = source.place
    with ExitStack() as threads:

        def in_thread(items: Iterable[T], stage: str, depth: int) -> Iterator[T]:
            made = threads.enter_context(closing(prefetch(clock.time(items, stage), depth, stage)))
            return clock.wait(made, stage)

        def numbered() -> Iterator[tuple[int, np.ndarray]]:
            for number, frame in reading:
                for queue in later:
                    queue.numbers.append(number)
                yield number, frame

        def first_person(
            tracked: Iterable[tuple[np.ndarray, Faces]],
        ) -> Iterator[tuple[np.ndarray, Face | None]]:
            for frame, (face, *others) in tracked:
                for queue, other in zip(later, others, strict=True):
                    queue.faces.append(other)
                yield frame, face

        # Entered before the thread that follows the faces, which takes frames from it: that one must end first.
        reading = in_thread(source.frames, "reading", DECODED_FRAMES)
        tokens = in_thread(tokens_of(source, source.wav, models, settings), "sound", TRACKED_FRAMES)
        frames = numbered()
        yield from pass_by(islice(frames, place.first if place else 0))
        first_time = until_repeated(islice(frames, place.count) if place else frames, repeated)
        tracked: Iterable[tuple[np.ndarray, Faces]]
        if source.second_reading is None:
            followed = follow_faces(first_time, people, source, film)
            tracked = in_thread(followed, "faces", TRACKED_FRAMES)
        else:
            followed = follow_faces(source.second_reading, people, source, film)
            faces = in_thread(collect_mouths(followed, banks), "faces", banks[0].chunk)
            tracked = zip(first_time, faces, strict=False)
        if source.turns is not None:
            tracked = source.turns.only_speakers(tracked)
        if place:
            aligned = align_frames(fade_ends(first_person(tracked), place, source.rate), tokens, models.resolution)
        else:
            aligned = align_frames(first_person(tracked), tokens, models.resolution, max_crops, chain(repeated, frames))
        for frame in islice(clock.time(aligned, "crops"), source.said):
            frame.outside = source.turns is not None and source.turns.is_silent(frame.number)
            yield frame
        if place:
            yield from pass_by(frames)


def follow_faces(
    frames: Iterator[np.ndarray], people: Sequence[Person], source: Source, film: PreparedFilm | Recorder | None
) -> Iterator[tuple[np.ndarray, Faces]]:
    """The frames that say the voice with their faces, which the frames after them have helped to find."""
    if film is not None:
        track = partial(track_person, person=people[0], rate=source.rate)
        for frame, face in film.follow(frames, track, source.said):
            yield frame, (face,)
        return
    tracked = track_people(frames, people, rate=source.rate)
    try:
        yield from islice(tracked, source.said)
    finally:
        close(tracked)


def collect_mouths(followed: Iterator[tuple[np.ndarray, Faces]], banks: Sequence[MouthBank]) -> Iterator[Faces]:
    """Let every bank collect the mouths of its person; yields the faces of each frame, a few frames later."""

    def film_of(index: int, film: Iterator[tuple[np.ndarray, Faces]]) -> Iterator[tuple[np.ndarray, Face | None]]:
        for frame, faces in film:
            yield frame, faces[index]

    films = [film_of(index, film) for index, film in enumerate(tee(followed, len(banks)))]
    try:
        yield from zip(*(bank.collect(film) for bank, film in zip(banks, films, strict=True)), strict=True)
    finally:
        close(followed)
