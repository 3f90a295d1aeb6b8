"""The protocol's messages, made from descriptors in a pool of their own.

Generated modules of the same messages are in other packages (clients of this protocol have them),
and protobuf's one pool for generated code refuses a second definition of a name. So here nothing is
generated: proto/inference is compiled to a descriptor set when modelyard is built, and read from
the package when the first message is asked for. In this pool the names clash with nobody's.

The classes are made at run time, so their fields have no types for a type checker.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = ["SERVICE", "enum_number", "message", "method_names"]

SERVICE = "inference.GRPCInferenceService"
"""Full name of the service."""

_FILE = "inference.binpb"


@cache
def message(name: str) -> type[Any]:
    """The class of a message.

    Args:
        name: in the package "inference": "ModelInferRequest".

    Raises:
        KeyError: there is no such message.
    """
    descriptor = _pool().FindMessageTypeByName(f"inference.{name}")
    return message_factory.GetMessageClass(descriptor)


@cache
def enum_number(enum: str, value: str) -> int:
    """The number of an enum's value.

    Raises:
        KeyError: there is no such enum or value.
    """
    number: int = _pool().FindEnumTypeByName(f"inference.{enum}").values_by_name[value].number
    return number


@cache
def method_names() -> tuple[str, ...]:
    """The methods of the service."""
    return tuple(method.name for method in _pool().FindServiceByName(SERVICE).methods)


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    files = descriptor_pb2.FileDescriptorSet()
    files.ParseFromString(resources.files(__package__).joinpath(_FILE).read_bytes())
    pool = descriptor_pool.DescriptorPool()
    # A file comes after those that it imports.
    for file in files.file:
        pool.Add(file)
    return pool
