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

from modelyard_server.transport.api import (
    Call,
    DuplexHandler,
    Handler,
    StatusReply,
    StreamHandler,
)

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
        self._finite: set[asyncio.Future[Any]] = set()
        self._streams: set[asyncio.Timeout] = set()
        self._links: set[_Link] = set()
        self._defect = defect
        self._draining = draining
        self._is_draining = False
        self._sweep_at = _SWEEP

    @property
    def finite_tasks(self) -> set[asyncio.Future[Any]]:
        """Of the calls that run and come to an end, as duplex ones do when we stop.

        A call is among them until its end is sent.
        """
        return {task for task in self._finite if not task.done()}

    def _note_finite(self) -> None:
        """Notes the task that runs as that of a call that comes to an end."""
        if (task := asyncio.current_task()) is not None:
            # Those that have ended are swept out now and then: a callback for each would cost more
            # than everything else here.
            self._finite.add(task)
            if len(self._finite) >= self._sweep_at:
                self._sweep()

    def unary(self, handler: Handler) -> Callable[[bytes, _Context], Awaitable[bytes]]:
        """A handler that answers once."""
        defect = self._defect

        async def answer(body: bytes, context: _Context) -> bytes:
            self._note_finite()
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

    def stream(
        self, handler: StreamHandler, *, is_finite: bool = False
    ) -> Callable[[bytes, _Context], Awaitable[None]]:
        """A handler that answers with a stream; see Streaming."""

        async def answer(body: bytes, context: _Context) -> None:
            if self._is_draining:
                await _abort(context, self._draining)
            end: StatusReply | None
            # A timeout without a time: end_streams gives it one. It tells our wish to end from the
            # client's, also when both come at once.
            limit = asyncio.timeout(None)
            try:
                async with limit:
                    if is_finite:
                        self._note_finite()
                    else:
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

    def duplex(self, handler: DuplexHandler) -> Callable[[Any, _Context], Awaitable[None]]:
        """A handler of a stream of requests that answers with a stream."""

        async def answer(_: Any, context: _Context) -> None:
            if self._is_draining:
                await _abort(context, self._draining)
            # Stands for the call among those that are waited for.
            over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._finite.add(over)
            link = _Link(context)
            self._links.add(link)
            try:
                end = await self._answer_link(handler, context, link)
                if link.is_stopping:
                    # Its status may wait for its reader, and nobody is to wait for that.
                    over.set_result(None)
                if end is not None:
                    await _abort(context, end)
            finally:
                self._links.discard(link)
                if not over.done():
                    over.set_result(None)
                self._sweep()

        return answer

    async def _answer_link(
        self, handler: DuplexHandler, context: _Context, link: _Link
    ) -> StatusReply | None:
        """Has a handler answer a duplex call. Returns how it ends."""
        try:
            call = Call(b"", context.invocation_metadata, context.time_remaining(), context.peer)
            end = await handler(call, link)
        except asyncio.CancelledError:
            if link.is_given_up:
                return self._draining
            if link.is_broken or _is_to_end(context):
                raise
            return self._defect(_logged("a task of the server was cancelled"))
        except Exception as error:
            return self._defect(_logged(type(error).__name__))
        return self._draining if end is None and link.is_cut else end

    def end_streams(self, linger_s: float = 0.0) -> None:
        """Ends the streams that run, and those that still begin, with `draining`.

        Each is stopped where it waits: for something to tell, or for its reader. A reader that does
        not read has the status only after what it was sent before. Duplex ones get no more
        requests; they end when they have answered what they have.

        Args:
            linger_s: how long a duplex one waits for its reader from now on, with each message.
        """
        if self._is_draining:
            return
        self._is_draining = True
        for stream in self._streams:
            stream.reschedule(0)
        for link in self._links:
            link.cut(linger_s)

    def _sweep(self) -> None:
        self._finite.intersection_update(self.finite_tasks)
        self._sweep_at = max(_SWEEP, 2 * len(self._finite))


class _Link:
    """See api.Link.

    Attributes:
        is_cut: the server stops, and the client had not ended its side.
        is_given_up: its client does not read, and the server stops.
        is_broken: a message could not be sent. The library has not come to cancelling the call's
            task yet.
    """

    def __init__(self, context: _Context) -> None:
        self.is_cut = False
        self.is_given_up = False
        self.is_broken = False
        self._context = context
        self._is_open = False
        self._has_ended = False
        self._reading: asyncio.Future[Any] | None = None
        self._writing: asyncio.Timeout | None = None
        self._linger_s: float | None = None

    @property
    def is_stopping(self) -> bool:
        """True once the server stops."""
        return self._linger_s is not None

    async def read(self) -> bytes | None:
        if self.is_cut or self._has_ended:
            return None
        self._reading = reading = asyncio.ensure_future(self._context.read())
        try:
            # Not by itself: a stop must be told from a cancellation of whoever waits.
            await asyncio.wait((reading,))
        finally:
            self._reading = None
            reading.cancel()
        if reading.cancelled():
            return None  # By cut.
        try:
            message = reading.result()
        except grpc.aio.BaseError:
            message = grpc.aio.EOF  # The client has gone.
        if isinstance(message, bytes):
            return message
        self._has_ended = True
        return None

    async def write(self, message: bytes) -> None:
        end_s = None
        if self._linger_s is not None:
            end_s = asyncio.get_running_loop().time() + self._linger_s
        try:
            async with asyncio.timeout_at(end_s) as self._writing:
                if not self._is_open:
                    await _open(self._context)
                    self._is_open = True
                await self._context.write(message)
        except TimeoutError:
            self.is_given_up = True
            raise asyncio.CancelledError from None
        except grpc.aio.BaseError:
            self.is_broken = True
            raise asyncio.CancelledError from None
        finally:
            self._writing = None

    def cut(self, linger_s: float) -> None:
        """No more is read, and the reader is waited for this long with each message."""
        self.is_cut = not self._has_ended
        self._linger_s = linger_s
        if self._reading is not None:
            self._reading.cancel()
        if self._writing is not None:
            self._writing.reschedule(asyncio.get_running_loop().time() + linger_s)


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
