"""Whose deadline holds, and calls that are given up."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from tests.support.asking import Asker
from tests.support.fake_api import FakeServer, refuse

from modelyard import errors
from modelyard.aio import AsyncClient
from modelyard.v1 import inference_service_pb2

PredictResponse = inference_service_pb2.PredictResponse


class TestDeadlines:
    @pytest.fixture
    def stuck(self, server: FakeServer) -> Iterator[threading.Event]:
        """A server that answers nothing until its caller has gone; set when that was noticed."""
        gone = threading.Event()

        def wait(request: Any, context: grpc.ServicerContext) -> PredictResponse:
            assert context.add_callback(gone.set)
            gone.wait(30)
            return PredictResponse()

        server.answer("Predict", wait)
        yield gone
        gone.set()

    async def test_a_call_s_own_deadline_holds(self, stuck: threading.Event, asker: Asker) -> None:
        with pytest.raises(errors.DeadlineExceeded) as caught:
            await asker.predict("k", "x", timeout_s=0.2)
        assert caught.value.phase is None

    async def test_the_client_s_deadline_holds_where_the_call_has_none(
        self, stuck: threading.Event, asker: Asker
    ) -> None:
        with pytest.raises(errors.DeadlineExceeded):
            await asker.ask(asker.client(timeout_s=0.2), "k", "x")

    async def test_a_server_that_is_slow_to_greet_gets_the_call_s_whole_time(
        self, asker: Asker
    ) -> None:
        # It accepts connections, by its backlog, and says nothing. grpc.min_reconnect_backoff_ms
        # would bound the time for its greeting as well, and end this as unreachable.
        with socket.create_server(("127.0.0.1", 0)) as silent:
            asker.address = f"127.0.0.1:{silent.getsockname()[1]}"
            with pytest.raises(errors.DeadlineExceeded):
                await asker.predict("k", "x", timeout_s=2.5)

    async def test_the_server_knows_the_deadline(self, server: FakeServer, asker: Asker) -> None:
        seen: list[float] = []

        def handler(request: Any, context: grpc.ServicerContext) -> PredictResponse:
            seen.append(context.time_remaining())
            return PredictResponse()

        server.answer("Predict", handler)
        await asker.predict("k", "x")
        await asker.predict("k", "x", timeout_s=200)
        # The service config must not cap the second at the default.
        assert 20 < seen[0] < 35 < 190 < seen[1] < 210

    async def test_the_phase_the_server_names_is_kept(
        self, server: FakeServer, asker: Asker
    ) -> None:
        server.answer("Predict", refuse(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_IN_LOAD"))
        with pytest.raises(errors.DeadlineExceeded) as caught:
            await asker.predict("k", "x")
        assert caught.value.phase == "load"

    async def test_cancelling_a_task_is_never_an_error_of_ours(
        self, server: FakeServer, stuck: threading.Event
    ) -> None:
        async with AsyncClient(server.address) as client:
            task = asyncio.create_task(client.predict("k", "x"))
            assert await asyncio.to_thread(server.arrived.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await asyncio.to_thread(stuck.wait, 10)

    async def test_asyncio_timeouts_work_as_everywhere(
        self, server: FakeServer, stuck: threading.Event
    ) -> None:
        async with AsyncClient(server.address) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await client.predict("k", "x")
