"""The residency shell over an engine whose every step the test decides."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.support.fake_engine import FakeClock, FakeEngine, turns

from modelyard_server.devices.placed import PlacedAs, whole
from modelyard_server.errors import Code, Reason, Refusal
from modelyard_server.residency import transfers
from modelyard_server.residency.shell import Lease, Residency
from modelyard_server.residency.values import NEVER_NS, ModelHandle, State, YardSettings
from modelyard_server.runtimes.api import ModelFilesError, ModelSpec, Price

BUDGET = 250


class Bench:
    """A residency of one or two devices of BUDGET bytes, and how a test moves it."""

    def __init__(self, *, real_clock: bool = False, **settings: Any) -> None:
        self.engine = FakeEngine()
        self.clock = FakeClock()
        self.now_ns: Callable[[], int] = time.monotonic_ns if real_clock else self.clock
        values: dict[str, Any] = {"budgets": (BUDGET, BUDGET)} | settings
        self.residency = Residency(
            settings=YardSettings(**values),
            device_names=[f"devices/d{i}" for i in range(len(values["budgets"]))],
            engine=self.engine,
            now_ns=self.now_ns,
        )
        self.waiters: set[asyncio.Task[Lease]] = set()

    def add(self, name: str, size: int = 100, *placements: int) -> ModelHandle:
        self.engine.prices[name] = size
        devices = placements or (0,)

        def replan(price: Price) -> tuple[PlacedAs, ...]:
            return tuple(whole(device, price) for device in devices)

        return self.residency.add(
            ModelSpec(name=name, runtime="fake"),
            ways=replan(Price(resting_bytes=size, peak_bytes=size)),
            replan=replan,
            priced_bytes=size,
        )

    async def wait_for(self, handle: ModelHandle, deadline_ns: int = NEVER_NS) -> Waiter:
        """A client that waits for a lease."""
        task = asyncio.create_task(self.residency.lease(handle, deadline_ns))
        self.waiters.add(task)
        await turns()
        return task

    async def load(self, handle: ModelHandle) -> Lease:
        """A lease on a model that is loaded for it."""
        task = await self.wait_for(handle)
        self.engine.loads[handle.core_id].finish(handle.needed_bytes)
        return await task

    async def load_and_release(self, handle: ModelHandle) -> None:
        (await self.load(handle)).release()

    def state(self, handle: ModelHandle) -> State:
        return self.residency.use(handle).state

    async def end(self) -> None:
        """Ends everything and looks at what is left."""
        closing = asyncio.create_task(self.residency.close(10))
        for _ in range(100):
            await turns()
            for load in [*self.engine.loads.values()]:
                if not load.future.done():
                    load.finish(100)
            for unload in [*self.engine.unloads.values()]:
                if not unload.future.done():
                    unload.finish()
            if closing.done():
                break
        assert closing.done(), "close() waits for something nobody will end"
        await closing


Waiter = asyncio.Task[Lease]


@pytest.fixture
async def benches() -> AsyncIterator[Callable[..., Bench]]:
    """Makes benches, and looks at the end of the test whether anything is left of them."""
    made: list[Bench] = []
    unexpected: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: unexpected.append(context))

    def make(**settings: Any) -> Bench:
        made.append(Bench(**settings))
        return made[-1]

    yield make
    for bench in made:
        await bench.end()
        bench.residency.audit()
        assert all(waiter.done() for waiter in bench.waiters)
        assert bench.residency.waiting_count == 0
        assert bench.residency.lease_count == 0
        assert not bench.engine.loads
        assert not bench.engine.unloads
        assert not bench.residency._transfers.count
        assert not bench.residency._tickets
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert not unexpected


async def refusal_of(task: Waiter) -> Refusal:
    with pytest.raises(Refusal) as caught:
        await task
    return caught.value


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


# --- Loads that fail ------------------------------------------------------------------------------


async def test_a_permanent_failure_is_told_and_not_retried_before_its_time(benches: Any) -> None:
    bench = benches(backoff_initial_s=2.0)
    model = bench.add("m")
    waiter = await bench.wait_for(model)
    bench.engine.loads[model.core_id].fail(ModelFilesError("model.safetensors is cut short"))
    refusal = await refusal_of(waiter)
    assert refusal.reason is Reason.LOAD_FAILED
    assert refusal.code is Code.FAILED_PRECONDITION
    assert refusal.retry_after_s is None
    use = bench.residency.use(model)
    assert use.state == State.FAILED
    assert use.failure_text == "model.safetensors is cut short"
    assert (use.failure_transient, use.failure_count) == (False, 1)
    assert use.retry_in_s == pytest.approx(2.0)
    assert bench.residency.device_use(0).reserved == 0

    bench.clock.advance(1.5)
    refusal = await refusal_of(await bench.wait_for(model))
    assert refusal.reason is Reason.LOAD_FAILED
    assert refusal.metadata["next_attempt_in_ms"] == "500"
    assert bench.engine.load_log == ["m"]

    bench.clock.advance(0.5)
    await bench.load_and_release(model)
    assert bench.residency.use(model).failure_text == ""
    assert model.failure_text == ""


async def test_a_transient_failure_is_unavailable_and_says_when_to_come_again(benches: Any) -> None:
    bench = benches(backoff_initial_s=2.0)
    model = bench.add("m")
    waiter = await bench.wait_for(model)
    bench.engine.loads[model.core_id].fail(ModelFilesError("cannot be read", transient=True))
    refusal = await refusal_of(waiter)
    assert refusal.reason is Reason.LOAD_FAILED
    assert refusal.code is Code.UNAVAILABLE
    assert refusal.retry_after_s == pytest.approx(2.0)
    assert bench.residency.use(model).failure_transient


@pytest.mark.parametrize(
    ("error", "text", "transient"),
    [
        (MemoryError("secret"), "the machine has no memory for it now", True),
        (RuntimeError("secret /path"), "its loader raised RuntimeError", False),
    ],
)
async def test_what_a_loader_raises_is_told_without_its_text(
    benches: Any, error: Exception, text: str, transient: bool
) -> None:
    bench = benches()
    model = bench.add("m")
    waiter = await bench.wait_for(model)
    bench.engine.loads[model.core_id].fail(error)
    refusal = await refusal_of(waiter)
    assert refusal.reason is Reason.LOAD_FAILED
    assert "secret" not in str(refusal)
    use = bench.residency.use(model)
    assert (use.failure_text, use.failure_transient) == (text, transient)


async def test_files_that_cannot_be_priced_any_more_fail_the_load(benches: Any) -> None:
    bench = benches()
    model = bench.add("m")
    bench.engine.price_errors["m"] = ModelFilesError("config.json is gone")
    refusal = await refusal_of(await bench.wait_for(model))
    assert refusal.reason is Reason.LOAD_FAILED
    assert bench.residency.use(model).failure_text == "config.json is gone"
    assert bench.engine.load_log == []


async def test_a_broken_model_leaves_its_neighbour_alone(benches: Any) -> None:
    bench = benches()
    broken, good = bench.add("broken"), bench.add("good")
    waiter = await bench.wait_for(broken)
    other = await bench.wait_for(good)
    bench.engine.loads[broken.core_id].fail(RuntimeError("boom"))
    await refusal_of(waiter)
    await turns()
    bench.engine.loads[good.core_id].finish(100)
    (await other).release()


# --- Prices ---------------------------------------------------------------------------------------


async def test_files_that_have_grown_are_given_the_room_they_need(benches: Any) -> None:
    bench = benches()
    old, model = bench.add("old", 150), bench.add("m", 100)
    await bench.load_and_release(old)
    bench.engine.prices["m"] = 200
    waiter = await bench.wait_for(model)
    # 100 bytes were free and are not enough: nothing is loaded before the room is there.
    assert bench.engine.load_log == ["old"]
    assert model.needed_bytes == 200
    assert bench.state(old) == State.UNLOADING
    bench.engine.unloads[old.core_id].finish()
    await turns()
    assert bench.residency.device_use(0).reserved == 200
    bench.engine.loads[model.core_id].finish(200)
    (await waiter).release()
    assert bench.residency.device_use(0).peak <= BUDGET
    assert bench.residency.use(model).failure_count == 0


async def test_files_that_have_grown_beyond_every_budget_are_refused(benches: Any) -> None:
    bench = benches()
    model = bench.add("m", 100)
    bench.engine.prices["m"] = BUDGET + 1
    refusal = await refusal_of(await bench.wait_for(model))
    assert refusal.reason is Reason.MODEL_NEVER_FITS
    assert refusal.metadata == {
        "device": "devices/d0",
        "needed_bytes": "251",
        "budget_bytes": "250",
    }
    assert bench.engine.load_log == []


async def test_files_that_have_shrunk_are_loaded_as_they_are(benches: Any) -> None:
    bench = benches()
    model = bench.add("m", 100)
    bench.engine.prices["m"] = 50
    waiter = await bench.wait_for(model)
    bench.engine.loads[model.core_id].finish(50)
    (await waiter).release()
    assert bench.residency.use(model).charges == {0: 50}


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
    async with asyncio.timeout(5):
        while bench.state(hot) != State.DRAINING:
            await turns(1)
    assert bench.residency.try_lease(hot) is None
    lease.release()
    await turns()
    bench.engine.unloads[hot.core_id].finish()
    await turns()
    bench.engine.loads[cold.core_id].finish(200)
    (await waiter).release()


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
    for ticket in bench.residency._tickets:
        bench.residency._apply(bench.residency._yard.cancel(ticket, 0))
    bench.residency._tickets.clear()
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
    assert not bench.residency._transfers.count
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


# --- The end --------------------------------------------------------------------------------------


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
    timer = bench.residency._timer
    assert timer is None or timer.cancelled()
    for waiter in waiters:
        await refusal_of(waiter)


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


# --- Strict order of arrival ----------------------------------------------------------------------


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
