"""PredictBatch over a real channel: order, grouping, a status for each item, deadlines, leaving."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from tests.support import faulty_models
from tests.support.config_text import ALLOWED, CPU, ROOTS, device_table, model_table
from tests.support.server import RunningApp, eventually, refusal_of, running_app

from modelyard import (
    Admin,
    AnswerTooLarge,
    BatchItem,
    Client,
    InvalidRequest,
    ModelyardError,
    Prediction,
    ResidencyState,
    ServerError,
)
from modelyard.v1 import inference_service_pb2 as pb
from modelyard.v1 import tensor_pb2
from modelyard_server.services.inference import InferenceService

X = np.ones(3, np.float32)
METHOD = "/modelyard.v1.InferenceService/PredictBatch"

PLACED = '[models.stuck]\ndevice = "cpu"'

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


def stuck(base: Path, factory: str) -> str:
    faulty_models.make_weights(base / "store" / "stuck", value=9.0)
    return torch_model("stuck", factory, gate=base / "gate")


def with_engine(engine: str, config: str) -> str:
    return f'[engine]\nkind = "{engine}"\n{config}'


def answered(results: list[Prediction | ModelyardError]) -> list[Prediction]:
    predictions = [each for each in results if isinstance(each, Prediction)]
    assert len(predictions) == len(results), [str(each) for each in results]
    return predictions


def reasons(results: list[Prediction | ModelyardError]) -> list[str | None]:
    """Of each item its reason; None if it was answered."""
    return [each.reason if isinstance(each, ModelyardError) else None for each in results]


async def stats_of(yard: RunningApp) -> Any:
    return await yard.admin(Admin.stats)


# Order and grouping


@ENGINES
async def test_answers_stand_in_the_order_of_the_items(tmp_path: Path, engine: str) -> None:
    names = ("one", "two", "three")
    config = with_engine(engine, CPU + ROOTS + ALLOWED + adders(tmp_path, *names))
    chance = random.Random(5)
    asked = [(chance.randrange(3), float(chance.randrange(100))) for _ in range(120)]
    async with running_app(config, tmp_path) as yard:
        items = [BatchItem(key=names[which], inputs=X * value) for which, value in asked]
        predictions = answered(await yard.client.predict_batch(items))
        for (which, value), prediction in zip(asked, predictions, strict=True):
            np.testing.assert_array_equal(prediction.only, X * value + which + 1)
            assert prediction.served.model == f"models/{names[which]}"
            assert prediction.served.device == "devices/cpu"
            assert prediction.served.cold and prediction.served.load_s is not None
            assert prediction.served.run_s > 0
        with Client(yard.target) as blocking:
            again = await asyncio.to_thread(blocking.predict_batch, items)
        assert all(not each.served.cold for each in answered(again))
        stats = await stats_of(yard)
        assert (stats.answered_count, stats.cold_count, stats.hit_count) == (240, 120, 120)
        assert (stats.load_count, stats.active_request_count) == (3, 0)


@ENGINES
async def test_a_model_is_loaded_once_whatever_the_order(tmp_path: Path, engine: str) -> None:
    config = device_table("cpu", "1MB")
    names = [f"m{index}" for index in range(5)]
    for name in names:  # Room for one of them.
        config += model_table(name, "identity", options={"size_bytes": 700_000})
    async with running_app(with_engine(engine, config), tmp_path) as yard:
        items = [(names[index % 5], f"text {index}") for index in range(400)]
        predictions = answered(await yard.client.predict_batch(items))
        for (key, text), prediction in zip(items, predictions, strict=True):
            assert prediction.served.model == f"models/{key}"
            assert prediction.only == [text]
        stats = await stats_of(yard)
        assert (stats.load_count, stats.eviction_count) == (5, 4)
        device = await yard.device()
        assert device.peak_accounted_bytes <= device.budget_bytes


async def test_different_models_proceed_at_the_same_time(tmp_path: Path) -> None:
    config = CPU + ROOTS + ALLOWED + stuck(tmp_path, "StuckInLoad")
    config += model_table("echo", "identity")
    async with running_app(config, tmp_path) as yard:
        await yard.client.predict("echo", "here")
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            items: list[tuple[str, Any]] = [("stuck", X), ("echo", "a"), ("stuck", X)]
            call = asyncio.create_task(yard.client.predict_batch(items))
            await eventually("the load is stuck", gate.is_waited_at)

            async def other_ran() -> bool:
                return bool((await stats_of(yard)).answered_count == 2)

            await eventually("the other model has answered", other_ran)
            assert (await stats_of(yard)).waiting_request_count == 1
        assert len(answered(await call)) == 3


async def test_equal_items_are_answered_each(tmp_path: Path) -> None:
    config = CPU + model_table("echo", "identity", keys=["other/name"])
    async with running_app(config, tmp_path) as yard:
        items = [("echo", "same"), ("other/name", "same")] * 20
        predictions = answered(await yard.client.predict_batch(items))
        assert [each.only for each in predictions] == [["same"]] * 40
        # Two keys of one model are one group.
        assert (await stats_of(yard)).load_count == 1


async def test_a_thousand_items_of_many_models(tmp_path: Path) -> None:
    names = [f"m{index}" for index in range(40)]
    config = device_table("cpu", "10KB")
    for name in names:
        config += model_table(name, "identity", options={"size_bytes": 1000})
    order = [random.Random(3).choice(names) for _ in range(1024)]
    async with running_app(config, tmp_path) as yard:
        items = [(name, f"{index}") for index, name in enumerate(order)]
        predictions = answered(await yard.client.predict_batch(items, timeout_s=60))
        assert [each.only for each in predictions] == [[str(index)] for index in range(1024)]
        assert [each.served.model for each in predictions] == [f"models/{name}" for name in order]
        assert (await stats_of(yard)).load_count == len(set(order))


async def test_large_contents_are_cut_out_of_every_item(tmp_path: Path) -> None:
    config = CPU + model_table("echo", "identity")
    async with running_app(config, tmp_path) as yard:
        arrays = [np.full(50_000 + index, index, np.float32) for index in range(20)]
        items = [BatchItem(key="echo", inputs={"a": array, "b": "text"}) for array in arrays]
        for array, prediction in zip(
            arrays, answered(await yard.client.predict_batch(items)), strict=True
        ):
            np.testing.assert_array_equal(prediction["a"], array)
            assert prediction["b"] == ["text"]


async def test_it_asks_again_for_a_model_that_was_taken_away(tmp_path: Path) -> None:
    config = CPU + ROOTS + ALLOWED + stuck(tmp_path, "StuckInRun")
    async with running_app(config, tmp_path) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            items = [("stuck", X * index) for index in range(300)]
            call = asyncio.create_task(yard.client.predict_batch(items))
            await eventually("the model runs", gate.is_waited_at)
            unload = asyncio.create_task(yard.admin(Admin.unload, "stuck"))

            async def is_leaving() -> bool:
                return (await yard.residency("stuck")).state is ResidencyState.DRAINING

            await eventually("the model is to leave", is_leaving)
        predictions = answered(await call)
        for index, prediction in enumerate(predictions):
            np.testing.assert_array_equal(prediction.only, X * index + 9)
        await unload
        assert (await yard.residency("stuck")).load_count == 2
        cold = [each.served.cold for each in predictions]
        assert all(cold)


async def test_a_model_that_is_deleted_meanwhile_answers_what_it_has_begun(tmp_path: Path) -> None:
    config = CPU + ROOTS + ALLOWED
    faulty_models.make_weights(tmp_path / "store" / "stuck", value=9.0)
    options = {
        "factory": faulty_models.factory("StuckInRun"),
        "factory_options": {"gate": str(tmp_path / "gate")},
    }
    async with running_app(config, tmp_path) as yard:
        await yard.admin(
            Admin.create_model,
            "stuck",
            runtime="torch",
            root="store",
            folder="stuck",
            options=options,
        )
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            call = asyncio.create_task(yard.client.predict_batch([("stuck", X)] * 300))
            await eventually("the model runs", gate.is_waited_at)
            deletion = asyncio.create_task(yard.admin(Admin.delete_model, "stuck"))
            await eventually("its key is free", lambda: "stuck" not in yard.app.catalog.keys)
        told = reasons(await call)
        await deletion
        # Those that had leases, one of them in advance.
        count = told.count(None)
        assert 1 <= count <= 129
        assert told == [None] * count + ["KEY_NOT_FOUND"] * (300 - count)


async def test_a_worker_that_dies_takes_nothing_along_but_what_ran(tmp_path: Path) -> None:
    config = CPU + ROOTS + ALLOWED + stuck(tmp_path, "StuckInRun")
    async with running_app(with_engine("process", config), tmp_path) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            call = asyncio.create_task(yard.client.predict_batch([("stuck", X)] * 300))
            await eventually("the model runs", gate.is_waited_at)
            (pid,) = {
                pid for name, pid in yard.app.engine.pids.items() if name.startswith("models")
            }
            os.kill(pid, signal.SIGKILL)

            def is_replaced() -> bool:
                return pid not in yard.app.engine.pids.values()

            await eventually("it is dead", is_replaced)
        told = reasons(await call)
        assert told[0] == "MODEL_FAILED"  # With those that shared its run, if any did.
        began = told.count("MODEL_FAILED")
        assert began <= 64
        assert told == ["MODEL_FAILED"] * began + [None] * (300 - began)
        assert (await yard.residency("stuck")).load_count == 2


# A status for each item


def faulty(base: Path) -> str:
    for name in ("good", "raising", "broken"):
        faulty_models.make_weights(base / "store" / name)
    config = torch_model("good") + torch_model("raising", "Raising", kind="ValueError")
    config += torch_model("broken", "Exiting", flag=base / "flag")
    return config + model_table("echo", "identity")


@ENGINES
async def test_an_items_failure_is_its_own(tmp_path: Path, engine: str) -> None:
    config = CPU + ROOTS + ALLOWED + faulty(tmp_path)
    async with running_app(with_engine(engine, config), tmp_path) as yard:
        (tmp_path / "flag").touch()
        items = [
            BatchItem(key="good", inputs=X),
            BatchItem(key="nobody", inputs=X),
            BatchItem(key="good", inputs={"y": X}),
            BatchItem(key="..", inputs=X),
            BatchItem(key="raising", inputs=X),
            BatchItem(key="good", inputs=X, parameters={"odd": 1}),
            BatchItem(key="broken", inputs=X),
            BatchItem(key="raising", inputs=X),
            BatchItem(key="broken", inputs=X),
            BatchItem(key="good", inputs=X * 2),
        ]
        results = await yard.client.predict_batch(items)
        assert reasons(results) == [
            None,
            "KEY_NOT_FOUND",
            "INVALID_TENSOR",
            "INVALID_FIELD",
            "MODEL_FAILED",
            "INVALID_FIELD",
            "LOAD_FAILED",
            "MODEL_FAILED",
            "LOAD_FAILED",
            None,
        ]
        # What an item is told is what Predict tells of it.
        for item, result in zip(items, results, strict=True):
            if isinstance(result, ModelyardError):
                alone = await refusal_of(
                    yard.client.predict(item.key, item.inputs, parameters=item.parameters)
                )
                assert type(result) is type(alone)
                assert (result.code, result.reason) == (alone.code, alone.reason)
                assert result.violations == alone.violations
                assert result.metadata.keys() == alone.metadata.keys()
                assert (result.retry_after_s is None) == (alone.retry_after_s is None)
                if result.reason not in ("MODEL_FAILED", "LOAD_FAILED"):  # Ids and times differ.
                    assert (str(result), result.metadata) == (str(alone), alone.metadata)
        last = results[-1]
        assert isinstance(last, Prediction)
        np.testing.assert_array_equal(last.only, X * 2 + 1)
        stats = await stats_of(yard)
        assert stats.answered_count == 2
        assert stats.error_counts["MODEL_FAILED"] == 4
        assert (await yard.residency("broken")).load_count == 0


async def test_a_model_that_cannot_come_refuses_all_its_items_and_no_other(tmp_path: Path) -> None:
    config = device_table("cpu", "1MB")
    config += model_table("pinned", "identity", options={"size_bytes": 600_000}, pinned=True)
    config += model_table("large", "identity", options={"size_bytes": 600_000})
    config += model_table("small", "identity", options={"size_bytes": 1000})
    async with running_app(config, tmp_path) as yard:
        items = [("large", "a"), ("small", "b"), ("large", "c"), ("small", "d"), ("pinned", "e")]
        results = await yard.client.predict_batch(items)
        assert reasons(results) == ["BUDGET_EXHAUSTED", None, "BUDGET_EXHAUSTED", None, None]
        error = results[0]
        assert isinstance(error, ModelyardError)
        assert error.violations[0].field == "devices/cpu"
        assert error.metadata["needed_bytes"] == "600000"
        assert (await stats_of(yard)).error_counts == {"BUDGET_EXHAUSTED": 2}


async def test_an_item_that_no_load_can_help_causes_none(tmp_path: Path) -> None:
    config = CPU + ROOTS + ALLOWED + adders(tmp_path, "one")
    async with running_app(config, tmp_path) as yard:
        bad = BatchItem(key="one", inputs=X, parameters={"odd": 1})
        assert reasons(await yard.client.predict_batch([bad, bad])) == ["INVALID_FIELD"] * 2
        assert (await yard.residency("one")).load_count == 0
        mixed = await yard.client.predict_batch([bad, ("one", X), bad])
        assert reasons(mixed) == ["INVALID_FIELD", None, "INVALID_FIELD"]


async def test_a_defect_of_the_server_is_one_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = InferenceService.check

    def check(self: InferenceService, asked: Any) -> None:
        if asked.key == "b":
            raise ZeroDivisionError("secret")
        real(self, asked)

    monkeypatch.setattr(InferenceService, "check", check)
    config = CPU + model_table("a", "identity") + model_table("b", "identity")
    async with running_app(config, tmp_path) as yard:
        results = await yard.client.predict_batch([("a", "x"), ("b", "x"), ("a", "y")])
        assert reasons(results) == [None, "INTERNAL", None]
        error = results[1]
        assert isinstance(error, ServerError)
        assert "secret" not in str(error) and error.metadata["error_id"] in str(error)


async def test_answers_that_are_too_large_together_are_refused_one_by_one(tmp_path: Path) -> None:
    config = '[server]\nmax_message_bytes = "80MB"\n' + CPU + model_table("echo", "identity")
    async with running_app(config, tmp_path) as yard:
        chunk = np.zeros(3_000_000, np.uint8)
        async with type(yard.client)(yard.target, max_message_bytes=100_000_000) as client:
            items: list[tuple[str, Any]] = [("echo", chunk)] * 26 + [("echo", "small")]
            results = await client.predict_batch(items)
        told = reasons(results)
        # 80 MB less what is kept free for errors.
        assert told == [None] * 25 + ["ANSWER_TOO_LARGE", None]
        error = results[25]
        assert isinstance(error, AnswerTooLarge)
        assert int(error.metadata["limit_bytes"]) < 80_000_000
        assert error.retry_after_s is None


# The whole call


async def test_what_is_no_batch_is_refused_as_a_whole(tmp_path: Path) -> None:
    config = CPU + model_table("echo", "identity")
    item = pb.PredictRequest(
        key="echo",
        inputs=[
            tensor_pb2.Tensor(
                data_type=tensor_pb2.DATA_TYPE_TEXT,
                shape=[1],
                text=tensor_pb2.TextElements(values=["a"]),
            )
        ],
    )
    many = pb.PredictBatchRequest(items=[item] * 1025).SerializeToString()
    async with running_app(config, tmp_path) as yard:
        rpc: Any = yard.channel.unary_unary(METHOD)
        for body, text in (
            (b"", "items: at least one is needed"),
            (many, "items: there are 1025; 1024 may be"),
            (b"\x0a\xff", "the message is no PredictBatchRequest"),
            (b"\x0b\x0c", "the message is no PredictBatchRequest"),
            # An item that is none: the whole message is none, as protobuf sees it.
            (b"\x0a\x02\x0a\xff", "the message is no PredictBatchRequest"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rpc(body, timeout=10)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details() == text
        # Fields of newer clients are passed over.
        body = pb.PredictBatchRequest(items=[item]).SerializeToString() + b"\x12\x01a\x18\x05"
        answer = pb.PredictBatchResponse.FromString(await rpc(body, timeout=10))
        assert answer.results[0].response.outputs[0].text.values == ["a"]
        assert (await yard.residency("echo")).load_count == 1
        error = await refusal_of(yard.client.predict_batch([("echo", "a")] * 1025))
        assert isinstance(error, InvalidRequest) and error.violations[0].field == "items"
        assert (await stats_of(yard)).active_request_count == 0


@ENGINES
async def test_a_deadline_that_passes_for_some_answers_the_others(
    tmp_path: Path, engine: str
) -> None:
    # On a device of its own: behind the stuck model on its lane nothing would be answered.
    config = CPU + device_table("cuda:0", "1MB", logical=True)
    config += ROOTS + ALLOWED + stuck(tmp_path, "StuckInRun").replace("[models.stuck]", PLACED)
    config += model_table("echo", "identity", device="cuda:0")
    async with running_app(with_engine(engine, config), tmp_path) as yard:
        await yard.admin(Admin.load, "stuck")
        await yard.becomes("stuck", ResidencyState.RESIDENT, 30)
        with faulty_models.closed_gate(tmp_path / "gate"):
            items: list[tuple[str, Any]] = [("echo", "a"), *[("stuck", X)] * 300, ("echo", "b")]
            results = await yard.client.predict_batch(items, timeout_s=5)
            assert reasons(results) == [None, *["DEADLINE_IN_RUN"] * 300, None]
            # Of those that were not with the engine yet nothing is left.
            assert 1 <= (await yard.residency("stuck")).lease_count <= 128
        assert (await stats_of(yard)).active_request_count == 0


async def test_a_deadline_that_passes_in_the_load_is_told_to_every_item(tmp_path: Path) -> None:
    config = CPU + ROOTS + ALLOWED + stuck(tmp_path, "StuckInLoad")
    async with running_app(config + model_table("echo", "identity"), tmp_path) as yard:
        await yard.client.predict("echo", "here")
        with faulty_models.closed_gate(tmp_path / "gate"):
            items: list[tuple[str, Any]] = [("stuck", X), ("echo", "a"), ("stuck", X)]
            results = await yard.client.predict_batch(items, timeout_s=2)
            assert reasons(results) == ["DEADLINE_IN_LOAD", None, "DEADLINE_IN_LOAD"]
            assert (await stats_of(yard)).waiting_request_count == 0


async def test_who_leaves_takes_every_item_along(tmp_path: Path) -> None:
    config = CPU + ROOTS + ALLOWED + stuck(tmp_path, "StuckInRun") + adders(tmp_path, "one")
    async with running_app(config, tmp_path) as yard:
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            items = [("stuck" if index % 2 else "one", X) for index in range(600)]
            call = asyncio.create_task(yard.client.predict_batch(items))
            await eventually("the model runs", gate.is_waited_at)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

            async def server_knows() -> bool:
                return bool((await stats_of(yard)).active_request_count == 0)

            await eventually("the server knows", server_knows)
            assert (await stats_of(yard)).answered_count < 600
        await yard.at_rest()
        assert (await stats_of(yard)).waiting_request_count == 0


async def test_others_are_served_while_a_large_batch_runs(tmp_path: Path) -> None:
    config = CPU + model_table("busy", "identity") + model_table("other", "identity")
    async with running_app(config, tmp_path) as yard:
        await yard.client.predict("other", "here")
        batch = asyncio.create_task(yard.client.predict_batch([("busy", "x")] * 1024))
        alone = [await yard.client.predict("other", "y") for _ in range(5)]
        assert all(not each.served.cold for each in alone)
        answered(await batch)


async def test_many_batches_at_once_under_a_small_budget(tmp_path: Path) -> None:
    names = [f"m{index}" for index in range(6)]
    config = device_table("cpu", "2500B")
    for name in names:
        config += model_table(name, "identity", options={"size_bytes": 1000})
    chance = random.Random(8)
    async with running_app(config, tmp_path) as yard:

        async def ask(number: int) -> None:
            order = chance.choices(names, k=60)
            items = [(name, f"{number} {index}") for index, name in enumerate(order)]
            results = answered(await yard.client.predict_batch(items, timeout_s=60))
            assert [each.only for each in results] == [[text] for _, text in items]

        await asyncio.gather(*map(ask, range(20)))
        stats = await stats_of(yard)
        assert stats.answered_count == 1200
        device = await yard.device()
        assert device.peak_accounted_bytes <= 2500
