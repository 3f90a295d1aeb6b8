"""What is served over HTTP: the data plane, and what only looks.

Changes of models, routes, devices and residencies are for gRPC: whoever puts this port before
people puts predictions before them, and no keys to the house.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from google.protobuf import message_factory
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.json_format import MessageToDict
from google.rpc import status_pb2

from modelyard.v1 import (
    admin_service_pb2,
    device_service_pb2,
    inference_service_pb2,
    model_service_pb2,
    residency_service_pb2,
    route_service_pb2,
)
from modelyard_server.errors import Violation
from modelyard_server.services.handler import invalid
from modelyard_server.services.status import reply_of
from modelyard_server.transport.api import Duplex, Handlers, StatusReply, Streaming
from modelyard_server.transport.connect import Detail, HttpMethod

__all__ = ["SERVED", "details_of", "http_methods", "unreadable"]

SERVED: Final[Mapping[str, frozenset[str]]] = {
    "InferenceService": frozenset({"Predict", "PredictBatch", "Generate"}),
    "ModelService": frozenset({"GetModel", "ListModels"}),
    "RouteService": frozenset({"GetRoute", "ListRoutes", "ResolveRoute"}),
    "DeviceService": frozenset({"GetDevice", "ListDevices", "GetPlan"}),
    "ResidencyService": frozenset({"ListResidencies", "WatchResidencies", "ExplainModel"}),
    "AdminService": frozenset({"GetServerInfo", "GetStats", "WatchEvents", "WatchRequests"}),
}
"""Methods by service; one that has no handler yet is not there."""

_PACKAGE: Final = "modelyard.v1"
_FILES: Final = (
    admin_service_pb2,
    device_service_pb2,
    inference_service_pb2,
    model_service_pb2,
    residency_service_pb2,
    route_service_pb2,
)


def http_methods(handlers: Handlers) -> tuple[HttpMethod, ...]:
    """The methods that are served over HTTP, with their handlers and types of messages.

    Args:
        handlers: all that the server has.
    """
    found: list[HttpMethod] = []
    for file in _FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            of_service = handlers.get(f"{_PACKAGE}.{service.name}", {})
            for method in service.methods:
                handler = of_service.get(method.name)
                if handler is None or method.name not in SERVED.get(service.name, ()):
                    continue
                # A stream in both directions needs more than HTTP/1.1 has.
                assert not isinstance(handler, Duplex), method.full_name
                assert method.server_streaming is isinstance(handler, Streaming), method.full_name
                found.append(
                    HttpMethod(
                        service=service.full_name,
                        name=method.name,
                        handler=handler,
                        request_type=message_factory.GetMessageClass(method.input_type),
                        response_type=message_factory.GetMessageClass(method.output_type),
                    )
                )
    return tuple(found)


def unreadable(why: str) -> StatusReply:
    """INVALID_FIELD for a message that cannot be read."""
    return reply_of(invalid(Violation("", why)))


def details_of(reply: StatusReply) -> list[Detail]:
    """The details of a status, each packed and as JSON has it."""
    status = status_pb2.Status.FromString(reply.details)
    return [_detail(packed) for packed in status.details]


def _detail(packed: AnyMessage) -> Detail:
    shown = MessageToDict(packed)
    shown.pop("@type", None)
    return Detail(type_url=packed.type_url, value=packed.value, shown=shown)
