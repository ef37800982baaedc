"""What of an environment GradInit needs, whether it is there, and what is known not to work."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import platform
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fairseq_gradinit import __version__
from fairseq_gradinit.versions import fairseq_distribution

TESTED_FAIRSEQ = "ve-fairseq 0.12.3"

KNOWN_OF_TESTED_FAIRSEQ = (
    "--required-batch-size-multiple 8, its default, drops sentences silently: give 1",
    "--sample-break-mode eos crashes with NumPy 2",
    "torchrun cannot start several processes on CPUs: see docs/distributed.md",
    "--lr-scheduler inverse_sqrt with --warmup-updates 0 divides by zero: use polynomial_decay",
)

Finding = tuple[Literal["ok", "note", "problem"], str]
"""A problem keeps GradInit from working; a note is worth knowing."""


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
    found = list(findings())
    logging.disable(logging.NOTSET)
    for level, text in found:
        print(f"{level:7} {text}")
    return int(any(level == "problem" for level, _ in found))


def findings() -> Iterator[Finding]:
    """Look at this environment. Packages are imported, so this takes some seconds."""
    import torch

    yield "ok", f"fairseq-gradinit {__version__}, Python {platform.python_version()}"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield "ok", f"torch {torch.__version__}, built {built}"
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    for i, card in enumerate(cards):
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        yield "ok", f"GPU {i}: {card.name}, {memory}, capability {card.major}.{card.minor}"
    if not cards:
        yield "note", "torch sees no GPU; training runs on the CPU with --cpu"
    yield from _fairseq()


def _fairseq() -> Iterator[Finding]:
    try:
        importlib.import_module("fairseq_gradinit.plugin.install")
    except Exception as error:  # fairseq runs much code when it is imported.
        yield "problem", f"fairseq and the plugin: {type(error).__name__}: {error}"
        return
    found = " ".join(fairseq_distribution() or ["fairseq of a checkout"])
    if found == TESTED_FAIRSEQ:
        yield "ok", found
        yield from (("note", f"ve-fairseq: {known}") for known in KNOWN_OF_TESTED_FAIRSEQ)
    else:
        yield "note", f"{found} is untested here; {TESTED_FAIRSEQ} is tested"
    yield "ok", f"the plugin loads: --user-dir {user_dir()}"


def user_dir() -> str:
    """What to give as --user-dir from any folder.

    fairseq looks beside itself for a folder of the name. That is in site-packages, where this
    package is too, unless fairseq runs from a clone.
    """
    fairseq = importlib.util.find_spec("fairseq")
    ours = Path(__file__).parents[1]
    beside = fairseq and fairseq.origin and Path(fairseq.origin).parents[1] / ours.name
    return ours.name if beside and beside.is_dir() else str(ours)
