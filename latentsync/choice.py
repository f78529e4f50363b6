"""Who is meant: a face of a film, named by its place in the picture or by a point in a frame, or who speaks."""

import re
from dataclasses import dataclass

from latentsync.errors import UserError

FACES = ("largest", "left", "right", "centre")  # which face is followed where several are seen
SPEAKING = "speaking"  # at each time the person who speaks then in the film
CHOICES = (*FACES, SPEAKING)
SAME_FACE = "The same face was asked for twice: give each voice a face of its own."
POINT = re.compile(r"(\d{1,5}(?:\.\d{1,3})?),(\d{1,5}(?:\.\d{1,3})?)(?:@(\d{1,6}(?:\.\d{1,6})?))?", re.ASCII)


@dataclass(frozen=True)
class FacePoint:
    """A point on a face: pixels of the upright picture, from its upper left corner, and seconds from the start."""

    x: float
    y: float
    seconds: float = 0.0


def parse_face(text: str) -> str | FacePoint:
    """One of CHOICES, or a point: "512,300", or "512,300@2.4" with the time in seconds. Raises UserError."""
    if text in CHOICES:
        return text
    if point := POINT.fullmatch(text):
        return FacePoint(float(point[1]), float(point[2]), float(point[3] or 0))
    raise UserError(
        f"There is no face '{text}' to choose: give one of {', '.join(CHOICES)}, or a point on it as 512,300, "
        "with a time in seconds as 512,300@2.4."
    )
