"""Passes of the networks captured as CUDA graphs: the host says «again» where it would start a thousand kernels.

`capture(unet, vae)` gives the networks passes that are captured when they come with the same shapes for a second time,
and replayed from then on, in later runs too; `release(unet, vae)` takes it back and frees what the graphs hold. All
graphs share one pool of memory, since no two run at a time; what one leaves for later, as DeepCache's tensor, is copied
out of it.

The autoencoder's kernels are large, and starting them takes less than their own time on an idle host. But in a job
other threads find faces and write frames meanwhile, and without graphs the GPU waited for the host at every window.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor

from latentsync.unet import Context, UNet

# x, timestep, context, and what a full pass left for a shallow one → epsilon, and what a full pass leaves.
Run = Callable[[Tensor, Tensor | None, Context, Tensor | None], tuple[Tensor, Tensor | None]]

MOST_GRAPHS = 12  # at a time; a run of full windows needs four to six
# Eager runs of a shape before it takes the place of the least recently used graph. A film of many short scenes has
# windows of every length: to capture each would take longer than to run it.
RUNS_TO_REPLACE = 40


@dataclass
class Pass:
    """A captured pass: its graph, the tensors that it reads, and those that it writes."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    timestep: Tensor | None
    context: Context
    cached: Tensor | None
    out: Tensor
    kept: Tensor | None  # what a full pass leaves for shallow ones
    # Whose values are in `context` and `cached`: they stay the same for many steps, and are copied once.
    copied_context: Context | None = None
    copied_cached: Tensor | None = None


@dataclass
class Graphs:
    """The passes captured for a model's networks; eager: how often others have run since they last were.

    purpose: what the networks were made ready for when they were to be captured, see `ready_for`.
    """

    purpose: Hashable = None
    passes: OrderedDict[tuple, Pass] = field(default_factory=OrderedDict)
    eager: Counter[tuple] = field(default_factory=Counter)
    pool: tuple[int, int] | None = None
    stream: torch.cuda.Stream | None = None  # of captures; PyTorch's own is of the device that is current


def replay(
    graphs: Graphs,
    kind: tuple,
    run: Run,
    x: Tensor,
    timestep: Tensor | None = None,
    context: Context = (),
    cached: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What `run` makes of the inputs; captured at the second call of a kind with the same shapes, if there is room.

    The first result is overwritten by the next pass of any kind, the second is the caller's.
    """
    key = kind, x.shape, () if timestep is None else timestep.shape, len(context[0][0]) if context else 0
    full = len(graphs.passes) >= MOST_GRAPHS
    if key not in graphs.passes:
        # The first run loads and plans what a capture must find ready.
        if not can_capture(x) or graphs.eager[key] < (RUNS_TO_REPLACE if full else 1):
            graphs.eager[key] += 1
            return run(x, timestep, context, cached)
        if full:
            graphs.passes.popitem(last=False)
        graphs.passes[key] = _capture(graphs, run, x, timestep, context, cached)
        del graphs.eager[key]
    graphs.passes.move_to_end(key)
    found = graphs.passes[key]
    found.x.copy_(x)
    if timestep is not None:
        found.timestep.copy_(timestep)
    if context and found.copied_context is not context:
        torch._foreach_copy_([t for pair in found.context for t in pair], [t for pair in context for t in pair])
        found.copied_context = context
    if cached is not None and found.copied_cached is not cached:
        found.cached.copy_(cached)
        found.copied_cached = cached
    found.graph.replay()
    return found.out, None if found.kept is None else found.kept.clone()


def can_capture(x: Tensor) -> bool:
    return x.is_cuda


def _capture(
    graphs: Graphs,
    run: Run,
    x: Tensor,
    timestep: Tensor | None,
    context: Context,
    cached: Tensor | None,
) -> Pass:
    if graphs.pool is None:
        graphs.pool = torch.cuda.graph_pool_handle()
        graphs.stream = torch.cuda.Stream(x.device)  # one for all, or they would not share the pool's memory
    x, timestep = x.clone(), None if timestep is None else timestep.clone()
    context = [(k.clone(), v.clone()) for k, v in context]
    cached = None if cached is None else cached.clone()
    graph = torch.cuda.CUDAGraph()
    # Other threads (sound, monitor) may use the GPU meanwhile: only this one is held to what a capture allows.
    with torch.cuda.graph(graph, pool=graphs.pool, stream=graphs.stream, capture_error_mode="thread_local"):
        out, kept = run(x, timestep, context, cached)
    return Pass(graph, x, timestep, context, cached, out, kept)


def ready_for(unet: UNet, purpose: Hashable) -> bool:
    """Whether graphs are captured, or about to be, of networks that were made ready for just this purpose."""
    return "graphs" in vars(unet) and unet.graphs.purpose == purpose


def capture(unet: UNet, vae: AutoencoderKL | None = None, purpose: Hashable = None) -> None:
    """Let the networks capture their passes; on the CPU that changes nothing. Once more, it changes nothing either."""
    graphs = vars(unet).setdefault("graphs", Graphs(purpose))
    if "full" not in vars(unet):
        unet.full, unet.shallow = _replayed_full(unet.full, graphs), _replayed_shallow(unet.shallow, graphs)
    for part in (vae.encoder, vae.decoder) if vae is not None else ():
        if "forward" not in vars(part):
            part.forward = _replayed(part.forward, graphs, part)


def release(unet: UNet, vae: AutoencoderKL | None = None) -> None:
    """Take back what `capture` did, with the memory of the graphs."""
    for name in ("graphs", "full", "shallow"):
        vars(unet).pop(name, None)
    for part in (vae.encoder, vae.decoder) if vae is not None else ():
        vars(part).pop("forward", None)


# ---- the passes that take the place of the networks' own, each with their arguments


def _replayed_full(full: Callable, graphs: Graphs) -> Callable:
    def replayed(
        x: Tensor, timestep: Tensor, context: Context, frames: int, branch: int | None = None, guided: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        def run(x: Tensor, timestep: Tensor, context: Context, _: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return full(x, timestep, context, frames, branch, guided)

        return replay(graphs, ("full", branch, guided, frames), run, x, timestep, context)

    return replayed


def _replayed_shallow(shallow: Callable, graphs: Graphs) -> Callable:
    def replayed(
        x: Tensor, timestep: Tensor, context: Context, frames: int, branch: int, cached: Tensor, guided: bool = False
    ) -> Tensor:
        def run(x: Tensor, timestep: Tensor, context: Context, cached: Tensor | None) -> tuple[Tensor, None]:
            return shallow(x, timestep, context, frames, branch, cached, guided), None

        return replay(graphs, ("shallow", branch, guided, frames), run, x, timestep, context, cached)[0]

    return replayed


def _replayed(forward: Callable[[Tensor], Tensor], graphs: Graphs, part: Encoder | Decoder) -> Callable:
    """The whole result is the caller's own."""

    def replayed(sample: Tensor) -> Tensor:
        return replay(graphs, (type(part).__name__,), lambda x, *_: (forward(x), None), sample)[0].clone()

    return replayed
