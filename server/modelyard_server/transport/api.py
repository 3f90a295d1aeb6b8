"""The transport seam: what a handler gets and gives, whatever carries the bytes.

A handler takes the message's bytes, the call's metadata and how long the caller will wait, and
returns bytes or a status, or yields many of them. It never sees a connection, a context or a
library's type, so that a native front end can take grpc.aio's place without touching it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

__all__ = [
    "IDENTITY_KEY",
    "Call",
    "CannotListen",
    "Duplex",
    "DuplexHandler",
    "Handler",
    "Handlers",
    "Link",
    "StatusReply",
    "StreamHandler",
    "Streaming",
]


IDENTITY_KEY: Final = "x-modelyard-identity"
"""Metadata in which a caller may say who it is; not authenticated."""

_MOST_IDENTITY: Final = 256


class CannotListen(Exception):
    """An address is not one that this machine can listen on; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call: one message in, one or many out; or many in and out, see Duplex.

    What is read of it is read while its handler runs: afterwards the library has let go of what it
    would have to look at, and ends the process.

    Attributes:
        body: the request message, serialized; empty where many come.
        read_metadata: reads what came with it; see metadata.
        remaining_s: how long the caller will wait; None if it set no deadline.
        read_peer: reads where it came from, as gRPC writes it: "ipv4:127.0.0.1:40000".
    """

    body: bytes
    read_metadata: Callable[[], Iterable[tuple[str, str | bytes]] | None]
    remaining_s: float | None
    read_peer: Callable[[], str] = str

    def identity(self) -> str:
        """Who calls, as the metadata says; not authenticated. Empty if it does not say."""
        for key, value in self.metadata:
            if key == IDENTITY_KEY and isinstance(value, str):
                return value[:_MOST_IDENTITY]
        return ""

    def client(self) -> str:
        """One text for one caller: its identity, else the host that it calls from.

        Empty if neither is known. No identity is the same as any host.
        """
        if identity := self.identity():
            return f"identity:{identity}"
        # Without the port: many connections bring no more turns than one.
        peer = self.read_peer()
        return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer

    @property
    def metadata(self) -> Sequence[tuple[str, str | bytes]]:
        """What came with the message, keys in lower case. Read when asked for: few handlers do."""
        return tuple(self.read_metadata() or ())


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReply:
    """A call that ends without a message.

    Attributes:
        code: gRPC status code, as a number.
        text: for people.
        details: a serialized google.rpc.Status; empty for none.
        pushback_ms: for the client's retry policy: wait this long, or do not retry if negative.
            None to leave it to the client.
    """

    code: int
    text: str
    details: bytes = b""
    pushback_ms: int | None = None


Handler = Callable[[Call], Awaitable[bytes | StatusReply]]
"""Answers one unary call. Cancelled when the caller has gone. Raises nothing else."""

StreamHandler = Callable[[Call], AsyncGenerator[bytes | StatusReply, None]]
"""Answers one call with a stream of messages.

The next message is asked for when the one before is on its way, so a reader that does not read
stops its handler, and nothing piles up. A StatusReply is the last thing that is asked for; a
handler that ends without one has ended well. It is closed, or cancelled where it waits, when the
caller has gone, when the deadline passes and when the server stops: what has to be put right
afterwards stands in `finally`.
"""


@dataclass(frozen=True, slots=True)
class Streaming:
    """A method that answers with a stream, among handlers that answer once.

    Attributes:
        handler: answers it.
        is_finite: it comes to its end by itself, so a server that stops lets it, as it lets those
            that answer once. Other streams it ends.
    """

    handler: StreamHandler
    is_finite: bool = False


class Link(Protocol):
    """Both directions of a call with many messages each way.

    One task may read while another writes; neither is done by two at once.
    """

    async def read(self) -> bytes | None:
        """The next message; what is not asked for is not taken from the client.

        Returns:
            None once no more will come: the client has ended its side, or the server stops. The
            handler is to answer what it has and to return. If the server stops the client is told.
        """

    async def write(self, message: bytes) -> None:
        """Sends a message. Returns when it is on its way: who does not read stops the handler.

        Raises:
            CancelledError: the client has gone, or does not read and the server stops.
        """


DuplexHandler = Callable[[Call, Link], Awaitable[StatusReply | None]]
"""Answers one call with many messages each way; returns how it ends, None if it ended well.

Cancelled when the caller has gone and when the deadline passes. When the server stops it has the
time that unary calls have, as long as its client reads.
"""


@dataclass(frozen=True, slots=True)
class Duplex:
    """A method that takes a stream and answers with one.

    Attributes:
        handler: answers it.
    """

    handler: DuplexHandler


Handlers = Mapping[str, Mapping[str, Handler | Streaming | Duplex]]
"""Full service name to method name to handler."""
