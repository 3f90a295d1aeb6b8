"""Which jobs of a lane run next: in turn by model, together where they can, fair to clients.

A lane that becomes free takes what stands in line and runs as much of it in one batch as fits. It
never waits for more. Under load the line fills by itself while the last batch runs, so the batches
grow with the load, up to the limits: with n requests in the air about half of them run while the
other half gathers. A wait on purpose could only help where the lane is idle, and there it brings
little and costs much: what it would gather comes while the batch runs that it holds up, and shares
the next one, whereas the wait is paid in full by a caller that is alone. On a line whose requests
come further apart than a run takes, every millisecond of waiting is a millisecond of latency and of
an idle device for nothing; on one whose requests come closer together, the line is never empty when
the lane becomes free. So there is no timer here, and no setting for one.

The rule, in its order:

    models      Each job brings a place into the line. Whoever has the first place has the lane, and
                a batch uses up the first places of its model, as many as it has jobs. Which of a
                model's jobs run is the model's own matter: no other model waits longer for it.
    clients     Among the jobs of a model, the client goes first that has had the least rows; each
                client's own go in order. A client that comes new is level with the one that had
                least, so that nobody saves up turns. A job that has been passed over too often goes
                first: clients are what they say they are, and new names must not hold up old ones.
    company     The first job takes others along that have an equal key, within the limits. One that
                would not fit is left for later, and the next is looked at.
    padding     Rows are padded to the longest. A request joins if that padding costs no more than
                the pass it would have had for itself.

Nothing here runs, prepares or knows a job: the caller looks at those that are asked for, which for
a text is when it is tokenized, and once.
"""

from __future__ import annotations

import enum
import heapq
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from modelyard_server.runtimes.api import Prepared

__all__ = ["PATIENCE", "BatchLimits", "Ended", "Line", "Taken"]

PATIENCE: Final = 16
"""How many batches of its model may pass over a job that was there before some of theirs."""

_LOOKS_A_ROW: Final = 4
"""Jobs that are looked at for each row that a batch may have: those that do not fit cost time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """Limits of a lane's batches. A request that is larger than they are runs alone.

    Attributes:
        most_rows: most rows; 1 for no batches at all.
        most_bytes: most bytes of inputs, padded.

    Raises:
        ValueError: a limit below 1.
    """

    most_rows: int = 64
    most_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        if self.most_rows < 1 or self.most_bytes < 1:
            raise ValueError("a batch has at least 1 row and 1 byte")


class Ended(enum.Enum):
    """What a look at a job says of one that is over before it has run."""

    ENDED = enum.auto()


J = TypeVar("J")

Look = Callable[[J], Prepared | Ended | None]
"""What is known of a job: None if it runs alone. Asked again, it says the same, or that the job has
ended meanwhile."""


@dataclass(frozen=True, slots=True)
class Taken(Generic[J]):
    """What has left the line.

    Attributes:
        batch: jobs that are to run together, or one that is to run alone; empty if all that were
            looked at have ended.
        prepared: what is known of each of the batch, in the same order; empty for one that cannot
            share a run.
        ended: jobs that need not run.
    """

    batch: list[J] = field(default_factory=list)
    prepared: list[Prepared] = field(default_factory=list)
    ended: list[J] = field(default_factory=list)


@dataclass(slots=True)
class _Entry(Generic[J]):
    number: int
    job: J
    passes: int = 0


class Line(Generic[J]):
    """The jobs that wait for a lane. Not thread-safe.

    Invariants: as many places as jobs; a group is remembered only while it has jobs.

    Args:
        limits: of batches.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._places: deque[_Group[J]] = deque()
        self._groups: dict[Hashable, _Group[J]] = {}
        self._next = 0
        self._count = 0

    def __len__(self) -> int:
        """Jobs in line."""
        return self._count

    def add(self, job: J, group: Hashable, client: str) -> None:
        """Puts a job at the end of the line.

        Args:
            job: that is to run.
            group: of the jobs that may run together with it.
            client: whose job it is, for turns among those of the group.
        """
        found = self._groups.get(group)
        if found is None:
            found = self._groups[group] = _Group(group)
        found.add(_Entry(self._next, job), client)
        self._places.append(found)
        self._next += 1
        self._count += 1

    def take(self, look: Look[J]) -> Taken[J]:
        """Takes the next batch out of the line.

        Args:
            look: says what a job is. Not asked for every job in line.

        Returns:
            The batch. Empty if there is nothing in line, or nothing that still wants to run among
            the jobs of the model whose turn it was.
        """
        while self._places:
            group = self._places.popleft()
            if group.used_places:
                group.used_places -= 1
                continue
            taken = group.take(self._limits, look)
            gone = len(taken.batch) + len(taken.ended)
            group.used_places = gone - 1
            self._count -= gone
            if not group.count:
                del self._groups[group.key]
            return taken
        return Taken()


