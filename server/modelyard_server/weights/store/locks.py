"""Locks of a store, which several servers may use at once.

users.lock    held shared by everybody who has the store open and does not say what is used of it.
              Who gets it alone may remove what nobody says he uses; see collecting.
write.lock    held by whoever writes: one at a time, so that two imports of equal tensors store
              them once, and so that what lies in tmp/ while nobody else writes is known to be left
              over.
readers.lock  a byte of it for each model, held shared while the model's files are being read. Who
              gets it alone may remove the model.

The system drops all of them when a process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from modelyard_server.runtimes.api import LoadCancelled, StopCheck
from modelyard_server.weights.store.layout import Layout, StoreError

__all__ = ["StoreLocks", "try_lock"]

_POLL_S = 0.02
_OPEN_TIMEOUT_S = 60.0


class StoreLocks:
    """This process's part in the locks of a store. Thread-safe.

    Args:
        layout: of the store.
        leasing: whoever has the store open reads what `reading` holds and nothing else, so that
            others may remove the rest.

    Raises:
        StoreError: another server has been removing models for a minute, or the folder's file
            system has no locks.
    """

    def __init__(self, layout: Layout, *, leasing: bool = False) -> None:
        self._layout = layout
        self._leasing = leasing
        self._mutex = threading.Lock()
        try:
            self._users = _open(layout, "users.lock")
            self._write = _open(layout, "write.lock")
            deadline = time.monotonic() + _OPEN_TIMEOUT_S
            while not leasing and not try_lock(self._users, fcntl.LOCK_SH):
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
            while not try_lock(self._write, fcntl.LOCK_EX):
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
            held = try_lock(self._write, fcntl.LOCK_EX)
            try:
                yield held
            finally:
                if held:
                    fcntl.flock(self._write, fcntl.LOCK_UN)

    @contextmanager
    def alone(self, stop: StopCheck | None = None) -> Iterator[bool]:
        """Holds the store alone, if it says so: all others who have it open are leasing.

        Args:
            stop: waits for who writes until stop says so; None: it does not hold it then.

        Raises:
            LoadCancelled: stop said so.
        """
        with self.trying_to_write() if stop is None else self.writing(stop) as may_write:
            if may_write is False:
                yield False
                return
            # Trying gives the shared lock up for a moment. Nobody can remove anything meanwhile:
            # that takes the lock for writing as well, which is held here.
            held = try_lock(self._users, fcntl.LOCK_EX)
            try:
                yield held
            finally:
                fcntl.flock(self._users, fcntl.LOCK_UN if self._leasing else fcntl.LOCK_SH)

    @contextmanager
    def reading(self, digest: str, stop: StopCheck) -> Iterator[None]:
        """Holds a model against removal, from here on: it may have gone before.

        Raises:
            LoadCancelled: stop said so.
        """
        descriptor = _open(self._layout, "readers.lock")
        try:
            # Who has it alone has it for a moment.
            while not _try_byte(descriptor, digest, alone=False):
                if stop():
                    raise LoadCancelled
                time.sleep(_POLL_S)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def trying_to_remove(self, digest: str) -> Iterator[bool]:
        """Holds a model alone, if it says so: nobody reads it, in this process or another."""
        descriptor = _open(self._layout, "readers.lock")
        try:
            yield _try_byte(descriptor, digest, alone=True)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Gives the store up."""
        os.close(self._users)
        os.close(self._write)


def _open(layout: Layout, name: str) -> int:
    return os.open(layout.root / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def try_lock(descriptor: int, operation: int) -> bool:
    """Takes a lock of an open file if nobody has one against it.

    Args:
        descriptor: of the file.
        operation: fcntl.LOCK_EX or LOCK_SH.
    """
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _try_byte(descriptor: int, digest: str, *, alone: bool) -> bool:
    """Locks a model's byte; the lock is the open file's, and goes when that is closed."""
    if sys.platform != "linux":
        # Without locks of parts that belong to open files: any reader holds all models.
        return try_lock(descriptor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    start = int(hashlib.sha256(digest.encode()).hexdigest()[:15], 16)
    kind = fcntl.F_WRLCK if alone else fcntl.F_RDLCK
    try:
        # A struct flock: type, whence, start, length, process.
        wanted = struct.pack("hhqqi", kind, os.SEEK_SET, start, 1, 0)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)
    except (BlockingIOError, PermissionError):
        return False
    return True
