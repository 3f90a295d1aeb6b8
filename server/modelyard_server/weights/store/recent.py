"""What was used last, by key; the rest is forgotten."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["Recent"]

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """A dictionary that holds so many entries and forgets the one that was used longest ago.

    Thread-safe.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """The value; None if there is none."""
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: Key, value: Value) -> None:
        """Remembers a value in place of any other of that key."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._limit:
                self._values.popitem(last=False)

    def setdefault(self, key: Key, value: Value) -> Value:
        """The value that is there, else this one."""
        found = self.get(key)
        if found is None:
            self.put(key, value)
            return value
        return found

    def drop(self, unwanted: Callable[[Key, Value], bool]) -> None:
        """Forgets all entries of which that is true."""
        with self._lock:
            for key in [key for key, value in self._values.items() if unwanted(key, value)]:
                del self._values[key]
