"""How a client is connected: one channel, checked settings, and a deadline on every call.

The service config makes gRPC itself retry predictions, which are idempotent, when the server is
unreachable or out of room. It waits as long as the server asks for (``grpc-retry-pushback-ms``),
stays within the call's deadline, and stops retrying while failures are frequent, so that retries
never make an overload worse. Left out on purpose:

* ``timeout``: gRPC would take the smaller one of it and the call's, and cap what callers ask for.
* ``healthCheckConfig``: it is only as good as whoever answers for the health service between
  client and server, and a wrong answer keeps the channel from ever being used.
* keepalive pings: every call has a deadline, and a server or proxy that did not agree to pings
  closes the connection over them.

gRPC does not retry administrative calls: not all of them are idempotent. Those that carry a
request id are repeated once by ``Admin``, when the connection broke. Watches, which last, are given
deadlines of some minutes and resumed: that finds a dead connection without pings.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from modelyard._status import error_from_rpc

__all__ = [
    "DEFAULT_MAX_MESSAGE_BYTES",
    "DEFAULT_TARGET",
    "DEFAULT_TIMEOUT_S",
    "AsyncConnection",
    "Connection",
    "ConnectionSettings",
    "StreamingCall",
]

DEFAULT_TARGET: Final = "127.0.0.1:8470"
DEFAULT_TIMEOUT_S: Final = 30.0
DEFAULT_MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024

_IDENTITY_KEY: Final = "x-modelyard-identity"
_MAX_IDENTITY_LENGTH: Final = 128
# gRPC keeps its size options in a signed 32-bit number.
_MAX_MESSAGE_LIMIT: Final = 2**31 - 1

_RequestT = TypeVar("_RequestT", bound=Message)
_ResponseT = TypeVar("_ResponseT")
_ResponseT_co = TypeVar("_ResponseT_co", covariant=True)


class StreamingCall(Protocol[_ResponseT_co]):
    """A call under way that is answered with many messages. gRPC has no public name for it."""

    def __iter__(self) -> Iterator[_ResponseT_co]:
        """Return the messages as they come; raises ``grpc.RpcError`` for what it ends with."""
        ...

    def cancel(self) -> bool:
        """End it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionSettings:
    """Everything about a connection that a caller can choose, checked.

    Args: as those of ``Client``.

    Raises:
        TypeError: a setting of the wrong type.
        ValueError: a setting out of range.
    """

    target: str
    timeout_s: float
    max_message_bytes: int
    channel_credentials: grpc.ChannelCredentials | None
    identity: str | None

    def __post_init__(self) -> None:
        if not isinstance(self.target, str):
            raise TypeError(f"target must be a str, got {type(self.target).__name__}")
        if not self.target or self.target.startswith(("http:", "https:")):
            raise ValueError(
                f"target is {self.target!r}: write host:port or unix:path, without http:// or "
                "https://; for TLS give channel_credentials"
            )
        checked_timeout(self.timeout_s)
        if type(self.max_message_bytes) is not int:
            raise TypeError(
                f"max_message_bytes must be an int, got {type(self.max_message_bytes).__name__}"
            )
        if not 0 < self.max_message_bytes <= _MAX_MESSAGE_LIMIT:
            raise ValueError(
                f"max_message_bytes is {self.max_message_bytes}: 1 to {_MAX_MESSAGE_LIMIT} may be"
            )
        if not isinstance(self.channel_credentials, grpc.ChannelCredentials | None):
            raise TypeError(
                "channel_credentials must be grpc.ChannelCredentials or None, got "
                f"{type(self.channel_credentials).__name__}: grpc.ssl_channel_credentials() "
                "makes them"
            )
        if not isinstance(self.identity, str | None):
            raise TypeError(f"identity must be a str or None, got {type(self.identity).__name__}")
        if self.identity is not None and not (
            0 < len(self.identity) <= _MAX_IDENTITY_LENGTH
            and self.identity.isascii()
            and self.identity.isprintable()
            # A transport may trim them, and then it is another identity.
            and self.identity == self.identity.strip()
        ):
            raise ValueError(
                f"identity must be 1 to {_MAX_IDENTITY_LENGTH} printable ASCII characters, "
                "without spaces around"
            )

    def options(self) -> list[tuple[str, Any]]:
        """Return the channel's options."""
        options: list[tuple[str, Any]] = [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            # Above this size (256 KiB otherwise) gRPC silently stops retrying a request.
            ("grpc.per_rpc_retry_buffer_size", self.max_message_bytes),
            # The defaults keep a client away for a second or more after a restart.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
            # Channels of a process to one address share a connection otherwise, and its waiting
            # time after a failure: a new client would be told at once what an old one had met.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.service_config", _service_config()),
        ]
        if _is_loopback(self.target):
            # A proxy from the environment has nothing to do with this machine's own ports.
            options.append(("grpc.enable_http_proxy", 0))
        return options

    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return what every call sends along."""
        return () if self.identity is None else ((_IDENTITY_KEY, self.identity),)

    def call_timeout(self, timeout_s: float | None) -> float:
        """Return the time for one call, in seconds. Raises as ``checked_timeout``."""
        return self.timeout_s if timeout_s is None else checked_timeout(timeout_s)

    def check_size(self, request: Message) -> None:
        """Refuse a request that is too large to send.

        gRPC would answer RESOURCE_EXHAUSTED, which is what a busy server says, and retry.

        Raises:
            ValueError: it is larger than ``max_message_bytes``.
        """
        size_bytes = request.ByteSize()
        if size_bytes > self.max_message_bytes:
            raise ValueError(
                f"the request has {size_bytes} bytes and max_message_bytes is "
                f"{self.max_message_bytes}: send fewer rows at a time, or raise the limit here "
                "and on the server"
            )


class Connection:
    """One blocking channel. May be used from several threads at once."""

    def __init__(self, settings: ConnectionSettings) -> None:
        self.settings = settings
        options = settings.options()
        if settings.channel_credentials is None:
            self.channel = grpc.insecure_channel(settings.target, options=options)
        else:
            self.channel = grpc.secure_channel(
                settings.target, settings.channel_credentials, options=options
            )
        self._closed = False

    def call(
        self,
        rpc: grpc.UnaryUnaryMultiCallable[_RequestT, _ResponseT],
        request: _RequestT,
        timeout_s: float | None,
    ) -> _ResponseT:
        """Make one call.

        Raises:
            ModelyardError: it did not succeed.
            RuntimeError: the connection is closed.
            ValueError, TypeError: ``timeout_s`` is no time, or the request is too large.
        """
        timeout_s = self.settings.call_timeout(timeout_s)
        self.settings.check_size(request)
        if self._closed:
            raise _closed_error()
        try:
            return rpc(request, timeout=timeout_s, metadata=self.settings.metadata())
        except grpc.RpcError as error:
            raise error_from_rpc(error, target=self.settings.target) from error
        except ValueError:
            # gRPC's word for a channel that another thread has closed in the meantime.
            if self._closed:
                raise _closed_error() from None
            raise

    def open_stream(
        self,
        rpc: grpc.UnaryStreamMultiCallable[_RequestT, _ResponseT],
        request: _RequestT,
        timeout_s: float,
    ) -> StreamingCall[_ResponseT]:
        """Begin a call that is answered with many messages, and return it.

        Iterating over it raises ``grpc.RpcError`` for what it ends with.

        Raises:
            RuntimeError: the connection is closed.
            ValueError: the request is too large.
        """
        self.settings.check_size(request)
        if self._closed:
            raise _closed_error()
        try:
            return rpc(request, timeout=timeout_s, metadata=self.settings.metadata())
        except ValueError:
            if self._closed:
                raise _closed_error() from None
            raise

    def check_open(self) -> None:
        """Raise ``RuntimeError`` if the connection is closed."""
        if self._closed:
            raise _closed_error()

    def close(self) -> None:
        """Close the channel; calls of other threads end with an error. Idempotent."""
        self._closed = True
        self.channel.close()


class AsyncConnection:
    """One channel of grpc.aio. Belongs to the event loop that first uses it.

    The channel is made when it is first needed, because grpc.aio binds it to whatever loop is
    current, and a client made before ``asyncio.run`` would get a loop that never runs.
    """

    def __init__(self, settings: ConnectionSettings) -> None:
        self.settings = settings
        self._channel: grpc.aio.Channel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def channel(self) -> grpc.aio.Channel:
        """Return the channel of the running loop.

        Raises:
            RuntimeError: no loop runs, another loop than before runs, or the connection is closed.
        """
        loop = asyncio.get_running_loop()
        if self._closed:
            raise _closed_error()
        if self._channel is None:
            settings = self.settings
            options = settings.options()
            if settings.channel_credentials is None:
                self._channel = grpc.aio.insecure_channel(settings.target, options=options)
            else:
                self._channel = grpc.aio.secure_channel(
                    settings.target, settings.channel_credentials, options=options
                )
            self._loop = loop
        elif loop is not self._loop:
            raise RuntimeError(
                "this client is in use on another event loop: make one client for each loop"
            )
        return self._channel

    async def call(
        self,
        rpc: grpc.aio.UnaryUnaryMultiCallable[_RequestT, _ResponseT],
        request: _RequestT,
        timeout_s: float | None,
    ) -> _ResponseT:
        """Make one call; ``rpc`` is one of ``channel()``. Cancelling the task cancels the call.

        Raises: as ``Connection.call``.
        """
        timeout_s = self.settings.call_timeout(timeout_s)
        self.settings.check_size(request)
        try:
            return await rpc(
                request,
                timeout=timeout_s,
                metadata=grpc.aio.Metadata(*self.settings.metadata()),
            )
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, target=self.settings.target) from error

    def open_stream(
        self,
        rpc: grpc.aio.UnaryStreamMultiCallable[_RequestT, _ResponseT],
        request: _RequestT,
        timeout_s: float | None,
    ) -> grpc.aio.UnaryStreamCall[_RequestT, _ResponseT]:
        """Begin a call that is answered with many messages; ``rpc`` is one of ``channel()``.

        Raises:
            ValueError, TypeError: ``timeout_s`` is no time, or the request is too large.
        """
        timeout_s = self.settings.call_timeout(timeout_s)
        self.settings.check_size(request)
        return rpc(
            request, timeout=timeout_s, metadata=grpc.aio.Metadata(*self.settings.metadata())
        )

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled. Idempotent."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()


def checked_timeout(timeout_s: float) -> float:
    """Return the argument if it is a time to wait for.

    Raises:
        TypeError: no number.
        ValueError: not finite, or not above 0.
    """
    if type(timeout_s) is bool or not isinstance(timeout_s, int | float):
        raise TypeError(f"timeout_s must be a number of seconds, got {type(timeout_s).__name__}")
    if not math.isfinite(timeout_s) or timeout_s <= 0:
        raise ValueError(f"timeout_s is {timeout_s}: give a finite number of seconds above 0")
    return timeout_s


def _service_config() -> str:
    return json.dumps(
        {
            "loadBalancingConfig": [{"round_robin": {}}],
            "methodConfig": [
                {
                    "name": [{"service": "modelyard.v1.InferenceService"}],
                    "retryPolicy": {
                        "maxAttempts": 4,
                        "initialBackoff": "0.05s",
                        "maxBackoff": "1s",
                        "backoffMultiplier": 2,
                        "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
                    },
                }
            ],
            "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
        }
    )


def _is_loopback(target: str) -> bool:
    address = target.removeprefix("dns:").removeprefix("ipv4:").removeprefix("ipv6:").lstrip("/")
    return address.startswith(("127.", "localhost:", "[::1]"))


def _closed_error() -> RuntimeError:
    return RuntimeError("this client is closed: make another one")
