"""The items of a prediction stream, from the question to the answer: what both clients share.

Nothing here waits, and nothing is safe for threads: whoever uses it does that.
"""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

import grpc

from modelyard import errors
from modelyard._predict_messages import result_from
from modelyard._status import error_from_rpc, reading_answer
from modelyard.prediction import Prediction
from modelyard.v1 import inference_service_pb2 as pb

__all__ = [
    "METHOD",
    "MOST_IN_FLIGHT",
    "Settled",
    "StreamItems",
    "broken_error",
    "checked_in_flight",
    "checked_linger",
    "ended_error",
]

METHOD: Final = "/modelyard.v1.InferenceService/PredictStream"

MOST_IN_FLIGHT: Final = 1024
"""Of one stream, by the contract; also most items of a message."""

_MESSAGE_BYTES: Final = 256 * 1024
"""A message is not filled beyond this; a larger item has one to itself."""

_OVERDUE_S: Final = 10.0
"""How much later than it must come an answer is waited for, before the server counts as gone."""

_NS: Final = 1_000_000_000


class _Future(Protocol):
    """What ``asyncio.Future`` and ``concurrent.futures.Future`` have in common."""

    def done(self) -> bool: ...

    def set_result(self, result: Prediction, /) -> None: ...

    def set_exception(self, exception: errors.ModelyardError, /) -> None: ...


_FutureT = TypeVar("_FutureT", bound=_Future)


@dataclass(frozen=True, slots=True)
class Settled(Generic[_FutureT]):
    """Futures and what becomes of them.

    Args:
        outcomes: each with its result or error.
    """

    outcomes: list[tuple[_FutureT, Prediction | errors.ModelyardError]]

    def tell(self) -> None:
        """Settle the futures, but for those that nobody waits for any more."""
        for future, outcome in self.outcomes:
            if future.done():
                continue
            if isinstance(outcome, Prediction):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)


class StreamItems(Generic[_FutureT]):
    """The items of one stream that wait to be sent, and those that are not answered.

    Args:
        target: of the server, for texts.
        max_message_bytes: largest message to send.
    """

    def __init__(self, target: str, max_message_bytes: int) -> None:
        self._target = target
        self._max_message_bytes = max_message_bytes
        self._next_id = 1
        self._waiting: deque[bytes] = deque()
        self._open: dict[int, _FutureT] = {}
        self._quiet_since_s = 0.0
        self._longest_s = 0.0

    @property
    def open_count(self) -> int:
        """How many are not answered."""
        return len(self._open)

    @property
    def waiting_count(self) -> int:
        """How many of those are not sent."""
        return len(self._waiting)

    def add(self, request: pb.PredictRequest, timeout_s: float, future: _FutureT) -> None:
        """Take an item in.

        Raises:
            ValueError: it is too large to send.
        """
        message = pb.PredictStreamRequest()
        item = message.items.add(id=self._next_id)
        item.request.MergeFrom(request)
        item.timeout.seconds = int(timeout_s)
        # Rounded up: a time above 0 stays one.
        item.timeout.nanos = min(math.ceil((timeout_s % 1) * _NS), _NS - 1)
        frame = message.SerializeToString()
        if len(frame) > self._max_message_bytes:
            raise ValueError(
                f"the request has {len(frame)} bytes and max_message_bytes is "
                f"{self._max_message_bytes}: send fewer rows at a time, or raise the limit here "
                "and on the server"
            )
        if not self._open:
            self._quiet_since_s, self._longest_s = time.monotonic(), 0.0
        self._longest_s = max(self._longest_s, timeout_s)
        self._open[self._next_id] = future
        self._waiting.append(frame)
        self._next_id += 1

    def take_message(self) -> bytes:
        """Return a message with those that wait, as many as go into one; at least one waits."""
        waiting = self._waiting
        frames = [waiting.popleft()]
        size_bytes = len(frames[0])
        while waiting and len(frames) < MOST_IN_FLIGHT:
            size_bytes += len(waiting[0])
            if size_bytes > min(_MESSAGE_BYTES, self._max_message_bytes):
                break
            frames.append(waiting.popleft())
        # Messages of repeated fields, one behind the other, are one message with all elements.
        return b"".join(frames)

    def settle(self, response: pb.PredictStreamResponse) -> Settled[_FutureT]:
        """Take the items of an answer out.

        Raises:
            ServerError: it answers what was not asked.
        """
        self._quiet_since_s = time.monotonic()
        outcomes: list[tuple[_FutureT, Prediction | errors.ModelyardError]] = []
        for result in response.results:
            future = self._open.pop(result.id, None)
            if future is None:
                with reading_answer(self._target):
                    raise ValueError(f"an answer to item {result.id}, which is not open")
            if not future.done():
                outcomes.append((future, self._outcome_of(result)))
        return Settled(outcomes)

    def _outcome_of(self, result: pb.PredictStreamResult) -> Prediction | errors.ModelyardError:
        try:
            with reading_answer(self._target):
                return result_from(result)
        except errors.ServerError as error:
            return error

    def fail(self, error: errors.ModelyardError) -> Settled[_FutureT]:
        """Take all items out: the stream has ended."""
        futures = list(self._open.values())
        self._open.clear()
        self._waiting.clear()
        # Each has its own: a raised error remembers where.
        return Settled([(future, copy.copy(error)) for future in futures])

    def is_overdue(self, *, is_closed: bool) -> bool:
        """True if nothing has come for longer than any item that the server has may take.

        Somebody would have been answered by then, with an error if nothing else; or, if this side
        has ended and all is answered, the stream would have.
        """
        allowed_s = _OVERDUE_S + (self._longest_s if self._open else 0.0)
        quiet_s = time.monotonic() - self._quiet_since_s
        return (is_closed or bool(self._open)) and quiet_s > allowed_s


def broken_error(error: grpc.RpcError, target: str) -> errors.ModelyardError:
    """Return what a call that ended with an error means for items that are not answered.

    A refusal with a reason is that; anything else is ``StreamBroken``.
    """
    ended = error_from_rpc(error, target=target)
    if ended.reason is not None and not isinstance(ended, errors.ServerError):
        # The same, with what it means.
        rebuild, (cls, message, fields) = ended.__reduce__()
        again: errors.ModelyardError = rebuild(
            cls, f"{message}; the stream ended before it had answered this item", fields
        )
        return again
    return ended_error(str(ended), ended.code)


def ended_error(
    cause: str, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
) -> errors.StreamBroken:
    """Return the error of an item whose stream has ended."""
    return errors.StreamBroken(
        f"the stream ended before it had answered this item: {cause}; it may be asked again, on "
        "another stream",
        code=code,
    )


def checked_in_flight(max_in_flight: object) -> int:
    """Return the argument if so many items may be in flight. Raises TypeError, ValueError."""
    if type(max_in_flight) is not int:
        raise TypeError(f"max_in_flight must be an int, got {type(max_in_flight).__name__}")
    if not 1 <= max_in_flight <= MOST_IN_FLIGHT:
        raise ValueError(f"max_in_flight is {max_in_flight}: 1 to {MOST_IN_FLIGHT} may be")
    return max_in_flight


def checked_linger(linger_s: object) -> float:
    """Return the argument if it is a time, 0 included. Raises TypeError, ValueError."""
    if type(linger_s) is bool or not isinstance(linger_s, int | float):
        raise TypeError(f"linger_s must be a number of seconds, got {type(linger_s).__name__}")
    if not (math.isfinite(linger_s) and linger_s >= 0):
        raise ValueError(f"linger_s is {linger_s}: give a finite number of seconds, 0 or above")
    return linger_s
