"""The first updates of a fairseq run, from its initialisation, watched closely.

A probe is made of fairseq's own parts: its command line, task, model, criterion, optimizer and
trainer, with the seed of the command, so that all probes begin with the same weights and see the
same batches. Only the schedule is replaced, by fairseq's `fixed`: the first few dozen updates of
every schedule are at the peak, or on the way to it.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from fairseq import options as fairseq_options
from fairseq import tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.optim.lr_scheduler.fixed_schedule import FixedLRScheduleConfig
from fairseq.trainer import Trainer
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn

import fairseq_gradinit.plugin.install  # noqa: F401
from fairseq_gradinit.check.batches import ProbeData
from fairseq_gradinit.check.records import Arm, Look, Probe, Update
from fairseq_gradinit.engine import deterministic
from fairseq_gradinit.errors import GradInitError, said_by
from fairseq_gradinit.plugin.batches import MicroBatch
from fairseq_gradinit.plugin.loaded_weights import note_loaded_weights
from fairseq_gradinit.plugin.loss import TaskLoss
from fairseq_gradinit.plugin.options import (
    APPLYING,
    OPTION_NAMES,
    GradInitOptions,
    Plan,
    make_plan,
    peak_lr,
)
from fairseq_gradinit.plugin.phase import run_phase
from fairseq_gradinit.plugin.schemes.options import read_scheme
from fairseq_gradinit.scales import SCALES_FILE

PLUGIN = "fairseq_gradinit"

logger = logging.getLogger("fairseq_gradinit.check")


class Session:
    """A command line of fairseq-train, from which probes are run in this process.

    Args:
        words: the command line, with or without "fairseq-train" before it. Its --gradinit options
            are those of GradInit's probes.
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
        self._data: ProbeData | None = None
        with _fairseq_errors("load its task and training data"):
            self._task = tasks.setup_task(cfg.task)
            note_loaded_weights(self._task)
            self._task.load_dataset(cfg.dataset.train_subset, combine=True, epoch=1)

    @property
    def lr(self) -> float:
        """The peak learning rate of the command."""
        return peak_lr(self._cfg)

    def run(self, arm: Arm, lr: float, updates: int, looked: Collection[int]) -> Probe:
        """Make so many updates from the initialisation.

        GradInit's scales are learned in the first of its probes, for the peak learning rate of the
        command whatever `lr` is, and serve the others too.

        Args:
            looked: the numbers of updates after which the model is looked at.

        Raises:
            GradInitError: GradInit cannot work on this run, or memory ran out.
        """
        start = time.monotonic()
        with _fairseq_errors("build the model and its batches"):
            trainer = self._trainer(arm, lr, updates)
            self._data = self._data or ProbeData(trainer)
        if arm.start == "gradinit":
            run_phase(trainer, self._plan())
            self._apply_from_now_on(Path(self._plan_cfg.checkpoint.save_dir) / SCALES_FILE)
        trainer.begin_epoch(1)
        watched = Watched(trainer, self._data.looked)
        made: list[Update] = []
        looks: list[Look] = []
        diverged = None
        try:
            looks.append(watched.look())
            for samples in self._data:
                update = watched.update(samples)
                if update is None:
                    continue
                made.append(update)
                if len(made) in looked:
                    looks.append(watched.look())
                if len(made) == updates:
                    break
        except FloatingPointError as error:
            diverged = str(error).partition("\n")[0]
        return Probe(
            *(arm, lr, tuple(watched.tensors), watched.layers),
            *(tuple(made), tuple(looks), diverged, round(time.monotonic() - start, 1)),
        )

    def _apply_from_now_on(self, scales: Path) -> None:
        """Have GradInit's probes take the scales in this file, as they were learned."""
        _leave_out_options(self._plan_cfg.task, but=APPLYING)
        _set(self._plan_cfg.task, "gradinit_scales", str(scales))

    def _plan(self) -> Plan:
        plan = make_plan(self._plan_cfg)
        assert plan is not None  # --gradinit is set
        return plan

    def _trainer(self, arm: Arm, lr: float, updates: int) -> Any:
        cfg = copy.deepcopy(self._cfg)
        with open_dict(cfg):
            cfg.optimization.lr = [lr]
            schedule = FixedLRScheduleConfig(warmup_updates=updates if arm.warmup else 0)
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


