"""Device plans are carried out while requests flow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from tests.support.fake_engine import turns
from tests.support.plan_bench import PlanBench, devices_of, layers
from tests.support.plan_steps import (
    A,
    B,
    automatic,
    change_device,
    joined,
    kinds,
    on,
    refusal_of,
    split,
    start,
    until,
)

from modelyard.placements import PlacementStrategy
from modelyard_server.catalog.plans import Applied, PlanChange
from modelyard_server.errors import Reason, Refusal
from modelyard_server.residency.shell import Lease
from modelyard_server.residency.values import NEVER_NS


@pytest.fixture
async def bench() -> AsyncIterator[PlanBench]:
    """Two devices of 300 bytes."""
    found = PlanBench(*devices_of(300, 300))
    yield found
    await found.close()


# --- Applying -------------------------------------------------------------------------------------


async def test_a_stale_etag_changes_nothing(bench: PlanBench) -> None:
    etag = bench.plans.plan().etag
    await bench.apply(PlanChange(budgets={0: 200}), etag=etag)
    before = bench.snapshot()
    refusal = await refusal_of(bench.apply(PlanChange(budgets={0: 250}), etag=etag))
    assert refusal.reason is Reason.ETAG_MISMATCH
    assert bench.snapshot() == before
    await bench.apply(PlanChange(budgets={0: 250}), etag=bench.plans.plan().etag)


async def test_a_plan_that_was_applied_is_stored(bench: PlanBench) -> None:
    await bench.add("m", 100)
    await bench.apply(PlanChange(budgets={0: 200}, drained={1: True}, placements={"m": on(0)}))
    stored = bench.store.read()
    assert [(d.name, d.budget_bytes, d.drained) for d in stored.devices] == [
        (A, 200, False),
        (B, None, True),
    ]
    assert [(p.model, p.placement) for p in stored.placements] == [
        ("m", {"type": "single", "device": "cuda:0"})
    ]
    assert stored.plan_revision == bench.plans.plan().revision == 1


async def test_requests_during_the_switch_are_served_and_none_is_lost(bench: PlanBench) -> None:
    """By the old copy until the new one takes over, then by that one."""
    await bench.add("m", 100, on(0), resident=True)
    served: list[int] = []
    stop = False

    async def client() -> None:
        while not stop:
            handle = bench.catalog.get("m").handle
            lease = bench.residency.try_lease(handle)
            if lease is None:
                lease = await bench.residency.lease(handle, NEVER_NS)
            with lease:
                served.append(lease.device)
                await turns(3)

    clients = [asyncio.create_task(client()) for _ in range(50)]
    for position in (1, 0, 1):
        before = len(served)
        await bench.apply(PlanChange(placements={"m": on(position)}))
        await until(lambda: served[-50:] == [position] * 50)  # noqa: B023
        assert set(served[before:]) == {0, 1}
    stop = True
    await bench.run(joined(clients))
    assert bench.residency.counters.load_count == 4


async def test_who_waits_for_a_model_that_moves_gets_it_in_its_new_place(
    bench: PlanBench,
) -> None:
    await bench.add("m", 100, on(0))
    await change_device(bench, 0, drained=True)
    handle = bench.catalog.get("m").handle
    waiting = [asyncio.create_task(bench.residency.lease(handle, NEVER_NS)) for _ in range(30)]
    await turns()
    assert bench.residency.waiting_count == 30
    applied = await bench.apply(PlanChange(placements={"m": on(1)}))
    assert dict(applied.report.models[0].planned) == {1: 100}  # For those who wait.
    leases: list[Lease] = await bench.run(joined(waiting))
    assert {lease.device for lease in leases} == {1}
    for lease in leases:
        lease.release()


async def test_heirs_and_old_copies_are_nobodys_victims_during_the_staging() -> None:
    """Two models that change places where only one more fits: one is staged, and none evicted."""
    bench = PlanBench(*devices_of(250, 250))
    await bench.add("a", 200, on(0), resident=True)
    await bench.add("b", 200, on(1), resident=True)
    await bench.add("small", 40, on(1), resident=True)
    change = PlanChange(placements={"a": on(1), "b": on(0), "small": on(0)})
    report = await bench.plans.forecast(change)
    assert {m.model: m.staged for m in report.models} == {"a": False, "b": False, "small": True}
    applied = await bench.apply(change)
    await bench.settle()
    assert applied.report == report
    assert bench.held() == {"small": {0: 40}}
    await bench.load("a")
    await bench.load("b")
    assert bench.held() == {"a": {1: 200}, "b": {0: 200}, "small": {0: 40}}
    await bench.close()


async def test_the_old_copies_of_others_are_no_victims_either() -> None:
    """However little they are worth: they answer until the switch."""
    bench = PlanBench(*devices_of(300, 300))
    await bench.add("a", 150, on(0), resident=True)
    await bench.add("x", 100, on(1), resident=True)
    await bench.add("wanted", 100, on(1), resident=True)
    for _ in range(50):
        await bench.load("wanted")
    revision = bench.journal.revision
    applied = await bench.apply(PlanChange(placements={"a": on(1), "x": on(0)}))
    assert {m.model: m.staged for m in applied.report.models if m.placement_changed} == {
        "a": True,
        "x": True,
    }
    assert [d.model for d in applied.report.displaced] == ["models/wanted"]
    await bench.settle()
    assert bench.held() == {"a": {1: 150}, "x": {0: 100}}
    assert ("EVICTED", "models/x", "models/a") not in kinds(bench, revision)
    await bench.close()


async def test_heirs_are_loaded_at_once_and_where_the_forecast_says() -> None:
    """Though the device that has most room is loading the first of them."""
    bench = PlanBench(*devices_of(300, 900, 250))
    anywhere = automatic(PlacementStrategy.AUTO, 1, 2)
    for name in ("a", "b"):
        await bench.add(name, 100, on(0), resident=True)
    await bench.add("c", 50, on(0), resident=True)
    change = PlanChange(placements={"a": anywhere, "b": anywhere, "c": on(2)})
    applied = await bench.apply(change)
    await bench.settle()
    assert bench.held() == {m.model: dict(m.planned) for m in applied.report.models}
    assert bench.held() == {"a": {1: 100}, "b": {1: 100}, "c": {2: 50}}
    await bench.close()


async def test_heirs_that_do_not_fit_beside_each_other_are_not_staged_together() -> None:
    bench = PlanBench(*devices_of(400, 250))
    await bench.add("a", 200, on(0), resident=True)
    await bench.add("b", 200, on(0), resident=True)
    applied = await bench.apply(PlanChange(placements={"a": on(1), "b": on(1)}))
    assert {m.model: m.staged for m in applied.report.models} == {"a": True, "b": False}
    await bench.settle()
    assert bench.held() == {"a": {1: 200}}
    await bench.close()


async def test_a_staged_model_may_be_loaded_anywhere_the_next_time(bench: PlanBench) -> None:
    await bench.add("m", 100, on(0), resident=True)
    await bench.apply(PlanChange(placements={"m": None}))
    await bench.settle()
    handle = bench.catalog.get("m").handle
    assert [set(way.charges) for way in handle.ways] == [{0}, {1}]
    (home,) = bench.held()["m"]
    await change_device(bench, home, drained=True)
    await bench.load("m")
    assert bench.held() == {"m": {1 - home: 100}}


async def test_a_pin_moves_along(bench: PlanBench) -> None:
    await bench.add("m", 200, on(0), pinned=True)
    await bench.add("big", 200, on(1), resident=True)
    applied = await bench.apply(PlanChange(placements={"m": on(1)}))
    await bench.settle()
    assert bench.held() == {"m": {1: 200}}
    assert bench.snapshot().pinned == {"m"}
    assert [d.model for d in applied.report.displaced] == ["models/big"]


async def test_a_pinned_model_that_cannot_be_staged_is_loaded_after_the_switch() -> None:
    bench = PlanBench(*devices_of(150, 150))
    await bench.add("m", layers(50, 50), on(0), pinned=True)
    applied = await bench.apply(PlanChange(placements={"m": split(_0=0, _1=1)}))
    assert applied.report.models[0].staged
    await bench.settle()
    applied = await bench.apply(PlanChange(budgets={0: 120, 1: 60}))
    applied = await bench.apply(PlanChange(placements={"m": on(0)}))
    assert not applied.report.models[0].staged
    await bench.settle()
    assert bench.held() == {"m": {0: 100}}
    await bench.close()


async def test_plans_are_applied_one_after_another(bench: PlanBench) -> None:
    await bench.add("m", 100, on(0), resident=True)
    first = start(bench, PlanChange(placements={"m": on(1)}))
    await until(lambda: bool(bench.engine.loads))
    others = [start(bench, PlanChange(placements={"m": on(i % 2)})) for i in range(4)]
    await turns()
    assert len(bench.engine.loads) == 1
    done = await bench.run(joined([first, *others]))
    assert [applied.plan.revision for applied in done] == [1, 2, 3, 4, 5]
    await bench.settle()
    assert bench.held() == {"m": {1: 100}}


async def test_of_plans_with_the_same_etag_one_is_applied(bench: PlanBench) -> None:
    etag = bench.plans.plan().etag
    tasks = [start(bench, PlanChange(budgets={0: 200 + i}), etag=etag) for i in range(5)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], Applied)
    for refusal in results[1:]:
        assert isinstance(refusal, Refusal)
        assert refusal.reason is Reason.ETAG_MISMATCH
    assert bench.plans.plan().devices[0].budget_bytes == 200


async def test_what_is_done_is_told_with_its_cause(bench: PlanBench) -> None:
    await bench.add("mover", 200, on(0), resident=True)
    await bench.add("idle", 200, on(1), resident=True)
    await bench.add("shrunk", 90, on(0), resident=True)
    await bench.add("cold", 10)
    revision = bench.journal.revision
    await bench.apply(
        PlanChange(budgets={0: 95}, drained={0: True}, placements={"mover": on(1), "cold": on(1)})
    )
    await bench.settle()
    told = kinds(bench, revision)
    assert ("EVICTED", "models/idle", "models/mover") in told
    assert ("BUDGET_CHANGED", A, "operator") in told
    assert ("DEVICE_DRAINED", A, "operator") in told
    assert [each for each in told if each[0] == "PLACEMENT_CHANGED"] == [
        ("PLACEMENT_CHANGED", "models/cold", "operator"),
        ("PLACEMENT_CHANGED", "models/mover", "operator"),
    ]
    assert ("PLAN_APPLIED", "plan", "operator") in told
    left = [each for each in told if each[1] == "models/shrunk" and each[0] == "EVICTED"]
    assert left == [("EVICTED", "models/shrunk", A)]
    assert not [each for each in told if each[0] == "PLAN_ROLLED_BACK"]
