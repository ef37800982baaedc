"""What one GradInit run is asked to do: the engine's whole configuration, free of fairseq."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fairseq_gradinit.errors import GradInitError

TargetName = Literal["adam", "sgd", "sgd-normalized"]
NormGains = Literal["fixed", "learned"]
SecondOrder = Literal["auto", "exact", "finite-difference"]
Precision = Literal["fp32", "bf16"]

TARGET_NAMES: tuple[TargetName, ...] = get_args(TargetName)
SECOND_ORDER_NAMES: tuple[SecondOrder, ...] = get_args(SecondOrder)
PRECISION_NAMES: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class GradInitConfig:
    """Settings of the optimisation of the scales (Zhu et al. 2021, section 3 and algorithm 1).

    Attributes:
        eta: length of the trial step, in units of the training learning rate.
        target: optimizer whose first step the scales are learned for. `adam` steps along sign(g)
            and bounds the l1 norm of the gradient, `sgd` steps along g and bounds the l2 norm,
            `sgd-normalized` steps along g / ||g||_2. The direction counts as constant in the
            derivative: exact for sign(g), and the paper's choice for SGD.
        clip_norm: bound on the l2 norm of the gradient that `sgd` steps along; `math.inf` for none.
        gamma: bound on the gradient norm; `math.inf` switches the constraint off.
        lr: learning rate of Adam on the scales (tau in the paper), in units of a scale.
        norm_gains: whether the gains of normalisation layers get a learned scale or keep 1.
        second_order: Hessian-vector products: `exact` by double backward, `finite-difference` from
            two gradients, `auto` by differences if those of two lengths agree, and exactly if not.
        precision: `bf16` evaluates the loss under autocast to bfloat16; weights, gradients and
            scales keep their own precision.
        max_skipped: batches that may be skipped because their loss or gradient is not finite.
        seed: of the random numbers that pairs of batches are drawn with.

    Raises:
        GradInitError: on construction, when a value is outside its range.
    """

    eta: float
    target: TargetName = "adam"
    clip_norm: float = math.inf
    gamma: float = math.inf
    iterations: int = 60
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.98)
    min_scale: float = 0.2
    min_bias_scale: float = 0.2
    max_scale: float = 5.0
    norm_gains: NormGains = "fixed"
    second_order: SecondOrder = "auto"
    precision: Precision = "fp32"
    max_skipped: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("optimizer for GradInit", self.target, TARGET_NAMES),
            ("norm-gains", self.norm_gains, get_args(NormGains)),
            ("second-order", self.second_order, SECOND_ORDER_NAMES),
            ("precision", self.precision, PRECISION_NAMES),
        ):
            if value not in choices:
                raise GradInitError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        positive = "a number greater than 0"
        finite = "a finite number of at least 1, so that the scales can start at 1"
        for name, fits, wanted in (
            ("iterations", self.iterations >= 1, "at least 1"),
            ("max-skipped", self.max_skipped >= 0, "at least 0"),
            ("eta", 0.0 < self.eta < math.inf, positive),
            ("lr", 0.0 < self.lr < math.inf, positive),
            ("gamma", self.gamma > 0.0, f"{positive}, or inf to switch the norm constraint off"),
            ("clip-norm", self.clip_norm > 0.0, f"{positive}, or inf for no clipping"),
            ("betas", all(0.0 <= beta < 1.0 for beta in self.betas), "two numbers in [0, 1)"),
            ("max-scale", 1.0 <= self.max_scale < math.inf, finite),
        ):
            if not fits:
                raise GradInitError(
                    f"{name} must be {wanted}, not {getattr(self, name.replace('-', '_'))}"
                )
        for name, low in (("min", self.min_scale), ("min-bias", self.min_bias_scale)):
            if not 0.0 <= low <= 1.0:
                raise GradInitError(
                    f"{name}-scale must lie in [0, 1], so that the scales can start at 1, not {low}"
                )

    @property
    def norm_order(self) -> int:
        """Order p of the gradient norm: 1 for Adam, 2 for SGD (section 3.2)."""
        return 1 if self.target == "adam" else 2

    @property
    def clips(self) -> bool:
        return self.target == "sgd" and math.isfinite(self.clip_norm)

    @property
    def constrained(self) -> bool:
        return math.isfinite(self.gamma)
