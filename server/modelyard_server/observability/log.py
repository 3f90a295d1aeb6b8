"""The server's log: one line an event, on standard error."""

from __future__ import annotations

import logging

__all__ = ["start_logging"]

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


class _OneLine(logging.Formatter):
    """Makes every line after a record's first an indented one, and escapes what does not print.

    What a client sends (a key, a name) can reach a message or the text of an exception. It must not
    be able to forge a line, or to steer the terminal of whoever reads it. Line breaks are kept
    where the server itself writes several lines: in messages with arguments and in tracebacks.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        if not record.args:
            record.message = _escaped(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        first, *rest = super().format(record).split("\n")
        return "\n    ".join(_escaped(line.rstrip()) for line in (first, *rest) if line.strip())


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def start_logging(level: str) -> None:
    """Sends the log to standard error.

    Args:
        level: least level that is shown, in lower case.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine(_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
