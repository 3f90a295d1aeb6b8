"""Locks of a store, which several servers may use at once.

users.lock   held shared by every server that has the store open. Who gets it alone may remove.
write.lock   held by whoever writes: one at a time, so that two imports of equal tensors store them
             once, and so that what lies in tmp/ while nobody else writes is known to be left over.

The system drops both when a process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from modelyard_server.runtimes.api import LoadCancelled, StopCheck
from modelyard_server.weights.store.layout import Layout, StoreError

__all__ = ["StoreLocks"]

_POLL_S = 0.02
_OPEN_TIMEOUT_S = 60.0


class StoreLocks:
    """This server's part in the locks of a store. Thread-safe.

    Raises:
        StoreError: another server has been removing models for a minute, or the folder's file
            system has no locks.
    """

    def __init__(self, layout: Layout) -> None:
        self._mutex = threading.Lock()
        try:
            self._users = _open(layout, "users.lock")
            self._write = _open(layout, "write.lock")
            deadline = time.monotonic() + _OPEN_TIMEOUT_S
            while not _try(self._users, fcntl.LOCK_SH):
                if time.monotonic() > deadline:
                    raise StoreError("another server has had the weight store to itself too long")
                time.sleep(_POLL_S)
        except OSError as error:
            raise StoreError(
                f"the weight store cannot be locked: {os.strerror(error.errno or 0).lower()}"
            ) from None

    @contextmanager
    def writing(self, stop: StopCheck) -> Iterator[None]:
        """Holds the right to write; waits for it.

        Raises:
            LoadCancelled: stop said so.
        """
        while not self._mutex.acquire(timeout=_POLL_S):
            if stop():
                raise LoadCancelled
        try:
            while not _try(self._write, fcntl.LOCK_EX):
                if stop():
                    raise LoadCancelled
                time.sleep(_POLL_S)
            try:
                yield
            finally:
                fcntl.flock(self._write, fcntl.LOCK_UN)
        finally:
            self._mutex.release()

    @contextmanager
    def trying_to_write(self) -> Iterator[bool]:
        """Holds the right to write, if it says so; it waits for threads, but for no server."""
        with self._mutex:
            held = _try(self._write, fcntl.LOCK_EX)
            try:
                yield held
            finally:
                if held:
                    fcntl.flock(self._write, fcntl.LOCK_UN)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Holds the store alone, if it says so: nobody else has it open."""
        with self.trying_to_write() as may_write:
            if not may_write:
                yield False
                return
            # Trying gives the shared lock up for a moment. Nobody can remove anything meanwhile:
            # that takes the lock for writing as well, which is held here.
            held = _try(self._users, fcntl.LOCK_EX)
            try:
                yield held
            finally:
                fcntl.flock(self._users, fcntl.LOCK_SH)

    def close(self) -> None:
        """Gives the store up."""
        os.close(self._users)
        os.close(self._write)


def _open(layout: Layout, name: str) -> int:
    return os.open(layout.root / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _try(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
