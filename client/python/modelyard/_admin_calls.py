"""What the calls of an operator have in common: reading answers, pages, and harmless repetition."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import grpc
from google.protobuf.message import Message

from modelyard._connection import Connection
from modelyard._status import reading_answer
from modelyard.errors import ServerUnavailable

__all__ = ["PAGE_SIZE", "AdminCalls", "checked_etag", "checked_request_id"]

PAGE_SIZE: Final = 1000
"""Items of a list that are asked for at a time; the most the contract allows."""

_MAX_REQUEST_ID_LENGTH: Final = 128

# Above the channel's first reconnect back-off, or the second attempt would not even be one.
_RETRY_PAUSE_S: Final = 0.25

_MessageT = TypeVar("_MessageT")
_RequestT = TypeVar("_RequestT", bound=Message)
_ResponseT = TypeVar("_ResponseT")
_ValueT = TypeVar("_ValueT")


class AdminCalls:
    """A connection, and the ways in which an operator's calls use it."""

    _connection: Connection

    def _change(
        self,
        rpc: grpc.UnaryUnaryMultiCallable[_RequestT, _ResponseT],
        request: _RequestT,
        timeout_s: float | None,
    ) -> _ResponseT:
        """Make a call that carries a request id; once more if the connection broke.

        Nobody knows then whether it was done. The id makes the server answer a call that it has
        done already with its first answer, so asking again is harmless. A refusal is an answer
        and is not repeated.
        """
        left_s = self._connection.settings.call_timeout(timeout_s)
        end_s = time.monotonic() + left_s
        try:
            return self._connection.call(rpc, request, left_s)
        except ServerUnavailable:
            left_s = end_s - time.monotonic() - _RETRY_PAUSE_S
            if left_s <= 0:
                raise
        time.sleep(_RETRY_PAUSE_S)
        return self._connection.call(rpc, request, left_s)

    def _read(self, reader: Callable[[_MessageT], _ValueT], message: _MessageT) -> _ValueT:
        with reading_answer(self._connection.settings.target):
            return reader(message)

    def _list(
        self,
        page: Callable[[str, float], tuple[Sequence[_MessageT], str]],
        reader: Callable[[_MessageT], _ValueT],
        timeout_s: float | None,
    ) -> tuple[_ValueT, ...]:
        """Collect the pages of a list, all within one deadline."""
        left_s = self._connection.settings.call_timeout(timeout_s)
        end_s = time.monotonic() + left_s
        values: list[_ValueT] = []
        seen = {""}
        token = ""
        while True:
            messages, token = page(token, left_s)
            values += [self._read(reader, message) for message in messages]
            if not token:
                return tuple(values)
            with reading_answer(self._connection.settings.target):
                if token in seen:
                    raise ValueError("a page token came twice, so the pages would never end")
            seen.add(token)
            # A call with next to no time left ends with DeadlineExceeded, like any that is late.
            left_s = max(end_s - time.monotonic(), 0.001)


def checked_etag(etag: str | None) -> str:
    """Return an etag as it is sent; empty for none. Raises ``TypeError`` if it is no text."""
    if not isinstance(etag, str | None):
        raise TypeError(f"etag must be a str or None, got {type(etag).__name__}")
    return etag or ""


def checked_request_id(request_id: str | None, *, validate_only: bool = False) -> str:
    """Return the id a call is sent with: the caller's, or a fresh one.

    A call that changes nothing gets none of its own: it would take a place in the server's memory.

    Raises:
        TypeError: no str.
        ValueError: not 1 to 128 printable ASCII characters.
    """
    if request_id is None:
        return "" if validate_only else str(uuid.uuid4())
    if not isinstance(request_id, str):
        raise TypeError(f"request_id must be a str or None, got {type(request_id).__name__}")
    if not (
        0 < len(request_id) <= _MAX_REQUEST_ID_LENGTH
        and request_id.isascii()
        and request_id.isprintable()
    ):
        raise ValueError(
            f"request_id must be 1 to {_MAX_REQUEST_ID_LENGTH} printable ASCII characters"
        )
    return request_id
