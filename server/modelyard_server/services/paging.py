"""Pages of lists."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import TypeVar

from modelyard_server.errors import Violation
from modelyard_server.services.handler import invalid

__all__ = ["page"]

_DEFAULT_SIZE = 50
_MOST = 1000
_TOKEN_PREFIX = "after:"

T = TypeVar("T")


def page(
    items: Sequence[T], *, size: int, token: str, name: Callable[[T], str]
) -> tuple[Sequence[T], str]:
    """One page of a list that is in the order of its items' names, and the token of the next.

    A page begins after the last name of the one before, so items that come and go between two
    pages neither repeat nor hide others.

    Args:
        items: the whole list.
        size: wanted size; 0 for the default.
        token: of the page before; empty for the first.
        name: an item's name; names are distinct.

    Raises:
        Refusal: INVALID_FIELD for a negative size or a token that is none.
    """
    if size < 0:
        raise invalid(Violation("page_size", "must not be negative"))
    size = min(size or _DEFAULT_SIZE, _MOST)
    start = 0
    if token:
        try:
            text = base64.urlsafe_b64decode(token.encode()).decode()
        except (binascii.Error, UnicodeError):
            text = ""
        if not text.startswith(_TOKEN_PREFIX):
            raise invalid(Violation("page_token", "is none that this server gave out"))
        last = text.removeprefix(_TOKEN_PREFIX)
        names = [name(item) for item in items]
        if last in names:
            start = names.index(last) + 1
        else:  # It is gone: its neighbours are still in order.
            start = sum(1 for other in names if other <= last)
    chosen = items[start : start + size]
    if start + size >= len(items):
        return chosen, ""
    following = f"{_TOKEN_PREFIX}{name(chosen[-1])}"
    return chosen, base64.urlsafe_b64encode(following.encode()).decode()
