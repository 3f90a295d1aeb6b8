"""Tensors of the protocol's messages to tensors inside, and back. Pure; trusts no length.

A tensor's elements come in one of two ways. *Raw*: little-endian and row-major in an entry of the
request's raw_input_contents; of BYTES every element is its length, a little-endian uint32, and then
so many bytes. *Typed*: in the field of the tensor's `contents` that goes with its type.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from struct import Struct, error
from sys import byteorder
from typing import Any, Final

from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue, element_count
from modelyard_server.services.oip.datatypes import DATATYPES, Datatype, datatype_of

__all__ = ["as_text", "from_raw", "from_typed", "raw_of", "to_typed"]

_LENGTH: Final = Struct("<I")
_PART: Final = 4_096
"""Elements that are joined at a time: a join takes 80 bytes for each."""

_MOST_ELEMENT_BYTES: Final = 2**32 - 1

# Typecodes of array, which are checked against the sizes that they have on this machine.
_CODES: Final = {
    DType.BOOL: "b",
    DType.INT8: "b",
    DType.INT16: "h",
    DType.INT32: "i",
    DType.INT64: "q",
    DType.UINT8: "B",
    DType.UINT16: "H",
    DType.UINT32: "I",
    DType.UINT64: "Q",
    DType.FLOAT32: "f",
    DType.FLOAT64: "d",
}


# --- From messages --------------------------------------------------------------------------------


def from_raw(name: str, datatype: str, shape: Iterable[int], raw: bytes) -> TensorValue:
    """A tensor whose elements came raw.

    Args:
        name: what the model calls it.
        datatype: the protocol's name of its type.
        shape: sizes of its dimensions.
        raw: its elements.

    Raises:
        TensorError: an unknown type, or type, shape and content disagree.
    """
    sizes = tuple(shape)
    known = _known(name, datatype)
    if known.dtype is not DType.BYTES:
        return TensorValue(name=name, dtype=known.dtype, shape=sizes, data=raw)
    data = _split(name, raw, element_count(name, sizes))
    return TensorValue(name=name, dtype=DType.BYTES, shape=sizes, data=data)


def from_typed(name: str, datatype: str, shape: Iterable[int], contents: Any) -> TensorValue:
    """A tensor whose elements came in the field of their type.

    Args:
        name: what the model calls it.
        datatype: the protocol's name of its type.
        shape: sizes of its dimensions.
        contents: an InferTensorContents.

    Raises:
        TensorError: an unknown type, one that only travels raw, elements in another type's field or
            that the type cannot hold, or more or fewer of them than the shape has.
    """
    sizes = tuple(shape)
    known = _known(name, datatype)
    for field, _ in contents.ListFields():
        if field.name != known.field:
            where = f"`{known.field}`" if known.field else "raw_input_contents"
            raise TensorError(name, f"{datatype} elements belong in {where}, not in `{field.name}`")
    if not known.field:
        raise TensorError(name, f"{datatype} elements have no typed field; send them raw")
    values = getattr(contents, known.field)
    count = element_count(name, sizes)
    if len(values) != count:
        raise TensorError(
            name, f"shape {list(sizes)} needs {count} elements; {len(values)} were given"
        )
    if known.dtype is DType.BYTES:
        return TensorValue(name=name, dtype=DType.BYTES, shape=sizes, data=tuple(values))
    try:
        elements = array(_CODES[known.dtype], values)
    except OverflowError:
        raise TensorError(name, f"holds a number that is no {datatype}") from None
    return TensorValue(name=name, dtype=known.dtype, shape=sizes, data=_little(elements).tobytes())


def as_text(value: TensorValue) -> TensorValue:
    """A BYTES tensor as the TEXT that it is in UTF-8.

    Raises:
        TensorError: it is no UTF-8.
    """
    texts = []
    for index, element in enumerate(value.data):
        assert isinstance(element, bytes), "a BYTES tensor holds byte strings"
        try:
            texts.append(element.decode())
        except UnicodeDecodeError:
            raise TensorError(value.name, f"element {index} is not valid UTF-8") from None
    return TensorValue(name=value.name, dtype=DType.TEXT, shape=value.shape, data=tuple(texts))


def _known(name: str, datatype: str) -> Datatype:
    known = DATATYPES.get(datatype)
    if known is None:
        shown = datatype if len(datatype) <= 64 else f"{datatype[:61]}..."
        names = ", ".join(DATATYPES)
        raise TensorError(name, f"datatype {shown!r} is unknown; there are {names}")
    return known


def _split(name: str, raw: bytes, count: int) -> tuple[bytes, ...]:
    """The byte strings of a raw BYTES tensor."""
    # Each takes its length at least: a shape that lies is found out before it costs anything.
    if count * _LENGTH.size > len(raw):
        raise TensorError(
            name,
            f"{count} elements need at least {count * _LENGTH.size} bytes; {len(raw)} were given",
        )
    elements: list[bytes] = []
    # Millions of them may come: what the loop needs is at hand.
    add, unpack, size, end = elements.append, _LENGTH.unpack_from, _LENGTH.size, len(raw)
    at = 0
    try:
        for _ in range(count):
            (length,) = unpack(raw, at)
            begin = at + size
            at = begin + length
            if at > end:
                raise TensorError(
                    name,
                    f"element {len(elements)} is said to have {length} bytes; {end - begin} are "
                    "left",
                )
            add(raw[begin:at])
    except error:
        text = f"element {len(elements)} has no room for its length"
        raise TensorError(name, text) from None
    if at != end:
        raise TensorError(name, f"{end - at} bytes are left after its last element")
    return tuple(elements)


# --- To messages ----------------------------------------------------------------------------------


def raw_of(value: TensorValue) -> bytes:
    """The elements of a tensor, raw.

    Raises:
        ValueError: a byte string is longer than its length can say.
    """
    if isinstance(value.data, bytes):
        return value.data
    encoded = _encoded(value)
    if max(map(len, encoded), default=0) > _MOST_ELEMENT_BYTES:
        raise ValueError(f"an element of {value.name!r} is longer than {_MOST_ELEMENT_BYTES} bytes")
    return b"".join(_joined(encoded[at : at + _PART]) for at in range(0, len(encoded), _PART))


def _joined(elements: list[bytes]) -> bytes:
    """Elements with their lengths before them."""
    parts = [b""] * (2 * len(elements))
    parts[::2] = map(_LENGTH.pack, map(len, elements))
    parts[1::2] = elements
    return b"".join(parts)


def to_typed(value: TensorValue, contents: Any) -> bool:
    """Puts the elements of a tensor into the field of their type.

    Args:
        value: the tensor.
        contents: an empty InferTensorContents.

    Returns:
        False if there is no such field: it has to travel raw, and nothing was done.
    """
    known = datatype_of(value.dtype)
    if not known.field:
        return False
    field = getattr(contents, known.field)
    if not isinstance(value.data, bytes):
        field.extend(_encoded(value))
    elif value.dtype is DType.BOOL:
        field.extend(map(bool, value.data))
    else:
        elements = array(_CODES[value.dtype])
        elements.frombytes(value.data)
        field.extend(_little(elements))
    return True


def _encoded(value: TensorValue) -> list[bytes]:
    # A text may come from a model, and what a model writes need not be valid Unicode.
    return [
        element.encode(errors="replace") if isinstance(element, str) else element
        for element in value.data
        if isinstance(element, str | bytes)
    ]


def _little(elements: array[Any]) -> array[Any]:
    """The same numbers the other way round where this machine is big-endian."""
    if byteorder == "big":
        elements.byteswap()
    return elements
