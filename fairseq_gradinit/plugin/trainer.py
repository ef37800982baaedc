"""What GradInit asks of fairseq's trainer, and does to it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from torch import nn

from fairseq_gradinit.engine import OneProcess, Processes, ProcessGroup
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.scales import SCALES_FILE


def weights_come_from_checkpoint(trainer: Any) -> bool:
    """Whether the run resumes, or starts from another run's weights."""
    return bool(trainer.get_num_updates() > 0 or trainer._optim_history)


def drop_copies(trainer: Any) -> None:
    """Have everything that holds the weights made again, once they have changed.

    These are the optimizer, its fp32 copies and the data-parallel wrapper; the trainer makes each
    of them when it is next asked for it. The moving average is first made by the first update.
    """
    trainer.reinitialize()


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
    try:
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        # Process numbers of containers that share the folder are not unique.
        with tempfile.NamedTemporaryFile(prefix=f".{SCALES_FILE}.", dir=save_dir):
            pass
    except OSError as error:
        raise GradInitError(
            f"cannot write to --save-dir {save_dir}: {error.strerror}; the scales and the "
            "checkpoints need a folder that can be written"
        ) from error


def trained_modules(trainer: Any) -> dict[str, nn.Module]:
    """All that training trains, by what the names of its tensors begin with."""
    return {"": trainer.get_model(), "criterion": trainer.get_criterion()}


def data_parallel_processes(trainer: Any) -> Processes:
    """The processes that train together."""
    if trainer.data_parallel_world_size > 1:
        return ProcessGroup(trainer.data_parallel_process_group)
    return OneProcess()


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


def settings_digest(cfg: Any, section: str) -> str:
    """Eight hexadecimal digits that change with what a section of the configuration says.

    Legacy models and criteria have the whole command line as theirs; of that, what belongs to other
    sections is left out, since it may change while a run goes on. So are paths.
    """
    found = getattr(cfg, section)
    values: dict[Any, Any] = {}
    if isinstance(found, DictConfig):
        values = cast(dict[Any, Any], OmegaConf.to_container(found, resolve=True))
    elif isinstance(found, Namespace):
        groups = (cfg[name] for name in cfg if name not in ("model", "criterion"))
        elsewhere = {key for group in groups if isinstance(group, DictConfig) for key in group}
        values = {key: value for key, value in vars(found).items() if key not in elsewhere}
    kept = {k: v for k, v in values.items() if not (isinstance(v, str) and os.sep in v)}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
