"""What a log of fairseq-train says: losses, times, and whether training diverged."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from statistics import median

# Of fairseq, when a gradient is not finite, and of GradInit, when too many losses are not. Where
# processes were started one by one, torch puts their rank before each line of a traceback.
DIVERGED = re.compile(
    r"^(?:\[rank\d+\]: )?(FloatingPointError.*)|(GradInit: .* more than may be skipped.*)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class TrainingLog:
    """What a log of fairseq-train says.

    Attributes:
        training, valid: pairs of update and base-2 loss; of training, means between lines.
        seconds: wall time of all processes that trained in turn, without what lies between them.
        seconds_per_update, tokens_per_second: medians over the lines; tokens of the target.
        diverged: the line that says that training did.
    """

    training: list[tuple[int, float]]
    valid: list[tuple[int, float]]
    seconds: float | None
    gradinit_seconds: float | None
    seconds_per_update: float | None
    tokens_per_second: float | None
    diverged: str | None

    @classmethod
    def read(cls, log_file: Path) -> TrainingLog:
        """The log in a file; what a resumed run says again replaces what it said before."""
        text = log_file.read_text(errors="replace")
        training: dict[int, dict[str, str]] = {}
        valid: dict[int, float] = {}
        for kind, row in re.findall(r"\| INFO \| (train_inner|valid) \| (\{.*\})", text):
            try:
                values = json.loads(row)
            except ValueError:
                continue  # A machine that went down, or a disk that was full, left half a line.
            if kind == "valid":
                valid[int(values["valid_num_updates"])] = float(values["valid_loss"])
            else:
                training[int(values["num_updates"])] = values
        taken = re.search(r"scales saved in .* \(([\d.]+) s in all\)", text)
        updates_per_second = _median(row.get("ups") for row in training.values())
        return cls(
            training=sorted((update, float(row["loss"])) for update, row in training.items()),
            valid=sorted(valid.items()),
            seconds=_wall_seconds(text),
            gradinit_seconds=float(taken[1]) if taken else None,
            seconds_per_update=1 / updates_per_second if updates_per_second else None,
            tokens_per_second=_median(row.get("wps") for row in training.values()),
            diverged=_divergence(text),
        )


def _wall_seconds(log: str) -> float | None:
    """fairseq's own count restarts in a process that resumes from a checkpoint."""
    lines = (
        r"^([-\d]{10} [:\d]{8}) \| INFO \| (?:train_inner|valid|fairseq_cli\.train) \| (\{'_name')?"
    )
    processes: list[list[datetime]] = []
    for time, settings in re.findall(lines, log, re.MULTILINE):
        if settings or not processes:
            processes.append([])
        processes[-1].append(datetime.fromisoformat(time))
    spans = [times[-1] - times[0] for times in processes]
    return sum(spans, timedelta()).total_seconds() if spans else None


def _divergence(log: str) -> str | None:
    for found in DIVERGED.finditer(log):
        reason = found[1] or found[2]
        if "inconsistent between workers" not in reason:
            return reason
        # fairseq says so of norms that are not finite too, which it prints between two rulers.
        table = log[found.end() :].split("-" * 80)[1:2]
        norms = re.findall(r"rank +\d+ = (\S+)", "".join(table))
        if not all(math.isfinite(float(norm)) for norm in norms):
            return f"FloatingPointError: gradient norms of the processes: {', '.join(norms)}"
    return None


def _median(values: Iterable[str | None]) -> float | None:
    found = [float(value) for value in values if value is not None]
    return median(found) if found else None
