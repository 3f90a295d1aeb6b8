"""How much time loads have taken lately."""

from __future__ import annotations

from collections import deque
from typing import Final

__all__ = ["RecentLoads"]

_SECOND_NS: Final = 1_000_000_000


class RecentLoads:
    """Seconds of the loads that ended within a window of time before now.

    A load counts as a whole at the moment it ends. What ended within the same second of the clock
    is one number, so that at most `window_s` + 1 numbers are kept, and the window is exact to a
    second.

    Args:
        window_s: length of the window in seconds; at least 1.

    Raises:
        ValueError: the window is shorter.
    """

    def __init__(self, window_s: int = 60) -> None:
        if window_s < 1:
            raise ValueError(f"a window is at least a second, got {window_s}")
        self._window_s = window_s
        # (second of the clock, seconds of loads), in the order of time.
        self._ended: deque[tuple[int, float]] = deque()

    def note(self, now_ns: int, took_s: float) -> None:
        """A load has ended that took so long.

        Args:
            now_ns: of a clock that never goes back.
            took_s: seconds.
        """
        second = now_ns // _SECOND_NS
        self._forget(second)
        if self._ended and self._ended[-1][0] == second:
            took_s += self._ended.pop()[1]
        self._ended.append((second, took_s))

    def seconds(self, now_ns: int) -> float:
        """Seconds of the loads that ended within the window."""
        self._forget(now_ns // _SECOND_NS)
        return sum(took_s for _, took_s in self._ended)

    def _forget(self, second: int) -> None:
        while self._ended and self._ended[0][0] <= second - self._window_s:
            self._ended.popleft()
