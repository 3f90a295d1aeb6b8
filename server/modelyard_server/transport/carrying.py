"""Handlers as grpc.aio wants them.

Four things it would do by itself are wrong: send an exception's text to the client, send nothing at
all when a task of ours is cancelled, take an abort for a failure, and leave a stream's generator to
the garbage collector when its client has gone.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
import grpc.aio

from modelyard_server.transport.api import Call, Handler, StatusReply, StreamHandler

__all__ = ["Carrier"]

_SWEEP = 64
"""How many calls' tasks are kept before those that have ended are let go."""

logger = logging.getLogger(__name__)

_CODES = {code.value[0]: code for code in grpc.StatusCode}

_Context = grpc.aio.ServicerContext[Any, Any]


class _ClientGone(Exception):
    """A message could not be sent. The library has not come to cancelling the call's task yet."""


class Carrier:
    """Carries calls to handlers, and knows which run. On the event loop's thread only.

    Args:
        defect: what a caller is told when a handler raises; takes the error_id that is in the log.
        draining: what the caller of a stream is told when the server stops.
    """

    def __init__(self, *, defect: Callable[[str], StatusReply], draining: StatusReply) -> None:
        self._unary: set[asyncio.Task[Any]] = set()
        self._streams: set[asyncio.Timeout] = set()
        self._defect = defect
        self._draining = draining
        self._is_draining = False
        self._sweep_at = _SWEEP

    @property
    def unary_tasks(self) -> set[asyncio.Task[Any]]:
        """Tasks of the unary calls that run. A call is among them until its answer is sent."""
        return {task for task in self._unary if not task.done()}

    def unary(self, handler: Handler) -> Callable[[bytes, _Context], Awaitable[bytes]]:
        """A handler that answers once."""
        defect, tasks = self._defect, self._unary

        async def answer(body: bytes, context: _Context) -> bytes:
            if (task := asyncio.current_task()) is not None:
                # Those that have ended are swept out now and then: a callback for each would cost
                # more than everything else here.
                tasks.add(task)
                if len(tasks) >= self._sweep_at:
                    tasks.intersection_update(self.unary_tasks)
                    self._sweep_at = max(_SWEEP, 2 * len(tasks))
            try:
                reply = await handler(
                    Call(body, context.invocation_metadata, context.time_remaining(), context.peer)
                )
            except asyncio.CancelledError:
                if _is_to_end(context):
                    raise
                reply = defect(_logged("a task of the server was cancelled"))
            except Exception as error:
                reply = defect(_logged(type(error).__name__))
            if isinstance(reply, bytes):
                return reply
            await _abort(context, reply)

        return answer

    def stream(self, handler: StreamHandler) -> Callable[[bytes, _Context], Awaitable[None]]:
        """A handler that answers with a stream."""

        async def answer(body: bytes, context: _Context) -> None:
            if self._is_draining:
                await _abort(context, self._draining)
            end: StatusReply | None
            # A timeout without a time: end_streams gives it one. It tells our wish to end from the
            # client's, also when both come at once.
            limit = asyncio.timeout(None)
            try:
                async with limit:
                    self._streams.add(limit)
                    call = Call(
                        body, context.invocation_metadata, context.time_remaining(), context.peer
                    )
                    end = await _pass_on(handler, call, context)
            except asyncio.CancelledError:
                if _is_to_end(context):
                    raise
                end = self._defect(_logged("a task of the server was cancelled"))
            except _ClientGone:
                raise asyncio.CancelledError from None
            except Exception as error:
                if limit.expired() and isinstance(error, TimeoutError):
                    end = self._draining
                else:
                    end = self._defect(_logged(type(error).__name__))
            finally:
                self._streams.discard(limit)
            if end is not None:
                await _abort(context, end)

        return answer

    def end_streams(self) -> None:
        """Ends the streams that run, and those that still begin, with `draining`.

        Each is stopped where it waits: for something to tell, or for its reader. A reader that does
        not read has the status only after what it was sent before.
        """
        if self._is_draining:
            return
        self._is_draining = True
        for stream in self._streams:
            stream.reschedule(0)


async def _pass_on(handler: StreamHandler, call: Call, context: _Context) -> StatusReply | None:
    """Sends what a handler yields, one message at a time, and closes it. Returns how it ended."""
    is_open = False
    async with aclosing(handler(call)) as replies:
        async for reply in replies:
            if isinstance(reply, StatusReply):
                return reply
            try:
                if not is_open:
                    await _open(context)
                    is_open = True
                await context.write(reply)
            except grpc.aio.BaseError as error:
                raise _ClientGone from error
    return None


async def _open(context: _Context) -> None:
    """Sends the headers.

    The library would send them with the first message. If we stop waiting for that, it takes them
    for not sent, and fails when it sends them again with the status. So they go by themselves, and
    are waited for even if this is cancelled.
    """
    opening = asyncio.ensure_future(context.send_initial_metadata(()))
    try:
        await asyncio.shield(opening)
    except asyncio.CancelledError:
        await asyncio.wait({opening})
        if not opening.cancelled():
            opening.exception()  # Looked at: it is the client's leaving that counts.
        raise


def _is_to_end(context: _Context) -> bool:
    """True if a cancellation is meant for this call, not for a task it waits for."""
    task = asyncio.current_task()
    return context.cancelled() or (task is not None and task.cancelling() > 0)


async def _abort(context: _Context, reply: StatusReply) -> NoReturn:
    trailing: list[tuple[str, str | bytes]] = []
    if reply.details:
        trailing.append(("grpc-status-details-bin", reply.details))
    if reply.pushback_ms is not None:
        trailing.append(("grpc-retry-pushback-ms", str(reply.pushback_ms)))
    await context.abort(_CODES[reply.code], reply.text, tuple(trailing))


def _logged(what: str) -> str:
    """Logs the exception that is being handled and returns the error_id it is found by."""
    error_id = uuid.uuid4().hex[:12]
    logger.exception("defect %s: %s", error_id, what)
    return error_id
