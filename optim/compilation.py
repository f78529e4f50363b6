"""torch.compile for the U-Net, where it wins back what it costs; eager otherwise.

    use_cache_folder()                                   # first thing, before anything is compiled
    compile_network(models, frames=total, steps=20)      # True where the passes are compiled now
    lipsync(...)
    restore(models)

Compiling takes minutes, once; a later start takes it from the user's cache and still needs a part of that. It gains
little: on a processor a tenth of a pass, less than windows side by side (`optim.cores`), and on a GPU less than the
hand-written kernels (`optim.fused`). Both exclude it: so it is for a processor with one core, or memory for one window,
and for a GPU where the kernels are turned off, as inductor needs Triton like them.
So a job is compiled only if it is long enough, by this machine's own numbers as soon as there are any: after each use
a record says what compiling took and gained, and where it gained nothing or failed, that is the last time.

One shape is compiled: the full windows of a pass. All others (the short window of a short run, the last group of a
clip) go the eager way; nothing is ever compiled in the middle of a run. The autoencoder is left alone: what compiling
gives it, fewer trips to memory around its norms, is to be had without.
"""

import hashlib
import inspect
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentsync.checkpoints import Models
from latentsync.machine import usable_cores
from latentsync.releases import home
from latentsync.sampling import WINDOW, DeepCache, ddim_schedule, denoise
from latentsync.unet import Context, UNet
from optim.fused import CHECK_ERROR, FAST, in_a_line

MARGIN = 1.5  # times the compile seconds that a job must save: estimates are that far off, and a user waits for them
LEAST_SHARE = 0.04  # of the eager seconds; less is noise
PROBE_WINDOWS = 10  # passes of a job that is as long as this may be tried for their time, which costs it 2 %
TOKENS = 50  # of the sound, a frame
TRIALS = 2  # of a round, of which the faster counts


@dataclass(frozen=True)
class Cost:
    """What compiling costs and gives.

    cold, warm: seconds a module of the network, without and with artifacts in the cache; share_saved: of the eager
    seconds of the passes.
    """

    cold: float
    warm: float
    share_saved: float


# cpu: demo model, 16 frames at 128 px, one full and one shallow pass, float32, two cores of an AMD EPYC (AVX2) shared
# with other work, torch 2.13, 2026-11-24: 204 s cold, 30 s warm, 688 modules; 7 to 18 % of a pass saved.
# cuda: released architecture at 512 px, H100, 2026-11-24: 136 s, 1290 modules. Its warm start and its share are
# guesses: compiled passes were measured against the fused kernels alone (119.5 against 91.7 ms, so it lost).
DEFAULTS = {"cpu": Cost(0.30, 0.044, 0.1), "cuda": Cost(0.105, 0.03, 0.3)}


# ---- whether it pays


def job_seconds(frames: int, seconds_a_frame: float) -> float:
    """Eager seconds that the passes of a job take; its last window is full whatever it holds."""
    return -(-frames // WINDOW) * WINDOW * seconds_a_frame


def worth_compiling(seconds_eager: float, share_saved: float, compile_seconds: float) -> bool:
    """Whether a job of that many eager seconds saves MARGIN times what it waits for the compiler."""
    return share_saved >= LEAST_SHARE and seconds_eager * share_saved > MARGIN * compile_seconds


# ---- the cache and this machine's records


def cache_folder() -> Path:
    """Where compiled artifacts and the records are kept."""
    return home() / "compiled"


def use_cache_folder() -> Path:
    """Have inductor and Triton keep artifacts in our folder, unless the user has set another, and compile on all cores.

    To be called before anything is compiled: Triton's kernels, too, are compiled where these variables point then.
    """
    folder = cache_folder()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(usable_cores()))
    if (inductor := sys.modules.get("torch._inductor.config")) is not None:  # else it will read the variable
        inductor.compile_threads = int(os.environ["TORCHINDUCTOR_COMPILE_THREADS"])
    return folder


@lru_cache
def processor() -> str:
    """What the compiler sees of the CPU: its name and instruction set."""
    name = platform.processor()
    if (info := Path("/proc/cpuinfo")).is_file():
        fields = dict(part.split("\t", 1) for part in info.read_text().split("\n\n")[0].splitlines() if "\t" in part)
        name = next((fields[key].strip(": \t") for key in fields if key.startswith("model name")), name)
    return f"{platform.machine()} {name} {torch.backends.cpu.get_cpu_capability()}"


@dataclass(frozen=True)
class Shape:
    """What a compiled round is made for."""

    windows: int
    side: int  # latent pixels
    guided: bool
    cache: DeepCache | None


