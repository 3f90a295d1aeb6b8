"""A lock for those who may wait, and a box for those who may not."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

__all__ = ["Mailbox"]

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Does something under a lock for callers who cannot wait for it.

    What ends with an object may run in any thread and in the middle of anything, so also while that
    very thread holds the lock. It puts what is to be done into the box. Whoever holds the lock does
    it before they leave, and if nobody holds it, it is done at once.

    Args:
        handle: does it, under the lock. Must not raise.

    Attributes:
        lock: not reentrant.
    """

    def __init__(self, handle: Callable[[T], None]) -> None:
        self.lock = threading.Lock()
        self._handle = handle
        self._items: deque[T] = deque()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock."""
        try:
            with self.lock:
                yield
        finally:
            self._empty()

    def post(self, item: T) -> None:
        """Has something done, now or by whoever holds the lock. Never waits."""
        self._items.append(item)
        self._empty()

    def _empty(self) -> None:
        # Asked again after every release: something may have been put in just before it.
        while self._items and self.lock.acquire(blocking=False):
            try:
                while self._items:
                    self._handle(self._items.popleft())
            finally:
                self.lock.release()
