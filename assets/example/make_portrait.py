"""Make `portrait.png` and `portrait-two.jpg`, faces of nobody: averages of four people each of the GRID corpus.

    python assets/example/make_portrait.py GRID_CLIPS

GRID_CLIPS: a folder of SPEAKER/CLIP.mp4. Each face is taken at its most closed mouth in the first frames of one clip,
warped to the four's average shape, matched in tone, and averaged; see SOURCES.md beside this file.
"""

import sys
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from scipy.spatial import Delaunay

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from latentsync.faces import track_faces
from latentsync.landmarks import mouth_opening
from latentsync.media import probe_video, read_frames

PEOPLE = {"portrait.png": ("s20", "s23", "s31", "s34"), "portrait-two.jpg": ("s1", "s10", "s2", "s3")}
FRAMES = 12  # of a clip, before its speech begins
SIDE = 384
FACE_HEIGHT, FACE_CENTRE = 170, (192, 205)  # pixels, of the landmarks
BALANCE = (1.0, 0.99, 1.3)  # of red, green and blue: the corpus is yellow
SHARPEN, SHARPEN_SIGMA = 0.8, 1.2  # an average is soft


def quiet_face(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The frame with the most closed mouth, and its landmarks (478, 2), of a speaker's first clip."""
    frames = islice(read_frames(probe_video(min(folder.iterdir()))), FRAMES)
    found = [(frame.copy(), face.landmarks) for frame, face in track_faces(frames) if face is not None]
    return min(found, key=lambda pair: mouth_opening(pair[1]))


def similarity(points: np.ndarray, target: np.ndarray) -> np.ndarray:
    return cv2.estimateAffinePartial2D(points.astype(np.float32), target.astype(np.float32), method=cv2.LMEDS)[0]


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:, :2].T + matrix[:, 2]


def average(faces: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Frames with landmarks → the average face, uint8 (SIDE, SIDE, 3)."""
    shape = faces[0][1]
    target = (shape - shape.mean(0)) / np.ptp(shape[:, 1]) * FACE_HEIGHT + FACE_CENTRE
    matrices = [similarity(points, target) for _, points in faces]
    mean = np.mean([apply(m, points) for m, (_, points) in zip(matrices, faces, strict=True)], axis=0)
    ends = np.linspace(0, SIDE - 1, 5)
    border = np.array([(x, y) for x in ends for y in ends if x in (0, SIDE - 1) or y in (0, SIDE - 1)])
    mesh = Delaunay(np.vstack([mean, border]))
    pixels = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), axis=-1).reshape(-1, 2).astype(float)
    triangle = mesh.find_simplex(pixels)
    transform = mesh.transform[triangle]
    two = np.einsum("nij,nj->ni", transform[:, :2], pixels - transform[:, 2])
    weights = np.hstack([two, 1 - two.sum(1, keepdims=True)])[..., None]
    corners = mesh.simplices[triangle]
    warped = []
    for matrix, (frame, points) in zip(matrices, faces, strict=True):
        source = np.vstack([points, apply(cv2.invertAffineTransform(matrix), border)])
        at = (weights * source[corners]).sum(1).astype(np.float32).reshape(SIDE, SIDE, 2)
        warped.append(cv2.remap(frame, at, None, cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REPLICATE).astype(float))
    hull = cv2.convexHull(mean.astype(np.float32)).astype(int)
    inside = cv2.fillConvexPoly(np.zeros((SIDE, SIDE)), hull, 1) > 0
    tones = [picture[inside].mean(0) for picture in warped]
    mean_tone = np.mean(tones, axis=0)
    picture = np.mean([p * (mean_tone / tone) for p, tone in zip(warped, tones, strict=True)], axis=0)
    picture = picture + SHARPEN * (picture - cv2.GaussianBlur(picture, (0, 0), SHARPEN_SIGMA))
    return np.clip(picture * BALANCE, 0, 255).astype(np.uint8)


if __name__ == "__main__":
    for name, people in PEOPLE.items():
        portrait = average([quiet_face(Path(sys.argv[1]) / person) for person in people])
        cv2.imwrite(str(Path(__file__).resolve().parent / name), portrait[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
