"""The server over HTTP: the same answers and the same errors as over gRPC."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from connectrpc.client import ConnectClientSync
from connectrpc.code import Code
from connectrpc.compat import google_protobuf_codecs
from connectrpc.errors import ConnectError
from connectrpc.method import IdempotencyLevel, MethodInfo, StreamType
from connectrpc.protocol import ProtocolType
from google.protobuf import json_format
from google.rpc import status_pb2
from tests.support import tiny_models
from tests.support.config_text import CPU, ROOTS, model_table
from tests.support.http_calls import frame, frames_of, post, trailers_of
from tests.support.served import served_app
from tests.support.server import RunningApp, server_process

from modelyard import Client, from_tensor, to_tensor
from modelyard.v1 import inference_service_pb2, residency_service_pb2
from modelyard_server.app import ExtraMissing, build
from modelyard_server.config import parse_config
from modelyard_server.services.http_methods import SERVED, http_methods

HTTP = '[http]\nlisten = "127.0.0.1:0"\n'
PREDICT = "/modelyard.v1.InferenceService/Predict"
BATCH = "/modelyard.v1.InferenceService/PredictBatch"
TEXTS = ["the dog", "a bird flew over the house"]


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    base = tmp_path_factory.mktemp("http")
    tiny_models.make_tiny_bert(base / "store" / "words", seed=1)
    config = HTTP + CPU + ROOTS
    config += model_table("words", "transformers", task="feature-extraction", keys=["acme/words"])
    tiny_models.make_tiny_gpt2(base / "store" / "writer", seed=2)
    config += model_table("writer", "transformers", task="text-generation")
    config += model_table("echo", "identity")
    with served_app(config, base) as running:
        yield running


@pytest.fixture
def port(yard: RunningApp) -> int:
    assert yard.app.http is not None
    return yard.app.http.port


def text_request(key: str = "acme/words") -> dict[str, Any]:
    tensor = {"dataType": "DATA_TYPE_TEXT", "shape": [len(TEXTS)], "text": {"values": TEXTS}}
    return {"key": key, "inputs": [tensor]}


def test_json_is_answered_as_grpc_is(yard: RunningApp, port: int) -> None:
    answer = post(port, PREDICT, text_request())
    with Client(yard.target) as client:
        wanted = np.asarray(client.predict("words", TEXTS).only)
    assert answer.status == 200
    (output,) = answer.json["outputs"]
    assert (output["name"], output["dataType"]) == ("embedding", "DATA_TYPE_FLOAT32")
    assert output["shape"] == ["2", "32"]
    vectors = np.frombuffer(base64.b64decode(output["raw"]), np.float32).reshape(2, 32)
    np.testing.assert_array_equal(vectors, wanted)
    assert answer.json["served"]["model"] == "models/words"
    assert answer.json["served"]["runDuration"].endswith("s")


def test_a_batch_tells_of_each_item(port: int) -> None:
    answer = post(port, BATCH, {"items": [text_request(), text_request("nobody")]})
    first, second = answer.json["results"]
    assert first["response"]["served"]["model"] == "models/words"
    assert second["error"]["reason"] == "ERROR_REASON_KEY_NOT_FOUND"


def test_large_tensors_pass(port: int) -> None:
    numbers = np.arange(200_000, dtype=np.float32)
    request = inference_service_pb2.PredictRequest(key="echo", inputs=[to_tensor(numbers, "x")])
    for body, kind in (
        (json_format.MessageToJson(request), "application/json"),
        (request.SerializeToString(), "application/proto"),
    ):
        answer = post(port, PREDICT, body, kind)
        assert answer.status == 200
        response = inference_service_pb2.PredictResponse()
        if kind == "application/json":
            json_format.Parse(answer.body, response)
        else:
            response.ParseFromString(answer.body)
        np.testing.assert_array_equal(from_tensor(response.outputs[0]), numbers)


REFUSED: dict[str, dict[str, Any]] = {
    "KEY_NOT_FOUND": text_request("nobody/knows"),
    "INVALID_FIELD": {"key": "..", "inputs": []},
    "INVALID_TENSOR": {"key": "words", "inputs": [{"dataType": "DATA_TYPE_INT8", "shape": [3]}]},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_errors_are_those_of_grpc(yard: RunningApp, port: int, reason: str) -> None:
    body = json_format.ParseDict(
        REFUSED[reason], inference_service_pb2.PredictRequest()
    ).SerializeToString()
    with grpc.insecure_channel(yard.target) as channel:
        call: Any = channel.unary_unary(PREDICT)
        with pytest.raises(grpc.RpcError) as refusal:
            call(body, timeout=10)
    of_grpc: Any = refusal.value
    trailers = dict(of_grpc.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert reason in str(status)

    for kind in ("application/json", "application/proto"):
        sent = REFUSED[reason] if kind == "application/json" else body
        answer = post(port, PREDICT, sent, kind)
        assert answer.json["code"] == of_grpc.code().name.lower()
        assert answer.json["message"] == of_grpc.details()
        assert [base64.b64decode(told["value"] + "==") for told in answer.json["details"]] == [
            packed.value for packed in status.details
        ]
        assert answer.json["details"][0]["debug"]["reason"] == reason

    answer = post(port, PREDICT, frame(body), "application/grpc-web+proto")
    of_web = trailers_of(frames_of(answer.body)[-1][1])
    assert int(of_web["grpc-status"]) == of_grpc.code().value[0]
    details = base64.b64decode(of_web["grpc-status-details-bin"] + "==")
    assert status_pb2.Status.FromString(details) == status


def test_grpc_web_is_answered(port: int) -> None:
    request = json_format.ParseDict(text_request(), inference_service_pb2.PredictRequest())
    answer = post(port, PREDICT, frame(request.SerializeToString()), "application/grpc-web+proto")
    assert answer.headers["content-type"] == "application/grpc-web+proto"
    (flags, message), (end, trailers) = frames_of(answer.body)
    assert (flags, end, trailers) == (0, 0x80, b"grpc-status: 0\r\n")
    response = inference_service_pb2.PredictResponse.FromString(message)
    assert response.served.model == "models/words"


def test_text_comes_as_it_is_generated(yard: RunningApp, port: int) -> None:
    body = {"key": "writer", "prompt": "the dog", "maxNewTokens": 6}
    path = "/modelyard.v1.InferenceService/Generate"
    answer = post(port, path, frame(json.dumps(body).encode()), "application/connect+json")
    *frames, (flags, end) = frames_of(answer.body)
    assert (flags, end) == (0x02, b"{}")
    pieces = [json.loads(message) for _, message in frames]
    assert len(pieces) > 1
    assert pieces[-1]["finish"] in {"FINISH_REASON_LENGTH", "FINISH_REASON_END"}
    with Client(yard.target) as client:
        wanted = client.predict("writer", ["the dog"], parameters={"max_new_tokens": 6})
    assert "".join(piece.get("text", "") for piece in pieces) == np.asarray(wanted["text"])[0]

    frames = frames_of(
        post(port, path, frame(b'{"key": "words"}'), "application/connect+json").body
    )
    ((flags, end),) = frames
    assert flags == 0x02
    assert json.loads(end)["error"]["code"] in {"invalid_argument", "failed_precondition"}


@pytest.mark.parametrize("protocol", [ProtocolType.CONNECT, ProtocolType.GRPC_WEB])
def test_the_librarys_own_client_is_served(port: int, protocol: ProtocolType) -> None:
    binary = google_protobuf_codecs()[0]
    predict = MethodInfo(
        name="Predict",
        service_name="modelyard.v1.InferenceService",
        input=inference_service_pb2.PredictRequest,
        output=inference_service_pb2.PredictResponse,
        idempotency_level=IdempotencyLevel.UNKNOWN,
        stream_type=StreamType.UNARY,
    )
    watch = MethodInfo(
        name="WatchResidencies",
        service_name="modelyard.v1.ResidencyService",
        input=residency_service_pb2.WatchResidenciesRequest,
        output=residency_service_pb2.WatchResidenciesResponse,
        idempotency_level=IdempotencyLevel.UNKNOWN,
        stream_type=StreamType.SERVER_STREAM,
    )
    client = ConnectClientSync(
        f"http://127.0.0.1:{port}", codec=binary, protocol=protocol, send_compression=None
    )
    with client:
        request = json_format.ParseDict(text_request(), inference_service_pb2.PredictRequest())
        response = client.execute_unary(request=request, method=predict, timeout_ms=10_000)
        assert response.served.model == "models/words"
        request.key = "nobody"
        with pytest.raises(ConnectError) as refusal:
            client.execute_unary(request=request, method=predict, timeout_ms=10_000)
        assert refusal.value.code is Code.NOT_FOUND
        assert refusal.value.details[0].type_name == "google.rpc.ErrorInfo"
        # A stream that does not end by itself, left after its first message.
        messages = client.execute_server_stream(
            request=residency_service_pb2.WatchResidenciesRequest(),
            method=watch,
            timeout_ms=10_000,
        )
        first = next(iter(messages))
        models = {residency.model for residency in first.residencies}
        assert models == {"models/echo", "models/words", "models/writer"}


def test_what_only_looks_is_served(port: int) -> None:
    models = post(port, "/modelyard.v1.ModelService/ListModels", "{}").json["models"]
    assert [model["name"] for model in models] == ["models/echo", "models/words", "models/writer"]
    resolved = post(port, "/modelyard.v1.RouteService/ResolveRoute", {"key": "acme/words"})
    assert resolved.json["steps"][0]["model"] == "models/words"
    devices = post(port, "/modelyard.v1.DeviceService/ListDevices", "{}").json["devices"]
    assert [device["name"] for device in devices] == ["devices/cpu"]
    assert post(port, "/modelyard.v1.AdminService/GetServerInfo", "{}").json["version"]


def test_what_changes_something_is_not_served(port: int) -> None:
    for method in (
        *("ModelService/CreateModel", "ModelService/UpdateModel", "ModelService/DeleteModel"),
        *("RouteService/CreateRoute", "DeviceService/ApplyPlan", "DeviceService/UpdateBudget"),
        *("ResidencyService/LoadModel", "ResidencyService/UnloadModel"),
        "ResidencyService/PinModel",
    ):
        answer = post(port, f"/modelyard.v1.{method}", "{}")
        assert (answer.status, answer.json["code"]) == (404, "unimplemented"), method
    looking = ("Get", "List", "Resolve", "Watch", "Explain", "Predict", "Generate")
    for service, methods in SERVED.items():
        assert all(method.startswith(looking) for method in methods), service


def test_every_served_method_has_its_types() -> None:
    async def handler(call: Any) -> bytes:
        return b""

    (method,) = http_methods({"modelyard.v1.InferenceService": {"Predict": handler}})
    assert method.path == PREDICT
    assert method.request_type is inference_service_pb2.PredictRequest
    assert method.response_type is inference_service_pb2.PredictResponse


def test_without_its_packages_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("modelyard_server.transport.connect", "modelyard_server.services.http_methods"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "connectrpc.code", None)
    config = parse_config(HTTP + CPU, base=tmp_path)
    with pytest.raises(ExtraMissing, match=r"pip install 'modelyard\[http\]'"):
        build(config)


async def test_the_command_serves_both_and_ends_both(tmp_path: Path) -> None:
    config = HTTP + '[engine]\nkind = "thread"\n' + CPU + model_table("echo", "identity")
    async with server_process(config, tmp_path) as server:
        first, _ = server.stdout.splitlines()
        assert first.startswith("modelyard serves HTTP on 127.0.0.1:")
        port = int(first.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        watch = "/modelyard.v1.AdminService/WatchRequests"
        head = f"POST {watch} HTTP/1.1\r\nhost: a\r\ncontent-type: application/connect+json\r\n"
        writer.write(f"{head}content-length: 7\r\n\r\n".encode() + frame(b"{}"))
        told = await reader.readuntil(b"models/echo")
        assert told.startswith(b"HTTP/1.1 200")
        server.send(signal.SIGTERM)
        rest = await reader.read()
        assert b"SERVER_DRAINING" in rest
        writer.close()
        assert await server.exit_code() == 0
        assert "Traceback" not in server.stderr
