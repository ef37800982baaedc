"""What an initialisation did to a model, as a file beside the scales: before and after."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fairseq_gradinit.storage import Format, load_document, save_document

FORMAT = Format("fairseq-gradinit-effect", 1, "what GradInit did")
EFFECT_FILE = "gradinit_effect.json"


@dataclass(frozen=True)
class Change:
    """One quantity of the model; None where it is not a finite number."""

    name: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Effect:
    """What an initialisation did.

    Attributes:
        signature: that of the scales.
        norms: the l2 norm of every trainable parameter tensor, in the order of the scales.
        shares: for every residual branch x + f(x), by a name such as "encoder.layers.0.self_attn"
            and in the order of the forward pass, Var[f] / (Var[x] + Var[f]) over all elements of
            the tokens of 32 training sentences. In a post-LN model that is Admin's beta_{i,i}^2
            (Liu et al., EMNLP 2020, section 4), with x and f(x) taken as uncorrelated. Empty
            without layers of fairseq's Transformer, or without data that have sentences by index.
    """

    signature: str
    norms: tuple[Change, ...]
    shares: tuple[Change, ...]

    def save(self, path: Path) -> None:
        save_document(path, FORMAT, self)

    @classmethod
    def load(cls, path: Path) -> Effect:
        return load_document(path, FORMAT, cls)


@dataclass(frozen=True)
class Snapshot:
    """The quantities of a model at one moment, by their names in an `Effect`."""

    norms: dict[str, float]
    shares: dict[str, float]


def effect_between(before: Snapshot, after: Snapshot, signature: str) -> Effect:
    """What happened between two snapshots of one model."""
    norms, shares = _changes(before.norms, after.norms), _changes(before.shares, after.shares)
    return Effect(signature, norms, shares)


def _changes(before: dict[str, float], after: dict[str, float]) -> tuple[Change, ...]:
    return tuple(Change(name, _finite(before[name]), _finite(after[name])) for name in before)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