def cache_key(models: Models, shape: Shape) -> str:
    """The name of a record: another for all that changes the code that is made, or how fast it is."""
    on_gpu = models.device.type == "cuda"
    if on_gpu:
        name, capability = torch.cuda.get_device_name(models.device), torch.cuda.get_device_capability(models.device)
        hardware = f"{name} {capability} CUDA {torch.version.cuda}"
    else:
        hardware = f"{processor()} {torch.get_num_threads()} threads"
    says = {
        "code": Path(inspect.getfile(UNet)).read_text(encoding="utf-8"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": sys.platform,
        "hardware": hardware,
        "dtype": str(models.dtype),
        "tf32": torch.get_float32_matmul_precision(),
        "network": asdict(models.unet.config),
        "shape": asdict(shape),
    }
    return hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Record:
    """What was measured on this machine under one key; None: not yet."""

    eager: float | None = None  # seconds a round: a full pass and the shallow ones that follow it
    compiled: float | None = None  # seconds a round
    cold: float | None = None  # seconds to compile
    warm: float | None = None  # the same with the cache filled
    artifacts: str | None = None  # inductor's folder; filled if it is still there
    failed: str | None = None  # why compiling did not work

    @property
    def filled(self) -> bool:
        """Whether inductor would find its artifacts now."""
        here = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        return self.artifacts is not None and self.artifacts == here and any(Path(here).glob("*"))


def record_path(key: str) -> Path:
    return cache_folder() / "records" / f"{key}.json"


def read_record(key: str) -> Record:
    """The record of a key; an empty one where there is none that can be read."""
    try:
        return Record(**json.loads(record_path(key).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Record()


def write_record(key: str, record: Record) -> None:
    """Keep a record; where the folder cannot be written, the next start knows as much as this one."""
    path = record_path(key)
    scratch = path.with_suffix(f".{os.getpid()}")  # two processes may write at once
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")
        scratch.replace(path)
    except OSError:
        pass


def expected_cost(record: Record, device: str, modules: int) -> tuple[float, float]:
    """(seconds to compile, share of the eager seconds saved): as recorded on this machine, else the DEFAULTS.

    device: "cpu" or "cuda"; modules: of the network.
    """
    default = DEFAULTS[device]
    cold = record.cold if record.cold is not None else default.cold * modules
    warm = record.warm if record.warm is not None else min(cold, default.warm * modules)
    share = 1 - record.compiled / record.eager if record.eager and record.compiled else default.share_saved
    return warm if record.filled else cold, share


# ---- the network


class CompiledUNet(UNet):
    """Passes of the shapes in `compiled` go through the compiler's code, all others are eager.

    compiled: pass (see `_pass`) → what torch.compile made of it.
    """

    def full(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Context,
        frames: int,
        branch: int | None = None,
        guided: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        run = self.compiled.get(_pass("full", x, frames, branch, guided), UNet.full)
        return run(self, x, timestep, context, frames, branch, guided)

    def shallow(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Context,
        frames: int,
        branch: int,
        cached: Tensor,
        guided: bool = False,
    ) -> Tensor:
        run = self.compiled.get(_pass("shallow", x, frames, branch, guided), UNet.shallow)
        return run(self, x, timestep, context, frames, branch, cached, guided)


def _pass(kind: str, x: Tensor, frames: int, branch: int | None, guided: bool) -> tuple:
    return kind, tuple(x.shape), frames, branch, guided


def _eager_if_new(run: Callable) -> Callable:
    """What has not been compiled by now, for whatever reason, is not to be: a pass would take minutes."""

    def guarded(*arguments: Any) -> Any:
        with torch.compiler.set_stance("eager_on_recompile"):
            return run(*arguments)

    return guarded


def _passes(unet: UNet, shape: Shape) -> dict[tuple, Callable]:
    """The passes that a round of `denoise` is made of, for the compiler to compile when they are first called."""
    x = torch.empty(shape.windows * WINDOW, unet.config.in_channels, shape.side, shape.side, device="meta")
    whole = {"dynamic": False, "fullgraph": True}  # a shape, and a break in the graph is a failure, not a loss of time
    cache = shape.cache
    found = {_pass("full", x, WINDOW, cache and cache.branch, shape.guided): torch.compile(UNet.full, **whole)}
    if cache and cache.interval > 1:
        shallow = torch.compile(UNet.shallow, **whole)
        # Guidance may be of full passes alone; the key that is never called compiles nothing.
        found |= {_pass("shallow", x, WINDOW, cache.branch, guided): shallow for guided in {False, shape.guided}}
    return found


def _round(models: Models, shape: Shape) -> tuple[Tensor, float]:
    """A full pass and the shallow ones that follow, as `denoise` calls them, on fixed random inputs.

    Returns latents (b, c, 16, h, w) and seconds.
    """
    config, side, b = models.unet.config, shape.side, shape.windows
    c = config.out_channels
    random = torch.Generator().manual_seed(0)
    shapes = (1, c, 1, side, side), (b, config.in_channels - c, WINDOW, side, side)
    shapes += ((b, WINDOW, TOKENS, config.cross_attention_dim),)
    noise, given, audio = (torch.randn(s, generator=random).to(models.device, models.dtype) for s in shapes)
    schedule = ddim_schedule(shape.cache.interval if shape.cache else 1)
    _wait(models)
    began = time.perf_counter()
    latents = denoise(models.unet, noise, given, audio, schedule, 1.5 if shape.guided else 1.0, shape.cache)
    _wait(models)
    return latents, time.perf_counter() - began


def _wait(models: Models) -> None:
    if models.device.type == "cuda":
        torch.cuda.synchronize(models.device)


def _timed(models: Models, shape: Shape) -> tuple[Tensor, float]:
    """Latents and seconds of the fastest of TRIALS rounds."""
    rounds = [_round(models, shape) for _ in range(TRIALS)]
    return rounds[0][0], min(seconds for _, seconds in rounds)


def missing_compiler(device: str) -> str | None:
    """What inductor lacks to compile for "cpu" or "cuda", in words; None where it has all that can be seen."""
    if device == "cuda":
        return None if find_spec("triton") else "Triton is not installed"
    usual = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    name = os.environ.get("CXX", usual)
    return None if shutil.which(name) or shutil.which(name.split()[0]) else f"there is no C++ compiler '{name}'"


def say(sentence: str) -> None:
    """One line on the console."""
    print(sentence, file=sys.stderr, flush=True)


def compile_network(
    models: Models,
    frames: int,
    steps: int,
    windows: int = 1,
    guided: bool = True,
    cache: DeepCache | None = None,
    seconds_a_frame: float | None = None,
    say: Callable[[str], None] = say,
) -> bool:
    """Compile the passes of the U-Net, in place, if a job of so many frames is long enough; else change nothing.

    windows: of a pass; seconds_a_frame: of the U-Net's passes, eager; None: as recorded here, or, where nothing is and
    the job is long, by running a few. The compiled network is tried against the eager one: whatever fails, eager it
    stays, and one line says so. Returns whether it is compiled now; `restore` takes it back.
    """
    restore(models)
    unet, device = models.unet, models.device.type
    if device not in DEFAULTS or type(unet) is not UNet or any(type(m) in FAST.values() for m in unet.modules()):
        return False  # graphs and fused kernels are faster, and not for it to take apart
    if models.denoise is not denoise:
        return False  # windows side by side are faster
    use_cache_folder()
    side = models.resolution // 2 ** (len(models.vae.config.block_out_channels) - 1)
    shape = Shape(windows, side, guided, cache)
    key = cache_key(models, shape)
    record = read_record(key)
    cost, share = expected_cost(record, device, sum(1 for _ in unet.modules()))
    if record.failed:
        return False
    rounds_a_frame = steps / (cache.interval if cache else 1) / (windows * WINDOW)
    if seconds_a_frame is None and record.eager:
        seconds_a_frame = record.eager * rounds_a_frame
    if seconds_a_frame is None and frames >= PROBE_WINDOWS * windows * WINDOW:
        seconds_a_frame = _round(models, shape)[1] * rounds_a_frame
    if seconds_a_frame is None or not worth_compiling(job_seconds(frames, seconds_a_frame), share, cost):
        return False
    problem = missing_compiler(device) or _compile(models, shape, key, record)
    if problem:
        restore(models)
        say(f"torch.compile is off: {problem}; the network runs eager instead.")
    return not problem


def _compile(models: Models, shape: Shape, key: str, record: Record) -> str | None:
    """Swap the class, let the compiler work, and record what came of it; returns what went wrong."""
    unet, filled = models.unet, record.filled
    expected, eager = _timed(models, shape)
    unet.__class__, unet.compiled = CompiledUNet, _passes(unet, shape)
    try:
        _, first = _round(models, shape)
        unet.compiled = {name: _eager_if_new(run) for name, run in unet.compiled.items()}
        found, compiled = _timed(models, shape)
    except Exception as failure:  # no headers of Python, an unknown GPU, a full disk, ...: whatever it is, eager works
        problem = in_a_line(failure)
        write_record(key, replace(record, failed=problem))
        return f"{problem} (delete '{record_path(key)}' to have it tried again)"
    record = replace(
        record,
        eager=eager,
        compiled=compiled,
        artifacts=os.environ["TORCHINDUCTOR_CACHE_DIR"],
        **{"warm" if filled else "cold": max(0.0, first - compiled)},
    )
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    bound = CHECK_ERROR[models.dtype]
    problem = None
    if not error <= bound:
        problem = f"its result is off by {error:.1e} (at most {bound:.0e})"
        record = replace(record, failed=problem)
    elif 1 - compiled / eager < LEAST_SHARE:
        problem = f"it gains nothing here ({compiled:.2f} s for {eager:.2f} s), which is noted for the next time"
    write_record(key, record)
    return problem


def restore(models: Models) -> Models:
    """Take back what `compile_network` did. Returns the same models."""
    if type(models.unet) is CompiledUNet:
        models.unet.__class__ = UNet
        del models.unet.compiled
    return models
