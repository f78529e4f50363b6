"""The levels of optimization: one table, and the slider that runs through it.

                      conservative   balanced       aggressive
    slider            0              0.5            1
    default from      any memory     12 GiB         24 GiB
    inference steps   as asked       −20 %          −40 %
    DeepCache         off            (2, 0)         (3, 0), guidance in full passes only
    TF32              off            on             on
    torch.compile     off            off            for long jobs where nothing faster runs
    kernels, graphs   on             on             on
    batch             standard       larger         the most that is of use and fits

Conservative is a promise: its result is the plain pipeline's, so it holds every speed that costs no quality and
nothing else. Fewer steps cost little: 16 of them in place of 20 left the mouth of an earlier demo model on a clip of
the corpus at 62 dB to it; DeepCache costs more: 50 dB with (2, 0), 42 with (3, 0), and at 12 steps 40 with (3, 0), 36
with (4, 0), where guidance left out of shallow passes made no difference. Balanced may change the result, but not
visibly.
Aggressive takes all there is.
Nobody outside this module asks which level it is; what is to be done stands in its fields.
"""

import math
from dataclasses import dataclass, fields, replace

from latentsync.errors import UserError
from latentsync.settings import DeepCache

VRAM_FRACTION = 0.85  # of a card's memory, for this process; the rest is the desktop's and the driver's
BRANCHES = 12  # DeepCache branches of a U-Net with four levels: three a level, whatever its layers


@dataclass(frozen=True)
class Level:
    """All that decides how fast and how faithfully a run is made. Raises UserError where a value is out of range."""

    name: str  # to show, never to ask for
    position: float  # on the slider: 0 quality … 1 speed
    card_gib: int  # the default level for cards with at least this much memory, GiB
    step_share: float  # of the inference steps asked for, 0.01 to 1
    cache: DeepCache | None  # full passes at every interval-th step only; None: at all
    tf32: bool  # float32 matrix products and convolutions in TensorFloat-32
    compile: bool | None  # torch.compile; None: for long jobs where nothing faster runs
    graphs: bool  # passes captured as CUDA graphs
    fused: bool  # hand-written kernels for norms and activations
    vae_tiling: bool  # a frame that does not fit into memory whole goes through the VAE in tiles
    batch_share: float  # of the largest batch that is of use, 0.01 to 1
    vram_fraction: float = VRAM_FRACTION  # of the card's memory, 0.1 to 1

    def __post_init__(self) -> None:
        for name, low, high in (
            ("position", 0, 1), ("step_share", 0.01, 1), ("batch_share", 0.01, 1), ("vram_fraction", 0.1, 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise UserError(f"The setting {name} is {value!r}: give a number from {low} to {high}.")
        for name in ("tf32", "compile", "graphs", "fused", "vae_tiling"):
            if not isinstance(getattr(self, name), bool) and not (name == "compile" and self.compile is None):
                raise UserError(f"The setting {name} is {getattr(self, name)!r}: it is either True or False.")
        cache = self.cache
        if cache is not None and not (isinstance(cache, DeepCache) and cache.branch < BRANCHES):
            raise UserError(
                f"The setting cache is {cache!r}: give None, or a DeepCache with a branch from 0 to {BRANCHES - 1}."
            )


CONSERVATIVE = Level(
    "conservative", position=0.0, card_gib=0, step_share=1.0, cache=None, tf32=False,
    compile=False, graphs=True, fused=True, vae_tiling=True, batch_share=0.5,
)  # fmt: skip
BALANCED = Level(
    "balanced", position=0.5, card_gib=12, step_share=0.8, cache=DeepCache(2, 0), tf32=True,
    compile=False, graphs=True, fused=True, vae_tiling=True, batch_share=0.8,
)  # fmt: skip
AGGRESSIVE = Level(
    "aggressive", position=1.0, card_gib=24, step_share=0.6, cache=DeepCache(3, 0, guided=False), tf32=True,
    compile=None, graphs=True, fused=True, vae_tiling=True, batch_share=1.0,
)  # fmt: skip
STOPS = (CONSERVATIVE, BALANCED, AGGRESSIVE)  # by position and by memory
SETTINGS = tuple(f.name for f in fields(Level) if f.name not in ("name", "position", "card_gib"))


def level_at(position: float) -> Level:
    """The level at a slider position from 0 (quality) to 1 (speed); at 0, 0.5 and 1 exactly the named ones.

    Between two stops the step share and the cache interval lie between theirs, and all else is as at the stop
    below: nothing that could change the result comes before the stop that stands for it, but those two.
    Raises UserError out of range.
    """
    if not 0 <= position <= 1:
        raise UserError(f"The level is {position}: give a number from 0 (quality) to 1 (speed), or a name.")
    below = max((stop for stop in STOPS if stop.position <= position), key=lambda stop: stop.position)
    if below.position == position:
        return below
    above = STOPS[STOPS.index(below) + 1]
    way = (position - below.position) / (above.position - below.position)
    intervals = [stop.cache.interval if stop.cache else 1 for stop in (below, above)]
    interval = _nearest(intervals[0] + way * (intervals[1] - intervals[0]))
    return replace(
        below,
        name=f"between {below.name} and {above.name}",
        position=float(position),
        step_share=below.step_share + way * (above.step_share - below.step_share),
        cache=replace(below.cache or above.cache, interval=interval) if interval > 1 else None,
    )


def find_level(text: str) -> Level:
    """The level that a user means by a name or by a slider position. Raises UserError."""
    for stop in STOPS:
        if stop.name == text.strip().lower():
            return stop
    try:
        return level_at(float(text))
    except ValueError:
        names = ", ".join(stop.name for stop in STOPS)
        raise UserError(f"There is no level '{text}': give {names}, or a number from 0 to 1.") from None


def steps_for(level: Level, asked: int) -> int:
    """Inference steps of a run for which `asked` were asked; never under 1.

    12 to 15 are the fewest to recommend: the default of 20 stays within that at every level, while whoever asks
    for fewer gets fewer still.
    """
    return max(1, _nearest(asked * level.step_share))


def override(level: Level, **settings: object) -> Level:
    """The level with some of its SETTINGS replaced. Raises UserError for an unknown one or a value out of range."""
    for name in settings:
        if name not in SETTINGS:
            raise UserError(f"There is no setting '{name}': a level has {', '.join(SETTINGS)}.")
    return replace(level, **settings)


def _nearest(value: float) -> int:
    # Halves go up, where round() would go to the even side and make the slider uneven; 1e-9 is for 0.1 + 0.2.
    return math.floor(value + 0.5 + 1e-9)
