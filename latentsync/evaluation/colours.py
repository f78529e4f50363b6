"""What matching of colours gives: crops of real films, damaged as a network may do it, without and with it.

It is a simulation: the painted face is that of another frame, with the damage. See `compositing.match_colours`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from latentsync.alignment import fixed_mask
from latentsync.checkpoints.load import Models
from latentsync.compositing import MATCHED_AREAS, match_colours, merge_faces
from latentsync.errors import UserError
from latentsync.evaluation.appearance import colour_difference
from latentsync.evaluation.clips import SIDE, track_clip
from latentsync.evaluation.measures import border_energy, flicker
from latentsync.media import probe_video, read_frames
from latentsync.painting import generated_pixels
from latentsync.vae import decode, encode, to_pixels

FRAMES = 16  # of every film
MASK = fixed_mask(SIDE)
HIDDEN = MASK < 0.5
BAND = 8  # pixels inside the mask's border, along which its step is measured
# The damage: a cast, and blur.
GAINS, OFFSETS = (1.06, 0.97, 0.94), (4.0, -3.0, 5.0)  # of red, green and blue; grey levels
WAVER = 0.02  # standard deviation of the gains from frame to frame
BLUR_SIGMA = 1.0  # pixels
# What films are like.
NOISE, GRAIN, LOW_LIGHT_NOISE = 24.0, 12.0, 10.0  # standard deviations in grey levels
GRAIN_SIGMA = 1.5  # pixels
JPEG_QUALITY = 12
TINT = np.array([1.15, 0.85, 0.5])  # orange
LOW_LIGHT, OVER_EXPOSURE = 0.3, 1.6  # gains

Crops = np.ndarray  # uint8 (n, SIDE, SIDE, 3)
Film = Callable[[Crops, np.random.Generator], np.ndarray]


def _noise(crops: Crops, deviation: float, random: np.random.Generator) -> np.ndarray:
    return crops + random.normal(0, deviation, crops.shape)


def _grain(crops: Crops, random: np.random.Generator) -> np.ndarray:
    """Noise of one colour, softened."""
    noise = random.normal(0, 1, crops.shape[:3])
    soft = np.stack([cv2.GaussianBlur(layer, (0, 0), GRAIN_SIGMA) for layer in noise])
    return crops + (GRAIN / soft.std() * soft)[..., None]


def _blocks(crops: Crops) -> np.ndarray:
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    files = (cv2.imencode(".jpg", crop[..., ::-1], options)[1] for crop in crops)
    return np.stack([np.asarray(cv2.imdecode(file, cv2.IMREAD_COLOR_RGB)) for file in files])


FILMS: dict[str, Film] = {
    "as filmed": lambda crops, random: crops,
    "strong orange tint": lambda crops, random: crops * TINT,
    f"noise ({NOISE:.0f} grey levels)": lambda crops, random: _noise(crops, NOISE, random),
    "soft grain": _grain,
    f"JPEG blocks (quality {JPEG_QUALITY})": lambda crops, random: _blocks(crops),
    "low light, noise": lambda crops, random: _noise(crops * LOW_LIGHT, LOW_LIGHT_NOISE, random),
    "over-exposed": lambda crops, random: crops * OVER_EXPOSURE,
}


@dataclass(frozen=True)
class ColourMeasures:
    """Measures of one film with one kind of damage, each without and with matching: (2,).

    colour: ΔE (CIEDE2000) between the mean colours of the hidden part and those without damage; step: difference of
    colour from those without damage along the inside of the mask's border, grey levels; seam, flicker: over those
    without damage.
    """

    film: str
    damage: str
    colour: tuple[float, float]
    step: tuple[float, float]
    seam: tuple[float, float]
    flicker: tuple[float, float]


def with_cast(faces: Crops, random: np.random.Generator) -> Crops:
    """Faces with a cast that wavers from frame to frame, and blurred."""
    gains = np.array(GAINS) + random.normal(0, WAVER, (len(faces), 1, 1, 3))
    cast = np.clip(faces * gains + np.array(OFFSETS), 0, 255).astype(np.float32)
    return np.stack([cv2.GaussianBlur(face, (0, 0), BLUR_SIGMA) for face in cast]).round().astype(np.uint8)


@torch.inference_mode()
def through_autoencoder(faces: Crops, models: Models) -> Crops:
    """Faces as the model's autoencoder returns them, at its resolution."""
    size = (models.resolution, models.resolution)
    returned = []
    for face in faces:
        pixels = to_pixels(torch.from_numpy(face[None]).to(models.device), models.dtype)
        small = F.interpolate(pixels, size, mode="bicubic", antialias=True)
        decoded = decode(models.vae, encode(models.vae, small))
        returned.append(generated_pixels(F.interpolate(decoded, (SIDE, SIDE), mode="bicubic"))[0].cpu().numpy())
    return np.stack(returned)


