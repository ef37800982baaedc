"""The learned scales as a file: plain JSON, versioned and readable."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fairseq_gradinit.engine import Block, BlockState, Iteration, base_weights, set_weights
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.storage import Format, load_document, save_document

FORMAT = Format("fairseq-gradinit-scales", 2, "the scales of a run")
SCALES_FILE = "gradinit_scales.json"


@dataclass(frozen=True)
class BlockScale:
    """The factor on the initial value of one parameter tensor; for its state see `Block`."""

    name: str
    shape: tuple[int, ...]
    scale: float
    state: BlockState


@dataclass(frozen=True)
class Scales:
    """What a GradInit run learned, for every trainable parameter tensor in the model's order.

    `settings` are all that determined the result, see `Description.settings`.
    """

    blocks: tuple[BlockScale, ...]
    settings: Mapping[str, str]
    history: tuple[Iteration, ...] = ()

    @property
    def centered(self) -> bool:
        """Whether the LayerNorms were centered to learn these scales."""
        return any(block.state == "centered" for block in self.blocks)

    @property
    def signature(self) -> str:
        """One line that says what determined the result."""
        return "|".join(f"{name}:{value}" for name, value in self.settings.items())

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
        save_document(path, FORMAT, self)

    @classmethod
    def load(cls, path: Path) -> Scales:
        return load_document(path, FORMAT, cls)

    def apply(self, blocks: Sequence[Block]) -> Scales:
        """Multiply the model's freshly initialised tensors by these scales, in place.

        The sizes of a tensor may be others than those it was learned for: a scale belongs to the
        tensor's place in the model. Returns these scales, with the shapes of this model.

        Raises:
            GradInitError: the names are not those of the model; nothing is changed then.
        """
        row_of = {row.name: row for row in self.blocks}
        as_learned = [Block(b.name, b.parameter, "learned") for b in blocks]
        names = dict.fromkeys(block.name for block in blocks)
        problems = [f"{name} is not in the model" for name in row_of if name not in names]
        problems += [f"{name} is not in the file" for name in names if name not in row_of]
        if problems:
            raise GradInitError(f"the scales were learned for another model: {some(problems)}")
        factors = torch.tensor([row_of[name].scale for name in names], dtype=torch.float64)
        set_weights(as_learned, base_weights(as_learned), factors)
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
    """The scales file that a path stands for."""
    if not path.is_dir():
        return path
    for place in (path / SCALES_FILE, path / "checkpoints" / SCALES_FILE):
        if place.exists():
            return place
    raise GradInitError(
        f"there is no {SCALES_FILE} in {path} or its folder checkpoints: give the "
        "--save-dir of a run with --gradinit that has learned its scales, or a scales file"
    )


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
