"""Results of benchmarks, with what is needed to judge and repeat them, and their tables."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq_gradinit.results import current_circumstances
from fairseq_gradinit.results.tables import markdown_rows

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"


@dataclass(frozen=True)
class Table:
    """Results as the documentation shows them."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def write(path: Path, kind: str, rows: Sequence[Any]) -> None:
    """Write a JSON file of rows, a line each, with the command, date, code, versions and machine.

    Args:
        kind: what the rows are called in the file.
    """
    found = vars(current_circumstances(REPOSITORY))
    # Paths inside the repository are relative to it.
    words = [word.removeprefix(f"{REPOSITORY}/") for word in sys.argv]
    names = ("date", "git_revision", "git_dirty", "python", "torch", "cpu", "cores", "gpu")
    record = {
        "command": shlex.join(["python", *words]),
        **{name: found[name] for name in names},
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "results": {kind: []},
    }
    lines = ",\n   ".join(map(json.dumps, rows))
    text = json.dumps(record, indent=1).replace(f'"{kind}": []', f'"{kind}": [\n   {lines}\n  ]')
    path.write_text(text + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """The record that `write` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def markdown(record: dict[str, Any], tables: Iterable[Table]) -> str:
    """Tables with the circumstances that their record was measured in."""
    machine = record["gpu"] or f"{record['cpu']}, {record['cores']} cores"
    source = (
        f"`{record['command']}` of revision {record['git_revision'][:7]} on {machine}, "
        f"{record['date'][:10]}, torch {record['torch']}, {record['threads']} thread(s)"
    )
    return "\n".join(markdown_table(table, source) for table in tables)


def markdown_table(table: Table, source: str) -> str:
    """A table below a line that says where it comes from."""
    return f"### {table.title}\n\n{source}:\n\n{markdown_rows(table.header, table.rows)}\n"
