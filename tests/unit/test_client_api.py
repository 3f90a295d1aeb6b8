"""Both clients, and Admin, against a real server on loopback whose answers each test chooses."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from tests.support.fake_api import FakeServer, Handler, refuse, servicer, serving

from modelyard import errors
from modelyard._connection import ConnectionSettings
from modelyard.admin import Admin
from modelyard.aio import AsyncClient
from modelyard.client import Client
from modelyard.devices import ComponentDevice, Device, DeviceMap
from modelyard.prediction import Prediction
from modelyard.resources import (
    BatchFigures,
    CopyState,
    Departures,
    DeviceCharge,
    HostTier,
    LoadFailure,
    Regret,
    ResidencyState,
)
from modelyard.tensors import Bfloat16, TensorError, to_tensor
from modelyard.v1 import (
    admin_service_pb2,
    device_pb2,
    device_service_pb2,
    inference_service_pb2,
    inference_service_pb2_grpc,
    model_pb2,
    model_service_pb2,
    residency_pb2,
    residency_service_pb2,
    tensor_pb2,
)

LIVE = ("recent_load_duration", "regret", "departures", "batches", "shadows")
"""Fields of GetStatsResponse that are values of their own in the client."""

PredictRequest = inference_service_pb2.PredictRequest
PredictResponse = inference_service_pb2.PredictResponse


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as fake:
        yield fake


class Asker:
    """One face for both clients, so that every test holds for both."""

    def __init__(self, kind: str, address: str) -> None:
        self.kind = kind
        self.address = address
        self.clients: list[Client | AsyncClient] = []

    def client(self, **settings: Any) -> Client | AsyncClient:
        make: Any = Client if self.kind == "blocking" else AsyncClient
        client: Client | AsyncClient = make(self.address, **settings)
        self.clients.append(client)
        return client

    async def ask(
        self, client: Client | AsyncClient, key: str, inputs: Any, **rest: Any
    ) -> Prediction:
        if isinstance(client, AsyncClient):
            return await client.predict(key, inputs, **rest)
        return await asyncio.to_thread(client.predict, key, inputs, **rest)

    async def predict(self, key: str, inputs: Any, **rest: Any) -> Prediction:
        return await self.ask(self.client(), key, inputs, **rest)

    async def close(self) -> None:
        for client in self.clients:
            if isinstance(client, AsyncClient):
                await client.close()
            else:
                client.close()


@pytest.fixture(params=["blocking", "asyncio"])
async def asker(request: pytest.FixtureRequest, server: FakeServer) -> AsyncIterator[Asker]:
    made = Asker(request.param, server.address)
    yield made
    await made.close()


@pytest.fixture
def admin(server: FakeServer) -> Iterator[Admin]:
    with Admin(server.address) as made:
        yield made


def echo(request: PredictRequest, context: grpc.ServicerContext) -> PredictResponse:
    return PredictResponse(outputs=request.inputs)


class TestPredict:
    async def test_one_value_is_one_unnamed_input(self, server: FakeServer, asker: Asker) -> None:
        server.answer("Predict", echo)
        prediction = await asker.predict("sentiment", ["good", "bad"])
        assert server.requests == [
            PredictRequest(
                key="sentiment",
                inputs=[
                    tensor_pb2.Tensor(
                        data_type=tensor_pb2.DATA_TYPE_TEXT,
                        shape=[2],
                        text=tensor_pb2.TextElements(values=["good", "bad"]),
                    )
                ],
            )
        ]
        assert prediction.only == ["good", "bad"]

    async def test_a_mapping_is_inputs_by_name_in_its_order(
        self, server: FakeServer, asker: Asker
    ) -> None:
        server.answer("Predict", echo)
        image = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
        half = Bfloat16.from_float32(np.ones(3, dtype=np.float32))
        prediction = await asker.predict("k", {"z": image, "a": b"raw", "h": half})
        assert list(prediction) == ["z", "a", "h"]
        np.testing.assert_array_equal(np.asarray(prediction["z"]), image)
        assert prediction["a"] == [b"raw"]
        assert isinstance(prediction["h"], Bfloat16)
        with pytest.raises(ValueError, match="the model has 3 outputs: 'z', 'a', 'h'"):
            _ = prediction.only
        with pytest.raises(KeyError, match="no output 'scores'; there are: 'z', 'a', 'h'"):
            _ = prediction["scores"]

    async def test_parameters_travel(self, server: FakeServer, asker: Asker) -> None:
        server.answer("Predict", echo)
        parameters = {"n": 20, "t": 0.5, "on": True, "none": None, "l": [1, "a", {}], "d": {"x": 1}}
        await asker.predict("k", "x", parameters=parameters)
        sent = server.requests[0].parameters
        assert dict(sent) == {**parameters, "l": sent["l"], "d": sent["d"]}
        assert list(sent["l"]) == [1, "a", {}] and dict(sent["d"]) == {"x": 1}

    async def test_no_parameters_are_not_empty_parameters(
        self, server: FakeServer, asker: Asker
    ) -> None:
        server.answer("Predict", echo)
        await asker.predict("k", "x")
        await asker.predict("k", "x", parameters={})
        assert [request.HasField("parameters") for request in server.requests] == [False, True]

    async def test_served_tells_how_the_answer_came_about(
        self, server: FakeServer, asker: Asker
    ) -> None:
        served = inference_service_pb2.Served(
            model="models/m",
            device="devices/cpu",
            cold=True,
            wait_duration=Duration(seconds=1, nanos=500_000_000),
            load_duration=Duration(seconds=1),
            run_duration=Duration(nanos=2_000_000),
            route="routes/r",
            branch="a/b",
            version="v2",
            steps=[inference_service_pb2.Served(model="models/n", branch="a")],
        )
        server.answer("Predict", lambda request, context: PredictResponse(served=served))
        prediction = await asker.predict("k", "x")
        steps = prediction.served.steps
        assert [(step.model, step.branch, step.cold) for step in steps] == [
            ("models/n", "a", False)
        ]
        told = dataclasses.asdict(prediction.served)
        del told["steps"]
        assert told == {
            "model": "models/m",
            "device": "devices/cpu",
            "cold": True,
            "wait_s": 1.5,
            "load_s": 1.0,
            "run_s": 0.002,
            "route": "routes/r",
            "branch": "a/b",
            "version": "v2",
        }
        assert len(prediction) == 0
        with pytest.raises(ValueError, match="the model has 0 outputs: none"):
            _ = prediction.only

    async def test_affinity_and_version_are_sent(self, server: FakeServer, asker: Asker) -> None:
        server.answer("Predict", echo)
        await asker.predict("k", "x", affinity="user 7", version="stable")
        await asker.predict("k", "x")
        assert [(each.affinity, each.version) for each in server.requests] == [
            ("user 7", "stable"),
            ("", ""),
        ]
        for wrong in ({"affinity": 7}, {"version": b"v"}):
            with pytest.raises(TypeError, match="must be a str or None"):
                await asker.predict("k", "x", **wrong)

    async def test_a_hit_has_no_load_time(self, server: FakeServer, asker: Asker) -> None:
        served = inference_service_pb2.Served(wait_duration=Duration())
        server.answer("Predict", lambda request, context: PredictResponse(served=served))
        assert (await asker.predict("k", "x")).served.load_s is None

    async def test_the_identity_goes_with_every_call(
        self, server: FakeServer, asker: Asker
    ) -> None:
        server.answer("Predict", echo)
        await asker.ask(asker.client(identity="team a"), "k", "x")
        await asker.predict("k", "x")
        names = [metadata.get("x-modelyard-identity") for metadata in server.metadata]
        assert names == ["team a", None]

    async def test_many_calls_share_one_client(self, server: FakeServer, asker: Asker) -> None:
        server.answer("Predict", echo)
        client = asker.client()
        predictions = await asyncio.gather(
            *(asker.ask(client, "k", f"text {index}") for index in range(50))
        )
        assert [prediction.only for prediction in predictions] == [
            [f"text {index}"] for index in range(50)
        ]

    @pytest.mark.parametrize(
        "outputs",
        [
            [tensor_pb2.Tensor(name="x", data_type=tensor_pb2.DATA_TYPE_INT8, shape=[2], raw=b"1")],
            [to_tensor("a", "x"), to_tensor("b", "x")],
        ],
        ids=["contradicts itself", "same name twice"],
    )
    async def test_an_answer_that_breaks_the_contract_is_the_server_s_error(
        self, server: FakeServer, asker: Asker, outputs: Any
    ) -> None:
        server.answer("Predict", lambda request, context: PredictResponse(outputs=outputs))
        with pytest.raises(errors.ServerError, match=r"127\.0\.0\.1:\d+ cannot be read: .*'x'"):
            await asker.predict("k", "x")


class TestRefusedBeforeSending:
    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({"key": 1}, TypeError, "key must be a str, got int"),
            ({"inputs": 1.5}, TypeError, "cannot send float"),
            ({"inputs": None}, TypeError, "cannot send NoneType"),
            ({"inputs": {}}, ValueError, "needs at least one input"),
            ({"inputs": {1: "x"}}, TypeError, "name of a tensor must be a str"),
            ({"inputs": []}, TensorError, "an empty list"),
            ({"parameters": [1]}, TypeError, "parameters must be a mapping"),
            ({"parameters": {1: 1}}, TypeError, "keys of parameters must be str"),
            ({"parameters": {"a": {1: 1}}}, TypeError, r"keys of parameters\['a'\] must be str"),
            ({"parameters": {"a": [b"x"]}}, TypeError, r"parameters\['a'\]\[0\] is a bytes"),
            ({"parameters": {"a": np.int64(3)}}, TypeError, r"parameters\['a'\] is a int64"),
            ({"parameters": {"seed": 2**53 + 1}}, ValueError, "no finite double-precision number"),
            ({"parameters": {"big": 10**400}}, ValueError, "no finite double"),
            ({"parameters": {"t": float("nan")}}, ValueError, "no finite double"),
            ({"timeout_s": "1"}, TypeError, "timeout_s must be a number"),
            ({"timeout_s": True}, TypeError, "timeout_s must be a number"),
            ({"timeout_s": 0}, ValueError, "finite number of seconds above 0"),
            ({"timeout_s": float("inf")}, ValueError, "finite number of seconds"),
        ],
    )
    async def test_wrong_arguments(
        self,
        server: FakeServer,
        asker: Asker,
        arguments: Any,
        error: type[Exception],
        text: str,
    ) -> None:
        with pytest.raises(error, match=text):
            await asker.predict(**{"key": "k", "inputs": "x", **arguments})
        assert server.requests == []

    async def test_parameters_that_hold_themselves(self, asker: Asker) -> None:
        endless: dict[str, Any] = {}
        endless["again"] = endless
        with pytest.raises(ValueError, match="more than 32 levels"):
            await asker.predict("k", "x", parameters=endless)

    async def test_a_request_that_is_too_large(self, server: FakeServer, asker: Asker) -> None:
        with pytest.raises(ValueError, match=r"has 1[0-9]{3} bytes and max_message_bytes is 1000"):
            await asker.ask(asker.client(max_message_bytes=1000), "k", "x" * 1000)
        assert server.requests == []


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


MODEL = model_pb2.Model(
    name="models/m",
    keys=["a", "b"],
    source=model_pb2.ModelSource(root="main", folder="team/m"),
    runtime="transformers",
    task="text-classification",
    placement=device_pb2.ComponentDevice(
        single=device_pb2.Device(type=device_pb2.DEVICE_TYPE_GPU, index=1)
    ),
    estimated_bytes=1000,
    create_time=Timestamp(seconds=1_700_000_000),
    etag='"1"',
)


class TestAdmin:
    def test_a_model_is_registered_as_described(self, server: FakeServer, admin: Admin) -> None:
        answer = model_pb2.Model()
        answer.CopyFrom(MODEL)
        answer.options.update({"threads": 2, "deep": {"list": [1.5, None, True, "s"]}})
        server.answer(
            "CreateModel",
            lambda request, context: model_service_pb2.CreateModelResponse(model=answer),
        )
        model = admin.create_model(
            "m",
            root="main",
            folder="team/m",
            runtime="transformers",
            task="text-classification",
            keys=["a", "b"],
            options={"threads": 2},
            placement="cuda:1",
            validate_only=True,
        )

        sent = server.requests[0]
        assert sent.model_id == "m" and sent.validate_only
        assert (sent.model.source.root, sent.model.source.folder) == ("main", "team/m")
        assert list(sent.model.keys) == ["a", "b"]
        assert dict(sent.model.options) == {"threads": 2}
        assert sent.model.placement == MODEL.placement
        assert not sent.model.name

        assert (model.name, model.id, model.keys) == ("models/m", "m", ("a", "b"))
        assert (model.root, model.folder) == ("main", "team/m")
        assert model.options == {"threads": 2, "deep": {"list": [1.5, None, True, "s"]}}
        assert model.placement == ComponentDevice.from_str("cuda:1")
        assert model.created_at == datetime.fromtimestamp(1_700_000_000, UTC)
        assert (model.estimated_bytes, model.etag) == (1000, '"1"')

    def test_what_is_left_out_is_left_unset(self, server: FakeServer, admin: Admin) -> None:
        server.answer(
            "CreateModel",
            lambda request, context: model_service_pb2.CreateModelResponse(
                model=model_pb2.Model(name="models/i", runtime="identity")
            ),
        )
        model = admin.create_model("i", runtime="identity")
        sent = server.requests[0].model
        fields = [descriptor.name for descriptor, _ in sent.ListFields()]
        assert fields == ["runtime"]
        assert (model.root, model.folder, model.placement, model.created_at) == (None,) * 4
        assert model.options == {}

    @pytest.mark.parametrize(
        ("placement", "text"),
        [
            ("cpu", "cpu"),
            (Device.gpu(0), "cuda:0"),
            (ComponentDevice.from_single(Device.xpu()), "xpu"),
            (DeviceMap({"encoder": Device.gpu(1), "": Device.cpu()}), None),
            (
                ComponentDevice.from_multiple(
                    DeviceMap({"encoder": Device.gpu(1), "lm_head": Device.disk()})
                ),
                None,
            ),
        ],
    )
    def test_a_placement_comes_back_as_it_was(
        self, server: FakeServer, admin: Admin, placement: Any, text: str | None
    ) -> None:
        server.answer(
            "CreateModel",
            lambda request, context: model_service_pb2.CreateModelResponse(model=request.model),
        )
        model = admin.create_model("m", runtime="identity", placement=placement)
        if text is not None:
            assert model.placement == ComponentDevice.from_str(text)
        elif isinstance(placement, DeviceMap):
            assert model.placement == ComponentDevice.from_multiple(placement)
        else:
            assert model.placement == placement

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({"model": 1}, TypeError, "model must be a str"),
            ({"keys": "abc"}, TypeError, r"write \[key\]"),
            ({"root": "main"}, ValueError, "root and folder go together"),
            ({"folder": "m"}, ValueError, "root and folder go together"),
            ({"options": {"a": {1}}}, TypeError, r"options\['a'\] is a set"),
            ({"placement": 0}, TypeError, "placement must be text, a table, Device"),
            ({"placement": "gpu"}, ValueError, "Unknown device type"),
            ({"placement": "disk"}, ValueError, "only be used as a part of device maps"),
            ({"timeout_s": 0}, ValueError, "above 0"),
        ],
    )
    def test_wrong_models_are_refused_before_sending(
        self,
        server: FakeServer,
        admin: Admin,
        arguments: Any,
        error: type[Exception],
        text: str,
    ) -> None:
        with pytest.raises(error, match=text):
            admin.create_model(**{"model": "m", "runtime": "identity", **arguments})
        assert server.requests == []

    @pytest.mark.parametrize("model", ["m", "models/m"])
    def test_models_go_by_id_and_by_name(
        self, server: FakeServer, admin: Admin, model: str
    ) -> None:
        server.answer(
            "GetModel", lambda request, context: model_service_pb2.GetModelResponse(model=MODEL)
        )
        server.answer(
            "DeleteModel", lambda request, context: model_service_pb2.DeleteModelResponse()
        )
        assert admin.get_model(model).name == "models/m"
        admin.delete_model(model, etag='"1"')
        admin.delete_model(model)
        assert [request.name for request in server.requests] == ["models/m"] * 3
        assert [request.etag for request in server.requests[1:]] == ['"1"', ""]

    def test_lists_are_read_to_their_last_page(self, server: FakeServer, admin: Admin) -> None:
        tokens = ["", "t1", "t2"]

        def pages(response: Any, field: str, item: Any) -> Handler:
            def handler(request: Any, context: grpc.ServicerContext) -> Any:
                number = tokens.index(request.page_token)
                answer = response(next_page_token=(*tokens, "")[number + 1])
                # An empty page in the middle is no end.
                getattr(answer, field).extend(
                    [] if number == 1 else [item(name=f"{field}/{number}")]
                )
                return answer

            return handler

        server.answer(
            "ListModels", pages(model_service_pb2.ListModelsResponse, "models", model_pb2.Model)
        )
        server.answer(
            "ListDevices",
            pages(device_service_pb2.ListDevicesResponse, "devices", device_pb2.ManagedDevice),
        )
        server.answer(
            "ListResidencies",
            pages(
                residency_service_pb2.ListResidenciesResponse,
                "residencies",
                residency_pb2.Residency,
            ),
        )
        assert [model.name for model in admin.list_models()] == ["models/0", "models/2"]
        assert [device.name for device in admin.list_devices()] == ["devices/0", "devices/2"]
        names = [residency.name for residency in admin.list_residencies()]
        assert names == ["residencies/0", "residencies/2"]
        assert [request.page_token for request in server.requests] == tokens * 3

    def test_pages_without_end_are_an_error(self, server: FakeServer, admin: Admin) -> None:
        server.answer(
            "ListModels",
            lambda request, context: model_service_pb2.ListModelsResponse(next_page_token="again"),
        )
        with pytest.raises(errors.ServerError, match="page token came twice"):
            admin.list_models()

    def test_the_deadline_of_a_list_is_for_all_of_its_pages(
        self, server: FakeServer, admin: Admin
    ) -> None:
        # Pages without end, each in time: only the deadline of the whole can end this.
        server.answer(
            "ListModels",
            lambda request, context: model_service_pb2.ListModelsResponse(
                next_page_token=str(len(server.requests))
            ),
        )
        with pytest.raises(errors.DeadlineExceeded):
            admin.list_models(timeout_s=0.3)
        assert len(server.requests) > 1

    def test_a_device_is_told_whole(self, server: FakeServer, admin: Admin) -> None:
        message = device_pb2.ManagedDevice(
            name="devices/cuda-1",
            device=device_pb2.Device(type=device_pb2.DEVICE_TYPE_GPU, index=1),
            logical=True,
            budget_bytes=100,
            reserved_bytes=1,
            resident_bytes=2,
            draining_bytes=3,
            quarantined_bytes=4,
            deficit_bytes=5,
            peak_accounted_bytes=6,
            measured_bytes=7,
            peak_measured_bytes=8,
            load_count=9,
            eviction_count=10,
            etag='"e"',
            drained=True,
            total_bytes=11,
            transfer_bytes_per_second=12,
        )
        server.answer(
            "GetDevice",
            lambda request, context: device_service_pb2.GetDeviceResponse(device=message),
        )
        device = admin.get_device("cuda:1")
        assert dataclasses.asdict(device) == {
            **{
                field.name.replace("_per_second", "_per_s"): getattr(message, field.name)
                for field in message.DESCRIPTOR.fields
            },
            "device": dataclasses.asdict(Device.gpu(1)),
        }
        assert (device.id, device.accounted_bytes) == ("cuda-1", 10)

    @pytest.mark.parametrize("device", ["cuda:1", "cuda-1", "devices/cuda-1", Device.gpu(1)])
    def test_budgets_are_changed_by_any_name_of_a_device(
        self, server: FakeServer, admin: Admin, device: Any
    ) -> None:
        server.answer(
            "UpdateBudget", lambda request, context: device_service_pb2.UpdateBudgetResponse()
        )
        admin.update_budget(device, 5, etag='"1"')
        assert server.requests == [
            device_service_pb2.UpdateBudgetRequest(
                name="devices/cuda-1",
                budget_bytes=5,
                etag='"1"',
                request_id=server.requests[0].request_id,
            )
        ]

    @pytest.mark.parametrize(
        ("device", "budget", "error"),
        [
            (1, 1, TypeError),
            ("", 1, ValueError),
            ("cpu", 1.5, TypeError),
            ("cpu", True, TypeError),
            ("cpu", "1", TypeError),
            ("cpu", 2**63, ValueError),
        ],
    )
    def test_wrong_budgets_are_refused(
        self, server: FakeServer, admin: Admin, device: Any, budget: Any, error: type[Exception]
    ) -> None:
        with pytest.raises(error):
            admin.update_budget(device, budget)
        assert server.requests == []

    @pytest.mark.parametrize(
        ("rpc", "method"),
        [
            ("LoadModel", "load"),
            ("UnloadModel", "unload"),
            ("PinModel", "pin"),
            ("UnpinModel", "unpin"),
        ],
    )
    def test_a_residency_is_told_whole(
        self, server: FakeServer, admin: Admin, rpc: str, method: str
    ) -> None:
        message = residency_pb2.Residency(
            name="residencies/m",
            model="models/m",
            state=residency_pb2.RESIDENCY_STATE_FAILED,
            charges=[
                residency_pb2.DeviceCharge(device="devices/cpu", size_bytes=7, shared_bytes=3)
            ],
            pinned=True,
            lease_count=1,
            waiting_request_count=2,
            load_count=3,
            load_duration=Duration(nanos=500_000_000),
            failure=residency_pb2.LoadFailure(
                message="truncated",
                transient=True,
                attempt_count=4,
                retry_time=Timestamp(seconds=1_700_000_000),
            ),
            quarantined=[residency_pb2.DeviceCharge(device="devices/cpu", size_bytes=1)],
            copy_state=residency_pb2.COPY_STATE_KEPT,
            copy_bytes=5,
            copy_load_duration=Duration(nanos=12_000_000),
        )
        response = getattr(residency_service_pb2, f"{rpc}Response")
        server.answer(rpc, lambda request, context: response(residency=message))
        residency = getattr(admin, method)("m")
        assert server.requests[0].model == "models/m"
        assert dataclasses.asdict(residency) == {
            "name": "residencies/m",
            "model": "models/m",
            "state": ResidencyState.FAILED,
            "charges": ({"device": "devices/cpu", "size_bytes": 7, "shared_bytes": 3},),
            "pinned": True,
            "lease_count": 1,
            "waiting_request_count": 2,
            "load_count": 3,
            "load_s": 0.5,
            "failure": dataclasses.asdict(
                LoadFailure(
                    message="truncated",
                    transient=True,
                    attempt_count=4,
                    retry_at=datetime.fromtimestamp(1_700_000_000, UTC),
                )
            ),
            "quarantined": (dataclasses.asdict(DeviceCharge(device="devices/cpu", size_bytes=1)),),
            "copy_state": CopyState.KEPT,
            "copy_bytes": 5,
            "copy_load_s": 0.012,
        }

    @pytest.mark.parametrize("state", residency_pb2.ResidencyState.values())
    def test_every_state_has_a_value(self, server: FakeServer, admin: Admin, state: Any) -> None:
        server.answer(
            "LoadModel",
            lambda request, context: residency_service_pb2.LoadModelResponse(
                residency=residency_pb2.Residency(state=state)
            ),
        )
        name = residency_pb2.ResidencyState.Name(state).removeprefix("RESIDENCY_STATE_")
        expected = "UNKNOWN" if name == "UNSPECIFIED" else name
        assert admin.load("m").state is ResidencyState[expected]

    def test_what_a_newer_server_says_is_tolerated(self, server: FakeServer, admin: Admin) -> None:
        newer: Any = 99
        strange = device_pb2.Device(type=newer)
        known = device_pb2.Device(type=device_pb2.DEVICE_TYPE_CPU)
        server.answer(
            "LoadModel",
            lambda request, context: residency_service_pb2.LoadModelResponse(
                residency=residency_pb2.Residency(state=newer, copy_state=newer)
            ),
        )
        assert admin.load("m").copy_state is CopyState.UNKNOWN
        server.answer(
            "GetDevice",
            lambda request, context: device_service_pb2.GetDeviceResponse(
                device=device_pb2.ManagedDevice(device=strange)
            ),
        )
        server.answer(
            "ListModels",
            lambda request, context: model_service_pb2.ListModelsResponse(
                models=[
                    model_pb2.Model(placement=device_pb2.ComponentDevice(single=strange)),
                    model_pb2.Model(
                        placement=device_pb2.ComponentDevice(
                            multiple=device_pb2.DeviceMap(devices={"a": known, "b": strange})
                        )
                    ),
                ]
            ),
        )
        assert admin.load("m").state is ResidencyState.UNKNOWN
        assert admin.get_device("npu").device is None
        assert [model.placement for model in admin.list_models()] == [None, None]

    def test_an_answer_out_of_range_is_the_server_s_error(
        self, server: FakeServer, admin: Admin
    ) -> None:
        server.answer(
            "GetDevice",
            lambda request, context: device_service_pb2.GetDeviceResponse(
                device=device_pb2.ManagedDevice(
                    device=device_pb2.Device(type=device_pb2.DEVICE_TYPE_GPU, index=500)
                )
            ),
        )
        with pytest.raises(errors.ServerError, match="cannot be read: Device id must be <= 127"):
            admin.get_device("cuda:500")

    def test_the_server_tells_what_it_is(self, server: FakeServer, admin: Admin) -> None:
        server.answer(
            "GetServerInfo",
            lambda request, context: admin_service_pb2.GetServerInfoResponse(
                version="0.1.0",
                library_versions={"torch": "2.13.0"},
                start_time=Timestamp(seconds=1_700_000_000),
                eviction_policy="cost",
                runtimes=["identity", "torch"],
                process_id=12,
            ),
        )
        info = admin.info()
        assert (info.version, info.library_versions) == ("0.1.0", {"torch": "2.13.0"})
        assert info.started_at == datetime.fromtimestamp(1_700_000_000, UTC)
        assert (info.eviction_policy, info.runtimes) == ("cost", ("identity", "torch"))
        assert info.process_id == 12

    def test_the_server_tells_what_it_has_done(self, server: FakeServer, admin: Admin) -> None:
        message = admin_service_pb2.GetStatsResponse(
            answered_count=1,
            error_counts={"QUEUE_FULL": 2},
            hit_count=3,
            cold_count=4,
            load_count=5,
            load_failure_count=6,
            eviction_count=7,
            load_duration=Duration(seconds=8),
            active_request_count=9,
            waiting_request_count=10,
            process_resident_bytes=11,
            peak_process_resident_bytes=12,
        )
        server.answer("GetStats", lambda request, context: message)
        stats = dataclasses.asdict(admin.stats())
        assert stats == {
            **{
                field.name: getattr(message, field.name)
                for field in message.DESCRIPTOR.fields
                if field.name not in ("error_counts", "load_duration", "host_tier", *LIVE)
            },
            "error_counts": {"QUEUE_FULL": 2},
            "load_s": 8.0,
            "host_tier": None,
            # A server that is older than these says nothing of them.
            "recent_load_s": 0.0,
            "regret": None,
            "departures": None,
            "batches": None,
            "shadows": None,
        }

    def test_the_server_tells_how_it_does(self, server: FakeServer, admin: Admin) -> None:
        batches = {
            field.name: number
            for number, field in enumerate(dataclasses.fields(BatchFigures), 1)
            if field.name != "padding_ratio"
        }
        message = admin_service_pb2.GetStatsResponse(
            recent_load_duration=Duration(seconds=1),
            regret=admin_service_pb2.Regret(
                lru_load_duration=Duration(seconds=5),
                regret_duration=Duration(seconds=-2, nanos=-500_000_000),
            ),
            departures=admin_service_pb2.Departures(
                counts={"MODEL": 3, "LOST": 1},
                age_count=3,
                median_idle_duration=Duration(seconds=1),
                p90_idle_duration=Duration(seconds=2),
                median_resident_duration=Duration(seconds=3),
                p90_resident_duration=Duration(seconds=4),
            ),
            batches=admin_service_pb2.BatchFigures(padding_ratio=0.25, **batches),
        )
        server.answer("GetStats", lambda request, context: message)
        stats = admin.stats()
        assert stats.recent_load_s == 1.0
        assert stats.regret == Regret(lru_load_s=5.0, regret_s=-2.5)
        assert stats.departures == Departures(
            counts={"LOST": 1, "MODEL": 3},
            age_count=3,
            median_idle_s=1.0,
            p90_idle_s=2.0,
            median_resident_s=3.0,
            p90_resident_s=4.0,
        )
        assert stats.batches == BatchFigures(padding_ratio=0.25, **batches)
        assert [field.name for field in dataclasses.fields(BatchFigures)] == [
            field.name for field in admin_service_pb2.BatchFigures.DESCRIPTOR.fields
        ]

    def test_what_has_not_been_yet_has_no_figure(self, server: FakeServer, admin: Admin) -> None:
        message = admin_service_pb2.GetStatsResponse(
            departures=admin_service_pb2.Departures(), batches=admin_service_pb2.BatchFigures()
        )
        server.answer("GetStats", lambda request, context: message)
        stats = admin.stats()
        assert stats.departures is not None and stats.departures.median_idle_s is None
        assert stats.batches is not None and stats.batches.padding_ratio is None

    def test_the_server_tells_of_its_host_tier(self, server: FakeServer, admin: Admin) -> None:
        names = [field.name for field in dataclasses.fields(HostTier)]
        told = {name: number for number, name in enumerate(names, 1)}
        message = admin_service_pb2.GetStatsResponse(host_tier=admin_service_pb2.HostTier(**told))
        server.answer("GetStats", lambda request, context: message)
        tier = admin.stats().host_tier
        assert tier == HostTier(**told)
        assert tier.accounted_bytes == 2 + 3 + 4 + 5
        assert names == [field.name for field in admin_service_pb2.HostTier.DESCRIPTOR.fields]

    @pytest.mark.parametrize("state", residency_pb2.CopyState.values())
    def test_every_state_of_a_copy_has_a_value(
        self, server: FakeServer, admin: Admin, state: Any
    ) -> None:
        server.answer(
            "LoadModel",
            lambda request, context: residency_service_pb2.LoadModelResponse(
                residency=residency_pb2.Residency(copy_state=state)
            ),
        )
        name = residency_pb2.CopyState.Name(state).removeprefix("COPY_STATE_")
        # A server that is older than the host tier says nothing of copies.
        expected = "NONE" if name == "UNSPECIFIED" else name
        assert admin.load("m").copy_state is CopyState[expected]

    def test_unload_waits_as_long_as_it_is_told(self, server: FakeServer, admin: Admin) -> None:
        left: list[float] = []

        def handler(request: Any, context: grpc.ServicerContext) -> Any:
            left.append(context.time_remaining())
            return residency_service_pb2.UnloadModelResponse()

        server.answer("UnloadModel", handler)
        admin.unload("m", timeout_s=120)
        assert 100 < left[0] < 130
