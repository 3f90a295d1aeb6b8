"""Changes of the catalog: one at a time, durable before they show, and done once for each id."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from modelyard_server.catalog.records import Change, RequestRecord
from modelyard_server.catalog.store import CatalogStore, StoreError
from modelyard_server.errors import Reason, Refusal, Violation

__all__ = ["MAX_REQUEST_ID", "Asked", "Writes", "to_the_end"]

MAX_REQUEST_ID = 128
"""Longest id of a request, in characters."""

_RETRY_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A call that changes something, as its caller named it.

    Attributes:
        method: name of the RPC.
        request_id: of the caller; empty for none.
        body: the request, serialized.
    """

    method: str
    request_id: str
    body: bytes

    def answered(self, response: bytes) -> RequestRecord | None:
        """What is remembered of it; None if it has no id."""
        if not self.request_id:
            return None
        return RequestRecord(
            request_id=self.request_id,
            method=self.method,
            digest=self._digest(),
            response=response,
            time=datetime.now(UTC),
        )

    def is_that_of(self, record: RequestRecord) -> bool:
        """True if the record is of this very call."""
        return record.method == self.method and record.digest == self._digest()

    def _digest(self) -> str:
        return hashlib.sha256(self.body).hexdigest()


class Writes:
    """The way to the store.

    Whoever changes the catalog does so inside `alone`: looks, writes, and then changes what is in
    memory. So what was looked at is still so when it is written, and what is acknowledged is
    durable.

    Args:
        store: an open one.
    """

    def __init__(self, store: CatalogStore) -> None:
        self._store = store
        self._lock = asyncio.Lock()
        self._owed: Change | None = None

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Waits for its turn, and keeps others waiting."""
        async with self._lock:
            yield

    async def first_answer(self, asked: Asked) -> bytes | None:
        """The answer that this call got the first time; None if this is the first time.

        Raises:
            Refusal: INVALID_FIELD: an unusable id, or one that another call has used.
                CATALOG_UNAVAILABLE.
        """
        request_id = asked.request_id
        if not request_id:
            return None
        if (
            len(request_id) > MAX_REQUEST_ID
            or not request_id.isascii()
            or not request_id.isprintable()
        ):
            raise _bad_id(f"must be at most {MAX_REQUEST_ID} printable ASCII characters")
        try:
            record = await self._store.request(request_id)
        except StoreError as error:
            raise unavailable(error) from error
        if record is None:
            return None
        if not asked.is_that_of(record):
            raise _bad_id("was used for another call before")
        return record.response

    async def write(self, change: Change) -> int:
        """Makes a change durable and returns the plan's revision.

        Raises:
            Refusal: CATALOG_UNAVAILABLE. Nothing was changed.
        """
        try:
            if self._owed is not None:
                await self._store.write(self._owed)
                self._owed = None
            return await self._store.write(change)
        except StoreError as error:
            raise unavailable(error) from error

    def owe(self, change: Change) -> None:
        """Leaves a change to be made durable before the next one, which may rest on it.

        For what is so in memory although it could not be written, because it follows from the
        configuration file.
        """
        self._owed = change


async def to_the_end(name: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs work that must not stop half-way, even if its caller is cancelled meanwhile.

    Args:
        name: of its task.
        work: what makes a change durable and then shows it.

    Raises:
        CancelledError: the caller was cancelled; the work has ended all the same.
    """
    task = asyncio.get_running_loop().create_task(work(), name=name)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from task.exception()
    return task.result()


def unavailable(error: StoreError) -> Refusal:
    """What a caller is told when the store cannot be written."""
    return Refusal(
        Reason.CATALOG_UNAVAILABLE,
        "the catalog cannot be written now, nothing was changed; the server's log says why",
        metadata={"kind": type(error).__name__},
        retry_after_s=_RETRY_S,
    )


def _bad_id(text: str) -> Refusal:
    return Refusal(
        Reason.INVALID_FIELD, f"request_id: {text}", violations=(Violation("request_id", text),)
    )
