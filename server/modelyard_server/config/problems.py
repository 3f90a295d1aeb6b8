"""What is wrong with a configuration, and where."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

__all__ = ["ConfigError", "KeyPath", "Problem", "key_text", "quoted"]

KeyPath: TypeAlias = tuple[str | int, ...]
"""Where a value is: table keys, and indexes of arrays. The empty path is the whole file."""

_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_QUOTE_LIMIT: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    Args:
        key: where, as one would write it in TOML, with indexes of arrays from 0
            (``models.sentiment.device``, ``devices[0].budget``); empty for the file as a whole.
        line: line in the file, from 1.
        text: what is wrong and what to do.
    """

    key: str
    line: int
    text: str

    def describe(self, source: str) -> str:
        """Return ``SOURCE:LINE: key: text``, the form that editors can jump to."""
        return f"{source}:{self.line}: {self}"

    def __str__(self) -> str:
        return f"{self.key}: {self.text}" if self.key else self.text


class ConfigError(ValueError):
    """A configuration that cannot be used, with everything that is wrong with it.

    Args:
        problems: at least one; kept in the order of their lines.
        source: the file, if there is one.
    """

    def __init__(self, problems: Iterable[Problem], *, source: Path | None = None) -> None:
        self.problems: tuple[Problem, ...] = tuple(sorted(problems, key=lambda found: found.line))
        self.source = source
        name = "line" if source is None else str(source)
        super().__init__("\n".join(problem.describe(name) for problem in self.problems))


def key_text(path: Sequence[str | int]) -> str:
    """Return a key path as one would write it in TOML, on one line and of bounded length."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if _BARE_KEY.fullmatch(part) else f'"{_escaped(part)}"'
            text += f".{_shortened(name)}" if text else _shortened(name)
    return text


def quoted(value: object) -> str:
    """Return a value for an error's text: on one line, without control characters, short."""
    return _shortened(f'"{_escaped(value)}"' if isinstance(value, str) else repr(value))


def _escaped(text: str) -> str:
    return "".join(
        char if char.isprintable() and char not in '"\\' else _ascii_escape(char)
        for char in text[: _QUOTE_LIMIT + 1]
    )


def _ascii_escape(char: str) -> str:
    """Return one character as its escape sequence."""
    return f"\\{char}" if char in '"\\' else char.encode("unicode_escape").decode("ascii")


def _shortened(text: str) -> str:
    return text if len(text) <= _QUOTE_LIMIT else f"{text[:_QUOTE_LIMIT]}..."
