"""Calls of a server by their bytes, and what they end with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2

from modelyard.v1 import inference_service_pb2, tensor_pb2
from tests.support.server import RunningApp

__all__ = [
    "CREATE_MODEL",
    "PREDICT",
    "X_TENSOR",
    "Refused",
    "check_text",
    "raw_tensor",
    "request_of",
    "send",
    "send_refused",
    "text_tensor",
]

PREDICT = "/modelyard.v1.InferenceService/Predict"
CREATE_MODEL = "/modelyard.v1.ModelService/CreateModel"


class Refused(Exception):
    """What a bare call ended with."""

    def __init__(self, code: grpc.StatusCode, text: str, details: bytes) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text
        self.reason = ""
        self.fields: list[str] = []
        self.resources: list[str] = []
        status = status_pb2.Status.FromString(details)
        for packed in status.details:
            info = error_details_pb2.ErrorInfo()
            bad = error_details_pb2.BadRequest()
            resource = error_details_pb2.ResourceInfo()
            if packed.Unpack(info):
                assert info.domain == "modelyard"
                self.reason = info.reason
            elif packed.Unpack(bad):
                self.fields = [violation.field for violation in bad.field_violations]
            elif packed.Unpack(resource):
                self.resources.append(resource.resource_type)


async def send(
    yard: RunningApp, method: str, body: bytes, *, timeout_s: float | None = 10.0
) -> bytes:
    """Sends bytes as they are. Raises Refused."""
    rpc: Any = yard.channel.unary_unary(method)
    try:
        answer: bytes = await rpc(body, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        trailers: Any = error.trailing_metadata()
        details = dict(trailers or ()).get("grpc-status-details-bin", b"")
        raise Refused(error.code(), error.details() or "", details) from None
    return answer


async def send_refused(yard: RunningApp, method: str, body: bytes, **settings: Any) -> Refused:
    """What sending bytes ends with, which must be no answer."""
    try:
        await send(yard, method, body, **settings)
    except Refused as refused:
        return refused
    raise AssertionError("the call was answered")


def request_of(key: str, *inputs: tensor_pb2.Tensor) -> bytes:
    """A request for predictions as it is sent."""
    return inference_service_pb2.PredictRequest(key=key, inputs=inputs).SerializeToString()


def text_tensor(*values: str) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(
        data_type=tensor_pb2.DATA_TYPE_TEXT,
        shape=[len(values)],
        text=tensor_pb2.TextElements(values=values),
    )


def raw_tensor(
    shape: list[int], raw: bytes, *, kind: Any = tensor_pb2.DATA_TYPE_FLOAT32, name: str = ""
) -> tensor_pb2.Tensor:
    """A tensor whose parts need not fit to each other."""
    return tensor_pb2.Tensor(name=name, data_type=kind, shape=shape, raw=raw)


X_TENSOR = raw_tensor([1], b"\0" * 4)


def check_text(text: str, base: Path) -> None:
    """What a client is told is short and says nothing of the inside."""
    assert len(text.encode()) <= 512
    for inside in (str(base), "Traceback", ".py", "/srv/private", "site-packages", "0x"):
        assert inside not in text
