"""This repository as a pack of nodes, in ComfyUI's folder `custom_nodes`; see docs/comfyui.md.

Nothing else imports this file, and importing it does nothing: ComfyUI calls `comfy_entrypoint`.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def import_package(name: str) -> None:
    """Import a package of this folder under its own name, without a change of the search path.

    On that path, `app` and `tests` would be ours instead of ComfyUI's. Raises ImportError where another pack has
    loaded a package of that name.
    """
    file = ROOT / name / "__init__.py"
    loaded = sys.modules.get(name)
    if loaded is not None:
        if Path(loaded.__file__ or "").resolve() != file:
            raise ImportError(
                f"Another pack has loaded a package named {name}, '{loaded.__file__}': disable that pack, or remove it "
                "from custom_nodes, and restart ComfyUI. Its saved workflows run with the nodes of this one."
            )
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"'{file}' is missing: get a complete copy of this pack.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


async def comfy_entrypoint():
    """The pack's nodes, for ComfyUI."""
    for name in ("latentsync", "optim"):
        import_package(name)
    from optim.comfyui.nodes import Extension

    return Extension()
