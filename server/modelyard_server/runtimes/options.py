"""Reads options and run parameters: one at a time, by name, until none may be left over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from modelyard_server.runtimes.api import JsonValue, OptionError

__all__ = ["OptionReader"]

_T = TypeVar("_T", bound=str)


class OptionReader:
    """Takes values out of options; `finish` refuses what nobody asked for.

    Numbers may come as floats of integral value: that is how the wire carries them.
    """

    def __init__(self, options: Mapping[str, JsonValue]) -> None:
        self._left = dict(options)
        self._known: list[str] = []

    def integer(self, name: str, default: int | None, *, low: int, high: int) -> int | None:
        """Takes an integer in low..high; None in the options means the default."""
        value = self._take(name)
        if value is None:
            return default
        number = _integral(value)
        if number is None or not low <= number <= high:
            raise OptionError(name, f"must be an integer from {low} to {high}")
        return number

    def number(self, name: str, default: float | None, *, low: float, high: float) -> float | None:
        """Takes a finite number in low..high."""
        value = self._take(name)
        if value is None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or not low <= value <= high
        ):
            raise OptionError(name, f"must be a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Takes true or false."""
        value = self._take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise OptionError(name, "must be true or false")
        return value

    def choice(self, name: str, choices: Sequence[_T], default: _T) -> _T:
        """Takes one of some words."""
        value = self._take(name)
        if value is None:
            return default
        for choice in choices:
            if value == choice:
                return choice
        raise OptionError(name, f"must be one of {', '.join(choices)}")

    def text(self, name: str) -> str | None:
        """Takes a text."""
        value = self._take(name)
        if value is not None and not isinstance(value, str):
            raise OptionError(name, "must be a text")
        return value

    def texts(self, name: str, *, limit: int) -> tuple[str, ...] | None:
        """Takes a list of distinct, non-empty texts; one text alone counts as a list of one."""
        value = self._take(name)
        if value is None:
            return None
        values = [value] if isinstance(value, str) else value
        if (
            not isinstance(values, list | tuple)
            or not all(isinstance(item, str) and item for item in values)
            or len(set(values)) != len(values)
            or not 1 <= len(values) <= limit
        ):
            raise OptionError(name, f"must be a list of 1 to {limit} different texts")
        return tuple(values)

    def list_of_texts(self, name: str) -> tuple[str, ...]:
        """Takes a list of any texts; empty if it is not there."""
        values = self._take(name)
        if values is None:
            return ()
        if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
            raise OptionError(name, "must be a list of texts")
        return tuple(values)

    def table(self, name: str) -> dict[str, JsonValue]:
        """Takes a table of values; empty if it is not there."""
        value = self._take(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise OptionError(name, "must be a table")
        return dict(value)

    def finish(self) -> None:
        """Checks that nothing is left.

        Raises:
            OptionError: for the first name that was not asked for.
        """
        for name in self._left:
            known = ", ".join(sorted(self._known)) or "none"
            raise OptionError(name[:64], f"is not known here; known are: {known}")

    def _take(self, name: str) -> JsonValue:
        self._known.append(name)
        return self._left.pop(name, None)


def _integral(value: JsonValue) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not value.is_integer():
        return None
    return int(value)
