"""The transport of today: grpc.aio.

It carries bytes: no serializers are registered, messages are parsed by the handlers. The options
are those that keep one client from taking the server from the others; each is there because the
default was seen to fail (docs/design/decisions.md).
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from modelyard_server.transport.api import Duplex, Handler, Handlers, StatusReply, Streaming
from modelyard_server.transport.carrying import Carrier

__all__ = ["AioTransport", "PortInUse", "most_sent_bytes"]

_MAX_SEND_BYTES = 64 * 1024 * 1024
_STREAMS_PER_CONNECTION = 1024
_LINGER_S = 1.0
"""What a reader that does not read gets of a stop's grace, once all other calls are answered."""

_NEVER_S = 1e9

_BARE_DRAINING = StatusReply(
    code=grpc.StatusCode.UNAVAILABLE.value[0], text="the server is shutting down"
)


class PortInUse(Exception):
    """The address cannot be bound.

    Attributes:
        address: "host:port".
    """

    def __init__(self, address: str) -> None:
        super().__init__(f"cannot listen on {address}: the port is in use")
        self.address = address


def most_sent_bytes(max_message_bytes: int) -> int:
    """Largest message that can be sent by a server with this limit for requests."""
    return max(_MAX_SEND_BYTES, max_message_bytes)


def _options(max_message_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", most_sent_bytes(max_message_bytes)),
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
        draining: what the caller of a stream is told when the server stops.
    """

    def __init__(
        self,
        handlers: Handlers,
        *,
        max_message_bytes: int,
        defect: Callable[[str], StatusReply] = _bare_defect,
        draining: StatusReply = _BARE_DRAINING,
    ) -> None:
        self._carrier = Carrier(defect=defect, draining=draining)
        self._server = grpc.aio.server(options=_options(max_message_bytes))
        self._health = health.aio.HealthServicer()
        self._services = tuple(handlers)
        self._is_healthy = True
        for service, methods in handlers.items():
            self._server.add_generic_rpc_handlers(
                (
                    grpc.method_handlers_generic_handler(
                        service,
                        {
                            method: self._method_handler(handler)
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
        self._is_healthy = False
        await self._health.enter_graceful_shutdown()

    @property
    def is_healthy(self) -> bool:
        """False once the server is shutting down."""
        return self._is_healthy

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls, gives those that run grace_s seconds, and ends.

        Streams end at once that would run for ever. Those that take requests as well take no more,
        and answer what they have, as long as their clients read. What then still keeps the server
        is readers that do not read and watchers of the health service; when all calls are answered
        that come to an end, these are cut off.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + grace_s
        async with asyncio.TaskGroup() as tasks:
            # Of two stops that run the library lets each cut the calls off, and crashes if one
            # does so after the other has ended. So the first never does.
            stopping = tasks.create_task(self._server.stop(_NEVER_S), name="stop the transport")
            self._carrier.end_streams(_LINGER_S)
            while (running := self._carrier.finite_tasks) and loop.time() < end:
                await asyncio.wait(running, timeout=end - loop.time())
            await asyncio.wait({stopping}, timeout=max(0, min(_LINGER_S, end - loop.time())))
            if not stopping.done():
                await self._server.stop(None)

    def _method_handler(
        self, handler: Handler | Streaming | Duplex
    ) -> grpc.RpcMethodHandler[Any, Any]:
        if isinstance(handler, Duplex):
            return grpc.stream_stream_rpc_method_handler(self._carrier.duplex(handler.handler))
        if isinstance(handler, Streaming):
            return grpc.unary_stream_rpc_method_handler(
                self._carrier.stream(handler.handler, is_finite=handler.is_finite)
            )
        return grpc.unary_unary_rpc_method_handler(self._carrier.unary(handler))
