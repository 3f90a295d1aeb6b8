"""What the branches of a split have had lately, for choices that may lean to what is resident."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

__all__ = ["Balance"]

_WINDOW = 1000
_ONE = 1 / _WINDOW


class Balance:
    """The last choices of a split that went by no affinity.

    Invariant: a choice that leans leaves every branch within the tolerance of its weight, of the
    last thousand choices.

    Args:
        weights: of the branches; at least one is above 0.
        tolerance: 0 to 1, of all choices.
    """

    def __init__(self, weights: Sequence[float], tolerance: float) -> None:
        whole = sum(weights)
        self._shares = [weight / whole for weight in weights]
        self._tolerance = tolerance
        self._last: deque[int] = deque()
        self._counts = [0] * len(weights)

    def note(self, position: int) -> None:
        """Notes a choice."""
        if len(self._last) == _WINDOW:
            self._counts[self._last.popleft()] -= 1
        self._last.append(position)
        self._counts[position] += 1

    def instead_of(self, position: int, others: Sequence[int]) -> int:
        """The branch to take where another one has been drawn.

        Args:
            position: the one that was drawn.
            others: those that would be better.

        Returns:
            The one of the others that has had least of its weight, if it and the one that was drawn
            stay within the tolerance; else the one that was drawn.
        """
        if not others:
            return position
        best = min(others, key=self._lead)
        if (
            self._lead(best) + _ONE > self._tolerance
            or _ONE - self._lead(position) > self._tolerance
        ):
            return position
        return best

    def _lead(self, position: int) -> float:
        """How many more than by its weight a branch has had, as a share of a whole window."""
        surplus = self._counts[position] - self._shares[position] * len(self._last)
        return surplus / _WINDOW
