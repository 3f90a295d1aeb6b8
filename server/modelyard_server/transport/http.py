"""The HTTP listener: uvicorn around an ASGI application, started and stopped like the gRPC one.

uvicorn speaks HTTP/1.1 here and nothing else. It takes no signals, prints nothing, and believes
nobody who says where a request came from.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any, Final

import uvicorn

from modelyard_server.transport.aio import PortInUse
from modelyard_server.transport.api import CannotListen
from modelyard_server.transport.connect import ConnectFront

__all__ = ["HttpTransport"]

_MOST_CONNECTIONS: Final = 1024
"""Also of requests; what is above is answered with 503."""

_KEEP_ALIVE_S: Final = 60
_MOST_HEADER_BYTES: Final = 16 * 1024
_BACKLOG: Final = 1024
_TICK_S: Final = 1.0
_END_S: Final = 1.0
"""What cancelled calls have to end."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = asyncio.Event()
        self._may_exit = asyncio.Event()

    def exit(self) -> None:
        """Asks it to end."""
        self.should_exit = True
        self._may_exit.set()

    async def main_loop(self) -> None:
        """Waits until it is asked to end, and looks at the clock once a second for its headers.

        The library would wake up ten times a second to see whether there is something to do.
        """
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self._may_exit.wait()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen, and says so."""
        await super().startup(sockets)
        self.is_up.set()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leaves signals to the process."""
        yield


class HttpTransport:
    """A listener for one application.

    Args:
        front: the application.

    Attributes:
        port: where it listens; 0 until it does.
    """

    def __init__(self, front: ConnectFront) -> None:
        self.port = 0
        self._front = front
        self._server = _Server(
            uvicorn.Config(
                front,
                loop="none",
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=_MOST_CONNECTIONS,
                timeout_keep_alive=_KEEP_ALIVE_S,
                h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
                backlog=_BACKLOG,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self, address: str) -> int:
        """Begins to serve.

        Args:
            address: "host:port"; port 0 lets the system choose.

        Returns:
            The port.

        Raises:
            PortInUse: somebody else listens there.
            CannotListen: this machine has no such address, or may not listen there.
        """
        sockets = await _bind(address)
        port: int = sockets[0].getsockname()[1]
        self._serving = asyncio.create_task(self._server.serve(sockets), name="serve HTTP")
        up = asyncio.create_task(self._server.is_up.wait(), name="wait for HTTP")
        try:
            await asyncio.wait({up, self._serving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
        if self._serving.done():
            # It has not begun, and says why.
            await self._serving
        self.port = port
        return port

    def stop_being_healthy(self) -> None:
        """Tells who asks for /healthz that requests should go elsewhere."""
        self._front.stop_being_healthy()

    async def stop(self, grace_s: float) -> None:
        """Takes no new connections, ends streams, and answers the calls that run.

        Args:
            grace_s: how long those have; then they are cut off. Idempotent.
        """
        if self._serving is None:
            return
        self._front.end_streams()
        self._server.exit()
        await asyncio.wait({self._serving}, timeout=grace_s)
        if not self._serving.done():
            await self._cut_off()
        await self._serving

    async def _cut_off(self) -> None:
        state = self._server.server_state
        self._server.force_exit = True
        if tasks := set(state.tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=_END_S)
        connections: list[Any] = list(state.connections)
        for connection in connections:
            # A reader that does not read would keep its connection, and newer Pythons wait for all.
            connection.transport.abort()


async def _bind(address: str) -> list[socket.socket]:
    """Sockets that are bound to all that an address means. Raises PortInUse, CannotListen."""
    host, _, text = address.rpartition(":")
    port = int(text)
    loop = asyncio.get_running_loop()
    sockets: list[socket.socket] = []
    try:
        places = await loop.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, place in places:
            bound = socket.socket(family, kind, protocol)
            sockets.append(bound)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # All of them on the port that the first was given.
            bound.bind((place[0], port, *place[2:]))
            port = bound.getsockname()[1]
    except OSError as error:
        for opened in sockets:
            opened.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(address) from None
        raise CannotListen(f"cannot listen on {address}: {error.strerror or error}") from error
    return sockets
