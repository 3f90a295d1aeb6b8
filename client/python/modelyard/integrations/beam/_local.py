"""A channel to a server that is called and not connected to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import grpc

from modelyard._connection import (
    DEFAULT_TIMEOUT_S,
    Connection,
    ConnectionSettings,
)
from modelyard.admin import Admin
from modelyard.client import Client
from modelyard.v1.admin_service_pb2_grpc import AdminServiceStub
from modelyard.v1.device_service_pb2_grpc import DeviceServiceStub
from modelyard.v1.inference_service_pb2_grpc import InferenceServiceStub
from modelyard.v1.model_service_pb2_grpc import ModelServiceStub
from modelyard.v1.residency_service_pb2_grpc import ResidencyServiceStub
from modelyard.v1.route_service_pb2_grpc import RouteServiceStub

__all__ = ["Call", "LocalAdmin", "LocalClient"]

Call: TypeAlias = Callable[
    [str, bytes, float | None, Sequence[tuple[str, str | bytes]]], bytes | tuple[int, str, bytes]
]
"""Path, message, timeout in seconds and metadata; answers with a message, or code, text, details.

The method ``call`` of ``modelyard_server.embedding.EmbeddedServer``, in this process or another.
"""

_NAME: Final = "embedded yard"
_MOST_BYTES: Final = 2**31 - 1
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


class _CallFailed(grpc.RpcError):
    """How a call ended, as gRPC's own errors say it."""

    def __init__(self, code: int, text: str, details: bytes) -> None:
        super().__init__(text)
        self._code, self._text, self._packed = code, text, details

    def code(self) -> grpc.StatusCode:
        """The status code."""
        return _CODES.get(self._code, grpc.StatusCode.UNKNOWN)

    def details(self) -> str:
        """The text."""
        return self._text

    def trailing_metadata(self) -> Any:
        """What comes behind the answer."""
        return (("grpc-status-details-bin", self._packed),) if self._packed else ()


class _LocalChannel:
    """As much of a channel as stubs of unary methods use."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        **_: Any,
    ) -> Callable[..., Any]:
        """What makes one call of a method."""

        def ask(
            request: Any,
            timeout: float | None = None,
            metadata: Sequence[tuple[str, str | bytes]] = (),
        ) -> Any:
            body = request_serializer(request)
            answer = self._call(method, body, timeout, tuple(metadata))
            if isinstance(answer, bytes):
                return response_deserializer(answer)
            raise _CallFailed(*answer)

        return ask

    def unary_stream(self, method: str, *_: Any, **__: Any) -> Callable[..., Any]:
        """Refuses, when it is called."""

        def refuse(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"{method} is a stream: an embedded yard answers once")

        return refuse

    stream_stream = stream_unary = unary_stream

    def close(self) -> None:
        """Nothing is open."""


class _LocalConnection(Connection):
    """A connection that is none."""

    def __init__(self, call: Call) -> None:
        self.settings = ConnectionSettings(
            target=_NAME,
            timeout_s=DEFAULT_TIMEOUT_S,
            max_message_bytes=_MOST_BYTES,
            channel_credentials=None,
            identity=None,
        )
        # Stubs and Connection use of a channel what this one has.
        self.channel: Any = _LocalChannel(call)
        self._closed = False


class LocalClient(Client):
    """A client of a server that is called."""

    def __init__(self, call: Call) -> None:
        self._connection = _LocalConnection(call)
        channel = self._connection.channel
        self._stub = InferenceServiceStub(channel)
        self._routes = RouteServiceStub(channel)


class LocalAdmin(Admin):
    """An operator of a server that is called."""

    def __init__(self, call: Call) -> None:
        self._connection = _LocalConnection(call)
        channel = self._connection.channel
        self._admin = AdminServiceStub(channel)
        self._devices = DeviceServiceStub(channel)
        self._models = ModelServiceStub(channel)
        self._residencies = ResidencyServiceStub(channel)
        self._routes = RouteServiceStub(channel)
