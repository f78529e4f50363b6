"""Face restorers that the user has, applied to painted faces: GFPGAN or RestoreFormer, loaded by spandrel.

These networks sharpen a blurred face. They know single pictures: what one of them adds to a frame does not depend on
the frames before it. Their weights and licences are the user's; none comes with this project.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentsync.checkpoints.tensors import read_tensors
from latentsync.compositing import MATCHED_AREAS, match_colours
from latentsync.errors import UserError, is_out_of_memory
from latentsync.media.process import check_input

if TYPE_CHECKING:  # whose models have restorers
    from latentsync.checkpoints.find import Checkpoint
    from latentsync.checkpoints.load import Models

SUFFIXES = (".safetensors", ".pth")
# Options of the forward passes, by spandrel's names of the architectures. GFPGAN adds noise to its features: its own,
# which is in the file, in place of one drawn anew would flicker and could not be repeated.
FORWARD_OPTIONS: dict[str, dict[str, Any]] = {
    "GFPGAN": {"return_rgb": False, "randomize_noise": False},
    "RestoreFormer": {},
}
NAMES = " or ".join(FORWARD_OPTIONS)
SIDE = 512  # pixels of the pictures that both were trained on, which are aligned as those of FFHQ
# Where the warped face of `alignment.crop_size` lies in such a picture: the similarity from eyes, nose and the mouth's
# corners to FFHQ's (GFPGAN's template of 512 pixels), mean over nine people. It varied by 7 pixels; it is 4 higher,
# so that all that is painted has room. The rest of the crop, below the chin, has none.
LEFT, TOP, WIDTH, HEIGHT = 101, 121, 310, 413
MISSING = (
    "Restoring faces needs the packages spandrel and torchvision, of a version that fits torch: run "
    "`pip install -e .[restore]`, or start with ./launch.sh."
)


class Restorer:
    """A restorer on its device. name: its architecture; faces: that it has restored."""

    def __init__(self, name: str, network: nn.Module):
        self.name, self.faces = name, 0
        self._network, self._options = network, FORWARD_OPTIONS[name]
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def for_another_run(self) -> "Restorer":
        """The same network, with faces and seconds counted anew."""
        return Restorer(self.name, self._network)

    @torch.inference_mode()
    def restore(
        self,
        faces: Tensor,
        crops: Tensor,
        mask: Tensor,
        strength: float,
        on_face: Callable[[], None] | None = None,
    ) -> Tensor:
        """Faces of which the painted part is blended with its restored self; the rest stays, to the bit.

        faces, crops, mask: of `merge_faces`; strength: 0 (no change) to 1. The restorer sees the whole face. It changes
        colours, too: that is taken back by `match_colours`, as the visible part shows how much. on_face: called before
        every face; one goes through the network at a time, so that the result does not depend on a batch. A face that
        comes back with numbers that are not finite stays as it was.
        """
        parts = []
        with self._timed(faces.device):
            for face in faces.float().split(1):
                if on_face:
                    on_face()
                parts.append(self._pass(face))
        self.faces += len(faces)
        restored = match_colours(torch.cat(parts), crops, mask, MATCHED_AREAS).to(faces.dtype)
        restored = torch.where(restored.isfinite(), restored, faces)
        return torch.lerp(faces, restored, strength * (1 - mask.to(faces.dtype)))

    def _pass(self, face: Tensor) -> Tensor:
        """A face through the network: (1, 3, R, R) in [-1, 1], both ways."""
        placed = F.interpolate(face, (HEIGHT, WIDTH), mode="bicubic", antialias=True, align_corners=False)
        placed = F.pad(placed, (LEFT, SIDE - LEFT - WIDTH, TOP, 0), mode="reflect")[:, :, :SIDE].clamp(-1, 1)
        restored = self._network(placed, **self._options)[0].float()
        missing = TOP + HEIGHT - SIDE
        restored = F.pad(restored[:, :, TOP:, LEFT : LEFT + WIDTH], (0, 0, 0, missing), mode="replicate").clamp(-1, 1)
        return F.interpolate(restored, face.shape[2:], mode="bicubic", antialias=True, align_corners=False)

    @contextmanager
    def _timed(self, device: torch.device) -> Iterator[None]:
        """Count the time of a block; does not synchronise with a GPU."""
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._spans.append((first, last))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def seconds_per_face(self) -> float:
        """The mean time of the device for a face, 0 before the first; waits for the device."""
        for first, last in self._spans:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
        self._spans.clear()
        return self._seconds / max(self.faces, 1)


def check_restorable(model: "Checkpoint | Models") -> None:
    """Raise UserError for a model that shows the film's own pixels, see `latentsync.retarget`."""
    if model.face is not None:
        raise UserError(
            f"The model '{model.name}' shows the film's own pixels, which need no restorer: leave that out, or take "
            "another model."
        )


def check_restorer(path: str | Path) -> None:
    """Raise UserError unless `path` is a file that may hold a restorer, and the packages to load it are there."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UserError(f"The restorer '{path}' does not end in {' or '.join(SUFFIXES)}; give a file of weights.")
    check_input(Path(path), "restorer")
    _model_loader()


def load_restorer(path: str | Path, device: torch.device) -> Restorer:
    """The restorer of a file, in float32 on the device. Code that the file may hold is never run.

    Raises UserError where the file is damaged or holds another network, or where packages are missing.
    """
    check_restorer(path)
    contents, _ = read_tensors(Path(path))
    _check_sizes(contents, Path(path))
    try:
        descriptor = _model_loader()(torch.device("cpu")).load_from_state_dict(contents)
    except Exception as error:  # of a library that takes its sizes from the file
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"'{path}' holds no network that can be used, or is damaged; give the weights of {NAMES}."
        ) from error
    name = str(descriptor.architecture.id)
    if name not in FORWARD_OPTIONS:
        raise UserError(f"'{path}' is a network of the kind {name}, no face restorer; give the weights of {NAMES}.")
    network = descriptor.model.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
    return Restorer(name, network)


def with_restorer(models: "Models", path: str | Path | None) -> "Models":
    """The models, whose painted faces go through the restorer of a file, unless that is None. Raises UserError.

    Its network stays with the models, for the next job, until another file is asked for or this one has changed.
    """
    if path is None:
        return models
    check_restorer(path)
    file = Path(path).resolve()
    key = file, file.stat().st_size, file.stat().st_mtime_ns
    if key not in models.restorers:
        models.restorers.clear()  # before another one is loaded
        models.restorers[key] = load_restorer(path, models.device)
    return replace(models, restorer=models.restorers[key].for_another_run())


def _model_loader() -> Any:
    """spandrel's class that loads networks. Raises UserError where it cannot be imported."""
    try:
        from spandrel import ModelLoader
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: a torchvision of another build than torch
        raise UserError(MISSING) from error
    return ModelLoader


def _check_sizes(contents: Mapping[str, Any], path: Path) -> None:
    """Raise UserError for a tensor that is larger than its file, since networks are built as large as their tensors."""
    size = path.stat().st_size
    for value in contents.values():
        if isinstance(value, Mapping):
            _check_sizes(value, path)
        elif isinstance(value, Tensor) and value.nbytes > size:
            raise UserError(f"'{path}' is damaged: it has a tensor that is larger than the file; fetch it again.")
