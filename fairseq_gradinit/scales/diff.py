"""How two files of scales differ."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fairseq_gradinit.scales.file import BlockScale, Scales


def differing_scales(a: Scales, b: Scales, tolerance: float) -> list[str]:
    """One line for each tensor whose scale differs.

    Args:
        tolerance: how far apart, relative to the larger one, two scales may be and count as equal.
    """
    return list(_lines(a, b, tolerance))


def differing_settings(a: Scales, b: Scales) -> list[str]:
    """One line for each field of the signatures that differs."""
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
