"""GradInit's optimisation of the scales: plain PyTorch, any model, any loss.

Implements algorithm 1 of Zhu et al., "GradInit: Learning to Initialize Neural Networks for Stable
and Efficient Training" (NeurIPS 2021, arXiv:2102.08098):

    minimise over m   L(S~; theta_m - eta A[g_m])
    with              theta_m = {m_i W_i},  g_m = grad L(S; theta_m)
    subject to        ||g_m||_p <= gamma,  min_scale <= m_i <= max_scale

An iteration first takes the first-order gradient g_m. Only when its norm exceeds gamma does it pay
for a second-order product, to descend the norm; otherwise it takes the trial step, and descends
the loss after it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fairseq_gradinit.engine.blocks import Block, base_weights, fingerprint, set_weights
from fairseq_gradinit.engine.config import GradInitConfig, SecondOrder
from fairseq_gradinit.engine.determinism import seed_everything
from fairseq_gradinit.engine.gradients import Halve, LossFunction, LossGradients, MeanGradient
from fairseq_gradinit.engine.hessian import HessianProducts, agree
from fairseq_gradinit.engine.history import KINDS, Iteration, IterationKind
from fairseq_gradinit.engine.processes import OneProcess, Processes
from fairseq_gradinit.engine.state import LearnerState, Moments, StateFile
from fairseq_gradinit.engine.trial_step import first_step, global_norm, norm_direction
from fairseq_gradinit.errors import GradInitError, GradInitStopped

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchPair:
    """The data of one iteration: the batches S and S~, each as this process's micro-batches.

    S and S~ should share half of their examples: independent batches make the scales chase
    noise, identical ones overfit the step (section 3.3). A process may have no micro-batches.

    Attributes:
        first: S, whose gradient makes the trial step.
        second: S~, on which the loss after it is taken.
    """

    first: Sequence[Any]
    second: Sequence[Any]


@dataclass(frozen=True)
class ScaleGradient:
    """What one iteration descends.

    Attributes:
        kind: which function of the scales it is the derivative of: the gradient norm
            (`constraint`), or the loss after the trial step over eta (`objective`).
        by_scales: the derivative, shape (learned blocks,).
        loss, trial_loss, norm: see `Iteration`; trial_loss is a tensor of shape ().
    """

    kind: IterationKind
    by_scales: Tensor
    loss: float
    trial_loss: Tensor | None
    norm: float


@dataclass(frozen=True)
class Learned:
    """What a GradInit run came to.

    Attributes:
        scale_of: the scale of every block by name, of those that are not learned too.
        history: the record of the iterations.
        skipped: batches skipped because a loss or gradient was not finite.
        second_order: how second-order products were taken; `auto` when it never had to choose.
    """

    scale_of: dict[str, float]
    history: tuple[Iteration, ...]
    skipped: int
    second_order: SecondOrder


class ScaleLearner:
    """Learns one scale per learned block, one iteration at a time.

    The parameters hold m_i W_i between iterations. Their gradients are work space, and None
    between iterations.

    The host waits for the device once in each iteration, when it must know the norm of the
    gradient; everything else that an iteration comes to is read together with the next one's.

    Args:
        blocks: see `fairseq_gradinit.engine.blocks.collect_blocks`.
        loss: the training loss, with everything stochastic switched off (`deterministic`).
        config: the settings.
        processes: those that share each batch, every one of them with a learner of its own.
        halve: how to cut a batch that does not fit in the memory of a GPU.

    Attributes:
        scales: of the learned blocks, shape (learned blocks,), float64.
        history: the iterations whose outcome has been read.
        skipped: batches skipped so far because a loss or gradient was not finite.
        stopped: whether the processes have agreed to stop, see `step`.
        first_loss: loss of the first batch of all, at the initial weights; None if not finite.

    Raises:
        GradInitError: the processes hold different weights.
    """

    def __init__(
        self,
        blocks: list[Block],
        loss: LossFunction,
        config: GradInitConfig,
        processes: Processes | None = None,
        halve: Halve | None = None,
    ) -> None:
        self.blocks = blocks
        self.config = config
        self.history: list[Iteration] = []
        self.skipped = 0
        self.stopped = False
        self.first_loss: float | None = None
        self._processes = processes or OneProcess()
        self._parameters: list[Tensor] = [block.parameter for block in blocks]
        self._learned = [i for i, block in enumerate(blocks) if block.learned]
        self._fingerprint = fingerprint(blocks)
        self._base = base_weights(blocks)
        self.device = self._parameters[self._learned[0]].device
        self.scales = torch.ones(
            len(self._learned), dtype=torch.float64, device=self.device, requires_grad=True
        )
        learned = [blocks[i] for i in self._learned]
        self._lower = torch.tensor(
            [config.min_bias_scale if b.is_bias else config.min_scale for b in learned],
            dtype=torch.float64,
            device=self.device,
        )
        self._upper = torch.full_like(self._lower, config.max_scale)
        # One Adam for each kind of iteration: their gradients differ by orders of magnitude, and
        # shared moments would let one kind decide the step of the other.
        self._adam = {
            kind: torch.optim.Adam([self.scales], lr=config.lr, betas=config.betas, fused=True)
            for kind in KINDS
        }
        self._gradients = LossGradients(
            self._parameters, loss, config.precision, self._processes, halve
        )
        self._products = HessianProducts(
            self._parameters, self._gradients, self._processes, config.precision
        )
        self._second_order = config.second_order
        self._last_kind: IterationKind | None = None
        self._pending: _Pending | None = None
        sums = torch.stack([self._base[i].double().sum() for i in self._learned])
        outcome = self._compared(sums, stop=False).tolist()
        self._require_same("initial weights", outcome[0])
        set_weights(blocks, self._base, self.scales)

    @property
    def identity(self) -> str:
        """One line that tells whether another learner's state is of any use to this one."""
        return f"{self.config}|torch:{torch.__version__}|weights:{self._fingerprint}"

    @property
    def iterations_done(self) -> int:
        return len(self.history) + (self._pending is not None)

    @property
    def pairs_used(self) -> int:
        """Pairs of batches that the scales depend on: the position in the data."""
        return self.iterations_done + self.skipped

    def step(self, pair: BatchPair, stop: bool = False) -> None:
        """Do one iteration: descend `gradient(pair)` by Adam, keep the scales in their bounds.

        A pair whose loss or gradient is not finite is skipped and counted.

        Args:
            stop: this process wants all of them to stop after this iteration. Their next call
                sets `stopped` on each, and does nothing else.

        Raises:
            GradInitError: too many batches were skipped, or the processes differ.
        """
        found = self.gradient(pair)
        if found is None:
            return
        self._last_kind = found.kind
        trial_loss = found.trial_loss if found.trial_loss is not None else found.by_scales.sum()
        # Adam squares the gradient.
        usable = torch.isfinite(found.by_scales.square()).all() & torch.isfinite(trial_loss)
        adam = self._adam[found.kind]
        self.scales.grad = found.by_scales
        # The interface by which torch's GradScaler makes a fused optimizer leave out a step.
        vars(adam)["found_inf"] = (~usable).to(torch.float32)
        adam.step()
        self.scales.grad = None
        with torch.no_grad():
            self.scales.clamp_(self._lower, self._upper)
        set_weights(self.blocks, self._base, self.scales)
        scales = self.scales.detach()
        own = torch.stack([usable.double(), trial_loss.double(), *torch.aminmax(scales)])
        self._pending = _Pending(
            kind=found.kind,
            loss=found.loss,
            norm=found.norm,
            outcome=torch.cat([own, self._compared(scales, stop)]),
            has_trial=found.trial_loss is not None,
        )

    def gradient(self, pair: BatchPair) -> ScaleGradient | None:
        """The derivative to descend at the present scales; leaves the weights as they were.

        Returns:
            None when the loss or its gradient is not finite, or the learner has stopped.

        Raises:
            GradInitError: a batch counts nothing; see `step`.
        """
        first = self._gradients.of_mean(pair.first, keep_graph=self._expects_product())
        # Its sign and its norm are those of the sum, not sums of signs and norms.
        self._processes.sum_(first.by_parameter)
        norm = global_norm(first.by_parameter, self.config.norm_order)
        begins = self.pairs_used == 0
        loss, count, norm_value = self._read([first.loss, first.count, norm])
        if begins and math.isfinite(loss):
            self.first_loss = loss
        if self.stopped:
            return None
        if not count > 0.0:
            raise GradInitError(
                f"a batch of GradInit counts {count} items to average the loss over: "
                "the sample size that the criterion returns must be greater than 0"
            )
        for what, value in (("loss", loss), ("gradient norm", norm_value)):
            if not math.isfinite(value):
                self._skip(what, value)
                return None
        if norm_value > self.config.gamma:
            by_scales = self._constraint(pair.first, first, norm)
            return ScaleGradient("constraint", by_scales, loss, None, norm_value)
        first.graph.clear()
        by_scales, trial_loss = self._objective(pair.second, first)
        return ScaleGradient("objective", by_scales, loss, trial_loss, norm_value)

    def agree_to_stop(self, stop: bool) -> bool:
        """Whether a process wants all of them to stop; all must ask."""
        wish = torch.full((1,), float(stop), dtype=torch.float64, device=self.device)
        self._processes.max_(wish)
        return bool(wish.item())

    def flush(self) -> None:
        """Read what the last iteration came to, if that has not been read yet.

        Raises:
            GradInitError: see `step`.
        """
        self._read([])

    def state(self) -> LearnerState:
        """What another learner needs to go on from here, after `load`."""
        self.flush()
        moments: dict[IterationKind, Moments] = {}
        for kind, adam in self._adam.items():
            if kept := adam.state[self.scales]:
                mean, square = kept["exp_avg"].tolist(), kept["exp_avg_sq"].tolist()
                moments[kind] = Moments(int(kept["step"]), tuple(mean), tuple(square))
        return LearnerState(
            scales=tuple(self.scales.tolist()),
            moments=moments,
            history=tuple(self.history),
            skipped=self.skipped,
            second_order=self._second_order,
            first_loss=self.first_loss,
            last_kind=self._last_kind,
        )

    def fits(self, state: LearnerState, pair: BatchPair) -> bool:
        """Whether this learner can have been in the `state`, the first batch's loss included.

        A state that it cannot come to, though the identity is right, was made by hand. Of what the
        identity does not tell, what changes the loss by more than 0.1 % shows here too: other
        data under the same indices, or another model of the same weights. To be asked before the
        first iteration.
        """
        if not self._can_reach(state):
            return False
        loss = float(self._gradients.of_mean(pair.first).loss)
        if state.first_loss is None:
            return not math.isfinite(loss)
        # Kernels of GPUs do not add in the same order every time.
        return math.isclose(loss, state.first_loss, rel_tol=1e-3)

    def _can_reach(self, state: LearnerState) -> bool:
        bounds = zip(state.scales, self._lower.tolist(), self._upper.tolist(), strict=False)
        return (
            len(state.scales) == len(self._learned)
            and all(low <= scale <= high for scale, low, high in bounds)
            and len(state.history) <= self.config.iterations
            and 0 <= state.skipped <= self.config.max_skipped
            and (self._second_order == "auto" or self._second_order == state.second_order)
        )

    def load(self, state: LearnerState) -> None:
        """Go on from the `state` of a learner with the same `identity`."""

        def vector(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=self.device)

        with torch.no_grad():
            self.scales.copy_(vector(state.scales))
        for kind, kept in state.moments.items():
            self._adam[kind].state[self.scales] = {
                "step": torch.tensor(float(kept.step), device=self.device),
                "exp_avg": vector(kept.mean),
                "exp_avg_sq": vector(kept.square),
            }
        self.history = list(state.history)
        self.skipped = state.skipped
        self.first_loss = state.first_loss
        self._last_kind = state.last_kind
        if self.config.second_order == "auto":
            self._second_order = state.second_order
        self._pending = None
        set_weights(self.blocks, self._base, self.scales)

    def restore(self) -> None:
        """Put the initial weights W_i back into the model."""
        for parameter in self._parameters:
            parameter.grad = None
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._base)

    def learned(self) -> Learned:
        """What has been learned so far."""
        self.flush()
        scales = iter(self.scales.tolist())
        return Learned(
            scale_of={b.name: next(scales) if b.learned else b.fixed_scale for b in self.blocks},
            history=tuple(self.history),
            skipped=self.skipped,
            second_order=self._second_order,
        )

    def _expects_product(self) -> bool:
        """Whether an exact product at S is likely to follow: kinds of iterations come in runs.

        Never in the first iteration, where the product is held against an ordinary gradient.
        """
        return self._second_order == "exact" and self._last_kind == "constraint"

    def _objective(self, batches: Sequence[Any], first: MeanGradient) -> tuple[Tensor, Tensor]:
        """d L(S~; theta_m - eta A[g_m]) / dm_i over eta, and L(S~) there; A[g_m] is a constant."""
        with torch.no_grad():
            step = first_step(first.by_parameter, self.config)
            torch._foreach_add_(self._parameters, step, alpha=-self.config.eta)
        # They are as large as the model.
        first.by_parameter.clear()
        del step
        second = self._gradients.of_mean(batches)
        by_scales = self._dot_base(second.by_parameter)
        set_weights(self.blocks, self._base, self.scales)
        return by_scales / self.config.eta, second.loss

    def _constraint(self, batches: Sequence[Any], first: MeanGradient, norm: Tensor) -> Tensor:
        """d||g||_p / dm_i = <H v, W_i>, with v the derivative of the norm by g."""
        vector = norm_direction(first.by_parameter, norm, self.config.norm_order)
        if self._second_order == "auto":
            dots = self._difference_dots(batches, first, [v.clone() for v in vector])
            longer = self._difference_dots(batches, first, [v.clone() for v in vector], 2.0)
            self._second_order = "finite-difference" if agree(dots, longer) else "exact"
            if self._second_order == "finite-difference":
                return dots
        elif self._second_order == "finite-difference":
            return self._difference_dots(batches, first, vector)
        first.by_parameter.clear()
        return self._dot_base(self._products.exact(batches, first, vector))

    def _difference_dots(
        self,
        batches: Sequence[Any],
        first: MeanGradient,
        vector: list[Tensor],
        lengthening: float = 1.0,
    ) -> Tensor:
        dots = self._dot_base(self._products.by_difference(batches, first, vector, lengthening))
        set_weights(self.blocks, self._base, self.scales)
        return dots

    def _dot_base(self, tensors: list[Tensor]) -> Tensor:
        """<t_i, W_i> of every learned block, t_i being the sum over processes; shape (learned,)."""
        dots = torch.stack(
            [torch.dot(tensors[i].flatten(), self._base[i].flatten()) for i in self._learned]
        ).double()
        self._processes.sum_([dots])
        return dots

    def _compared(self, values: Tensor, stop: bool) -> Tensor:
        """What the processes have to tell each other after an iteration.

        Args:
            values: shape (learned,).

        Returns:
            Shape (2,): the first index where the processes have different values, or -1; and
            whether one of them wants to stop.
        """
        extremes = torch.cat([values, -values, torch.full_like(values[:1], float(stop))])
        self._processes.max_(extremes)
        n = len(values)
        # NaN is equal to nothing, itself included.
        differ = ~(extremes[:n] == -extremes[n : 2 * n])
        index = torch.where(differ.any(), differ.to(torch.uint8).argmax(), -1)
        return torch.stack([index.double(), extremes[-1]])

    def _require_same(self, what: str, index: float) -> None:
        if index >= 0:
            raise GradInitError(
                f"the processes have different {what}, first for "
                f"{self.blocks[self._learned[int(index)]].name}: start all of them with the same "
                "command and seed"
            )

    def _read(self, values: Sequence[Tensor]) -> list[float]:
        """`values` on the host, together with what the last iteration came to."""
        pending, self._pending = self._pending, None
        tensors = [value.double().reshape(1) for value in values]
        if pending is not None:
            tensors.insert(0, pending.outcome)
        floats: list[float] = torch.cat(tensors).tolist() if tensors else []
        if pending is None:
            return floats
        self._settle(pending, floats[: len(pending.outcome)])
        return floats[len(pending.outcome) :]

    def _settle(self, pending: _Pending, outcome: Sequence[float]) -> None:
        """Record an iteration, or count it as skipped."""
        usable, trial_loss, low, high, differ, stop = outcome
        self._require_same("scales", differ)
        self.stopped = bool(stop)
        if not usable:
            what = "gradient of the scales" if math.isfinite(trial_loss) else "trial loss"
            self._skip(what, math.nan if math.isfinite(trial_loss) else trial_loss)
            return
        self.history.append(
            Iteration(
                index=len(self.history) + 1,
                kind=pending.kind,
                loss=pending.loss,
                trial_loss=trial_loss if pending.has_trial else None,
                grad_norm=pending.norm,
                min_scale=low,
                max_scale=high,
            )
        )

    def _skip(self, what: str, value: float) -> None:
        """Count a batch that gave no usable gradient.

        Raises:
            GradInitError: there were too many.
        """
        self.skipped += 1
        iteration = len(self.history) + 1
        logger.warning(
            "GradInit iteration %d: the %s is %s, so the batch is skipped (%d of at most %d)",
            iteration,
            what,
            value,
            self.skipped,
            self.config.max_skipped,
        )
        if self.skipped <= self.config.max_skipped:
            return
        advice = "lower eta, the learning rate of the scales, or max-scale"
        scales = self.scales.tolist()
        largest = max(range(len(scales)), key=scales.__getitem__)
        if scales[largest] > 1.0:
            name = self.blocks[self._learned[largest]].name
            advice = f"the scale of {name} grew most, to {scales[largest]:.3g}: {advice}"
        elif not self.history and what != "trial loss":
            advice = (
                "not one batch could be used: check that the model has a finite loss at its own "
                "initialisation, and the data"
            )
        raise GradInitError(
            f"the {what} is {value} in GradInit iteration {iteration}, and {self.skipped} batches "
            f"are more than may be skipped; {advice}"
        )


