"""Write the results of a benchmark together with what is needed to judge and repeat them.

Every JSON file in `benchmarks/results/` has this form: the command, the date, the revision of the
code, the versions of what it ran on, the machine, and the results.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq_gradinit.circumstances import circumstances as of_this_process
from fairseq_gradinit.files import write_atomically
from fairseq_gradinit.tables import markdown_rows

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"


def write(path: Path, results: Any) -> None:
    """Write `results` to the JSON file `path`, with the circumstances they were measured in.

    Whoever reads `path` meanwhile sees the old file or the new one, never a part.
    """
    record = {**circumstances(), "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1) + "\n")


def circumstances() -> dict[str, Any]:
    """The command of this process, the date, the code, the versions and the machine."""
    found = of_this_process(REPOSITORY)
    return {
        "command": _command(),
        "date": found.date,
        "git_revision": found.git_revision,
        "git_dirty": found.git_dirty,
        "python": found.python,
        "torch": found.torch,
        "numpy": np.__version__,
        "cpu": found.cpu,
        "cores": found.cores,
        "threads": torch.get_num_threads(),
        "gpu": found.gpu,
    }


def read(path: Path) -> dict[str, Any]:
    """The record that `write` wrote to `path`."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def _command() -> str:
    """The command line, with the paths inside the repository relative to it."""
    words = [word.removeprefix(f"{REPOSITORY}/") for word in sys.argv]
    return shlex.join(["python", *words])


@dataclass(frozen=True)
class Table:
    """Results as they stand in the documentation; kept in the JSON file with their source."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def within(value: float, limit: float) -> str:
    """`value` with the verdict on it, for a target of at most `limit`."""
    return f"{value:.2f}" if value <= limit else f"{value:.2f}, **missed**"


def reaching(value: float, limit: float) -> str:
    """`value` with the verdict on it, for a target of at least `limit`."""
    return f"{value:.2f}" if value >= limit else f"{value:.2f}, **missed**"


def markdown(record: dict[str, Any]) -> str:
    """The tables under `results` of a record, with the circumstances they were measured in."""
    machine = record["gpu"] or f"{record['cpu']}, {record['cores']} cores"
    source = (
        f"`{record['command']}` on {machine}, {record['date'][:10]}, torch {record['torch']}, "
        f"{record['threads']} thread(s)"
    )
    return "\n".join(
        markdown_table(Table(**table), source) for table in record["results"]["tables"]
    )


def markdown_table(table: Table, source: str) -> str:
    """A table below a line that says where it comes from."""
    return f"### {table.title}\n\n{source}:\n\n{markdown_rows(table.header, table.rows)}\n"
