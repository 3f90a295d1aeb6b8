"""Finds texts that end a text while that is still being written. Plain data, no framework."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopTexts"]


class StopTexts:
    """Lets a text pass, piece by piece, up to the first of some texts that end it.

    The first is the one that is complete first; of two that are at the same character, the longer.
    So it does not matter what pieces the text comes in. What may be the beginning of one of them is
    kept until that is known.

    Args:
        stops: texts that end it, none of them empty.

    Attributes:
        found: whether one has come. Nothing passes any more then.

    Raises:
        ValueError: one of them is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("an empty text would end every text")
        self._stops = tuple(stops)
        self._kept = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Takes the next piece, and returns what can be told of the text."""
        if self.found:
            return ""
        text = self._kept + piece
        begins = {stop: text.find(stop) for stop in self._stops}
        places = [(begin + len(stop), begin) for stop, begin in begins.items() if begin >= 0]
        if places:
            self.found = True
            self._kept = ""
            _, begin = min(places)
            return text[:begin]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        told = len(text) - kept
        self._kept = text[told:]
        return text[:told]

    def end(self) -> str:
        """Says that the text is at its end, and returns what was kept of it."""
        kept, self._kept = self._kept, ""
        return kept


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that is a beginning of a stop, and not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
