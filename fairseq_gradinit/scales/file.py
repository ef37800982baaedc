"""The learned scales as a file: plain JSON, versioned, readable, written whole or not at all."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch

from fairseq_gradinit.engine import (
    Block,
    BlockState,
    Iteration,
    base_weights,
    set_weights,
)
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.scales.description import line_of
from fairseq_gradinit.storage import (
    Format,
    abbreviate,
    load_document,
    require_printable,
    save_document,
)

FORMAT = Format("fairseq-gradinit-scales", 2, "the scales of a run")
SCALES_FILE = "gradinit_scales.json"


@dataclass(frozen=True)
class BlockScale:
    """The scale of one parameter tensor.

    Attributes:
        name: dotted name of the tensor in the model.
        shape: its shape.
        scale: the factor on its initial value.
        state: why it has the scale it has, see `fairseq_gradinit.engine.blocks.Block`.
    """

    name: str
    shape: tuple[int, ...]
    scale: float
    state: BlockState


@dataclass(frozen=True)
class Scales:
    """What a GradInit run learned.

    Attributes:
        blocks: every trainable parameter tensor of the model, in its order.
        settings: everything that determined the result, see `Description.settings`.
        history: record of the iterations, empty when unknown.
    """

    blocks: tuple[BlockScale, ...]
    settings: Mapping[str, str]
    history: tuple[Iteration, ...] = field(default=())

    @property
    def centered(self) -> bool:
        """Whether the LayerNorms were centered to learn these scales."""
        return any(block.state == "centered" for block in self.blocks)

    @property
    def signature(self) -> str:
        """One line that says what determined the result."""
        return line_of(self.settings)

    @property
    def eta(self) -> float:
        """Length of the trial step that these scales were learned for; NaN if it is not known."""
        try:
            return float(self.settings["eta"])
        except (KeyError, ValueError):
            return math.nan

    def digest(self) -> str:
        """Eight hexadecimal digits that change with any name, shape, scale or state."""
        return hashlib.blake2b(repr(self.blocks).encode(), digest_size=4).hexdigest()

    @classmethod
    def of(
        cls,
        blocks: Sequence[Block],
        scale_of: Mapping[str, float],
        settings: Mapping[str, str],
        history: Sequence[Iteration],
    ) -> Scales:
        rows = tuple(
            BlockScale(b.name, tuple(b.parameter.shape), scale_of[b.name], b.state) for b in blocks
        )
        return cls(rows, settings, tuple(history))

    def save(self, path: Path) -> None:
        """See `save_document`."""
        save_document(path, FORMAT, self)

    @classmethod
    def load(cls, path: Path) -> Scales:
        """Read a file written by `save`.

        Raises:
            GradInitError: the file cannot be read, is damaged, or is not of this format.
        """
        scales = load_document(path, FORMAT, cls)
        try:
            scales._require_sound()
        except ValueError as error:
            raise GradInitError(f"{path} is damaged: {error}") from error
        return scales

    def apply(self, blocks: Sequence[Block]) -> Scales:
        """Multiply the model's freshly initialised tensors by these scales, in place.

        The sizes of a tensor may be others than those it was learned for: a scale belongs to the
        tensor's place in the model.

        Returns:
            These scales, with the shapes of this model.

        Raises:
            GradInitError: the names or the numbers of dimensions are not those of the model, or
                a scale takes a tensor beyond the numbers of its precision; nothing is changed then.
        """
        self._check_fits(blocks)
        row_of = {row.name: row for row in self.blocks}
        as_learned = [Block(b.name, b.parameter, "learned") for b in blocks]
        factors = torch.tensor([row_of[b.name].scale for b in blocks], dtype=torch.float64)
        base = base_weights(as_learned)
        set_weights(as_learned, base, factors)
        broken = [b for b in blocks if not torch.isfinite(b.parameter).all()]
        if broken:
            set_weights(as_learned, base, torch.ones_like(factors))
            raise GradInitError(
                f"the scale {row_of[broken[0].name].scale:g} makes {broken[0].name} infinite: the "
                "scales are damaged, learn them again"
            )
        rows = (replace(row_of[b.name], shape=tuple(b.parameter.shape)) for b in blocks)
        return replace(self, blocks=tuple(rows))

    def with_centering(self, blocks: Sequence[Block]) -> Scales:
        """These scales in a model whose LayerNorms were centered, or not, as its blocks say."""
        here = {b.name: b.state for b in blocks}
        rows = tuple(
            replace(row, state=here[row.name]) if "centered" in (row.state, here[row.name]) else row
            for row in self.blocks
        )
        centered = {"centering": "on" if "centered" in here.values() else "off"}
        settings = {**self.settings, **centered} if "centering" in self.settings else self.settings
        return replace(self, blocks=rows, settings=settings)

    def keeping(self, names: Collection[str]) -> Scales:
        """These scales, with scale 1 for the tensors of these names."""
        rows = (
            replace(row, scale=1.0, state="fixed") if row.name in names else row
            for row in self.blocks
        )
        return replace(self, blocks=tuple(rows))

    def _require_sound(self) -> None:
        for text in (*(block.name for block in self.blocks), *chain(*self.settings.items())):
            require_printable(text)
        for block in self.blocks:
            if block.scale < 0.0 or any(size < 0 for size in block.shape):
                raise ValueError(f"scale or shape of {_short(block.name)} is negative")
        if not self.blocks or len({block.name for block in self.blocks}) != len(self.blocks):
            raise ValueError("a name is missing or repeated")

    def _check_fits(self, blocks: Sequence[Block]) -> None:
        file = {row.name: list(row.shape) for row in self.blocks}
        model = {block.name: list(block.parameter.shape) for block in blocks}
        problems = [f"{_short(name)} is not in the model" for name in file if name not in model]
        problems += [f"{name} is not in the file" for name in model if name not in file]
        problems += [
            f"{name} has shape {abbreviate(file[name])} in the file and {model[name]} in the model"
            for name in file
            if name in model and len(file[name]) != len(model[name])
        ]
        if problems:
            raise GradInitError(f"the scales were learned for another model: {some(problems)}")


def size_changes(learned: Scales, applied: Scales) -> str | None:
    """What `Scales.apply` changed, in a few words; None if the shapes are those of the file."""
    applied_shape = {row.name: row.shape for row in applied.blocks}
    changes = [
        f"{row.name} {list(row.shape)}, here {list(applied_shape[row.name])}"
        for row in learned.blocks
        if row.shape != applied_shape[row.name]
    ]
    return some(changes) if changes else None


def scales_file(path: Path) -> Path:
    """The scales file that a path stands for.

    Raises:
        GradInitError: a folder has none.
    """
    if not path.is_dir():
        return path
    places = [path / SCALES_FILE, path / "checkpoints" / SCALES_FILE]
    for place in places:
        if place.exists():
            return place
    raise GradInitError(
        f"there is no {SCALES_FILE} in {path} or its folder checkpoints: give the "
        "--save-dir of a run with --gradinit that has learned its scales, or a scales file"
    )


def _short(name: str) -> str:
    return name if len(name) <= 100 else f"{name[:97]}..."


def some(items: Sequence[str]) -> str:
    """The first five, and how many more there are."""
    more = f"; and {len(items) - 5} more" if len(items) > 5 else ""
    return "; ".join(items[:5]) + more


def kinds_of_blocks(scales: Scales) -> dict[str, list[BlockScale]]:
    """The blocks grouped by their name with layer numbers left out, such as `layers.*.fc1.bias`."""
    kinds: dict[str, list[BlockScale]] = {}
    for block in scales.blocks:
        kind = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", block.name)
        kinds.setdefault(kind, []).append(block)
    return kinds
