"""google.protobuf.Struct to plain values."""

from __future__ import annotations

import math

from google.protobuf import struct_pb2

from modelyard_server.errors import Violation
from modelyard_server.runtimes.api import JsonValue
from modelyard_server.services.handler import invalid

__all__ = ["plain_values"]

_MOST_EXACT = 2**53
_MOST_NAME = 64


def plain_values(struct: struct_pb2.Struct, field: str) -> dict[str, JsonValue]:
    """The values of a Struct, as the configuration file would give them.

    A Struct knows one kind of number, so whole ones come back as int: as long as every int of their
    size has a double of its own.

    Args:
        struct: from the wire; its depth is bounded by the parser.
        field: where it stands in the request, for errors.

    Raises:
        Refusal: INVALID_FIELD for a number that is none, which JSON and TOML options cannot hold.
    """
    return {
        key: _plain(value, f"{field}.{key[:_MOST_NAME]}") for key, value in struct.fields.items()
    }


def _plain(value: struct_pb2.Value, field: str) -> JsonValue:
    # What is inside a value goes by its name: a path of its own for each item would cost more than
    # the items do.
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            if not math.isfinite(number):
                raise invalid(Violation(field, "must hold finite numbers only"))
            return int(number) if number.is_integer() and abs(number) <= _MOST_EXACT else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "struct_value":
            return {key: _plain(v, field) for key, v in value.struct_value.fields.items()}
        case "list_value":
            return [_plain(item, field) for item in value.list_value.values]
        case _:
            return None
