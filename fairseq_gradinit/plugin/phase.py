"""The GradInit phase of a fairseq run: between building the model and its first update."""

from __future__ import annotations

import logging
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from fairseq_gradinit.engine import (
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
from fairseq_gradinit.errors import GradInitStopped
from fairseq_gradinit.plugin.batches import PairedBatches
from fairseq_gradinit.plugin.branches import take_snapshot
from fairseq_gradinit.plugin.fixed_scales import fixed_scales
from fairseq_gradinit.plugin.loaded_weights import loaded_names
from fairseq_gradinit.plugin.log import IterationLog, scale_table
from fairseq_gradinit.plugin.loss import TaskLoss, forward_autocast
from fairseq_gradinit.plugin.options import CENTERING_SENTENCES
from fairseq_gradinit.plugin.plan import Plan
from fairseq_gradinit.plugin.rate_advice import ask_scheduler, rate_warning
from fairseq_gradinit.plugin.trainer import (
    data_parallel_processes,
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
    """Initialise the model of fairseq's `trainer`, unless the run resumes from a checkpoint."""
    if weights_come_from_checkpoint(trainer):
        logger.info(
            "skipping GradInit: the weights come from a checkpoint, which a new scale would spoil"
        )
        return
    path = Path(trainer.cfg.checkpoint.save_dir) / SCALES_FILE
    start = time.monotonic()
    beginning = ask_scheduler(trainer)
    # Optimizer, its fp32 copies and data-parallel wrapper are made again when next asked for.
    trainer.reinitialize()
    modules = trained_modules(trainer)
    if frozen := frozen_names(modules):
        logger.info("frozen, so kept at scale 1: %s", ", ".join(frozen))
    with full_precision(trainer):
        phase = require_same_setup(
            data_parallel_processes(trainer), lambda: _Phase(trainer, plan), _Phase.agreement
        )
        eta = plan.config.eta if phase.file is None else phase.file.eta
        if warning := rate_warning(trainer.cfg, phase.blocks, eta, beginning):
            logger.warning(warning)
        before = phase.snapshot()
        scales = phase.learn() if phase.file is None else phase.apply(phase.file)
        effect = effect_between(before, phase.snapshot(), scales.signature)
    if trainer.is_data_parallel_master:
        scales.save(path)
        effect.save(path.with_name(EFFECT_FILE))
    for line in scale_table(scales):
        logger.info(line)
    logger.info("signature: %s", scales.signature)
    logger.info("scales saved in %s (%.1f s in all)", path, time.monotonic() - start)


class _Phase:
    """What a process gets ready by itself, and what it then does together with the others.

    Its `file` are the scales to apply; None if they are to be learned.
    """

    def __init__(self, trainer: Any, plan: Plan) -> None:
        self._trainer, self._plan = trainer, plan
        self._modules = modules = trained_modules(trainer)
        self._processes = data_parallel_processes(trainer)
        self._loss = TaskLoss(trainer)
        self.file = file = None if plan.scales_file is None else Scales.load(Path(plan.scales_file))
        self._centering = plan.centering
        if self._centering is None:
            self._centering = file is not None and file.centered
        loaded = [] if plan.scale_loaded else loaded_names(modules)
        if loaded:
            logger.info(
                "loaded from files, so kept as they are (--gradinit-scale-loaded scales them): %s",
                some(loaded),
            )
            self.file = file and file.keeping(loaded)
        required = plan.require_encoder and file is None
        fixed = fixed_scales(modules, plan.encoder_branches, required, loaded)
        self.blocks = collect_blocks(modules, plan.config.norm_gains, fixed)
        if self._centering:
            biases = {id(bias) for bias in layer_norm_biases(list(modules.values()))}
            for i, block in enumerate(self.blocks):
                if id(block.parameter) in biases and block.name not in loaded:
                    self.blocks[i] = replace(block, state="centered")
        self._pairs = PairedBatches(
            trainer, plan.max_tokens, plan.max_sentences, plan.micro_batches
        )
        # What LayerNorms are centered on and branches measured with.
        self._sentences = self._pairs.sentences(CENTERING_SENTENCES)
        cfg = trainer.cfg
        self._description = Description(
            config=plan.config,
            weights=fingerprint(self.blocks),
            device=str(trainer.device),
            preset=plan.preset,
            centering=self._centering,
            encoder_branches=None if plan.encoder_branches == 1.0 else plan.encoder_branches,
            scale_loaded=plan.scale_loaded,
            tokens=plan.max_tokens,
            sentences=plan.max_sentences,
            micro_batches=plan.micro_batches,
            processes=trainer.data_parallel_world_size,
            task=str(getattr(cfg.task, "_name", None) or cfg.task.task),
            criterion=getattr(cfg.criterion, "_name", None),
            batches=self._pairs.plan_digest(),
            model_settings=settings_digest(cfg, "model"),
            criterion_settings=settings_digest(cfg, "criterion"),
            fairseq=fairseq_version(),
        )

    def agreement(self) -> dict[str, object]:
        """What must be the same in all processes."""
        scales = self.file and self.file.digest()
        # All read a state, or none.
        also = {"save-interval": self._plan.save_interval, "scales": scales}
        return {**self._description.identity(), **also}

    def snapshot(self) -> Snapshot:
        model = self._trainer.get_model()
        with deterministic(*self._modules.values()):
            return take_snapshot(model, self.blocks, self._loss, self._sentences, self._processes)

    def apply(self, file: Scales) -> Scales:
        """Do with the scales in a file what learning them would have ended with."""
        scales = file.apply(self.blocks).with_centering(self.blocks)
        logger.info("applied the scales in %s", self._plan.scales_file)
        if changes := size_changes(file, scales):
            logger.warning("these scales were learned at other sizes: %s", changes)
        self._center()
        return scales

    def _center(self) -> None:
        if not self._centering:
            return
        start = time.monotonic()
        centered = {block.parameter for block in self.blocks if block.state == "centered"}
        with deterministic(*self._modules.values()):
            count = center_layer_norms(
                list(self._modules.values()),
                self._loss,
                self._sentences,
                self._processes,
                centered.__contains__,
            )
        logger.info(
            "centered the outputs of %d LayerNorms on %d sentences (%.1f s)",
            count,
            sum(len(batch.indices) for batch in self._sentences),
            time.monotonic() - start,
        )

    def learn(self) -> Scales:
        config = self._plan.config
        with at_fixed_scales(self.blocks):
            self._center()
        logger.info(
            "GradInit: learning the scales of %d of %d parameter tensors in %d iterations "
            "(losses in nats per unit of sample size; fairseq's own are base 2)",
            sum(block.learned for block in self.blocks),
            len(self.blocks),
            config.iterations,
        )
        path = Path(self._trainer.cfg.checkpoint.save_dir) / STATE_FILE_NAME
        identity, interval = self._description.identity(), self._plan.save_interval
        state_file = StateFile(path, identity, interval, self._processes) if interval else None
        log = IterationLog(self._trainer.cfg, config, self._trainer.is_data_parallel_master)
        with (
            deterministic(*self._modules.values()),
            StopSignals() as signals,
            forward_autocast(self._trainer.get_model(), config),
        ):
            try:
                learned = learn_scales(
                    self.blocks,
                    self._loss,
                    self._pairs,
                    config,
                    on_iteration=log.write,
                    processes=self._processes,
                    halve=self._pairs.halve,
                    state_file=state_file,
                    stop=signals,
                )
            except GradInitStopped as stopped:
                # The program ends the way the signal would have ended it.
                number = signals.received or signal.SIGTERM
                by = signal.Signals(number).name
                by += "" if signals.received else " to another process"
                after = "the same command goes on from there"
                if state_file is None:
                    after = "nothing is saved, as --gradinit-save-interval 0 asks"
                logger.info("%s, by %s: %s", stopped, by, after)
                sys.exit(128 + number)
        # The scales have changed what goes into the LayerNorms.
        self._center()
        settings = self._description.settings(learned.second_order, self._pairs.digest())
        return Scales.of(self.blocks, learned.scale_of, settings, learned.history)


class StopSignals:
    """While this context is open, the first SIGTERM or SIGINT is only `received`.

    A second one acts as it would have without this context.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()
