"""The transport of today: grpc.aio.

It carries bytes: no serializers are registered, messages are parsed by the handlers. The options
are those that keep one client from taking the server from the others; each is there because the
default was seen to fail (docs/design/decisions.md).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from modelyard_server.transport.api import Call, Handler, Handlers, StatusReply

__all__ = ["AioTransport", "PortInUse"]

logger = logging.getLogger(__name__)

_MAX_SEND_BYTES = 64 * 1024 * 1024
_STREAMS_PER_CONNECTION = 1024
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class PortInUse(Exception):
    """The address cannot be bound.

    Attributes:
        address: "host:port".
    """

    def __init__(self, address: str) -> None:
        super().__init__(f"cannot listen on {address}: the port is in use")
        self.address = address


def _options(max_message_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max(_MAX_SEND_BYTES, max_message_bytes)),
        ("grpc.max_concurrent_streams", _STREAMS_PER_CONNECTION),
        ("grpc.max_metadata_size", 8192),
        ("grpc.absolute_max_metadata_size", 16384),
        ("grpc.max_connection_age_grace_ms", 330_000),
        ("grpc.server_handshake_timeout_ms", 5000),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
        ("grpc.http2.max_ping_strikes", 2),
        # A second server on the same port must fail, not silently share the traffic.
        ("grpc.so_reuseport", 0),
        # No inbound compression: a small message must not become a large one.
        ("grpc.compression_enabled_algorithms_bitset", 1),
    ]


async def _check_free(address: str) -> None:
    """Raises PortInUse if somebody listens on the address.

    The library would find out as well, but not without a report of its own on standard error.
    """
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    try:
        places = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError:
        return  # For the library to judge, like everything below but one error.
    for family, kind, protocol, _, place in places:
        try:
            with socket.socket(family, kind, protocol) as probe:
                # As the library does, or a port that was in use a moment ago would count.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(address) from None


def _bare_defect(error_id: str) -> StatusReply:
    return StatusReply(
        code=grpc.StatusCode.INTERNAL.value[0], text=f"internal error; error_id={error_id}"
    )


class AioTransport:
    """A grpc.aio server that carries calls to handlers, and the health service.

    Args:
        handlers: what it serves.
        max_message_bytes: largest request.
        defect: what a caller is told when a handler raises; takes the error_id that is in the log.
    """

    def __init__(
        self,
        handlers: Handlers,
        *,
        max_message_bytes: int,
        defect: Callable[[str], StatusReply] = _bare_defect,
    ) -> None:
        self._server = grpc.aio.server(options=_options(max_message_bytes))
        self._health = health.aio.HealthServicer()
        self._services = tuple(handlers)
        for service, methods in handlers.items():
            self._server.add_generic_rpc_handlers(
                (
                    grpc.method_handlers_generic_handler(
                        service,
                        {
                            method: grpc.unary_unary_rpc_method_handler(_carry(handler, defect))
                            for method, handler in methods.items()
                        },
                    ),
                )
            )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    async def start(self, address: str) -> int:
        """Begins to serve.

        Args:
            address: "host:port"; port 0 takes a free one.

        Returns:
            The port.

        Raises:
            PortInUse: it cannot be bound.
        """
        await _check_free(address)
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError:
            raise PortInUse(address) from None
        if port == 0:
            raise PortInUse(address)
        await self._server.start()
        for service in ("", *self._services):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return port

    async def stop_being_healthy(self) -> None:
        """Tells every watcher NOT_SERVING, for good. Calls are still served."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls, gives those that run grace_s seconds, and ends."""
        await self._server.stop(grace_s)


def _carry(
    handler: Handler, defect: Callable[[str], StatusReply]
) -> Callable[[bytes, Any], Awaitable[bytes]]:
    """A handler as grpc.aio wants it.

    Three things it would do by itself are wrong: send an exception's text to the client, send
    nothing at all when a task of ours is cancelled, and take an abort for a failure.
    """

    async def answer(body: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        try:
            reply = await handler(Call(body, context.invocation_metadata, context.time_remaining()))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if context.cancelled() or (task is not None and task.cancelling()):
                raise
            reply = defect(_logged("a task of the server was cancelled"))
        except Exception as error:
            reply = defect(_logged(type(error).__name__))
        if isinstance(reply, bytes):
            return reply
        trailing: list[tuple[str, str | bytes]] = []
        if reply.details:
            trailing.append(("grpc-status-details-bin", reply.details))
        if reply.pushback_ms is not None:
            trailing.append(("grpc-retry-pushback-ms", str(reply.pushback_ms)))
        await context.abort(_CODES[reply.code], reply.text, tuple(trailing))

    return answer


def _logged(what: str) -> str:
    """Logs the exception that is being handled and returns the error_id it is found by."""
    error_id = uuid.uuid4().hex[:12]
    logger.exception("defect %s: %s", error_id, what)
    return error_id
