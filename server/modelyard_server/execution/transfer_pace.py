"""Makes loads take as long as their bytes would, for devices that are declared with a bandwidth.

A logical device is a pool of host memory, which takes weights as fast as memory goes. Declared with
the bandwidth of what it stands for, it makes a load as dear as it will be there, and a plan can be
judged on a machine that has none of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from modelyard_server.runtimes.api import LoadCancelled

__all__ = ["TransferPace"]

_LONGEST_WAIT_S = 3600.0
"""Threads cannot wait for any number of seconds at once."""


class TransferPace:
    """Holds a load up until its bytes could have come over each device's link.

    Links are independent: the parts of a model come at the same time, and the slowest decides. So
    are loads: two that meet on one device (parts of models with different homes) are not slowed by
    each other. Thread-safe; it has no state.

    Args:
        bytes_per_s: bandwidth of each device, by position; 0 for no limit.
        clock: seconds; monotonic.
        wait: waits for an event, at most so many seconds; true if it is set.

    Raises:
        ValueError: a negative bandwidth.
    """

    def __init__(
        self,
        bytes_per_s: Sequence[int],
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        if any(speed < 0 for speed in bytes_per_s):
            raise ValueError(f"a bandwidth must not be negative: {list(bytes_per_s)}")
        self._bytes_per_s = tuple(bytes_per_s)
        self._clock = clock
        self._wait = wait

    def now_s(self) -> float:
        """When a load that begins now begins, for `hold`."""
        return self._clock()

    def least_s(self, sizes: Mapping[int, int]) -> float:
        """Seconds that a load must take at least.

        Args:
            sizes: its bytes, by position of the device.
        """
        return max(
            (
                size_bytes / speed
                for device, size_bytes in sizes.items()
                if (speed := self._bytes_per_s[device]) > 0
            ),
            default=0.0,
        )

    def hold(self, sizes: Mapping[int, int], began_s: float, stop: threading.Event) -> None:
        """Waits until a load has taken as long as it must. For the thread that loads.

        Args:
            sizes: its bytes, by position of the device.
            began_s: what now_s said when it began.
            stop: set once the load is no longer wanted; ends the wait at once.

        Raises:
            LoadCancelled: stop was set before the time was over.
        """
        ends_s = began_s + self.least_s(sizes)
        while (left_s := ends_s - self._clock()) > 0:
            if self._wait(stop, min(left_s, _LONGEST_WAIT_S)):
                raise LoadCancelled
