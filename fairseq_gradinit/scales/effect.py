"""What an initialisation did to a model, as a file beside the scales: before and after."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.storage import abbreviate, parse, parse_json, write_atomically

FORMAT = "fairseq-gradinit-effect"
VERSION = 1
EFFECT_FILE = "gradinit_effect.json"


@dataclass(frozen=True)
class Change:
    """One quantity of the model before and after; each is None where it is not a finite number."""

    name: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Effect:
    """What an initialisation did.

    Attributes:
        signature: that of the scales.
        norms: the l2 norm of every trainable parameter tensor, in the order of the scales.
        shares: for every residual branch x + f(x), by a name such as
            "encoder.layers.0.self_attn" and in the order of the forward pass, what f(x) makes up of
            the variance, Var[f] / (Var[x] + Var[f]), over all elements of the tokens of 32 training
            sentences. In a post-LN model that is Admin's beta_{i,i}^2, by which the output of a
            sublayer depends on its own branch (Liu et al., EMNLP 2020, section 4), with x and
            f(x) taken as uncorrelated. Empty for a model without layers of fairseq's Transformer,
            and where scales from a file are applied to data that have no sentences by index.
    """

    signature: str
    norms: tuple[Change, ...]
    shares: tuple[Change, ...]

    def save(self, path: Path) -> None:
        """Write the file; `path` either keeps its old content or gets all of the new one.

        Raises:
            GradInitError: the file cannot be written.
        """
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_atomically(path, json.dumps(document, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Effect:
        """Read a file written by `save`.

        Raises:
            GradInitError: the file cannot be read, is damaged, or is not of this format.
        """
        try:
            document = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise GradInitError(f"cannot read {path}: {error}") from error
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise GradInitError(f"{path} does not say what GradInit did (no format {FORMAT!r})")
        version = document.pop("version", None)
        if type(version) is not int or version != VERSION:
            raise GradInitError(
                f"{path} has version {abbreviate(version)} of its format; this fairseq-gradinit "
                f"reads version {VERSION}"
            )
        try:
            return parse(cls, document)
        except ValueError as error:
            raise GradInitError(f"{path} is damaged: {error}") from error


@dataclass(frozen=True)
class Snapshot:
    """The quantities of a model at one moment, by their names in an `Effect`."""

    norms: dict[str, float]
    shares: dict[str, float]


def effect_between(before: Snapshot, after: Snapshot, signature: str) -> Effect:
    """What happened between two snapshots of one model."""
    return Effect(
        signature,
        _changes(before.norms, after.norms),
        _changes(before.shares, after.shares),
    )


def _changes(before: dict[str, float], after: dict[str, float]) -> tuple[Change, ...]:
    return tuple(Change(name, _finite(before[name]), _finite(after[name])) for name in before)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
