"""The residency over a host tier while everything happens at once, as seeds say.

Models that have tensors in common come, go, are replaced and pinned; loads, copies and drops end
well, badly, late or with the death of their worker. The core's books are audited after every event,
and the tier's are compared with what copies there really are. In the end all of it is asked to
leave, and nothing may be left behind or wait for ever.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from tests.support.fake_engine import FakeClock, FakeEngine, PendingDrop, PendingUnload, turns
from tests.support.sharing import auditing

from modelyard_server.devices.placed import PlacedAs, whole
from modelyard_server.errors import Refusal
from modelyard_server.execution.engine import Loaded, Unloaded, WorkerDeath
from modelyard_server.residency import shell, transfers
from modelyard_server.residency.actions import Actions
from modelyard_server.residency.recovery import Recovery
from modelyard_server.residency.shell import Lease, Residency
from modelyard_server.residency.values import (
    NEVER_NS,
    POLICIES,
    CopyState,
    ModelHandle,
    State,
    TierUse,
    YardSettings,
)
from modelyard_server.runtimes.api import (
    LoadCancelled,
    LoadSource,
    ModelFilesError,
    ModelSpec,
    Price,
)
from modelyard_server.runtimes.targets import Target

BUDGETS = (260, 260, 300)
ABOVE = (True, True, False)
WORKERS = (frozenset({0}), frozenset({1, 2}))
"""Positions of the devices whose models are in one process."""

TENSORS = {"p": 30, "q": 25, "r": 40}
STEPS = 1500
SETTLE_TURNS = 2000
SECONDS = {LoadSource.STORAGE: 2.0, LoadSource.PAGE_CACHE: 1.0, LoadSource.COPY: 0.1}


@pytest.fixture(autouse=True)
def audits() -> Iterator[None]:
    with auditing(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfers, "_RECHECK_S", (0.0,))
        patch.setattr(shell, "_COPY_PADDING_BYTES", 15)
        yield


@dataclass(frozen=True, slots=True)
class Made:
    """A copy that is in memory, as it really is."""

    own_bytes: int
    shared: frozenset[str]
    devices: frozenset[int]


class TieredEngine(FakeEngine):
    """Keeps and drops copies as an engine may, and knows which memory that really is."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Made] = {}
        self.making: dict[int, Made] = {}
        self.specs: dict[int, ModelSpec] = {}
        self.lost: set[int] = set()
        self.left: set[int] = set()
        self.kept_count = 0

    @property
    def tier_bytes(self) -> int:
        """What copies hold, those included that are being made or have not quite gone."""
        copies = [*self.made.values(), *self.making.values()]
        tensors = frozenset[str]().union(*(copy.shared for copy in copies))
        return sum(copy.own_bytes for copy in copies) + sum(TENSORS[name] for name in tensors)

    def worker_of(self, model: int) -> frozenset[int]:
        return next(group for group in WORKERS if self.homes[model] in group)

    def _others(self, model: int) -> frozenset[str]:
        """Tensors that other copies hold."""
        others = (made.shared for each, made in self.made.items() if each != model)
        return frozenset[str]().union(*others)

    def is_alone(self, model: int) -> bool:
        """True if there is anything in a copy that somebody could read in its name alone."""
        made = self.made[model]
        return made.own_bytes > 0 or not made.shared <= self._others(model)

    def let_go(self, model: int) -> None:
        """A copy is dropped, but somebody reads from it: what others hold is theirs from now on."""
        self.made[model] = replace(
            self.made[model], shared=self.made[model].shared - self._others(model)
        )
        self.left.add(model)

    async def load(self, model: int, spec: ModelSpec, target: Target) -> Loaded:
        self.specs[model] = spec
        return await super().load(model, spec, target)

    async def unload(
        self, model: int, *, keep: bool = False, most_bytes: int | None = None
    ) -> Unloaded:
        if keep and (model in self.made or model in self.making):
            raise ValueError("there is a copy, or memory of one")
        if model in self.lost:
            self.lost.discard(model)
            freed = self.held.pop(model)
            del self.homes[model]
            return Unloaded(freed=freed)
        devices = self.worker_of(model)
        if keep:
            assert most_bytes is not None
            shared = frozenset(self.shared.get(self.specs[model].name, {}))
            self.making[model] = Made(most_bytes, shared, devices)
        try:
            unloaded = await super().unload(model, keep=keep, most_bytes=most_bytes)
        finally:
            making = self.making.pop(model, None)
        if unloaded.kept_bytes is not None:
            assert making is not None
            self.kept_count += 1
            self.made[model] = Made(unloaded.kept_bytes, making.shared, devices)
            # It takes over what copies that were let go of have left behind.
            for other in self.left:
                self.made[other] = replace(
                    self.made[other], shared=self.made[other].shared - making.shared
                )
        return unloaded

    async def drop_copy(self, model: int) -> bool:
        if model in self.making:
            return False
        is_back = await super().drop_copy(model)
        if is_back:
            self.made.pop(model, None)
            self.left.discard(model)
        return is_back


