"""Frozen dataclasses from JSON, checked field by field."""

from __future__ import annotations

import functools
import reprlib
import sys
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

_hints = functools.cache(get_type_hints)

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 60, 60, 40


def abbreviate(value: Any) -> str:
    """`value` in a few characters, however large or deep it is."""
    return _SHORT.repr(value)


def parse(kind: type[T], row: Any) -> T:
    """Read back what `dataclasses.asdict` and JSON made of an instance of `kind`.

    Its fields may be str, int, float, bool, Literal, dataclasses like it, tuples of these, mappings
    from str or Literal to one of these, or any of them or None.

    Raises:
        ValueError: a field is missing, unknown, or has a value that it cannot have; the message
            says which, as in `scores[0].bleu: 'high' is not a number`.
    """
    return cast(T, _dataclass(kind, row, ""))


def _dataclass(kind: Any, row: Any, place: str) -> Any:
    hints = _hints(kind)
    _require(isinstance(row, dict), place, f"{abbreviate(row)} is not an object")
    wrong = [f"{name} is missing" for name in hints if name not in row]
    wrong += [f"{name} is unknown" for name in row if name not in hints]
    _require(not wrong, place, ", ".join(wrong))
    dot = f"{place}." if place else ""
    return kind(**{name: _value(hints[name], row[name], f"{dot}{name}") for name in hints})


def _value(kind: Any, value: Any, place: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (other,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _value(other, value, place)
    if is_dataclass(kind):
        return _dataclass(kind, value, place)
    if origin is tuple:
        _require(isinstance(value, list), place, f"{abbreviate(value)} is not an array")
        kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        _require(len(kinds) == len(value), place, f"{len(value)} values, not {len(kinds)}")
        return tuple(_value(kinds[i], item, f"{place}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        _require(isinstance(value, dict), place, f"{abbreviate(value)} is not an object")
        keys, values = arguments
        return {
            _value(keys, key, place): _value(values, item, f"{place}.{key}")
            for key, item in value.items()
        }
    if origin is Literal:
        known = ", ".join(map(repr, arguments))
        _require(value in arguments, place, f"{abbreviate(value)} is none of {known}")
        return value
    if kind is float:
        _require(type(value) in (int, float), place, f"{abbreviate(value)} is not a number")
        finite = abs(value) <= sys.float_info.max
        _require(finite, place, f"{abbreviate(value)} is not a finite number")
        return float(value)
    _require(type(value) is kind, place, f"{abbreviate(value)} is not of type {kind.__name__}")
    return value


def _require(right: bool, place: str, otherwise: str) -> None:
    if not right:
        raise ValueError(f"{place}: {otherwise}" if place else otherwise)
