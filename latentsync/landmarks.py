"""Face landmarks in a picture, by MediaPipe's Face Landmarker (478 points, image mode).

Its video mode is not used: it smooths with a lag and cannot follow a moving crop. Coordinates are (x, y) in pixels of
the frame with pixel centres at whole numbers.
"""

import os
import queue
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from latentsync.errors import UserError
from latentsync.machine import usable_cores

if TYPE_CHECKING:  # MediaPipe takes a moment to load
    from latentsync.mediapipe_vision import FaceLandmarker, Image

MODEL_FILE = Path(__file__).parent.parent / "assets" / "face_landmarker.task"

# The three points that align a face are means of these mesh points (LatentSync): left-of-image brow,
# right-of-image brow, nose.
ALIGNMENT_POINTS = (
    (70, 63, 105, 66, 107),
    (336, 296, 334, 293, 300),
    (168, 197, 5, 4, 75, 97, 2, 326, 305),
)
UPPER_LIP, LOWER_LIP = 13, 14  # inner edges
MOUTH_EDGE = (61, 291, 0, 17)  # corners, top and bottom of the outer lips
EYE_CORNERS = (33, 263)  # outer

MAX_FACES = 8  # in one picture
MIN_BOX = 32  # pixels; smaller boxes are not searched
CROP_PIXELS = 384  # a box around one face is shrunk to this; the landmark network itself sees 256
TILES = (1.0, 0.5, 0.25)  # sides of the boxes that are searched for small faces, in short sides of the frame
TILE_STEP = 0.67  # of a tile; the detector needs faces of a tenth of its picture, which fit into the overlaps
TILE_PIXELS = 256  # a tile is shrunk to this
MIN_FACING = 0.5  # cosine of the angle between the face and the camera: 60 degrees
CORES_PER_LANDMARKER, MAX_LANDMARKERS = 4, 4  # a landmarker uses several cores itself
LOG_LINES = re.compile(rb"[IW]\d{4} \d\d:\d\d|INFO: Created TensorFlow|WARNING: (All log|Logging before)")

Box = tuple[int, int, int, int]  # x0, y0, x1, y1, the last two exclusive


@dataclass(frozen=True)
class Detection:
    """One detected face: mesh (478, 2), and whether it can be lip-synced.

    It is usable if it is turned less than 60 degrees away from the camera and its mouth lies inside the frame.
    """

    landmarks: np.ndarray
    usable: bool

    @property
    def low(self) -> np.ndarray:
        return self.landmarks.min(0)

    @property
    def high(self) -> np.ndarray:
        return self.landmarks.max(0)

    @property
    def centre(self) -> np.ndarray:
        return (self.low + self.high) / 2

    @property
    def size(self) -> float:
        return float((self.high - self.low).max())

    @property
    def points(self) -> np.ndarray:
        """The alignment points, (3, 2)."""
        return np.stack([self.landmarks[list(indices)].mean(0) for indices in ALIGNMENT_POINTS])

    def distance(self, other: "Detection") -> float:
        """Distance between the centres of both faces, in sizes of this one."""
        return float(np.linalg.norm(other.centre - self.centre)) / self.size


def mouth_opening(landmarks: np.ndarray) -> float:
    """Gap between the inner lips over the distance of the outer eye corners, of (478, 2) landmarks."""
    gap = np.linalg.norm(landmarks[UPPER_LIP] - landmarks[LOWER_LIP])
    return float(gap / np.linalg.norm(landmarks[EYE_CORNERS[0]] - landmarks[EYE_CORNERS[1]]))


