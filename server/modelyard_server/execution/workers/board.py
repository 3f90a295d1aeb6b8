"""A file that a worker and the server share: what each of the worker's threads is doing.

The worker writes there without telling anybody, which costs less than a message. The server reads
it when it looks for calls that take too long, and when the worker has died: then it says who was
running. It also says so of a worker that is stuck, which no message could.

What stands there was written by a process that may be broken. It is used only to choose among calls
that the server itself knows to be open.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence

from modelyard_server.execution.workers.memory_files import SealedFile

__all__ = ["Board", "BoardWriter"]

_THREADS = 512
_SLOTS = 2048
"""Those that are no thread's are for batches: all calls of a batch stand there but its first."""

_SLOT_BYTES = 8
"""Of the number of a call; one store of the processor, so that nobody reads half of one."""

BOARD_BYTES = _SLOTS * _SLOT_BYTES

Batch = tuple[int, list[int]]
"""What a thread ran before its batch, and the slots of the batch."""


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
            return frozenset(numbers) - {0}

    def close(self) -> None:
        """Gives the memory back. Idempotent."""
        self._map.close()
        self.file.close()


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
        # Of batches, from the end on; those of threads are from the beginning on.
        self._free = list(range(_THREADS, _SLOTS))
        self._used = 0

    def begin(self, call: int) -> int:
        """Says that this thread runs a call. Returns what it ran before, for `end`."""
        slot = self._slot()
        before = self._numbers[slot]
        self._numbers[slot] = call
        return before

    def end(self, before: int) -> None:
        """Says that this thread is back at what it ran before."""
        self._numbers[self._slot()] = before

    def begin_batch(self, calls: Sequence[int]) -> Batch:
        """Says that this thread runs several calls, any of which may be to blame for what comes.

        Args:
            calls: at least one. Of more than there is room for only the first are written down.

        Returns:
            What is to be given to `end_batch`.
        """
        more = len(calls) - 1
        with self._lock:
            slots = self._free[len(self._free) - more :] if more <= len(self._free) else self._free
            self._free = self._free[: len(self._free) - len(slots)]
        for slot, call in zip(slots, calls[1:], strict=False):
            self._numbers[slot] = call
        return self.begin(calls[0]), slots

    def end_batch(self, batch: Batch) -> None:
        """Says that a batch is over."""
        before, slots = batch
        for slot in slots:
            self._numbers[slot] = 0
        with self._lock:
            self._free += slots
        self.end(before)

    def _slot(self) -> int:
        slot: int | None = getattr(self._own, "slot", None)
        if slot is None:
            with self._lock:
                if self._used >= _THREADS:
                    raise RuntimeError(f"more than {_THREADS} threads run models")
                slot = self._own.slot = self._used
                self._used += 1
        return slot
