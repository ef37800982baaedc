"""Which fairseq is installed, and what this process may use of the machine."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

FAIRSEQ_DISTRIBUTIONS = ("ve-fairseq", "fairseq", "fairseq-fixed")


def fairseq_distribution() -> tuple[str, str] | None:
    """Name and version of the installed fairseq; None if it is no installed distribution."""
    for name in FAIRSEQ_DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def fairseq_version() -> str:
    """Version of the installed fairseq and the distribution it came from."""
    found = fairseq_distribution()
    return f"{found[1]} ({found[0]})" if found else "checkout"


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
