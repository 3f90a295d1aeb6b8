"""predict_batch of both clients, against a server whose answers each test chooses."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from tests.support.fake_api import FakeServer, refuse

from modelyard import (
    AsyncClient,
    BatchItem,
    Client,
    InvalidRequest,
    KeyNotFound,
    ModelyardError,
    Prediction,
    QueueFull,
    ServerError,
    Violation,
    to_tensor,
)
from modelyard.v1 import error_reason_pb2
from modelyard.v1 import inference_service_pb2 as pb

Ask = Callable[..., list[Prediction | ModelyardError]]


@pytest.fixture(params=["blocking", "async"])
def ask(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Ask]:
    """predict_batch of one of the clients."""
    if request.param == "blocking":
        with Client(server.address) as client:
            yield client.predict_batch
        return

    def run(*arguments: Any, **settings: Any) -> list[Prediction | ModelyardError]:
        async def call() -> list[Prediction | ModelyardError]:
            async with AsyncClient(server.address) as client:
                return await client.predict_batch(*arguments, **settings)

        return asyncio.run(call())

    yield run


def answer(*results: pb.PredictBatchResult) -> pb.PredictBatchResponse:
    return pb.PredictBatchResponse(results=results)


def outputs(value: str) -> pb.PredictBatchResult:
    return pb.PredictBatchResult(
        response=pb.PredictResponse(
            outputs=[to_tensor(value, "y")],
            served=pb.Served(model="models/m", cold=True, load_duration=Duration(seconds=2)),
        )
    )


def failure(reason: int, code: grpc.StatusCode, **more: Any) -> pb.PredictBatchResult:
    error = pb.PredictBatchError(code=code.value[0], message="the text", **more)
    error.reason = reason  # type: ignore[assignment]  # an enum's value, or none of it
    return pb.PredictBatchResult(error=error)


def test_items_are_sent_as_predict_sends_them(server: FakeServer, ask: Ask) -> None:
    server.reply("PredictBatch", answer(*map(outputs, "abc")))
    array = np.ones((2, 3), np.float32)
    ask(
        [
            BatchItem(key="k", inputs={"x": array, "z": "t"}, parameters={"top_k": 3}),
            ("other", ["a", "b"]),
            BatchItem(key="k", inputs=b"raw"),
        ]
    )
    (request,) = server.requests
    first, second, third = request.items
    assert [each.key for each in request.items] == ["k", "other", "k"]
    assert list(first.inputs) == [to_tensor(array, "x"), to_tensor("t", "z")]
    assert first.parameters["top_k"] == 3
    assert list(second.inputs) == [to_tensor(["a", "b"], "")]
    assert not second.HasField("parameters")
    assert list(third.inputs) == [to_tensor(b"raw", "")]


def test_answers_and_errors_come_in_order(server: FakeServer, ask: Ask) -> None:
    reason = error_reason_pb2
    server.reply(
        "PredictBatch",
        answer(
            outputs("first"),
            failure(reason.ERROR_REASON_KEY_NOT_FOUND, grpc.StatusCode.NOT_FOUND),
            failure(
                reason.ERROR_REASON_QUEUE_FULL,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                retry_delay=Duration(nanos=250_000_000),
                metadata={"a": "b"},
            ),
            failure(
                reason.ERROR_REASON_INVALID_TENSOR,
                grpc.StatusCode.INVALID_ARGUMENT,
                violations=[pb.PredictBatchViolation(subject="inputs[0]", description="odd")],
            ),
            outputs("last"),
        ),
    )
    first, missing, full, invalid, last = ask([("k", "a")] * 5)
    assert isinstance(first, Prediction) and isinstance(last, Prediction)
    assert (first.only, last.only) == (["first"], ["last"])
    assert first.served.cold and first.served.load_s == 2.0
    assert type(missing) is KeyNotFound and missing.retry_after_s is None
    assert str(missing) == "the text" and missing.code is grpc.StatusCode.NOT_FOUND
    assert type(full) is QueueFull and full.retry_after_s == 0.25
    assert full.reason == "QUEUE_FULL" and full.metadata == {"a": "b"}
    assert type(invalid) is InvalidRequest
    assert invalid.violations == (Violation(field="inputs[0]", description="odd"),)
    assert pickle.loads(pickle.dumps(full)).retry_after_s == 0.25


def test_what_a_newer_server_says_goes_by_its_code(server: FakeServer, ask: Ask) -> None:
    server.reply(
        "PredictBatch",
        answer(
            failure(9999, grpc.StatusCode.NOT_FOUND),
            failure(0, grpc.StatusCode.UNAVAILABLE),
            failure(0, grpc.StatusCode.OK),
        ),
    )
    unknown, bare, none = ask([("k", "a")] * 3)
    assert isinstance(unknown, ModelyardError) and isinstance(bare, ModelyardError)
    assert type(unknown).__name__ == "NotFound" and unknown.reason == "9999"
    assert type(bare).__name__ == "ServerUnavailable" and bare.reason is None
    assert isinstance(none, ServerError) and none.code is grpc.StatusCode.UNKNOWN


@pytest.mark.parametrize(
    ("results", "text"),
    [
        ([], "0 results for 2 items"),
        ([outputs("a")] * 3, "3 results for 2 items"),
        ([outputs("a"), pb.PredictBatchResult()], "neither an answer nor an error"),
    ],
)
def test_an_answer_that_breaks_the_contract_is_the_servers_error(
    server: FakeServer, ask: Ask, results: list[pb.PredictBatchResult], text: str
) -> None:
    server.reply("PredictBatch", answer(*results))
    with pytest.raises(ServerError, match=text):
        ask([("k", "a")] * 2)


def test_the_call_as_a_whole_may_be_refused(server: FakeServer, ask: Ask) -> None:
    server.answer("PredictBatch", refuse(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"))
    with pytest.raises(InvalidRequest):
        ask([("k", "a")])


@pytest.mark.parametrize(
    ("items", "error", "text"),
    [
        ([], ValueError, "items is empty"),
        ("text", TypeError, "must be a list"),
        (b"text", TypeError, "must be a list"),
        ({"k": "a"}, TypeError, "must be a list"),
        (BatchItem(key="k", inputs="a"), TypeError, "must be a list"),
        (7, TypeError, "must be a list"),
        ([("k", "a"), 7], TypeError, r"items\[1\]: must be a BatchItem or \(key, inputs\)"),
        ([("k", "a"), ("k",)], TypeError, r"items\[1\]: must be a BatchItem"),
        ([("k", "a"), ["k", "a"]], TypeError, r"items\[1\]: must be a BatchItem"),
        ([("k", "a"), (7, "a")], TypeError, r"items\[1\]: key must be a str"),
        ([("k", {})], ValueError, r"items\[0\]: inputs is empty"),
        ([("k", object())], TypeError, r"items\[0\]: "),
        ([BatchItem(key="k", inputs="a", parameters={"a": object()})], TypeError, r"items\[0\]"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_anything_is_sent(
    server: FakeServer, ask: Ask, items: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        ask(items)
    assert server.requests == []


def test_a_batch_that_is_too_large_is_refused_before_it_is_sent(server: FakeServer) -> None:
    with (
        Client(server.address, max_message_bytes=10_000) as client,
        pytest.raises(ValueError, match="max_message_bytes is 10000"),
    ):
        client.predict_batch([("k", "a" * 600)] * 20)
    assert server.requests == []


def test_items_may_come_from_a_generator(server: FakeServer, ask: Ask) -> None:
    server.reply("PredictBatch", answer(outputs("a"), outputs("b")))
    assert len(ask(("k", text) for text in "ab")) == 2
