"""The text the demo ships: labelled training text and requests, written for modelyard.

Files are UTF-8, `label<TAB>text` a line; lines that start with `#` are comments.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

__all__ = ["TASKS", "Labelled", "data_digest", "read_labelled", "read_requests"]

TASKS = ("sentiment", "language", "topic")
"""The tasks with training text."""

_REQUESTS = "requests"


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A text and what it is: a class for training text, the kind of key for a request."""

    label: str
    text: str


def read_labelled(task: str) -> tuple[Labelled, ...]:
    """The training text of `task`, one of TASKS, in the order of the file."""
    if task not in TASKS:
        raise ValueError(f"no training text for {task!r}: use one of {', '.join(TASKS)}")
    return _read(task)


def read_requests() -> tuple[Labelled, ...]:
    """Requests for the demo; the label is the kind of model each is meant for."""
    return _read(_REQUESTS)


def data_digest() -> str:
    """SHA-256 over all files of text, in hexadecimal."""
    digest = hashlib.sha256()
    for name in (*TASKS, _REQUESTS):
        digest.update(_content(name).encode())
    return digest.hexdigest()


def _content(name: str) -> str:
    return (resources.files(__package__) / "data" / f"{name}.tsv").read_text(encoding="utf-8")


def _read(name: str) -> tuple[Labelled, ...]:
    rows = []
    for number, line in enumerate(_content(name).splitlines(), start=1):
        if line.startswith("#"):
            continue
        label, tab, text = line.partition("\t")
        if not (label and tab and text):
            raise ValueError(f"{name}.tsv, line {number}: expected label<TAB>text")
        rows.append(Labelled(label=label, text=text))
    return tuple(rows)
