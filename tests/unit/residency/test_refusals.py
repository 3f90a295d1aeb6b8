"""Whom the residency shell refuses: at once, and when a deadline has passed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.fake_engine import turns
from tests.support.residency_bench import BUDGET, Bench, refusal_of

from modelyard_server.errors import Code, Reason
from modelyard_server.residency.shell import Lease
from modelyard_server.residency.values import ModelHandle, State

# --- Refusals -------------------------------------------------------------------------------------


async def test_a_model_larger_than_its_budget_is_refused_at_once(benches: Any) -> None:
    bench = benches()
    old, model = bench.add("old"), bench.add("m", BUDGET + 1)
    await bench.load_and_release(old)
    refusal = await refusal_of(await bench.wait_for(model))
    assert refusal.reason is Reason.MODEL_NEVER_FITS
    assert refusal.retry_after_s is None
    assert [violation.field for violation in refusal.violations] == ["devices/d0"]
    assert bench.state(old) == State.RESIDENT


async def test_pinned_models_that_leave_no_room_are_named(benches: Any) -> None:
    bench = benches()
    pinned, model = bench.add("pinned", 200), bench.add("m", 100)
    await bench.load_and_release(pinned)
    bench.residency.set_pinned(pinned, True)
    refusal = await refusal_of(await bench.wait_for(model))
    assert refusal.reason is Reason.BUDGET_EXHAUSTED
    assert refusal.metadata == {
        "device": "devices/d0",
        "needed_bytes": "100",
        "free_bytes": "50",
        "holders": "pinned=200",
    }
    assert refusal.quota
    bench.residency.set_pinned(pinned, False)


async def test_a_full_queue_refuses_with_a_time_to_come_again(benches: Any) -> None:
    bench = benches(max_waiting_per_model=1)
    model = bench.add("m")
    first = await bench.wait_for(model)
    refusal = await refusal_of(await bench.wait_for(model))
    assert refusal.reason is Reason.QUEUE_FULL
    assert refusal.retry_after_s is not None
    assert refusal.retry_after_s > 0
    assert refusal.quota
    bench.engine.loads[model.core_id].finish(100)
    (await first).release()


async def test_a_deadline_that_has_passed_is_refused_at_once(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    bench.clock.advance(5)
    refusal = await refusal_of(await bench.wait_for(model, 5 * 10**9))
    assert refusal.reason is Reason.DEADLINE_IN_QUEUE
    assert bench.engine.load_log == []


async def busy_with(bench: Bench, handle: ModelHandle, count: int) -> list[Lease]:
    """Leases of a model that ends a request a second, and has so many to go."""
    leases = [await bench.load(handle)]
    for _ in range(count + 7):
        lease = bench.residency.try_lease(handle)
        assert lease is not None
        leases.append(lease)
    for lease in leases[:8]:
        bench.clock.advance(1)
        lease.release()
    return leases[8:]


async def test_a_hit_that_would_be_answered_too_late_is_refused_at_once(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    leases = await busy_with(bench, model, 10)
    soon_ns = bench.now_ns() + 4 * 10**9
    assert bench.residency.try_lease(model, soon_ns) is None
    refusal = await refusal_of(await bench.wait_for(model, soon_ns))
    assert refusal.reason is Reason.DEADLINE_UNREACHABLE
    assert refusal.code is Code.RESOURCE_EXHAUSTED
    assert refusal.metadata == {"ready_in_ms": "11000", "deadline_in_ms": "4000"}
    assert refusal.retry_after_s == pytest.approx(11 * 1.25 - 4)
    assert refusal.quota
    in_time = bench.residency.try_lease(model, bench.now_ns() + 14 * 10**9)
    assert in_time is not None
    for lease in (*leases, in_time):
        lease.release()


async def test_leases_that_are_set_aside_make_no_deadline_unreachable(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    leases = await busy_with(bench, model, 10)
    soon_ns = bench.now_ns() + 4 * 10**9
    assert bench.residency.try_lease(model, soon_ns) is None
    for lease in leases:
        lease.set_aside()
        lease.set_aside()
    bench.residency.audit()
    granted = bench.residency.try_lease(model, soon_ns)
    assert granted is not None
    granted.release()
    # The model is in use all the same.
    assert bench.residency.use(model).lease_count == len(leases)
    bench.clock.advance(60)
    for lease in leases:
        lease.release()
    bench.residency.audit()


async def test_a_load_that_takes_too_long_is_refused_at_once(benches: Any) -> None:
    bench = benches(real_clock=True)
    model = bench.add("m")
    loading = await bench.wait_for(model)
    await asyncio.sleep(0.05)  # What the load takes, at least.
    bench.engine.loads[model.core_id].finish(100)
    (await loading).release()
    leaving = asyncio.create_task(bench.residency.unload(model))
    await turns()
    bench.engine.unloads[model.core_id].finish()
    await leaving
    # So soon that even its being passed already would be told as something else.
    refusal = await refusal_of(await bench.wait_for(model, bench.now_ns() + 40_000_000))
    assert refusal.reason is Reason.DEADLINE_UNREACHABLE
    assert bench.residency.waiting_count == 0
    assert bench.state(model) is State.LOADING, "for who comes again"


# --- Wake-ups -------------------------------------------------------------------------------------


async def test_a_deadline_in_the_queue_wakes_the_waiter(benches: Any) -> None:
    bench = benches(real_clock=True)
    busy, model = bench.add("busy", 200), bench.add("m", 200)
    lease = await bench.load(busy)
    refusal = await refusal_of(await bench.wait_for(model, bench.now_ns() + 2_000_000))
    assert refusal.reason is Reason.DEADLINE_IN_QUEUE
    assert bench.state(model) == State.COLD
    lease.release()


async def test_a_deadline_in_the_load_wakes_the_waiter_and_the_load_goes_on(benches: Any) -> None:
    bench = benches(real_clock=True)
    model = bench.add("m")
    refusal = await refusal_of(await bench.wait_for(model, bench.now_ns() + 2_000_000))
    assert refusal.reason is Reason.DEADLINE_IN_LOAD
    assert bench.state(model) == State.LOADING
    bench.engine.loads[model.core_id].finish(100)
    await turns()
    assert bench.state(model) == State.RESIDENT


async def test_an_earlier_deadline_is_not_behind_a_later_one(benches: Any) -> None:
    bench = benches(real_clock=True)
    model = bench.add("m")
    late = await bench.wait_for(model, bench.now_ns() + 3600 * 10**9)
    soon = await bench.wait_for(model, bench.now_ns() + 2_000_000)
    await refusal_of(soon)
    assert not late.done()
    bench.engine.loads[model.core_id].finish(100)
    (await late).release()


async def test_a_model_in_endless_use_is_drained_for_a_request_that_is_overdue(
    benches: Any,
) -> None:
    bench = benches(real_clock=True, overdue_after_s=0.002)
    hot, cold = bench.add("hot", 200), bench.add("cold", 200)
    lease = await bench.load(hot)
    waiter = await bench.wait_for(cold)
    async with asyncio.timeout(60):
        while bench.state(hot) != State.DRAINING:
            await turns(1)
    assert bench.residency.try_lease(hot) is None
    lease.release()
    await turns()
    bench.engine.unloads[hot.core_id].finish()
    await turns()
    bench.engine.loads[cold.core_id].finish(200)
    (await waiter).release()
