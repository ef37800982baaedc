"""A command line of fairseq-train, from which trainings are begun in this process, over and over.

They are made of fairseq's own parts: its command line, task, model, criterion, optimizer and
trainer, with the seed of the command, so that all begin with the same weights and see the same
batches. Only the schedule is replaced, by fairseq's `fixed`: the first few dozen updates of every
schedule are at the peak, or on the way to it.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from fairseq import options as fairseq_options
from fairseq import tasks, utils
from fairseq.data import iterators
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.optim.lr_scheduler.fixed_schedule import FixedLRScheduleConfig
from fairseq.trainer import Trainer
from omegaconf import DictConfig, OmegaConf, open_dict

import fairseq_gradinit.plugin.install  # noqa: F401
from fairseq_gradinit.errors import GradInitError, said_by
from fairseq_gradinit.plugin.loaded_weights import note_loaded_weights
from fairseq_gradinit.plugin.options import APPLYING, OPTION_NAMES, GradInitOptions
from fairseq_gradinit.plugin.phase import run_phase
from fairseq_gradinit.plugin.plan import Plan, make_plan, peak_lr
from fairseq_gradinit.plugin.schemes.options import read_scheme
from fairseq_gradinit.scales import SCALES_FILE

PLUGIN = "fairseq_gradinit"

logger = logging.getLogger("fairseq_gradinit.check")


class Session:
    """A command line of fairseq-train.

    Args:
        words: the command line, with or without "fairseq-train" before it. Its --gradinit options
            are those of the trainings that begin with GradInit.
        folder: where the learned scales are written; nothing else is.

    Raises:
        GradInitError: fairseq cannot begin such a run, or the check does not fit it.
    """

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        cfg = _configuration(words)
        _keep_nothing(cfg, folder)
        self._plan_cfg = copy.deepcopy(cfg)
        _set(self._plan_cfg.task, "gradinit", True)
        if getattr(cfg.task, "gradinit_scales", None) is None:
            _set(self._plan_cfg.task, "gradinit_save_interval", 0)
        self._plan()
        _leave_out_options(cfg.task)
        self._cfg = cfg
        with _fairseq_errors("load its task and training data"):
            self._task = tasks.setup_task(cfg.task)
            note_loaded_weights(self._task)
            self._task.load_dataset(cfg.dataset.train_subset, combine=True, epoch=1)

    @property
    def lr(self) -> float:
        """The peak learning rate of the command."""
        return peak_lr(self._cfg)

    def trainer(self, lr: float, warmup: int) -> Trainer:
        """A trainer with the default initialisation, before its first update.

        Args:
            lr: the learning rate.
            warmup: updates in which it rises linearly from 0; it is constant otherwise.

        Raises:
            GradInitError: fairseq cannot build it.
        """
        with _fairseq_errors("build the model"):
            return self._trainer(lr, warmup)

    def run_gradinit(self, trainer: Trainer) -> None:
        """Scale the weights of a new trainer.

        The scales are learned the first time, for the peak learning rate of the command, and serve
        later trainers too.

        Raises:
            GradInitError: GradInit cannot work on it, or memory ran out.
        """
        run_phase(trainer, self._plan())
        self._apply_from_now_on(Path(self._plan_cfg.checkpoint.save_dir) / SCALES_FILE)

    def _apply_from_now_on(self, scales: Path) -> None:
        """Have later trainings take the scales in this file, as they were learned."""
        _leave_out_options(self._plan_cfg.task, but=APPLYING)
        _set(self._plan_cfg.task, "gradinit_scales", str(scales))

    def _plan(self) -> Plan:
        plan = make_plan(self._plan_cfg)
        assert plan is not None  # --gradinit is set
        return plan

    def _trainer(self, lr: float, warmup: int) -> Trainer:
        cfg = copy.deepcopy(self._cfg)
        with open_dict(cfg):
            cfg.optimization.lr = [lr]
            schedule = FixedLRScheduleConfig(warmup_updates=warmup)
            schedule._name = "fixed"
            cfg.lr_scheduler = OmegaConf.structured(schedule)
            cfg.lr_scheduler.lr = [lr]
        metrics.reset()
        np.random.seed(cfg.common.seed)
        utils.set_torch_seed(cfg.common.seed)
        model = self._task.build_model(cfg.model)
        return SilentTrainer(cfg, self._task, model, self._task.build_criterion(cfg.criterion))


class SilentTrainer(Trainer):  # type: ignore[misc]
    """fairseq's trainer, which raises an error of an update at once.

    Otherwise it would first save a checkpoint, and run the update again to find the layer to blame,
    which with newer versions of torch ends in an error of its own.
    """

    def save_checkpoint(self, filename: str, extra_state: Any) -> None:
        error = sys.exception()
        if error is not None:
            raise error


class TrainingBatches:
    """The micro-batches of one update after the other, endlessly, in the order of training.

    Attributes:
        indices: of the sentences in them, batch by batch; None if the data are streamed.

    Raises:
        GradInitError: fairseq cannot make them.
    """

    def __init__(self, trainer: Any) -> None:
        with _fairseq_errors("make its batches"):
            self._epochs = trainer.get_train_iterator(epoch=1, load_dataset=False)
        self._cfg = trainer.cfg
        batches = getattr(self._epochs, "frozen_batches", None)
        self.indices = None if batches is None else np.concatenate([np.empty(0, int), *batches])

    def __iter__(self) -> Iterator[Any]:
        cfg = self._cfg
        while True:
            epoch = self._epochs.next_epoch_itr(
                fix_batches_to_gpus=cfg.distributed_training.fix_batches_to_gpus,
                shuffle=self._epochs.next_epoch_idx > cfg.dataset.curriculum,
            )
            yield from iterators.GroupedIterator(epoch, cfg.optimization.update_freq[0])


def make_update(trainer: Trainer, samples: Any) -> tuple[float, float] | None:
    """Make an update; None if the precision of the run made it void (overflow in fp16).

    Returns:
        The loss of the batch before it, as the criterion reports it, and the l2 norm of the
        gradient before clipping; NaN where fairseq reports none.

    Raises:
        FloatingPointError: the gradient is not finite.
        GradInitError: memory ran out.
    """
    number = trainer.get_num_updates()
    with metrics.aggregate(new_root=True) as logged:
        try:
            trainer.train_step(samples, raise_oom=True)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            raise GradInitError(
                "memory ran out in an update: lower --max-tokens, as training would have to"
            ) from error
    if trainer.get_num_updates() == number:
        return None
    return float(logged["loss"].avg), float(logged["gnorm"].avg if "gnorm" in logged else math.nan)


def _configuration(words: Sequence[str]) -> Any:
    """What fairseq-train would make of a command line.

    Raises:
        GradInitError: it cannot be read, or the check does not fit it.
    """
    words = list(words)
    if words and Path(words[0]).name == "fairseq-train":
        del words[0]
    with _fairseq_errors("read this command line"):
        # Tasks and models of a user dir are options of the parser.
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--user-dir")
        found, others = finder.parse_known_args(words)
        if found.user_dir is not None and Path(found.user_dir).name == PLUGIN:
            # It is there already, and fairseq refuses to import it from another place.
            words = others
        else:
            utils.import_user_module(found)
        parser = fairseq_options.get_training_parser()
        vars(parser)["error"] = _refuse
        cfg = convert_namespace_to_omegaconf(fairseq_options.parse_args_and_arch(parser, words))
    if cfg.dataset.max_tokens is None and cfg.dataset.batch_size is None:
        raise GradInitError("the command has no batch size: give it --max-tokens or --batch-size")
    scheme = read_scheme(cfg)
    if scheme is not None and scheme.sets_weights:
        raise GradInitError(
            "the check compares the default initialisation with GradInit: leave out --init-scheme"
        )
    if scheme is not None and scheme.configure is not None:
        scheme.configure(cfg.model)
    return cfg


def _refuse(message: str) -> NoReturn:
    raise GradInitError(f"fairseq-train does not take this command line: {message}")


def _keep_nothing(cfg: Any, folder: Path) -> None:
    """Have nothing written but into `folder`, no other process begun, and no progress shown."""
    world = cfg.distributed_training.distributed_world_size
    if world > 1:
        logger.warning(
            "training would run in %d processes; the check runs in one, so with batches of one",
            world,
        )
    with open_dict(cfg):
        cfg.distributed_training.distributed_world_size = 1
        cfg.checkpoint.save_dir = str(folder)
        common = cfg.common
        common.tensorboard_logdir = common.wandb_project = common.aim_repo = None
        common.log_file = None
        common.azureml_logging = False
        common.log_format = "none"
        cfg.dataset.num_workers = 0
        cfg.dataset.data_buffer_size = 0


def _leave_out_options(task_cfg: Any, but: Collection[str] = ()) -> None:
    """Have the options of GradInit as if they had not been given."""
    for name in OPTION_NAMES:
        if name not in but:
            _set(task_cfg, name, getattr(GradInitOptions, name))


def _set(task_cfg: Any, name: str, value: Any) -> None:
    with open_dict(task_cfg) if isinstance(task_cfg, DictConfig) else nullcontext():
        setattr(task_cfg, name, value)


@contextmanager
def _fairseq_errors(what: str) -> Iterator[None]:
    """fairseq answers mistakes with exceptions of any kind: let a sentence say what is in them."""
    try:
        yield
    except GradInitError:
        raise
    except Exception as error:
        raise GradInitError(f"fairseq-train could not {what}: {said_by(error)}") from error
