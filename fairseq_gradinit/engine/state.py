"""The state of the learning of scales as a file, so that an interrupted run can go on.

Plain JSON like the scales, whose floats come back to the last bit. A digest tells a torn or edited
file, and an identity tells one that another run has left.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fairseq_gradinit.engine.config import SECOND_ORDER_NAMES, SecondOrder
from fairseq_gradinit.engine.history import (
    KINDS,
    Iteration,
    IterationKind,
    parse_iteration,
    parse_kind,
)
from fairseq_gradinit.engine.processes import OneProcess, Processes
from fairseq_gradinit.storage import (
    abbreviate,
    parse_json,
    require_finite,
    require_type,
    write_atomically,
)

logger = logging.getLogger(__name__)

FORMAT = "fairseq-gradinit-state"
VERSION = 1


@dataclass(frozen=True)
class Moments:
    """What Adam remembers of the gradients of one kind of iteration.

    Attributes:
        step: iterations of this kind.
        mean, square: running averages of the gradient and its square, one for each learned block.
    """

    step: int
    mean: tuple[float, ...]
    square: tuple[float, ...]


@dataclass(frozen=True)
class LearnerState:
    """Everything that the iterations to come depend on, but for the weights and the data.

    Attributes:
        scales: of the learned blocks.
        moments: by kind of iteration; a kind that has not occurred is not there.
        history: the iterations so far.
        skipped: batches skipped so far; with the iterations, the position in the data.
        second_order: how second-order products are taken; `auto` while that is to be chosen.
        first_loss: loss of the first batch of all, at the initial weights; None if not finite.
        last_kind: of the last iteration, also if its batch was skipped.
    """

    scales: tuple[float, ...]
    moments: Mapping[IterationKind, Moments] = field(default_factory=dict)
    history: tuple[Iteration, ...] = ()
    skipped: int = 0
    second_order: SecondOrder = "auto"
    first_loss: float | None = None
    last_kind: IterationKind | None = None


class StateFile:
    """Keeps the latest state in one file, which rank 0 reads and writes for all processes.

    Args:
        path: the file.
        identity: what the run must have in common with one whose state it continues, beside the
            settings and the initial weights, which the learner adds: the data, for example.
        interval: iterations from one writing to the next.
        processes: those that go on together.
    """

    def __init__(
        self,
        path: Path,
        identity: str = "",
        interval: int = 10,
        processes: Processes | None = None,
    ) -> None:
        self.path = path
        self.interval = interval
        self._identity = identity
        self._processes = processes or OneProcess()

    def save(self, state: LearnerState, learner: str) -> None:
        """Write the file, whole or not at all.

        Args:
            learner: the learner's own part of the identity.

        Raises:
            GradInitError: the file cannot be written.
        """
        if self._processes.rank == 0:
            body = {"identity": self._whole(learner), "state": asdict(state)}
            document = {"format": FORMAT, "version": VERSION, "digest": _digest(body), **body}
            write_atomically(self.path, json.dumps(document, allow_nan=False) + "\n")

    def load(self, learner: str) -> LearnerState | None:
        """The state to go on from; None, with a warning, when the file is of no use.

        Args:
            learner: see `save`.
        """
        text = ""
        if self._processes.rank == 0:
            text = self._read(learner)
        text = self._processes.gather(text)[0]
        return _parse(json.loads(text)["state"]) if text else None

    def _whole(self, learner: str) -> str:
        return "|".join(part for part in (learner, self._identity) if part)

    def _read(self, learner: str) -> str:
        """The text of the file, or nothing when it is of no use."""
        try:
            text = self.path.read_text(encoding="utf-8")
            identity = _check(text)
        except FileNotFoundError:
            return ""
        except (OSError, ArithmeticError, KeyError, RecursionError, TypeError, ValueError) as error:
            logger.warning(
                "%s is damaged, so GradInit begins anew: %s: %s",
                self.path,
                type(error).__name__,
                error,
            )
            return ""
        if identity != self._whole(learner):
            logger.warning(
                "%s was left by another run, so GradInit begins anew: it has %s, this run %s",
                self.path,
                *_differences(identity, self._whole(learner)),
            )
            return ""
        return text


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()


def _check(text: str) -> str:
    """The identity in a state file; raises one of many errors when anything is wrong with it."""
    document = parse_json(text)
    version = require_type(document["version"], int)
    if document["format"] != FORMAT or version != VERSION:
        raise ValueError(f"it is not version {VERSION} of {FORMAT}")
    body = {"identity": document["identity"], "state": document["state"]}
    if document["digest"] != _digest(body):
        raise ValueError("its content does not match its digest")
    _parse(document["state"])
    return require_type(document["identity"], str)


def _differences(theirs: str, ours: str) -> tuple[str, str]:
    """The parts of two identities that differ."""
    parts = [identity.split("|") for identity in (theirs, ours)]
    return (
        ", ".join(_short(part) for part in parts[0] if part not in parts[1]) or "more than that",
        ", ".join(_short(part) for part in parts[1] if part not in parts[0]) or "less than that",
    )


def _short(part: str, limit: int = 1000) -> str:
    """As it can stand in a log, whoever wrote it."""
    printable = part if part.isprintable() else ascii(part)
    return printable if len(printable) <= limit else f"{printable[:limit]}..."


def _parse(row: Any) -> LearnerState:
    scales = _numbers(row["scales"])
    moments: dict[IterationKind, Moments] = {}
    for kind in KINDS:
        if kind in require_type(row["moments"], dict):
            entry = row["moments"][kind]
            mean, square = _numbers(entry["mean"]), _numbers(entry["square"])
            moments[kind] = Moments(require_type(entry["step"], int), mean, square)
    if row["second_order"] not in SECOND_ORDER_NAMES:
        raise ValueError(f"second_order is {abbreviate(row['second_order'])}")
    if any(len(scales) != len(m.mean) or len(scales) != len(m.square) for m in moments.values()):
        raise ValueError("its vectors are not of one length")
    history = tuple(parse_iteration(iteration) for iteration in require_type(row["history"], list))
    if [iteration.index for iteration in history] != list(range(1, len(history) + 1)):
        raise ValueError("its iterations are not in order")
    if any(
        not 0 <= m.step <= len(history) or min(m.square, default=0.0) < 0 for m in moments.values()
    ):
        raise ValueError("its moments are not those of its iterations")
    return LearnerState(
        scales=scales,
        moments=moments,
        history=history,
        skipped=require_type(row["skipped"], int),
        second_order=row["second_order"],
        last_kind=None if row["last_kind"] is None else parse_kind(row["last_kind"]),
        first_loss=None if row["first_loss"] is None else require_finite(row["first_loss"]),
    )


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(require_finite(value) for value in require_type(values, list))
