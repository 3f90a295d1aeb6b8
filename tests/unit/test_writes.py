"""Changes of the catalog: one at a time, durable before they show, done once for each id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.catalog_bench import CatalogBench, GatedStore
from tests.support.fake_engine import turns

from modelyard.v1 import model_service_pb2 as pb
from modelyard_server.catalog.records import Change
from modelyard_server.catalog.writes import MAX_REQUEST_ID, Asked, Writes, to_the_end
from modelyard_server.errors import Code, Reason, Refusal
from modelyard_server.services.handler import unary
from modelyard_server.services.models import ModelService
from modelyard_server.services.once import once
from modelyard_server.transport.api import Call

CALL = Call(body=b"", read_metadata=lambda: None, remaining_s=None)


class ServiceBench(CatalogBench):
    """ModelService over the bench."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.models = ModelService(
            catalog=self.catalog,
            registry=self.registry,
            residency=self.residency,
            writes=self.writes,
            device_names=[device.name for device in self.devices],
            max_deadline_s=60,
        )

    async def call(self, request: pb.CreateModelRequest) -> pb.CreateModelResponse:
        return await self.models.create_model(request, CALL)


def creating(
    model_id: str = "m", request_id: str = "id-1", **options: str
) -> pb.CreateModelRequest:
    request = pb.CreateModelRequest(model_id=model_id, request_id=request_id)
    request.model.runtime = "fake"
    for name, value in options.items():
        request.model.options[name] = value
    return request


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[ServiceBench]:
    made = ServiceBench(tmp_path)
    yield made
    await made.end()


@pytest.fixture
async def store() -> AsyncIterator[GatedStore]:
    made = GatedStore.opened()
    yield made
    await made.close()


# --- Request ids ----------------------------------------------------------------------------------


async def test_a_replay_gets_the_first_answer_and_changes_nothing(bench: ServiceBench) -> None:
    first = await bench.call(creating())
    revision = bench.journal.revision
    again = await bench.call(creating())
    assert again.SerializeToString(deterministic=True) == first.SerializeToString(
        deterministic=True
    )
    assert len(bench.store.written) == 1
    assert bench.journal.revision == revision
    # Even if what it made is gone: it is the answer that was asked for again, not the model.
    await bench.models.delete_model(pb.DeleteModelRequest(name="models/m"), CALL)
    assert await bench.call(creating()) == first
    assert bench.catalog.models() == []


async def test_without_an_id_nothing_is_a_replay(bench: ServiceBench) -> None:
    await bench.call(creating(request_id=""))
    refusal = await bench.refused(bench.call(creating(request_id="")))
    assert refusal.reason is Reason.ALREADY_EXISTS


async def test_an_id_means_one_call_only(bench: ServiceBench) -> None:
    await bench.call(creating())
    delete = pb.DeleteModelRequest(name="models/m", request_id="id-1")
    for work in (
        bench.call(creating("other")),
        bench.call(creating(option="value")),
        bench.models.delete_model(delete, CALL),
    ):
        refusal = await bench.refused(work)
        assert refusal.reason is Reason.INVALID_FIELD
        assert [v.field for v in refusal.violations] == ["request_id"]
    assert [model.id for model in bench.catalog.models()] == ["m"]


async def test_a_replay_may_write_its_maps_in_another_order(bench: ServiceBench) -> None:
    handler = unary(pb.CreateModelRequest, bench.models.create_model)
    # Messages one behind the other are one message, with the maps of both.
    one, other = (creating(**option).SerializeToString() for option in ({"a": "1"}, {"b": "2"}))
    answers = []
    for body in (one + other, other + one):
        answer = await handler(Call(body=body, read_metadata=lambda: None, remaining_s=None))
        assert isinstance(answer, bytes), answer
        answers.append(pb.CreateModelResponse.FromString(answer))
    assert one + other != other + one
    assert answers[0] == answers[1]
    assert set(answers[0].model.options) == {"a", "b"}


async def test_two_calls_at_once_with_one_id_are_done_once(bench: ServiceBench) -> None:
    bench.store.gate = asyncio.Event()
    tasks = [asyncio.create_task(bench.call(creating())) for _ in range(5)]
    await turns()
    assert not any(task.done() for task in tasks)
    bench.store.gate.set()
    answers = await asyncio.gather(*tasks)
    assert all(answer == answers[0] for answer in answers)
    assert len(bench.store.written) == len(bench.catalog.models()) == 1


