"""Handlers over HTTP: the Connect protocol with JSON or binary messages, and gRPC-Web.

The protocols are connectrpc's affair. What is here gives it our handlers: bytes go in and out as
they came, so that a message is read by the same code and refused in the same words whatever
carried it. JSON is turned into the message's bytes before, and back behind; messages of many bytes
in a thread, because the event loop must not wait for them.

A web page of anybody can send requests to a port of this machine, and after a rebound name it can
even read the answers. So what bears an `Origin` that is not allowed is refused, and what bears
none comes from no page. Content types that pages may send without asking are none of ours.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

from connectrpc.code import Code
from connectrpc.codec import Codec
from connectrpc.errors import ConnectError, ErrorDetail
from connectrpc.method import IdempotencyLevel, MethodInfo, StreamType
from connectrpc.request import RequestContext
from connectrpc.server import ConnectASGIApplication, Endpoint
from google.protobuf import json_format
from google.protobuf.message import Message
from protobuf import wkt

from modelyard_server.transport.api import (
    Call,
    Handler,
    StatusReply,
    StreamHandler,
    Streaming,
)

__all__ = ["ConnectFront", "Detail", "HttpMethod"]

logger = logging.getLogger(__name__)

_CODES: Final = (
    *(None, Code.CANCELED, Code.UNKNOWN, Code.INVALID_ARGUMENT, Code.DEADLINE_EXCEEDED),
    *(Code.NOT_FOUND, Code.ALREADY_EXISTS, Code.PERMISSION_DENIED, Code.RESOURCE_EXHAUSTED),
    *(Code.FAILED_PRECONDITION, Code.ABORTED, Code.OUT_OF_RANGE, Code.UNIMPLEMENTED),
    *(Code.INTERNAL, Code.UNAVAILABLE, Code.DATA_LOSS, Code.UNAUTHENTICATED),
)
"""By gRPC's numbers, from 0."""

_HERE_BYTES: Final = 16 * 1024
"""JSON up to this is read and written on the event loop: a thread would take longer."""

_HEAD_START_S: Final = 0.05
"""A handler's deadline is so much before the protocol's, so that it can say what it waited for."""

_HEALTH_PATH: Final = "/healthz"
_ALLOWED_HEADERS: Final = (
    "content-type, connect-protocol-version, connect-timeout-ms, grpc-timeout, x-grpc-web, "
    "x-user-agent, x-modelyard-identity"
)
_EXPOSED_HEADERS: Final = "grpc-status, grpc-message, grpc-status-details-bin, retry-after"
_CORS_AGE_S: Final = 7200

_Context = RequestContext[Any, Any]
_Scope = Mapping[str, Any]
_Receive = Callable[[], Any]
_Send = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpMethod:
    """A method to be served.

    Attributes:
        service: full name of its service.
        name: its name.
        handler: answers it.
        request_type: of its request.
        response_type: of its answers.
    """

    service: str
    name: str
    handler: Handler | Streaming
    request_type: type[Message]
    response_type: type[Message]

    @property
    def path(self) -> str:
        """Where it is."""
        return f"/{self.service}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """One of the details of an error.

    Attributes:
        type_url: of its message.
        value: the message, serialized.
        shown: the same as JSON has it.
    """

    type_url: str
    value: bytes
    shown: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Received:
    """A request message as it came."""

    data: bytes
    is_json: bool


class _Bytes(Codec[Any, Any]):
    """A codec that leaves messages as they are, and remembers what they were called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def name(self) -> str:
        return self._name

    def encode(self, message: bytes) -> bytes:
        return message

    def decode(self, data: bytes | bytearray, message_class: type[Any]) -> Any:
        return _Received(bytes(data), self._name == "json")


class _ShownDetail(ErrorDetail):
    """A detail of a type that the library does not know; what it shows for debugging is ours."""

    def __init__(self, detail: Detail) -> None:
        super().__init__(wkt.Any(type_url=detail.type_url, value=detail.value))
        self._shown = detail.shown

    def value(self, *_: object) -> Any:
        return wkt.Struct.from_python(dict(self._shown)) if self._shown else None


