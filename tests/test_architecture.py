"""The shape of the code: imports point one way and run in no circles, and no module grows without end."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("latentsync", "optim", "app")  # each may import itself and those before it
MAX_LINES = 450
LONG = {"optim/kernels.py"}  # Triton kernels, which belong together


@cache
def modules() -> dict[str, Path]:
    """The product's modules by their dotted names."""
    files = [*ROOT.glob("latentsync/**/*.py"), *ROOT.glob("optim/**/*.py"), ROOT / "app.py"]
    names = {}
    for file in files:
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        names[name.removesuffix(".__init__")] = file
    return names


def imported(file: Path) -> set[str]:
    """The modules that a file imports anywhere, also inside functions; imports for type checkers alone do not count."""
    names = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for child in block.body
        for node in ast.walk(child)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in modules() else node.module for name in whole}
    return names & modules().keys()


@pytest.mark.parametrize("name", modules())
def test_imports_point_one_way(name):
    layer = LAYERS.index(name.partition(".")[0])
    wrong = [other for other in imported(modules()[name]) if LAYERS.index(other.partition(".")[0]) > layer]
    assert not wrong, f"{name} imports {wrong}"


def test_no_imports_run_in_a_circle():
    imports = {name: imported(file) - {name} for name, file in modules().items()}
    state: dict[str, str] = defaultdict(lambda: "new")

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state[name] != "open", f"a circle: {' → '.join((*path[path.index(name) :], name))}"
        if state[name] == "done":
            return
        state[name] = "open"
        for other in sorted(imports[name]):
            visit(other, (*path, name))
        state[name] = "done"

    for name in sorted(imports):
        visit(name, ())


@pytest.mark.parametrize("name", modules())
def test_a_module_is_short_enough_to_read(name):
    file = modules()[name]
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES or str(file.relative_to(ROOT)) in LONG, f"{file} has {lines} lines"