async def test_a_replay_that_is_checked_while_the_first_is_being_done_is_none_the_worse(
    bench: ServiceBench,
) -> None:
    gate = bench.engine.price_gate = asyncio.Event()
    first = asyncio.create_task(bench.call(creating()))
    await bench.until(lambda: bench.engine.priced)
    # It is checked when the model is there: by itself it would be refused.
    real = bench.writes.first_answer

    async def first_answer(asked: Asked) -> bytes | None:
        found = await real(asked)
        if asyncio.current_task() is second:
            bench.engine.price_gate = None
            gate.set()
            await first
        return found

    bench.writes.first_answer = first_answer  # type: ignore[method-assign]  # the point of the test
    second = asyncio.create_task(bench.call(creating()))
    assert await second == await first
    assert len(bench.store.written) == 1


async def test_files_that_hang_keep_no_other_call_waiting(bench: ServiceBench) -> None:
    bench.engine.price_gate = asyncio.Event()
    hangs = asyncio.create_task(bench.call(creating("hangs", "id-1")))
    await bench.until(lambda: bench.engine.priced)
    gate, bench.engine.price_gate = bench.engine.price_gate, None
    await bench.call(creating("other", "id-2"))
    delete = pb.DeleteModelRequest(name="models/other")
    await bench.models.delete_model(delete, CALL)
    assert not hangs.done()
    gate.set()
    await hangs
    assert [model.id for model in bench.catalog.models()] == ["hangs"]


async def test_a_call_that_was_refused_is_tried_again(bench: ServiceBench) -> None:
    bench.store.full = True
    refusal = await bench.refused(bench.call(creating()))
    assert refusal.reason is Reason.CATALOG_UNAVAILABLE
    bench.engine.prices["m"] = 10_000
    bench.store.full = False
    refusal = await bench.refused(bench.call(creating()))
    assert refusal.reason is Reason.MODEL_NEVER_FITS
    bench.engine.prices["m"] = 10
    assert (await bench.call(creating())).model.name == "models/m"


async def test_what_was_only_validated_is_not_remembered(bench: ServiceBench) -> None:
    await bench.call(creating())
    model = pb.UpdateModelRequest(request_id="id-2", validate_only=True)
    model.model.name = "models/m"
    model.model.keys.append("k")
    model.update_mask.paths.append("keys")
    checked = await bench.models.update_model(model, CALL)
    assert list(checked.model.keys) == ["k"]
    assert await bench.store.request("id-2") is None
    model.validate_only = False
    await bench.models.update_model(model, CALL)
    assert set(bench.catalog.keys) == {"m", "k"}


async def test_the_replayed_answer_of_an_update_tells_of_the_pin_too(bench: ServiceBench) -> None:
    await bench.call(creating())
    async with bench.writes.alone():
        await bench.registry.set_pinned(bench.catalog.get("m"), True)
    await bench.settle()
    request = pb.UpdateModelRequest(request_id="id-2")
    request.model.name = "models/m"
    request.model.keys.append("k")
    request.update_mask.paths.append("keys")
    first = await bench.run_all(bench.models.update_model(request, CALL))
    assert first.model.pinned
    assert await bench.models.update_model(request, CALL) == first


@pytest.mark.parametrize("request_id", ["x" * (MAX_REQUEST_ID + 1), "é", "a\n", "\x7f", "\0"])
async def test_an_id_of_no_use_is_refused(bench: ServiceBench, request_id: str) -> None:
    refusal = await bench.refused(bench.call(creating(request_id=request_id)))
    assert refusal.reason is Reason.INVALID_FIELD
    assert [v.field for v in refusal.violations] == ["request_id"]
    assert bench.catalog.models() == []


@pytest.mark.parametrize("request_id", ["x" * MAX_REQUEST_ID, " ~!", "a"])
async def test_every_printable_id_will_do(bench: ServiceBench, request_id: str) -> None:
    first = await bench.call(creating(request_id=request_id))
    assert await bench.call(creating(request_id=request_id)) == first


