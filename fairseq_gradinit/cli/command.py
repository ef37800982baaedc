"""The program `fairseq-gradinit`: what there is to do before and after training.

SUBCOMMANDS names the function that gives a parser its description, its arguments and, in `run`,
what it does, which returns the exit status, None being 0. A room is imported once its subcommand is
chosen, so that none waits for what others need.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from fairseq_gradinit.errors import GradInitError

PROGRAM = "fairseq-gradinit"

SUBCOMMANDS = {
    "check": ("check.program:add_check", "say whether training will hold without warmup"),
    "report": ("report.command:add_report", "make a page that shows what GradInit did"),
    "diff": ("scales.diff:add_diff", "compare the scales of two runs"),
    "table": ("results.commands:add_table", "print Markdown tables of runs"),
    "doctor": ("cli.doctor:add_doctor", "say whether GradInit can work here"),
}
"""For each the function, by module and name, and its line in the program's help."""


def _parser(chosen: str) -> argparse.ArgumentParser:
    """The program's parser; only the chosen subcommand's has its arguments."""
    parser = argparse.ArgumentParser(PROGRAM, description="GradInit before and after training.")
    # The exit status after a mistake; a subcommand whose 1 means something has another.
    parser.set_defaults(trouble=1)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (place, help_) in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(name, help=help_)
        if name == chosen:
            module, _, function = place.partition(":")
            getattr(importlib.import_module(f"fairseq_gradinit.{module}"), function)(subparser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    logging.basicConfig(level=logging.INFO, format=f"{PROGRAM}: %(message)s")
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser("".join(words[:1])).parse_args(words)
    # Files in the folder where one is are what they are on every machine.
    here = f"{Path.cwd()}/"
    options.command = shlex.join([PROGRAM, *(word.removeprefix(here) for word in words)])
    try:
        status = int(options.run(options) or 0)
        # At exit it would be too late for a sentence about a full disk.
        sys.stdout.flush()
        return status
    except GradInitError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
    except OSError as error:
        if error.filename is None:
            # What is left in the buffer of standard output cannot be written at exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        place = error.filename or "standard output"
        print(f"{PROGRAM}: cannot write to {place}: {error.strerror}", file=sys.stderr)
    except Exception:
        # A defect. Python would end with 1, which means something else where `trouble` is not 1.
        traceback.print_exc()
    return int(options.trouble)
