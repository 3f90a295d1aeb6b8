"""A real gRPC server on loopback whose answers each test chooses, and which keeps the requests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from modelyard.v1 import (
    admin_service_pb2_grpc,
    device_service_pb2_grpc,
    inference_service_pb2_grpc,
    model_service_pb2_grpc,
    residency_service_pb2_grpc,
    route_service_pb2_grpc,
)

Handler = Callable[[Any, grpc.ServicerContext], Any]


class FakeServer:
    """Answers every RPC with what `handlers` has for its name, and keeps the requests."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.arrived = threading.Event()
        self.address = ""

    def answer(self, rpc: str, handler: Handler) -> None:
        self.handlers[rpc] = handler

    def reply(self, rpc: str, message: Any) -> None:
        """Answer an RPC with one message, always."""
        self.handlers[rpc] = lambda request, context: message

    def handle(self, rpc: str, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        self.arrived.set()
        self.metadata.append(dict(context.invocation_metadata()))
        return self.handlers[rpc](request, context)


def servicer(base: type, server: FakeServer) -> Any:
    """A servicer of a generated base class that asks the fake server for every answer."""

    def method(rpc: str) -> Callable[[Any, Any, grpc.ServicerContext], Any]:
        return lambda _, request, context: server.handle(rpc, request, context)

    rpcs = [name for name in vars(base) if name[0].isupper()]
    return type(f"Fake{base.__name__}", (base,), {rpc: method(rpc) for rpc in rpcs})()


def start(fake: FakeServer, port: int = 0) -> grpc.Server:
    """Serve on a port of loopback, a free one by default; `address` tells which."""
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(
        servicer(inference_service_pb2_grpc.InferenceServiceServicer, fake), server
    )
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(
        servicer(model_service_pb2_grpc.ModelServiceServicer, fake), server
    )
    device_service_pb2_grpc.add_DeviceServiceServicer_to_server(
        servicer(device_service_pb2_grpc.DeviceServiceServicer, fake), server
    )
    residency_service_pb2_grpc.add_ResidencyServiceServicer_to_server(
        servicer(residency_service_pb2_grpc.ResidencyServiceServicer, fake), server
    )
    route_service_pb2_grpc.add_RouteServiceServicer_to_server(
        servicer(route_service_pb2_grpc.RouteServiceServicer, fake), server
    )
    admin_service_pb2_grpc.add_AdminServiceServicer_to_server(
        servicer(admin_service_pb2_grpc.AdminServiceServicer, fake), server
    )
    fake.address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    server.start()
    return server


@contextmanager
def serving() -> Iterator[FakeServer]:
    """A fake server for the time of a test."""
    fake = FakeServer()
    server = start(fake)
    try:
        yield fake
    finally:
        server.stop(None).wait()


def refuse(
    code: grpc.StatusCode,
    reason: str,
    *details: Any,
    text: str | None = None,
    metadata: Mapping[str, str] | None = None,
    retry_after: Duration | None = None,
    pushback_ms: int | None = None,
) -> Handler:
    """A handler that ends the call as modelyard's server does."""
    status = status_pb2.Status(code=code.value[0], message=text or f"refused: {reason}")
    packable: list[Any] = [
        error_details_pb2.ErrorInfo(reason=reason, domain="modelyard", metadata=metadata or {}),
        *details,
    ]
    if retry_after is not None:
        packable.append(error_details_pb2.RetryInfo(retry_delay=retry_after))
    for detail in packable:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    trailers: list[tuple[str, str | bytes]] = [
        ("grpc-status-details-bin", status.SerializeToString())
    ]
    if pushback_ms is not None:
        trailers.append(("grpc-retry-pushback-ms", str(pushback_ms)))

    def handler(request: Any, context: grpc.ServicerContext) -> Any:
        context.set_trailing_metadata(tuple(trailers))
        context.abort(code, status.message)

    return handler