async def test_an_id_that_cannot_be_looked_up_is_refused_before_anything_is_done(
    store: GatedStore,
) -> None:
    store.reads_fail = True

    async def change(answered: object) -> pb.CreateModelResponse:
        raise AssertionError("it was done without knowing whether it had been done")

    with pytest.raises(Refusal) as caught:
        await once(Writes(store), creating(), pb.CreateModelResponse, change)
    assert caught.value.reason is Reason.CATALOG_UNAVAILABLE


# --- The store ------------------------------------------------------------------------------------


async def test_a_store_that_fails_is_unavailable_without_its_path(store: GatedStore) -> None:
    writes = Writes(store)
    store.full = True
    with pytest.raises(Refusal) as caught:
        await writes.write(Change(new_plan=True))
    assert caught.value.reason is Reason.CATALOG_UNAVAILABLE
    assert caught.value.code is Code.UNAVAILABLE
    assert caught.value.retry_after_s is not None
    assert "disk" not in caught.value.text  # The store's text has paths in it.
    store.full = False
    assert await writes.write(Change(new_plan=True)) == 1


async def test_what_is_owed_is_written_before_the_next_change(store: GatedStore) -> None:
    writes = Writes(store)
    writes.owe(Change(delete_models=("gone",)))
    store.full = True
    with pytest.raises(Refusal):
        await writes.write(Change(new_plan=True))
    store.full = False
    for _ in range(2):
        await writes.write(Change(new_plan=True))
    assert store.written == [
        Change(delete_models=("gone",)),
        Change(new_plan=True),
        Change(new_plan=True),
    ]


async def test_changes_are_made_one_after_the_other(store: GatedStore) -> None:
    writes = Writes(store)
    log: list[str] = []

    async def change(name: str) -> None:
        async with writes.alone():
            log.append(f"{name} looks")
            await writes.write(Change(new_plan=True))
            log.append(f"{name} shows")

    await asyncio.gather(change("a"), change("b"))
    assert log == ["a looks", "a shows", "b looks", "b shows"]


async def test_who_gives_up_its_turn_keeps_nobody_waiting(store: GatedStore) -> None:
    writes = Writes(store)
    store.gate = asyncio.Event()

    async def change() -> None:
        async with writes.alone():
            await writes.write(Change(new_plan=True))

    first, second, third = (asyncio.create_task(change()) for _ in range(3))
    await turns()
    second.cancel()
    store.gate.set()
    await asyncio.gather(first, third)
    assert second.cancelled()
    assert store.read().plan_revision == 2


# --- To the end -----------------------------------------------------------------------------------


async def test_work_goes_on_to_its_end_however_often_its_caller_is_cancelled() -> None:
    gate, done = asyncio.Event(), False

    async def work() -> str:
        nonlocal done
        await gate.wait()
        done = True
        return "answer"

    task = asyncio.create_task(to_the_end("work", work))
    await turns()
    for _ in range(3):
        task.cancel()
        await turns()
        assert not task.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done


async def test_what_work_returns_or_raises_is_its_callers() -> None:
    async def answers() -> str:
        return "answer"

    async def raises() -> str:
        raise ValueError("odd")

    assert await to_the_end("answers", answers) == "answer"
    with pytest.raises(ValueError, match="odd"):
        await to_the_end("raises", raises)


async def test_a_cancelled_caller_hears_of_its_cancellation_and_of_the_error() -> None:
    gate = asyncio.Event()

    async def raises() -> None:
        await gate.wait()
        raise ValueError("odd")

    task = asyncio.create_task(to_the_end("raises", raises))
    await turns()
    task.cancel()
    await turns()
    gate.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert isinstance(caught.value.__cause__, ValueError)


# --- Who asked ------------------------------------------------------------------------------------


async def test_a_call_is_the_same_by_its_method_and_what_it_says() -> None:
    asked = Asked(method="A", request_id="id", body=b"x")
    record = asked.answered(b"answer")
    assert record is not None
    assert asked.is_that_of(record)
    assert not Asked(method="B", request_id="id", body=b"x").is_that_of(record)
    assert not Asked(method="A", request_id="id", body=b"y").is_that_of(record)
    assert Asked(method="A", request_id="", body=b"x").answered(b"answer") is None
