"""JSON-like mappings as ``google.protobuf.Struct``, and back.

A Struct has one number type, a double. Integers come back as ``int``, and those a double cannot
hold are refused rather than rounded: a seed that is silently another seed helps nobody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, TypeAlias

from google.protobuf import struct_pb2

__all__ = ["JsonObject", "JsonValue", "struct_from", "struct_to_dict"]

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"
"""What JSON can say."""

JsonObject: TypeAlias = dict[str, JsonValue]
"""A mapping of JSON."""

# The server parses to a bounded depth as well; a mapping that holds itself ends here.
_MAX_DEPTH: Final = 32


def struct_from(mapping: Mapping[str, object], what: str) -> struct_pb2.Struct:
    """Return a mapping as a Struct.

    Args:
        mapping: keys are strings; values None, bool, int, float, str, and lists, tuples and
            mappings of these.
        what: what the mapping is, for the texts of errors.

    Raises:
        TypeError: anything else in it.
        ValueError: numbers that are not finite, integers a double cannot hold, or more than 32
            levels.
    """
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{what} must be a mapping, got {type(mapping).__name__}")
    struct = struct_pb2.Struct()
    _fill(struct, mapping, what, 0)
    return struct


def struct_to_dict(struct: struct_pb2.Struct) -> JsonObject:
    """Return the content of a Struct; whole numbers as ``int``."""
    return {key: _read(value) for key, value in struct.fields.items()}


def _fill(struct: struct_pb2.Struct, mapping: Mapping[str, object], what: str, depth: int) -> None:
    for key, value in mapping.items():
        # Of a nested mapping nothing is known yet.
        if not isinstance(key, str):
            raise TypeError(f"the keys of {what} must be str, got {type(key).__name__}")
        _set(struct.fields[key], value, f"{what}[{key!r}]", depth)


def _set(target: struct_pb2.Value, value: object, what: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"more than {_MAX_DEPTH} levels: a mapping or list that holds itself?")
    match value:
        case None:
            target.null_value = struct_pb2.NULL_VALUE
        case bool():
            target.bool_value = value
        case int() | float():
            target.number_value = _double(value, what)
        case str():
            target.string_value = value
        case Mapping():
            # SetInParent: empty is not absent.
            target.struct_value.SetInParent()
            _fill(target.struct_value, value, what, depth + 1)
        case list() | tuple():
            target.list_value.SetInParent()
            for index, item in enumerate(value):
                _set(target.list_value.values.add(), item, f"{what}[{index}]", depth + 1)
        case _:
            raise TypeError(
                f"{what} is a {type(value).__name__}: use None, bool, int, float, str, list or dict"
            )


def _double(value: int | float, what: str) -> float:
    try:
        double = float(value)
    except OverflowError:
        double = math.inf
    if not math.isfinite(double) or double != value:
        raise ValueError(f"{what} is {value!r}, which no finite double-precision number can hold")
    return double


def _read(value: struct_pb2.Value) -> JsonValue:
    match value.WhichOneof("kind"):
        case "bool_value":
            return value.bool_value
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "string_value":
            return value.string_value
        case "struct_value":
            return struct_to_dict(value.struct_value)
        case "list_value":
            return [_read(item) for item in value.list_value.values]
        case _:
            return None
