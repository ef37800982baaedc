"""Values of options as people write them, in YAML too, where `off` is a boolean."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import Enum
from types import NoneType
from typing import Any, get_args

from omegaconf import ListConfig
from omegaconf.errors import OmegaConfBaseException

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.storage import abbreviate

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
# Which choice a boolean stands for, where an option has it.
_CHOICES = {True: ("on", "learned"), False: ("off", "fixed")}


def read_value(option: dataclasses.Field[Any], task_cfg: Any) -> Any:
    """The value of an option in a task's configuration, by the option's type; None if not given.

    Choices come as text, and lists too: their elements with commas between them.

    Args:
        option: of one of our dataclasses, which say the types.
        task_cfg: a DictConfig, or (legacy tasks) a Namespace.

    Raises:
        GradInitError: the value is none of this type, or has a reference that leads nowhere.
    """
    flag = "--" + option.name.replace("_", "-")
    try:
        value = getattr(task_cfg, option.name, None)
        if value is None:
            return None
        (kind,) = [kind for kind in get_args(option.type) if kind is not NoneType] or [option.type]
        return _choice(kind, value) if issubclass(kind, Enum) else _READERS[kind](value)
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        raise GradInitError(f"{flag} cannot be read from the configuration: {reason}") from error
    except _NotOfThisType as error:
        raise GradInitError(f"{flag} must be {error}, not {abbreviate(value)}") from error


class _NotOfThisType(Exception):
    """A value is not what the message says."""


def _boolean(value: Any) -> bool | None:
    if isinstance(value, str):
        return _WORDS.get(value.lower())
    return bool(value) if isinstance(value, int) and value in (0, 1) else None


def _choice(kind: type[Enum], value: Any) -> str:
    choices = [str(member.value) for member in kind]
    meant = () if (known := _boolean(value)) is None else _CHOICES[known]
    for text in (value, *meant):
        if text in choices:
            return str(text)
    raise _NotOfThisType(f"one of {', '.join(choices)}")


def _switch(value: Any) -> bool:
    if (known := _boolean(value)) is None:
        raise _NotOfThisType("true or false")
    return known


def _whole_number(value: Any) -> int:
    fractional = isinstance(value, float) and not value.is_integer()
    if not fractional and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return int(value)
        except ValueError:
            pass
    raise _NotOfThisType("a whole number")


def _number(value: Any) -> float:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (OverflowError, ValueError):
            pass
    raise _NotOfThisType("a number")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (Sequence, ListConfig)):
        return ",".join(map(str, value))
    raise _NotOfThisType("text")


_READERS = {bool: _switch, int: _whole_number, float: _number, str: _text}
