"""The blocking client for operators: models, routes, devices, memory, and the server itself."""

from __future__ import annotations

from datetime import timedelta
from types import TracebackType
from typing import Final, Self

import grpc

from modelyard import _admin_messages
from modelyard._admin_devices import DeviceCalls
from modelyard._admin_models import UNSET, ModelCalls, Unset
from modelyard._admin_residencies import ResidencyCalls
from modelyard._admin_routes import RouteCalls
from modelyard._connection import (
    DEFAULT_MAX_MESSAGE_BYTES,
    DEFAULT_TARGET,
    DEFAULT_TIMEOUT_S,
    Connection,
    ConnectionSettings,
    StreamingCall,
)
from modelyard.events import WatchPosition
from modelyard.resources import ServerInfo, ServerStats, StoreCollected
from modelyard.v1 import admin_service_pb2
from modelyard.v1.admin_service_pb2_grpc import AdminServiceStub
from modelyard.v1.device_service_pb2_grpc import DeviceServiceStub
from modelyard.v1.model_service_pb2_grpc import ModelServiceStub
from modelyard.v1.residency_service_pb2_grpc import ResidencyServiceStub
from modelyard.v1.route_service_pb2_grpc import RouteServiceStub
from modelyard.watch import EventWatch, RequestWatch

__all__ = ["UNSET", "Admin", "Unset"]

_MAX_KEEP_S: Final = 36_500 * 86_400


class Admin(ModelCalls, RouteCalls, DeviceCalls, ResidencyCalls):
    """Registers models and routes, changes budgets and the plan, and tells what a server holds.

    Models and routes are named by their id (``sentiment``) or resource name (``models/sentiment``);
    devices by a ``Device``, its text (``cuda:1``), its id (``cuda-1``) or its resource name. May be
    shared between threads. Use it as a context manager or call ``close``.

    Every method takes ``timeout_s``, the seconds it may take (None takes the client's), and raises
    ``TypeError`` or ``ValueError`` for arguments that cannot be sent, ``ModelyardError`` for what
    the server refused or could not do, and ``RuntimeError`` once the client is closed.

    Calls that change something durable take a ``request_id``, 1 to 128 printable ASCII characters;
    None makes a fresh one. The server does the same call with the same id once, and answers it
    again with its first answer. So such a call is repeated once when the connection breaks, and a
    caller that keeps its id can repeat it after a crash. Other calls are not repeated.

    Args: as those of ``Client``.

    Raises: as ``Client``.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        channel_credentials: grpc.ChannelCredentials | None = None,
        identity: str | None = None,
    ) -> None:
        self._connection = Connection(
            ConnectionSettings(
                target=target,
                timeout_s=timeout_s,
                max_message_bytes=max_message_bytes,
                channel_credentials=channel_credentials,
                identity=identity,
            )
        )
        channel = self._connection.channel
        self._admin = AdminServiceStub(channel)
        self._devices = DeviceServiceStub(channel)
        self._models = ModelServiceStub(channel)
        self._residencies = ResidencyServiceStub(channel)
        self._routes = RouteServiceStub(channel)

    def info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """Return what the server is."""
        request = admin_service_pb2.GetServerInfoRequest()
        response = self._connection.call(self._admin.GetServerInfo, request, timeout_s)
        return self._read(_admin_messages.server_info_from, response)

    def stats(self, *, timeout_s: float | None = None) -> ServerStats:
        """Return what the server has done since it started."""
        request = admin_service_pb2.GetStatsRequest()
        response = self._connection.call(self._admin.GetStats, request, timeout_s)
        return self._read(_admin_messages.server_stats_from, response)

    def collect_store(
        self,
        *,
        keep_s: float | None = None,
        validate_only: bool = False,
        timeout_s: float | None = None,
    ) -> StoreCollected:
        """Give back what the server's weight store holds for nobody; return what came back.

        The server does so by itself; this does it now. It waits for imports that run.

        Args:
            keep_s: seconds that what was used is kept after it was last seen to be used; None: as
                the server's configuration says, 0: not at all.
            validate_only: say what would come back, and remove nothing.
            timeout_s: see the class. What is not over by then goes on.

        Raises:
            ValueError: ``keep_s`` is negative, or more than a hundred years.
            LoadFailed: the store's disk is broken.
            ModelyardError: any other failure.
        """
        request = admin_service_pb2.CollectStoreRequest(validate_only=validate_only)
        if keep_s is not None:
            if not 0 <= keep_s <= _MAX_KEEP_S:
                raise ValueError(f"keep_s must be 0 to {_MAX_KEEP_S}, got {keep_s}")
            request.keep_duration.FromTimedelta(timedelta(seconds=keep_s))
        response = self._connection.call(self._admin.CollectStore, request, timeout_s)
        return self._read(_admin_messages.store_collected_from, response)

    def watch_events(
        self,
        resume: WatchPosition | None = None,
        *,
        include_past: bool = False,
        timeout_s: float | None = None,
    ) -> EventWatch:
        """Return an iterator over what happens, in order: every decision and every change.

        Args:
            resume: the ``position`` of an earlier watch, to go on behind it; None begins with what
                happens next.
            include_past: begin with the events that the server's log still has.
            timeout_s: most seconds the watch may last, whereafter it raises ``DeadlineExceeded``;
                None for as long as it is not closed.

        Raises:
            TypeError, ValueError: an argument of no use, or both ways to begin.
            RuntimeError: the client is closed.
            What ends the watch is raised by its iteration: QueueFull (too many watches),
            ServerUnavailable, ServerDraining, any other ModelyardError.
        """
        if resume is not None and include_past:
            raise ValueError("give resume or include_past: each says where to begin")

        def open_call(
            position: WatchPosition | None, call_timeout_s: float
        ) -> StreamingCall[admin_service_pb2.WatchEventsResponse]:
            request = admin_service_pb2.WatchEventsRequest()
            if position is None:
                request.include_past = include_past
            else:
                request.epoch, request.revision = position.epoch, position.revision
            return self._connection.open_stream(self._admin.WatchEvents, request, call_timeout_s)

        return EventWatch(
            self._connection, open_call, resume=resume, timeout_s=timeout_s, times=None
        )

    def watch_requests(self, *, timeout_s: float | None = None) -> RequestWatch:
        """Return an iterator over what becomes of requests, from now on.

        The first it gives says what the models are, and comes at once.

        Args:
            timeout_s: most seconds the watch may last, whereafter it raises ``DeadlineExceeded``;
                None for as long as it is not closed.

        Raises:
            TypeError, ValueError: an argument of no use.
            RuntimeError: the client is closed.
            What ends the watch is raised by its iteration: QueueFull (too many watches),
            ServerUnavailable, ServerDraining, any other ModelyardError.
        """

        def open_call(
            position: WatchPosition | None, call_timeout_s: float
        ) -> StreamingCall[admin_service_pb2.WatchRequestsResponse]:
            request = admin_service_pb2.WatchRequestsRequest()
            return self._connection.open_stream(self._admin.WatchRequests, request, call_timeout_s)

        return RequestWatch(
            self._connection, open_call, resume=None, timeout_s=timeout_s, times=None
        )

    def close(self) -> None:
        """Close the connection; calls that other threads have under way end with an error."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
