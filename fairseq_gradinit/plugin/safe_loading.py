"""Let torch's safe loader read fairseq's checkpoints.

Since torch 2.6 `torch.load` builds only objects of classes it was told to trust. Listed here is
what fairseq, from 0.10 on, puts beside its tensors; nothing else is trusted. Enumerations are
missing because fairseq saves them as strings, and its own could not be pickled.
"""

from __future__ import annotations

import argparse
import collections
import pickle
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from fairseq_gradinit.errors import GradInitError, said_by


class BrokenCheckpoint(GradInitError):
    """A file that can be read does not hold a checkpoint, or not the whole of one."""


class _DType:
    """Read in place of `numpy.dtype`, and only for numbers.

    numpy believes the state that a pickle gives a dtype. With forged fields in it, bytes of an
    array become addresses of objects, which may be code.

    Attributes:
        numpy: the dtype.
    """

    numpy: np.dtype[Any]

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch("b1|[iu][1248]|f[248]", code):
            raise pickle.UnpicklingError(f"a numpy.dtype of {code!r}, which is no kind of number")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # What follows the byte order is empty for numbers.
        self.numpy = self.numpy.newbyteorder(state[1])


class _Array(np.ndarray[Any, Any]):
    """Read in place of `numpy.ndarray`; what is computed from it or saved is numpy's own."""

    def __new__(cls, *_: object) -> _Array:
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, fortran, data = state
        # A second filling would free memory that tensors may share by then.
        if self.size or not isinstance(dtype, _DType):
            raise pickle.UnpicklingError("a numpy.ndarray that numpy would not have written")
        super().__setstate__((version, shape, dtype.numpy, fortran, data))

    def __reduce__(self) -> Any:
        return np.asarray(self).__reduce__()

    def __array_wrap__(self, array: Any, *_: object) -> Any:
        return np.asarray(array)[()]


def _scalar(dtype: object, data: bytes) -> Any:
    """Read in place of numpy's function of that name."""
    if not isinstance(dtype, _DType):
        raise pickle.UnpicklingError("a numpy scalar that numpy would not have written")
    (value,) = np.frombuffer(data, dtype.numpy)
    return value


# Options: all of them in 0.10, those of legacy models and tasks later.
NAMESPACES = (argparse.Namespace,)

# Counts that --eval-bleu adds up are arrays; accuracies and scores, and with them the best
# validation result, can be scalars. NumPy 2 has another name for the module.
NUMBERS: tuple[tuple[Callable[..., Any], str], ...] = (
    (_DType, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
)


def allow_fairseq_checkpoints() -> None:
    """Add what is in fairseq's checkpoints to what torch may load; imports fairseq."""
    from fairseq.data.dictionary import Dictionary
    from omegaconf import AnyNode, DictConfig, ListConfig
    from omegaconf.base import ContainerMetadata, Metadata

    _allow_without_fairseq()
    torch.serialization.add_safe_globals(
        [
            # The state of tasks on audio: their labels.
            Dictionary,
            # The configuration, where fairseq's main branch saved it from October 2020 to March
            # 2021; then came plain dictionaries.
            *(DictConfig, ListConfig, AnyNode, ContainerMetadata, Metadata),
            *(collections.defaultdict, dict, list, int, (typing.Any, "typing.Any")),
        ]
    )


def _allow_without_fairseq() -> None:
    torch.serialization.add_safe_globals([*NAMESPACES, *NUMBERS])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, its tensors on the CPU.

    Raises:
        BrokenCheckpoint: there is something else in the file, or it was cut off.
        GradInitError: the file cannot be read, or holds an object of a class that is not trusted.
    """
    try:
        with path.open("rb") as file:
            document = _load(file)
    except OSError as error:
        raise GradInitError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # What is no checkpoint ends in errors of many kinds.
        kind = GradInitError if "Unsupported global" in str(error) else BrokenCheckpoint
        raise kind(f"cannot read the checkpoint {path}: {said_by(error)}") from error
    if not isinstance(document, dict):
        raise BrokenCheckpoint(f"{path} is no checkpoint: it holds no dictionary")
    return document


def _load(file: IO[bytes]) -> Any:
    _allow_without_fairseq()
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Importing fairseq takes seconds, and few checkpoints need it.
        if not re.search(r"GLOBAL (fairseq|omegaconf)\.", str(error)):
            raise
    allow_fairseq_checkpoints()
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)
