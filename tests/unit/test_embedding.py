"""A server inside this process: calls in bytes, failures as statuses, and nothing left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import grpc
import pytest
from google.rpc import status_pb2
from tests.support.config_text import CPU, model_table

from modelyard.tensors import from_tensor, to_tensor
from modelyard.v1 import admin_service_pb2, inference_service_pb2
from modelyard_server.config import Config, EngineConfig, parse_config
from modelyard_server.devices.inventory import DeviceMissing
from modelyard_server.embedding import EmbeddedServer
from modelyard_server.transport.api import Call

PREDICT = "/modelyard.v1.InferenceService/Predict"


def config(text: str) -> Config:
    parsed = parse_config(text, base=Path("/"))
    return replace(parsed, engine=EngineConfig(kind="thread"))


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    before = set(threading.enumerate())
    server = EmbeddedServer(config(CPU + model_table("echo", "identity")))
    yield server
    assert server.close()
    assert server.close()
    assert not server.thread.is_alive()
    assert [thread for thread in threading.enumerate() if thread not in before] == []


def request(key: str) -> bytes:
    message = inference_service_pb2.PredictRequest(key=key, inputs=[to_tensor("hello")])
    return message.SerializeToString()


def test_a_call_is_answered_as_over_a_connection(server: EmbeddedServer) -> None:
    answer = server.call(PREDICT, request("echo"), 10)
    assert isinstance(answer, bytes)
    response = inference_service_pb2.PredictResponse.FromString(answer)
    assert from_tensor(response.outputs[0]) == ["hello"]
    assert response.served.model == "models/echo"


def test_calls_may_come_from_many_threads(server: EmbeddedServer) -> None:
    answers: list[object] = []

    def ask() -> None:
        for _ in range(20):
            answers.append(type(server.call(PREDICT, request("echo"), None)))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [bytes] * 80


def test_a_refusal_is_a_status_with_its_details(server: EmbeddedServer) -> None:
    answer = server.call(PREDICT, request("nobody"), 10)
    assert isinstance(answer, tuple)
    code, text, details = answer
    assert code == grpc.StatusCode.NOT_FOUND.value[0]
    assert "nobody" in text
    assert status_pb2.Status.FromString(details).code == code


@pytest.mark.parametrize(
    "path",
    ["/modelyard.v1.InferenceService/Guess", "/nobody/Predict", "", "Predict",
     "/modelyard.v1.AdminService/WatchEvents"],
)  # fmt: skip
def test_what_cannot_be_called_says_so(server: EmbeddedServer, path: str) -> None:
    answer = server.call(path, b"", 10)
    assert isinstance(answer, tuple)
    assert answer[0] == grpc.StatusCode.UNIMPLEMENTED.value[0]


def test_a_defect_is_told_by_an_id_that_is_in_the_log(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(call: Call) -> bytes:
        raise ZeroDivisionError(call.body)

    async def never(call: Call) -> bytes:
        await asyncio.Event().wait()
        return b""

    app = server._app
    assert app is not None
    handlers = MappingProxyType({"x": {"Broken": broken, "Never": never}})
    monkeypatch.setattr(server, "_app", replace(app, handlers=handlers))
    answer = server.call("/x/Broken", b"secret", 10)
    assert isinstance(answer, tuple)
    code, text, _ = answer
    assert code == grpc.StatusCode.INTERNAL.value[0]
    assert "secret" not in text
    assert text.rpartition("error_id=")[2] in caplog.text
    # One that does not keep to its time is left alone, and is told no longer to go on.
    answer = server.call("/x/Never", b"", 0.001)
    assert isinstance(answer, tuple)
    assert answer[0] == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


def test_the_end_waits_for_calls_and_cuts_off_what_does_not_end(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()

    async def waits(call: Call) -> bytes:
        begun.set()
        await asyncio.to_thread(may_end.wait, 60)
        return b"answered"

    async def never(call: Call) -> bytes:
        await asyncio.Event().wait()
        return b""

    app = server._app
    assert app is not None
    handlers = MappingProxyType({"x": {"Waits": waits, "Never": never}})
    monkeypatch.setattr(server, "_app", replace(app, handlers=handlers))
    with ThreadPoolExecutor(3) as threads:
        waiting = threads.submit(server.call, "/x/Waits", b"", 60)
        stuck = threads.submit(server.call, "/x/Never", b"", 60)
        assert begun.wait(60)
        ending = threads.submit(server.close, 0.5)
        may_end.set()
        assert ending.result(60)
        assert waiting.result(60) == b"answered"
        assert stuck.result(60)[0] == grpc.StatusCode.UNAVAILABLE.value[0]


def test_who_calls_after_the_end_is_told_that_it_has_ended(server: EmbeddedServer) -> None:
    assert server.close()
    answer = server.call("/modelyard.v1.AdminService/GetStats", b"", 10)
    assert isinstance(answer, tuple)
    assert answer[0] == grpc.StatusCode.UNAVAILABLE.value[0]


def test_one_that_cannot_start_leaves_nothing() -> None:
    before = set(threading.enumerate())
    with pytest.raises(DeviceMissing):
        EmbeddedServer(config(CPU.replace('"cpu"', '"cuda:7"')))
    assert set(threading.enumerate()) <= before


def test_two_of_one_process_do_not_know_of_each_other(server: EmbeddedServer) -> None:
    other = EmbeddedServer(config(CPU))
    try:
        stats = other.call("/modelyard.v1.AdminService/GetStats", b"", 10)
        assert isinstance(stats, bytes)
        assert isinstance(server.call(PREDICT, request("echo"), 10), bytes)
        stats = other.call("/modelyard.v1.AdminService/GetStats", b"", 10)
        assert isinstance(stats, bytes)
        found = admin_service_pb2.GetStatsResponse.FromString(stats)
        assert (found.hit_count, found.cold_count) == (0, 0)
        assert isinstance(other.call(PREDICT, request("echo"), 10), tuple)
    finally:
        assert other.close()
