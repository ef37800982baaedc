"""How two files of scales differ."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.scales.file import BlockScale, Scales, scales_file


def add_diff(parser: ArgumentParser) -> None:
    """Make a parser that of `fairseq-gradinit diff`."""
    parser.description = (
        "Print the settings and the scales in which two runs differ. Exit status: 0 all scales are "
        "equal, 1 some are not, 2 they cannot be compared."
    )
    for name in ("a", "b"):
        parser.add_argument(
            name, type=Path, metavar=name.upper(), help="the --save-dir of a run, or a scales file"
        )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="RELATIVE",
        help="scales that differ by less count as equal (default: %(default)s)",
    )
    parser.set_defaults(run=print_diff, trouble=2)


def print_diff(options: Namespace) -> int:
    """Print the differences; returns 1 if scales differ.

    Raises:
        GradInitError: a file cannot be read, or the tolerance is negative.
    """
    if not options.tolerance >= 0:
        raise GradInitError(f"--tolerance {options.tolerance:g} is not a number from 0 up")
    a, b = (Scales.load(scales_file(path)) for path in (options.a, options.b))
    for line in differing_settings(a, b):
        print(f"setting {line}")
    scales = differing_scales(a, b, options.tolerance)
    for line in scales:
        print(line)
    print(f"{len(scales)} of {len({x.name for s in (a, b) for x in s.blocks})} tensors differ")
    return int(bool(scales))


def differing_scales(a: Scales, b: Scales, tolerance: float) -> list[str]:
    """One line for each tensor whose scale differs.

    Args:
        tolerance: how far apart, relative to the larger one, two scales may be and count as equal.
    """
    return list(_lines(a, b, tolerance))


def differing_settings(a: Scales, b: Scales) -> list[str]:
    """One line for each setting that differs."""
    names = dict.fromkeys((*a.settings, *b.settings))
    values = {name: (a.settings.get(name, "-"), b.settings.get(name, "-")) for name in names}
    return [f"{name}  {one}  {other}" for name, (one, other) in values.items() if one != other]


def _lines(a: Scales, b: Scales, tolerance: float) -> Iterator[str]:
    first, second = ({block.name: block for block in scales.blocks} for scales in (a, b))
    for name in dict.fromkeys((*first, *second)):
        one, other = first.get(name), second.get(name)
        if one is None or other is None:
            yield f"{name}  {_shown(one)}  {_shown(other)}"
        elif not math.isclose(one.scale, other.scale, rel_tol=tolerance):
            ratio = f"  ratio {other.scale / one.scale:.4g}" if one.scale else ""
            yield f"{name}  {_shown(one)}  {_shown(other)}{ratio}"


def _shown(block: BlockScale | None) -> str:
    if block is None:
        return "absent"
    return f"{block.scale:.6g}" + ("" if block.state == "learned" else f" ({block.state})")