def detect(landmarker: "FaceLandmarker", frame: np.ndarray, box: Box, max_side: int) -> list[Detection]:
    """Detect the faces in a box of a frame uint8 RGB (H, W, 3).

    The box is clipped to the frame and its pixels are shrunk to `max_side`; small faces are found only in small boxes.
    """
    x0, y0, x1, y1 = max(box[0], 0), max(box[1], 0), min(box[2], frame.shape[1]), min(box[3], frame.shape[0])
    width, height = x1 - x0, y1 - y0
    if min(width, height) < MIN_BOX:
        return []
    crop = frame[y0:y1, x0:x1]
    if max(width, height) > max_side:
        scale = max_side / max(width, height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        crop = cv2.resize(crop, size, interpolation=cv2.INTER_AREA)
    result = landmarker.detect(_as_image(crop))
    detections = []
    for mesh, pose in zip(result.face_landmarks, result.facial_transformation_matrixes, strict=True):
        # The landmarker's 0 to 1 runs over the pixels' edges.
        landmarks = np.array([(point.x, point.y) for point in mesh]) * (width, height) + (x0 - 0.5, y0 - 0.5)
        mouth = landmarks[list(MOUTH_EDGE)]
        inside = (mouth >= 0).all() and (mouth <= (frame.shape[1] - 1, frame.shape[0] - 1)).all()
        detections.append(Detection(landmarks, usable=bool(inside and pose[2, 2] > MIN_FACING)))
    return detections


def tiles(frame: np.ndarray, thorough: bool, smallest: float = MIN_BOX) -> Iterator[tuple[list[Box], int]]:
    """Yield square boxes to search, and their side: the whole frame and, if `thorough`, ever smaller tiles."""
    height, width = frame.shape[:2]
    side = max(width, height)
    yield [(0, 0, side, side)], side
    for share in TILES if thorough else ():
        side = round(min(width, height) * share)
        if side < max(smallest, MIN_BOX):
            return
        yield [(x, y, x + side, y + side) for y in tile_starts(height, side) for x in tile_starts(width, side)], side


def tile_starts(length: int, side: int) -> list[int]:
    """The first pixels of overlapping tiles of `side` that cover `length`."""
    count = 1 + max(0, int(np.ceil((length - side) / (side * TILE_STEP))))
    return [round(i * (length - side) / max(count - 1, 1)) for i in range(count)]


class LandmarkerPool:
    """A landmarker for the caller's thread, and one for each of `workers` threads; see `open_pool`.

    Those of the threads are opened at their first search, which saves a job 0.04 s for each before its first frame.
    """

    def __init__(self, landmarker: "FaceLandmarker", workers: int):
        self.workers = workers
        self._landmarker = landmarker
        self._idle: queue.SimpleQueue[FaceLandmarker] = queue.SimpleQueue()
        self._opened = ExitStack()  # those of the threads
        self._executor = ThreadPoolExecutor(workers, "faces") if workers else None

    def detect(self, frame: np.ndarray, box: Box, max_side: int = CROP_PIXELS) -> list[Detection]:
        """Detect faces in the caller's thread; arguments as of the function `detect`."""
        return detect(self._landmarker, frame, box, max_side)

    def submit(self, frame: np.ndarray, box: Box, max_side: int = CROP_PIXELS) -> Future[list[Detection]] | None:
        """Detect faces in a worker; None if there are no workers."""
        return self._executor.submit(self._detect_in_worker, frame, box, max_side) if self._executor else None

    def detect_all(self, frame: np.ndarray, boxes: list[Box], max_side: int = TILE_PIXELS) -> list[Detection]:
        """The faces in all boxes, in their order; several boxes are shared among the workers."""
        if self._executor is None or len(boxes) == 1:
            return [face for box in boxes for face in self.detect(frame, box, max_side)]
        results = self._executor.map(lambda box: self._detect_in_worker(frame, box, max_side), boxes)
        return [face for faces in results for face in faces]

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        self._opened.close()

    def _detect_in_worker(self, frame: np.ndarray, box: Box, max_side: int) -> list[Detection]:
        try:
            landmarker = self._idle.get_nowait()
        except queue.Empty:  # so fewer are open than there are threads
            landmarker = self._opened.enter_context(_open_landmarker())
        try:
            return detect(landmarker, frame, box, max_side)
        finally:
            self._idle.put(landmarker)


@contextmanager
def open_pool(landmarkers: int | None = None) -> Iterator[LandmarkerPool]:
    """Open a pool with that many landmarkers working side by side; by default as many as the processor's cores allow.

    One works in the caller's thread. Raises UserError if the landmarker's model file is missing.
    """
    if landmarkers is None:
        landmarkers = min(max(usable_cores() // CORES_PER_LANDMARKER, 1), MAX_LANDMARKERS)
    with ExitStack() as stack:
        landmarker = stack.enter_context(_open_landmarker())
        pool = LandmarkerPool(landmarker, landmarkers if landmarkers > 1 else 0)
        stack.callback(pool.close)
        yield pool


@contextmanager
def face_reader() -> Iterator[Callable[[np.ndarray], np.ndarray | None]]:
    """A function from a picture uint8 RGB (H, W, 3) to the mesh (478, 2) of its largest face, or None.

    Raises UserError if the landmarker's model file is missing.
    """
    with _open_landmarker() as landmarker:

        def read(picture: np.ndarray) -> np.ndarray | None:
            faces = detect(landmarker, picture, (0, 0, picture.shape[1], picture.shape[0]), CROP_PIXELS)
            return max(faces, key=lambda face: face.size).landmarks if faces else None

        yield read


def _as_image(pixels: np.ndarray) -> "Image":
    from latentsync.mediapipe_vision import Image, ImageFormat

    return Image(image_format=ImageFormat.SRGB, data=np.ascontiguousarray(pixels))


@contextmanager
def _open_landmarker() -> Iterator["FaceLandmarker"]:
    """Open MediaPipe's landmarker for the time of the context."""
    try:
        model = MODEL_FILE.read_bytes()  # read here: MediaPipe cannot open every path that Python can
    except OSError:
        raise UserError(f"Cannot read the face model {MODEL_FILE}: restore it from the repository.") from None
    from latentsync.mediapipe_vision import BaseOptions, FaceLandmarker, FaceLandmarkerOptions

    options = FaceLandmarkerOptions(
        base_options=BaseOptions(model_asset_buffer=model),
        num_faces=MAX_FACES,
        output_facial_transformation_matrixes=True,
    )
    with _log_lines_removed():
        landmarker = FaceLandmarker.create_from_options(options)
        blank = np.zeros((64, 64, 3), np.uint8)
        landmarker.detect(_as_image(blank))
    try:
        yield landmarker
    finally:
        landmarker.close()


_stderr_lock = threading.Lock()


@contextmanager
def _log_lines_removed() -> Iterator[None]:
    """Remove the log lines that MediaPipe's native code writes to stderr when it starts, and no other lines.

    None of its environment variables and options does.
    """
    with _stderr_lock, tempfile.TemporaryFile() as captured:
        try:
            stderr = os.dup(2)
        except OSError:  # a windowed program without a console
            yield
            return
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            captured.seek(0)
            rest = b"".join(line for line in captured if not LOG_LINES.match(line))
            with suppress(OSError):
                os.write(stderr, rest)
            os.close(stderr)
