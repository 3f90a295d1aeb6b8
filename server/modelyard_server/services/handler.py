"""From a service's method to a handler of the transport: parse, call, serialize, refuse."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from modelyard_server.errors import Reason, Refusal, Violation
from modelyard_server.services.status import reply_of
from modelyard_server.transport.api import Call, Handler, StatusReply

__all__ = ["invalid", "new_error_id", "unary"]

RequestT = TypeVar("RequestT", bound=Message)


def new_error_id() -> str:
    """A fresh id that joins what a client was told to what the log says."""
    return uuid.uuid4().hex[:12]


def invalid(*violations: Violation) -> Refusal:
    """INVALID_FIELD for all violations of a message at once."""
    text = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
    return Refusal(Reason.INVALID_FIELD, text, violations=violations)


def unary(
    request_type: type[RequestT], method: Callable[[RequestT, Call], Awaitable[Message]]
) -> Handler:
    """A handler that parses request_type, calls method and serializes its answer.

    Refusals become statuses; whatever else is raised is for the transport to hide.
    """

    async def handle(call: Call) -> bytes | StatusReply:
        request = request_type()
        try:
            request.ParseFromString(call.body)
        except DecodeError:
            return reply_of(
                invalid(Violation("", f"the message is no {request_type.DESCRIPTOR.name}"))
            )
        try:
            answer = await method(request, call)
        except Refusal as refusal:
            return reply_of(refusal)
        return answer.SerializeToString()

    return handle
