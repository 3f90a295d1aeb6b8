"""The server's log: one line an event, on standard error."""

from __future__ import annotations

import logging

__all__ = ["start_logging"]

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


class _OneLine(logging.Formatter):
    """Escapes line breaks and control characters of messages; tracebacks keep theirs.

    What a client sends (a key, a name) can reach a log line. It must not be able to forge one.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        if record.args:
            first, *rest = record.getMessage().split("\n")
        else:
            first, rest = str(record.msg), []
        head = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in first)
        record.message = "\n    ".join([head, *(line.rstrip() for line in rest)])
        return super().formatMessage(record)


def start_logging(level: str) -> None:
    """Sends the log to standard error.

    Args:
        level: least level that is shown, in lower case.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine(_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
