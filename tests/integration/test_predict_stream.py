"""PredictStream over a real channel: answers by id, bounds, deadlines, leaving, draining."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from tests.support import faulty_models
from tests.support.admin_calls import reason_of
from tests.support.config_text import ALLOWED, CPU, ROOTS, device_table, model_table
from tests.support.server import RunningApp, eventually, refusal_of, running_app

from modelyard import (
    Admin,
    AnswerTooLarge,
    AsyncClient,
    BatchItem,
    Client,
    ModelyardError,
    Prediction,
    ResidencyState,
    ServerDraining,
)
from modelyard._predict_messages import predict_request
from modelyard.v1 import error_reason_pb2
from modelyard.v1 import inference_service_pb2 as pb
from modelyard.v1.inference_service_pb2_grpc import InferenceServiceStub

X = np.ones(3, np.float32)
MIB = 1 << 20
PLACED = '[models.stuck]\ndevice = "cpu"'
ECHO = CPU + model_table("echo", "identity")

ENGINES = pytest.mark.parametrize("engine", ["thread", "process"])


def torch_model(name: str, factory: str = "Adding", **factory_options: object) -> str:
    options: dict[str, object] = {"factory": faulty_models.factory(factory)}
    if factory_options:
        options["factory_options"] = factory_options
    return model_table(name, "torch", options=options)


def adders(base: Path, *names: str) -> str:
    """Models that add 1, 2, ..."""
    config = ""
    for value, name in enumerate(names, start=1):
        faulty_models.make_weights(base / "store" / name, value=float(value))
        config += torch_model(name)
    return config


def stuck(base: Path, factory: str = "StuckInRun") -> str:
    faulty_models.make_weights(base / "store" / "stuck", value=9.0)
    return torch_model("stuck", factory, gate=base / "gate")


class Raw:
    """A stream as messages, as no client of ours would send them."""

    def __init__(self, yard: RunningApp) -> None:
        stub: Any = InferenceServiceStub(yard.channel)
        self.call = stub.PredictStream(timeout=60)

    async def send(self, *items: pb.PredictStreamItem) -> None:
        await self.call.write(pb.PredictStreamRequest(items=items))

    async def results(self, count: int) -> dict[int, str]:
        """So many results by id: the model that answered, or the reason."""
        found: dict[int, str] = {}
        while len(found) < count:
            message = await self.call.read()
            assert message is not grpc.aio.EOF, f"{len(found)} of {count} results"
            assert message.results
            for result in message.results:
                assert result.id not in found
                found[result.id] = told_of(result)
        return found

    async def end(self) -> grpc.StatusCode:
        """Waits for the end, before which nothing more comes."""
        assert await self.call.read() is grpc.aio.EOF
        code: grpc.StatusCode = await self.call.code()
        return code


def item(item_id: int, key: str = "echo", value: Any = "x", **more: Any) -> pb.PredictStreamItem:
    return pb.PredictStreamItem(id=item_id, request=predict_request(key, value, None), **more)


def told_of(result: pb.PredictStreamResult) -> str:
    if result.WhichOneof("result") == "response":
        return result.response.served.model
    name: str = error_reason_pb2.ErrorReason.Name(result.error.reason)
    return name.removeprefix("ERROR_REASON_")


async def stats_of(yard: RunningApp) -> Any:
    return await yard.admin(Admin.stats)


async def leaves_nothing(yard: RunningApp) -> None:
    """Waits until no request, lease or ticket is out."""

    async def is_over() -> bool:
        stats = await stats_of(yard)
        return bool(stats.active_request_count == stats.waiting_request_count == 0)

    await eventually("no request is left", is_over)
    await yard.at_rest()


async def collected(
    found: AsyncIterator[Prediction | ModelyardError],
) -> list[Prediction | ModelyardError]:
    return [each async for each in found]


def reasons(results: Iterable[Prediction | ModelyardError]) -> list[str | None]:
    return [each.reason if isinstance(each, ModelyardError) else None for each in results]


# Answers


@ENGINES
async def test_a_thousand_items_of_many_keys_find_their_answers(
    tmp_path: Path, engine: str
) -> None:
    names = ("one", "two", "three")
    config = f'[engine]\nkind = "{engine}"\n' + CPU + ROOTS + ALLOWED + adders(tmp_path, *names)
    chance = random.Random(5)
    asked = [(chance.randrange(3), float(chance.randrange(100))) for _ in range(1000)]
    async with running_app(config + model_table("echo", "identity"), tmp_path) as yard:
        async with yard.client.stream() as stream:
            items: list[tuple[str, Any]] = []
            for which, value in asked:
                items += [(names[which], X * value), ("echo", f"{value}")]
            results = await collected(stream.map(items))
        for (which, value), added, echoed in zip(asked, results[::2], results[1::2], strict=True):
            assert isinstance(added, Prediction) and isinstance(echoed, Prediction)
            np.testing.assert_array_equal(added.only, X * value + which + 1)
            assert added.served.model == f"models/{names[which]}"
            assert added.served.device == "devices/cpu" and added.served.run_s > 0
            assert echoed.only == [f"{value}"]
        stats = await stats_of(yard)
        assert (stats.answered_count, stats.active_request_count) == (2000, 0)
        assert stats.hit_count + stats.cold_count == 2000
        assert stats.load_count == 4
        if engine == "thread":

            def ask_blocking() -> list[Any]:
                with Client(yard.target) as client, client.stream() as stream:
                    return list(stream.map([("echo", f"{i}") for i in range(600)]))

            again = await asyncio.to_thread(ask_blocking)
            assert [each.only for each in again] == [[f"{i}"] for i in range(600)]


async def test_an_item_ends_as_a_predict_call_does(tmp_path: Path) -> None:
    config = CPU + ROOTS + ALLOWED + adders(tmp_path, "good")
    for name in ("raising", "broken"):
        faulty_models.make_weights(tmp_path / "store" / name)
    config += torch_model("raising", "Raising", kind="ValueError")
    config += torch_model("broken", "Exiting", flag=tmp_path / "flag")
    (tmp_path / "flag").touch()
    async with running_app(config, tmp_path) as yard:
        items = [
            BatchItem(key="good", inputs=X),
            BatchItem(key="nobody", inputs=X),
            BatchItem(key="good", inputs={"y": X}),
            BatchItem(key="..", inputs=X),
            BatchItem(key="raising", inputs=X),
            BatchItem(key="good", inputs=X, parameters={"odd": 1}),
            BatchItem(key="broken", inputs=X),
            BatchItem(key="good", inputs=X * 2),
        ]
        async with yard.client.stream() as stream:
            results = await collected(stream.map(items))
        assert reasons(results) == [
            None,
            "KEY_NOT_FOUND",
            "INVALID_TENSOR",
            "INVALID_FIELD",
            "MODEL_FAILED",
            "INVALID_FIELD",
            "LOAD_FAILED",
            None,
        ]
        for each, result in zip(items, results, strict=True):
            if isinstance(result, ModelyardError):
                alone = await refusal_of(
                    yard.client.predict(each.key, each.inputs, parameters=each.parameters)
                )
                assert type(result) is type(alone)
                assert (result.code, result.reason) == (alone.code, alone.reason)
                assert result.violations == alone.violations
                assert result.metadata.keys() == alone.metadata.keys()
                if result.reason not in ("MODEL_FAILED", "LOAD_FAILED"):  # Ids and times differ.
                    assert (str(result), result.metadata) == (str(alone), alone.metadata)
        stats = await stats_of(yard)
        assert (stats.answered_count, stats.error_counts["MODEL_FAILED"]) == (2, 2)


async def test_tensors_that_are_wrong_or_large_are_one_items(tmp_path: Path) -> None:
    async with running_app(ECHO, tmp_path) as yard:
        raw = Raw(yard)
        odd = item(2)
        odd.request.inputs[0].shape[0] = 2
        large = np.arange(MIB // 2, dtype=np.float32)
        await raw.send(item(1), odd, item(3, value=large), item(3, value=large))
        message = await raw.call.read()
        found = {(result.id, told_of(result)): result for result in message.results}
        while len(found) < 4:
            message = await raw.call.read()
            found |= {(result.id, told_of(result)): result for result in message.results}
        assert set(found) == {
            (1, "models/echo"),
            (2, "INVALID_TENSOR"),
            (3, "INVALID_FIELD"),
            (3, "models/echo"),
        }
        assert found[2, "INVALID_TENSOR"].error.violations[0].subject == "inputs[0]"
        assert found[3, "INVALID_FIELD"].error.violations[0].subject == "id"
        (output,) = found[3, "models/echo"].response.outputs
        assert output.raw == large.tobytes()
        await raw.call.done_writing()
        assert await raw.end() is grpc.StatusCode.OK


async def test_a_model_that_waits_for_its_memory_holds_up_no_other(tmp_path: Path) -> None:
    config = CPU + ROOTS + ALLOWED + stuck(tmp_path, "StuckInLoad")
    async with running_app(config + model_table("echo", "identity"), tmp_path) as yard:
        await yard.client.predict("echo", "here")
        raw = Raw(yard)
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            await raw.send(item(1, "stuck", X), item(2), item(3, "stuck", X))
            await eventually("the load is stuck", gate.is_waited_at)
            assert await raw.results(1) == {2: "models/echo"}
            await raw.send(item(2))
            assert await raw.results(1) == {2: "models/echo"}
        assert await raw.results(2) == {1: "models/stuck", 3: "models/stuck"}
        await raw.call.done_writing()
        assert await raw.end() is grpc.StatusCode.OK


async def test_an_answer_that_fits_into_no_message_is_refused_alone(tmp_path: Path) -> None:
    config = '[server]\nmax_message_bytes = "68MB"\n' + ECHO
    async with running_app(config, tmp_path) as yard:
        # The request just fits; the answer says who has served it as well.
        size = 68_000_000 - 60
        chunk = np.zeros(size, np.uint8)
        async with (
            AsyncClient(yard.target, max_message_bytes=100_000_000) as client,
            client.stream() as stream,
        ):
            error = await refusal_of(stream.predict("echo", chunk))
            assert isinstance(error, AnswerTooLarge)
            assert int(error.metadata["size_bytes"]) > size
            assert (await stream.predict("echo", "small")).only == ["small"]
            assert (
                len(np.asarray((await stream.predict("echo", chunk[:-1000])).only)) == size - 1000
            )


# Bounds


async def test_a_client_that_does_not_read_is_read_no_further(tmp_path: Path) -> None:
    async with running_app(ECHO, tmp_path) as yard:
        await yard.client.predict("echo", "here")
        raw = Raw(yard)
        # Answers of 64 KiB each: what buffers of the connection hold is few of them.
        value = np.zeros(16 * 1024, np.float32)
        sent = 0

        async def send() -> None:
            nonlocal sent
            while sent < 8000:
                await raw.send(item(sent, value=value))
                sent += 1

        sending = asyncio.create_task(send())
        before = (await stats_of(yard)).answered_count
        seen = -1

        async def has_stopped() -> bool:
            nonlocal seen
            last, seen = seen, (await stats_of(yard)).answered_count - before
            await asyncio.sleep(0.3)
            return bool(0 < seen == last)

        await eventually("it answers no more", has_stopped)
        assert seen <= 1024 + 512
        assert not sending.done()
        # The negative control: who reads is read on.
        found = await raw.results(seen + 500)
        assert set(found.values()) == {"models/echo"}
        sending.cancel()
        await asyncio.wait({sending})
        raw.call.cancel()
        await leaves_nothing(yard)


async def test_others_are_served_beside_a_stream_that_is_full(tmp_path: Path) -> None:
    config = CPU + device_table("cuda:0", "1MB", logical=True)
    config += ROOTS + ALLOWED + stuck(tmp_path).replace("[models.stuck]", PLACED)
    config += model_table("echo", "identity", device="cuda:0")
    async with running_app(config, tmp_path) as yard:
        raw = Raw(yard)
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            for first in range(0, 1400, 700):
                await raw.send(*(item(i, "stuck", X) for i in range(first, first + 700)))
            await eventually("the model runs", gate.is_waited_at)

            async def is_full() -> bool:
                return bool((await stats_of(yard)).active_request_count == 1024)

            await eventually("it is full", is_full)
            # By another stream, and by a call; this one is not read before something is answered.
            async with yard.client.stream() as stream:
                assert (await stream.predict("echo", "a")).only == ["a"]
            assert (await yard.client.predict("echo", "b")).only == ["b"]
            assert await is_full()
        found = await raw.results(1400)
        assert found.keys() == set(range(1400))
        assert {found[i] for i in range(1024)} == {"models/stuck"}
        # After such a run others may be told that the line is too long for them.
        assert set(found.values()) <= {"models/stuck", "DEADLINE_UNREACHABLE"}
        await raw.call.done_writing()
        assert await raw.end() is grpc.StatusCode.OK


# Deadlines


async def test_every_item_has_its_own_deadline(tmp_path: Path) -> None:
    config = CPU + ROOTS + ALLOWED + stuck(tmp_path)
    async with running_app(config, tmp_path) as yard:
        await yard.admin(Admin.load, "stuck")
        await yard.becomes("stuck", ResidencyState.RESIDENT, 30)
        raw = Raw(yard)
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            first = item(1, "stuck", X)
            await raw.send(first)
            await eventually("the model runs", gate.is_waited_at)
            hasty = item(2, "stuck", X)
            hasty.timeout.nanos = 50_000_000
            patient = item(3, "stuck", X)
            patient.timeout.seconds = 60
            never = item(4, "stuck", X)
            never.timeout.seconds = -1
            await raw.send(hasty, patient, never)
            assert await raw.results(2) == {2: "DEADLINE_IN_RUN", 4: "INVALID_FIELD"}
        assert await raw.results(2) == {1: "models/stuck", 3: "models/stuck"}
        await raw.call.done_writing()
        assert await raw.end() is grpc.StatusCode.OK


async def test_the_streams_deadline_ends_it(tmp_path: Path) -> None:
    config = CPU + ROOTS + ALLOWED + stuck(tmp_path)
    async with running_app(config, tmp_path) as yard:
        stub: Any = InferenceServiceStub(yard.channel)
        with faulty_models.closed_gate(tmp_path / "gate"):
            call = stub.PredictStream(timeout=0.5)
            await call.write(pb.PredictStreamRequest(items=[item(1, "stuck", X)]))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await leaves_nothing(yard)


# The end


@asynccontextmanager
async def busy_stream(base: Path) -> AsyncIterator[tuple[RunningApp, Raw, Callable[[], None]]]:
    """A stream with items that run, that wait for their turn, and that wait for a load."""
    faulty_models.make_weights(base / "store" / "late")
    config = (
        CPU + ROOTS + ALLOWED + stuck(base) + torch_model("late", "StuckInLoad", gate=base / "g")
    )
    async with running_app(config, base) as yard:
        raw = Raw(yard)
        with (
            faulty_models.closed_gate(base / "gate") as gate,
            faulty_models.closed_gate(base / "g") as load_gate,
        ):
            await raw.send(*(item(i, "stuck", X) for i in range(300)))
            await eventually("the model runs", gate.is_waited_at)
            await raw.send(*(item(i, "late", X) for i in range(300, 310)))
            await eventually("the load is stuck", load_gate.is_waited_at)

            def let_go() -> None:
                gate.open()
                load_gate.open()

            yield yard, raw, let_go


async def test_a_client_that_leaves_leaves_nothing_behind(tmp_path: Path) -> None:
    async with busy_stream(tmp_path) as (yard, raw, _):
        raw.call.cancel()

        async def is_known() -> bool:
            stats = await stats_of(yard)
            return bool(stats.active_request_count == stats.waiting_request_count == 0)

        # While the model still runs: what has begun is all that is left of it.
        await eventually("the server knows", is_known)
        assert (await yard.residency("stuck")).lease_count >= 1
    # running_app looks for leases and tickets at its end.


async def test_who_ends_its_side_is_answered_the_rest(tmp_path: Path) -> None:
    async with busy_stream(tmp_path) as (_, raw, let_go):
        await raw.call.done_writing()
        reading = asyncio.create_task(raw.results(310))
        await asyncio.sleep(0)
        assert not reading.done()
        let_go()
        found = await reading
        assert found == {i: "models/stuck" if i < 300 else "models/late" for i in range(310)}
        assert await raw.end() is grpc.StatusCode.OK


async def test_a_server_that_stops_answers_what_is_in_flight(tmp_path: Path) -> None:
    async with busy_stream(tmp_path) as (yard, raw, let_go):
        ours = yard.client.stream()
        asked = [await ours.submit("stuck", X) for _ in range(10)]

        async def is_busy() -> bool:
            return bool((await stats_of(yard)).active_request_count == 320)

        await eventually("all are in flight", is_busy)
        stopping = asyncio.create_task(yard.app.transport.stop(60))
        await asyncio.sleep(0)
        let_go()
        found = await raw.results(310)
        assert "models/late" in found.values()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw.call.read()
        assert reason_of(caught.value) == "SERVER_DRAINING"
        # Of ours too: answered what was asked, and nothing after that.
        assert [(await each).served.model for each in asked] == ["models/stuck"] * 10
        await asyncio.wait_for(stopping, 30)
        error = await refusal_of(ours.predict("stuck", X))
        assert isinstance(error, ServerDraining)
        await ours.close()


async def test_what_is_no_message_ends_the_stream_and_counts_once(tmp_path: Path) -> None:
    async with running_app(ECHO, tmp_path) as yard:
        method: Any = yard.channel.stream_stream(
            "/modelyard.v1.InferenceService/PredictStream",
            response_deserializer=pb.PredictStreamResponse.FromString,
        )
        many = pb.PredictStreamRequest(items=[item(i) for i in range(1025)])
        for body, text in (
            (b"", "items: at least one is needed"),
            (many.SerializeToString(), "items: there are 1025; 1024 may be"),
            (b"\x0a\xff", "the message is no PredictStreamRequest"),
        ):
            call = method(timeout=30)
            await call.write(pb.PredictStreamRequest(items=[item(1)]).SerializeToString())
            assert (await call.read()).results[0].id == 1
            await call.write(body)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details() == text
        stats = await stats_of(yard)
        assert (stats.answered_count, stats.error_counts) == (3, {"INVALID_FIELD": 3})


async def test_many_streams_under_a_small_budget(tmp_path: Path) -> None:
    names = [f"m{index}" for index in range(6)]
    config = device_table("cpu", "2500B")
    for name in names:
        config += model_table(name, "identity", options={"size_bytes": 1000})
    async with running_app(config, tmp_path) as yard:

        async def ask(number: int) -> None:
            order = random.Random(number).choices(names, k=100)
            items = [(name, f"{number} {index}") for index, name in enumerate(order)]
            async with yard.client.stream(max_in_flight=50) as stream:
                results = await collected(stream.map(items, timeout_s=60))
            assert reasons(results) == [None] * 100
            told = [each.only for each in results if isinstance(each, Prediction)]
            assert told == [[text] for _, text in items]

        await asyncio.gather(*map(ask, range(10)))
        assert (await stats_of(yard)).answered_count == 1000
        device = await yard.device()
        assert device.peak_accounted_bytes <= 2500
