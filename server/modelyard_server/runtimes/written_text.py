"""The text of one generation: from tokens to what can be told, and why it ends. Plain data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from modelyard_server.runtimes.detokenizing import Detokenizer
from modelyard_server.runtimes.sessions import Finish, SessionAnswer
from modelyard_server.runtimes.stop_texts import StopTexts

__all__ = ["WrittenText"]


class WrittenText:
    """What has been generated of one text, and what of that was told.

    Args:
        decode: makes a text of tokens.
        prompt_token_count: tokens of the prompt.
        most: tokens to generate at most, at least 1.
        end_ids: tokens that say that the text is at its end.
        stops: texts that end it, none of them empty.

    Attributes:
        finish: why it has ended; NOT while it goes on.
        token_count: tokens generated.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        prompt_token_count: int,
        most: int,
        end_ids: Collection[int],
        stops: Sequence[str],
    ) -> None:
        self.finish = Finish.NOT
        self.token_count = 0
        self._prompt_token_count = prompt_token_count
        self._most = most
        self._end_ids = frozenset(end_ids)
        self._detokenizer = Detokenizer(decode)
        self._stops = StopTexts(stops)
        self._untold_ids: list[int] = []
        self._untold = ""

    @property
    def untold_count(self) -> int:
        """Tokens that were generated since the last answer."""
        return len(self._untold_ids)

    def push(self, token: int) -> None:
        """Takes the next token; none after the end."""
        self.token_count += 1
        self._untold_ids.append(token)
        if token in self._end_ids:
            self._end(Finish.END)
            return
        self._untold += self._stops.push(self._detokenizer.push(token))
        if self._stops.found:
            self.finish = Finish.STOP
        elif self.token_count >= self._most:
            self._end(Finish.LENGTH)

    def take(self) -> SessionAnswer:
        """What there is since the last answer."""
        answer = SessionAnswer(
            token_ids=tuple(self._untold_ids),
            text=self._untold,
            finish=self.finish,
            prompt_token_count=self._prompt_token_count,
            token_count=self.token_count,
        )
        self._untold_ids = []
        self._untold = ""
        return answer

    def _end(self, finish: Finish) -> None:
        self._untold += self._stops.push(self._detokenizer.end())
        self.finish = Finish.STOP if self._stops.found else finish
        self._untold += self._stops.end()
