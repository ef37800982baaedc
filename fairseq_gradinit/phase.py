"""The GradInit phase of a fairseq run: between building the model and its first update."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from fairseq_gradinit import log_text
from fairseq_gradinit.blocks import (
    Block,
    at_fixed_scales,
    collect_blocks,
    fingerprint,
    frozen_names,
)
from fairseq_gradinit.centering import center_layer_norms, layer_norm_biases, undone_on_error
from fairseq_gradinit.data import PairedBatches
from fairseq_gradinit.effect import FILE_NAME as EFFECT_FILE_NAME
from fairseq_gradinit.effect import Snapshot, effect_between
from fairseq_gradinit.engine import learn_scales
from fairseq_gradinit.errors import GradInitError, GradInitStopped
from fairseq_gradinit.fixed_scales import fixed_scales
from fairseq_gradinit.iteration_log import IterationLog
from fairseq_gradinit.optimizers import settings, training_optimizer
from fairseq_gradinit.options import CENTERING_SENTENCES, Plan
from fairseq_gradinit.processes import OneProcess, Processes, ProcessGroup
from fairseq_gradinit.quiet import quiet
from fairseq_gradinit.rate_advice import short_warmup_advice
from fairseq_gradinit.scales import FILE_NAME, Scales, size_changes
from fairseq_gradinit.signals import StopSignals
from fairseq_gradinit.snapshot import take_snapshot
from fairseq_gradinit.state import StateFile
from fairseq_gradinit.task_loss import TaskLoss, forward_autocast

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
    path = Path(trainer.cfg.checkpoint.save_dir) / FILE_NAME
    start = time.monotonic()
    drop_copies(trainer)
    modules = trained_modules(trainer)
    clear_unset_biases(trainer.get_model())
    frozen = frozen_names(modules)
    if frozen:
        logger.info("frozen, so kept at scale 1: %s", ", ".join(frozen))
    if advice := short_warmup_advice(trainer.cfg, _blocks(trainer, plan)):
        logger.warning(advice)
    with full_precision(trainer), undone_on_error(list(modules.values())):
        before = _snapshot(trainer, plan)
        scales = _learn(trainer, plan) if plan.scales_file is None else _apply(trainer, plan)
        effect = effect_between(before, _snapshot(trainer, plan), scales.signature)
    if trainer.is_data_parallel_master:
        scales.save(path)
        effect.save(path.with_name(EFFECT_FILE_NAME))
    for line in log_text.scale_table(scales):
        logger.info(line)
    logger.info("signature: %s", scales.signature)
    logger.info("scales saved in %s (%.1f s in all)", path, time.monotonic() - start)


def weights_come_from_checkpoint(trainer: Any) -> bool:
    """Whether the run resumes, or starts from another run's weights."""
    return bool(trainer.get_num_updates() > 0 or trainer._optim_history)


def drop_copies(trainer: Any) -> None:
    """Have everything that holds the weights as they are made anew, once they have changed.

    These are the optimizer, its fp32 copies, the data-parallel wrapper and the moving average; the
    trainer makes each of them when it is next asked for it.
    """
    trainer.reinitialize()
    trainer._ema = None


def clear_unset_biases(model: nn.Module) -> None:
    """Zero the biases that fairseq's dynamic convolutions have, and neither set nor use.

    They are what the memory held: not finite at times, and another in each run and process.
    """
    for module in model.modules():
        bias = getattr(module, "conv_bias", None)
        if isinstance(bias, nn.Parameter) and not getattr(module, "has_conv_bias", True):
            nn.init.zeros_(bias)


def require_writable(save_dir: str) -> None:
    """Refuse a checkpoint folder that cannot be written, before any work is done.

    Raises:
        GradInitError: the folder cannot be made, or no file can be made in it.
    """
    probe = Path(save_dir) / f".{FILE_NAME}.{os.getpid()}"
    try:
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise GradInitError(
            f"cannot write to --save-dir {save_dir}: {error.strerror}; the scales and the "
            "checkpoints need a folder that can be written"
        ) from error


def trained_modules(trainer: Any) -> dict[str, nn.Module]:
    """All that training trains, by what the names of its tensors begin with."""
    return {"": trainer.get_model(), "criterion": trainer.get_criterion()}


def _blocks(trainer: Any, plan: Plan) -> list[Block]:
    modules = trained_modules(trainer)
    if plan.scales_file is not None:
        return collect_blocks(modules, plan.config.norm_gains)
    fixed = fixed_scales(modules, plan.encoder_branches, plan.require_encoder)
    blocks = collect_blocks(modules, plan.config.norm_gains, fixed)
    if not plan.centering:
        return blocks
    centered = {id(bias) for bias in layer_norm_biases(list(modules.values()))}
    return [replace(b, state="centered") if id(b.parameter) in centered else b for b in blocks]


