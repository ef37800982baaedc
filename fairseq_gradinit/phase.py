"""The GradInit phase of a fairseq run: between building the model and its first update."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fairseq.logging import progress_bar

from fairseq_gradinit import report
from fairseq_gradinit.blocks import Block, collect_blocks, frozen_names
from fairseq_gradinit.data import PairedBatches
from fairseq_gradinit.engine import Iteration, learn_scales
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.options import Plan
from fairseq_gradinit.processes import ProcessGroup
from fairseq_gradinit.quiet import quiet
from fairseq_gradinit.scales import FILE_NAME, Scales
from fairseq_gradinit.task_loss import TaskLoss

logger = logging.getLogger("fairseq_gradinit")

LINES_OF_LOG = 20


def run_phase(trainer: Any, plan: Plan) -> None:
    """Initialise the model of `trainer` as `plan` says, unless the run resumes from a checkpoint.

    Args:
        trainer: fairseq's trainer; its training data are loaded, no update is done.

    Raises:
        GradInitError: see `learn_scales`, `Scales.load` and `Scales.apply`.
    """
    if trainer.get_num_updates() > 0 or trainer._optim_history:
        logger.info(
            "skipping GradInit: the weights come from a checkpoint, which a new scale would spoil"
        )
        return
    path = Path(trainer.cfg.checkpoint.save_dir) / FILE_NAME
    start = time.monotonic()
    # The optimizer, its fp32 copies, the data-parallel wrapper and the moving average hold the
    # weights as they are. The trainer makes each of them anew when it is next asked for it.
    trainer.reinitialize()
    trainer._ema = None
    with _full_precision(trainer):
        blocks = _blocks(trainer, plan)
        if plan.scales_file is None:
            scales = _learn(trainer, plan, blocks)
        else:
            scales = Scales.load(Path(plan.scales_file))
            scales.apply(blocks)
            logger.info("applied the scales in %s", plan.scales_file)
    if trainer.is_data_parallel_master:
        scales.save(path)
    for line in report.scale_table(scales):
        logger.info(line)
    logger.info("signature: %s", scales.signature)
    logger.info("scales saved in %s (%.1f s in all)", path, time.monotonic() - start)


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


def _blocks(trainer: Any, plan: Plan) -> list[Block]:
    modules = {"": trainer.get_model(), "criterion": trainer.get_criterion()}
    frozen = frozen_names(modules)
    if frozen:
        logger.info("frozen, so kept at scale 1: %s", ", ".join(frozen))
    return collect_blocks(modules, plan.config.norm_gains)


def _learn(trainer: Any, plan: Plan, blocks: list[Block]) -> Scales:
    model, criterion = trainer.get_model(), trainer.get_criterion()
    if trainer.cfg.ema.store_ema and getattr(trainer.task, "uses_ema", False):
        raise GradInitError(
            f"task {type(trainer.task).__name__} trains against a moving average of its own "
            "model, which GradInit does not follow: leave out --gradinit"
        )
    before = report.fingerprint(blocks)
    pairs = PairedBatches(trainer, plan.max_tokens, plan.max_sentences, plan.micro_batches)
    logger.info(
        "GradInit: learning the scales of %d of %d parameter tensors in %d iterations "
        "(losses in nats per unit of sample size; fairseq's own are base 2)",
        sum(block.learned for block in blocks),
        len(blocks),
        plan.config.iterations,
    )
    log = _Log(trainer.cfg, plan, tracked=trainer.is_data_parallel_master)
    processes = None
    if trainer.data_parallel_world_size > 1:
        processes = ProcessGroup(trainer.data_parallel_process_group)
    with quiet(model, criterion):
        scale_of, history = learn_scales(
            blocks, TaskLoss(trainer), log.count(pairs), plan.config, log.write, processes
        )
    signature = report.signature(
        plan, trainer.cfg, model=before, data=pairs.digest(), device=str(trainer.device)
    )
    return Scales.of(blocks, scale_of, signature, history)


@contextmanager
def _full_precision(trainer: Any) -> Iterator[None]:
    """Hold model and criterion in fp32, whatever precision the run trains in.

    The parameters keep their identity, so that everything that refers to them stays valid.
    """
    modules = (trainer.get_model(), trainer.get_criterion())
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


class _Log:
    """The iterations on fairseq's progress bar and, if `tracked`, its experiment trackers."""

    def __init__(self, cfg: Any, plan: Plan, tracked: bool) -> None:
        self._cfg = cfg
        self._tracked = tracked
        self._plan = plan
        self._interval = max(1, plan.config.iterations // LINES_OF_LOG)
        self._bar: Any = None
        self._wandb: Any = None

    def count(self, pairs: PairedBatches) -> Iterator[Any]:
        """Yield from `pairs` as many pairs as there are iterations, under a progress bar."""
        common = self._cfg.common
        iterations = self._plan.config.iterations
        self._bar = progress_bar.progress_bar(
            _Sized(pairs, iterations),
            log_format=common.log_format,
            log_interval=self._interval,
            prefix="gradinit",
            aim_repo=common.aim_repo if self._tracked else None,
            aim_run_hash=common.aim_run_hash if self._tracked else None,
            aim_param_checkpoint_dir=self._cfg.checkpoint.save_dir,
            tensorboard_logdir=common.tensorboard_logdir if self._tracked else None,
            default_log_format="simple" if common.no_progress_bar else "tqdm",
            azureml_logging=common.azureml_logging and self._tracked,
        )
        if common.wandb_project and self._tracked:
            self._wandb = progress_bar.progress_bar(
                [],
                log_format="none",
                wandb_project=common.wandb_project,
                wandb_run_name=os.environ.get(
                    "WANDB_NAME", os.path.basename(self._cfg.checkpoint.save_dir)
                ),
            )
        yield from self._bar

    def write(self, iteration: Iteration) -> None:
        if iteration.index % self._interval and iteration.index != self._plan.config.iterations:
            return
        stats = report.iteration_stats(iteration, self._plan.config.gamma)
        self._bar.log(stats, tag="gradinit", step=iteration.index)
        if self._wandb is not None:
            # W&B drops what comes with a step below the last one: counting lines, not
            # iterations, leaves the steps of training free.
            stats["iteration"] = iteration.index
            self._wandb.log(stats, tag="gradinit", step=iteration.index // self._interval)


class _Sized:
    """The first `length` items of an endless iterable, with the length a progress bar shows."""

    def __init__(self, items: PairedBatches, length: int) -> None:
        self._items = items
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        for _, item in zip(range(self._length), self._items, strict=False):
            yield item
