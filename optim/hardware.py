"""GPUs, the level recommended for each, and the batch size that fits into its memory.

Batch sizes come from a model of memory, not from a list of cards: the memory that the weights and one window leave is
divided by the bytes that a frame takes.
"""

import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml
import torch

from optim.levels import STOPS, Level

GIB = 2**30
# Cards report less than they are sold with: up to 1/16 goes to error correction, 1 to 2 % to the driver. An 11 GB
# card is 8.3 % short of 12.
NOMINAL = 0.92
# Share of NVML's memory size that CUDA must report for the device to be a whole card; less is a slice of it (MIG).
WHOLE_CARD = 0.9


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use, numbered by torch, whose order differs from NVML's with CUDA_VISIBLE_DEVICES."""

    index: int  # cuda:index
    name: str
    memory_total: int  # bytes
    memory_free: int  # bytes that this process can still use, including those that its allocator holds
    capability: tuple[int, int]
    driver: str | None = None  # None where NVML cannot be read


def processor_name() -> str:
    """The name of this machine's processor."""
    if (info := Path("/proc/cpuinfo")).is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextmanager
def nvml_session(nvml: Any = pynvml) -> Iterator[Any | None]:
    """An initialised NVML; None where it cannot be used. nvml: the pynvml module or a substitute."""
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


def query(nvml: Any, function: str, *arguments: Any) -> Any | None:
    """The result of an NVML function; None where this card or driver does not support it."""
    try:
        return getattr(nvml, function)(*arguments)
    except (nvml.NVMLError, UnicodeDecodeError):
        return None


def nvml_gpus(nvml: Any | None) -> Iterator[tuple[int, Any]]:
    """NVML's index and handle of every GPU; nothing without a session."""
    if nvml is None:
        return
    for index in range(query(nvml, "nvmlDeviceGetCount") or 0):
        handle = query(nvml, "nvmlDeviceGetHandleByIndex", index)
        if handle is not None:
            yield index, handle


def read_gpus(nvml: Any = pynvml, cuda: Any = torch.cuda) -> list[Gpu]:
    """The GPUs that torch can use, in torch's order.

    NVML adds the driver's version and the memory of other processes; without it the figures are torch's alone.
    """
    if not cuda.is_available():
        return []
    with nvml_session(nvml) as session:
        return [_read_gpu(index, session, cuda) for index in range(cuda.device_count())]


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU of a torch device; None for the processor."""
    return read_gpus()[device.index or 0] if device.type == "cuda" else None


def _read_gpu(index: int, nvml: Any | None, cuda: Any) -> Gpu:
    properties = cuda.get_device_properties(index)
    total, driver, memory = properties.total_memory, None, None
    if nvml is not None:
        driver = query(nvml, "nvmlSystemGetDriverVersion")
        handle = _nvml_handle(nvml, properties)
        memory = query(nvml, "nvmlDeviceGetMemoryInfo", handle) if handle is not None else None
    if memory is not None and total >= WHOLE_CARD * memory.total:
        total, free = memory.total, memory.free
    else:
        free = cuda.mem_get_info(index)[0]
    free = min(total, free + cuda.memory_reserved(index))
    return Gpu(index, properties.name, total, free, (properties.major, properties.minor), driver)


def _nvml_handle(nvml: Any, properties: Any) -> Any | None:
    """NVML's handle of a torch device, by UUID or else by its PCI address; None where neither works."""
    uuid = getattr(properties, "uuid", None)  # without NVML's prefix
    for prefix in ("GPU-", "MIG-") if uuid else ():
        handle = query(nvml, "nvmlDeviceGetHandleByUUID", f"{prefix}{uuid}")
        if handle is not None:
            return handle
    address: list[Any] = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if None in address:
        return None
    return query(nvml, "nvmlDeviceGetHandleByPciBusId", "{:08X}:{:02X}:{:02X}.0".format(*address))


