"""Whether training will hold, judged by its first updates.

Where training without warmup fails, the outputs of the layers stop depending on the token within a
few updates, and stay so (docs/experiments.md, "Why high rates fail"). The bounds below are those
that told the runs apart whose outcome is known; docs/check.md has what they predicted, and what
happened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fairseq_gradinit.check.records import Probe

Outcome = Literal["holds", "fails", "cannot tell"]

EXIT_STATUS: dict[Outcome, int] = {"holds": 0, "fails": 1, "cannot tell": 3}

ALIVE = 0.01
"""Token-dependent share of a side's last layer from which on it is not in danger."""

COLLAPSED = 1e-6
"""And the one below which it did not come back, unless it was growing."""

RECOVERING = 10.0
"""How often the lowest share of the probe a growing one is."""

SOURCE_BITS = 0.05
"""What trading sources must cost at least where the source is used."""


@dataclass(frozen=True)
class Verdict:
    """What a probe says about the training that it is the beginning of, and why."""

    outcome: Outcome
    reason: str


def judge(probe: Probe) -> Verdict:
    """Say whether training continues from where the probe ended."""
    if probe.diverged is not None:
        return Verdict("fails", f"{probe.diverged} after {len(probe.updates)} updates")
    first, last = probe.looks[0], probe.looks[-1]
    if last.loss > first.loss:
        return Verdict("fails", f"the loss rose from {first.loss:.2f} to {last.loss:.2f}")
    shares = probe.last_layer_shares()
    if not shares:
        return Verdict("cannot tell", "the model has no `layers` whose outputs could be looked at")
    for side, curve in shares.items():
        if curve[-1] < COLLAPSED and curve[-1] < RECOVERING * min(curve):
            return Verdict(
                "fails",
                f"the {side}'s output is the same for all tokens (token share {curve[-1]:.0e})",
            )
    for side, curve in shares.items():
        if curve[-1] < ALIVE:
            return Verdict(
                "cannot tell",
                f"little of the {side}'s output depends on the token (share {curve[-1]:.1e})",
            )
    bits = last.source_bits
    if bits is not None and bits < SOURCE_BITS:
        return Verdict("cannot tell", f"the source is hardly used yet ({bits:.3f} bits)")
    alive = " and ".join(f"{curve[-1]:.0%} of the {side}'s" for side, curve in shares.items())
    used = "" if bits is None else f", the source is worth {bits:.2f} bits"
    return Verdict("holds", f"{alive} output depends on the token{used}")


def sentence(probe: Probe) -> str:
    """The result of the check, for a user who asked about this probe."""
    verdict = judge(probe)
    start = "GradInit" if probe.arm.start == "gradinit" else "the default initialisation"
    says = {"holds": "will hold", "fails": "will not hold", "cannot tell": "may or may not hold"}
    return (
        f"Training from {start} without warmup at lr {probe.lr:g} {says[verdict.outcome]}: "
        f"{verdict.reason}."
    )
