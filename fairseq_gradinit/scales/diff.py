"""How two files of scales differ."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

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
    parser.set_defaults(run=print_diff, trouble=2)


def print_diff(options: Namespace) -> int:
    """Print the differences; returns 1 if scales differ."""
    a, b = (Scales.load(scales_file(path)) for path in (options.a, options.b))
    for name in dict.fromkeys((*a.settings, *b.settings)):
        settings = a.settings.get(name, "-"), b.settings.get(name, "-")
        if settings[0] != settings[1]:
            print(f"setting {name}  {'  '.join(settings)}")
    blocks_a, blocks_b = ({block.name: block for block in scales.blocks} for scales in (a, b))
    names = dict.fromkeys((*blocks_a, *blocks_b))
    differing = 0
    for name in names:
        one, other = blocks_a.get(name), blocks_b.get(name)
        if one and other and one.scale == other.scale:
            continue
        differing += 1
        ratio = f"  ratio {other.scale / one.scale:.4g}" if one and other and one.scale else ""
        print(f"{name}  {_shown(one)}  {_shown(other)}{ratio}")
    print(f"{differing} of {len(names)} tensors differ")
    return int(differing > 0)


def _shown(block: BlockScale | None) -> str:
    if block is None:
        return "absent"
    return f"{block.scale:.6g}" + ("" if block.state == "learned" else f" ({block.state})")
