"""A U-Net whose full and shallow passes take one form, for what decides how they are run: graphs, cores."""

from collections.abc import Callable

from torch import Tensor

from latentsync.unet import Context, UNet

# x, timestep, context, and what a full pass left for a shallow one → epsilon, and what a full pass leaves.
Run = Callable[[Tensor, Tensor, Context, Tensor | None], tuple[Tensor, Tensor | None]]


class DirectedUNet(UNet):
    def direct(
        self,
        run: Run,
        kind: tuple,
        x: Tensor,
        timestep: Tensor,
        context: Context,
        frames: int,
        cached: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """What `run` makes of the inputs, however that is done; kind: of the pass, the same for the same work."""
        raise NotImplementedError

    def full(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Context,
        frames: int,
        branch: int | None = None,
        guided: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        def run(x: Tensor, timestep: Tensor, context: Context, _: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return UNet.full(self, x, timestep, context, frames, branch, guided)

        return self.direct(run, ("full", branch, guided), x, timestep, context, frames, None)

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
        def run(x: Tensor, timestep: Tensor, context: Context, cached: Tensor | None) -> tuple[Tensor, None]:
            return UNet.shallow(self, x, timestep, context, frames, branch, cached, guided), None

        return self.direct(run, ("shallow", branch, guided), x, timestep, context, frames, cached)[0]
