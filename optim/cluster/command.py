"""From the options of the command line to workers that are ready to paint."""

import argparse
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from latentsync.__main__ import PreparedRun
from latentsync.checkpoints.find import MODEL_NAMES, Checkpoint
from latentsync.checkpoints.load import load_outline, working_dtype
from latentsync.errors import UserError
from latentsync.settings import Report, Settings
from optim.cluster.options import whole_number, workers_here
from optim.cluster.session import cluster_session, local_session
from optim.doctor import advise_report
from optim.hardware import level_for_all

log = logging.getLogger(__name__)


@contextmanager
def prepare_workers(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    device: torch.device,
    settings: Settings,
    overrides: dict[str, Any],
    frames: int,
) -> Iterator[PreparedRun | None]:
    """Workers for a job of so many frames; None where --gpus asks for one device, which needs none. Raises UserError.

    device: of this process, for the choice of the model.
    """
    if args.cluster is None:
        kind, numbers = device.type, workers_here(args.gpus, args.device, device)
        if len(numbers) == 1:
            yield None
            return
        count = limit = len(numbers)
        gpus = numbers if kind == "cuda" else []
        level = level_for_all(gpus).name if args.level == "auto" else args.level
        session = local_session(count, gpus)
    else:
        for option, value in (("--model", args.model), ("--level", args.level)):
            if value == "auto":
                raise UserError(f"--cluster: give {option}, too, since its machines may differ.")
        kind, level = "cpu" if args.device == "cpu" else "cuda", args.level
        session = cluster_session(args.cluster)
    if settings.restore:  # workers have another working folder
        settings = replace(settings, restore=str(Path(settings.restore).expanduser().resolve()))
    with ExitStack() as stack:
        stack.enter_context(session)
        from optim.cluster.actor import Order, hashes_of
        from optim.cluster.workers import AHEAD, RayWorkers, places

        if args.cluster is not None:
            count = places(kind)
            limit = AHEAD * count
            if args.gpus not in (None, "all"):
                count = limit = min(count, whole_number(args.gpus))
        order = Order(
            model=checkpoint.name if args.model in MODEL_NAMES else str(Path(args.model).expanduser().resolve()),
            hashes=hashes_of(checkpoint, settings.restore) if args.cluster is not None else None,
            kind=kind,
            settings=settings,
            level=level,
            batch=args.batch,
            overrides=overrides,
            frames=frames,
            token_required=args.cluster is not None,
        )
        models = load_outline(checkpoint, working_dtype(torch.device(kind)))
        workers = stack.enter_context(RayWorkers(order, count, limit, models.resolution, models.retargets, log.info))
        first = workers.wait_until_ready()
        log.info(f"{workers.name}: {first.details}")
        prepared = PreparedRun(models, first.plan.settings, workers=workers)

        def on_finished(report: Report) -> None:
            prepared.report_extras = {"level": first.plan.level.name, "workers": workers.summary()}
            for advice in advise_report(report, first.plan):
                log.info(f"{advice.severity}: {advice.problem} {advice.remedy}")

        prepared.on_finished = on_finished
        yield prepared
