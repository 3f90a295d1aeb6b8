"""Makes text of tokens while they come. Plain data, no framework."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

__all__ = ["Detokenizer"]

_UNKNOWN: Final = "\ufffd"
"""What decoders put in place of bytes that are no character, or not yet."""

_MOST_UNKNOWN: Final = 3
"""A character has at most four bytes: so many may be there without being one, in as many tokens."""


class Detokenizer:
    """The text of tokens, whole characters only, as they come.

    A token may be a part of a character, and what a token looks like may depend on the one before
    it (the space between two words, say). So tokens are decoded together with some before them, and
    what is new of the outcome is told. What ends in something that is no character is kept until
    the next tokens make one of it, or make clear that they will not.

    All that was told is what `decode` makes of all tokens, unless its text of some tokens changes
    once others follow. Some decoders correct the spaces before punctuation marks, and some take all
    bytes for unknown that stand beside one that is no part of a character.

    Args:
        decode: makes a text of tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        # Tokens from a place on whose text is not told yet, and some before them.
        self._ids: list[int] = []
        self._told_ids = 0
        self._told = 0

    def push(self, token: int) -> str:
        """Takes the next token, and returns what can be told."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(_UNKNOWN) and len(self._ids) - self._told_ids <= _MOST_UNKNOWN:
            # Some decoders take all bytes before it for unknown as well, until it is whole.
            return ""
        kept = 0
        while kept < min(_MOST_UNKNOWN, len(text)) and text[-1 - kept] == _UNKNOWN:
            kept += 1
        end = len(text) - kept
        piece = text[self._told : end]
        self._told = max(self._told, end)
        if piece and not kept:
            self._move_on()
        return piece

    def end(self) -> str:
        """Says that no more tokens come, and returns what was kept."""
        piece = self._decode(self._ids)[self._told :] if self._ids else ""
        self._told += len(piece)
        return piece

    def _move_on(self) -> None:
        """Forgets the tokens before those whose text was told last: these are enough to go by."""
        rest = self._ids[self._told_ids :]
        text = self._decode(rest)
        if text:
            self._ids = rest
            self._told = len(text)
        self._told_ids = len(self._ids)
