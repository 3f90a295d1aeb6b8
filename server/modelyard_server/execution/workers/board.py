"""A file that a worker and the server share: what its threads are doing, and what they have run.

The worker writes there without telling anybody, which costs less than a message. The server reads
it when it looks for calls that take too long, and when the worker has died: then it says who was
running. It also says so of a worker that is stuck, which no message could.

Who was running is the wrong question where a worker has sent what cannot be understood: by the time
that the server reads it, whoever wrote it may be done, and others may have begun. So each thread
also writes down what it began last, and how far the stream to the server was then: how many bytes
the channel had sent. Bytes that the channel did not send lie in the stream where it was when they
were written; and who began when it was further has not written them. Where a thread goes from one
model to the next and the channel has sent nothing in between, a mark is put into the stream, so
that the one is told from the other. Runs of one model are not told apart like that: any of them
that had begun, and is not answered, may be to blame.

What stands there was written by a process that may be broken. It is used only to choose among calls
that the server itself knows to be open, and, as for what the lanes have run, to be shown.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from modelyard_server.execution.figures import FIGURE_COUNT, MOST_FIGURE, LaneFigures
from modelyard_server.execution.workers.memory_files import SealedFile

__all__ = ["Board", "BoardWriter", "Stream"]

_THREADS: Final = 512
_SLOTS: Final = 2048
"""Those that are no thread's are for batches: all calls of a batch stand there but its first."""

_SLOT_BYTES: Final = 8
"""Of the number of a call; one store of the processor, so that nobody reads half of one."""

_HISTORIES: Final = 64
"""Threads, the first ones, of which is written down what they began: more than two a device."""

_REMEMBERED: Final = 256
"""Calls that are remembered of each of them. At least as many as are in one batch."""

_HISTORY_SLOTS: Final = 1 + 2 * _REMEMBERED
"""How many it has begun, and of the last ones the number of the call and the place."""

_LANES: Final = 16
"""A yard has no more devices. Each has numbers of its own for its figures, behind the histories."""

_FIGURES: Final = _SLOTS + _HISTORIES * _HISTORY_SLOTS
"""Where the figures of the lanes begin."""

BOARD_BYTES: Final = (_FIGURES + _LANES * FIGURE_COUNT) * _SLOT_BYTES

Batch = tuple[int, list[int]]
"""What a thread ran before its batch, and the slots of the batch."""


class Stream(Protocol):
    """How far the worker's stream to the server is, in bytes. Of any thread."""

    def at_least(self) -> int:
        """It, or less."""

    def at_most(self) -> int:
        """It, or more."""

    def mark(self) -> int | None:
        """Moves it, behind all that has been written into it by anybody.

        Returns:
            How far it is now; None if it cannot be moved now.
        """


class _NoStream:
    """Before there is one."""

    def at_least(self) -> int:
        """See Stream."""
        return 0

    def at_most(self) -> int:
        """See Stream."""
        return 0

    def mark(self) -> None:
        """See Stream."""


class Board:
    """The server's side. Close it when the worker is gone.

    Attributes:
        file: what is to be passed to the worker.
    """

    def __init__(self) -> None:
        self.file = SealedFile.make("modelyard-board", BOARD_BYTES)
        self._map = mmap.mmap(self.file.fileno(), BOARD_BYTES)

    def running(self) -> frozenset[int]:
        """Numbers of the calls that run in some thread."""
        with memoryview(self._map) as view, view.cast("Q") as numbers:
            return frozenset(numbers[:_SLOTS]) - {0}

    def begun_by(self, place: int) -> frozenset[int]:
        """Numbers of the calls that may have written into the stream.

        Args:
            place: where something was written, in bytes from the beginning of the stream.

        Returns:
            Of each thread what it had begun last by then, done or not; and of the last model that
            it had run by then all that it had begun and remembers.
        """
        with memoryview(self._map) as view, view.cast("Q") as numbers:
            # Threads of which nothing else is known.
            found = set(numbers[_HISTORIES:_THREADS])
            for thread in range(_HISTORIES):
                begins = _SLOTS + thread * _HISTORY_SLOTS
                found |= _last_by(numbers[begins : begins + _HISTORY_SLOTS], place)
        return frozenset(found) - {0}

    def figures(self) -> LaneFigures:
        """What all of the worker's lanes have run together."""
        sums = LaneFigures()
        with memoryview(self._map) as view, view.cast("Q") as numbers:
            written = numbers[_FIGURES : _FIGURES + _LANES * FIGURE_COUNT].tolist()
        for begin in range(0, len(written), FIGURE_COUNT):
            lane = [min(number, MOST_FIGURE) for number in written[begin : begin + FIGURE_COUNT]]
            sums.add(LaneFigures(*lane))
        return sums

    def close(self) -> None:
        """Gives the memory back. Idempotent."""
        self._map.close()
        self.file.close()