class _Group(Generic[J]):
    """The jobs of one model.

    Attributes:
        key: of the group.
        count: its jobs in line.
        used_places: how many of its places, the first ones, stand for jobs that have run already.
    """

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.count = 0
        self.used_places = 0
        self._waiting: dict[str, deque[_Entry[J]]] = {}
        self._had_rows: dict[str, int] = {}

    def add(self, entry: _Entry[J], client: str) -> None:
        """Puts a job behind the others of its client."""
        waiting = self._waiting.get(client)
        if waiting is None:
            waiting = self._waiting[client] = deque()
            self._had_rows[client] = min(self._had_rows.values(), default=0)
        waiting.append(entry)
        self.count += 1

    def take(self, limits: BatchLimits, look: Look[J]) -> Taken[J]:
        """Takes a batch; at least one job, as there is one."""
        taken: Taken[J] = Taken()
        aside: list[tuple[str, _Entry[J]]] = []
        turns = [
            (self._had_rows[client], waiting[0].number, client)
            for client, waiting in self._waiting.items()
        ]
        heapq.heapify(turns)
        self._put_first(turns)
        size = _Size(limits)
        newest = looks = 0
        while turns and not size.is_full and looks < _LOOKS_A_ROW * size.most_rows:
            _, _, client = turns[0]
            waiting = self._waiting[client]
            entry = waiting.popleft()
            seen = look(entry.job)
            if isinstance(seen, Ended):
                taken.ended.append(entry.job)
            elif size.take(seen):
                taken.batch.append(entry.job)
                if seen is not None:
                    taken.prepared.append(seen)
                self._had_rows[client] += 1 if seen is None else seen.rows
                newest = max(newest, entry.number)
            else:
                aside.append((client, entry))
            looks += 1
            if waiting:
                turn = (self._had_rows[client], waiting[0].number, client)
                heapq.heapreplace(turns, turn)
            else:
                heapq.heappop(turns)
        for client, entry in reversed(aside):
            self._waiting[client].appendleft(entry)
        self.count -= len(taken.batch) + len(taken.ended)
        self._forget_those_without_jobs()
        self._note_passed(newest)
        return taken

    def _put_first(self, turns: list[tuple[int, int, str]]) -> None:
        """Gives the first turn to the client of the oldest job, if that has waited its share."""
        _, number, client = min(turns, key=lambda turn: turn[1])
        if self._waiting[client][0].passes >= PATIENCE:
            turns.remove((self._had_rows[client], number, client))
            heapq.heapify(turns)
            # Before all others, whatever they have had.
            heapq.heappush(turns, (-1, number, client))

    def _note_passed(self, newest: int) -> None:
        if not self._waiting:
            return
        oldest = min((waiting[0] for waiting in self._waiting.values()), key=lambda e: e.number)
        if oldest.number < newest:
            oldest.passes += 1

    def _forget_those_without_jobs(self) -> None:
        for client in [client for client, waiting in self._waiting.items() if not waiting]:
            del self._waiting[client]
            del self._had_rows[client]


class _Size:
    """How large a batch has become."""

    def __init__(self, limits: BatchLimits) -> None:
        self.most_rows = limits.most_rows
        self.is_full = False
        self._most_bytes = limits.most_bytes
        self._first: Prepared | None = None
        self._rows = 0
        self._width = 0
        self._row_bytes = 0

    def take(self, seen: Prepared | None) -> bool:
        """Makes room for a job, if it may come along."""
        first = self._first
        if self._rows == 0:
            if seen is None:
                self._rows = 1
                self.is_full = True
                return True
            self._first = seen
        elif seen is None or first is None or not self._suits(seen, first):
            return False
        assert seen is not None
        self.most_rows = min(self.most_rows, seen.most_rows)
        self._rows += seen.rows
        self._width = max(self._width, seen.width)
        self._row_bytes = max(self._row_bytes, seen.row_bytes)
        self.is_full = self._rows >= self.most_rows
        return True

    def _suits(self, seen: Prepared, first: Prepared) -> bool:
        rows = self._rows + seen.rows
        if seen.key != first.key or rows > min(self.most_rows, seen.most_rows):
            return False
        if rows * max(self._row_bytes, seen.row_bytes) > self._most_bytes:
            return False
        apart = self._rows * self._width + seen.rows * seen.width + seen.pass_cost
        return rows * max(self._width, seen.width) <= apart
