"""Several threads want the same: one makes it, the others wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError, StopCheck

__all__ = ["SingleFlight"]

Key = TypeVar("Key")
Result = TypeVar("Result")

_POLL_S = 0.05


class _Flight:
    __slots__ = ("failure", "landed")

    def __init__(self) -> None:
        self.landed = threading.Event()
        self.failure: tuple[str, bool] | None = None


class SingleFlight(Generic[Key, Result]):
    """Runs one maker a key at a time. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[Key, _Flight] = {}

    def run(self, key: Key, make: Callable[[], Result], *, stop: StopCheck) -> Result | None:
        """Makes it, or waits until another thread has.

        Args:
            key: of what is made.
            make: makes it.
            stop: asked while waiting.

        Returns:
            What make returned; None if another thread was making it and has ended, well or because
            it was cancelled: look again.

        Raises:
            ModelFilesError: make did, here or in the thread that was waited for.
            LoadCancelled: stop said so.
        """
        own = _Flight()
        with self._lock:
            flight = self._flights.setdefault(key, own)
        if flight is not own:
            self._wait(flight, stop)
            return None
        try:
            return make()
        except ModelFilesError as error:
            own.failure = (error.text, error.transient)
            raise
        finally:
            with self._lock:
                del self._flights[key]
            own.landed.set()

    @staticmethod
    def _wait(flight: _Flight, stop: StopCheck) -> None:
        while not flight.landed.wait(_POLL_S):
            if stop():
                raise LoadCancelled
        if flight.failure is not None:
            # An error of its own: a shared one would collect every thread's frames.
            text, transient = flight.failure
            raise ModelFilesError(text, transient=transient)