def _last_by(history: Sequence[int], place: int) -> set[int]:
    """Calls of the last turn of a thread that had begun by then."""
    count = history[0]
    calls: set[int] = set()
    # Not the oldest: the thread may be writing over it.
    for number in range(count - 1, max(-1, count - _REMEMBERED), -1):
        at = 1 + 2 * (number % _REMEMBERED)
        began, is_first = divmod(history[at + 1], 2)
        if began <= place:
            calls.add(history[at])
            if is_first:
                break
    return calls


@dataclass(slots=True)
class _Thread:
    """What is known of a thread.

    Attributes:
        slot: its own.
        history: where its history begins; None if it has none.
        count: how many calls it has begun.
        owner: whose turn it is.
        ended_at: how far the stream was, at most, when it was last done with something.
    """

    slot: int
    history: int | None
    count: int = 0
    owner: int = 0
    ended_at: int = 0


class BoardWriter:
    """The worker's side. Thread-safe: every thread has a slot of its own, and batches have more.

    Args:
        file: descriptor of the board's file; closed here.
    """

    def __init__(self, file: int) -> None:
        self._map = mmap.mmap(file, BOARD_BYTES)
        os.close(file)
        self._numbers = memoryview(self._map).cast("Q")
        self._own = threading.local()
        self._lock = threading.Lock()
        self._stream: Stream = _NoStream()
        # Of batches, from the end on; those of threads are from the beginning on.
        self._free = list(range(_THREADS, _SLOTS))
        self._used = 0

    def follow(self, stream: Stream) -> None:
        """Writes down from now on how far this stream is."""
        self._stream = stream

    def begin(self, call: int, owner: int = 0) -> int:
        """Says that this thread runs a call.

        Args:
            call: its number.
            owner: whose it is: calls of different owners are told apart if one of them writes into
                the stream.

        Returns:
            What it ran before, for `end`.
        """
        own = self._thread()
        self._remember(own, (call,), owner)
        before = self._numbers[own.slot]
        self._numbers[own.slot] = call
        return before

    def end(self, before: int) -> None:
        """Says that this thread is back at what it ran before."""
        own = self._thread()
        self._numbers[own.slot] = before
        own.ended_at = self._stream.at_most()

    def begin_batch(self, calls: Sequence[int], owner: int = 0) -> Batch:
        """Says that this thread runs several calls, any of which may be to blame for what comes.

        Args:
            calls: at least one. Of more than there is room for only the first are written down.
            owner: whose they are; see begin.

        Returns:
            What is to be given to `end_batch`.
        """
        own = self._thread()
        more = len(calls) - 1
        with self._lock:
            slots = self._free[len(self._free) - more :] if more <= len(self._free) else self._free
            self._free = self._free[: len(self._free) - len(slots)]
        self._remember(own, calls[:_REMEMBERED], owner)
        for slot, call in zip(slots, calls[1:], strict=False):
            self._numbers[slot] = call
        before = self._numbers[own.slot]
        self._numbers[own.slot] = calls[0]
        return before, slots

    def end_batch(self, batch: Batch) -> None:
        """Says that a batch is over."""
        before, slots = batch
        for slot in slots:
            self._numbers[slot] = 0
        with self._lock:
            self._free += slots
        self.end(before)

    def write_figures(self, lane: int, figures: LaneFigures) -> None:
        """Writes down what a lane has run; by that lane's thread alone.

        Args:
            lane: its number from 0. There is room for 16; of others nothing is written.
            figures: of it.
        """
        if lane < _LANES:
            begin = _FIGURES + lane * FIGURE_COUNT
            for index, number in enumerate(figures.numbers(), begin):
                self._numbers[index] = number

    def _remember(self, own: _Thread, calls: Sequence[int], owner: int) -> None:
        if own.history is None:
            return
        place = self._stream.at_least()
        is_first = False
        if own.owner != owner:
            own.owner = owner
            # Whatever the last one wrote lies no further than where the stream was at its end.
            is_first = place > own.ended_at
            if not is_first and (marked := self._stream.mark()) is not None:
                place, is_first = marked, True
        numbers, history = self._numbers, own.history
        for call in calls:
            at = history + 1 + 2 * (own.count % _REMEMBERED)
            numbers[at] = call
            numbers[at + 1] = 2 * place + is_first
            is_first = False
            own.count += 1
            # Last, so that whoever reads it finds what it counts.
            numbers[history] = own.count

    def _thread(self) -> _Thread:
        try:
            own: _Thread = self._own.thread
        except AttributeError:
            with self._lock:
                slot = self._used
                if slot >= _THREADS:
                    raise RuntimeError(f"more than {_THREADS} threads run models") from None
                self._used += 1
            history = _SLOTS + slot * _HISTORY_SLOTS if slot < _HISTORIES else None
            own = self._own.thread = _Thread(slot, history)
        return own
