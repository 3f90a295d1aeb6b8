"""Calls that a server refuses or cannot answer, and those that are made again."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from tests.support.asking import Asker, echo
from tests.support.fake_api import FakeServer, refuse

from modelyard import errors
from modelyard.admin import Admin
from modelyard.tensors import to_tensor
from modelyard.v1 import inference_service_pb2

PredictResponse = inference_service_pb2.PredictResponse


class TestErrors:
    async def test_a_refusal_is_its_typed_error(self, server: FakeServer, asker: Asker) -> None:
        metadata = {"device": "devices/cpu", "needed_bytes": "9", "budget_bytes": "5"}
        server.answer(
            "Predict",
            refuse(grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NEVER_FITS", metadata=metadata),
        )
        with pytest.raises(errors.ModelNeverFits, match="refused: MODEL_NEVER_FITS") as caught:
            await asker.predict("k", "x")
        error = caught.value
        assert (error.device, error.needed_bytes, error.budget_bytes) == ("devices/cpu", 9, 5)
        assert isinstance(error.__cause__, grpc.RpcError)
        assert len(server.requests) == 1

    async def test_an_exception_of_the_server_is_a_server_error(
        self, server: FakeServer, asker: Asker
    ) -> None:
        def broken(request: Any, context: grpc.ServicerContext) -> Any:
            raise LookupError("inside")

        server.answer("Predict", broken)
        with pytest.raises(errors.ServerError):
            await asker.predict("k", "x")

    async def test_nobody_there_is_server_unavailable(self, asker: Asker) -> None:
        # Port 1 of loopback: nothing listens on it without asking for trouble.
        asker.address = "127.0.0.1:1"
        with pytest.raises(errors.ServerUnavailable, match=r"127\.0\.0\.1:1 cannot be reached"):
            await asker.predict("k", "x", timeout_s=20)

    async def test_an_answer_that_is_too_large_is_not_asked_for_again(
        self, server: FakeServer, asker: Asker
    ) -> None:
        large = to_tensor("x" * 2000)
        server.answer("Predict", lambda request, context: PredictResponse(outputs=[large]))
        with pytest.raises(errors.ResourceExhausted, match="larger than max"):
            await asker.ask(asker.client(max_message_bytes=1000), "k", "x")
        assert len(server.requests) == 1


class TestRetries:
    @pytest.mark.parametrize("size_bytes", [10, 1_000_000], ids=["small", "above gRPC's buffer"])
    async def test_a_full_server_is_asked_again_after_the_time_it_names(
        self, server: FakeServer, asker: Asker, size_bytes: int
    ) -> None:
        full = refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", pushback_ms=150)
        times: list[float] = []

        def handler(request: Any, context: grpc.ServicerContext) -> Any:
            times.append(time.monotonic())
            return full(request, context) if len(times) < 3 else echo(request, context)

        server.answer("Predict", handler)
        prediction = await asker.predict("k", np.zeros(size_bytes, dtype=np.uint8))
        assert isinstance(prediction.only, np.ndarray) and prediction.only.size == size_bytes
        assert len(times) == 3
        # Its own back-off would be at most 50 and 100 ms.
        assert all(later - sooner >= 0.14 for sooner, later in pairwise(times))

    async def test_an_unavailable_server_is_asked_again(
        self, server: FakeServer, asker: Asker
    ) -> None:
        loading = refuse(grpc.StatusCode.UNAVAILABLE, "LOAD_FAILED", pushback_ms=1)
        server.answer(
            "Predict",
            lambda request, context: (loading if len(server.requests) < 2 else echo)(
                request, context
            ),
        )
        assert (await asker.predict("k", "x")).only == ["x"]
        assert len(server.requests) == 2

    async def test_four_attempts_are_the_end(self, server: FakeServer, asker: Asker) -> None:
        server.answer(
            "Predict",
            refuse(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "QUEUE_FULL",
                retry_after=Duration(nanos=1_000_000),
                pushback_ms=1,
            ),
        )
        with pytest.raises(errors.QueueFull) as caught:
            await asker.predict("k", "x")
        assert caught.value.retry_after_s == 0.001
        assert len(server.requests) == 4

    async def test_a_server_can_forbid_retries(self, server: FakeServer, asker: Asker) -> None:
        server.answer(
            "Predict",
            refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "DEADLINE_UNREACHABLE", pushback_ms=-1),
        )
        with pytest.raises(errors.DeadlineUnreachable):
            await asker.predict("k", "x")
        assert len(server.requests) == 1

    async def test_retries_end_with_the_deadline(self, server: FakeServer, asker: Asker) -> None:
        server.answer(
            "Predict", refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", pushback_ms=60_000)
        )
        with pytest.raises(errors.DeadlineExceeded):
            await asker.predict("k", "x", timeout_s=0.2)

    def test_operators_calls_are_not_repeated(self, server: FakeServer, admin: Admin) -> None:
        server.answer(
            "LoadModel", refuse(grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING", pushback_ms=1)
        )
        with pytest.raises(errors.ServerDraining):
            admin.load("m")
        assert len(server.requests) == 1
