"""How much of a device models may hold together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Final

from modelyard_server.devices.sizes import MAX_SIZE_BYTES, format_size, parse_size

__all__ = ["Budget"]

_PERCENT: Final = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?) ?%")
_QUOTE_LIMIT: Final = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bytes, or a percentage of what the device has.

    Args:
        size_bytes: 1 to ``MAX_SIZE_BYTES``, or None.
        percent: above 0, at most 100, or None.

    Raises:
        ValueError: both or neither given, or one out of range.
    """

    size_bytes: int | None = None
    percent: Decimal | None = None

    def __post_init__(self) -> None:
        if (self.size_bytes is None) == (self.percent is None):
            raise ValueError("a budget is bytes or a percentage: give exactly one of them")
        if self.size_bytes is not None and not 1 <= self.size_bytes <= MAX_SIZE_BYTES:
            raise ValueError(f"must be at least 1 byte and at most {MAX_SIZE_BYTES} bytes")
        if self.percent is not None and not 0 < self.percent <= 100:
            raise ValueError(f"must be above 0% and at most 100%, got {self.percent}%")

    @staticmethod
    def from_str(text: str) -> Budget:
        """Read ``300MB``, ``1.5GiB`` or ``50%``.

        Raises:
            TypeError: ``text`` is no str.
            ValueError: it is no size and no percentage, or out of range.
        """
        if not isinstance(text, str):
            raise TypeError(f"a budget must be given as text, got {type(text).__name__}")
        if "%" in text:
            match = _PERCENT.fullmatch(text)
            if match is None:
                shown = repr(text[:_QUOTE_LIMIT])
                raise ValueError(f'{shown} is no percentage: write for example "50%" or "12.5%"')
            return Budget(percent=Decimal(match[1]))
        return Budget(size_bytes=parse_size(text))

    def resolve(self, total_bytes: int) -> int:
        """Return the budget in bytes.

        Args:
            total_bytes: what the device has; at least 0. Only a percentage looks at it: whether
                bytes that were asked for are there is for the caller to judge.

        Returns:
            Bytes, rounded down, so that 100% is never more than there is.

        Raises:
            ValueError: ``total_bytes`` is negative.
        """
        if total_bytes < 0:
            raise ValueError(f"a device has at least 0 bytes, got {total_bytes}")
        if self.percent is None:
            # __post_init__ let exactly one of the two through.
            return self.size_bytes or 0
        return int(Fraction(self.percent) * total_bytes / 100)

    def __str__(self) -> str:
        """Return text that ``from_str`` reads as an equal budget."""
        if self.percent is not None:
            return f"{self.percent}%"
        return format_size(self.size_bytes or 0, exact=True)
