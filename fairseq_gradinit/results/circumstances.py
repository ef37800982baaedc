"""When, where and with what a number was measured."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path

from fairseq_gradinit.versions import fairseq_distribution, usable_cores


@dataclass(frozen=True)
class Circumstances:
    """What is needed to judge and repeat a measurement.

    Attributes:
        date: ISO 8601, in UTC, to the second.
        git_revision: the commit that was checked out; None outside a repository.
        git_dirty: whether tracked files had been changed.
        cores, gpus: that the process might use; `gpu` is the name of one.
        workers: processes of the data-parallel run.
    """

    date: str
    git_revision: str | None
    git_dirty: bool
    python: str
    torch: str
    fairseq: str
    cpu: str
    cores: int
    gpu: str | None
    gpus: int
    workers: int


def current_circumstances(repository: Path, workers: int = 1) -> Circumstances:
    """Those of this process, which runs code of the folder `repository`."""
    torch_version = version("torch")
    gpus, gpu = 0, None
    if not torch_version.endswith("+cpu"):
        import torch  # takes seconds

        gpus = torch.cuda.device_count()
        gpu = torch.cuda.get_device_name() if gpus else None
    name, number = fairseq_distribution() or ("fairseq", "of a checkout")
    about = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", about.read_text() if about.exists() else "")
    return Circumstances(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        git_revision=_git(repository, "rev-parse", "HEAD"),
        git_dirty=bool(_git(repository, "status", "--porcelain", "--untracked-files=no")),
        python=platform.python_version(),
        torch=torch_version,
        fairseq=f"{name} {number}",
        cpu=cpu[1] if cpu else platform.machine(),
        cores=usable_cores(),
        gpu=gpu,
        gpus=gpus,
        workers=workers,
    )


def _git(repository: Path, *arguments: str) -> str | None:
    """What git prints, or None where there is no git or no repository."""
    command = ["git", "-C", str(repository), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def source(command: str, runs: str, found: Sequence[Circumstances]) -> str:
    """Where numbers come from, in a line; `runs` is such as "3 runs", `found` of each of them."""
    days = sorted({each.date[:10] for each in found})
    machines, torch, fairseq, revisions = (
        " and ".join(sorted({text(each) for each in found}))
        for text in (_machine, attrgetter("torch"), attrgetter("fairseq"), _revision)
    )
    period = " to ".join(dict.fromkeys((days[0], days[-1])))
    return (
        f"`{command}`: {runs} on {machines}, {period}, torch {torch}, {fairseq}, "
        f"revision {revisions}"
    )


def _machine(found: Circumstances) -> str:
    if found.gpu is None:
        machine = f"{found.cpu}, {found.cores} core{'s' if found.cores > 1 else ''}"
    else:
        machine = f"{found.gpus} x {found.gpu}" if found.gpus > 1 else found.gpu
    return f"{machine}, {found.workers} workers" if found.workers > 1 else machine


def _revision(found: Circumstances) -> str:
    changes = " with changes" if found.git_dirty else ""
    return f"{(found.git_revision or 'unknown')[:7]}{changes}"