class _Application(ConnectASGIApplication[None]):
    @property
    def path(self) -> str:
        return "/"


class ConnectFront:
    """An ASGI application that carries calls to handlers. On the event loop's thread only.

    Args:
        methods: what it serves.
        max_message_bytes: largest request, as it comes: JSON takes a third more for raw tensors.
        origins: web pages whose scripts may call.
        details: reads the details of a status.
        unreadable: what a caller is told whose message cannot be read; takes why.
        defect: what a caller is told when a handler raises; takes the error_id that is in the log.
        draining: what the caller of a stream is told when the server stops.
        body_s: how long a request's body may take to come; then its caller counts as gone.
    """

    def __init__(
        self,
        methods: Sequence[HttpMethod],
        *,
        max_message_bytes: int,
        origins: Sequence[str],
        details: Callable[[StatusReply], Sequence[Detail]],
        unreadable: Callable[[str], StatusReply],
        defect: Callable[[str], StatusReply],
        draining: StatusReply,
        body_s: float = 30.0,
    ) -> None:
        self._body_s = body_s
        self._paths = frozenset(method.path for method in methods)
        self._origins = frozenset(origins)
        self._details = details
        self._unreadable = unreadable
        self._defect = defect
        self._draining = draining
        self._is_healthy = True
        self._is_draining = False
        self._waiting: set[asyncio.Timeout] = set()
        endpoints = {method.path: self._endpoint(method) for method in methods}
        self._application: Any = _Application(
            service=None,
            endpoints=lambda _: endpoints,
            read_max_bytes=max_message_bytes,
            # A small message must not become a large one, nor the loop wait for a compressor.
            compressions=(),
            codecs=[_Bytes("proto"), _Bytes("json")],
        )

    def stop_being_healthy(self) -> None:
        """Says from now on that requests should go elsewhere. Answers them nevertheless."""
        self._is_healthy = False

    def end_streams(self) -> None:
        """Ends the streams that run, and those that still begin, as draining."""
        self._is_healthy = False
        self._is_draining = True
        now = asyncio.get_running_loop().time()
        for limit in self._waiting:
            limit.reschedule(now)

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Answers one request, as ASGI has it. The scope is that of HTTP."""
        headers = {name.lower(): value for name, value in scope.get("headers", ())}
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin not in self._origins:
            await _refuse(send, 403, "permission_denied", _OTHER_ORIGIN)
            return
        if origin:
            send = _allowing(origin, send)
            if scope["method"] == "OPTIONS":
                await _answer(send, 204, b"", _PREFLIGHT)
                return
        path = scope["path"]
        if path == _HEALTH_PATH:
            text = b"ok\n" if self._is_healthy else b"stopping\n"
            kind = [(b"content-type", b"text/plain")]
            await _answer(send, 200 if self._is_healthy else 503, text, kind)
            return
        if path not in self._paths:
            await _refuse(send, 404, "unimplemented", f"no method {path[:200]!r} is served here")
            return
        content_type = headers.get(b"content-type", b"")
        if content_type.startswith(b"application/grpc-web-text"):
            why = "grpc-web-text is not served: send application/grpc-web+proto"
            await _refuse(send, 415, "unimplemented", why)
            return
        if content_type.startswith(b"application/grpc") and not content_type.startswith(
            b"application/grpc-web"
        ):
            # It needs HTTP/2, and has a port of its own.
            await _refuse(send, 415, "unimplemented", "gRPC is served on the port of [server]")
            return
        body = _Body(receive, send, self._body_s)
        await self._application(scope, body.receive, body.send)

    def _endpoint(self, method: HttpMethod) -> Any:
        handler = method.handler
        streams = isinstance(handler, Streaming)
        info = MethodInfo(
            name=method.name,
            service_name=method.service,
            input=method.request_type,
            output=method.response_type,
            # No GET: it would be called by links, pictures and caches.
            idempotency_level=IdempotencyLevel.UNKNOWN,
            stream_type=StreamType.SERVER_STREAM if streams else StreamType.UNARY,
        )
        if isinstance(handler, Streaming):
            return Endpoint.server_stream(info, self._stream(method, handler.handler))
        return Endpoint.unary(info, self._unary(method, handler))

    def _unary(self, method: HttpMethod, handler: Handler) -> Callable[[Any, _Context], Any]:
        async def answer(received: _Received, context: _Context) -> bytes:
            call = await self._call(method, received, context)
            try:
                reply = await handler(call)
            except asyncio.CancelledError:
                if _is_to_end():
                    raise
                reply = self._defect(_logged("a task of the server was cancelled"))
            except Exception as error:
                reply = self._defect(_logged(type(error).__name__))
            if isinstance(reply, StatusReply):
                raise self._error(reply, context)
            return await _written(reply, method, as_json=received.is_json)

        return answer

    def _stream(self, method: HttpMethod, handler: StreamHandler) -> Callable[[Any, _Context], Any]:
        async def answers(received: _Received, context: _Context) -> AsyncGenerator[bytes, None]:
            call = await self._call(method, received, context)
            async with aclosing(handler(call)) as replies:
                while True:
                    reply = await self._next(replies)
                    if reply is None:
                        return
                    if isinstance(reply, StatusReply):
                        raise self._error(reply, context)
                    yield await _written(reply, method, as_json=received.is_json)

        return answers

    async def _next(
        self, replies: AsyncGenerator[bytes | StatusReply, None]
    ) -> bytes | StatusReply | None:
        """What a stream's handler says next; None at its end. Cut short when the server stops."""
        if self._is_draining:
            return self._draining
        # Without a time: end_streams gives it one.
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._waiting.add(limit)
                return await anext(replies, None)
        except asyncio.CancelledError:
            if _is_to_end():
                raise
            return self._defect(_logged("a task of the server was cancelled"))
        except Exception as error:
            if limit.expired() and isinstance(error, TimeoutError):
                return self._draining
            return self._defect(_logged(type(error).__name__))
        finally:
            self._waiting.discard(limit)

    async def _call(self, method: HttpMethod, received: _Received, context: _Context) -> Call:
        body = received.data
        if received.is_json:
            try:
                body = await _somewhere(len(body), _from_json, body, method.request_type)
            except _Unreadable as error:
                raise self._error(self._unreadable(str(error)), context) from None
        remaining_s: float | None = None
        if context.timeout_ms is not None:
            left_s = context.timeout_ms / 1000
            remaining_s = max(left_s - _HEAD_START_S, left_s / 2)
        headers = context.request_headers
        address = context.client_address or ""
        return Call(body, lambda: tuple(headers.allitems()), remaining_s, lambda: _peer(address))

    def _error(self, reply: StatusReply, context: _Context) -> ConnectError:
        if reply.pushback_ms is not None:
            context.response_trailers["grpc-retry-pushback-ms"] = str(reply.pushback_ms)
            if reply.pushback_ms >= 0:
                # For whoever knows HTTP alone: whole seconds.
                context.response_headers["retry-after"] = str(math.ceil(reply.pushback_ms / 1000))
        code = _CODES[reply.code] if 0 < reply.code < len(_CODES) else Code.UNKNOWN
        assert code is not None
        details = [_ShownDetail(detail) for detail in self._details(reply)]
        return ConnectError(code, reply.text, details=details)


