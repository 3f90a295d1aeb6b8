"""Models that come and go by an operator's word, and memory that is late."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.fake_engine import turns
from tests.support.residency_bench import BUDGET, refusal_of

from modelyard_server.errors import Reason, Refusal
from modelyard_server.residency import transfers
from modelyard_server.residency.values import State
from modelyard_server.runtimes.api import ModelFilesError

# --- By hand --------------------------------------------------------------------------------------


async def test_want_loads_and_keeps_no_lease(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    bench.residency.want(model)
    await turns()
    assert bench.residency.use(model).waiting_count == 1
    bench.engine.loads[model.core_id].finish(100)
    await turns()
    assert bench.state(model) == State.RESIDENT
    assert bench.residency.lease_count == 0
    bench.residency.want(model)
    assert bench.residency.lease_count == 0
    assert bench.engine.load_log == ["m"]


async def test_want_is_refused_as_a_request_would_be(benches: Any) -> None:
    bench = benches()
    model = bench.add("m", BUDGET + 1)
    with pytest.raises(Refusal) as caught:
        bench.residency.want(model)
    assert caught.value.reason is Reason.MODEL_NEVER_FITS
    assert bench.residency.waiting_count == 0


async def test_a_late_failure_of_what_was_wanted_is_the_models_state(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    bench.residency.want(model)
    await turns()
    bench.engine.loads[model.core_id].fail(ModelFilesError("cut short"))
    await turns()
    assert bench.residency.use(model).failure_text == "cut short"


async def test_unload_returns_when_the_memory_is_back(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    lease = await bench.load(model)
    unload = asyncio.create_task(bench.residency.unload(model))
    await turns()
    assert bench.state(model) == State.DRAINING
    lease.release()
    await turns()
    assert bench.state(model) == State.UNLOADING
    assert not unload.done()
    bench.engine.unloads[model.core_id].finish()
    await unload
    assert bench.state(model) == State.COLD
    assert bench.residency.device_use(0).resident == 0
    await bench.residency.unload(model)


async def test_unload_of_a_pinned_model_is_refused(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    await bench.load_and_release(model)
    bench.residency.set_pinned(model, True)
    with pytest.raises(Refusal) as caught:
        await bench.residency.unload(model)
    assert caught.value.reason is Reason.MODEL_IN_USE
    assert bench.state(model) == State.RESIDENT
    bench.residency.set_pinned(model, False)


async def test_unload_of_a_model_that_loads_stops_the_load(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    bench.residency.want(model)
    await turns()
    tickets = bench.residency._tickets._futures
    for ticket in tickets:
        bench.residency._carry_out(bench.residency._yard.cancel(ticket, 0))
    tickets.clear()
    load = bench.engine.loads[model.core_id]
    await bench.residency.unload(model)
    assert load.cancelled
    assert bench.state(model) == State.COLD


async def test_unload_of_a_model_somebody_waits_for_lets_it_be_loaded_again(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    lease = await bench.load(model)
    unload = asyncio.create_task(bench.residency.unload(model))
    await turns()
    waiter = await bench.wait_for(model)
    lease.release()
    await turns()
    bench.engine.unloads[model.core_id].finish()
    await asyncio.wait_for(unload, 1)
    await turns()
    bench.engine.loads[model.core_id].finish(100)
    (await waiter).release()


async def test_a_caller_of_unload_that_leaves_does_not_stop_it(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    await bench.load_and_release(model)
    unload = asyncio.create_task(bench.residency.unload(model))
    await turns()
    unload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await unload
    bench.engine.unloads[model.core_id].finish()
    await turns()
    assert bench.state(model) == State.COLD


async def test_a_load_that_is_to_stop_while_it_is_priced_is_not_begun(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    bench.engine.price_gate = asyncio.Event()
    waiter = await bench.wait_for(model)
    bench.residency.remove(model)
    refusal = await refusal_of(waiter)
    assert refusal.reason is Reason.MODEL_NOT_FOUND
    bench.engine.price_gate.set()
    await turns()
    assert bench.engine.load_log == []


async def test_a_load_that_is_to_stop_in_the_turn_it_was_asked_for_is_not_begun(
    benches: Any,
) -> None:
    bench = benches()
    model = bench.add("m")
    bench.residency.want(model)
    bench.residency.remove(model)
    await turns()
    assert bench.engine.load_log == []
    assert not bench.residency._handles
    assert bench.residency.device_use(0).reserved == 0


# --- Removal --------------------------------------------------------------------------------------


async def test_removing_a_waited_for_model_refuses_its_waiters(benches: Any) -> None:
    bench = benches()
    busy, model = bench.add("busy", 200), bench.add("m", 200)
    lease = await bench.load(busy)
    waiter = await bench.wait_for(model)
    bench.residency.remove(model)
    assert (await refusal_of(waiter)).reason is Reason.MODEL_NOT_FOUND
    assert bench.residency.use(model).state == State.COLD
    assert model.core_id not in bench.residency._handles
    lease.release()


async def test_removing_a_loading_model_stops_the_load(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    waiter = await bench.wait_for(model)
    load = bench.engine.loads[model.core_id]
    bench.residency.remove(model)
    assert (await refusal_of(waiter)).reason is Reason.MODEL_NOT_FOUND
    await turns()
    assert load.cancelled
    assert not bench.residency._handles
    assert bench.residency.device_use(0).reserved == 0


async def test_a_removed_model_whose_load_ends_all_the_same_is_unloaded(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    waiter = await bench.wait_for(model)
    bench.engine.loads[model.core_id].finish(100)  # Before the removal can stop it.
    bench.residency.remove(model)
    await refusal_of(waiter)
    await turns()
    bench.engine.unloads[model.core_id].finish()
    await turns()
    assert not bench.residency._handles
    assert bench.residency.device_use(0).draining == 0


async def test_removing_a_leased_model_lets_its_requests_end(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    lease = await bench.load(model)
    bench.residency.set_pinned(model, True)
    bench.residency.remove(model)
    await turns()
    assert model.core_id in bench.engine.held
    lease.release()
    await turns()
    bench.engine.unloads[model.core_id].finish()
    await turns()
    assert not bench.residency._handles
    assert bench.residency.use(model).charges == {}


# --- Quarantine -----------------------------------------------------------------------------------


async def test_quarantined_bytes_come_back_when_they_are_found(
    benches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "_RECHECK_S", (0.0,))
    bench = benches()
    model, other = bench.add("m", 200), bench.add("other", 200)
    await bench.load_and_release(model)
    unload = asyncio.create_task(bench.residency.unload(model))
    await turns()
    bench.engine.unloads[model.core_id].finish(leaked=150)
    await unload
    assert bench.residency.use(model).quarantined == {0: 150}
    assert bench.residency.device_use(0).quarantined == 150
    refusal = await refusal_of(await bench.wait_for(other))
    assert refusal.reason is Reason.BUDGET_EXHAUSTED

    bench.engine.back[model.core_id, 0] = 50
    await turns()
    assert bench.residency.use(model).quarantined == {0: 100}
    bench.engine.back[model.core_id, 0] = 100
    await turns()
    assert bench.residency.use(model).quarantined == {}
    assert not bench.residency._actions._transfers.count
    await bench.load_and_release(other)


async def test_a_removed_model_is_forgotten_when_its_last_byte_is_back(
    benches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "_RECHECK_S", (0.0,))
    bench = benches()
    model = bench.add("m")
    await bench.load_and_release(model)
    bench.residency.remove(model)
    await turns()
    bench.engine.unloads[model.core_id].finish(leaked=30)
    await turns()
    assert model.core_id in bench.residency._handles
    bench.engine.back[model.core_id, 0] = 30
    await turns()
    assert not bench.residency._handles
    assert bench.residency.device_use(0).quarantined == 0


async def test_leaks_of_one_model_on_two_devices_come_back_each_to_its_own(
    benches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "_RECHECK_S", (0.0,))
    bench = benches()
    model, pinned = bench.add("m", 200, 0, 1), bench.add("pinned", 200, 0)
    for _ in range(2):
        await bench.load_and_release(model)
        unload = asyncio.create_task(bench.residency.unload(model))
        await turns()
        bench.engine.unloads[model.core_id].finish(leaked=100)
        await unload
        if not bench.residency.use(pinned).load_count:
            bench.residency.set_budget(0, 400)
            await bench.load_and_release(pinned)
    assert bench.residency.use(model).quarantined == {0: 100, 1: 100}
    bench.engine.back = {(model.core_id, 0): 100, (model.core_id, 1): 100}
    await turns()
    assert bench.residency.use(model).quarantined == {}
