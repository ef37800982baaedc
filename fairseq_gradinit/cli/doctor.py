"""What of an environment GradInit needs, whether it is there, and what is known not to work."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from fairseq_gradinit import __version__
from fairseq_gradinit.versions import (
    FAIRSEQ_DISTRIBUTIONS,
    fairseq_distribution,
    usable_cores,
)

PYTHONS = ((3, 11), (3, 12))
OLDEST_TORCH = (2, 6)
TESTED_FAIRSEQ = ("ve-fairseq", "0.12.3")

EXTRAS = {
    "matplotlib": ("plot", "pictures"),
    "jinja2": ("plot", "reports"),
    "sacrebleu": ("quickstart", "scores"),
    "sentencepiece": ("data", "corpora"),
    "sacremoses": ("data", "corpora"),
}
"""What is used for some things only: its extra, and what for."""

KNOWN_OF_TESTED_FAIRSEQ = (
    "--required-batch-size-multiple 8, its default, drops sentences silently: give 1",
    "--sample-break-mode eos crashes with NumPy 2",
    "torchrun cannot start several processes on CPUs: see docs/distributed.md",
    "--lr-scheduler inverse_sqrt with --warmup-updates 0 divides by zero: use polynomial_decay",
)


def add_doctor(parser: ArgumentParser) -> None:
    """Make a parser that of `fairseq-gradinit doctor`."""
    parser.description = (
        "Print the versions of what GradInit needs, and what is known not to work with them. Exit "
        "status: 1 if something keeps it from working."
    )
    parser.set_defaults(run=print_findings)


def print_findings(options: Namespace) -> int:
    """Print what was found; returns 1 if there is a problem."""
    # While it is imported, fairseq tells of optional packages that it does without.
    logging.disable(logging.INFO)
    try:
        found = list(findings())
    finally:
        logging.disable(logging.NOTSET)
    for finding in found:
        print(f"{finding.level:7} {finding.text}")
    return int(any(finding.level == "problem" for finding in found))


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: a `problem` keeps GradInit from working; a `note` is worth knowing.
    """

    level: Literal["ok", "note", "problem"]
    text: str


def findings() -> Iterator[Finding]:
    """Look at this environment. Packages are imported, so this takes some seconds."""
    yield Finding("ok", f"fairseq-gradinit {__version__}")
    for look in (_python, _torch, _gpus, _fairseq, _plugin, _extras, _cores):
        yield from look()


def _python() -> Iterator[Finding]:
    here = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] in PYTHONS:
        yield Finding("ok", f"Python {here}")
    else:
        known = " or ".join(".".join(map(str, pair)) for pair in PYTHONS)
        yield Finding("problem", f"Python {here}: fairseq's builds are for {known}")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("problem", f"torch cannot be imported: {error}")
        return
    number = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if number < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        yield Finding("problem", f"torch {torch.__version__}: {oldest} or newer is needed")
    else:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield Finding("ok", f"torch {torch.__version__}, built {built}")


def _gpus() -> Iterator[Finding]:
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        reason = ": torch sees no driver that fits it" if torch.version.cuda else ""
        yield Finding("note", f"no GPU{reason}; training runs on the CPU with --cpu")
        return
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        yield Finding("ok", f"GPU {i}: {card.name}, {memory}, capability {card.major}.{card.minor}")


def _fairseq() -> Iterator[Finding]:
    installed = [name for name in FAIRSEQ_DISTRIBUTIONS if _version(name)]
    if len(installed) > 1:
        yield Finding(
            "problem",
            f"{' and '.join(installed)} are both installed, and share files: uninstall both, "
            "then install one",
        )
    try:
        importlib.import_module("fairseq")
    except Exception as error:  # fairseq runs much code when it is imported.
        what = "is not installed: run `pip install 'fairseq-gradinit[fairseq]'`"
        if installed or not isinstance(error, ModuleNotFoundError):
            what = f"cannot be imported: {type(error).__name__}: {error}"
        yield Finding("problem", f"fairseq {what}")
        return
    found = fairseq_distribution()
    name, number = found or ("fairseq", "of a checkout")
    if found == TESTED_FAIRSEQ:
        yield Finding("ok", f"{name} {number}")
        for known in KNOWN_OF_TESTED_FAIRSEQ:
            yield Finding("note", f"{name}: {known}")
    else:
        yield Finding(
            "note", f"{name} {number} is untested here; {' '.join(TESTED_FAIRSEQ)} is tested"
        )


def _plugin() -> Iterator[Finding]:
    try:
        importlib.import_module("fairseq_gradinit.plugin.install")
    except Exception as error:
        yield Finding("problem", f"the plugin cannot be loaded: {type(error).__name__}: {error}")
    else:
        yield Finding("ok", f"the plugin loads: --user-dir {user_dir()}")


def user_dir() -> str:
    """What to give as --user-dir from any folder.

    fairseq looks beside itself for a folder of the name. That is in site-packages, where this
    package is too, unless fairseq runs from a clone.
    """
    fairseq = importlib.util.find_spec("fairseq")
    ours = Path(__file__).parents[1]
    if fairseq is not None and fairseq.origin is not None:
        beside = Path(fairseq.origin).parents[1] / ours.name
        if beside.is_dir():
            return ours.name
    return str(ours)


def _extras() -> Iterator[Finding]:
    numbers = {name: _version(name) for name in EXTRAS}
    found = ", ".join(f"{name} {number}" for name, number in numbers.items() if number)
    if found:
        yield Finding("ok", found)
    for name, (extra, purpose) in EXTRAS.items():
        if not numbers[name]:
            install = f"`pip install 'fairseq-gradinit[{extra}]'`"
            yield Finding("note", f"{name} is missing, which {purpose} need: {install}")


def _cores() -> Iterator[Finding]:
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    yield Finding("ok", f"{usable_cores()} CPU cores, OMP_NUM_THREADS {threads}")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
