"""What one GradInit run is asked to do.

These dataclasses are the engine's whole configuration. They know nothing of fairseq; `options.py`
builds them from fairseq's command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fairseq_gradinit.errors import GradInitError

TargetName = Literal["adam", "sgd", "sgd-normalized"]
NormGains = Literal["fixed", "learned"]

TARGET_NAMES: tuple[TargetName, ...] = ("adam", "sgd", "sgd-normalized")


@dataclass(frozen=True)
class GradInitConfig:
    """Settings of the optimisation of the scales (Zhu et al. 2021, section 3 and algorithm 1).

    Attributes:
        eta: length of the trial step, in units of the training learning rate.
        target: optimizer whose first step the scales are learned for. `adam` steps along sign(g)
            and bounds the l1 norm of the gradient, `sgd` steps along g and bounds the l2 norm,
            `sgd-normalized` steps along g / ||g||_2.
        gamma: bound on the gradient norm; `math.inf` switches the constraint off.
        iterations: number of scale updates.
        lr: learning rate of Adam on the scales (tau in the paper), in units of a scale.
        betas: decay rates of Adam on the scales.
        min_scale: lower bound of a scale.
        min_bias_scale: lower bound of a bias tensor's scale.
        max_scale: upper bound of a scale.
        norm_gains: whether the gains of normalisation layers get a learned scale or keep 1.

    Raises:
        GradInitError: on construction, when a value is outside its range.
    """

    eta: float
    target: TargetName = "adam"
    gamma: float = math.inf
    iterations: int = 120
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.98)
    min_scale: float = 0.2
    min_bias_scale: float = 0.2
    max_scale: float = 5.0
    norm_gains: NormGains = "fixed"

    def __post_init__(self) -> None:
        if self.target not in TARGET_NAMES:
            raise GradInitError(
                f"unknown optimizer {self.target!r} for GradInit: choose one of "
                f"{', '.join(TARGET_NAMES)}"
            )
        if self.norm_gains not in ("fixed", "learned"):
            raise GradInitError(f"norm gains must be fixed or learned, not {self.norm_gains!r}")
        if self.iterations < 1:
            raise GradInitError(f"iterations must be at least 1, not {self.iterations}")
        _require_positive("eta", self.eta)
        _require_positive("lr", self.lr)
        _require_positive("gamma", self.gamma, infinite=True)
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise GradInitError(f"betas must be two numbers in [0, 1), not {self.betas}")
        for name in ("min_scale", "min_bias_scale"):
            low = getattr(self, name)
            if not 0.0 <= low <= 1.0:
                raise GradInitError(
                    f"{name.replace('_', '-')} must lie in [0, 1], so that the scales can start "
                    f"at 1, not {low}"
                )
        if not 1.0 <= self.max_scale < math.inf:
            raise GradInitError(
                f"max-scale must be a finite number of at least 1, so that the scales can start "
                f"at 1, not {self.max_scale}"
            )

    @property
    def norm_order(self) -> int:
        """Order p of the gradient norm: 1 for Adam, 2 for SGD (section 3.2)."""
        return 1 if self.target == "adam" else 2

    @property
    def constrained(self) -> bool:
        return math.isfinite(self.gamma)


def _require_positive(name: str, value: float, infinite: bool = False) -> None:
    if not value > 0.0 or (math.isinf(value) and not infinite):
        hint = ", or inf to switch the norm constraint off" if infinite else ""
        raise GradInitError(f"{name} must be a number greater than 0{hint}, not {value}")
