"""The loop of GradInit: draw batches, learn, keep the state, stop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count

from fairseq_gradinit.engine.batch_pairs import BatchPair
from fairseq_gradinit.engine.blocks import Block
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.determinism import seed_everything
from fairseq_gradinit.engine.gradients import Halve, LossFunction
from fairseq_gradinit.engine.history import Iteration
from fairseq_gradinit.engine.learner import Learned, ScaleLearner
from fairseq_gradinit.engine.processes import Processes
from fairseq_gradinit.engine.state import StateFile
from fairseq_gradinit.errors import GradInitError, GradInitStopped

logger = logging.getLogger(__name__)


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

    Call this inside `deterministic`. Random number generators are set to the seed of `config`
    before each pair is drawn.

    Args:
        pairs: at least `config.iterations` pairs of batches, the same ones in every process's
            life; each process gives its own share of them.
        processes: those that share each batch; each of them must call this function.
        halve: cuts a batch that does not fit in the memory of a GPU.
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
        learner.weights.restore()
        raise
    return learner.learned()


def _draw(pairs: Iterable[BatchPair], seed: int) -> Iterator[BatchPair]:
    iterator = iter(pairs)
    for number in count(seed):
        # So that an interrupted run can go on as if it had not been.
        seed_everything(number)
        pair = next(iterator, None)
        if pair is None:
            return
        yield pair


def _resume(
    learner: ScaleLearner, drawn: Iterator[BatchPair], file: StateFile
) -> Iterator[BatchPair]:
    """Load the state in `file`, if it is of any use; what is left of `drawn` for the learner."""
    state = file.load()
    if state is None:
        return drawn
    first = next(drawn)
    if not learner.fits(state, first):
        logger.warning(
            "learning the scales from scratch: %s is of a run with other data or another loss",
            file.path,
        )
        return chain([first], drawn)
    learner.load(state)
    done, asked = learner.outcomes.iterations_done, learner.config.iterations
    logger.info("going on after iteration %d of %d, from %s", done, asked, file.path)
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
    outcomes = learner.outcomes
    told = saved = len(outcomes.history)

    def save() -> None:
        nonlocal saved
        if state_file is not None and saved < outcomes.iterations_done:
            saved = outcomes.iterations_done
            state_file.save(learner.state())

    while True:
        if outcomes.iterations_done == learner.config.iterations:
            learner.flush()
        for iteration in outcomes.history[told:]:
            on_iteration(iteration)
        told = len(outcomes.history)
        if outcomes.stopped:
            save()
            raise GradInitStopped(f"GradInit stopped after iteration {told}")
        if told == learner.config.iterations:
            save()
            # A wish that came during the last iteration has not been asked for yet.
            if learner.agree_to_stop(stop()):
                raise GradInitStopped(f"GradInit stopped after iteration {told}, the last")
            return
        if state_file is not None and outcomes.iterations_done >= saved + state_file.interval:
            save()
        pair = next(drawn, None)
        if pair is None:
            raise GradInitError(
                f"the batches for GradInit ended after {outcomes.iterations_done} of "
                f"{learner.config.iterations} iterations"
            )
        learner.step(pair, stop())
