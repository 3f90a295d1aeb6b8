"""Asking for the items of a batch until each has an answer or an error that stays.

What the server says can help is asked for again, that item alone, after the time that the server
names; nothing else is. Rounds, time and the size of a call are bounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import grpc

from modelyard.errors import (
    AnswerTooLarge,
    DeadlineExceeded,
    InvalidRequest,
    ModelyardError,
    ServerUnavailable,
)
from modelyard.integrations.beam._rows import size_of
from modelyard.prediction import BatchItem, Prediction

__all__ = ["AskingSettings", "Figures", "Predictor", "ask", "late"]

_MOST_ITEMS: Final = 1024
"""Of one call: the contract's limit."""

_MOST_BYTES: Final = 8 * 1024**2
"""Of one call, inputs alone: half of what a server takes by default."""

_PAUSE_S: Final = 0.1
"""Before asking again where nobody has named a time; doubles with every round."""

_MOST_PAUSE_S: Final = 30.0


class Predictor(Protocol):
    """What asks for predictions; ``modelyard.Client`` is one."""

    def predict_batch(
        self, items: Sequence[BatchItem], *, timeout_s: float | None = None
    ) -> Sequence[Prediction | ModelyardError]:
        """See ``Client.predict_batch``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AskingSettings:
    """How long and how often to ask.

    Args:
        timeout_s: seconds that a batch may take, with everything that is asked for again.
        max_retries: rounds behind the first.
        max_items: most items of one call.
        max_rows: most examples that share an item.

    Raises:
        ValueError: one is out of range.
    """

    timeout_s: float = 120.0
    max_retries: int = 4
    max_items: int = _MOST_ITEMS
    max_rows: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"timeout_s is {self.timeout_s}: give seconds above 0")
        if self.max_retries < 0:
            raise ValueError(f"max_retries is {self.max_retries}: give 0 or more")
        if not 1 <= self.max_items <= _MOST_ITEMS:
            raise ValueError(f"max_items is {self.max_items}: 1 to {_MOST_ITEMS} may be")
        if self.max_rows < 1:
            raise ValueError(f"max_rows is {self.max_rows}: give 1 or more")


@dataclass(slots=True, kw_only=True)
class Figures:
    """What asking for a batch took.

    Attributes:
        call_count: calls that were made.
        retried_count: items that were asked for again, once for each time.
    """

    call_count: int = 0
    retried_count: int = 0


def ask(
    predictor: Predictor,
    items: Sequence[BatchItem],
    settings: AskingSettings,
    *,
    figures: Figures | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> list[Prediction | ModelyardError]:
    """Ask for items, and again for those that it can help.

    Args:
        predictor: whom to ask.
        items: what for.
        settings: how long and how often.
        figures: is counted up.
        sleep: waits for seconds.
        clock: the time in seconds, from anywhere.

    Returns:
        For each item, in their order, its prediction, or the last error. Nothing of what a server
        says is raised.
    """
    figures = figures or Figures()
    end_s = clock() + settings.timeout_s
    results: list[Prediction | ModelyardError] = [late()] * len(items)
    positions: Sequence[int] = range(len(items))
    most_items = settings.max_items
    for retries in range(settings.max_retries + 1):
        pause_s, fewer = 0.0, most_items
        again: list[int] = []
        for called in _calls(items, positions, most_items):
            left_s = end_s - clock()
            if left_s <= 0:
                return results
            figures.call_count += 1
            answers = _call(predictor, [items[position] for position in called], left_s)
            for position, answer in zip(called, answers, strict=True):
                results[position] = answer
                wait_s = _wait_s(answer, len(called), retries)
                if wait_s is not None:
                    again.append(position)
                    pause_s = max(pause_s, wait_s)
                    if isinstance(answer, AnswerTooLarge):
                        fewer = min(fewer, max(1, len(called) // 2))
        if not again or retries == settings.max_retries or clock() + pause_s >= end_s:
            break
        sleep(pause_s)
        figures.retried_count += len(again)
        positions, most_items = again, fewer
    return results


def _call(
    predictor: Predictor, items: Sequence[BatchItem], timeout_s: float
) -> Sequence[Prediction | ModelyardError]:
    """The results of one call. If it fails as a whole, each of its items has failed."""
    try:
        return predictor.predict_batch(items, timeout_s=timeout_s)
    except ModelyardError as error:
        return [error] * len(items)
    except (TypeError, ValueError) as error:
        if len(items) > 1:
            # The client refuses a message whole, whichever item is to blame.
            return [answer for item in items for answer in _call(predictor, [item], timeout_s)]
        return [InvalidRequest(str(error), code=grpc.StatusCode.INVALID_ARGUMENT)]


def _wait_s(answer: Prediction | ModelyardError, count: int, retries: int) -> float | None:
    """Seconds to wait before asking again; None if it cannot help.

    Args:
        answer: what came.
        count: of the items of its call.
        retries: rounds so far.
    """
    match answer:
        case Prediction():
            return None
        case AnswerTooLarge():
            return 0.0 if count > 1 else None
        case ModelyardError(retry_after_s=float() | int() as wait_s):
            return min(max(wait_s, 0.0), _MOST_PAUSE_S)
        case ServerUnavailable():
            return float(min(_PAUSE_S * 2**retries, _MOST_PAUSE_S))
        case _:
            return None


def _calls(
    items: Sequence[BatchItem], positions: Sequence[int], most_items: int
) -> Iterator[list[int]]:
    """Positions in calls that are not too large."""
    call: list[int] = []
    size_bytes = 0
    for position in positions:
        item_bytes = size_of(items[position].inputs)
        if call and (len(call) == most_items or size_bytes + item_bytes > _MOST_BYTES):
            yield call
            call, size_bytes = [], 0
        call.append(position)
        size_bytes += item_bytes
    if call:
        yield call


def late() -> ModelyardError:
    """Return the error of an item that was not asked for in time."""
    return DeadlineExceeded(
        "the batch's time was over before its turn came: give the handler a longer timeout_s, or "
        "smaller batches",
        code=grpc.StatusCode.DEADLINE_EXCEEDED,
    )
