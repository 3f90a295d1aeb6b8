"""Calls that change something: one at a time, and each done once, however often it is sent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from google.protobuf.message import Message

from modelyard_server.catalog.records import RequestRecord
from modelyard_server.catalog.writes import Asked, Writes
from modelyard_server.errors import Refusal

__all__ = ["Answered", "checked_once", "once"]

ResponseT = TypeVar("ResponseT", bound=Message)
_AnswerT = TypeVar("_AnswerT", bound=Message, covariant=True)


class _Request(Protocol):
    @property
    def request_id(self) -> str: ...

    def SerializeToString(self, *, deterministic: bool = False) -> bytes: ...


Answered = Callable[[Message], RequestRecord | None]
"""Makes of an answer what is to be remembered of it."""


async def once(
    writes: Writes,
    request: _Request,
    response_type: type[ResponseT],
    change: Callable[[Answered], Awaitable[ResponseT]],
    *,
    check: Callable[[], Awaitable[object]] | None = None,
) -> ResponseT:
    """Answers a call that changes something.

    Args:
        writes: keeps others waiting, and remembers.
        request: the message; what it says tells a replay from another call with the same id.
        response_type: of its answer.
        change: makes the change durable, together with what it is given makes of the answer, and
            returns the answer.
        check: refuses what change would refuse, before others are kept waiting: what hangs there,
            such as a model's files, holds up nobody else.

    Raises:
        Refusal: INVALID_FIELD for an id that another call has used; what check and change raise.
    """

    async def answered_before() -> ResponseT | None:
        if (first := await writes.first_answer(asked)) is None:
            return None
        response = response_type()
        response.ParseFromString(first)
        return response

    # Not the bytes as they came: a map has no order on the wire, and a client that sends its call
    # again after a crash may well write it in another one.
    body = request.SerializeToString(deterministic=True)
    asked = Asked(method=type(request).__name__, request_id=request.request_id, body=body)
    if (response := await answered_before()) is not None:
        return response
    if check is not None:
        try:
            await check()
        except Refusal:
            # It may be this very call that stands in its way: it was sent twice, and is done now.
            if (response := await answered_before()) is not None:
                return response
            raise
    async with writes.alone():
        if (response := await answered_before()) is not None:
            return response
        return await change(lambda answer: asked.answered(answer.SerializeToString()))


class _Checkable(_Request, Protocol):
    @property
    def validate_only(self) -> bool: ...


class _Doing(Protocol[_AnswerT]):
    async def __call__(self, *, validate_only: bool, answered: Answered) -> _AnswerT: ...


async def checked_once(
    writes: Writes,
    request: _Checkable,
    response_type: type[ResponseT],
    do: _Doing[ResponseT],
) -> ResponseT:
    """Answers a call that changes something, or that only asks whether it would.

    Args:
        writes: as `once`.
        request: as `once`.
        response_type: as `once`.
        do: answers the call. If it is only to validate, it changes nothing; else it makes durable
            what `answered` makes of its answer, together with the change.
    """

    async def check() -> ResponseT:
        return await do(validate_only=True, answered=lambda answer: None)

    async def change(answered: Answered) -> ResponseT:
        return await do(validate_only=False, answered=answered)

    if request.validate_only:
        return await check()
    return await once(writes, request, response_type, change, check=check)