_OTHER_ORIGIN: Final = (
    "scripts of this web page may not call; whose may is in the server's configuration, "
    "[http] origins"
)
_PREFLIGHT: Final = [
    (b"access-control-allow-methods", b"POST"),
    (b"access-control-allow-headers", _ALLOWED_HEADERS.encode()),
    (b"access-control-max-age", str(_CORS_AGE_S).encode()),
]


class _Unreadable(Exception):
    """JSON that is not the message's. The text says why."""


def _from_json(data: bytes, message_type: type[Message]) -> bytes:
    """A message's bytes. Unknown fields are mistakes here: people write JSON by hand."""
    name = message_type.DESCRIPTOR.name
    if not data.strip():
        raise _Unreadable(f"the body is empty: write {name} as JSON, {{}} at the least")
    message = message_type()
    try:
        value = json.loads(data, object_pairs_hook=_unique)
        if not isinstance(value, dict):
            raise ValueError(f"it is no JSON object but {type(value).__name__}")
        json_format.ParseDict(value, message)
        return message.SerializeToString()
    except RecursionError:
        why = "it is nested too deeply"
    except (json_format.ParseError, ValueError) as error:
        why = " ".join(str(error).split())
    raise _Unreadable(f"the message is no {name}: {why}")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"field {twice!r} is there twice")
    return found


