"""Budgets and drains by their own calls, and evening out the devices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.support.fake_engine import turns
from tests.support.plan_bench import PlanBench, devices_of, layers

from modelyard.devices import ComponentDevice, Device
from modelyard.placements import AutomaticPlacement, PlacementStrategy
from modelyard_server.catalog.forecasts import DeviceForecast, ModelForecast
from modelyard_server.catalog.plans import PlanChange
from modelyard_server.catalog.store import StorageFailed
from modelyard_server.errors import Reason, Refusal
from modelyard_server.residency.values import NEVER_NS, DeviceUse, State
from modelyard_server.runtimes.api import ModelFilesError

A, B = "devices/cuda-0", "devices/cuda-1"
BALANCED = AutomaticPlacement(
    strategy=PlacementStrategy.BALANCED,
    devices=(Device.from_str("cuda:0"), Device.from_str("cuda:1")),
)


def on(position: int) -> ComponentDevice:
    return ComponentDevice.from_single(Device.from_str(f"cuda:{position}"))


async def change(bench: PlanBench, position: int, **wanted: Any) -> DeviceUse:
    """Changes a device; the answer is how it is right after."""

    def answer(use: DeviceUse) -> DeviceUse:
        return use

    async with bench.writes.alone():
        return await bench.plans.change_device(position, answer=answer, **wanted)


async def rebalance(
    bench: PlanBench, *, validate_only: bool = False
) -> tuple[list[ModelForecast], tuple[DeviceForecast, ...]]:
    async def alone() -> Any:
        async with bench.writes.alone():
            return await bench.plans.rebalance(
                deadline_ns=bench.deadline(), validate_only=validate_only
            )

    found: tuple[list[ModelForecast], tuple[DeviceForecast, ...]] = await bench.run(alone())
    return found


async def refusal_of(call: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        await call
    return caught.value


@pytest.fixture
async def bench() -> AsyncIterator[PlanBench]:
    """Two devices of 300 bytes."""
    found = PlanBench(*devices_of(300, 300))
    yield found
    await found.close()


# --- Draining -------------------------------------------------------------------------------------


async def test_what_is_on_a_drained_device_leaves_but_for_what_is_pinned(bench: PlanBench) -> None:
    await bench.add("pinned", 50, on(0), pinned=True)
    await bench.add("idle", 60, on(0), resident=True)
    await bench.add("used", 70, on(0), resident=True)
    await bench.add("elsewhere", 80, on(1), resident=True)
    lease = await bench.lease("used")
    revision = bench.journal.revision
    use = await change(bench, 0, drained=True)
    assert use == bench.residency.device_use(0)  # Before anything has left.
    assert (use.resident, use.draining) == (50, 130)
    assert bench.plans.pinned_on(0) == ["models/pinned"]
    assert bench.plans.pinned_on(1) == []
    await bench.settle()
    assert bench.state("used") is State.DRAINING
    lease.release()
    await bench.settle()
    assert bench.held() == {"pinned": {0: 50}, "elsewhere": {1: 80}}
    told = [(e.type.name, e.subject, e.cause) for e in bench.events(revision)]
    assert told[0] == ("DEVICE_DRAINED", A, "operator")
    assert ("EVICTED", "models/idle", A) in told
    assert ("DRAINED", "models/used", A) in told
    # Once unpinned it leaves as well.
    async with bench.writes.alone():
        await bench.run(bench.registry.set_pinned(bench.catalog.get("pinned"), False))
    await bench.settle()
    assert bench.held() == {"elsewhere": {1: 80}}


async def test_models_that_may_be_elsewhere_are_served_there(bench: PlanBench) -> None:
    await bench.add("anywhere", 100, resident=True)
    (home,) = bench.held()["anywhere"]
    await change(bench, home, drained=True)
    await bench.load("anywhere")
    assert bench.held() == {"anywhere": {1 - home: 100}}


async def test_models_that_may_not_wait_until_it_is_undrained(bench: PlanBench) -> None:
    await bench.add("here", 100, on(0))
    await bench.add("parts", layers(50, 50), BALANCED)
    await change(bench, 0, drained=True)
    handles = [bench.catalog.get(name).handle for name in ("here", "parts")]
    waiting = [asyncio.create_task(bench.residency.lease(h, NEVER_NS)) for h in handles]
    await bench.settle()
    assert bench.residency.waiting_count == 2
    # Or for their deadline.
    late = asyncio.create_task(bench.residency.lease(handles[0], bench.deadline(5)))
    await turns()
    bench.clock.advance(6)
    bench.residency.set_pinned(handles[0], False)  # Some event.
    assert (await refusal_of(late)).reason is Reason.DEADLINE_IN_QUEUE
    await change(bench, 0, drained=False)
    for task in waiting:
        (await bench.run(_done(task))).release()
    assert bench.held() == {"here": {0: 100}, "parts": {0: 50, 1: 50}}


async def _done(task: asyncio.Task[Any]) -> Any:
    return await task


async def test_draining_is_idempotent_and_durable(bench: PlanBench) -> None:
    await bench.add("m", 100, on(0), resident=True)
    revision = bench.journal.revision
    for _ in range(3):
        await change(bench, 0, drained=True)
        await bench.settle()
    assert [(d.name, d.drained, d.budget_bytes) for d in bench.store.read().devices] == [
        (A, True, None)
    ]
    kinds = [event.type.name for event in bench.events(revision)]
    assert kinds.count("DEVICE_DRAINED") == kinds.count("EVICTED") == 1
    for _ in range(3):
        await change(bench, 0, drained=False)
    assert [(d.name, d.drained) for d in bench.store.read().devices] == [(A, False)]
    assert not bench.residency.is_closed(0)
    assert bench.store.read().plan_revision == bench.plans.plan().revision == 6


async def test_a_device_is_changed_only_if_it_is_as_it_was_read(bench: PlanBench) -> None:
    etag = bench.plans.device_etag(0, budget_bytes=300, drained=False)
    await change(bench, 0, etag=etag, drained=True)
    for wanted in ({"drained": False}, {"drained": True}, {"budget_bytes": 10}):
        refusal = await refusal_of(change(bench, 0, etag=etag, **wanted))
        assert refusal.reason is Reason.ETAG_MISMATCH
    # What becomes of another device is no matter.
    other = bench.plans.device_etag(1, budget_bytes=300, drained=False)
    await change(bench, 1, etag=other, budget_bytes=200)
    # Back to what it was is what it was.
    await change(bench, 0, drained=False)
    await change(bench, 0, etag=etag, budget_bytes=10)


async def test_a_change_that_cannot_be_stored_is_not_made(
    bench: PlanBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.add("m", 100, on(0), resident=True)
    before = bench.snapshot()

    async def failing(change: object) -> int:
        raise StorageFailed("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(bench.store, "write", failing)
        for wanted in ({"drained": True}, {"budget_bytes": 50}):
            refusal = await refusal_of(change(bench, 0, **wanted))
            assert refusal.reason is Reason.CATALOG_UNAVAILABLE
    await bench.settle()
    assert bench.snapshot() == before


# --- Budgets --------------------------------------------------------------------------------------


async def test_a_lower_budget_lets_idle_models_leave_first(bench: PlanBench) -> None:
    await bench.add("used", 100, on(0), resident=True)
    await bench.add("idle", 100, on(0), resident=True)
    lease = await bench.lease("used")
    use = await change(bench, 0, budget_bytes=120)
    assert (use.budget, use.resident, use.draining, use.deficit) == (120, 100, 100, 80)
    assert bench.residency.device_use(0) == use
    await bench.settle()
    assert bench.held() == {"used": {0: 100}}
    use = await change(bench, 0, budget_bytes=20)
    assert use.deficit == 80
    await bench.settle()
    assert bench.state("used") is State.DRAINING
    lease.release()
    await bench.settle()
    assert bench.held() == {}


async def test_nothing_is_loaded_until_a_device_is_within_its_budget(bench: PlanBench) -> None:
    await bench.add("used", 200, on(0), resident=True)
    await bench.add("next", 50, on(0))
    lease = await bench.lease("used")
    await change(bench, 0, budget_bytes=100)
    waiting = asyncio.create_task(bench.residency.lease(bench.catalog.get("next").handle, NEVER_NS))
    await bench.settle()
    assert not waiting.done()
    assert bench.held() == {"used": {0: 200}}
    lease.release()
    (await bench.run(_done(waiting))).release()
    assert bench.held() == {"next": {0: 50}}


async def test_a_budget_is_not_below_what_pinned_models_hold(bench: PlanBench) -> None:
    await bench.add("p", 100, on(0), pinned=True)
    await bench.add("q", 50, on(0), resident=True)
    before = bench.snapshot()
    refusal = await refusal_of(change(bench, 0, budget_bytes=99))
    assert refusal.reason is Reason.BUDGET_EXHAUSTED
    assert refusal.metadata == {
        "device": A,
        "needed_bytes": "100",
        "free_bytes": "99",
        "holders": "p=100",
    }
    assert bench.snapshot() == before
    await change(bench, 0, budget_bytes=100)
    await bench.settle()
    assert bench.held() == {"p": {0: 100}}


# --- Evening out ----------------------------------------------------------------------------------


async def both(bench: PlanBench) -> tuple[list[ModelForecast], tuple[DeviceForecast, ...]]:
    """What is said that would be moved, after seeing that nothing was, and that it then is."""
    before, revision = bench.snapshot(), bench.journal.revision
    said = await rebalance(bench, validate_only=True)
    assert bench.snapshot() == before
    assert bench.journal.revision == revision
    done = await rebalance(bench)
    await bench.settle()
    assert said == done
    for i, device in enumerate(done[1]):
        assert device.used_bytes == bench.residency.device_use(i).resident
    after = bench.snapshot()
    assert (after.etag, after.stored, after.pinned) == (before.etag, before.stored, before.pinned)
    return done


async def fill(bench: PlanBench, position: int, *names: str, size: int = 50) -> None:
    """Loads models that may be anywhere onto one device."""
    await change(bench, 1 - position, drained=True)
    for name in names:
        await bench.add(name, size, resident=True)
    await change(bench, 1 - position, drained=False)


async def test_auto_models_move_from_the_fullest_device_to_the_emptiest(bench: PlanBench) -> None:
    await fill(bench, 0, *"abcd")
    revision = bench.journal.revision
    moves, devices = await both(bench)
    assert [move.model for move in moves] == ["a", "b"]
    assert all(move.staged for move in moves)
    assert [device.used_bytes for device in devices] == [100, 100]
    assert bench.held() == {"a": {1: 50}, "b": {1: 50}, "c": {0: 50}, "d": {0: 50}}
    assert [
        (event.subject, event.cause)
        for event in bench.events(revision)
        if event.type.name == "PLACEMENT_CHANGED"
    ] == [("models/a", "operator"), ("models/b", "operator")]
    # It stops, and what was moved may be anywhere the next time.
    assert (await both(bench))[0] == []
    await change(bench, 1, drained=True)
    await bench.load("a")
    assert bench.held()["a"] == {0: 50}


async def test_shares_of_the_budget_count(bench: PlanBench) -> None:
    await change(bench, 1, budget_bytes=60)
    await fill(bench, 0, *"abcd")
    # 200 of 300 and none of 60: one of 50 would make the emptiest the fullest.
    assert (await both(bench))[0] == []
    await change(bench, 1, budget_bytes=100)
    assert len((await both(bench))[0]) == 1


async def test_nothing_pinned_or_placed_moves(bench: PlanBench) -> None:
    await bench.add("placed", 80, on(0), resident=True)
    await fill(bench, 0, "pinned")
    async with bench.writes.alone():
        await bench.run(bench.registry.set_pinned(bench.catalog.get("pinned"), True))
    await bench.add("parts", layers(30, 30), BALANCED, pinned=True)
    held = bench.held()
    await change(bench, 1, budget_bytes=900)
    assert (await both(bench))[0] == []
    assert bench.held() == held


async def test_nothing_moves_to_a_drained_device(bench: PlanBench) -> None:
    await fill(bench, 0, *"abcd")
    await change(bench, 1, drained=True)
    assert (await both(bench))[0] == []


async def test_models_in_use_move_when_their_requests_end(bench: PlanBench) -> None:
    await fill(bench, 0, *"ab")
    lease = await bench.lease("a")
    moves, _ = await rebalance(bench)
    assert [move.model for move in moves] == ["a"]
    await bench.settle()
    assert bench.held()["a"] == {1: 50}
    assert bench.residency.device_use(0).draining == 50  # The old copy answers still.
    lease.release()
    await bench.settle()
    assert bench.residency.device_use(0).draining == 0


async def test_cuts_are_made_again_for_the_budgets_of_today(bench: PlanBench) -> None:
    await bench.add("m", layers(40, 40, 40, 40), BALANCED, resident=True)
    await bench.add("cold", layers(20, 20), BALANCED)
    await change(bench, 1, budget_bytes=900)
    moves, _ = await both(bench)
    assert {move.model for move in moves} >= {"m"}
    assert bench.held() == {"m": {0: 40, 1: 120}}
    assert (await both(bench))[0] == []


async def test_what_cannot_be_cut_again_stays_as_it_is(bench: PlanBench) -> None:
    await bench.add("m", layers(100, 100), BALANCED)
    await bench.add("broken", layers(10, 10), BALANCED)
    await bench.add("fine", layers(40, 40, 40, 40), BALANCED)
    await change(bench, 0, budget_bytes=90)
    await change(bench, 1, budget_bytes=199)
    bench.engine.price_errors["broken"] = ModelFilesError("its files are gone", transient=False)
    moves, _ = await both(bench)
    assert [move.model for move in moves] == ["fine"]


async def test_moves_made_before_a_failure_stay(bench: PlanBench) -> None:
    await fill(bench, 0, *"abcdef", size=40)
    bench.failing["b"] = ModelFilesError("asked to fail", transient=False)
    refusal = await refusal_of(rebalance(bench))
    assert refusal.reason is Reason.LOAD_FAILED
    assert "models/b" in refusal.text
    await bench.settle()
    held = bench.held()
    assert held["a"] == {1: 40}
    assert held["b"] == {0: 40}
    bench.failing.clear()
    await both(bench)
    assert sum(charges.get(1, 0) for charges in bench.held().values()) == 120


async def test_what_was_moved_is_still_what_the_plan_says(bench: PlanBench) -> None:
    await fill(bench, 0, *"ab")
    plan = bench.plans.plan()
    await rebalance(bench)
    assert bench.plans.plan() == plan
    report = await bench.plans.forecast(PlanChange())
    assert report.models == ()
    assert [device.used_bytes for device in report.devices] == [50, 50]
