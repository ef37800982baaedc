"""Frozen dataclasses from JSON, read with distrust."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from fairseq_gradinit.storage.files import abbreviate, require_finite, require_type

T = TypeVar("T")

_hints = functools.cache(get_type_hints)


def parse(kind: type[T], row: Any) -> T:
    """Read back what `dataclasses.asdict` and JSON made of an instance of `kind`.

    Args:
        kind: a dataclass whose fields are str, int, float, bool, Literal, dataclasses like it,
            tuples of these, of one kind and any length or of several kinds, mappings from str or
            Literal to one of these, or any of them or None.

    Raises:
        ValueError: a field is missing, unknown, or has a value that it cannot have; the message
            says which, as in `scores[0].bleu: 'high' is not a number`.
    """
    return cast(T, _dataclass(kind, row, ""))


def _dataclass(kind: Any, row: Any, place: str) -> Any:
    if not isinstance(row, Mapping):
        raise _wrong(place, f"{abbreviate(row)} is not an object")
    names = [field.name for field in fields(kind)]
    missing = [name for name in names if name not in row]
    unknown = [name for name in row if name not in names]
    if missing or unknown:
        what = [f"{name} is missing" for name in missing]
        what += [f"{abbreviate(name)[1:-1]} is unknown" for name in unknown[:5]]
        raise _wrong(place, ", ".join(what))
    hints = _hints(kind)
    dot = f"{place}." if place else ""
    return kind(**{name: _value(hints[name], row[name], f"{dot}{name}") for name in names})


def _value(kind: Any, value: Any, place: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (other,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _value(other, value, place)
    if origin is tuple:
        return _tuple(arguments, value, place)
    if origin is Mapping:
        return _mapping(arguments, value, place)
    if is_dataclass(kind):
        return _dataclass(kind, value, place)
    if origin is Literal:
        if value not in arguments:
            raise _wrong(place, f"{abbreviate(value)} is none of {', '.join(map(repr, arguments))}")
        return value
    try:
        if kind is float:
            return require_finite(value)
        return value if kind is bool and isinstance(value, bool) else require_type(value, kind)
    except (TypeError, ValueError, OverflowError) as error:
        raise _wrong(place, str(error)) from error


def _mapping(kinds: tuple[Any, ...], value: Any, place: str) -> dict[Any, Any]:
    key_kind, kind = kinds
    if not isinstance(value, dict):
        raise _wrong(place, f"{abbreviate(value)} is not an object")
    return {
        _value(key_kind, key, place): _value(kind, item, f"{place}.{abbreviate(key)[1:-1]}")
        for key, item in value.items()
    }


def _tuple(kinds: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _wrong(place, f"{abbreviate(value)} is not an array")
    if kinds[1:] == (...,):
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise _wrong(place, f"{len(value)} values, not {len(kinds)}")
    pairs = zip(kinds, value, strict=True)
    return tuple(_value(kind, item, f"{place}[{i}]") for i, (kind, item) in enumerate(pairs))


def _wrong(place: str, what: str) -> ValueError:
    return ValueError(f"{place}: {what}" if place else what)
