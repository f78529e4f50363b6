"""Results of looking at a file, kept for as long as the file stays as it is."""

import os
import stat
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

MAX_RESULTS = 32  # of each function, those that were used last

Look = TypeVar("Look", bound=Callable[..., Any])


def while_unchanged(look: Look) -> Look:
    """Let a function of a file's path, and of other hashable arguments, look at each regular file once.

    It looks again when the file's number, size or times have changed, or after `look.forget()`. Errors are not kept.
    Callers share the results.
    """

    @lru_cache(MAX_RESULTS)
    def look_at(identity: tuple[int, ...], *args: Any, **named: Any) -> Any:
        return look(*args, **named)

    @wraps(look)
    def look_once(path: Any, *args: Any, **named: Any) -> Any:
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return look(path, *args, **named)  # which raises a sentence
        if not stat.S_ISREG(status.st_mode):
            return look(path, *args, **named)
        identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        return look_at(identity, path, *args, **named)

    look_once.__dict__["forget"] = look_at.cache_clear
    return cast(Look, look_once)
