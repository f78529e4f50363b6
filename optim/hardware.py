"""What GPUs there are, the level that suits one, and how much goes through it at once.

Batch sizes come from a model of memory, not from a list of cards: what the weights leave of the memory allowed
is divided by the bytes that a frame and a window take.
"""

import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml
import torch

from optim.levels import STOPS, VRAM_FRACTION, Level

GIB = 2**30
# Cards report less than they are sold with: up to 1/16 goes to error correction, 1 to 2 % to the driver. An 11 GB
# card is 8.3 % short of 12.
NOMINAL = 0.92
# How far CUDA's figure may lie below NVML's and still mean the whole card; less is a slice of it (MIG).
WHOLE_CARD = 0.9


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch counts them, which is not NVML's order where CUDA_VISIBLE_DEVICES says otherwise."""

    index: int  # cuda:index
    name: str
    memory_total: int  # bytes
    memory_free: int  # bytes that this process may still take, with what its allocator already holds
    capability: tuple[int, int]
    driver: str | None = None  # None where NVML cannot be read


def processor_name() -> str:
    """The processor's name, as its maker and the system give it."""
    if (info := Path("/proc/cpuinfo")).is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextmanager
def nvml_session(nvml: Any = pynvml) -> Iterator[Any | None]:
    """NVML, ready for questions; None where it cannot be read. nvml: the pynvml module, or what answers like it."""
    session = nvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        session = None
    try:
        yield session
    finally:
        if session is not None:
            with suppress(nvml.NVMLError):
                nvml.nvmlShutdown()


def ask(nvml: Any, question: str, *arguments: Any) -> Any | None:
    """NVML's answer to a question by its name; None where this card or driver has none."""
    try:
        return getattr(nvml, question)(*arguments)
    except (nvml.NVMLError, UnicodeDecodeError):
        return None


def nvml_gpus(nvml: Any | None) -> Iterator[tuple[int, Any]]:
    """NVML's index and handle of every GPU that it shows; none for a session without NVML."""
    for index in range(ask(nvml, "nvmlDeviceGetCount") or 0) if nvml is not None else ():
        handle = ask(nvml, "nvmlDeviceGetHandleByIndex", index)
        if handle is not None:
            yield index, handle


def read_gpus(nvml: Any = pynvml, cuda: Any = torch.cuda) -> list[Gpu]:
    """The GPUs that torch can use, in torch's order; empty without one.

    NVML adds the driver's version and what other processes take; where it cannot be read, torch's figures stand.
    """
    if not cuda.is_available():
        return []
    with nvml_session(nvml) as session:
        return [_read_gpu(index, session, cuda) for index in range(cuda.device_count())]


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU that a torch device is; None for the processor."""
    return read_gpus()[device.index or 0] if device.type == "cuda" else None


def _read_gpu(index: int, nvml: Any | None, cuda: Any) -> Gpu:
    found = cuda.get_device_properties(index)
    total, driver, memory = found.total_memory, None, None
    if nvml is not None:
        driver = ask(nvml, "nvmlSystemGetDriverVersion")
        handle = _nvml_handle(nvml, found)
        memory = ask(nvml, "nvmlDeviceGetMemoryInfo", handle) if handle is not None else None
    if memory is not None and total >= WHOLE_CARD * memory.total:
        total, free = memory.total, memory.free
    else:
        free = cuda.mem_get_info(index)[0]
    free = min(total, free + cuda.memory_reserved(index))
    return Gpu(index, found.name, total, free, (found.major, found.minor), driver)


def _nvml_handle(nvml: Any, properties: Any) -> Any | None:
    """NVML's handle of a torch device: by UUID, else by its place on the PCI bus, else None."""
    uuid = getattr(properties, "uuid", None)  # printed without NVML's prefix
    for prefix in ("GPU-", "MIG-") if uuid else ():
        handle = ask(nvml, "nvmlDeviceGetHandleByUUID", f"{prefix}{uuid}")
        if handle is not None:
            return handle
    place = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if None in place:
        return None
    return ask(nvml, "nvmlDeviceGetHandleByPciBusId", "{:08X}:{:02X}:{:02X}.0".format(*place))


def nvml_index(device: torch.device, nvml: Any = pynvml, cuda: Any = torch.cuda) -> int:
    """NVML's number of a torch device, which torch may count otherwise; torch's own where NVML cannot be asked."""
    with nvml_session(nvml) as session:
        handle = None if session is None else _nvml_handle(session, cuda.get_device_properties(device))
        index = None if handle is None else ask(session, "nvmlDeviceGetIndex", handle)
    return (device.index or 0) if index is None else index


