"""Where the plugin takes hold of fairseq: the one file that changes fairseq's objects.

Four places, each passing through to fairseq's own code when neither --gradinit nor --init-scheme
is given:

- the training parser gets the group of options (`--help` shows only what is there before the task
  adds its own);
- every task's configuration gets the same options as fields, also when a user dir registers the
  task later: by the time the command line is read or the task is set up. OmegaConf takes any value
  for them, so that wrong ones are answered by us. With --gradinit the task notes which parameters
  its model loads from files;
- `call_main`, the entry of training on the command line and under hydra, checks the options
  before anything is built, and chooses the architecture that a scheme needs;
- `Trainer.begin_epoch`, the first call after the checkpoint is (or is not) loaded, runs the phase.

A GradInitError in the last two, or in `check_options`, becomes a sentence and exit code 1.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch.distributed
from fairseq import options as fairseq_options
from fairseq import tasks
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.loaded_weights import note_loaded_weights
from fairseq_gradinit.plugin.option_values import read_value
from fairseq_gradinit.plugin.options import GradInitOptions
from fairseq_gradinit.plugin.phase import run_phase
from fairseq_gradinit.plugin.plan import make_plan
from fairseq_gradinit.plugin.schemes.options import SchemeOptions, read_scheme, run_scheme
from fairseq_gradinit.plugin.trainer import require_writable

logger = logging.getLogger("fairseq_gradinit")

OUR_OPTIONS = {
    option.name: option
    for kind in (GradInitOptions, SchemeOptions)
    for option in dataclasses.fields(kind)
    if option.name != "_name"
}


def install() -> None:
    """Take hold of fairseq; call it once in each process."""
    fairseq_options.add_optimization_args = _with_option_group(
        fairseq_options.add_optimization_args
    )
    extend_tasks()
    tasks.setup_task = _with_fields(tasks.setup_task)
    distributed_utils.call_main = _with_checks(distributed_utils.call_main)
    Trainer.begin_epoch = _with_phase(Trainer.begin_epoch)


def extend_tasks() -> None:
    """Give every task registered so far the options as fields; the same task once only."""
    for name in list(tasks.TASK_DATACLASS_REGISTRY):
        _add_fields(name)


def _with_option_group(add_optimization_args: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(add_optimization_args)
    def wrapper(parser: Any) -> Any:
        extend_tasks()
        result = add_optimization_args(parser)
        gen_parser_from_dataclass(parser.add_argument_group("GradInit"), GradInitOptions())
        gen_parser_from_dataclass(
            parser.add_argument_group("Other initialisations"), SchemeOptions()
        )
        return result

    return wrapper


def _add_fields(task_name: str) -> None:
    """Give the configuration of a registered task the fields of our options."""
    plain = tasks.TASK_DATACLASS_REGISTRY[task_name]
    if issubclass(plain, GradInitOptions):
        return
    extended = dataclasses.make_dataclass(
        plain.__name__,
        [
            (name, Any, dataclasses.field(default=option.default, metadata=option.metadata))
            for name, option in OUR_OPTIONS.items()
        ],
        bases=(GradInitOptions, SchemeOptions, plain),
        namespace={"_get_type": _type_on_command_line},
    )
    extended.__module__, extended.__doc__ = plain.__module__, plain.__doc__
    tasks.TASK_DATACLASS_REGISTRY[task_name] = extended
    setattr(tasks.TASK_REGISTRY[task_name], "__dataclass", extended)
    node = extended()
    node._name = task_name
    ConfigStore.instance().store(name=task_name, group="task", node=node, provider="fairseq")


def _type_on_command_line(self: Any, name: str) -> Any:
    """What fairseq makes parsers by."""
    return (OUR_OPTIONS.get(name) or self.__dataclass_fields__[name]).type


def check_options(task_cfg: Any) -> None:
    """Answer wrong names and values of our options in a configuration as any mistake is."""
    with _errors_as_sentences():
        for name in map(str, task_cfg if isinstance(task_cfg, DictConfig) else ()):
            if name.startswith(("gradinit", "init_scheme")) and name not in OUR_OPTIONS:
                close = difflib.get_close_matches(name, OUR_OPTIONS, n=1)
                meant = f": did you mean {close[0]}?" if close else ""
                raise GradInitError(f"there is no option {name}{meant}")
        for option in OUR_OPTIONS.values():
            read_value(option, task_cfg)


def _with_fields(setup_task: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(setup_task)
    def wrapper(cfg: Any, **kwargs: Any) -> Any:
        extend_tasks()
        task = setup_task(_without_old_type(cfg), **kwargs)
        if getattr(cfg, "gradinit", False):
            note_loaded_weights(task)
        return task

    return wrapper


def _without_old_type(cfg: Any) -> Any:
    """A task's configuration, which fits its dataclass although that has been extended since."""
    kind = OmegaConf.get_type(cfg) if isinstance(cfg, DictConfig) else None
    if kind is None:
        return cfg
    extended = tasks.TASK_DATACLASS_REGISTRY.get(cfg.get("_name"))
    if extended is None or extended is kind or not issubclass(extended, kind):
        return cfg
    untyped = OmegaConf.create(OmegaConf.to_container(cfg))
    # Some of its values refer to others beside it.
    untyped._set_parent(cfg._get_parent())
    return untyped


@contextmanager
def _errors_as_sentences() -> Iterator[None]:
    """Tell the user what to mend, without a traceback, and leave with exit code 1."""
    try:
        yield
    except GradInitError as error:
        logger.error("GradInit: %s", error)
        _exit(1)


def _exit(code: int) -> NoReturn:
    if torch.distributed.is_initialized():
        # gloo's threads may abort an interpreter that ends in order after a collective has failed.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _with_checks(call_main: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call_main)
    def wrapper(cfg: Any, main: Any, **kwargs: Any) -> Any:
        with _errors_as_sentences():
            if make_plan(cfg) is not None:
                require_writable(cfg.checkpoint.save_dir)
            scheme = read_scheme(cfg)
            if scheme is not None and scheme.configure is not None:
                scheme.configure(cfg.model)
        return call_main(cfg, main, **kwargs)

    return wrapper


def _with_phase(begin_epoch: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(begin_epoch)
    def wrapper(trainer: Any, epoch: int) -> Any:
        if not getattr(trainer, "_gradinit_done", False):
            # Here and not around all of training: this may be one of several processes.
            with _errors_as_sentences():
                scheme = read_scheme(trainer.cfg)
                if scheme is not None:
                    run_scheme(trainer, scheme)
                plan = make_plan(trainer.cfg)
                if plan is not None:
                    run_phase(trainer, plan)
            trainer._gradinit_done = True
        return begin_epoch(trainer, epoch)

    return wrapper
