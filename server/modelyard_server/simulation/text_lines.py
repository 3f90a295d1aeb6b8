"""Lines of a text file of somebody's, and of which one it is that is not right."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Final

from modelyard_server.simulation.trace import TraceError

__all__ = ["MOST_LINE", "lines_of"]

MOST_LINE: Final = 1 << 16
"""Characters of a line, its end included."""


def lines_of(path: Path) -> Generator[str]:
    """Yield the lines of a UTF-8 file with their ends, perhaps behind a byte order mark.

    A line ends with LF, CR LF or CR. No more than one line is held, however long the file is. Who
    stops before the end closes it, and with it the file.

    Raises:
        TraceError: a line is longer than ``MOST_LINE`` characters, or not UTF-8; the text names it.
        OSError: the file cannot be read.
    """
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while text := file.readline(MOST_LINE + 1):
                if len(text) > MOST_LINE:
                    raise TraceError(f"{path.name}:{line}: longer than {MOST_LINE} characters")
                yield text
                line += 1
    except UnicodeDecodeError as error:
        # Text is decoded ahead of where it is read, so that is not where it is.
        where = _line_that_is_not_utf8(path, line)
        raise TraceError(f"{path.name}:{where}: is not UTF-8: {error.reason}") from None


def _line_that_is_not_utf8(path: Path, least: int) -> int:
    """The line of the first byte that is not UTF-8; ``least`` if there is none by now."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        line = 1
        while text := file.readline(MOST_LINE):
            if not _is_utf8(text):
                return line
            line += text.endswith(("\n", "\r"))
    return least


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
