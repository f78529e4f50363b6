"""A first look at a visitor's files: the first picture of a video and the faces in it, the level of a sound."""

from base64 import b64encode
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Any

from latentsync import FPS
from latentsync.choice import FACES
from latentsync.media import AudioInfo, VideoInfo, read_audio, read_frames
from optim.serving.preview import as_browsers_show, as_jpeg, resized

if TYPE_CHECKING:  # these take seconds to load
    import numpy as np

    from latentsync.landmarks import Detection

LOOK_FRAMES = range(0, FPS + 1, FPS // 2)  # of the first second, until one shows a face
THUMBNAIL_SIDE = 96  # pixels
SMALL_FACE = 80  # pixels; what is painted of a smaller one can hardly be seen
NO_FACE = "No face was found in the first second. Choose a video that shows one from the front, or start all the same."
NOT_USABLE = (
    "The face is turned away, or its mouth is outside the picture, in the first second. Those parts stay as they are."
)
SMALL = "The face is only {size} pixels high: a video from nearer, or of more pixels, gives a sharper mouth."

LISTEN_SECONDS = 1800.0  # of sound, at most, that is decoded to see whether anything is heard in it
SILENCE = 0.001  # of full scale, −60 dB: a microphone that is switched off is quieter, a whisper louder
SILENT = "This recording is silent, so the mouth will stay shut. Choose another one, or check the microphone."


def listen_to(info: AudioInfo) -> list[str]:
    """Warnings about a sound: that it is silent. Raises UserError if it cannot be decoded."""
    if info.duration > LISTEN_SECONDS:
        return []
    wav = read_audio(info.path, track=info.track)
    return [] if max(wav.max(), -wav.min()) > SILENCE else [SILENT]


def look_at(info: VideoInfo) -> dict[str, Any]:
    """The first frame, length, rate, size, faces and warnings of a video, ready for JSON.

    Raises UserError if it cannot be decoded.
    """
    with closing(read_frames(as_browsers_show(info), count=LOOK_FRAMES[-1] + 1)) as frames:
        first = frame = next(frames)  # raises UserError rather than to end at once
        faces, number = find_faces(first), 0
        for later in islice(frames, LOOK_FRAMES.step - 1, None, LOOK_FRAMES.step):
            if faces:
                break
            frame, faces, number = later, find_faces(later), number + LOOK_FRAMES.step
    return {
        "picture": data_uri(resized(first)),
        "duration": None if info.still else round(info.duration, 2),
        "fps": None if info.still else round(float(info.nominal_rate), 3),
        "width": info.width,
        "height": info.height,
        "faces": [_face_view(frame, float(number / info.rate), face, faces) for face in faces],
        "warnings": [*info.remarks, *_warnings(faces)],
    }


def find_faces(frame: "np.ndarray") -> list["Detection"]:
    """The faces in a frame, uint8 (H, W, 3) RGB, each once, from the left to the right."""
    from latentsync.landmarks import open_pool, tiles

    found: list[Detection] = []
    with open_pool(1) as pool:
        for boxes, _ in tiles(frame, thorough=True):
            for face in pool.detect_all(frame, boxes):
                if all(face.distance(other) > 0.5 and other.distance(face) > 0.5 for other in found):
                    found.append(face)
            if found:  # smaller tiles show smaller faces only
                break
    return sorted(found, key=lambda face: face.centre[0])


def _face_view(frame: "np.ndarray", seconds: float, face: "Detection", faces: list["Detection"]) -> dict[str, Any]:
    """A face's picture, whether it can be used, and the choices that follow it: those of FACES, and a point on it.

    seconds: the frame's time.
    """
    from latentsync.following import ranked

    choices = [which for which in FACES if ranked(faces, which, frame.shape[1])[0] is face]
    x, y, half = *face.centre, 0.7 * face.size
    (x0, x1), (y0, y1) = (
        (max(0, round(middle - half)), min(side, round(middle + half) + 1))
        for middle, side in ((x, frame.shape[1]), (y, frame.shape[0]))
    )
    picture = data_uri(resized(frame[y0:y1, x0:x1], THUMBNAIL_SIDE))
    point = f"{max(x, 0):.0f},{max(y, 0):.0f}" + (f"@{seconds:.2f}" if seconds else "")
    return {"picture": picture, "usable": face.usable, "face": [*choices, point][0], "names": [*choices, point]}


def _warnings(faces: list["Detection"]) -> list[str]:
    usable = [face for face in faces if face.usable]
    if not faces:
        return [NO_FACE]
    if not usable:
        return [NOT_USABLE]
    size = max(face.size for face in usable)
    return [SMALL.format(size=round(size))] if size < SMALL_FACE else []


def data_uri(picture: "np.ndarray") -> str:
    return f"data:image/jpeg;base64,{b64encode(as_jpeg(picture)).decode()}"
