"""The journal: what happened, in order, and which models it changed.

Two things are told from it. *Events* are a bounded log: decisions of the yard and changes by
operators, numbered from 1 within one run of the server. *Changes* say which models' residencies are
not what they were; of each model only the last change is kept, because a watcher wants to know what
is so now. A watcher that falls behind costs nothing: it holds a number, and when it comes back it
is told what is still known, or that it has to begin anew.

An event and the changes that belong to it are told one after the other without a wait between, but
some changes have no event: a request that gave up waiting leaves its model cold. So a watcher's
place is a Position, which counts these as well, while what it tells its client is the revision
alone. A client that resumes from a revision may hear again of what changed at it, and misses
nothing.
"""

from __future__ import annotations

import asyncio
import enum
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

__all__ = ["Departure", "Event", "EventType", "Journal", "Position", "Waits"]

_MOST_CHANGED = 65_536
"""Models whose last change is remembered, those that are gone among them."""


class EventType(enum.Enum):
    """modelyard.v1.EventType."""

    LOAD_STARTED = 1
    LOAD_DONE = 2
    LOAD_FAILED = 3
    EVICTED = 4
    DRAINED = 5
    UNLOADED = 6
    QUARANTINED = 7
    REFUSED = 8
    OVERSHOOT = 9
    BUDGET_CHANGED = 10
    PINNED = 11
    UNPINNED = 12
    DEVICE_DRAINED = 13
    DEVICE_UNDRAINED = 14
    MODEL_CREATED = 15
    MODEL_UPDATED = 16
    MODEL_DELETED = 17
    PLACEMENT_CHANGED = 18
    PLAN_APPLIED = 19
    PLAN_ROLLED_BACK = 20
    QUEUED = 21
    LOST = 22
    COPY_KEPT = 23
    COPY_DROPPED = 24
    ROUTE_CREATED = 25
    ROUTE_UPDATED = 26
    ROUTE_DELETED = 27


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """What was known of a model when it was told to leave.

    Attributes:
        rule: by which it was chosen; empty if nobody chose.
        expected_load_s: what loading it again was expected to take.
        idle_s: since it was last asked for.
        resident_s: since its load ended.
    """

    rule: str
    expected_load_s: float
    idle_s: float
    resident_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """Who waited for a load that has ended.

    Attributes:
        count: requests; at least 1.
        sum_s: how long they waited, all of them together.
    """

    count: int
    sum_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened; see modelyard.v1.Event.

    Attributes:
        revision: its place in the order of events, from 1.
        time: when, in UTC.
        type: what.
        subject: resource name of the model or device it is about, or "plan".
        cause: resource name of what it was done for, "operator", or "".
        size_bytes: bytes it is about, over all devices.
        shared_bytes: what the model holds besides, and others with it.
        score: the policy's score of a model that was chosen to leave.
        waited_s: how long the oldest request had waited.
        load_s: how long a load took.
        description: for people.
        identity: who asked; not authenticated.
        departure: of a model that was told to leave.
        waits: of a load that ended well, if anybody waited for it.
    """

    revision: int
    time: datetime
    type: EventType
    subject: str
    cause: str = ""
    size_bytes: int = 0
    shared_bytes: int = 0
    score: float | None = None
    waited_s: float | None = None
    load_s: float | None = None
    description: str = ""
    identity: str = ""
    departure: Departure | None = None
    waits: Waits | None = None

    def __post_init__(self) -> None:
        if self.revision < 1 or not self.subject:
            raise ValueError(f"an event has a revision from 1 and a subject: {self}")
        if self.time.utcoffset() != UTC.utcoffset(None):
            raise ValueError(f"the time of an event is in UTC, got {self.time!r}")


class Position(NamedTuple):
    """A place in the journal. In the order of time.

    Attributes:
        revision: of the last event.
        step: changes since that event.
    """

    revision: int
    step: int = 0


class Journal:
    """What happened, and what it changed. All methods on the event loop's thread.

    Invariants: revisions have no gaps; whoever waits is woken by the next event, change or close,
    however it was called.

    Args:
        capacity: events that are kept.
        now: the time, in UTC.
        most_changed: models whose last change is kept.

    Attributes:
        epoch: random: which run of the server the revisions are of.
    """

    def __init__(
        self,
        *,
        capacity: int,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        most_changed: int = _MOST_CHANGED,
    ) -> None:
        if capacity < 1 or most_changed < 1:
            raise ValueError(f"a journal keeps at least one: {capacity}, {most_changed}")
        self.epoch = secrets.token_hex(8)
        self._capacity = capacity
        self._now = now
        # A ring: the event of revision r is at (r - 1) % capacity.
        self._events: list[Event] = []
        self._position = Position(0)
        # By model, the one that changed last at the end; True if it is gone.
        self._changed: dict[str, tuple[Position, bool]] = {}
        self._most_changed = most_changed
        self._forgotten = Position(-1)
        self._waiters: set[asyncio.Future[None]] = set()
        self._closed = False
        self._identity: ContextVar[str] = ContextVar("identity", default="")

    @property
    def revision(self) -> int:
        """Of the last event; 0 before the first."""
        return self._position.revision

    @property
    def position(self) -> Position:
        """Behind all that has happened."""
        return self._position

    # --- Telling ------------------------------------------------------------------------------

    @contextmanager
    def acting(self, identity: str) -> Iterator[None]:
        """What is published inside, and by tasks that are started inside, was asked by identity."""
        token = self._identity.set(identity)
        try:
            yield
        finally:
            self._identity.reset(token)

    def publish(
        self,
        type: EventType,
        subject: str,
        *,
        cause: str = "",
        size_bytes: int = 0,
        shared_bytes: int = 0,
        score: float | None = None,
        waited_s: float | None = None,
        load_s: float | None = None,
        description: str = "",
        departure: Departure | None = None,
        waits: Waits | None = None,
    ) -> Event:
        """Adds an event, and returns it; see Event for the arguments."""
        event = Event(
            revision=self.revision + 1,
            time=self._now(),
            type=type,
            subject=subject,
            cause=cause,
            size_bytes=size_bytes,
            shared_bytes=shared_bytes,
            score=score,
            waited_s=waited_s,
            load_s=load_s,
            description=description,
            identity=self._identity.get(),
            departure=departure,
            waits=waits,
        )
        if len(self._events) < self._capacity:
            self._events.append(event)
        else:
            self._events[(event.revision - 1) % self._capacity] = event
        self._advance(Position(event.revision))
        return event

    def changed(self, model: str) -> None:
        """The residency of models/<model> is not what it was, as of the last event or after it."""
        self._note(model, gone=False)

    def removed(self, model: str) -> None:
        """The residency of models/<model> is gone, as of the last event or after it."""
        self._note(model, gone=True)

    def close(self) -> None:
        """Ends every wait, now and later."""
        self._closed = True
        self._wake()

    # --- Being told ---------------------------------------------------------------------------

    def events_after(self, revision: int, *, most: int | None = None) -> tuple[list[Event], bool]:
        """The events behind a revision, oldest first, and whether older ones are missing.

        Args:
            revision: of the last event that is known; 0 for none.
            most: only the first of them.
        """
        oldest = self._oldest
        first = max(revision + 1, oldest)
        end = self.revision + 1
        if most is not None:
            end = min(end, first + most)
        events = [self._events[(r - 1) % self._capacity] for r in range(first, end)]
        return events, revision + 1 < oldest

    def about(self, subject: str) -> tuple[list[Event], bool]:
        """The events whose subject or cause it is, oldest first, and whether any were dropped."""
        events, truncated = self.events_after(0)
        return [event for event in events if subject in (event.subject, event.cause)], truncated

    def changes_after(self, position: Position) -> tuple[list[str], list[str]] | None:
        """The models that changed behind a position, and those that are gone.

        In the order of their last change. A model is in one of the lists at most.

        Args:
            position: of a watcher; Position(revision) for a client that resumes.

        Returns:
            None if that is not known any more: begin with a snapshot.
        """
        if position < self._forgotten or position > self._position:
            return None
        changed: list[str] = []
        removed: list[str] = []
        for model in reversed(self._changed):
            at, gone = self._changed[model]
            if at <= position:
                break
            (removed if gone else changed).append(model)
        return changed[::-1], removed[::-1]

    async def wait(self, position: Position) -> bool:
        """Waits until something has happened behind a position.

        Returns:
            False if the journal is closed and nothing has.
        """
        while self._position <= position:
            if self._closed:
                return False
            # One future each: a shared one would be cancelled for all when one waiter is.
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)
        return True

    # --- Inside -------------------------------------------------------------------------------

    @property
    def _oldest(self) -> int:
        """Revision of the oldest event there is, or that of the first there will be."""
        return self.revision - len(self._events) + 1

    def _note(self, model: str, *, gone: bool) -> None:
        position = Position(self._position.revision, self._position.step + 1)
        self._changed.pop(model, None)
        self._changed[model] = (position, gone)
        if len(self._changed) > self._most_changed:
            self._forgotten, _ = self._changed.pop(next(iter(self._changed)))
        self._advance(position)

    def _advance(self, position: Position) -> None:
        self._position = position
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
