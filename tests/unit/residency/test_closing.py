"""The end of a residency: who waits is refused, what runs is waited for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.fake_engine import turns
from tests.support.residency_bench import refusal_of

from modelyard_server.errors import Reason
from modelyard_server.residency import transfers


async def test_close_refuses_who_waits(benches: Any) -> None:
    bench = benches()
    busy, model = bench.add("busy", 200), bench.add("m", 200)
    lease = await bench.load(busy)
    waiters = [await bench.wait_for(model) for _ in range(3)]
    lease.release()
    await bench.end()
    for waiter in waiters:
        refusal = await refusal_of(waiter)
        assert refusal.reason is Reason.SERVER_DRAINING
        assert refusal.retry_after_s == 1.0


async def test_close_stops_the_loads_that_run_and_begins_no_others(benches: Any) -> None:
    bench = benches()
    models = [bench.add(f"m{i}") for i in range(3)]
    waiters = [await bench.wait_for(model) for model in models]
    load = bench.engine.loads[models[0].core_id]
    await bench.end()
    assert load.cancelled
    assert bench.engine.load_log == ["m0"]
    for waiter in waiters:
        await refusal_of(waiter)


async def test_close_while_the_first_in_the_queue_gives_way_begins_no_load(benches: Any) -> None:
    bench = benches(overdue_after_s=1.0)
    busy, big, small = bench.add("busy"), bench.add("big", 250), bench.add("small", 50)
    lease = await bench.load(busy)
    first = await bench.wait_for(big)
    bench.clock.advance(2)
    second = await bench.wait_for(small)
    lease.release()
    await bench.end()
    assert "small" not in bench.engine.load_log
    for waiter in (first, second):
        assert (await refusal_of(waiter)).reason is Reason.SERVER_DRAINING


async def test_close_waits_for_unloads_that_run(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    await bench.load_and_release(model)
    unload = asyncio.create_task(bench.residency.unload(model))
    await turns()
    closing = asyncio.create_task(bench.residency.close(10))
    await turns()
    assert not closing.done()
    bench.engine.unloads[model.core_id].finish()
    await closing
    await unload


async def test_close_when_several_deadlines_have_just_passed(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    waiters = [await bench.wait_for(model, (5 + i) * 10**9) for i in range(3)]
    bench.clock.advance(60)  # And the loop has not come to the timer yet.
    await bench.end()
    for waiter in waiters:
        await refusal_of(waiter)


async def test_close_does_not_wait_for_bytes_that_may_never_come_back(
    benches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "_RECHECK_S", (3600.0,))
    bench = benches()
    model = bench.add("m")
    await bench.load_and_release(model)
    unload = asyncio.create_task(bench.residency.unload(model))
    await turns()
    bench.engine.unloads[model.core_id].finish(leaked=30)
    await unload
    await bench.end()


async def test_nothing_is_waited_for_after_close(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    waiters = [await bench.wait_for(model, (5 + i) * 10**9) for i in (0, 3600)]
    bench.clock.advance(6)
    await bench.end()
    timer = bench.residency._actions._timer
    assert timer is None or timer.cancelled()
    for waiter in waiters:
        await refusal_of(waiter)
