"""ModelStreamInfer: stock clients' streams, and what becomes of them when something goes wrong."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tests.support import faulty_models
from tests.support.config_text import ALLOWED, CPU, ROOTS, model_table
from tests.support.faulty_models import closed_gate
from tests.support.oip import ServedApp, served_app
from tests.support.server import eventually, running_app
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

from modelyard_server.services.oip.infer import MOST_IN_FLIGHT


def small_zoo(base: Path) -> str:
    for name in ("sums", "stuck", "late"):
        faulty_models.make_weights(base / "store" / name)
    return "".join(
        [
            CPU,
            ROOTS,
            ALLOWED,
            model_table("echo", "identity"),
            model_table("sums", "torch", options={"factory": faulty_models.factory("Adding")}),
            model_table(
                "stuck",
                "torch",
                options={
                    "factory": faulty_models.factory("StuckInRun"),
                    "factory_options": {"gate": base / "gate"},
                },
            ),
            model_table(
                "late",
                "torch",
                options={
                    "factory": faulty_models.factory("StuckInLoad"),
                    "factory_options": {"gate": base / "load-gate"},
                },
            ),
        ]
    )


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApp]:
    base = tmp_path_factory.mktemp("oip-streams")
    with served_app(small_zoo(base), base) as served:
        yield served


def numbers(values: np.ndarray[Any, Any], name: str = "x") -> Any:
    made = triton.InferInput(name, list(values.shape), "FP32")
    made.set_data_from_numpy(values.astype(np.float32))
    return made


def message(value: float, *, id: str = "", name: str = "sums") -> Any:
    request = pb.ModelInferRequest(model_name=name, id=id)
    request.inputs.add(name="x", datatype="FP32", shape=[1])
    request.raw_input_contents.append(np.float32(value).tobytes())
    return request


def collected(app: ServedApp, requests: list[dict[str, Any]], **settings: Any) -> list[Any]:
    """Sends requests by the blocking client's stream; every answer or error, as they came."""
    got: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(app.target) as client:
        client.start_stream(lambda result, error: got.put(error or result), **settings)
        for request in requests:
            client.async_stream_infer(**request)
        answers = [got.get(timeout=30) for _ in requests]
        client.stop_stream()
    assert got.empty()
    return answers


# --- Stock clients --------------------------------------------------------------------------------


def test_every_request_of_a_stream_is_answered_by_its_id(app: ServedApp) -> None:
    requests = [
        {"model_name": "sums", "inputs": [numbers(np.full(2, i))], "request_id": str(i)}
        for i in range(200)
    ]
    answers = collected(app, requests)
    by_id = {each.get_response().id: each.as_numpy("output_0") for each in answers}
    assert len(by_id) == 200
    for i in range(200):
        np.testing.assert_array_equal(by_id[str(i)], np.full(2, i + 1))


def test_every_answer_of_a_stream_is_its_last(app: ServedApp) -> None:
    request = {"model_name": "echo", "inputs": [numbers(np.ones(1))]}
    asked = {**request, "enable_empty_final_response": True}
    for answer in collected(app, [request, asked]):
        parameters = answer.get_response().parameters
        assert parameters["triton_final_response"].bool_param is True
        assert answer.get_response().outputs


def test_a_refused_request_leaves_the_stream_open(app: ServedApp) -> None:
    good = {"model_name": "echo", "inputs": [numbers(np.ones(1))]}
    bad = {"model_name": "nobody", "inputs": [numbers(np.ones(1))], "request_id": "bad"}
    odd = {**good, "sequence_id": 7, "sequence_start": True}
    answers = collected(app, [good, bad, odd, good])
    errors = [each for each in answers if isinstance(each, InferenceServerException)]
    assert len(answers) - len(errors) == 2
    texts = sorted(error.message() for error in errors)
    assert "no model goes by the key 'nobody'" in texts[0]
    assert "sequences of requests are not served" in texts[1]


def test_a_large_tensor_goes_through_a_stream(app: ServedApp) -> None:
    values = np.random.default_rng(3).random(1 << 21).astype(np.float32)
    (answer,) = collected(app, [{"model_name": "echo", "inputs": [numbers(values)]}])
    np.testing.assert_array_equal(answer.as_numpy("x"), values)


async def test_the_asynchronous_client_streams_from_the_servers_own_loop(tmp_path: Path) -> None:
    async with (
        running_app(small_zoo(tmp_path), tmp_path) as yard,
        triton_aio.InferenceServerClient(yard.target) as client,
    ):

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for i in range(50):
                yield {
                    "model_name": "sums" if i % 10 else "nobody",
                    "inputs": [numbers(np.full(2, i))],
                    "request_id": str(i),
                }

        answered, refused = {}, 0
        async for result, error in client.stream_infer(requests()):
            if error is not None:
                refused += 1
            else:
                answered[result.get_response().id] = result.as_numpy("output_0")
        assert refused == 5
        assert len(answered) == 45
        np.testing.assert_array_equal(answered["11"], [12, 12])


