"""MediaPipe's Face Landmarker, imported without what MediaPipe plots and records with.

Its package imports matplotlib and sounddevice, which no run needs and which take most of its import's time.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def deferred(*names: str) -> Iterator[None]:
    """Within the block, `import` gives placeholders for modules, which import the real one when it is used.

    names: of modules, a package before what lies in it; those that have been imported already stay as they are.
    """
    placed = {name: _placeholder(name) for name in names if name not in sys.modules}
    for name, module in placed.items():
        package, _, last = name.rpartition(".")
        if package in placed:
            setattr(placed[package], last, module)
    sys.modules.update(placed)
    try:
        yield
    finally:
        for name, module in placed.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def _placeholder(name: str) -> ModuleType:
    module = ModuleType(name)

    def real_attribute(attribute: str) -> Any:
        if sys.modules.get(name) is module:
            del sys.modules[name]
        return getattr(importlib.import_module(name), attribute)

    module.__dict__["__getattr__"] = real_attribute
    return module


with deferred("matplotlib", "matplotlib.pyplot", "sounddevice"):
    from mediapipe import Image, ImageFormat
    from mediapipe.tasks.python import BaseOptions
    from mediapipe.tasks.python.vision import FaceLandmarker, FaceLandmarkerOptions

__all__ = ["BaseOptions", "FaceLandmarker", "FaceLandmarkerOptions", "Image", "ImageFormat"]
