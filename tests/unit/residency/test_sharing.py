"""The residency shell over models that share tensors, and over workers that die."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tests.support.fake_engine import FakeClock, FakeEngine, turns

from modelyard_server.devices.placed import PlacedAs, whole
from modelyard_server.errors import Reason, Refusal
from modelyard_server.execution.engine import WorkerDeath
from modelyard_server.residency import transfers
from modelyard_server.residency.journal import EventType
from modelyard_server.residency.recovery import Recovery
from modelyard_server.residency.shell import Lease, Residency
from modelyard_server.residency.values import NEVER_NS, ModelHandle, State, YardSettings
from modelyard_server.runtimes.api import ModelSpec, Price

BUDGET = 250
ENCODER = {"a": 60, "b": 40}


class Bench:
    """A residency of two devices of BUDGET bytes."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.clock = FakeClock()
        self.residency = Residency(
            settings=YardSettings(budgets=(BUDGET, BUDGET)),
            device_names=["devices/d0", "devices/d1"],
            engine=self.engine,
            now_ns=self.clock,
        )
        self.now_s = 0.0
        self.recovery = Recovery(self.residency, strikes=3, now_s=lambda: self.now_s)

    def add(self, name: str, shared: dict[str, int], *, own: int = 20) -> ModelHandle:
        size = own + sum(shared.values())
        self.engine.prices[name] = size
        self.engine.shared[name] = shared

        def replan(price: Price) -> tuple[PlacedAs, ...]:
            return (whole(0, price),)

        price = Price(resting_bytes=size, peak_bytes=size, shared=shared)
        return self.residency.add(
            ModelSpec(name=name, runtime="fake"),
            ways=replan(price),
            replan=replan,
            priced_bytes=size,
        )

    async def load(self, handle: ModelHandle) -> None:
        (await self.lease(handle)).release()

    async def lease(self, handle: ModelHandle) -> Lease:
        if self.state(handle) is not State.RESIDENT:
            self.residency.want(handle)
            await turns()
            self.engine.loads[handle.core_id].finish()
            await turns()
        lease = self.residency.try_lease(handle)
        assert lease is not None
        return lease

    async def unload(self, handle: ModelHandle, leaked: int = 0) -> None:
        await self.begin_unload(handle)
        self.engine.unloads[handle.core_id].finish(leaked)
        await turns()

    async def begin_unload(self, handle: ModelHandle) -> None:
        self.residency._carry_out(self.residency._yard.unload(handle.core_id, self.clock()))
        await turns()

    def die(self, *models: ModelHandle, suspects: tuple[ModelHandle, ...] = ()) -> None:
        self.recovery.on_death(
            WorkerDeath(
                worker="cpu",
                models=frozenset(model.core_id for model in models),
                copies=frozenset(),
                suspects=tuple(model.core_id for model in suspects),
                cause="killed by SIGSEGV",
            )
        )

    async def settle(self) -> None:
        """Ends all that runs, until nothing does."""
        for _ in range(10):
            for load in [*self.engine.loads.values()]:
                if not load.future.done():
                    load.finish()
            for unload in [*self.engine.unloads.values()]:
                if not unload.future.done():
                    unload.finish()
            await turns()

    def state(self, handle: ModelHandle) -> State:
        return self.residency.use(handle).state

    @property
    def used(self) -> int:
        use = self.residency.device_use(0)
        return use.reserved + use.resident + use.draining + use.quarantined

    @property
    def told(self) -> list[EventType]:
        return [event.type for event in self.residency.journal.events_after(0)[0]]


@asynccontextmanager
async def benched() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    bench.residency.audit()
    await bench.settle()
    assert await bench.residency.close(10)
    bench.residency.audit()


async def test_two_models_hold_what_they_have_in_common_once() -> None:
    async with benched() as bench:
        one, two = bench.add("one", ENCODER), bench.add("two", ENCODER)
        await bench.load(one)
        assert bench.residency.use(one).shared == {}
        await bench.load(two)
        assert bench.used == 100 + 20 + 20
        use = bench.residency.use(two)
        assert (use.charges, use.shared) == ({0: 120}, {0: 100})
        assert bench.residency.device_use(0).saved == 100


async def test_a_model_that_leaves_gives_back_only_its_own() -> None:
    async with benched() as bench:
        one, two = bench.add("one", ENCODER), bench.add("two", ENCODER)
        await bench.load(one)
        await bench.load(two)
        await bench.unload(one)
        assert bench.used == 120
        left = [
            e for e in bench.residency.journal.events_after(0)[0] if e.type is EventType.UNLOADED
        ]
        assert [event.size_bytes for event in left] == [20]
        await bench.unload(two)
        assert bench.used == 0


async def test_what_did_not_come_back_of_a_sharing_model_is_what_was_its_own() -> None:
    async with benched() as bench:
        one, two = bench.add("one", ENCODER), bench.add("two", ENCODER)
        await bench.load(one)
        await bench.load(two)
        await bench.unload(one, leaked=120)  # The engine cannot tell which part is still held.
        assert bench.residency.use(one).quarantined == {0: 20}
        assert bench.used == 140
        bench.engine.back[one.core_id, 0] = 120
        bench.residency._actions.reclaimed(one, await bench.engine.recheck(one.core_id))
        assert bench.used == 120


async def test_what_one_unload_gives_back_late_is_not_taken_off_what_another_still_misses() -> None:
    async with benched() as bench:
        one, two = bench.add("one", ENCODER), bench.add("two", ENCODER)
        reclaimed = bench.residency._actions.reclaimed
        await bench.load(one)
        await bench.load(two)
        await bench.unload(one, leaked=120)
        await bench.unload(two)
        await bench.load(one)
        await bench.unload(one, leaked=120)
        # Of the first nobody else held 20, of the second all.
        assert bench.residency.use(one).quarantined == {0: 140}
        # Of which unload that is the engine does not say.
        reclaimed(one, {0: 120})
        assert bench.residency.use(one).quarantined == {0: 120}
        assert bench.used == 120
        reclaimed(one, {0: 120})
        assert bench.used == 0