def nvml_index(device: torch.device, nvml: Any = pynvml, cuda: Any = torch.cuda) -> int:
    """NVML's index of a torch device; torch's own index where NVML cannot be used."""
    with nvml_session(nvml) as session:
        handle = None if session is None else _nvml_handle(session, cuda.get_device_properties(device))
        index = None if handle is None else query(session, "nvmlDeviceGetIndex", handle)
    return (device.index or 0) if index is None else index


def recommended_level(gpu: Gpu | None) -> Level:
    """The default level for a card, by the memory it is sold with; conservative without a card."""
    memory = gpu.memory_total if gpu else 0
    return [level for level in STOPS if memory >= NOMINAL * level.card_gib * GIB][-1]


def level_for_all(numbers: Sequence[int]) -> Level:
    """The default level for a job on several GPUs: that of the smallest. numbers: torch's; none for the processor."""
    gpus = [gpu for gpu in read_gpus() if gpu.index in numbers] if numbers else [None]
    return min((recommended_level(gpu) for gpu in gpus), key=lambda level: level.position)


SIDE = 512  # px; the resolution for which the memory model and the largest useful batch are stated
TILE = 256  # px; side of the VAE's tiles


@dataclass(frozen=True)
class MemoryModel:
    """Bytes that inference takes. Those of a window and of a frame are for SIDE and scale with the pixels."""

    weights: int  # U-Net, VAE and audio encoder
    fixed: int  # workspaces of any resolution
    window: int  # one window of 16 frames with guidance in one U-Net pass
    encode_frame: int  # one frame in one VAE encode
    decode_frame: int  # one frame in one VAE decode

    def window_at(self, resolution: int) -> int:
        return math.ceil(self.window * (resolution / SIDE) ** 2)

    def frame_at(self, resolution: int) -> int:
        """The larger of encode and decode, which do not run at the same time."""
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

# The largest useful batches at SIDE, scaled with the pixels: the decode of 20 frames is 50 TFLOP and a step over one
# window 35, 0.1 s each on an H100. Larger batches take memory, and delay the stages that wait for them, without being
# faster.
MAX_FRAMES = 20
MAX_WINDOWS = 1
PLANNED = 0.95  # of the allowed memory; the rest is for fragmentation and for NVML's total being above CUDA's


@dataclass(frozen=True)
class BatchSizes:
    """Frames and windows per pass, and the memory that they take by the memory model."""

    frames: int  # in one pass of the frame-wise stages: VAE encode and decode, compositing
    windows: int  # in one U-Net pass
    tiling: bool  # the VAE takes its frame in tiles
    planned: int  # bytes, weights included
    allowed: int  # bytes

    @property
    def fits(self) -> bool:
        return self.planned <= self.allowed


def batch_sizes(memory: Gpu | int, resolution: int, level: Level, model: MemoryModel = RELEASED) -> BatchSizes:
    """The batches for a GPU, or for a memory in bytes, at a resolution in px and a level.

    Frames and windows are reduced in the same proportion until they fit, to at least one of each. They are counted
    together, since captured graphs keep their memory and stages overlap. Where not even one window and one frame in
    tiles fit, these are returned all the same, and `fits` is False.
    """
    total, free = (memory.memory_total, memory.memory_free) if isinstance(memory, Gpu) else (memory, memory)
    allowed = int(min(level.vram_fraction * total, free))
    window, frame = model.window_at(resolution), model.frame_at(resolution)
    base = model.weights + model.fixed
    tiling = level.vae_tiling and base + window + frame > PLANNED * allowed
    if tiling:
        frame, frames = model.frame_at(min(resolution, TILE)), 1
    else:
        frames = max(1, int(MAX_FRAMES * level.batch_share * (SIDE / max(resolution, TILE)) ** 2))
    while True:
        windows = max(1, frames * MAX_WINDOWS // MAX_FRAMES)
        planned = base + windows * window + frames * frame
        if planned <= PLANNED * allowed or frames == 1:
            return BatchSizes(frames, windows, tiling, planned, allowed)
        frames -= 1