class Watched:
    """A trainer whose updates are measured, and whose model can be looked at between them.

    Attributes:
        tensors: the trained parameter tensors, by name.
        layers: the layers whose outputs were looked at, by name: the items of module lists that
            are called `layers`.
    """

    def __init__(self, trainer: Any, looked: Sequence[Any]) -> None:
        model = trainer.get_model()
        self.tensors: dict[str, Tensor] = {
            name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad
        }
        self.layers: tuple[str, ...] = ()
        self._layers: dict[str, nn.Module] = {
            f"{name}.{i}": layer
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "layers"
            for i, layer in enumerate(module)
        }
        self._trainer = trainer
        self._evaluate = TaskLoss(trainer)
        self._looked = [trainer._prepare_sample(sample)[0] for sample in looked]
        two_sided = hasattr(model, "encoder") and hasattr(model, "decoder")
        self._traded = [*map(_with_sources_traded, self._looked)] if two_sided else []

    def update(self, samples: Any) -> Update | None:
        """Make an update; None if the precision of the run made it void (overflow in fp16).

        Raises:
            FloatingPointError: loss, gradient or weights are not finite.
            GradInitError: memory ran out.
        """
        trainer, tensors = self._trainer, list(self.tensors.values())
        before = [tensor.detach().clone() for tensor in tensors]
        number, lr = trainer.get_num_updates(), trainer.get_lr()
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
        return Update(
            lr,
            _finite("loss", logged["loss"].avg),
            _finite("gradient", logged["gnorm"].avg if "gnorm" in logged else math.nan),
            _step_sizes(before, tensors),
        )

    def look(self) -> Look:
        """Look at the model, and leave no trace.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        trainer = self._trainer
        with deterministic(trainer.get_model(), trainer.get_criterion()), torch.no_grad():
            with _powers_of_outputs(self._layers) as powers:
                loss = self._loss(self._looked)
            source_bits = None
            if self._traded and None not in self._traded:
                source_bits = self._loss(self._traded) - loss
        self.layers = tuple(powers)
        shares = tuple(power.token_share() for power in powers.values())
        return Look(trainer.get_num_updates(), loss, shares, source_bits)

    def _loss(self, samples: Sequence[Any]) -> float:
        """In bits per unit of sample size."""
        results = [self._evaluate(MicroBatch(np.empty(0), sample)) for sample in samples]
        total, size = (sum(map(float, column)) for column in zip(*results, strict=True))
        return _finite("loss", total / size / math.log(2))


@dataclass
class Power:
    """The power of a layer's outputs, added up over tokens.

    Attributes:
        squares: sum |x_t|^2.
        total: sum x_t, of shape (channels,), in double precision: what is left of a collapse may
            be less than fp32 sums resolve.
        tokens: how many there were.
    """

    squares: float = 0.0
    total: Tensor | float = 0.0
    tokens: int = 0

    def add(self, output: Tensor) -> None:
        """Count an output of any shape whose last dimension is the channels."""
        rows = output.detach().flatten(0, -2).double()
        self.squares += float(rows.square().sum())
        self.total = self.total + rows.sum(0)
        self.tokens += len(rows)

    def token_share(self) -> float:
        """1 - |mean x|^2 / mean |x|^2, which is 0 when every token has the same output."""
        common = float(torch.as_tensor(self.total).square().sum()) / self.tokens
        return max(0.0, 1 - common / self.squares) if self.squares else 0.0


@contextmanager
def _powers_of_outputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Power]]:
    """Of the layers that are called inside, by name in the order of the first call."""
    powers: dict[str, Power] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: Any) -> None:
            # Decoder layers return attention weights too.
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.dim() > 1:
                powers.setdefault(name, Power()).add(first)

        return hook

    handles = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    try:
        yield powers
    finally:
        for handle in handles:
            handle.remove()


def _with_sources_traded(sample: Any) -> Any:
    """Every sentence gets the source of the one before it, of the same length; None if alone."""
    given = sample.get("net_input") if isinstance(sample, dict) else None
    if given is None or "src_tokens" not in given or len(given["src_tokens"]) < 2:
        return None
    return {**sample, "net_input": {**given, "src_tokens": given["src_tokens"].roll(1, 0)}}


@torch.no_grad()
def _step_sizes(before: list[Tensor], after: list[Tensor]) -> tuple[float, ...]:
    """See `Update.step_sizes`; to four digits, of which there are thousands in a report."""
    now = [tensor.detach().float() for tensor in after]
    changes = torch._foreach_sub(now, [tensor.float() for tensor in before])
    norms = [torch.stack(torch._foreach_norm(each)) for each in (changes, now)]
    ratios = norms[0] / norms[1].clamp_min(torch.finfo(torch.float32).tiny)
    return tuple(float(f"{_finite('weights', ratio):.4g}") for ratio in ratios.tolist())


def _finite(what: str, value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise FloatingPointError(f"{what} not finite")
    return number


# ---- The command line.


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
