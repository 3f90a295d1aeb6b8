"""Leases of the residency shell: hits, misses, and clients that leave."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.fake_engine import turns
from tests.support.residency_bench import Bench

from modelyard_server.residency.values import NEVER_NS, ModelHandle, State
from modelyard_server.runtimes.api import ModelFilesError

# --- Hits and misses ------------------------------------------------------------------------------


async def test_concurrent_requests_for_a_cold_model_are_one_load(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    waiters = [await bench.wait_for(model) for _ in range(5)]
    assert bench.engine.load_log == ["m"]
    assert bench.residency.use(model).waiting_count == 5
    bench.engine.loads[model.core_id].finish(100)
    leases = await asyncio.gather(*waiters)
    assert bench.residency.use(model).lease_count == 5
    assert all(lease.handle is model and lease.device == 0 for lease in leases)
    for lease in leases:
        lease.release()
    assert bench.engine.load_log == ["m"]


async def test_what_an_operator_asks_for_is_told_as_theirs(benches: Any) -> None:
    bench = benches()
    wished, requested = bench.add("wished"), bench.add("requested", 100, 1)
    bench.residency.want(wished)
    await bench.load_and_release(requested)
    events, _ = bench.residency.journal.events_after(0)
    causes = {(event.type.name, event.subject): event.cause for event in events}
    assert causes["QUEUED", "models/wished"] == "operator"
    assert causes["LOAD_STARTED", "models/wished"] == "operator"
    assert causes["QUEUED", "models/requested"] == ""
    assert causes["LOAD_STARTED", "models/requested"] == ""
    bench.engine.loads[wished.core_id].finish(100)
    await turns()


async def test_a_hit_is_one_call_and_a_miss_is_none(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    assert bench.residency.try_lease(model) is None
    assert not bench.engine.priced
    await bench.load_and_release(model)
    with bench.residency.try_lease(model) as lease:
        assert (lease.wait_s, lease.load_s) == (0.0, None)
        assert bench.residency.use(model).lease_count == 1
    assert bench.residency.lease_count == 0


async def test_a_hit_does_not_wait_for_somebody_elses_load(benches: Any) -> None:
    bench = benches()
    hot, cold = bench.add("hot"), bench.add("cold")
    await bench.load_and_release(hot)
    waiter = await bench.wait_for(cold)
    assert bench.state(cold) == State.LOADING
    lease = await asyncio.wait_for(bench.residency.lease(hot, NEVER_NS), 1)
    lease.release()
    bench.engine.loads[cold.core_id].finish(100)
    (await waiter).release()


async def test_a_lease_tells_how_long_it_waited_and_loaded(benches: Any) -> None:
    bench = benches()
    first, second = bench.add("first", 200), bench.add("second", 200)
    held = await bench.load(first)
    waiter = await bench.wait_for(second)
    bench.clock.advance(3)
    held.release()
    await turns()
    bench.engine.unloads[first.core_id].finish()
    await turns()
    assert second.load_started is not None
    bench.engine.loads[second.core_id].finish(200)
    lease = await waiter
    assert lease.wait_s == pytest.approx(3.0)
    assert lease.load_s is not None
    assert 0 <= lease.load_s < 3
    assert second.load_started is None
    lease.release()


async def test_a_model_is_loaded_onto_the_device_with_room(benches: Any) -> None:
    bench = benches()
    big, other = bench.add("big", 200, 0), bench.add("other", 100, 0, 1)
    await bench.load_and_release(big)
    lease = await bench.load(other)
    assert lease.device == bench.residency.device_of(other) == 1
    assert bench.residency.use(other).charges == {1: 100}
    assert bench.residency.device_use(1).resident == 100
    lease.release()


async def test_a_victim_is_gone_before_its_successor_is_loaded(benches: Any) -> None:
    bench = benches()
    old, new = bench.add("old", 200), bench.add("new", 200)
    await bench.load_and_release(old)
    waiter = await bench.wait_for(new)
    assert bench.state(old) == State.UNLOADING
    assert bench.engine.load_log == ["old"]
    bench.engine.unloads[old.core_id].finish()
    await turns()
    assert bench.engine.load_log == ["old", "new"]
    bench.engine.loads[new.core_id].finish(200)
    (await waiter).release()
    assert bench.residency.device_use(0).peak == 200


async def test_counters_are_back_at_zero_after_many_requests(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    await bench.load_and_release(model)
    for _ in range(24):
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(_use_once(bench, model))
    use = bench.residency.use(model)
    assert (use.lease_count, use.waiting_count, use.load_count) == (0, 0, 1)
    assert bench.residency.counters.hit_count == 96


async def _use_once(bench: Bench, model: ModelHandle) -> None:
    with await bench.residency.lease(model, NEVER_NS):
        await turns(1)


# --- Clients that leave ---------------------------------------------------------------------------


async def test_a_cancelled_waiter_takes_its_ticket_back_and_nothing_else(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    gone, stays = await bench.wait_for(model), await bench.wait_for(model)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert bench.residency.use(model).waiting_count == 1
    bench.engine.loads[model.core_id].finish(100)
    (await stays).release()


async def test_a_load_goes_on_when_its_last_waiter_has_gone(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    gone = await bench.wait_for(model)
    gone.cancel()
    await turns()
    assert bench.state(model) == State.LOADING
    assert not bench.engine.loads[model.core_id].cancelled
    bench.engine.loads[model.core_id].finish(100)
    await turns()
    assert bench.state(model) == State.RESIDENT


async def test_a_load_that_has_not_begun_is_dropped_with_its_last_waiter(benches: Any) -> None:
    bench = benches()
    busy, model = bench.add("busy", 200), bench.add("m", 200)
    lease = await bench.load(busy)
    gone = await bench.wait_for(model)
    assert bench.state(model) == State.QUEUED
    gone.cancel()
    await turns()
    assert bench.state(model) == State.COLD
    lease.release()
    await turns()
    assert bench.state(busy) == State.RESIDENT
    assert bench.engine.load_log == ["busy"]


async def test_cancelling_a_waiter_serves_the_one_behind_it(benches: Any) -> None:
    bench = benches(overdue_after_s=1.0)
    busy, big, small = bench.add("busy"), bench.add("big", 250), bench.add("small", 50)
    lease = await bench.load(busy)
    first = await bench.wait_for(big)
    bench.clock.advance(2)
    second = await bench.wait_for(small)
    assert bench.state(small) == State.QUEUED
    first.cancel()
    await turns()
    assert bench.state(small) == State.LOADING
    bench.engine.loads[small.core_id].finish(50)
    (await second).release()
    lease.release()


async def test_cancelled_after_the_grant_the_lease_goes_back(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    waiter = await bench.wait_for(model)
    bench.engine.loads[model.core_id].finish(100)
    # After the load's task has granted, before the waiter's has seen it.
    asyncio.get_running_loop().call_soon(waiter.cancel)
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert bench.residency.use(model).load_count == 1
    assert bench.residency.lease_count == 0


async def test_cancelled_just_before_the_grant_no_lease_is_left(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    waiter = await bench.wait_for(model)
    asyncio.get_running_loop().call_soon(waiter.cancel)
    bench.engine.loads[model.core_id].finish(100)
    with pytest.raises(asyncio.CancelledError):
        await waiter
    await turns()
    assert bench.state(model) == State.RESIDENT
    assert bench.residency.lease_count == 0


async def test_cancelled_after_the_refusal_nothing_is_left(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    waiter = await bench.wait_for(model)
    bench.engine.loads[model.core_id].fail(ModelFilesError("cut short"))
    asyncio.get_running_loop().call_soon(waiter.cancel)
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert bench.residency.waiting_count == 0
