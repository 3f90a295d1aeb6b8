"""The line of ``[yard] order = "fifo"``: requests go on to the core one at a time, as they came.

The core chooses whom to serve next, and is much the better for it. This is for those who want
strict order at any price, and for comparing: whoever is in front is asked of the core, and until
that has granted or refused it nobody behind is, whether their models are there or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from modelyard_server.errors import QuotaViolation, Reason, Refusal
from modelyard_server.residency.values import NEVER_NS

__all__ = ["ArrivalOrder"]

_RETRY_S = 0.05


class ArrivalOrder:
    """A line of requests. All methods on the event loop's thread.

    Invariants: one request at most has the turn; if nobody has it, nobody waits for it.

    Args:
        most_waiting: requests that may wait for their turn.
        now_ns: the clock of deadlines; monotonic.
    """

    def __init__(self, *, most_waiting: int, now_ns: Callable[[], int]) -> None:
        self._most_waiting = most_waiting
        self._now_ns = now_ns
        self._taken = False
        self._closed = False
        # Those that wait, in order; a dict, because any of them may leave at any time.
        self._waiting: dict[asyncio.Future[None], None] = {}

    @property
    def is_empty(self) -> bool:
        """True if a request that came now would have its turn at once."""
        return not self._taken

    @property
    def waiting_count(self) -> int:
        """Requests that wait for their turn; the one that has it is not among them."""
        return len(self._waiting)

    @asynccontextmanager
    async def turn(self, deadline_ns: int) -> AsyncIterator[None]:
        """Waits until it is a request's turn, and has the next one's come at the end.

        Args:
            deadline_ns: of the clock; NEVER_NS for none. It is about the wait for the turn.

        Raises:
            Refusal: QUEUE_FULL, DEADLINE_IN_QUEUE, or SERVER_DRAINING after ``close``.
        """
        if self._taken:
            await self._wait(deadline_ns)
        self._taken = True
        try:
            yield
        finally:
            self._hand_on()

    def close(self) -> None:
        """Refuses all who wait for their turn, and who would have to from now on."""
        self._closed = True
        waiting, self._waiting = self._waiting, {}
        for future in waiting:
            future.set_exception(_draining())

    async def _wait(self, deadline_ns: int) -> None:
        if self._closed:
            raise _draining()
        if len(self._waiting) >= self._most_waiting:
            text = "too many requests wait already"
            raise Refusal(
                Reason.QUEUE_FULL,
                text,
                quota=(QuotaViolation("queue", text),),
                retry_after_s=_RETRY_S,
            )
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiting[future] = None
        timer: asyncio.TimerHandle | None = None
        if deadline_ns != NEVER_NS:
            left_s = max(0, deadline_ns - self._now_ns()) * 1e-9
            timer = loop.call_later(left_s, self._expire, future)
        try:
            await future
        except asyncio.CancelledError:
            self._waiting.pop(future, None)
            if _was_told(future):
                self._hand_on()  # Its turn came, and it was cancelled before it could see it.
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _expire(self, future: asyncio.Future[None]) -> None:
        if future in self._waiting:
            del self._waiting[future]
            future.set_exception(
                Refusal(
                    Reason.DEADLINE_IN_QUEUE,
                    "the deadline passed while waiting for earlier requests",
                )
            )

    def _hand_on(self) -> None:
        """Gives the turn to the next in line; it is taken until that one is through with it."""
        if not self._waiting:
            self._taken = False
            return
        future = next(iter(self._waiting))
        del self._waiting[future]
        future.set_result(None)


def _draining() -> Refusal:
    return Refusal(Reason.SERVER_DRAINING, "the server is shutting down", retry_after_s=1.0)


def _was_told(future: asyncio.Future[None]) -> bool:
    """True if a future's result is that the turn has come."""
    return future.done() and not future.cancelled() and future.exception() is None
