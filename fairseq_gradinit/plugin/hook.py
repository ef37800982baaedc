"""Where the plugin takes hold of fairseq: the one file that changes fairseq's objects.

- The training parser gets the group of options: `--help` is printed before the task adds its own.
- Every task's configuration gets the same options as fields, also when a user dir registers it
  later. OmegaConf takes any value for them, so that wrong ones are answered by us.
- `call_main`, the entry of training on the command line and under hydra, checks the options
  before anything is built, and chooses the architecture that a scheme needs.
- `Trainer.begin_epoch`, the first call after the checkpoint is (or is not) loaded, runs the phase.

A GradInitError in the last two becomes a sentence and exit code 1.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed
from fairseq import options as fairseq_options
from fairseq import tasks
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer
from hydra.core.config_store import ConfigStore

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.loaded_weights import note_loaded_weights
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
    extend_tasks()
    _call_instead(fairseq_options, "add_optimization_args", _add_option_groups)
    _call_instead(tasks, "setup_task", _set_up_task)
    _call_instead(distributed_utils, "call_main", check_and_call_main)
    _call_instead(Trainer, "begin_epoch", _begin_epoch)


def _call_instead(holder: Any, name: str, ours: Callable[..., Any]) -> None:
    """Have calls of a function or method of fairseq's go to `ours`, which gets it beside them."""
    stock = getattr(holder, name)

    @functools.wraps(stock)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return ours(stock, *args, **kwargs)

    setattr(holder, name, wrapper)


def extend_tasks() -> None:
    """Give every task registered so far the options as fields; the same task once only."""
    for task_name, plain in list(tasks.TASK_DATACLASS_REGISTRY.items()):
        if issubclass(plain, GradInitOptions):
            continue
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


def _add_option_groups(add_optimization_args: Callable[..., Any], parser: Any) -> Any:
    extend_tasks()
    result = add_optimization_args(parser)
    groups = {"GradInit": GradInitOptions(), "Other initialisations": SchemeOptions()}
    for title, options in groups.items():
        gen_parser_from_dataclass(parser.add_argument_group(title), options)
    return result


def _set_up_task(setup_task: Callable[..., Any], cfg: Any, **kwargs: Any) -> Any:
    extend_tasks()
    task = setup_task(cfg, **kwargs)
    if getattr(cfg, "gradinit", False):
        note_loaded_weights(task)
    return task


@contextmanager
def _errors_as_sentences() -> Iterator[None]:
    """Tell the user what to mend, without a traceback, and leave with exit code 1."""
    try:
        yield
    except GradInitError as error:
        logger.error("GradInit: %s", error)
        if torch.distributed.is_initialized():
            # gloo's threads may abort an interpreter that ends in order after a collective failed.
            logging.shutdown()
            sys.stdout.flush()
            os._exit(1)
        sys.exit(1)


def check_and_call_main(call_main: Callable[..., Any], cfg: Any, main: Any, **kwargs: Any) -> Any:
    """Refuse what cannot work before anything is built."""
    with _errors_as_sentences():
        if make_plan(cfg) is not None:
            require_writable(cfg.checkpoint.save_dir)
        scheme = read_scheme(cfg)
        if scheme is not None and scheme.configure is not None:
            scheme.configure(cfg.model)
    return call_main(cfg, main, **kwargs)


def _begin_epoch(begin_epoch: Callable[..., Any], trainer: Any, epoch: int) -> Any:
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
