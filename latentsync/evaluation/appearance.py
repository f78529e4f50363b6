"""Compare a person's appearance in the source and in the result, around the hull of the mouth.

Faces are aligned crops, uint8 RGB (n, R, R, 3); hulls of lips and chin in the source's frames are bool (n, R, R).
"""

import cv2
import numpy as np

from latentsync.evaluation.measures import border_energy, flicker

HULL_POINTS = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 375, 321, 405, 314, 17, 84, 181, 91, 146, 199)
NEAR = 12.0  # pixels of a 256 px crop by which the hull is grown: only pixels within may differ from the source


def mouth_hulls(points: np.ndarray, side: int, grown: float = 0.0) -> np.ndarray:
    """Hulls of points (n, k, 2) in crops: bool (n, side, side), grown by `grown` pixels."""
    hulls = np.zeros((len(points), side, side), np.uint8)
    for hull, corners in zip(hulls, points, strict=True):
        if np.isfinite(corners).all():
            corners = cv2.convexHull(corners.astype(np.float32))
            cv2.fillConvexPoly(hull, np.round(corners * 16).astype(np.int32), 1, shift=4)
    if grown:
        distances = [cv2.distanceTransform(1 - hull, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for hull in hulls]
        return np.stack(distances) <= grown
    return hulls > 0


def outside_psnr(result: np.ndarray, source: np.ndarray, hulls: np.ndarray) -> float:
    """PSNR in dB over the lower half of the faces, outside the hulls; infinite where nothing differs."""
    outside = ~hulls
    outside[:, : hulls.shape[1] // 2] = False
    error = np.mean((result[outside].astype(np.float32) - source[outside].astype(np.float32)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error > 0 else np.inf


def detail_ratio(result: np.ndarray, source: np.ndarray, hulls: np.ndarray) -> float:
    """Mean absolute Laplacian of the grey values inside the hulls, over that of the source."""

    def detail(faces: np.ndarray) -> float:
        edges = (cv2.Laplacian(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY), cv2.CV_32F, ksize=3) for face in faces)
        return float(np.mean([np.abs(edge[hull]).mean() for edge, hull in zip(edges, hulls, strict=True)]))

    return detail(result) / detail(source)


def colour_difference(result: np.ndarray, source: np.ndarray, hulls: np.ndarray) -> float:
    """CIEDE2000 between the mean colours inside the hulls, over all frames."""

    def mean_colour(faces: np.ndarray) -> np.ndarray:
        mean = (faces[hulls].mean(0) / 255).astype(np.float32)
        return cv2.cvtColor(mean[None, None], cv2.COLOR_RGB2Lab)[0, 0]

    return ciede2000(mean_colour(result), mean_colour(source))


def ciede2000(one: np.ndarray, other: np.ndarray) -> float:
    """The CIEDE2000 difference of two colours (3,) in CIELAB (Sharma, Wu, Dalal 2005)."""
    (l1, a1, b1), (l2, a2, b2) = (np.asarray(colour, float) for colour in (one, other))
    chroma = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7))
    a1, a2 = a1 * stretch, a2 * stretch
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = (np.degrees(np.arctan2(b, a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    hue_change = (h2 - h1 + 180) % 360 - 180 if c1 * c2 else 0.0
    mean_hue = (h1 + hue_change / 2) % 360 if c1 * c2 else h1 + h2
    dl, dc, dh = l2 - l1, c2 - c1, 2 * np.sqrt(c1 * c2) * np.sin(np.radians(hue_change / 2))
    ml, mc = (l1 + l2) / 2, (c1 + c2) / 2
    t = (
        1
        - 0.17 * np.cos(np.radians(mean_hue - 30))
        + 0.24 * np.cos(np.radians(2 * mean_hue))
        + 0.32 * np.cos(np.radians(3 * mean_hue + 6))
        - 0.20 * np.cos(np.radians(4 * mean_hue - 63))
    )
    sl = 1 + 0.015 * (ml - 50) ** 2 / np.sqrt(20 + (ml - 50) ** 2)
    sc, sh = 1 + 0.045 * mc, 1 + 0.015 * mc * t
    blue = np.exp(-(((mean_hue - 275) / 25) ** 2))
    rotation = -2 * np.sqrt(mc**7 / (mc**7 + 25.0**7)) * np.sin(np.radians(60 * blue))
    dl, dc, dh = dl / sl, dc / sc, dh / sh
    return float(np.sqrt(dl**2 + dc**2 + dh**2 + rotation * dc * dh))


def seam_ratio(result: np.ndarray, source: np.ndarray, hulls: np.ndarray) -> float:
    """Gradient energy across the border of the hulls, over the source's."""

    def energy(faces: np.ndarray) -> float:
        return sum(border_energy(face[None], hull) for face, hull in zip(faces, hulls, strict=True) if hull.any())

    return energy(result) / energy(source)


def compare_appearance(
    result: np.ndarray, source: np.ndarray, source_points: np.ndarray, result_points: np.ndarray
) -> dict[str, float]:
    """All measures of one clip; points (n, k, 2): HULL_POINTS of each frame's mesh, NaN without a face.

    The seam is measured around the mouths of both, as the corners of a mouth that has become wider are no seam.
    Flicker is measured where most hulls are: over the source's, and in grey levels for sources that stand still.
    """
    side = source.shape[1]
    near = NEAR * side / 256
    inner, outer = mouth_hulls(source_points, side), mouth_hulls(source_points, side, near)
    both = np.concatenate([source_points, np.where(np.isfinite(result_points), result_points, source_points)], axis=1)
    usual = outer.mean(0) > 0.5
    levels = flicker(result, usual)
    return {
        "outside": outside_psnr(result, source, outer),
        "detail": detail_ratio(result, source, outer),
        "colour": colour_difference(result, source, inner),
        "seam": seam_ratio(result, source, mouth_hulls(both, side, 0.75 * near)),
        "flicker": levels / flicker(source, usual),
        "flicker_levels": levels,
    }
