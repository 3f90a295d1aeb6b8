"""One copy of a model takes over from another: no request lost, and all of it or nothing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.catalog_bench import CatalogBench
from tests.support.fake_engine import turns

from modelyard_server.catalog.model import Model, Registration
from modelyard_server.catalog.records import Owner
from modelyard_server.catalog.succession import Heir, Succession
from modelyard_server.errors import Reason, Refusal
from modelyard_server.residency.shell import Lease
from modelyard_server.residency.values import NEVER_NS, State
from modelyard_server.runtimes.api import ModelFilesError

BUDGET = 1000


class Bench(CatalogBench):
    """A bench whose models are changed by Succession itself."""

    async def heir(self, old: Model, *, staged: bool = True, **changes: Any) -> Heir:
        """The model with other options."""
        values = {"options": {"generation": 2}} | changes
        checked = self.registry.check(self.draft(old.id, **values), folder_needed=True)
        price = await self.registry.price(checked.spec)
        registration = self.registry.register(checked, price, owner=Owner.API)
        return Heir(
            old=old,
            registration=registration,
            spec=checked.spec,
            priced_bytes=price.peak_bytes,
            staged=staged,
        )

    def waiter(self, model: Model, deadline_ns: int = NEVER_NS) -> asyncio.Task[Lease]:
        """A request that looked the model up just now."""
        return asyncio.create_task(self.residency.lease(model.handle, deadline_ns))

    def load_of(self, succession: Succession, index: int = 0) -> Any:
        """The load of an heir that is being staged."""
        handle = succession._heirs[index]._handle
        return None if handle is None else self.engine.loads.get(handle.core_id)

    def snapshot(self) -> object:
        """What a discarded succession must leave as it was."""
        self.residency.audit()
        return (
            dict(self.catalog.keys),
            self.residency._yard.model_count,
            set(self.residency._handles),
            {m.id: self.residency.use(m.handle).charges for m in self.catalog.models()},
            {m.id: self.residency.use(m.handle).lease_count for m in self.catalog.models()},
            [self.residency.device_use(i).reserved for i in range(len(self.devices))],
        )


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path, budgets=(BUDGET,))
    yield made
    await made.end()


# --- Taking over ----------------------------------------------------------------------------------


async def test_the_old_copy_answers_until_the_new_one_takes_over(bench: Bench) -> None:
    old = await bench.create()
    await bench.load_and_release(old)
    with bench.registry.succession([await bench.heir(old)]) as succession:
        staging = asyncio.create_task(succession.stage(NEVER_NS))
        await bench.until(lambda: bench.load_of(succession))
        # Beside the old one, which still takes requests.
        assert bench.residency.device_use(0).resident == 100
        assert bench.residency.device_use(0).reserved == 100
        lease = bench.residency.try_lease(bench.catalog.get("m").handle)
        assert lease is not None
        assert lease.handle is old.handle
        bench.load_of(succession).finish()
        await staging
        assert bench.catalog.get("m") is old
        (new,) = succession.commit()
    assert bench.catalog.get("m") is new
    hit = bench.residency.try_lease(new.handle)
    assert hit is not None
    assert hit.handle is new.handle
    # Who runs on the old one still does, and it leaves when he has ended.
    assert bench.state(old) == State.DRAINING
    lease.release()
    hit.release()
    await bench.settle()
    assert bench.residency.device_use(0).resident == 100
    assert bench.residency._yard.model_count == 1
    bench.residency.audit()


async def test_a_device_that_is_behind_keeps_the_old_copy_while_its_heir_loads(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, budgets=(BUDGET, BUDGET))
    now_ns = bench.now_ns()
    bench.now_ns = lambda: now_ns
    names = (
        "m",
        "filler",
        "other",
    )  # In turn, where most room is: the first and the last together.
    old, filler, other = [await bench.create(name) for name in names]
    for model in (old, filler, other):
        await bench.load_and_release(model)
    assert bench.residency.device_of(old.handle) == bench.residency.device_of(other.handle)
    bench.residency.set_pinned(other.handle, True)  # If anybody goes it is the old copy.
    leases: deque[Lease] = deque()

    def ask(times: int = 1) -> None:
        for model in (other, old) * times:
            lease = bench.residency.try_lease(model.handle)
            if lease is not None:
                leases.append(lease)

    with bench.registry.succession([await bench.heir(old)]) as succession:
        staging = asyncio.create_task(succession.stage(NEVER_NS))
        await bench.until(lambda: bench.load_of(succession))
        ask(10)
        for _ in range(40):
            now_ns += 500_000_000
            leases.popleft().release()
            ask()
        assert bench.state(old) == State.RESIDENT
        bench.load_of(succession).finish()
        await staging
        succession.commit()
    while leases:
        leases.popleft().release()
    await bench.settle()
    await bench.end()


async def test_requests_that_wait_for_the_old_copy_are_served_by_the_new_one(bench: Bench) -> None:
    old = await bench.create()
    waiters = [bench.waiter(old) for _ in range(3)]
    await bench.until(lambda: old.handle.core_id in bench.engine.loads)
    load = bench.engine.loads[old.handle.core_id]
    with bench.registry.succession([await bench.heir(old, staged=False)]) as succession:
        await succession.stage(NEVER_NS)
        (new,) = succession.commit()
    await turns()
    assert load.cancelled
    assert bench.residency.use(new.handle).waiting_count == 3
    await bench.settle()
    for lease in await asyncio.gather(*waiters):
        assert lease.handle is new.handle
        lease.release()


async def test_waiting_requests_keep_their_deadline_and_how_long_they_have_waited(
    bench: Bench,
) -> None:
    clock = 0
    bench.now_ns = lambda: clock
    old = await bench.create()
    patient, hasty = bench.waiter(old), bench.waiter(old, deadline_ns=10)
    await turns()
    clock = 5
    with bench.registry.succession([await bench.heir(old, staged=False)]) as succession:
        (new,) = succession.commit()
    await turns()
    clock = 10
    bench.residency._actions.tick()
    with pytest.raises(Refusal) as caught:
        await hasty
    assert caught.value.reason in (Reason.DEADLINE_IN_LOAD, Reason.DEADLINE_IN_QUEUE)
    await bench.settle()
    with await patient as lease:
        assert lease.handle is new.handle
        assert lease.wait_s == pytest.approx(10e-9)


async def test_a_request_that_looked_up_a_copy_long_gone_is_served_by_the_latest(
    bench: Bench,
) -> None:
    first = await bench.create()
    model = first
    for _ in range(3):
        with bench.registry.succession([await bench.heir(model, staged=False)]) as succession:
            (model,) = succession.commit()
    task = bench.waiter(first)
    await bench.settle()
    with await task as lease:
        assert lease.handle is model.handle


async def test_who_waits_for_a_model_that_is_deleted_is_refused(bench: Bench) -> None:
    # The negative control of the above: only an heir takes its requests.
    old = await bench.create()
    task = bench.waiter(old)
    await turns()
    async with bench.writes.alone():
        await bench.registry.delete(old)
    with pytest.raises(Refusal) as caught:
        await task
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


async def test_a_pin_moves_along_and_so_does_the_history(bench: Bench) -> None:
    old = await bench.create()
    async with bench.writes.alone():
        await bench.registry.set_pinned(old, True)
    await bench.settle()
    async with bench.writes.alone():
        await bench.run_all(bench.registry.update(old, bench.draft(options={"generation": 2})))
    new = bench.catalog.get("m")
    assert new is not old
    await bench.settle()
    use = bench.residency.use(new.handle)
    assert use.pinned
    assert use.state == State.RESIDENT
    assert bench.store.read().models == (new.record(pinned=True),)
    assert bench.residency.device_use(0).resident == 100


async def test_a_pinned_model_that_cannot_be_staged_is_loaded_after_the_old_one(
    bench: Bench,
) -> None:
    old = await bench.create(size=600)
    async with bench.writes.alone():
        await bench.registry.set_pinned(old, True)
    await bench.settle()
    async with bench.writes.alone():
        await bench.registry.update(old, bench.draft(options={"generation": 2}))
    new = bench.catalog.get("m")
    await bench.settle()
    assert bench.state(new) == State.RESIDENT
    assert bench.residency.use(new.handle).pinned
    assert bench.residency.device_use(0).peak == 600


async def test_staging_evicts_idle_others_but_never_the_old_copy(bench: Bench) -> None:
    old = await bench.create(size=400)
    await bench.load_and_release(old)
    other = await bench.create("other", size=500)
    await bench.load_and_release(other)
    with bench.registry.succession([await bench.heir(old)]) as succession:
        await bench.run_all(succession.stage(NEVER_NS))
        assert bench.state(old) == State.RESIDENT
        assert bench.state(other) == State.COLD
        succession.commit()
    await bench.settle()
    assert bench.residency.device_use(0).peak <= BUDGET


async def test_an_update_stages_exactly_where_both_copies_fit(bench: Bench) -> None:
    small, large = await bench.create("small", 300), await bench.create("large", 600)
    for model in (small, large):
        await bench.load_and_release(model)
        loads = len(bench.engine.load_log)
        async with bench.writes.alone():
            await bench.run_all(
                bench.registry.update(model, bench.draft(model.id, options={"generation": 2}))
            )
        staged = bench.engine.load_log[loads:] == [model.id]
        assert staged is (model is small)
        await bench.settle()
    # The next request loads the one that was not.
    task = bench.waiter(bench.catalog.get("large"))
    await bench.settle()
    (await task).release()
    assert bench.residency.device_use(0).peak <= BUDGET


# --- Taking back ----------------------------------------------------------------------------------


async def test_what_is_discarded_leaves_nothing_and_the_old_copy_resident(bench: Bench) -> None:
    old = await bench.create()
    await bench.load_and_release(old)
    before = bench.snapshot()
    with bench.registry.succession([await bench.heir(old)]) as succession:
        await bench.run_all(succession.stage(NEVER_NS))
        assert bench.residency.device_use(0).resident == 200
    await bench.settle()
    assert bench.snapshot() == before
    assert bench.state(old) == State.RESIDENT


async def test_a_failing_load_leaves_everything_as_it_was(bench: Bench) -> None:
    old = await bench.create(keys=("k",))
    await bench.load_and_release(old)
    before, stored = bench.snapshot(), bench.store.read()

    async def update() -> Registration:
        async with bench.writes.alone():
            return await bench.registry.update(old, bench.draft(keys=("l",)))

    task = asyncio.create_task(update())
    await bench.until(lambda: bench.engine.loads)
    (load,) = bench.engine.loads.values()
    load.fail(ModelFilesError("cut short"))
    with pytest.raises(Refusal) as caught:
        await task
    assert caught.value.reason is Reason.LOAD_FAILED
    assert "models/m in its new place" in caught.value.text
    assert "cut short" in caught.value.text
    await bench.settle()
    assert bench.snapshot() == before
    assert bench.store.read() == stored
    # It still answers, at once.
    lease = bench.residency.try_lease(old.handle)
    assert lease is not None
    lease.release()
    # And is changed once its files are whole.
    await bench.run_all(update())
    assert set(bench.catalog.keys) == {"m", "l"}


async def test_one_heir_that_fails_stops_the_others_and_all_is_as_before(bench: Bench) -> None:
    olds = [await bench.create(f"m-{i}") for i in range(3)]
    for old in olds:
        await bench.load_and_release(old)
    before = bench.snapshot()
    heirs = [await bench.heir(old) for old in olds]
    with pytest.raises(Refusal) as caught, bench.registry.succession(heirs) as succession:
        staging = asyncio.create_task(succession.stage(NEVER_NS))
        # One device loads one model at a time: the first is done, the second fails.
        await bench.until(lambda: bench.load_of(succession, 0))
        bench.load_of(succession, 0).finish()
        await bench.until(lambda: bench.load_of(succession, 1))
        bench.load_of(succession, 1).fail(ModelFilesError("cut short"))
        await staging
    assert "models/m-1" in caught.value.text
    await bench.settle()
    assert bench.snapshot() == before


async def test_a_load_that_is_not_done_in_time_is_given_up(bench: Bench) -> None:
    clock = 0
    bench.now_ns = lambda: clock
    old = await bench.create()
    await bench.load_and_release(old)
    before = bench.snapshot()
    with (
        pytest.raises(Refusal) as caught,
        bench.registry.succession([await bench.heir(old)]) as succession,
    ):
        staging = asyncio.create_task(succession.stage(10))
        await bench.until(lambda: bench.load_of(succession))
        load = bench.load_of(succession)
        clock = 10
        bench.residency._actions.tick()
        await staging
    assert caught.value.reason is Reason.DEADLINE_IN_LOAD
    await bench.settle()
    assert load.cancelled
    assert bench.snapshot() == before


async def test_a_caller_that_leaves_while_it_is_staged_takes_everything_back(bench: Bench) -> None:
    old = await bench.create()
    await bench.load_and_release(old)
    before = bench.snapshot()

    async def update() -> None:
        async with bench.writes.alone():
            await bench.registry.update(old, bench.draft(options={"generation": 2}))

    task = asyncio.create_task(update())
    await bench.until(lambda: bench.engine.loads)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await bench.settle()
    assert bench.snapshot() == before


async def test_a_change_that_cannot_be_stored_is_taken_back_though_it_was_loaded(
    bench: Bench,
) -> None:
    old = await bench.create()
    await bench.load_and_release(old)
    before = bench.snapshot()
    bench.store.full = True

    async def update() -> None:
        async with bench.writes.alone():
            await bench.registry.update(old, bench.draft(options={"generation": 2}))

    refusal = await bench.refused(update())
    assert refusal.reason is Reason.CATALOG_UNAVAILABLE
    await bench.settle()
    assert bench.snapshot() == before


async def test_an_heir_larger_than_its_price_takes_over_all_the_same(bench: Bench) -> None:
    # Its files grew after it was checked: it is priced again, asks again, and is loaded.
    old = await bench.create()
    await bench.load_and_release(old)
    heir = await bench.heir(old)
    bench.engine.prices["m"] = 300
    with bench.registry.succession([heir]) as succession:
        await bench.run_all(succession.stage(NEVER_NS))
        (new,) = succession.commit()
    await bench.settle()
    assert bench.residency.use(new.handle).charges == {0: 300}
    assert bench.residency.device_use(0).resident == 300


async def test_a_model_that_is_deleted_while_it_was_to_be_changed_waits_its_turn(
    bench: Bench,
) -> None:
    old = await bench.create()
    await bench.load_and_release(old)

    async def update() -> None:
        async with bench.writes.alone():
            await bench.registry.update(old, bench.draft(options={"generation": 2}))

    async def delete() -> None:
        async with bench.writes.alone():
            await bench.registry.delete(bench.catalog.get("m"))

    changing = asyncio.create_task(update())
    await bench.until(lambda: bench.engine.loads)
    deleting = asyncio.create_task(delete())
    await turns()
    assert not deleting.done()
    await bench.run_all(changing)
    await deleting
    await bench.settle()
    assert bench.catalog.models() == []
    assert bench.residency._yard.model_count == 0
    assert bench.residency.device_use(0).resident == 0