async def test_what_can_be_asked_again_says_when_in_its_text(tmp_path: Path) -> None:
    # Stock clients show no details of a status, and a stream's errors have none.
    gate = tmp_path / "gate"
    faulty_models.make_weights(tmp_path / "store" / "slow")
    options = {
        "factory": faulty_models.factory("StuckInLoad"),
        "factory_options": {"gate": gate},
    }
    config = "[yard]\nmax_waiting = 1\n" + CPU + ROOTS + ALLOWED
    config += model_table("slow", "torch", options=options)
    async with running_app(config, tmp_path) as yard:
        with closed_gate(gate) as closed:
            async with triton_aio.InferenceServerClient(yard.target) as client:
                inputs = [numbers(np.ones(1))]
                first = asyncio.create_task(client.infer("slow", inputs))
                await eventually("the load waits", closed.is_waited_at)
                with pytest.raises(InferenceServerException, match="retry_after_ms=") as caught:
                    await client.infer("slow", inputs)
                assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"

                async def one() -> AsyncIterator[dict[str, Any]]:
                    yield {"model_name": "slow", "inputs": inputs}

                async for result, error in client.stream_infer(one()):
                    assert result is None
                    assert "retry_after_ms=" in error.message()
                closed.open()
                await first


# --- Errors ---------------------------------------------------------------------------------------


@pytest.fixture
async def channel(app: ServedApp) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(app.target) as made:
        yield made


def stream_of(channel: grpc.aio.Channel, **settings: Any) -> Any:
    return service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(**settings)


async def test_an_error_says_which_request_it_is_of(channel: grpc.aio.Channel) -> None:
    call = stream_of(channel)
    await call.write(message(1, id="first", name="nobody"))
    answer = await call.read()
    assert "nobody" in answer.error_message
    assert answer.infer_response.id == "first"
    assert not answer.infer_response.outputs
    await call.write(message(1, id="second"))
    assert (await call.read()).infer_response.id == "second"
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_who_wants_statuses_gets_one_and_what_was_answered_before(
    channel: grpc.aio.Channel,
) -> None:
    call = stream_of(channel, metadata=(("triton_grpc_error", "true"),))
    await call.write(message(1, id="good"))
    assert (await call.read()).infer_response.id == "good"
    await call.write(message(1, name="nobody"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await call.read() is not grpc.aio.EOF:
            pass
        raise AssertionError("the stream ended well")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    trailers = dict(caught.value.trailing_metadata())
    assert b"KEY_NOT_FOUND" in trailers["grpc-status-details-bin"]


async def test_a_message_that_is_none_is_that_requests_error(app: ServedApp) -> None:
    async with grpc.aio.insecure_channel(app.target) as channel:
        method: Any = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        call = method()
        await call.write(b"\x0a\xff")
        answer = pb.ModelStreamInferResponse.FromString(await call.read())
        assert "no ModelInferRequest" in answer.error_message
        await call.write(message(1, id="good").SerializeToString())
        answer = pb.ModelStreamInferResponse.FromString(await call.read())
        assert answer.infer_response.id == "good"
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.OK


# --- Order, bounds, ends --------------------------------------------------------------------------


async def test_a_quick_request_overtakes_a_slow_one(
    app: ServedApp, channel: grpc.aio.Channel
) -> None:
    # Not by one that runs: both would be for the same lane.
    call = stream_of(channel)
    with closed_gate(app.base / "load-gate"):
        await call.write(message(1, id="slow", name="late"))
        await call.write(message(1, id="quick", name="echo"))
        assert (await call.read()).infer_response.id == "quick"
    assert (await call.read()).infer_response.id == "slow"
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK


async def test_more_requests_than_may_be_in_flight_are_all_answered(
    app: ServedApp, channel: grpc.aio.Channel
) -> None:
    count = 2 * MOST_IN_FLIGHT + 10
    call = stream_of(channel)
    with closed_gate(app.base / "gate"):
        for i in range(count):
            await call.write(message(i, id=str(i), name="stuck"))
        await call.done_writing()
    ids = {(await call.read()).infer_response.id for _ in range(count)}
    assert ids == {str(i) for i in range(count)}
    assert await call.code() is grpc.StatusCode.OK


async def test_a_client_that_leaves_leaves_nothing_behind(
    app: ServedApp, channel: grpc.aio.Channel
) -> None:
    with closed_gate(app.base / "gate") as gate:
        call = stream_of(channel)
        for _ in range(5):
            await call.write(message(1, name="stuck"))
        await asyncio.to_thread(gate.wait_for_one)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.read()

    # What running_app checks at the end, it could not tell from what other tests left.
    async def at_rest(yard: Any) -> int:
        await yard.at_rest()
        return int(yard.app.residency.lease_count)

    assert await asyncio.to_thread(app.on_loop, at_rest) == 0


async def test_a_streams_deadline_bounds_its_requests(
    app: ServedApp, channel: grpc.aio.Channel
) -> None:
    with closed_gate(app.base / "gate"):
        for _ in range(10):
            call = stream_of(channel, timeout=1.0)
            await call.write(message(1, id="late", name="stuck"))
            try:
                answer = await call.read()
            except grpc.aio.AioRpcError as error:
                # On a busy machine the client's own clock may be first: once more.
                assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            else:
                break
        else:
            raise AssertionError("the client's own clock was always first")
        assert "deadline" in answer.error_message
        assert answer.infer_response.id == "late"
    await call.done_writing()


async def test_a_server_that_stops_answers_what_it_has_and_says_why_it_ends(
    tmp_path: Path,
) -> None:
    async with (
        running_app(small_zoo(tmp_path), tmp_path) as yard,
        grpc.aio.insecure_channel(yard.target) as channel,
    ):
        call = stream_of(channel)
        await call.write(message(1, id="a"))
        assert (await call.read()).infer_response.id == "a"
        await yard.app.transport.stop_being_healthy()
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert (await stub.ServerReady(pb.ServerReadyRequest())).ready is False
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live is True
        stopping = asyncio.create_task(yard.app.transport.stop(5))
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await stopping
