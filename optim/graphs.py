"""Passes of the networks captured as CUDA graphs: the host starts one graph instead of a thousand kernels.

`capture(unet, vae)` gives the networks passes that are captured when the same shapes come for the second time, and
replayed from then on, in later jobs too; `release(unet, vae)` undoes it and frees the memory of the graphs. All graphs
share one memory pool, since no two run at the same time; a tensor that must outlive the next pass, such as DeepCache's,
is copied out of it.

The autoencoder's kernels are large, and starting them takes less than their own time on an idle host. But in a job
other threads detect faces and write frames meanwhile, and without graphs the GPU waited for the host at every window.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentsync.autoencoder import Autoencoder, Decoder, Encoder
from latentsync.unet import Context, UNet
from optim.swap import has_swapped, restore_methods, swap_methods

# x, timestep, context, and the features that a full pass leaves for a shallow one → epsilon, and these features.
Run = Callable[[Tensor, Tensor | None, Context, Tensor | None], tuple[Tensor, Tensor | None]]

MAX_GRAPHS = 12  # at a time; a job of full windows needs four to six
# Eager runs of a shape before it replaces the least recently used graph. A film of many short shots has windows of
# every length: capturing each would take longer than running it.
RUNS_TO_REPLACE = 40


@dataclass
class CapturedPass:
    """A captured pass: its graph, the tensors that it reads, and those that it writes."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    timestep: Tensor | None
    context: Context
    cached: Tensor | None  # features of a full pass that a shallow one reads
    out: Tensor
    cached_out: Tensor | None  # features that a full pass writes
    # The caller's tensors that `context` and `cached` were last copied from: they stay the same for many steps.
    context_source: Context | None = None
    cached_source: Tensor | None = None


@dataclass
class Graphs:
    """The captured passes of a model's networks; configuration: what the networks were prepared for, to compare."""

    configuration: Hashable = None
    passes: OrderedDict[tuple, CapturedPass] = field(default_factory=OrderedDict)
    eager_runs: Counter[tuple] = field(default_factory=Counter)  # of each shape, since its graph was last captured
    pool: tuple[int, int] | None = None
    stream: torch.cuda.Stream | None = None  # of captures; PyTorch's own belongs to the current device


def replay(
    graphs: Graphs,
    kind: tuple,
    run: Run,
    x: Tensor,
    timestep: Tensor | None = None,
    context: Context | None = None,
    cached: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Replay `run` on the inputs; it is captured at the second call of a kind with the same shapes, if there is room.

    The first result is overwritten by the next pass of any kind; the second belongs to the caller.
    """
    context = context or []
    key = kind, x.shape, () if timestep is None else timestep.shape, len(context[0][0]) if context else 0
    full = len(graphs.passes) >= MAX_GRAPHS
    if key not in graphs.passes:
        # The first run loads and plans what must be ready for a capture.
        if not can_capture(x) or graphs.eager_runs[key] < (RUNS_TO_REPLACE if full else 1):
            graphs.eager_runs[key] += 1
            return run(x, timestep, context, cached)
        if full:
            graphs.passes.popitem(last=False)
        graphs.passes[key] = _capture(graphs, run, x, timestep, context, cached)
        del graphs.eager_runs[key]
    graphs.passes.move_to_end(key)
    captured = graphs.passes[key]
    captured.x.copy_(x)
    if captured.timestep is not None:
        captured.timestep.copy_(timestep)
    if context and captured.context_source is not context:
        torch._foreach_copy_([t for pair in captured.context for t in pair], [t for pair in context for t in pair])
        captured.context_source = context
    if captured.cached is not None and captured.cached_source is not cached:
        captured.cached.copy_(cached)
        captured.cached_source = cached
    captured.graph.replay()
    return captured.out, None if captured.cached_out is None else captured.cached_out.clone()


def can_capture(x: Tensor) -> bool:
    return x.is_cuda


def _capture(
    graphs: Graphs,
    run: Run,
    x: Tensor,
    timestep: Tensor | None,
    context: Context,
    cached: Tensor | None,
) -> CapturedPass:
    if graphs.pool is None:
        graphs.pool = torch.cuda.graph_pool_handle()
        graphs.stream = torch.cuda.Stream(x.device)  # one for all, or they would not share the pool's memory
    x, timestep = x.clone(), None if timestep is None else timestep.clone()
    context = [(k.clone(), v.clone()) for k, v in context]
    cached = None if cached is None else cached.clone()
    graph = torch.cuda.CUDAGraph()
    # Other threads (audio, monitor) may use the GPU meanwhile: the limits of a capture apply to this thread alone.
    with torch.cuda.graph(graph, pool=graphs.pool, stream=graphs.stream, capture_error_mode="thread_local"):
        out, cached_out = run(x, timestep, context, cached)
    return CapturedPass(graph, x, timestep, context, cached, out, cached_out)


def captures_for(unet: UNet, configuration: Hashable) -> bool:
    """Whether this network captures passes, prepared for just this configuration."""
    graphs = getattr(unet, "graphs", None)
    return graphs is not None and graphs.configuration == configuration


def capture(unet: UNet, vae: Autoencoder | None = None, configuration: Hashable = None) -> None:
    """Let the networks capture their passes, which does nothing on the CPU. A repeated call changes nothing."""
    if not hasattr(unet, "graphs"):
        unet.graphs = Graphs(configuration)
    if not has_swapped(unet, "full"):
        full, shallow = _replayed_full(unet.full, unet.graphs), _replayed_shallow(unet.shallow, unet.graphs)
        swap_methods(unet, full=full, shallow=shallow)
    for part in _parts(vae):
        if not has_swapped(part, "forward"):
            swap_methods(part, forward=_replayed_forward(part.forward, unet.graphs, part))


def release(unet: UNet, vae: Autoencoder | None = None) -> None:
    """Undo `capture`, and free the memory of the graphs."""
    restore_methods(unet, "full", "shallow")
    if hasattr(unet, "graphs"):
        del unet.graphs
    for part in _parts(vae):
        restore_methods(part, "forward")


def _parts(vae: Autoencoder | None) -> Sequence[Encoder | Decoder]:
    return () if vae is None else (vae.encoder, vae.decoder)


# ---- passes with the arguments of the networks' own


def _replayed_full(full: Callable, graphs: Graphs) -> Callable:
    def replayed(
        x: Tensor, timestep: Tensor, context: Context, frames: int, branch: int | None = None, guided: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        def run(x: Tensor, timestep: Tensor | None, context: Context, _: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return full(x, timestep, context, frames, branch, guided)

        return replay(graphs, ("full", branch, guided, frames), run, x, timestep, context)

    return replayed


def _replayed_shallow(shallow: Callable, graphs: Graphs) -> Callable:
    def replayed(
        x: Tensor, timestep: Tensor, context: Context, frames: int, branch: int, cached: Tensor, guided: bool = False
    ) -> Tensor:
        def run(x: Tensor, timestep: Tensor | None, context: Context, cached: Tensor | None) -> tuple[Tensor, None]:
            return shallow(x, timestep, context, frames, branch, cached, guided), None

        return replay(graphs, ("shallow", branch, guided, frames), run, x, timestep, context, cached)[0]

    return replayed


def _replayed_forward(forward: Callable[[Tensor], Tensor], graphs: Graphs, part: Encoder | Decoder) -> Callable:
    """The pass of the encoder or decoder, whose whole result belongs to the caller."""

    def replayed(sample: Tensor) -> Tensor:
        return replay(graphs, (type(part).__name__,), lambda x, *_: (forward(x), None), sample)[0].clone()

    return replayed
