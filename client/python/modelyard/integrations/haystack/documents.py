"""What components read of documents, and of the numbers that say how many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from haystack import Document

__all__ = ["checked_count", "checked_documents", "text_to_embed"]


def checked_documents(documents: Any) -> list[Document]:
    """Return the argument if it is a list of documents. Raises ``TypeError``, naming another."""
    if not isinstance(documents, list):
        raise TypeError(f"documents must be a list of documents, got {type(documents).__name__}")
    for document in documents:
        if not isinstance(document, Document):
            raise TypeError(f"documents must hold documents, got {type(document).__name__}")
    return documents


def text_to_embed(document: Document, meta_fields: Sequence[str] | None, separator: str) -> str:
    """Return a document's content behind some of its meta; fields it does not have are left out."""
    values = (document.meta.get(name) for name in meta_fields or ())
    parts = [*(str(value) for value in values if value is not None), document.content or ""]
    return separator.join(parts)


def checked_count(value: int, name: str) -> int:
    """Return a number of things that must be at least one. Raises TypeError or ValueError."""
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} is {value}: give at least 1")
    return value
