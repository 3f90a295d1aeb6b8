"""On which line of a TOML text each key is, which the standard library's parser does not tell.

``LineIndex.of`` walks over a text that the parser has already accepted, so it only has to know
where keys, strings, arrays and tables begin and end, and never whether they are right.

Recorded are table headers, arrays of tables, keys with each part of a dotted key, and the elements
of arrays. What is inside an inline table is not: such a path is on the line of the nearest
recorded one above it, which is the line of the inline table.
"""

from __future__ import annotations

import re
import tomllib
from typing import Final

from modelyard_server.config.problems import KeyPath

__all__ = ["LineIndex"]

_BLANK: Final = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_SPACE: Final = re.compile(r"[ \t]*")
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
# Three quotes first. Up to two quotes may stand before the closing three: they are content.
_STRING: Final = re.compile(
    r'"""(?:[^"\\]|\\.|"{1,2}(?!"))*"{3,5}'
    r"|'''(?:[^']|'{1,2}(?!'))*'{3,5}"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
# Numbers, booleans, dates: whatever ends at a separator. Outside of brackets a date may hold a
# space, and the value ends with the line.
_SCALAR_ON_LINE: Final = re.compile(r"[^#\n]*")
_SCALAR_IN_BRACKETS: Final = re.compile(r"[^\s,#=\[\]{}\"']+")

# No setting is that deep, and every part costs a path as long as all parts before it.
_PARTS_LIMIT: Final = 64


class LineIndex:
    """Line numbers of key paths, from 1. Immutable once made; may be shared between threads."""

    __slots__ = ("_lines",)

    def __init__(self, lines: dict[KeyPath, int]) -> None:
        self._lines = dict(lines)

    @classmethod
    def of(cls, text: str) -> LineIndex:
        """Index a text.

        Args:
            text: valid TOML. For anything else the result is meaningless, but there is one: no
                text makes this raise or loop.
        """
        # As the parser does, or offsets would differ.
        return cls(_Scanner(text.replace("\r\n", "\n")).scan())

    def line_of(self, path: KeyPath) -> int:
        """Return the line of a path or, if it is not recorded, of the nearest one above it.

        A path of which nothing is recorded, such as a table that is missing, is on line 1.
        """
        for length in range(len(path), 0, -1):
            line = self._lines.get(path[:length])
            if line is not None:
                return line
        return 1

    def __contains__(self, path: object) -> bool:
        """Whether exactly this path is recorded."""
        return path in self._lines

    def paths(self) -> tuple[KeyPath, ...]:
        """Return the recorded paths in the order in which they were first met."""
        return tuple(self._lines)


class _Scanner:
    """One walk over a text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._line = 1
        self._counted_to = 0
        self._table: KeyPath = ()
        # Elements so far of each array of tables.
        self._counts: dict[KeyPath, int] = {}
        self._lines: dict[KeyPath, int] = {}

    def scan(self) -> dict[KeyPath, int]:
        while True:
            self._skip(_BLANK)
            if self._position >= len(self._text):
                return self._lines
            start = self._position
            if self._text[start] == "[":
                self._header()
            else:
                self._key_value()
            # Only a text that is no TOML gets no further.
            self._position = max(self._position, start + 1)

    def _header(self) -> None:
        line = self._current_line()
        is_array = self._text.startswith("[[", self._position)
        self._position += 2 if is_array else 1
        parts = self._key()
        self._position += 2 if is_array else 1
        path: KeyPath = ()
        for part in parts[:-1]:
            path = self._latest((*path, part))
            self._record_above(path, line)
        path = (*path, *parts[-1:])
        if is_array:
            self._record_above(path, line)
            index = self._counts.get(path, 0)
            self._counts[path] = index + 1
            path = (*path, index)
        self._table = path
        # A header is where a table is, even if a sub-table has mentioned it before.
        self._lines[path] = line

    def _latest(self, path: KeyPath) -> KeyPath:
        """Return the path itself or, if it is an array of tables, its newest element."""
        count = self._counts.get(path)
        return path if count is None else (*path, count - 1)

    def _record_above(self, path: KeyPath, line: int) -> None:
        if path and isinstance(path[-1], int):
            path = path[:-1]
        self._lines.setdefault(path, line)

    def _key_value(self) -> None:
        line = self._current_line()
        path = self._table
        for part in self._key():
            path = (*path, part)
            self._lines.setdefault(path, line)
        self._skip(_SPACE)
        self._position += 1  # The equals sign.
        self._skip(_SPACE)
        self._value(path)

    def _key(self) -> list[str]:
        """Read a dotted key, up to what follows it; of a very long one only the beginning."""
        parts: list[str] = []
        while True:
            self._skip(_SPACE)
            if (bare := _BARE_KEY.match(self._text, self._position)) is not None:
                parts.append(bare[0])
            elif (string := _STRING.match(self._text, self._position)) is not None:
                parts.append(_unquoted(string[0]))
            else:
                return parts[:_PARTS_LIMIT]
            self._skip(_BARE_KEY if bare else _STRING)
            self._skip(_SPACE)
            if not self._text.startswith(".", self._position):
                return parts[:_PARTS_LIMIT]
            self._position += 1

    def _value(self, path: KeyPath) -> None:
        """Skip a value; if it is an array, record its elements."""
        # Not recursive: how deep values nest is up to whoever wrote the text.
        brackets: list[str] = []
        index = 0
        awaiting_element = False
        while self._position < len(self._text):
            if brackets:
                self._skip(_BLANK)
            char = self._text[self._position : self._position + 1]
            if awaiting_element and char not in {"]", ","}:
                self._lines[*path, index] = self._current_line()
                awaiting_element = False
            if char in {"[", "{"}:
                awaiting_element = not brackets and char == "["
                brackets.append(char)
                self._position += 1
            elif char in {"]", "}"}:
                self._position += 1
                if brackets:
                    brackets.pop()
            elif char == "," and brackets:
                if brackets == ["["]:
                    index += 1
                    awaiting_element = True
                self._position += 1
            elif char == "=" and brackets:
                self._position += 1
            elif (string := _STRING.match(self._text, self._position)) is not None:
                self._position = string.end()
            else:
                scalar = _SCALAR_IN_BRACKETS if brackets else _SCALAR_ON_LINE
                start = self._position
                self._skip(scalar)
                self._position = max(self._position, start + 1 if brackets else start)
            if not brackets:
                return

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self._text, self._position)
        if match is not None:
            self._position = match.end()

    def _current_line(self) -> int:
        # Counted from where the last count ended, or long texts would take quadratic time.
        self._line += self._text.count("\n", self._counted_to, self._position)
        self._counted_to = self._position
        return self._line


def _unquoted(string: str) -> str:
    if string.startswith("'"):
        return string[1:-1]
    try:
        # The escapes of a key are those of a value; let the parser read them.
        return str(tomllib.loads(f"key = {string}")["key"])
    except tomllib.TOMLDecodeError:
        return string
