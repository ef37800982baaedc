"""The GradInit phase of a fairseq run: between building the model and its first update."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from fairseq_gradinit.engine import (
    Block,
    Processes,
    StateFile,
    at_fixed_scales,
    center_layer_norms,
    collect_blocks,
    deterministic,
    fingerprint,
    frozen_names,
    layer_norm_biases,
    learn_scales,
    require_same_setup,
)
from fairseq_gradinit.errors import GradInitError, GradInitStopped
from fairseq_gradinit.plugin.batches import MicroBatch, PairedBatches
from fairseq_gradinit.plugin.branches import take_snapshot
from fairseq_gradinit.plugin.fixed_scales import fixed_scales
from fairseq_gradinit.plugin.loaded_weights import loaded_names
from fairseq_gradinit.plugin.log import IterationLog, scale_table
from fairseq_gradinit.plugin.loss import TaskLoss, forward_autocast
from fairseq_gradinit.plugin.options import CENTERING_SENTENCES
from fairseq_gradinit.plugin.plan import Plan
from fairseq_gradinit.plugin.rate_advice import ask_scheduler, rate_warning
from fairseq_gradinit.plugin.signals import StopSignals
from fairseq_gradinit.plugin.trainer import (
    clear_unset_biases,
    data_parallel_processes,
    drop_copies,
    full_precision,
    settings_digest,
    trained_modules,
    weights_come_from_checkpoint,
)
from fairseq_gradinit.scales import (
    EFFECT_FILE,
    SCALES_FILE,
    Description,
    Scales,
    Snapshot,
    effect_between,
    size_changes,
    some,
)
from fairseq_gradinit.versions import fairseq_version

logger = logging.getLogger("fairseq_gradinit")

STATE_FILE_NAME = "gradinit_state.json"


def run_phase(trainer: Any, plan: Plan) -> None:
    """Initialise the model of `trainer` as `plan` says, unless the run resumes from a checkpoint.

    Args:
        trainer: fairseq's trainer; its training data are loaded, no update is done.

    Raises:
        GradInitError: see `learn_scales`, `Scales.load` and `Scales.apply`.
    """
    if weights_come_from_checkpoint(trainer):
        logger.info(
            "skipping GradInit: the weights come from a checkpoint, which a new scale would spoil"
        )
        return
    path = Path(trainer.cfg.checkpoint.save_dir) / SCALES_FILE
    start = time.monotonic()
    beginning = ask_scheduler(trainer)
    drop_copies(trainer)
    modules = trained_modules(trainer)
    clear_unset_biases(trainer.get_model())
    frozen = frozen_names(modules)
    if frozen:
        logger.info("frozen, so kept at scale 1: %s", ", ".join(frozen))
    with full_precision(trainer):
        prepared = require_same_setup(
            data_parallel_processes(trainer),
            lambda: _prepare(trainer, plan),
            lambda found: _agreement(plan, found),
        )
        eta = plan.config.eta if prepared.file is None else prepared.file.eta
        if warning := rate_warning(trainer.cfg, prepared.blocks, eta, beginning):
            logger.warning(warning)
        before = _snapshot(trainer, prepared)
        initialise = _learn if prepared.file is None else _apply
        scales = initialise(trainer, plan, prepared)
        effect = effect_between(before, _snapshot(trainer, prepared), scales.signature)
    if unknown := [share.name for share in effect.shares if share.after is None]:
        logger.info(
            "not in the report, since their layers do not add up as fairseq's do: %s",
            ", ".join(unknown),
        )
    if trainer.is_data_parallel_master:
        scales.save(path)
        effect.save(path.with_name(EFFECT_FILE))
    for line in scale_table(scales):
        logger.info(line)
    logger.info("signature: %s", scales.signature)
    logger.info("scales saved in %s (%.1f s in all)", path, time.monotonic() - start)


def _blocks(trainer: Any, plan: Plan, centering: bool, loaded: Sequence[str]) -> list[Block]:
    modules = trained_modules(trainer)
    if plan.scales_file is None:
        fixed = fixed_scales(modules, plan.encoder_branches, plan.require_encoder, loaded)
        blocks = collect_blocks(modules, plan.config.norm_gains, fixed)
    else:
        blocks = collect_blocks(modules, plan.config.norm_gains)
    if not centering:
        return blocks
    centered = {id(bias) for bias in layer_norm_biases(list(modules.values()))}
    return [
        replace(b, state="centered") if id(b.parameter) in centered and b.name not in loaded else b
        for b in blocks
    ]


@dataclass(frozen=True)
class _Prepared:
    """What a process gets ready by itself.

    Attributes:
        blocks: the parameter tensors.
        batches: where batches are drawn from; None if the data do not allow that, and none are
            needed.
        file: the scales to apply; None if they are to be learned.
        centering: whether LayerNorms are to be centered.
        description: what determines the scales.
    """

    blocks: list[Block]
    batches: PairedBatches | None
    file: Scales | None
    centering: bool
    description: Description

    @property
    def pairs(self) -> PairedBatches:
        assert self.batches is not None
        return self.batches

    @cached_property
    def sentences(self) -> list[MicroBatch]:
        """What LayerNorms are centered on and branches measured with; none without batches."""
        return self.batches.sentences(CENTERING_SENTENCES) if self.batches else []


def _prepare(trainer: Any, plan: Plan) -> _Prepared:
    file = None if plan.scales_file is None else Scales.load(Path(plan.scales_file))
    centering = plan.centering
    if centering is None:
        centering = file is not None and file.centered
    loaded = [] if plan.scale_loaded else loaded_names(trained_modules(trainer))
    if loaded:
        logger.info(
            "loaded from files, so kept as they are (--gradinit-scale-loaded scales them): %s",
            some(loaded),
        )
        file = file and file.keeping(loaded)
    blocks = _blocks(trainer, plan, centering, loaded)
    try:
        batches = PairedBatches(trainer, plan.max_tokens, plan.max_sentences, plan.micro_batches)
    except GradInitError:
        # A file of scales can be applied where sentences cannot be drawn by index.
        if file is None or centering:
            raise
        batches = None
    description = describe(trainer, plan, blocks, centering, batches)
    return _Prepared(blocks, batches, file, centering, description)


def _agreement(plan: Plan, prepared: _Prepared) -> dict[str, object]:
    """What must be the same in all processes."""
    return {
        **prepared.description.identity(),
        # All read a state, or none.
        "save-interval": plan.save_interval,
        "scales": prepared.file and prepared.file.digest(),
    }


def describe(
    trainer: Any, plan: Plan, blocks: list[Block], centering: bool, batches: PairedBatches | None
) -> Description:
    """What determines the scales of this run."""
    cfg = trainer.cfg
    return Description(
        config=plan.config,
        weights=fingerprint(blocks),
        device=str(trainer.device),
        preset=plan.preset,
        centering=centering,
        encoder_branches=None if plan.encoder_branches == 1.0 else plan.encoder_branches,
        scale_loaded=plan.scale_loaded,
        tokens=plan.max_tokens,
        sentences=plan.max_sentences,
        micro_batches=plan.micro_batches,
        processes=trainer.data_parallel_world_size,
        task=str(getattr(cfg.task, "_name", None) or cfg.task.task),
        criterion=getattr(cfg.criterion, "_name", None),
        batches=None if batches is None else batches.plan_digest(),
        model_settings=settings_digest(cfg, "model"),
        criterion_settings=settings_digest(cfg, "criterion"),
        fairseq=fairseq_version(),
    )


def _apply(trainer: Any, plan: Plan, prepared: _Prepared) -> Scales:
    """Do with the scales in a file what learning them would have ended with."""
    assert prepared.file is not None
    scales = prepared.file.apply(prepared.blocks).with_centering(prepared.blocks)
    logger.info("applied the scales in %s", plan.scales_file)
    if plan.unused:
        logger.warning("nothing was learned, so without effect: %s", ", ".join(plan.unused))
    if changes := size_changes(prepared.file, scales):
        logger.warning("these scales were learned at other sizes: %s", changes)
    if prepared.centering:
        _center(trainer, prepared)
    return scales


def _snapshot(trainer: Any, prepared: _Prepared) -> Snapshot:
    with deterministic(*trained_modules(trainer).values()):
        return take_snapshot(
            trainer.get_model(),
            prepared.blocks,
            TaskLoss(trainer),
            prepared.sentences,
            data_parallel_processes(trainer),
        )


def _center(trainer: Any, prepared: _Prepared) -> None:
    start = time.monotonic()
    modules = list(trained_modules(trainer).values())
    centered = {block.parameter for block in prepared.blocks if block.state == "centered"}
    with deterministic(*modules):
        count = center_layer_norms(
            modules,
            TaskLoss(trainer),
            prepared.sentences,
            data_parallel_processes(trainer),
            centered.__contains__,
        )
    logger.info(
        "centered the outputs of %d LayerNorms on %d sentences (%.1f s)",
        count,
        sum(len(batch.indices) for batch in prepared.sentences),
        time.monotonic() - start,
    )


def _learn(trainer: Any, plan: Plan, prepared: _Prepared) -> Scales:
    model, criterion = trainer.get_model(), trainer.get_criterion()
    if trainer.cfg.ema.store_ema and getattr(trainer.task, "uses_ema", False):
        raise GradInitError(
            f"task {type(trainer.task).__name__} trains against a moving average of its own "
            "model, which GradInit does not follow: leave out --gradinit"
        )
    blocks, pairs = prepared.blocks, prepared.pairs
    if prepared.centering:
        with at_fixed_scales(blocks):
            _center(trainer, prepared)
    logger.info(
        "GradInit: learning the scales of %d of %d parameter tensors in %d iterations "
        "(losses in nats per unit of sample size; fairseq's own are base 2)",
        sum(block.learned for block in blocks),
        len(blocks),
        plan.config.iterations,
    )
    processes = data_parallel_processes(trainer)
    log = IterationLog(trainer.cfg, plan.config, tracked=trainer.is_data_parallel_master)
    with (
        deterministic(model, criterion),
        StopSignals() as signals,
        forward_autocast(model, plan.config),
    ):
        try:
            learned = learn_scales(
                blocks,
                TaskLoss(trainer),
                pairs,
                plan.config,
                on_iteration=log.write,
                processes=processes,
                halve=pairs.halve,
                state_file=_state_file(trainer, plan, prepared, processes),
                stop=signals,
            )
        except GradInitStopped as stopped:
            _leave(stopped, signals, plan)
    if prepared.centering:
        # The scales have changed what goes into the LayerNorms.
        _center(trainer, prepared)
    settings = prepared.description.settings(learned.second_order, pairs.digest())
    return Scales.of(blocks, learned.scale_of, settings, learned.history)


def _state_file(
    trainer: Any, plan: Plan, prepared: _Prepared, processes: Processes
) -> StateFile | None:
    if plan.save_interval == 0:
        return None
    path = Path(trainer.cfg.checkpoint.save_dir) / STATE_FILE_NAME
    return StateFile(path, prepared.description.identity(), plan.save_interval, processes)


def _leave(stopped: GradInitStopped, signals: StopSignals, plan: Plan) -> NoReturn:
    """End the program the way the signal would have, after saying what is saved."""
    number = signals.received or signal.SIGTERM
    by = signal.Signals(number).name
    if signals.received is None:
        by += " to another process"
    after = "the same command goes on from there"
    if plan.save_interval == 0:
        after = "nothing is saved, as --gradinit-save-interval 0 asks"
    logger.info("%s, by %s: %s", stopped, by, after)
    sys.exit(128 + number)
