"""Write the results of a benchmark together with what is needed to judge and repeat them.

Every JSON file in `benchmarks/results/` has this form: the command, the date, the revision of the
code, the versions of what it ran on, the machine, and the results.
"""

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

from fairseq_gradinit.results import current_circumstances as of_this_process
from fairseq_gradinit.results.tables import markdown_rows
from fairseq_gradinit.storage import write_atomically

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"


def write(path: Path, results: Any) -> None:
    """Write `results` to the JSON file `path`, with the circumstances they were measured in.

    Whoever reads `path` meanwhile sees the old file or the new one, never a part.
    """
    record = {**current_circumstances(), "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, compact(record) + "\n")


def compact(value: Any, levels: int = 3, indent: str = "") -> str:
    """JSON with a line for each entry of the outer levels: a run, or a table, is one line."""
    if not levels or not isinstance(value, dict | list) or not value:
        return json.dumps(value)
    inner = indent + " "
    entries = value.items() if isinstance(value, dict) else ((None, each) for each in value)
    lines = [
        f"{inner}{'' if key is None else json.dumps(key) + ': '}{compact(each, levels - 1, inner)}"
        for key, each in entries
    ]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([opening, ",\n".join(lines), indent + closing])


def current_circumstances() -> dict[str, Any]:
    """The command of this process, the date, the code, the versions and the machine."""
    found = vars(of_this_process(REPOSITORY))
    # Paths inside the repository are relative to it.
    words = [word.removeprefix(f"{REPOSITORY}/") for word in sys.argv]
    names = ("date", "git_revision", "git_dirty", "python", "torch", "cpu", "cores", "gpu")
    return {
        "command": shlex.join(["python", *words]),
        **{name: found[name] for name in names},
        **{"numpy": np.__version__, "threads": torch.get_num_threads()},
    }


def read(path: Path) -> dict[str, Any]:
    """The record that `write` wrote to `path`."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


@dataclass(frozen=True)
class Table:
    """Results as the documentation shows them."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


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