async def test_an_unload_that_left_only_what_others_hold_pays_for_no_other() -> None:
    async with benched() as bench:
        one, two = bench.add("one", ENCODER, own=0), bench.add("two", ENCODER)
        reclaimed = bench.residency._actions.reclaimed
        await bench.load(one)
        await bench.load(two)
        await bench.unload(one, leaked=100)
        assert bench.residency.use(one).quarantined == {}
        await bench.unload(two)
        await bench.load(one)
        await bench.unload(one, leaked=100)
        reclaimed(one, {0: 100})
        assert bench.residency.use(one).quarantined == {0: 100}
        reclaimed(one, {0: 100})
        assert bench.used == 0


async def test_an_unload_that_ends_in_the_same_turn_is_seen_by_who_misses_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was told to the loop together: the second had freed what the first was found to miss."""
    monkeypatch.setattr(transfers, "_RECHECK_S", (3600.0,))
    async with benched() as bench:
        one, two = bench.add("one", ENCODER), bench.add("two", ENCODER)
        for model in (one, two):
            await bench.load(model)
        for model in (one, two):
            await bench.begin_unload(model)
        bench.engine.back[one.core_id, 0] = 120
        bench.engine.unloads[one.core_id].finish(leaked=120)
        bench.engine.unloads[two.core_id].finish()
        await turns()
        assert bench.engine.rechecks == [one.core_id]
        assert bench.used == 0


async def test_more_models_fit_because_they_share() -> None:
    async with benched() as bench:
        models = [bench.add(f"m{i}", ENCODER) for i in range(7)]
        for model in models:
            await bench.load(model)
        assert {bench.state(model) for model in models} == {State.RESIDENT}
        assert bench.used == 100 + 7 * 20
        assert not bench.residency.counters.eviction_count


async def test_a_forecast_counts_on_what_is_shared() -> None:
    async with benched() as bench:
        one, two = bench.add("one", ENCODER, own=20), bench.add("two", ENCODER, own=130)
        await bench.load(one)
        rehearsal = bench.residency.rehearse()
        rehearsal.settle()
        assert rehearsal.want(two.core_id)
        assert rehearsal.departures == []
        assert rehearsal.account(0).used == BUDGET


async def test_changed_tensors_are_priced_anew_before_a_load() -> None:
    async with benched() as bench:
        model = bench.add("m", ENCODER)
        bench.engine.shared["m"] = {"a": 60, "c": 40}
        bench.residency.want(model)
        await turns(40)
        bench.engine.loads[model.core_id].finish()
        await turns()
        assert model.ways[0].shared == {"a": 60, "c": 40}
        assert bench.used == 120


# --- Workers that die -----------------------------------------------------------------------------


async def test_who_had_nothing_to_do_with_it_is_loaded_again() -> None:
    async with benched() as bench:
        guilty, innocent = bench.add("guilty", ENCODER), bench.add("innocent", ENCODER)
        await bench.load(guilty)
        await bench.load(innocent)
        bench.die(guilty, innocent, suspects=(guilty,))
        await bench.settle()
        assert bench.state(guilty) is State.COLD
        assert bench.state(innocent) is State.RESIDENT
        assert bench.used == 120
        assert bench.told.count(EventType.LOST) == 2


async def test_a_pinned_model_comes_back_even_if_it_is_a_suspect() -> None:
    async with benched() as bench:
        model = bench.add("m", {})
        bench.residency.set_pinned(model, True)
        await bench.load(model)
        bench.die(model, suspects=(model,))
        await bench.settle()
        assert bench.state(model) is State.RESIDENT
        assert bench.residency.use(model).pinned


async def test_requests_of_a_dead_worker_end_before_its_model_leaves() -> None:
    async with benched() as bench:
        model = bench.add("m", {})
        lease = await bench.lease(model)
        bench.die(model, suspects=(model,))
        assert bench.state(model) is State.DRAINING
        lease.release()
        await bench.settle()
        assert bench.state(model) is State.COLD
        assert bench.used == 0


async def test_three_strikes_bar_a_model_until_somebody_asks_by_hand() -> None:
    async with benched() as bench:
        model = bench.add("m", {})
        for _ in range(3):
            await bench.load(model)
            bench.die(model, suspects=(model,))
            await bench.settle()
        with pytest.raises(Refusal) as refused:
            await bench.residency.lease(model, NEVER_NS)
        assert refused.value.reason is Reason.LOAD_FAILED
        assert "3 times" in bench.residency.use(model).failure_text
        bench.recovery.forgive(model)
        await bench.load(model)
        assert bench.state(model) is State.RESIDENT


async def test_strikes_that_are_long_ago_or_shared_do_not_bar() -> None:
    async with benched() as bench:
        one, two = bench.add("one", {}), bench.add("two", {})
        for _ in range(5):
            for model in (one, two):
                await bench.load(model)
            bench.die(one, two, suspects=(one, two))
            await bench.settle()
        assert not one.barred_text
        bench.now_s += 601
        await bench.load(one)
        bench.die(one, suspects=(one,))
        await bench.settle()
        assert not one.barred_text


async def test_a_model_nobody_knows_any_more_disturbs_nothing() -> None:
    async with benched() as bench:
        model = bench.add("m", {})
        bench.residency.remove(model)
        bench.die(model, suspects=(model,))
        assert bench.residency.lost([model.core_id, 10**9]) == ()
