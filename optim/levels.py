"""The levels of optimization: one table, and the slider that runs through it.

                      conservative   balanced       aggressive
    slider            0              0.5            1
    default from      any memory     12 GiB         24 GiB
    inference steps   as requested   −20 %          −40 %
    DeepCache         off            (2, 0)         (3, 0), guidance in full passes only
    TF32              off            on             on
    torch.compile     off            off            for long jobs without fused kernels
    kernels, graphs   on             on             on
    match colours     as the model   on             on
    painted           every frame    every frame    every second one of 48 frames a second and more
    batch             standard       larger         the largest that is useful and fits

Conservative gives the same result as the plain pipeline: it has every optimization that costs no quality, and no other.
Balanced may change the result, but not visibly. Aggressive uses every optimization.

What the result loses, measured against an earlier demo model on a clip of the corpus: 16 steps instead of 20 left the
mouth at 62 dB; DeepCache (2, 0) at 50 dB and (3, 0) at 42; at 12 steps (3, 0) at 40 and (4, 0) at 36. Leaving guidance
out of shallow passes made no difference.

A new level is one entry of STOPS. No other module asks for a level by its name, only for its fields; nothing here
imports torch, so that a page or a command line can show the levels at once.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from latentsync.errors import UserError
from latentsync.rates import PAINTED
from latentsync.settings import DeepCache

VRAM_FRACTION = 0.85  # of a card's memory, for this process; the rest is the desktop's and the driver's
BRANCHES = 12  # DeepCache branches of a U-Net with four blocks down: three per block, however many layers it has
SWITCHES = ("tf32", "compile", "graphs", "fused", "vae_tiling")  # fields of a level that are on or off


@dataclass(frozen=True)
class Level:
    """Everything that decides how fast and how faithfully a job runs. Raises UserError for a value out of range."""

    name: str  # for display
    position: float  # on the slider: 0 quality … 1 speed
    card_gib: int  # GiB; the default level for cards with at least this much memory
    step_share: float  # share of the requested inference steps, 0.01 to 1
    cache: DeepCache | None
    tf32: bool  # float32 matrix products and convolutions in TensorFloat-32
    compile: bool | None  # torch.compile; None: for long jobs without fused kernels
    graphs: bool  # passes captured as CUDA graphs
    fused: bool  # hand-written kernels for norms and activations
    vae_tiling: bool  # a frame that does not fit into memory goes through the VAE in tiles
    match_colours: bool  # `Settings.match_colours` where the request leaves it open; False: left to the model
    paint: str  # `Settings.paint` where the request leaves it open
    batch_share: float  # share of the largest useful batch, 0.01 to 1
    vram_fraction: float = VRAM_FRACTION  # of the card's memory, 0.1 to 1

    def __post_init__(self) -> None:
        limits = {"position": (0, 1), "step_share": (0.01, 1), "batch_share": (0.01, 1), "vram_fraction": (0.1, 1)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise UserError(f"The setting {name} is {value!r}: give a number from {low} to {high}.")
        for name in (*SWITCHES, "match_colours"):
            if not isinstance(getattr(self, name), bool) and not (name == "compile" and self.compile is None):
                raise UserError(f"The setting {name} is {getattr(self, name)!r}: it is either True or False.")
        if self.paint not in PAINTED:
            raise UserError(f"The setting paint is {self.paint!r}: give one of {', '.join(PAINTED)}.")
        cache = self.cache
        if cache is not None and not (isinstance(cache, DeepCache) and cache.branch < BRANCHES):
            raise UserError(
                f"The setting cache is {cache!r}: give None, or a DeepCache with a branch from 0 to {BRANCHES - 1}."
            )


STOPS = (  # by position and by memory
    Level(
        "conservative", position=0.0, card_gib=0, step_share=1.0, cache=None, tf32=False,
        compile=False, graphs=True, fused=True, vae_tiling=True, match_colours=False, paint="every",
        batch_share=0.5,
    ),
    Level(
        "balanced", position=0.5, card_gib=12, step_share=0.8, cache=DeepCache(2, 0), tf32=True,
        compile=False, graphs=True, fused=True, vae_tiling=True, match_colours=True, paint="every",
        batch_share=0.8,
    ),
    Level(
        "aggressive", position=1.0, card_gib=24, step_share=0.6, cache=DeepCache(3, 0, guided=False), tf32=True,
        compile=None, graphs=True, fused=True, vae_tiling=True, match_colours=True, paint="second",
        batch_share=1.0,
    ),
)  # fmt: skip
CONSERVATIVE = STOPS[0]  # the level whose result is the plain pipeline's
SETTINGS = tuple(f.name for f in fields(Level) if f.name not in ("name", "position", "card_gib"))


def level_at(position: float) -> Level:
    """The level at a slider position from 0 (quality) to 1 (speed); at a stop's position, that stop itself.

    Between two stops the step share and the cache interval are interpolated, and every other field is that of the stop
    below, so that nothing else changes the result before its stop is reached. Raises UserError out of range.
    """
    if not 0 <= position <= 1:
        raise UserError(f"The level is {position}: give a number from 0 (quality) to 1 (speed), or a name.")
    below = max((stop for stop in STOPS if stop.position <= position), key=lambda stop: stop.position)
    if below.position == position:
        return below
    above = STOPS[STOPS.index(below) + 1]
    share = (position - below.position) / (above.position - below.position)
    first, last = (stop.cache.interval if stop.cache else 1 for stop in (below, above))
    interval = _round_half_up(first + share * (last - first))
    cache = below.cache or above.cache
    return replace(
        below,
        name=f"between {below.name} and {above.name}",
        position=float(position),
        step_share=below.step_share + share * (above.step_share - below.step_share),
        cache=replace(cache, interval=interval) if cache and interval > 1 else None,
    )


def find_level(text: str) -> Level:
    """The level of a name or of a slider position, as users write them. Raises UserError."""
    for stop in STOPS:
        if stop.name == text.strip().lower():
            return stop
    try:
        return level_at(float(text))
    except ValueError:
        names = ", ".join(stop.name for stop in STOPS)
        raise UserError(f"There is no level '{text}': give {names}, or a number from 0 to 1.") from None


def steps_for(level: Level, steps: int) -> int:
    """Inference steps that a level runs when `steps` are requested, at least 1.

    12 to 15 are the fewest to recommend. The default of 20 stays within that at every level; a request for fewer
    is cut further.
    """
    return max(1, _round_half_up(steps * level.step_share))


def override(level: Level, **settings: Any) -> Level:
    """The level with some of its SETTINGS replaced. Raises UserError for an unknown one or a value out of range."""
    for name in settings:
        if name not in SETTINGS:
            raise UserError(f"There is no setting '{name}': a level has {', '.join(SETTINGS)}.")
    return replace(level, **settings)


def _round_half_up(value: float) -> int:
    # round() takes halves to the even side, which would make the slider uneven; 1e-9 allows for 0.1 + 0.2.
    return math.floor(value + 0.5 + 1e-9)
