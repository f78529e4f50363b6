"""Limits on what a visitor may have on a server, and the check of numeric options."""

import math
from dataclasses import dataclass
from typing import Any

from latentsync.errors import UserError


def check_option(what: str, value: Any, minimum: float, whole: bool = False, optional: bool = False) -> None:
    """Raise UserError unless an option is a number of at least `minimum`, and finite."""
    if value is None and optional:
        return
    kind = int if whole else int | float
    if not isinstance(value, kind) or isinstance(value, bool) or not minimum <= value < math.inf:
        number = "whole number" if whole else "number"
        raise UserError(f"{what} cannot be {value!r}: give a {number} of at least {minimum:g}.")


@dataclass(frozen=True)
class VisitorLimits:
    """What visitors may have on a server; None: any number."""

    unfinished_jobs: int | None = None  # of a visitor, waiting or running
    jobs: int | None = None  # of a visitor, with those that have ended
    stored_bytes: int | None = None  # in the files of a visitor's jobs
    total_bytes: int | None = None  # in the files of all jobs

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_option(f"The limit '{name}'", value, 1, whole=True, optional=True)


NO_LIMITS = VisitorLimits()
# For strangers, who can make up tokens to be several visitors: `total_bytes` and the queue hold for all together.
SHARED_LIMITS = VisitorLimits(unfinished_jobs=5, jobs=30, stored_bytes=4 * 10**9, total_bytes=40 * 10**9)