def _apply(trainer: Any, plan: Plan) -> Scales:
    """Do with the scales in a file what learning them would have ended with."""
    learned = Scales.load(Path(str(plan.scales_file)))
    scales = learned.apply(_blocks(trainer, plan))
    logger.info("applied the scales in %s", plan.scales_file)
    if changes := size_changes(learned, scales):
        logger.warning("these scales were learned at other sizes: %s", changes)
    if scales.centered if plan.centering is None else plan.centering:
        _center(trainer, _pairs(trainer, plan))
    return scales


def _pairs(trainer: Any, plan: Plan) -> PairedBatches:
    return PairedBatches(
        trainer,
        plan.max_tokens,
        plan.max_sentences,
        plan.micro_batches,
        plan.config.trial_steps,
    )


def data_parallel_processes(trainer: Any) -> Processes | None:
    """The processes that train together; None for one alone."""
    if trainer.data_parallel_world_size > 1:
        return ProcessGroup(trainer.data_parallel_process_group)
    return None


def _snapshot(trainer: Any, plan: Plan) -> Snapshot:
    modules = trained_modules(trainer)
    blocks = collect_blocks(modules, plan.config.norm_gains)
    try:
        sentences = _pairs(trainer, plan).sentences(CENTERING_SENTENCES)
    except GradInitError:
        # A file of scales can be applied where sentences cannot be drawn by index.
        if plan.scales_file is None:
            raise
        sentences = []
    with quiet(*modules.values()):
        return take_snapshot(
            trainer.get_model(),
            blocks,
            TaskLoss(trainer),
            sentences,
            data_parallel_processes(trainer) or OneProcess(),
        )


def _center(trainer: Any, pairs: PairedBatches) -> None:
    start = time.monotonic()
    modules = list(trained_modules(trainer).values())
    sentences = pairs.sentences(CENTERING_SENTENCES)
    with quiet(*modules):
        count = center_layer_norms(
            modules, TaskLoss(trainer), sentences, data_parallel_processes(trainer)
        )
    logger.info(
        "centered the outputs of %d LayerNorms on %d sentences (%.1f s)",
        *(count, len(sentences), time.monotonic() - start),
    )


def _learn(trainer: Any, plan: Plan) -> Scales:
    model, criterion = trainer.get_model(), trainer.get_criterion()
    if trainer.cfg.ema.store_ema and getattr(trainer.task, "uses_ema", False):
        raise GradInitError(
            f"task {type(trainer.task).__name__} trains against a moving average of its own "
            "model, which GradInit does not follow: leave out --gradinit"
        )
    blocks = _blocks(trainer, plan)
    before = fingerprint(blocks)
    pairs = _pairs(trainer, plan)
    if plan.centering:
        with at_fixed_scales(blocks):
            _center(trainer, pairs)
    logger.info(
        "GradInit: learning the scales of %d of %d parameter tensors in %d iterations "
        "(losses in nats per unit of sample size; fairseq's own are base 2)",
        sum(block.learned for block in blocks),
        len(blocks),
        plan.config.iterations,
    )
    processes = data_parallel_processes(trainer)
    log = IterationLog(trainer.cfg, plan.config, tracked=trainer.is_data_parallel_master)
    with quiet(model, criterion), StopSignals() as signals, forward_autocast(model, plan.config):
        try:
            learned = learn_scales(
                blocks,
                TaskLoss(trainer),
                pairs,
                plan.config,
                on_iteration=log.write,
                processes=processes,
                halve=pairs.halve,
                optimizer=training_optimizer(trainer.cfg.optimizer),
                state_file=_state_file(trainer, plan, pairs, processes),
                stop=signals,
            )
        except GradInitStopped as stopped:
            _leave(stopped, signals, plan)
    log.write_scales([learned.scale_of[block.name] for block in blocks if block.learned])
    if plan.centering:
        # The scales have changed what goes into the LayerNorms.
        _center(trainer, pairs)
    signature = log_text.signature(
        plan,
        trainer.cfg,
        model=before,
        data=pairs.digest(),
        device=str(trainer.device),
        second_order=learned.second_order,
    )
    return Scales.of(blocks, learned.scale_of, signature, learned.history)


def _state_file(
    trainer: Any, plan: Plan, pairs: PairedBatches, processes: Processes | None
) -> StateFile | None:
    if plan.save_interval == 0:
        return None
    identity = {
        "processes": trainer.data_parallel_world_size,
        "micro-batches": plan.micro_batches,
        "batches": pairs.plan_digest(),
        "optimizer": settings(trainer.cfg.optimizer) if plan.config.trial_steps > 1 else "-",
    }
    return StateFile(
        Path(trainer.cfg.checkpoint.save_dir) / STATE_FILE_NAME,
        "|".join(f"{name}:{value}" for name, value in identity.items()),
        plan.save_interval,
        processes,
    )


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


@contextmanager
def full_precision(trainer: Any) -> Iterator[None]:
    """Hold model and criterion in fp32, whatever precision the run trains in.

    The parameters keep their identity, so that everything that refers to them stays valid.
    """
    modules = trained_modules(trainer).values()
    half = trainer.cfg.common.fp16
    if half:
        for module in modules:
            module.float()
    try:
        yield
    finally:
        if half:
            for module in modules:
                module.half()
