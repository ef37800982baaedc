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


def imports(room: str) -> Iterator[str]:
    """Dotted names of all that the modules of a room import, also within functions."""
    for path in (PLUGIN / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield str(node.module)


def test_every_module_is_in_a_room():
    top = {path.name for path in PLUGIN.glob("*.py")}
    assert top == {"__init__.py", "__main__.py", "errors.py", "versions.py", "initialization.py"}
    assert {path.parent.name for path in PLUGIN.glob("*/__init__.py")} == BELOW.keys()


@pytest.mark.parametrize("room", BELOW)
def test_rooms_import_those_below_them_by_their_doors(room):
    for name in imports(room):
        package, *inside = name.split(".")
        if room != "plugin":
            assert package not in FAIRSEQ
        if room == "engine":
            # NumPy, which torch brings, only to seed it and to keep its random state.
            assert package in {*sys.stdlib_module_names, "fairseq_gradinit", "numpy", "torch"}
        if package == "fairseq_gradinit" and inside and inside[0] in BELOW:
            assert inside[0] in {room, *BELOW[room]}, f"{room} imports {name}, which is above it"
            assert inside[0] in {room, *WITHOUT_A_DOOR} or len(inside) == 1, name
