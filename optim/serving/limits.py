"""Limits of what visitors may have on a server, and checks of numeric options."""

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
class Limits:
    """What visitors may have on a server; None: any number."""

    unfinished: int | None = None  # jobs of a visitor that wait or run
    kept: int | None = None  # jobs of a visitor in all
    stored: int | None = None  # bytes of the files of a visitor's jobs
    stored_by_all: int | None = None  # bytes of the files of all jobs

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_option(f"The limit '{name}'", value, 1, whole=True, optional=True)


NO_LIMITS = Limits()
# For strangers, who can make up tokens to be several visitors: `stored_by_all` and the queue hold for all together.
SHARED_LIMITS = Limits(unfinished=5, kept=30, stored=4 * 10**9, stored_by_all=40 * 10**9)
