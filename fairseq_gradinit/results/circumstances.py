"""When, where and with what a number was measured."""

from __future__ import annotations

import importlib.util
import platform
import runpy
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fairseq_gradinit.versions import fairseq_distribution, usable_cores


@dataclass(frozen=True)
class Circumstances:
    """What is needed to judge and repeat a measurement.

    Attributes:
        date: ISO 8601, in UTC, to the second.
        git_revision: the commit that was checked out; None outside a repository.
        git_dirty: whether tracked files had been changed.
        fairseq: distribution and version, such as "ve-fairseq 0.12.3".
        cores: that the process might use.
        gpu: the name of one; None without any.
        gpus: number of GPUs that the process might use.
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
    """Those of this process.

    Args:
        repository: a folder of the code that is measured.
        workers: processes of the data-parallel run.
    """
    torch_version, for_gpus = _torch_build()
    gpus, gpu = _gpus() if for_gpus else (0, None)
    name, number = fairseq_distribution() or ("fairseq", "of a checkout")
    return Circumstances(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        git_revision=_git(repository, "rev-parse", "HEAD"),
        git_dirty=bool(_git(repository, "status", "--porcelain", "--untracked-files=no")),
        python=platform.python_version(),
        torch=torch_version,
        fairseq=f"{name} {number}",
        cpu=_cpu_name(),
        cores=usable_cores(),
        gpu=gpu,
        gpus=gpus,
        workers=workers,
    )


def source(command: str, runs: str, found: Sequence[Circumstances]) -> str:
    """Where numbers come from, in a line: command, machines, dates, versions, revisions.

    Args:
        runs: how many there are and what they are, such as "3 runs".
        found: of each of them.
    """
    days = sorted({each.date[:10] for each in found})
    texts = {
        "on": {_machine(each) for each in found},
        "torch": {each.torch for each in found},
        "": {each.fairseq for each in found},
        "revision": {_revision(each) for each in found},
    }
    machines, *others = (f"{name} {' and '.join(sorted(t))}".strip() for name, t in texts.items())
    period = " to ".join(dict.fromkeys((days[0], days[-1])))
    return f"`{command}`: {runs} {machines}, {period}, {', '.join(others)}"


def _machine(found: Circumstances) -> str:
    cores = f"{found.cpu}, {found.cores} core{'s' if found.cores > 1 else ''}"
    machine = cores if found.gpu is None else _several(found.gpus, found.gpu)
    return f"{machine}, {found.workers} workers" if found.workers > 1 else machine


def _several(count: int, name: str) -> str:
    return f"{count} x {name}" if count > 1 else name


def _revision(found: Circumstances) -> str:
    changes = " with changes" if found.git_dirty else ""
    return f"{(found.git_revision or 'unknown')[:7]}{changes}"


def _torch_build() -> tuple[str, bool]:
    """Version of the installed torch, and whether it is built for GPUs; importing takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    build = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return str(build["__version__"]), bool(build["cuda"] or build["hip"])


def _gpus() -> tuple[int, str | None]:
    """How many there are, and the name of one."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return count, torch.cuda.get_device_name() if count else None


def _git(repository: Path, *arguments: str) -> str | None:
    """What git prints, or None where there is no git or no repository."""
    command = ["git", "-C", str(repository), *arguments]
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
