"""The log of requests: what became of each, for those who follow it.

While nobody follows, nothing is kept, and a request costs one look at `followed`. A follower holds
a number and nothing else, so that one who reads slowly costs no memory: the log has a bound, and
whoever falls behind it is told how many requests it has missed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

from modelyard_server.errors import Reason

__all__ = ["RequestFacts", "RequestLog"]


class RequestFacts:
    """What is known of one request. Filled in while it goes its way.

    Attributes:
        arrived_ns: when it came, of the monotonic clock; as are all of these.
        leased_ns: when it had its model; 0 if it never had.
        ended_ns: when its outputs were there, or it was refused.
        key: what it asked for.
        model: id of what the key means; empty if nothing.
        device: resource name of what ran it; empty if it did not come so far.
        cold: it found its model not resident.
        load_s: how long of its waiting the model was being loaded; None for a hit.
        row_count: first dimension of its first input.
        reason: why it was refused; None if it was answered.
        route: id of the route that gives the key its meaning; empty if it is a model's own.
        branch: names of the routes' parts that led to the model, with "/" between.
        version: the version that was chosen; empty if there was none to choose.
        steps: the runs it was made of, in the order they ended; empty if it was one.
    """

    __slots__ = (
        "arrived_ns",
        "branch",
        "cold",
        "device",
        "ended_ns",
        "key",
        "leased_ns",
        "load_s",
        "model",
        "reason",
        "route",
        "row_count",
        "steps",
        "version",
    )

    def __init__(self, arrived_ns: int) -> None:
        self.arrived_ns = arrived_ns
        self.leased_ns = 0
        self.ended_ns = 0
        self.key = ""
        self.model = ""
        self.device = ""
        self.cold = False
        self.load_s: float | None = None
        self.row_count = 0
        self.reason: Reason | None = None
        self.route = ""
        self.branch = ""
        self.version = ""
        self.steps: tuple[RequestFacts, ...] = ()


class RequestLog:
    """The last requests that ended, while anybody follows. On the event loop's thread only.

    Invariants: requests are numbered from 1 without gaps, over all followers; `followed` is True
    exactly while somebody follows; when nobody does the log is empty.

    Args:
        capacity: requests that are kept.

    Attributes:
        followed: whether add is to be called.
    """

    def __init__(self, *, capacity: int = 16_384) -> None:
        if capacity < 1:
            raise ValueError(f"a log keeps at least one request: {capacity}")
        self.followed = False
        self._kept: deque[RequestFacts] = deque(maxlen=capacity)
        self._number = 0
        self._follower_count = 0
        self._waiters: set[asyncio.Future[None]] = set()

    def add(self, facts: RequestFacts) -> None:
        """Tells of a request that has ended. It must not change any more."""
        self._kept.append(facts)
        self._number += 1
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    @contextmanager
    def following(self) -> Iterator[int]:
        """Follows the log inside; gives the number of the last request before that."""
        self._follower_count += 1
        self.followed = True
        try:
            yield self._number
        finally:
            self._follower_count -= 1
            if not self._follower_count:
                self.followed = False
                self._kept.clear()

    @property
    def follower_count(self) -> int:
        """How many follow it."""
        return self._follower_count

    def after(self, number: int, *, most: int) -> tuple[list[RequestFacts], int, int]:
        """The requests behind a number, the first to end first.

        Args:
            number: of the last request that the follower knows.
            most: only the first of them.

        Returns:
            Them; how many there were before them that are gone; the number of the last of them.
        """
        oldest = self._number - len(self._kept)
        missed = max(0, oldest - number)
        begin = max(number, oldest)
        found = list(islice(self._kept, begin - oldest, begin - oldest + most))
        return found, missed, begin + len(found)

    async def wait(self, number: int) -> None:
        """Waits until there is a request behind a number."""
        while self._number <= number:
            # One future each: a shared one would be cancelled for all when one waiter is.
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)
