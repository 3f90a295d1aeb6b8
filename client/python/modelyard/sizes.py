"""Sizes in bytes as people write them: ``300MB``, ``1.5GiB``.

``kB``, ``MB`` and so on are powers of 1000, ``KiB``, ``MiB`` and so on powers of 1024. The case of
a unit matters, because ``mb`` could be read as bits; a number without a unit is refused as text,
because ``300`` is more often a forgotten ``MB`` than 300 bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["MAX_SIZE_BYTES", "UNITS", "format_size", "parse_size"]

MAX_SIZE_BYTES: Final = 2**63 - 1
"""Largest size there is: sizes are signed 64-bit integers on the wire and in the core."""

UNITS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "B": 1,
        "kB": 1000,
        "KB": 1000,
        "MB": 1000**2,
        "GB": 1000**3,
        "TB": 1000**4,
        "PB": 1000**5,
        "KiB": 1024,
        "MiB": 1024**2,
        "GiB": 1024**3,
        "TiB": 1024**4,
        "PiB": 1024**5,
    }
)
"""Bytes of each unit."""

_SIZE: Final = re.compile(r"([0-9]{1,19})(\.[0-9]{1,9})? ?([A-Za-z]*)", re.ASCII)
_BINARY_UNITS: Final = ("PiB", "TiB", "GiB", "MiB", "KiB")
_QUOTE_LIMIT: Final = 40


def parse_size(text: str) -> int:
    """Read a size such as ``16MiB``, ``1.5 GiB`` or ``512B``.

    Args:
        text: ASCII digits, perhaps a fraction, perhaps one space, and a unit of ``UNITS``.

    Returns:
        Bytes. A fraction of a byte is dropped, so that the size is never more than was written.

    Raises:
        TypeError: ``text`` is no str.
        ValueError: it is no size, or more than ``MAX_SIZE_BYTES``.
    """
    if not isinstance(text, str):
        raise TypeError(f"a size must be given as text, got {_quoted(text)}")
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{_quoted(text)} is no size: write a number and a unit, such as '300MB' or '1.5GiB'"
        )
    whole, fraction, unit = match[1], match[2] or "", match[3]
    if not unit:
        raise ValueError(
            f"{_quoted(text)} has no unit: write for example '{whole}MB' or '{whole}B'"
        )
    factor = UNITS.get(unit)
    if factor is None:
        raise ValueError(f"unknown unit {_quoted(unit)}: {_advice(unit)}")
    # Integers only: a float would lose the last digits of large sizes.
    decimals = fraction.removeprefix(".")
    size_bytes = int(whole + decimals) * factor // int("1" + "0" * len(decimals))
    if size_bytes > MAX_SIZE_BYTES:
        raise ValueError(f"{_quoted(text)} is more than the largest size, {MAX_SIZE_BYTES} bytes")
    return size_bytes


def format_size(size_bytes: int, *, exact: bool = False) -> str:
    """Write a size so that ``parse_size`` reads it.

    Args:
        size_bytes: 0 to ``MAX_SIZE_BYTES``.
        exact: False rounds to four significant digits of a binary unit, for people
            (``286.1MiB``). True gives the shortest text that is read back as the very same number,
            for files (``300MB``).

    Raises:
        ValueError: ``size_bytes`` is out of range.
    """
    if not 0 <= size_bytes <= MAX_SIZE_BYTES:
        raise ValueError(f"a size is 0 to {MAX_SIZE_BYTES} bytes, got {size_bytes}")
    return min(_exact_texts(size_bytes), key=len) if exact else _rounded_text(size_bytes)


def _rounded_text(size_bytes: int) -> str:
    for unit in reversed(_BINARY_UNITS):
        value = size_bytes / UNITS[unit]
        if value < 1:
            return f"{size_bytes}B"
        if value < 1024 or unit == "PiB":
            if value >= 999.95:
                # Whole units, rounded down: up could be 1024 of them, or above the largest size.
                return f"{size_bytes // UNITS[unit]}{unit}"
            digits = 3 if value < 9.9995 else 2 if value < 99.995 else 1
            return f"{_trimmed(f'{value:.{digits}f}')}{unit}"
    raise AssertionError("the largest unit takes every size")


def _exact_texts(size_bytes: int) -> Iterator[str]:
    """Yield the ways to write a size without loss, larger units first."""
    for unit, factor in sorted(UNITS.items(), key=lambda item: -item[1]):
        if unit == "KB" or factor > size_bytes:
            continue
        billionths, remainder = divmod(size_bytes * 10**9, factor)
        if remainder == 0:
            number = f"{billionths // 10**9}.{billionths % 10**9:09d}"
            yield f"{_trimmed(number)}{unit}"
    yield f"{size_bytes}B"


def _trimmed(number: str) -> str:
    return number.rstrip("0").rstrip(".") if "." in number else number


def _advice(unit: str) -> str:
    for known in UNITS:
        if known.lower() == unit.lower() or known.lower() == f"{unit.lower()}b":
            return f"write '{known}'"
    return f"use one of {', '.join(UNITS)}"


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _QUOTE_LIMIT else f"{text[:_QUOTE_LIMIT]}..."