def step(faces: Crops, true: Crops) -> float:
    """Mean difference of colour between faces along the inside of the mask's border, grey levels."""
    inside = HIDDEN & (cv2.distanceTransform(HIDDEN.astype(np.uint8), cv2.DIST_L2, 3) <= BAND)
    difference = faces[:, inside].astype(float) - true[:, inside]
    return float(np.abs(difference.mean(1)).mean())


def measure_damage(film: str, damage: str, painted: Crops, true: Crops, crops: Crops) -> ColourMeasures:
    """Paste painted faces without and with matching of their colours, and compare with those without damage."""
    mask, film_crops = torch.from_numpy(MASK.copy()), torch.from_numpy(crops)
    generated = torch.from_numpy(painted).permute(0, 3, 1, 2) / 127.5 - 1
    results = [
        generated_pixels(merge_faces(faces, film_crops, mask)).numpy()
        for faces in (generated, match_colours(generated, film_crops, mask, MATCHED_AREAS))
    ]
    hidden = np.broadcast_to(HIDDEN, true.shape[:3])
    off_on = {
        "colour": [colour_difference(result, true, hidden) for result in results],
        "step": [step(result, true) for result in results],
        "seam": [border_energy(result, HIDDEN) / border_energy(true, HIDDEN) for result in results],
        "flicker": [flicker(result, HIDDEN) / flicker(true, HIDDEN) for result in results],
    }
    return ColourMeasures(film, damage, **{name: (off, on) for name, (off, on) in off_on.items()})


def read_crops(path: Path) -> Crops:
    """The aligned faces of the first frames of a film that show one. Raises UserError where they are too few."""
    track = track_clip(np.stack(list(read_frames(probe_video(path), count=4 * FRAMES))))
    crops = track.crops[np.isfinite(track.opening)][:FRAMES]
    if len(crops) < FRAMES:
        raise UserError(f"'{path}' shows a face in fewer than {FRAMES} frames: take a longer film.")
    return crops


def measure_colours(crops: Crops, models: Models, seed: int = 0) -> Iterator[ColourMeasures]:
    """Measure one person's crops as they would be in every kind of film, with every kind of damage."""
    for name, film in FILMS.items():
        random = np.random.default_rng(seed)
        seen = np.clip(film(crops, random), 0, 255).round().astype(np.uint8)
        # A network shows the visible part as it is, and another mouth in the hidden one.
        true = np.where(HIDDEN[..., None], np.roll(seen, len(seen) // 2, axis=0), seen)
        cast = with_cast(true, random)
        damages = {
            "everywhere": cast,
            "in the mask": np.where(HIDDEN[..., None], cast, true),
            "autoencoder": through_autoencoder(true, models),
        }
        for damage, painted in damages.items():
            yield measure_damage(name, damage, painted, true, seen)


def colours_table(measures: list[ColourMeasures]) -> str:
    """A row for every kind of film, and one of means over all, in Markdown; without → with matching."""
    columns = [("everywhere", key) for key in ("colour", "step", "seam", "flicker")]
    columns += [("in the mask", "colour"), ("autoencoder", "colour")]

    def row(title: str, rows: list[ColourMeasures]) -> str:
        cells = [title]
        for damage, key in columns:
            off, on = np.mean([getattr(each, key) for each in rows if each.damage == damage], axis=0)
            digits = 1 if key in ("colour", "step") else 2
            cells.append(f"{off:.{digits}f} → {on:.{digits}f}")
        return f"| {' | '.join(cells)} |"

    return "\n".join(
        [
            "| source | everywhere: ΔE | step | seam | flicker | in the mask: ΔE | autoencoder: ΔE |",
            "|---|---|---|---|---|---|---|",
            *(row(film, [each for each in measures if each.film == film]) for film in FILMS),
            row(f"**mean of {sum(each.damage == 'everywhere' for each in measures)}**", measures),
        ]
    )
