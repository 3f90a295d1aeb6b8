"""Clients that are opened and closed, and what they can be told."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from tests.support.asking import Asker, echo
from tests.support.fake_api import FakeServer, servicer, start

from modelyard import errors
from modelyard._connection import ConnectionSettings
from modelyard.admin import Admin
from modelyard.aio import AsyncClient
from modelyard.client import Client
from modelyard.prediction import Prediction
from modelyard.v1 import inference_service_pb2, inference_service_pb2_grpc

PredictResponse = inference_service_pb2.PredictResponse


class TestLifetime:
    async def test_a_closed_client_says_so(self, server: FakeServer, asker: Asker) -> None:
        server.answer("Predict", echo)
        client = asker.client()
        await asker.ask(client, "k", "x")
        await asker.close()
        await asker.close()
        with pytest.raises(RuntimeError, match="this client is closed"):
            await asker.ask(client, "k", "x")

    def test_blocking_clients_are_context_managers(self, server: FakeServer) -> None:
        server.answer("Predict", echo)
        with Client(server.address) as client:
            assert client.predict("k", "x").only == ["x"]
        with pytest.raises(RuntimeError, match="this client is closed"):
            client.predict("k", "x")

    def test_closing_ends_the_calls_of_other_threads(self, server: FakeServer) -> None:
        gone = threading.Event()

        def wait(request: Any, context: grpc.ServicerContext) -> PredictResponse:
            assert context.add_callback(gone.set)
            gone.wait(30)
            return PredictResponse()

        server.answer("Predict", wait)
        client = Client(server.address)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(client.predict, "k", "x")
            assert server.arrived.wait(10)
            client.close()
            with pytest.raises(errors.ServerUnavailable):
                call.result(10)

    def test_an_async_client_can_be_made_before_its_loop(self, server: FakeServer) -> None:
        server.answer("Predict", echo)
        client = AsyncClient(server.address)

        async def use() -> Prediction:
            async with client:
                return await client.predict("k", "x")

        assert asyncio.run(use()).only == ["x"]

    async def test_an_async_client_belongs_to_one_loop(self, server: FakeServer) -> None:
        server.answer("Predict", echo)
        async with AsyncClient(server.address) as client:
            await client.predict("k", "x")
            with pytest.raises(RuntimeError, match="in use on another event loop"):
                await asyncio.to_thread(asyncio.run, client.predict("k", "x"))

    async def test_a_server_that_comes_back_is_found_again(self, asker: Asker) -> None:
        fake = FakeServer()
        fake.answer("Predict", echo)

        def start(port: int) -> tuple[grpc.Server, int]:
            grpc_server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
            inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(
                servicer(inference_service_pb2_grpc.InferenceServiceServicer, fake), grpc_server
            )
            port = grpc_server.add_insecure_port(f"127.0.0.1:{port}")
            grpc_server.start()
            return grpc_server, port

        first, port = start(0)
        asker.address = f"127.0.0.1:{port}"
        client = asker.client()
        await asker.ask(client, "k", "x")
        await asyncio.to_thread(first.stop(None).wait)
        second, _ = start(port)
        try:
            assert (await asker.ask(client, "k", "y")).only == ["y"]
        finally:
            await asyncio.to_thread(second.stop(None).wait)

    async def test_a_new_client_does_not_wait_for_what_an_old_one_has_met(
        self, asker: Asker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake = FakeServer()
        fake.answer("Predict", echo)
        gone = await asyncio.to_thread(start, fake)
        port = int(fake.address.rpartition(":")[2])
        await asyncio.to_thread(gone.stop(None).wait)
        options = ConnectionSettings.options
        # Longer than the test: who shares the old one's connection fails for all that time.
        waits = ("grpc.initial_reconnect_backoff_ms", "grpc.max_reconnect_backoff_ms")

        def patient(settings: ConnectionSettings) -> list[tuple[str, Any]]:
            return [(k, 300_000 if k in waits else value) for k, value in options(settings)]

        monkeypatch.setattr(ConnectionSettings, "options", patient)
        asker.address = fake.address
        old = asker.client()
        with pytest.raises(errors.ServerUnavailable):
            await asker.ask(old, "k", "x")
        back = await asyncio.to_thread(start, fake, port)
        try:
            assert (await asker.ask(asker.client(), "k", "y")).only == ["y"]
        finally:
            await asyncio.to_thread(back.stop(None).wait)


class TestSettings:
    @pytest.mark.parametrize("make", [Client, AsyncClient, Admin])
    @pytest.mark.parametrize(
        ("settings", "error", "text"),
        [
            ({"target": None}, TypeError, "target must be a str"),
            ({"target": ""}, ValueError, "write host:port"),
            ({"target": "http://there:1"}, ValueError, "without http://"),
            ({"timeout_s": None}, TypeError, "timeout_s must be a number"),
            ({"timeout_s": -1}, ValueError, "above 0"),
            ({"max_message_bytes": 1e6}, TypeError, "max_message_bytes must be an int"),
            ({"max_message_bytes": True}, TypeError, "max_message_bytes must be an int"),
            ({"max_message_bytes": 0}, ValueError, "1 to 2147483647"),
            ({"max_message_bytes": 2**31}, ValueError, "1 to 2147483647"),
            ({"channel_credentials": "tls"}, TypeError, "must be grpc.ChannelCredentials"),
            ({"identity": b"me"}, TypeError, "identity must be a str"),
            ({"identity": ""}, ValueError, "1 to 128 printable ASCII"),
            ({"identity": "a\nb"}, ValueError, "1 to 128 printable ASCII"),
            ({"identity": " a"}, ValueError, "without spaces around"),
            ({"identity": "ü"}, ValueError, "1 to 128 printable ASCII"),
            ({"identity": "a" * 129}, ValueError, "1 to 128 printable ASCII"),
        ],
    )
    def test_wrong_settings_are_refused(
        self, make: Any, settings: Any, error: type[Exception], text: str
    ) -> None:
        with pytest.raises(error, match=text):
            make(**settings)

    @pytest.mark.parametrize(
        ("target", "direct"),
        [
            ("127.0.0.1:8470", True),
            ("localhost:8470", True),
            ("dns:///localhost:8470", True),
            ("ipv6:[::1]:8470", True),
            ("models.example:8470", False),
            ("localhost.example:8470", False),
        ],
    )
    def test_proxies_are_not_for_this_machine(self, target: str, direct: bool) -> None:
        settings = ConnectionSettings(
            target=target,
            timeout_s=1,
            max_message_bytes=1,
            channel_credentials=None,
            identity=None,
        )
        assert (("grpc.enable_http_proxy", 0) in settings.options()) is direct

    async def test_credentials_make_a_secure_channel(
        self, server: FakeServer, asker: Asker
    ) -> None:
        # The server speaks no TLS, so the handshake fails; in the clear the call would succeed.
        server.answer("Predict", echo)
        client = asker.client(channel_credentials=grpc.ssl_channel_credentials())
        with pytest.raises((errors.ServerUnavailable, errors.DeadlineExceeded)):
            await asker.ask(client, "k", "x", timeout_s=5)
        assert server.requests == []
