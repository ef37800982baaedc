"""The runs that a report shows: what they saved, read back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.scales import EFFECT_FILE, Change, Effect, Scales, scales_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        label: what tells it from the others.
        effect: None if there is no record of it.
    """

    label: str
    scales: Scales
    effect: Effect | None

    @property
    def shares(self) -> Sequence[Change]:
        return self.effect.shares if self.effect else ()

    @property
    def gamma(self) -> float | None:
        """The bound on the gradient norm; None if there was none, or it is unknown."""
        try:
            return float(self.scales.settings["gamma"])
        except (KeyError, ValueError):
            return None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of these files or folders.

    Args:
        paths: scales files, the --save-dir of runs, or folders in which it is called checkpoints.

    Raises:
        GradInitError: a file cannot be read, or is given twice.
    """
    files = [scales_file(path) for path in paths]
    if len({file.resolve() for file in files}) < len(files):
        raise GradInitError("the same run is given twice: leave one out")
    return [_read(path, file) for path, file in zip(paths, files, strict=True)]


def _read(path: Path, file: Path) -> Run:
    scales = Scales.load(file)
    beside = file.with_name(EFFECT_FILE)
    effect = Effect.load(beside) if beside.exists() else None
    if effect is not None and effect.signature != scales.signature:
        logger.warning("%s is of other scales than %s: left out", beside, file)
        effect = None
    return Run(str(path), scales, effect)
