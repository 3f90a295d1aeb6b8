"""From a service's method to a handler of the transport: parse, call, serialize, refuse."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from modelyard_server.errors import Reason, Refusal, Violation
from modelyard_server.services.status import reply_of
from modelyard_server.transport.api import Call, Handler, StatusReply, StreamHandler

__all__ = ["defect", "draining", "invalid", "new_error_id", "server_stream", "unary"]

logger = logging.getLogger(__name__)

RequestT = TypeVar("RequestT", bound=Message)


def new_error_id() -> str:
    """A fresh id that joins what a client was told to what the log says."""
    return uuid.uuid4().hex[:12]


def invalid(*violations: Violation) -> Refusal:
    """INVALID_FIELD for all violations of a message at once."""
    text = "; ".join(
        f"{violation.field}: {violation.description}" if violation.field else violation.description
        for violation in violations
    )
    return Refusal(Reason.INVALID_FIELD, text, violations=violations)


def defect(what: str) -> Refusal:
    """INTERNAL. Logs the exception that is being handled, and says where it is found and no more.

    Args:
        what: failed, for the log.
    """
    error_id = new_error_id()
    logger.exception("defect %s: %s", error_id, what)
    return Refusal(
        Reason.INTERNAL, f"internal error; error_id={error_id}", metadata={"error_id": error_id}
    )


def draining() -> Refusal:
    """SERVER_DRAINING: another server, or this one after its restart, will answer."""
    return Refusal(Reason.SERVER_DRAINING, "the server is shutting down", retry_after_s=1.0)


def unary(
    request_type: type[RequestT],
    method: Callable[[RequestT, Call], Awaitable[Message]],
    *,
    acting: Callable[[str], AbstractContextManager[None]] | None = None,
) -> Handler:
    """A handler that parses request_type, calls method and serializes its answer.

    Refusals become statuses; whatever else is raised is for the transport to hide.

    Args:
        request_type: of the message.
        method: what answers it.
        acting: Journal.acting, for a method whose doings are told with the name of who asked.
    """

    async def handle(call: Call) -> bytes | StatusReply:
        try:
            request = _parsed(request_type, call)
            answer = await method(request, call)
        except Refusal as refusal:
            return reply_of(refusal)
        return answer.SerializeToString()

    async def handle_as_somebody(call: Call) -> bytes | StatusReply:
        assert acting is not None
        with acting(call.identity()):
            return await handle(call)

    return handle if acting is None else handle_as_somebody


def server_stream(
    request_type: type[RequestT],
    method: Callable[[RequestT, Call], AsyncGenerator[Message, None]],
) -> StreamHandler:
    """A handler that parses request_type, calls method and serializes what it yields.

    Refusals end the stream with their status; whatever else is raised is for the transport to hide.
    """

    async def handle(call: Call) -> AsyncGenerator[bytes | StatusReply, None]:
        try:
            request = _parsed(request_type, call)
            async with aclosing(method(request, call)) as answers:
                async for answer in answers:
                    yield answer.SerializeToString()
            return
        except Refusal as refusal:
            end = reply_of(refusal)
        yield end

    return handle


def _parsed(request_type: type[RequestT], call: Call) -> RequestT:
    request = request_type()
    try:
        request.ParseFromString(call.body)
    except DecodeError:
        name = request_type.DESCRIPTOR.name
        raise invalid(Violation("", f"the message is no {name}")) from None
    return request
