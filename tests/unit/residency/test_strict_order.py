"""Strict order of arrival, in the residency shell."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.support.fake_engine import turns
from tests.support.residency_bench import BUDGET, refusal_of

from modelyard_server.errors import Reason
from modelyard_server.residency.values import NEVER_NS
from modelyard_server.runtimes.api import ModelFilesError


async def test_in_order_of_arrival_nobody_is_overtaken(benches: Any) -> None:
    bench = benches(order="fifo")
    hot, cold = bench.add("hot"), bench.add("cold")
    await bench.load_and_release(hot)
    first = await bench.wait_for(cold)
    # Its model is there, and it waits: somebody was here before.
    assert bench.residency.try_lease(hot) is None
    second = await bench.wait_for(hot)
    third = await bench.wait_for(cold)
    assert bench.residency.use(cold).waiting_count == 1
    assert bench.residency.waiting_count == 3
    assert not second.done()
    bench.engine.loads[cold.core_id].finish(100)
    for waiter in (first, second, third):
        (await waiter).release()
    with bench.residency.try_lease(hot) as lease:
        assert lease.wait_s == 0.0


async def test_in_order_of_arrival_one_load_at_a_time_is_asked_for(benches: Any) -> None:
    bench = benches(order="fifo")
    here, there = bench.add("here", 100, 0), bench.add("there", 100, 1)
    waiters = [await bench.wait_for(here), await bench.wait_for(there)]
    assert bench.engine.load_log == ["here"]
    bench.engine.loads[here.core_id].finish(100)
    await turns()
    assert bench.engine.load_log == ["here", "there"]
    bench.engine.loads[there.core_id].finish(100)
    for waiter in waiters:
        (await waiter).release()


async def test_what_an_operator_asks_for_does_not_stand_in_line(benches: Any) -> None:
    bench = benches(order="fifo")
    hot, cold, wished = bench.add("hot"), bench.add("cold"), bench.add("wished", 100, 1)
    await bench.load_and_release(hot)
    waiter = await bench.wait_for(cold)
    bench.residency.try_lease(hot, asked=True).release()
    bench.residency.want(wished)
    staged = asyncio.create_task(bench.residency.lease(wished, NEVER_NS, asked=True))
    await turns()
    bench.engine.loads[wished.core_id].finish(100)
    (await staged).release()
    bench.engine.loads[cold.core_id].finish(100)
    (await waiter).release()


async def test_a_refusal_of_who_is_in_front_lets_the_next_one_go_on(benches: Any) -> None:
    bench = benches(order="fifo")
    large, failing, model = bench.add("large", BUDGET + 1), bench.add("failing"), bench.add("m")
    waiters = [await bench.wait_for(m) for m in (failing, large, model)]
    bench.engine.loads[failing.core_id].fail(ModelFilesError("no files"))
    await turns()
    assert (await refusal_of(waiters[0])).reason is Reason.LOAD_FAILED
    assert (await refusal_of(waiters[1])).reason is Reason.MODEL_NEVER_FITS
    bench.engine.loads[model.core_id].finish(100)
    (await waiters[2]).release()


async def test_cancelling_who_is_in_front_lets_the_next_one_go_on(benches: Any) -> None:
    bench = benches(order="fifo")
    first, second = bench.add("first", 100, 0), bench.add("second", 100, 1)
    gone, stays = await bench.wait_for(first), await bench.wait_for(second)
    gone.cancel()
    await turns()
    assert bench.engine.load_log == ["first", "second"]
    for model in (first, second):
        bench.engine.loads[model.core_id].finish(100)
    (await stays).release()


async def test_close_refuses_who_stands_in_line(benches: Any) -> None:
    bench = benches(order="fifo")
    model = bench.add("m")
    waiters = [await bench.wait_for(model) for _ in range(3)]
    await bench.end()
    reasons = {(await refusal_of(waiter)).reason for waiter in waiters}
    assert reasons == {Reason.SERVER_DRAINING}