@dataclass(frozen=True)
class _Pending:
    """An iteration that is done, but whose outcome is still on the device.

    Attributes:
        outcome: usable, trial loss, smallest and largest scale, and `_compared`; shape (6,).
    """

    kind: IterationKind
    loss: float
    norm: float
    outcome: Tensor
    has_trial: bool


def learn_scales(
    blocks: list[Block],
    loss: LossFunction,
    pairs: Iterable[BatchPair],
    config: GradInitConfig,
    *,
    on_iteration: Callable[[Iteration], None] = lambda iteration: None,
    processes: Processes | None = None,
    halve: Halve | None = None,
    state_file: StateFile | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Learned:
    """Learn the scales and leave the model with its weights scaled.

    Call this inside `deterministic`.

    Random number generators are set to the seed of `config` before each pair is drawn.

    Args:
        blocks: the parameter tensors, from `collect_blocks`.
        loss: the training loss of a batch as (sum, count).
        pairs: at least `config.iterations` pairs of batches, the same ones in every process's
            life; each process gives its own share of them.
        config: the settings.
        on_iteration: called with each iteration's record, in order.
        processes: those that share each batch; each of them must call this function.
        halve: cuts a batch that does not fit in the memory of a GPU, see `Halve`.
        state_file: where to go on from, and to keep the state; None keeps none.
        stop: asked before each iteration whether to stop after it, and once after the last.

    Raises:
        GradInitError: too many losses or gradients are not finite, `pairs` ended early, or a file
            or another process fails. The model then has its initial weights again.
        GradInitStopped: `stop` said so, in one process or another. The state is saved.
    """
    learner = ScaleLearner(blocks, loss, config, processes, halve)
    try:
        drawn = _draw(pairs, config.seed)
        if state_file is not None:
            drawn = _resume(learner, drawn, state_file)
        _iterate(learner, drawn, on_iteration, state_file, stop)
    except BaseException:
        learner.restore()
        raise
    return learner.learned()


def _draw(pairs: Iterable[BatchPair], seed: int) -> Iterator[BatchPair]:
    iterator = iter(pairs)
    index = 0
    while True:
        seed_everything(seed + index)
        try:
            pair = next(iterator)
        except StopIteration:
            return
        yield pair
        index += 1


def _resume(
    learner: ScaleLearner, drawn: Iterator[BatchPair], file: StateFile
) -> Iterator[BatchPair]:
    """Load the state in `file`, if it is of any use; what is left of `drawn` for the learner."""
    state = file.load(learner.identity)
    first = None if state is None else next(drawn, None)
    if state is None or first is None:
        return drawn
    if not learner.fits(state, first):
        logger.warning(
            "%s was left by a run with other data or another loss, so GradInit begins anew",
            file.path,
        )
        return chain([first], drawn)
    learner.load(state)
    logger.info(
        "going on after iteration %d of %d, from %s",
        learner.iterations_done,
        learner.config.iterations,
        file.path,
    )
    # Drawn even if nothing is left to learn: the source's own account of the data must be whole.
    for _ in range(learner.pairs_used - 1):
        next(drawn, None)
    return drawn


def _iterate(
    learner: ScaleLearner,
    drawn: Iterator[BatchPair],
    on_iteration: Callable[[Iteration], None],
    state_file: StateFile | None,
    stop: Callable[[], bool],
) -> None:
    told = saved = len(learner.history)

    def save() -> None:
        nonlocal saved
        if state_file is not None and saved < learner.iterations_done:
            saved = learner.iterations_done
            state_file.save(learner.state(), learner.identity)

    while True:
        if learner.iterations_done == learner.config.iterations:
            learner.flush()
        for iteration in learner.history[told:]:
            on_iteration(iteration)
        told = len(learner.history)
        if learner.stopped:
            save()
            raise GradInitStopped(f"GradInit stopped after iteration {told}")
        if told == learner.config.iterations:
            save()
            # A wish that came during the last iteration has not been asked for yet.
            if learner.agree_to_stop(stop()):
                raise GradInitStopped(f"GradInit stopped after iteration {told}, the last")
            return
        if state_file is not None and learner.iterations_done >= saved + state_file.interval:
            save()
        pair = next(drawn, None)
        if pair is None:
            raise GradInitError(
                f"the batches for GradInit ended after {learner.iterations_done} of "
                f"{learner.config.iterations} iterations"
            )
        learner.step(pair, stop())
