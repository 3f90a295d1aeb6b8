"""A device plan that fails is taken back: everything is as it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest
from tests.support.fake_engine import turns
from tests.support.plan_bench import PlanBench, Snapshot, devices_of
from tests.support.plan_steps import (
    change_device,
    finished,
    kinds,
    on,
    refusal_of,
    start,
    until,
)

from modelyard_server.catalog.plans import PlanChange
from modelyard_server.catalog.store import StorageFailed
from modelyard_server.errors import Code, Reason
from modelyard_server.residency.journal import EventType
from modelyard_server.runtimes.api import ModelFilesError


@pytest.fixture
async def bench() -> AsyncIterator[PlanBench]:
    """Two devices of 300 bytes."""
    found = PlanBench(*devices_of(300, 300))
    yield found
    await found.close()


# --- All or nothing -------------------------------------------------------------------------------


async def busy_bench() -> PlanBench:
    """Two models that a plan moves, one of them in use, and one that has to leave for them."""
    bench = PlanBench(*devices_of(400, 300, 100))
    await bench.add("a", 100, on(0), resident=True)
    await bench.add("b", 150, on(0), pinned=True)
    await bench.add("idle", 200, on(1), resident=True)
    await bench.add("aside", 60, on(2), resident=True)
    await change_device(bench, 2, drained=True)
    await bench.settle()
    return bench


PLAN = PlanChange(
    budgets={0: 260, 1: 350, 2: 200},
    drained={2: False},
    placements={"a": on(1), "b": on(1)},
)


async def as_before(
    bench: PlanBench, before: Snapshot, revision: int, *, told: bool = True
) -> None:
    """Everything is as it was, and it was told that a plan was taken back."""
    await bench.settle()
    assert bench.snapshot() == before
    names = [kind for kind, _, _ in kinds(bench, revision)]
    assert names.count("PLAN_ROLLED_BACK") == int(told)
    assert not {"PLAN_APPLIED", "PLACEMENT_CHANGED"} & set(names)


@pytest.mark.parametrize("transient", [True, False])
@pytest.mark.parametrize("victim", ["a", "b"])
async def test_a_failed_load_of_one_heir_takes_everything_back(
    victim: str, transient: bool
) -> None:
    bench = await busy_bench()
    before, revision = bench.snapshot(), bench.journal.revision
    bench.failing[victim] = ModelFilesError("asked to fail", transient=transient)
    refusal = await refusal_of(bench.apply(PLAN))
    bench.failing.clear()
    assert refusal.reason is Reason.LOAD_FAILED
    assert refusal.code is (Code.UNAVAILABLE if transient else Code.FAILED_PRECONDITION)
    assert f"models/{victim}" in refusal.text
    assert "asked to fail" in refusal.text
    await as_before(bench, before, revision)
    event = next(e for e in bench.events(revision) if e.type is EventType.PLAN_ROLLED_BACK)
    assert (event.subject, event.cause) == ("plan", "operator")
    assert "asked to fail" in event.description
    # It is told after it has been done.
    assert bench.residency.device_use(1).budget == 300
    # And the very same plan can be applied, once the reason has gone.
    await bench.apply(PLAN)
    await bench.close()


async def test_a_store_that_cannot_be_written_takes_everything_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = await busy_bench()
    before, revision = bench.snapshot(), bench.journal.revision

    async def failing(change: object) -> int:
        raise StorageFailed("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(bench.store, "write", failing)
        refusal = await refusal_of(bench.apply(PLAN))
    assert refusal.reason is Reason.CATALOG_UNAVAILABLE
    await as_before(bench, before, revision)
    await bench.apply(PLAN)
    await bench.close()


async def test_a_deadline_takes_everything_back() -> None:
    bench = await busy_bench()
    before, revision = bench.snapshot(), bench.journal.revision
    task = start(bench, PLAN, deadline_ns=bench.deadline(10))
    await until(lambda: bool(bench.engine.loads or bench.engine.unloads))
    await turns()
    bench.clock.advance(11)
    bench.residency.set_pinned(bench.catalog.get("aside").handle, False)  # Some event.
    refusal = await refusal_of(bench.run(finished(task)))
    assert refusal.reason is Reason.DEADLINE_IN_LOAD
    await as_before(bench, before, revision)
    await bench.close()


async def test_a_caller_that_is_cancelled_leaves_all_or_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cancelled after every number of turns of the loop, so at every await."""
    taken_back = applied = 0
    ended = False
    for count in range(1000):
        bench = await busy_bench()

        async def at_once(function: Callable[[], Any]) -> Any:
            await asyncio.sleep(0)
            return function()

        monkeypatch.setattr(bench.store, "_in_thread", at_once)
        before, revision = bench.snapshot(), bench.journal.revision
        task = start(bench, PLAN)
        for _ in range(count):
            await asyncio.sleep(0)
            for load in bench.engine.loads.values():
                if not load.future.done():
                    load.finish()
            for unload in bench.engine.unloads.values():
                if not unload.future.done():
                    unload.finish()
        ended = task.done()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await bench.run(finished(task))
        await bench.settle()
        if bench.plans.plan().revision == 2:
            applied += 1
            assert bench.held() == {"a": {1: 100}, "b": {1: 150}}
            assert bench.snapshot().devices == ((260, False), (350, False), (200, False))
            assert [k for k, _, _ in kinds(bench, revision)].count("PLAN_APPLIED") == 1
            assert not [k for k, _, _ in kinds(bench, revision) if k == "PLAN_ROLLED_BACK"]
            assert bench.store.read().plan_revision == 2
        else:
            taken_back += 1
            began = any(kind == "LOAD_STARTED" for kind, _, _ in kinds(bench, revision))
            told = any(kind == "PLAN_ROLLED_BACK" for kind, _, _ in kinds(bench, revision))
            assert told or not began
            await as_before(bench, before, revision, told=told)
        await bench.close()
        if ended:
            break
    assert ended
    assert taken_back > 5
    assert applied > 1  # Also cancelled while it was being written.
