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


def require_writable(save_dir: str) -> None:
    """Raise GradInitError for a checkpoint folder in which no file can be made."""
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
    """Hold model and criterion in fp32; the parameters keep their identity."""
    modules = trained_modules(trainer).values() if trainer.cfg.common.fp16 else ()
    for module in modules:
        module.float()
    try:
        yield
    finally:
        for module in modules:
            module.half()


def settings_digest(cfg: Any, section: str) -> str:
    """Eight hexadecimal digits that change with what a section of the configuration says.

    Legacy models and criteria have the whole command line; what belongs to other sections is left
    out, since it may change while a run goes on. So are paths.
    """
    found = getattr(cfg, section)
    if isinstance(found, Namespace):
        groups = (cfg[name] for name in cfg if name not in ("model", "criterion"))
        elsewhere = {key for group in groups if isinstance(group, DictConfig) for key in group}
        values = {key: value for key, value in vars(found).items() if key not in elsewhere}
    else:
        values = cast(dict[str, Any], OmegaConf.to_container(found, resolve=True))
    kept = {k: v for k, v in values.items() if not (isinstance(v, str) and os.sep in v)}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
