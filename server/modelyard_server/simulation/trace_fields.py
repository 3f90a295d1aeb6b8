"""What the columns of a CSV trace and the arrays of an archive are called, in either form.

Each has a name that says what it is, and most a short one, that of the shared traces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

__all__ = ["MEBIBYTE", "SHORT_NAMES", "bytes_of", "told_names", "twofold", "written_names"]

SHORT_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "time": "t",
        "model": "k",
        "execution_s": "e",
        "load_s": "cost_disk",
        "host_load_s": "cost_host",
    }
)
"""Of the fields that have one. Sizes are ``size_bytes`` or ``size_mb``, MiB."""

MEBIBYTE: Final = 1 << 20


def written_names(found: Sequence[str], fields: Sequence[str]) -> dict[str, str]:
    """Return how the fields are called that are among some names.

    Args:
        found: names in a file.
        fields: those to look for, by the names that say what they are.

    Returns:
        For each of the fields that is there the name it has there; with both, see ``twofold``, the
        longer one.
    """
    names = {}
    for field in fields:
        written = field if field in found else SHORT_NAMES.get(field, field)
        if written in found:
            names[field] = written
    return names


def twofold(found: Sequence[str]) -> str:
    """Return a field that is there by both of its names; empty if there is none."""
    both = (field for field, short in SHORT_NAMES.items() if field in found and short in found)
    return next(both, "")


def told_names(fields: Sequence[str]) -> str:
    """Return the names that some fields may have, for people."""
    short = [SHORT_NAMES[field] for field in fields if field in SHORT_NAMES]
    names = ", ".join(fields)
    return f"{names}; or, for what they mean, {', '.join(short)}" if short else names


def bytes_of(amount: float, unit: int) -> int:
    """Return the bytes of a finite amount of a unit, as many as a float can say."""
    # As integers: a float may be too large to be multiplied, and is refused with its own number.
    whole, rest = divmod(amount, 1.0)
    return int(whole) * unit + int(rest * unit)
