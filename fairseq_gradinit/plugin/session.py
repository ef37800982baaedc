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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from omegaconf import OmegaConf, open_dict

import fairseq_gradinit.plugin.install  # noqa: F401
from fairseq_gradinit.errors import GradInitError, said_by
from fairseq_gradinit.plugin.phase import run_phase
from fairseq_gradinit.plugin.plan import make_plan, peak_lr
from fairseq_gradinit.plugin.schemes.options import read_scheme
from fairseq_gradinit.scales import SCALES_FILE

PLUGIN = "fairseq_gradinit"

logger = logging.getLogger("fairseq_gradinit.check")


class Session:
    """A command line of fairseq-train, with or without that word before it.

    Its --gradinit options are those of the trainings that begin with GradInit, and `lr` is its peak
    rate. Nothing but the learned scales is written to `folder`.

    Raises:
        GradInitError: fairseq cannot begin such a run, or the check does not fit it.
    """

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        self._cfg = cfg = _configuration(words)
        self.lr = peak_lr(cfg)
        world = cfg.distributed_training.distributed_world_size
        if world > 1:
            logger.warning(
                "training would run in %d processes; the check runs in one, so with batches of one",
                world,
            )
        cfg.distributed_training.distributed_world_size = 1
        cfg.checkpoint.save_dir = str(folder)
        cfg.common.log_format, cfg.common.tensorboard_logdir = "none", None
        cfg.dataset.num_workers = cfg.dataset.data_buffer_size = 0
        cfg.task.gradinit = True
        plan = make_plan(cfg)
        assert plan is not None
        self._plan = replace(plan, save_interval=0)
        with _fairseq_errors("load its task and training data"):
            self._task = tasks.setup_task(cfg.task)
            self._task.load_dataset(cfg.dataset.train_subset, combine=True, epoch=1)

    def trainer(self, lr: float, warmup: int) -> Trainer:
        """A trainer with the default initialisation, before its first update.

        The learning rate rises linearly from 0 in `warmup` updates; it is constant otherwise.
        """
        cfg = copy.deepcopy(self._cfg)
        schedule = FixedLRScheduleConfig(_name="fixed", warmup_updates=warmup)
        with open_dict(cfg):
            cfg.optimization.lr = [lr]
            cfg.lr_scheduler = OmegaConf.structured(schedule)
            cfg.lr_scheduler.lr = [lr]
        metrics.reset()
        np.random.seed(cfg.common.seed)
        utils.set_torch_seed(cfg.common.seed)
        with _fairseq_errors("build the model"):
            model = self._task.build_model(cfg.model)
            return SilentTrainer(cfg, self._task, model, self._task.build_criterion(cfg.criterion))

    def run_gradinit(self, trainer: Trainer) -> None:
        """Scale the weights of a new trainer, by scales that are learned the first time."""
        run_phase(trainer, self._plan)
        scales = Path(self._cfg.checkpoint.save_dir) / SCALES_FILE
        self._plan = replace(self._plan, scales_file=str(scales))


class SilentTrainer(Trainer):  # type: ignore[misc]
    """fairseq's trainer, which raises an error of an update at once.

    Otherwise it would save a checkpoint, and run the update again to find the layer to blame.
    """

    # The session itself runs the phase, where it is wanted.
    _gradinit_done = True

    def save_checkpoint(self, filename: str, extra_state: Any) -> None:
        error = sys.exception()
        if error is not None:
            raise error


class TrainingBatches:
    """The micro-batches of one update after the other, endlessly, in the order of training.

    `indices` are those of the sentences, batch by batch; None if the data are streamed.
    """

    def __init__(self, trainer: Any) -> None:
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

    Returns the loss of the batch before it, as the criterion reports it, and the l2 norm of the
    gradient before clipping; NaN where fairseq reports none.

    Raises:
        FloatingPointError: the gradient is not finite.
    """
    number = trainer.get_num_updates()
    with metrics.aggregate(new_root=True) as logged:
        trainer.train_step(samples, raise_oom=True)
    if trainer.get_num_updates() == number:
        return None
    return float(logged["loss"].avg), float(logged["gnorm"].avg if "gnorm" in logged else math.nan)


def _configuration(words: Sequence[str]) -> Any:
    """What fairseq-train would make of a command line."""
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

        def refuse(message: str) -> NoReturn:
            raise GradInitError(f"fairseq-train does not take this command line: {message}")

        vars(parser)["error"] = refuse
        cfg = convert_namespace_to_omegaconf(fairseq_options.parse_args_and_arch(parser, words))
    scheme = read_scheme(cfg)
    if scheme is not None:
        if scheme.sets_weights or scheme.configure is None:
            raise GradInitError(
                "the check compares the default initialisation with GradInit: "
                "leave out --init-scheme"
            )
        scheme.configure(cfg.model)
    return cfg


@contextmanager
def _fairseq_errors(what: str) -> Iterator[None]:
    """fairseq answers mistakes with exceptions of any kind: let a sentence say what is in them."""
    try:
        yield
    except GradInitError:
        raise
    except Exception as error:
        raise GradInitError(f"fairseq-train could not {what}: {said_by(error)}") from error
