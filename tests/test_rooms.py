"""The walls of the house: what a room of the plugin may import, read from its source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fairseq_gradinit

PLUGIN = Path(fairseq_gradinit.__file__).parent
FAIRSEQ = {"fairseq", "fairseq_cli", "hydra", "omegaconf"}
# What opens only when it is used: importing it imports fairseq, matplotlib or the whole program.
WITHOUT_A_DOOR = {"plugin", "report", "check", "cli"}
BELOW = {
    "storage": set(),
    "engine": {"storage"},
    "scales": {"storage", "engine"},
    "results": {"storage"},
    "report": {"storage", "scales"},
    "plugin": {"storage", "engine", "scales"},
    "check": {"storage", "engine", "scales", "results", "plugin"},
    "cli": {"storage", "engine", "scales", "results", "report", "plugin", "check"},
}
MODULES = [
    (room, path.relative_to(PLUGIN)) for room in BELOW for path in (PLUGIN / room).rglob("*.py")
]


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a module imports, at its top or within a function."""
    for node in ast.walk(ast.parse((PLUGIN / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield str(node.module)


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def test_every_module_is_in_a_room():
    top = {path.name for path in PLUGIN.glob("*.py")}
    assert top == {"__init__.py", "__main__.py", "errors.py", "versions.py", "initialization.py"}
    assert {path.parent.name for path in PLUGIN.glob("*/__init__.py")} == BELOW.keys()


@pytest.mark.parametrize("path", [path for room, path in MODULES if room == "engine"], ids=str)
def test_the_engine_imports_torch_alone(path):
    # NumPy, which torch brings, only to seed it and to keep its random state.
    assert packages(path) - sys.stdlib_module_names <= {"fairseq_gradinit", "numpy", "torch"}


@pytest.mark.parametrize("path", [path for room, path in MODULES if room != "plugin"], ids=str)
def test_only_the_plugin_imports_fairseq(path):
    assert not packages(path) & FAIRSEQ


@pytest.mark.parametrize(("room", "path"), MODULES, ids=str)
def test_rooms_import_those_below_them_by_their_doors(room, path):
    for name in imports(path):
        package, *inside = name.split(".")
        if package != "fairseq_gradinit" or not inside or inside[0] not in BELOW:
            continue
        other = inside[0]
        assert other == room or other in BELOW[room], f"{path} imports {name}, which is above it"
        assert other in {room, *WITHOUT_A_DOOR} or len(inside) == 1, f"{path} imports {name}"