class SteadyActions(Actions):
    """Loads take what their source says, and not what this machine happens to need."""

    def loaded(self, handle: ModelHandle, target: Target, loaded: Loaded, took_s: float) -> None:
        super().loaded(handle, target, loaded, SECONDS[loaded.source])

    def _wake_at(self, at_ns: int) -> None:
        """Time passes when the seed says so."""


@dataclass
class World:
    """A server without its network, and what the seed does to it."""

    random: random.Random
    tier_bytes: int
    engine: TieredEngine = field(default_factory=TieredEngine)
    clock: FakeClock = field(default_factory=FakeClock)
    models: list[ModelHandle] = field(default_factory=list)
    waiters: list[asyncio.Task[Lease]] = field(default_factory=list)
    callers: list[asyncio.Task[None]] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    owed: list[tuple[int, int, int]] = field(default_factory=list)
    counter: int = 0
    is_kind: bool = False

    def __post_init__(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shell, "Actions", SteadyActions)
            self.residency = Residency(
                settings=YardSettings(
                    budgets=BUDGETS,
                    policy=self.random.choice(POLICIES),
                    overdue_after_s=5.0,
                    tier_budget=self.tier_bytes,
                    above_tier=ABOVE,
                ),
                device_names=[f"devices/d{i}" for i in range(len(BUDGETS))],
                engine=self.engine,
                now_ns=self.clock,
            )
        self.recovery = Recovery(self.residency, strikes=3, now_s=lambda: self.clock() * 1e-9)

    # --- Models -----------------------------------------------------------------------------------

    def add(self, replaces: ModelHandle | None = None) -> ModelHandle:
        names = self.random.sample(sorted(TENSORS), self.random.choice([0, 1, 2, 3]))
        shared = {each: TENSORS[each] for each in names}
        # Without anything of its own too: all that its copy holds may be other copies' as well.
        own = self.random.choice([0, 20, 60, 90]) if shared else self.random.choice([60, 120])
        devices = self.random.choice([[0], [0], [1], [1], [0, 1], [1, 0], [2], [2, 1]])
        return self.add_as(own, shared, devices, replaces)

    def add_as(
        self,
        own: int,
        shared: Mapping[str, int],
        devices: list[int],
        replaces: ModelHandle | None = None,
    ) -> ModelHandle:
        self.counter += 1
        name = f"m{self.counter}"
        size = own + sum(shared.values())
        self.engine.prices[name], self.engine.shared[name] = size, shared

        def replan(price: Price) -> tuple[PlacedAs, ...]:
            return tuple(whole(device, price) for device in devices)

        handle = self.residency.add(
            ModelSpec(name=name, runtime="fake"),
            ways=replan(Price(resting_bytes=size, peak_bytes=size, shared=shared)),
            replan=replan,
            priced_bytes=size,
            replaces=replaces,
        )
        self.models.append(handle)
        return handle

    def any_model(self) -> ModelHandle | None:
        return self.random.choice(self.models) if self.models else None

    # --- What clients and operators do ------------------------------------------------------------

    def create(self) -> None:
        if len(self.models) < 9:
            self.add()

    def ask(self) -> None:
        if (model := self.any_model()) is None or len(self.waiters) > 20:
            return
        deadline = NEVER_NS
        if self.random.random() < 0.2:
            deadline = self.clock() + self.random.randrange(1, 4_000_000_000)
        self.waiters.append(asyncio.create_task(self.residency.lease(model, deadline)))

    def hit(self) -> None:
        if (model := self.any_model()) and (lease := self.residency.try_lease(model)):
            self.leases.append(lease)

    def release(self) -> None:
        if self.leases:
            self.leases.pop(self.random.randrange(len(self.leases))).release()

    def give_up(self) -> None:
        if self.waiters:
            self.random.choice(self.waiters).cancel()

    def want(self) -> None:
        if model := self.any_model():
            with suppress(Refusal):
                self.residency.want(model)

    def pin(self) -> None:
        if model := self.any_model():
            pinned = sum(self.residency.use(each).pinned for each in self.models)
            self.residency.set_pinned(model, pinned < 2 and self.random.random() < 0.5)

    def unload_by_hand(self) -> None:
        if model := self.any_model():
            self.callers.append(asyncio.create_task(self._unload(model)))

    async def _unload(self, model: ModelHandle) -> None:
        was_wanted = self.residency.use(model).waiting_count > 0
        loads = self.residency.use(model).load_count
        try:
            await self.residency.unload(model)
        except Refusal:
            return
        use = self.residency.use(model)
        # It is back, unless somebody wanted it, or reads from its copy: then that is on the books.
        if not was_wanted and use.load_count == loads and use.state is State.COLD:
            assert use.copy_state is CopyState.NONE or use.copy_in_use, use
            assert use.copy_state is CopyState.NONE or use.copy_state is CopyState.DROPPING, use

    def delete(self) -> None:
        if self.models:
            model = self.models.pop(self.random.randrange(len(self.models)))
            self.residency.remove(model)
            self.callers.append(asyncio.create_task(self.residency.gone(model)))

    def update(self) -> None:
        if model := self.any_model():
            new = self.add(replaces=model)
            self.models.remove(model)
            self.residency.replace(model, new)

    def change_budget(self) -> None:
        device = self.random.randrange(len(BUDGETS))
        budget = self.random.choice([0, 150, BUDGETS[device], BUDGETS[device]])
        self.residency.set_budget(device, budget)

    def close_device(self) -> None:
        device = self.random.randrange(len(BUDGETS))
        self.residency.set_closed(device, self.random.random() < 0.3)

    def pass_time(self) -> None:
        self.clock.advance(self.random.choice([0.01, 0.5, 3.0]))
        self.residency._actions.tick()

    def rehearse(self) -> None:
        rehearsal = self.residency.rehearse()
        rehearsal.settle()
        if (model := self.any_model()) and self.random.random() < 0.7:
            rehearsal.want(model.core_id, hold=True)
            rehearsal.let_go()
        if self.random.random() < 0.3:
            rehearsal.set_closed(self.random.randrange(len(BUDGETS)), True)
        rehearsal._yard.audit()

    # --- What becomes of transfers ----------------------------------------------------------------

    def end_load(self) -> None:
        loads = [load for load in self.engine.loads.values() if not load.future.done()]
        if not loads:
            return
        load = self.random.choice(loads)
        chance = self.random.random()
        if chance < 0.04 and not self.is_kind:
            load.fail(ModelFilesError("gone", transient=self.random.random() < 0.5))
        elif chance < 0.06 and not self.is_kind:
            load.fail(LoadCancelled())
        else:
            group = next(group for group in WORKERS if load.device in group)
            made = self.engine.made.get(load.model)
            if made is not None and made.devices == group and load.model not in self.engine.drops:
                source = LoadSource.COPY
            else:
                source = self.random.choice([LoadSource.STORAGE, LoadSource.PAGE_CACHE])
            load.finish(source=source)

    def end_unload(self) -> None:
        unloads = [each for each in self.engine.unloads.values() if not each.future.done()]
        if unloads:
            self._end_unload(self.random.choice(unloads))

    def _end_unload(self, unload: PendingUnload) -> None:
        leaked: dict[int, int] = {}
        if not self.is_kind and self.random.random() < 0.1:
            for device, size in unload.sizes.items():
                # All of it is missing, or none.
                leaked[device] = size
                self.owed.append((unload.model, device, size))
        chance = self.random.random()
        if not unload.keep or chance < 0.15:
            unload.finish(leaked)
            return
        assert unload.most_bytes is not None
        if chance < 0.3:
            more = unload.most_bytes + self.random.choice([1, 30, 1000])
            unload.finish(leaked, refused_bytes=more)
        else:
            kept = self.random.choice([unload.most_bytes, unload.most_bytes // 2, 0])
            unload.finish(leaked, kept_bytes=kept, keep_s=0.01)

    def end_drop(self) -> None:
        drops = [drop for drop in self.engine.drops.values() if not drop.future.done()]
        if drops:
            self._end_drop(self.random.choice(drops))

    def _end_drop(self, drop: PendingDrop) -> None:
        engine = self.engine
        if not self.is_kind and self.random.random() < 0.5 and engine.is_alone(drop.model):
            engine.let_go(drop.model)
            drop.finish(is_back=False)
        else:
            drop.finish()

    def find_leak(self) -> None:
        if self.owed:
            model, device, size = self.owed.pop(self.random.randrange(len(self.owed)))
            self.engine.back[model, device] = self.engine.back.get((model, device), 0) + size

    def kill(self) -> None:
        engine, group = self.engine, self.random.choice(WORKERS)
        held = {model for model, home in engine.homes.items() if home in group}
        unloading = {
            unload.model: unload
            for unload in engine.unloads.values()
            if unload.home in group and not unload.future.done()
        }
        copies = {model for model, made in engine.made.items() if made.devices == group}
        for device in group:
            for owed in [owed for owed in self.owed if owed[1] == device]:
                self.owed.remove(owed)
                engine.back[owed[:2]] = engine.back.get(owed[:2], 0) + owed[2]
        # Known to be over before anything is told to be back.
        engine.lost |= held
        drops = [drop for model, drop in engine.drops.items() if model in copies]
        for model in copies:
            del engine.kept[model], engine.made[model]
            engine.left.discard(model)
        self.recovery.on_death(
            WorkerDeath(
                worker="w",
                models=frozenset(held),
                copies=frozenset(copies),
                suspects=(),
                cause="killed",
            )
        )
        for unload in unloading.values():
            unload.finish()
        for drop in drops:
            if not drop.future.done():
                drop.finish(True)
        for load in engine.loads.values():
            if load.device in group and not load.future.done() and self.random.random() < 0.5:
                load.fail(ModelFilesError("its worker died", transient=True))

    # --- Looking ----------------------------------------------------------------------------------

    def tier(self) -> TierUse:
        tier = self.residency.tier_use()
        assert tier is not None
        return tier

    def look(self) -> None:
        tier = self.tier()
        booked = tier.reserved + tier.resident + tier.draining + tier.quarantined
        assert booked <= tier.budget == self.tier_bytes
        assert tier.peak <= tier.budget
        assert self.engine.tier_bytes <= booked, "there are copies that the books know nothing of"
        for waiter in [each for each in self.waiters if each.done()]:
            self.waiters.remove(waiter)
            if waiter.cancelled():
                continue
            error = waiter.exception()
            if error is None:
                self.leases.append(waiter.result())
            else:
                assert isinstance(error, Refusal), repr(error)
        for caller in [each for each in self.callers if each.done()]:
            self.callers.remove(caller)
            caller.result()

    async def quiet(self) -> None:
        """Everything ends well, until nothing runs; then the books are what there is."""
        self.is_kind = True
        for _ in range(SETTLE_TURNS):
            await turns()
            self.look()
            while self.leases:
                self.release()
            while self.owed:
                self.find_leak()
            self.end_load()
            self.end_unload()
            self.end_drop()
            self.residency._actions.tick()
            if not (
                self.residency._actions._transfers._tasks
                or self.residency._actions._transfers._rechecks
                or self.residency.lease_count
            ):
                break
        else:
            raise AssertionError(
                f"something never ends: {self.residency._actions._transfers._tasks}"
            )
        await turns()
        self.look()
        self.is_kind = False
        tier = self.tier()
        assert (tier.reserved, tier.draining, tier.quarantined) == (0, 0, 0)
        assert tier.resident == self.engine.tier_bytes
        kept = {
            handle.core_id
            for handle in self.residency._handles.values()
            if self.residency.use(handle).copy_state is CopyState.KEPT
        }
        assert kept == set(self.engine.made) == set(self.engine.kept)
        assert tier.copies == len(kept)
        # One whose memory has gone with a worker before it was known to be kept is none.
        assert tier.kept_count == self.engine.kept_count
        states = {self.residency.use(handle).state for handle in self.residency._handles.values()}
        assert states <= {State.COLD, State.RESIDENT, State.QUEUED, State.FAILED}, states

    async def evict(self, model: ModelHandle) -> PendingUnload:
        """A model is loaded and leaves its device again, which may make a copy."""
        self.residency.want(model)
        await turns()
        self.engine.loads[model.core_id].finish()
        await turns()
        home = self.residency.device_of(model)
        self.residency.set_closed(home, True)
        self.residency.set_closed(home, False)
        await turns()
        return self.engine.unloads[model.core_id]

    async def leave(self) -> None:
        """Everybody is asked to go, and goes."""
        for device, budget in enumerate(BUDGETS):
            self.residency.set_budget(device, budget)
            self.residency.set_closed(device, False)
        for model in self.models:
            self.residency.set_pinned(model, False)
        for waiter in self.waiters:
            waiter.cancel()
        await self.quiet()
        for model in self.models:
            self.callers.append(asyncio.create_task(self.residency.unload(model)))
        await self.quiet()
        assert not self.callers, "an unload by hand never returns"
        assert not self.waiters
        tier = self.tier()
        assert (tier.resident, tier.copies, self.engine.tier_bytes) == (0, 0, 0)
        assert not self.engine.held
        assert {handle.core_id for handle in self.models} == set(self.residency._handles)


ACTIONS: Mapping[Callable[[World], None], int] = {
    World.create: 4,
    World.ask: 40,
    World.hit: 6,
    World.release: 50,
    World.give_up: 3,
    World.want: 5,
    World.pin: 2,
    World.unload_by_hand: 4,
    World.delete: 1,
    World.update: 1,
    World.change_budget: 1,
    World.close_device: 1,
    World.pass_time: 6,
    World.rehearse: 3,
    World.end_load: 50,
    World.end_unload: 40,
    World.end_drop: 20,
    World.find_leak: 8,
    World.kill: 2,
}


SEEN_AT_ONCE = (World.ask, World.delete, World.update, World.unload_by_hand)


async def attack(world: World, steps: int) -> None:
    actions, weights = list(ACTIONS), list(ACTIONS.values())
    for step in range(steps):
        (action,) = world.random.choices(actions, weights)
        action(world)
        # Who asks for a model has looked it up in the same turn.
        if world.random.random() < 0.5 or action in SEEN_AT_ONCE:
            await turns(world.random.choice([1, 3, 8]))
            world.look()
        if step % 300 == 299:
            await world.quiet()


@pytest.fixture
async def unexpected() -> Any:
    """What nobody has waited for and failed; nothing."""
    found: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: found.append(context))
    yield found
    gc.collect()
    await turns()
    assert not found


@pytest.mark.parametrize("tier_bytes", [1, 130, 250, 10_000])
@pytest.mark.parametrize("seed", range(3))
async def test_nothing_is_stuck_or_left_whatever_happens_to_copies(
    seed: int, tier_bytes: int, unexpected: list[Any]
) -> None:
    world = World(random.Random(f"{seed} {tier_bytes}"), tier_bytes)
    for _ in range(5):
        world.add()
    await attack(world, STEPS)
    await world.leave()
    tier = world.tier()
    assert tier.kept_count == tier.dropped_count
    assert tier.kept_count > 0 or tier_bytes < 250
    assert tier.kept_count == 0 or tier_bytes > 1
    assert await world.residency.close(10)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("seed", range(12))
async def test_a_server_that_stops_in_the_midst_of_it_waits_for_nobody_for_ever(
    seed: int, unexpected: list[Any]
) -> None:
    world = World(random.Random(seed), 150)
    for _ in range(5):
        world.add()
    await attack(world, 30 + 20 * seed)
    closing = asyncio.create_task(world.residency.close(600))
    for _ in range(SETTLE_TURNS):
        await turns()
        world.look()
        while world.leases:
            world.release()
        world.is_kind = world.random.random() < 0.5
        world.end_load()
        world.end_unload()
        world.end_drop()
        if closing.done() and not world.leases and not world.residency._actions._transfers.count:
            break
    assert closing.done()
    assert await closing
    # Nobody would load from it.
    assert not any(unload.keep for unload in world.engine.unloads.values())
    for caller in world.callers:
        caller.cancel()
    await asyncio.gather(*world.callers, *world.waiters, return_exceptions=True)
    world.residency.audit()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_copy_that_others_hold_is_dropped_before_another_one_of_its_model_is_made(
    unexpected: list[Any],
) -> None:
    world = World(random.Random(0), 10_000, is_kind=True)
    first, second = (world.add_as(0, TENSORS, [device]) for device in (0, 1))
    residency, engine = world.residency, world.engine

    (await world.evict(first)).finish(kept_bytes=5)
    making = await world.evict(second)
    assert making.keep
    by_hand = asyncio.create_task(residency.unload(first))
    await turns()
    # Its own bytes are back; what is still read in its name the other copy holds as well.
    making.finish(kept_bytes=5)
    await turns()
    world.residency.audit()
    engine.drops[first.core_id].finish(is_back=False)
    await turns()
    assert (world.tier().draining, world.tier().quarantined) == (5, 0)
    while not world.residency._actions._transfers._rechecks:
        await turns()
    engine.drops[first.core_id].finish()
    await by_hand
    await turns()
    (await world.evict(first)).finish(kept_bytes=0)
    await turns()
    assert residency.use(first).copy_state is CopyState.KEPT

    # The same again, and nothing is its own.
    residency._carry_out(residency._yard.unload(second.core_id, world.clock()))
    await turns()
    engine.drops[second.core_id].finish()
    await turns()
    making = await world.evict(second)
    by_hand = asyncio.create_task(residency.unload(first))
    await turns()
    assert residency._yard.copy_exclusive(first.core_id) == 0
    engine.drops[first.core_id].finish(is_back=False)
    await turns()
    assert residency.use(first).copy_state is CopyState.DROPPING
    assert not by_hand.done()
    making.finish(kept_bytes=0)
    while first.core_id not in engine.drops:  # It is asked again in a while.
        await turns()
    engine.drops[first.core_id].finish()
    await by_hand
    unload = await world.evict(first)
    assert unload.keep
    unload.finish(kept_bytes=0)
    await world.quiet()
    assert residency.use(first).copy_state is CopyState.KEPT
    await world.leave()
    assert await residency.close(10)


async def test_what_is_still_read_stays_on_the_books_when_the_next_copy_of_it_fails(
    unexpected: list[Any],
) -> None:
    world = World(random.Random(0), 10_000, is_kind=True)
    first, second = (world.add_as(20, TENSORS, [device]) for device in (0, 1))
    (await world.evict(first)).finish(kept_bytes=20)
    making = await world.evict(second)
    by_hand = asyncio.create_task(world.residency.unload(first))
    await turns()
    world.engine.let_go(first.core_id)
    world.engine.drops[first.core_id].finish(is_back=False)
    await by_hand
    tier = world.tier()
    assert (tier.draining, tier.quarantined) == (20, 0)
    making.finish()
    await turns()
    tier = world.tier()
    there = world.engine.tier_bytes
    booked = tier.reserved + tier.resident + tier.draining + tier.quarantined
    while first.core_id not in world.engine.drops:
        await turns()
    world.engine.drops[first.core_id].finish()
    await world.leave()
    assert await world.residency.close(10)
    assert there <= booked


async def test_an_unload_is_not_held_back_by_a_copy_that_somebody_still_reads(
    unexpected: list[Any],
) -> None:
    world = World(random.Random(0), 150, is_kind=True)
    residency, engine = world.residency, world.engine
    first, second = (world.add_as(120, {}, [device]) for device in (0, 1))
    (await world.evict(first)).finish(kept_bytes=120)
    by_hand = asyncio.create_task(residency.unload(first))
    await turns()
    with pytest.raises(KeyError):
        await world.evict(second)
    assert residency.use(second).copy_state is CopyState.AWAITED
    engine.let_go(first.core_id)
    engine.drops[first.core_id].finish(is_back=False)
    await by_hand
    await turns()
    assert residency.use(first).copy_in_use
    assert (world.tier().draining, world.tier().quarantined) == (120, 0)
    assert not engine.unloads[second.core_id].keep
    engine.unloads[second.core_id].finish()
    await turns()
    # Nor does another one begin to wait for it; and it goes when its reader is done.
    unload = await world.evict(second)
    assert not unload.keep
    unload.finish()
    while first.core_id not in engine.drops:
        await turns()
    engine.drops[first.core_id].finish()
    await turns()
    assert residency.use(first).copy_state is CopyState.NONE
    (await world.evict(second)).finish(kept_bytes=120)
    await world.leave()
    assert await residency.close(10)


async def test_a_model_that_is_deleted_while_its_copy_is_read_is_forgotten_when_that_is_over(
    unexpected: list[Any],
) -> None:
    world = World(random.Random(0), 150, is_kind=True)
    residency, engine = world.residency, world.engine
    model = world.add_as(120, {}, [0])
    (await world.evict(model)).finish(kept_bytes=120)
    await turns()
    residency.remove(model)
    world.models.remove(model)
    gone = asyncio.create_task(residency.gone(model))
    await turns()
    assert not gone.done()
    engine.let_go(model.core_id)
    engine.drops[model.core_id].finish(is_back=False)
    await gone
    assert residency.handle_of(model.core_id) is model
    assert world.tier().draining == engine.tier_bytes == 120
    while model.core_id not in engine.drops:
        await turns()
    engine.drops[model.core_id].finish()
    await turns()
    assert residency.handle_of(model.core_id) is None
    await world.leave()
    assert await residency.close(10)


@pytest.mark.parametrize("own_bytes", [0, 20])
@pytest.mark.parametrize("is_known", [False, True])
async def test_a_server_that_stops_does_not_wait_for_who_reads_a_dropped_copy(
    own_bytes: int, is_known: bool, unexpected: list[Any]
) -> None:
    world = World(random.Random(0), 10_000, is_kind=True)
    residency, engine = world.residency, world.engine
    first, second = (world.add_as(own_bytes, TENSORS, [device]) for device in (0, 1))
    (await world.evict(first)).finish(kept_bytes=own_bytes)
    making = await world.evict(second)
    by_hand = asyncio.create_task(residency.unload(first))
    await turns()
    if is_known:
        engine.drops[first.core_id].finish(is_back=False)
        while first.core_id not in engine.drops:
            await turns()
    closing = asyncio.create_task(residency.close(600))
    await turns()
    making.finish()
    await turns()
    if not closing.done():
        engine.drops[first.core_id].finish(is_back=False)
    assert await closing
    await by_hand
    # As long as it is read it is on the books.
    assert residency.use(first).copy_in_use
    assert world.tier().draining == engine.tier_bytes == own_bytes + sum(TENSORS.values())
    residency.audit()
    assert asyncio.all_tasks() == {asyncio.current_task()}
