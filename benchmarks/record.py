"""Write the results of a benchmark together with what is needed to judge and repeat them.

Every JSON file in `benchmarks/results/` has this form: the command, the date, the revision of the
code, the versions of what it ran on, the machine, and the results.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"


@dataclass(frozen=True)
class Revision:
    """The commit that was checked out, None outside a repository; `dirty` with changes on top."""

    git_revision: str | None
    git_dirty: bool


def write(path: Path, results: Any) -> None:
    """Write `results` to the JSON file `path`, with the circumstances they were measured in.

    Whoever reads `path` meanwhile sees the old file or the new one, never a part.
    """
    record = {**circumstances(), "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def circumstances() -> dict[str, Any]:
    """The command of this process, the date, the code, the versions and the machine."""
    revision = _revision()
    return {
        "command": _command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **asdict(revision),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": _cpu_name(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def read(path: Path) -> dict[str, Any]:
    """The record that `write` wrote to `path`."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def _command() -> str:
    """The command line, with the paths inside the repository relative to it."""
    words = [word.removeprefix(f"{REPOSITORY}/") for word in sys.argv]
    return shlex.join(["python", *words])


def _revision() -> Revision:
    commit = _git("rev-parse", "HEAD")
    return Revision(commit, bool(_git("status", "--porcelain", "--untracked-files=no")))


def _git(*arguments: str) -> str | None:
    """What git prints, or None where there is no git or no repository."""
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {table.title}\n\n{source}:\n\n{rows}\n"