def _to_json(data: bytes, message_type: type[Message]) -> bytes:
    return json_format.MessageToJson(
        message_type.FromString(data), indent=None, ensure_ascii=False
    ).encode()


async def _written(reply: bytes, method: HttpMethod, *, as_json: bool) -> bytes:
    if not as_json:
        return reply
    written: bytes = await _somewhere(len(reply), _to_json, reply, method.response_type)
    return written


async def _somewhere(size_bytes: int, work: Callable[..., bytes], *arguments: Any) -> bytes:
    """Does the work here, or in a thread if there is much of it."""
    if size_bytes <= _HERE_BYTES:
        return work(*arguments)
    return await asyncio.to_thread(work, *arguments)


def _peer(address: str) -> str:
    """A caller's address as gRPC writes it."""
    host, _, port = address.rpartition(":")
    if not host:
        return ""
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"


def _is_to_end() -> bool:
    """True if a cancellation is meant for this call, not for a task it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _logged(what: str) -> str:
    """Logs the exception that is being handled and returns the error_id it is found by."""
    error_id = uuid.uuid4().hex[:12]
    logger.exception("defect %s: %s", error_id, what)
    return error_id


class _Body:
    """A request's body, and a time by which it must be there.

    Whose request does not come to its end counts as gone, and loses its connection with the answer.

    Args:
        receive: as ASGI has it.
        send: the same.
        limit_s: how long the body may take.
    """

    def __init__(self, receive: _Receive, send: _Send, limit_s: float) -> None:
        self._receive = receive
        self._send = send
        self._end = asyncio.get_running_loop().time() + limit_s
        self._is_whole = False
        self._is_late = False

    async def receive(self) -> Any:
        """The next event."""
        if self._is_whole:
            # What comes now is that the caller has gone, whenever that is.
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._end):
                event = await self._receive()
        except TimeoutError:
            self._is_late = True
            return {"type": "http.disconnect"}
        self._is_whole = not event.get("more_body", False)
        return event

    async def send(self, event: dict[str, Any]) -> None:
        """Passes an event on."""
        if self._is_late and event["type"] == "http.response.start":
            # Or the server would wait for the rest.
            event = {**event, "headers": [*event.get("headers", ()), (b"connection", b"close")]}
        await self._send(event)


def _allowing(origin: str, send: _Send) -> _Send:
    """Tells a browser that the page may read the answer."""
    allowed = [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", _EXPOSED_HEADERS.encode()),
        (b"vary", b"origin"),
    ]

    async def send_allowed(event: dict[str, Any]) -> None:
        if event["type"] == "http.response.start":
            event = {**event, "headers": [*event.get("headers", ()), *allowed]}
        await send(event)

    return send_allowed


async def _refuse(send: _Send, status: int, code: str, message: str) -> None:
    """Answers as Connect has errors, before anything of the request is read."""
    body = json.dumps({"code": code, "message": message}, ensure_ascii=False).encode()
    await _answer(send, status, body, [(b"content-type", b"application/json")])


async def _answer(
    send: _Send, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]]
) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body, "more_body": False})
