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

from fairseq_gradinit.engine.config import SecondOrder
from fairseq_gradinit.engine.history import Iteration, IterationKind
from fairseq_gradinit.engine.processes import OneProcess, Processes
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.storage import Format, abbreviate, load_document, parse, save_document

logger = logging.getLogger(__name__)

FORMAT = Format("fairseq-gradinit-state", 2, "the state of a learning of scales")


@dataclass(frozen=True)
class Moments:
    """What Adam remembers of one kind of iteration: running averages for each learned block."""

    step: int
    mean: tuple[float, ...]
    square: tuple[float, ...]


@dataclass(frozen=True)
class LearnerState:
    """Everything that the iterations to come depend on, but for the weights and the data.

    Attributes:
        moments: of the kinds of iterations that have occurred.
        skipped: batches skipped so far; with the iterations, the position in the data.
        second_order: `auto` while the way is to be chosen.
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


@dataclass(frozen=True)
class Saved:
    """What is in a state file; the digest is of the two others."""

    identity: Mapping[str, str]
    state: LearnerState
    digest: str


class StateFile:
    """Keeps the latest state in one file, which rank 0 reads and writes for all processes.

    The `identity` is what a run must have in common with one whose state it continues, by name.
    The `interval` counts iterations from one writing to the next.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, str] | None = None,
        interval: int = 10,
        processes: Processes | None = None,
    ) -> None:
        self.path = path
        self.interval = interval
        self._identity = dict(identity or {})
        self._processes = processes or OneProcess()

    def save(self, state: LearnerState) -> None:
        """Write the file, whole or not at all; GradInitError if it cannot be written."""
        if self._processes.rank == 0:
            digest = _digest_of(self._identity, state)
            save_document(self.path, FORMAT, Saved(self._identity, state, digest))

    def load(self) -> LearnerState | None:
        """The state to go on from; None, with a warning, when the file is of no use."""
        state = None
        if self._processes.rank == 0 and self.path.exists():
            try:
                state = self._read()
            except GradInitError as error:
                logger.warning("learning the scales from scratch: %s", error)
        text = self._processes.gather(json.dumps(state and asdict(state)))[0]
        return parse(LearnerState, json.loads(text)) if text != "null" else None

    def _read(self) -> LearnerState:
        saved = load_document(self.path, FORMAT, Saved)
        if saved.digest != _digest_of(saved.identity, saved.state):
            raise GradInitError(f"{self.path} is damaged: wrong digest")
        theirs, ours = saved.identity, self._identity
        names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
        if names:
            differences = (
                f"{abbreviate(name)[1:-1]} {abbreviate(theirs.get(name))}, not {ours.get(name)}"
                for name in names[:5]
            )
            raise GradInitError(f"{self.path} is of another run: it has {'; '.join(differences)}")
        return saved.state


def _digest_of(identity: Mapping[str, str], state: LearnerState) -> str:
    """32 hexadecimal digits that change with anything in either."""
    text = json.dumps([identity, asdict(state)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