def recommended_level(gpu: Gpu | None) -> Level:
    """The default level for a card, by the memory it is sold with; the one that costs no quality without a card."""
    memory = gpu.memory_total if gpu else 0
    return [level for level in STOPS if memory >= NOMINAL * level.card_gib * GIB][-1]


def apply_vram_fraction(fraction: float = VRAM_FRACTION, index: int = 0, cuda: Any = torch.cuda) -> bool:
    """Let torch take no more than this fraction of a GPU's memory; says whether there is a GPU to hold to it.

    An allocation beyond it fails as one beyond the card's memory would.
    """
    if not cuda.is_available():
        return False
    cuda.set_per_process_memory_fraction(float(fraction), index)
    return True


SIDE = 512  # px: the side at which the memory model and the largest useful batches are stated
TILE = 256  # px: side of the tiles in which diffusers' VAE works when it tiles


@dataclass(frozen=True)
class MemoryModel:
    """Bytes that inference takes. Those of a window and of a frame are for SIDE and go with the pixels."""

    weights: int  # U-Net, VAE and audio encoder
    fixed: int  # workspaces, whatever the size
    window: int  # one window of 16 frames with guidance in one U-Net pass
    encode_frame: int  # one frame in one VAE encode
    decode_frame: int  # one frame in one VAE decode

    def window_at(self, resolution: int) -> int:
        return math.ceil(self.window * (resolution / SIDE) ** 2)

    def frame_at(self, resolution: int) -> int:
        """The larger of encode and decode, which take turns."""
        return math.ceil(max(self.encode_frame, self.decode_frame) * (resolution / SIDE) ** 2)


# The released models in float16, eager, November 2026. `decode_frame` and `fixed` are the line through the peaks
# measured on one H200, 10.3 GB at 512 px and 4.7 GB at 256, both in the decode of 16 frames at once. Those peaks
# are 1.16 × what the live tensors alone add up to (403 MB a frame at 512 px), and `window` and `encode_frame` are
# the live tensors' 2.24 GB and 336 MB times that. With fused kernels the same decode peaks lower (5.9 GB with 8
# frames, 8.8 GB with 16, on an H100, 0.36 GB a frame); the difference is room for what captured graphs keep.
RELEASED = MemoryModel(
    weights=2_536_000_000 + 167_000_000 + 17_000_000,
    fixed=133_000_000,
    window=2_600_000_000,
    encode_frame=390_000_000,
    decode_frame=467_000_000,
)

# The largest batches of use at SIDE, to be scaled with the pixels: the decode of 20 frames is 50 TFLOP and a step
# over one window 35, 0.1 s each on an H100, so that beyond these a batch takes memory, and delays the stages that wait
# for it, for nothing.
MOST_FRAMES = 20
MOST_WINDOWS = 1
PLANNED = 0.95  # of the memory allowed; the rest is for fragments and for NVML's total being above CUDA's


@dataclass(frozen=True)
class BatchSizes:
    """What goes through together, and the memory that it takes by the model."""

    frames: int  # a pass of the frame-wise stages: VAE encode and decode, putting back
    windows: int  # a U-Net pass
    tiling: bool  # the VAE takes its frame in tiles
    planned: int  # bytes, weights included
    allowed: int  # bytes

    @property
    def fits(self) -> bool:
        return self.planned <= self.allowed


def batch_sizes(memory: Gpu | int, resolution: int, level: Level, model: MemoryModel = RELEASED) -> BatchSizes:
    """The batches for a GPU, or for a memory in bytes, at a resolution in px and a level.

    Both are cut in the same proportion until they fit, to one frame and one window at the least. Window and
    frames are counted as held together, since captured graphs keep their memory and stages overlap. Where not even
    one window and one frame in tiles fit, these are returned all the same, and `fits` is False.
    """
    total, free = (memory.memory_total, memory.memory_free) if isinstance(memory, Gpu) else (memory, memory)
    allowed = int(min(level.vram_fraction * total, free))
    window, frame = model.window_at(resolution), model.frame_at(resolution)
    base = model.weights + model.fixed
    tiling = level.vae_tiling and base + window + frame > PLANNED * allowed
    if tiling:
        frame = model.frame_at(min(resolution, TILE))
    most = int(MOST_FRAMES * level.batch_share * (SIDE / max(resolution, TILE)) ** 2)
    frames = 1 if tiling else max(1, most)
    while True:
        windows = max(1, frames * MOST_WINDOWS // MOST_FRAMES)
        planned = base + windows * window + frames * frame
        if planned <= PLANNED * allowed or frames == 1:
            return BatchSizes(frames, windows, tiling, planned, allowed)
        frames -= 1
