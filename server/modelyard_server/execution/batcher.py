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
                least, so that nobody saves up turns. One that comes back has had what it had: who
                asks one at a time leaves the line each time, and would never be behind. A job that
                has been passed over too often goes first: clients are what they say they are, and
                new names must not hold up old ones.
    company     The first job takes others along that have an equal key, within the limits. One that
                would not fit is left for later, and the next is looked at.
    padding     Rows are padded to the longest. A request joins if that padding costs no more than
                the pass it would have had for itself.
    time        All of a batch end together, so a long one makes those wait that would have been
                done, and those that stand behind it. What sharing brings is had long before a
                quarter of a second of computing: a batch that would take longer is closed.

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

__all__ = ["MOST_GONE", "PATIENCE", "BatchLimits", "Ended", "Line", "Taken"]

PATIENCE: Final = 16
"""How many batches of its model may pass over a job that was there before some of theirs."""

MOST_GONE: Final = 1024
"""Clients without a job in line of which each model remembers what they have had; up to twice as
many for a while. Names cost nothing."""

_MOST_REMEMBERED: Final = 4096
"""Models of which is remembered what their runs take."""

_LOOKS_A_ROW: Final = 4
"""Jobs that are looked at for each row that a batch may have: those that do not fit cost time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """Limits of a lane's batches. A request that is larger than they are runs alone.

    Attributes:
        most_rows: most rows; 1 for no batches at all.
        most_bytes: most bytes of inputs, padded.
        most_seconds: most that it is to compute, by what runs of its model have taken.

    Raises:
        ValueError: a limit below 1, or no time.
    """

    most_rows: int = 64
    most_bytes: int = 64 * 2**20
    most_seconds: float = 0.25

    def __post_init__(self) -> None:
        if self.most_rows < 1 or self.most_bytes < 1:
            raise ValueError("a batch has at least 1 row and 1 byte")
        if not self.most_seconds > 0:
            raise ValueError("a batch has some time")


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
        group: of the batch; None if it is empty.
    """

    batch: list[J] = field(default_factory=list)
    prepared: list[Prepared] = field(default_factory=list)
    ended: list[J] = field(default_factory=list)
    group: Hashable = None

    @property
    def cells(self) -> int:
        """Rows times width of what is to be computed, padded."""
        rows = sum(request.rows for request in self.prepared)
        return rows * max((request.width for request in self.prepared), default=0)


@dataclass(slots=True)
class _Entry(Generic[J]):
    number: int
    job: J
    passes: int = 0


class Line(Generic[J]):
    """The jobs that wait for a lane. Not thread-safe.

    Whoever has waited longest is served first, wherever he has waited: places are in the order of
    `since`, and of their coming where that is the same.

    Invariants: as many places as jobs; a group is remembered only while it has jobs.

    Args:
        limits: of batches.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._places: list[tuple[float, int, _Group[J]]] = []  # A heap.
        self._groups: dict[Hashable, _Group[J]] = {}
        self._next = 0
        self._count = 0
        # Seconds for each cell, by group; groups that ran longest ago are forgotten.
        self._cell_seconds: dict[Hashable, float] = {}

    def note_run(self, taken: Taken[J], seconds: float) -> None:
        """Tells what a batch has taken.

        Args:
            taken: the batch, of jobs that can share a run.
            seconds: of computing.
        """
        cells = taken.cells
        if not cells:
            return
        before = self._cell_seconds.pop(taken.group, None)
        now = seconds / cells
        self._cell_seconds[taken.group] = now if before is None else (before + now) / 2
        if len(self._cell_seconds) > _MOST_REMEMBERED:
            del self._cell_seconds[next(iter(self._cell_seconds))]

    def __len__(self) -> int:
        """Jobs in line."""
        return self._count

    def add(self, job: J, group: Hashable, client: str, since: float = 0.0) -> None:
        """Puts a job into the line, before those that have waited for less.

        Args:
            job: that is to run.
            group: of the jobs that may run together with it.
            client: whose job it is, for turns among those of the group.
            since: when it began to wait, in seconds of any clock that all jobs share. In a group
                jobs keep the order in which they were added.
        """
        found = self._groups.get(group)
        if found is None:
            found = self._groups[group] = _Group(group)
        found.add(_Entry(self._next, job), client)
        heapq.heappush(self._places, (since, self._next, found))
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
            _, _, group = heapq.heappop(self._places)
            if group.used_places:
                group.used_places -= 1
                continue
            taken = group.take(self._limits, look, self._cell_seconds.get(group.key, 0.0))
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
        # Of those who have no job in line, in the order in which they left it.
        self._gone_had_rows: dict[str, int] = {}

    def add(self, entry: _Entry[J], client: str) -> None:
        """Puts a job behind the others of its client."""
        waiting = self._waiting.get(client)
        if waiting is None:
            waiting = self._waiting[client] = deque()
            had_rows = self._gone_had_rows.pop(client, 0)
            self._had_rows[client] = max(had_rows, self._least_had_rows)
        waiting.append(entry)
        self.count += 1

    def take(self, limits: BatchLimits, look: Look[J], cell_seconds: float) -> Taken[J]:
        """Takes a batch; at least one job, as there is one."""
        taken: Taken[J] = Taken(group=self.key)
        aside: list[tuple[str, _Entry[J]]] = []
        turns = [
            (self._had_rows[client], waiting[0].number, client)
            for client, waiting in self._waiting.items()
        ]
        heapq.heapify(turns)
        self._put_first(turns)
        size = _Size(limits, cell_seconds)
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
        self._set_aside_those_without_jobs()
        self._note_passed(newest)
        return taken

    @property
    def _least_had_rows(self) -> int:
        return min(self._had_rows.values(), default=0)

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

    def _set_aside_those_without_jobs(self) -> None:
        gone = self._gone_had_rows
        for client in [client for client, waiting in self._waiting.items() if not waiting]:
            del self._waiting[client]
            gone[client] = self._had_rows.pop(client)
        if len(gone) > 2 * MOST_GONE:
            # Whoever has had no more than the least comes back level with it anyway.
            least = self._least_had_rows
            ahead = [(client, rows) for client, rows in gone.items() if rows > least]
            self._gone_had_rows = dict(ahead[-MOST_GONE:])


class _Size:
    """How large a batch has become."""

    def __init__(self, limits: BatchLimits, cell_seconds: float) -> None:
        self.most_rows = limits.most_rows
        self._most_seconds = limits.most_seconds
        self._cell_seconds = cell_seconds
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
        # Full as well if one more row like the longest would take it over its time.
        more = (self._rows + 1) * self._width * self._cell_seconds
        self.is_full = self._rows >= self.most_rows or more > self._most_seconds
        return True

    def _suits(self, seen: Prepared, first: Prepared) -> bool:
        rows = self._rows + seen.rows
        if seen.key != first.key or rows > min(self.most_rows, seen.most_rows):
            return False
        if rows * max(self._row_bytes, seen.row_bytes) > self._most_bytes:
            return False
        if rows * max(self._width, seen.width) * self._cell_seconds > self._most_seconds:
            return False
        apart = self._rows * self._width + seen.rows * seen.width + seen.pass_cost
        return rows * max(self._width, seen.width) <= apart
