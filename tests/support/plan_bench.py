"""Device plans over a fake engine: a catalog in memory, and devices that are only counted.

PlanBench        everything that a device plan touches, wired as app.py wires it
layers           what a model in parts is made of
State            all that a plan can change, to compare
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from modelyard.devices import Device
from modelyard.placements import Placement, placement_to_json
from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import Model, ModelDraft
from modelyard_server.catalog.plans import Applied, DevicePlans, PlanChange
from modelyard_server.catalog.registry import Registry
from modelyard_server.catalog.store import CatalogStore
from modelyard_server.catalog.writes import Writes
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.devices.placed import charges_of
from modelyard_server.execution.engine import Loaded
from modelyard_server.residency.journal import Event, Journal
from modelyard_server.residency.shell import Lease, Residency
from modelyard_server.residency.values import NEVER_NS, State, YardSettings
from modelyard_server.runtimes.api import ModelSpec
from modelyard_server.runtimes.targets import Structure, Target, TensorPart
from tests.support.fake_engine import FakeClock, FakeEngine, PendingLoad, PendingUnload, turns

__all__ = ["PartsEngine", "PlanBench", "Snapshot", "devices_of", "layers", "managed"]

T = TypeVar("T")

_IN_MEMORY = (State.LOADING, State.RESIDENT)


def layers(*sizes: int) -> Structure:
    """A model of layers "0", "1", ... of these bytes."""
    return Structure(
        tensors=tuple(
            TensorPart(names=(f"{i}.weight",), size_bytes=size) for i, size in enumerate(sizes)
        ),
        blocks=tuple(str(i) for i in range(len(sizes))),
        units=tuple(str(i) for i in range(len(sizes))),
    )


def managed(
    device: str, budget_bytes: int, *, total_bytes: int = 1000, reserve_bytes: int = 0
) -> ManagedDevice:
    """A device that is only counted; its memory is its own unless it is logical."""
    return ManagedDevice(
        name=f"devices/{device.replace(':', '-')}",
        device=Device.from_str(device),
        logical=False,
        torch_device=device,
        threads=1,
        total_bytes=total_bytes,
        budget_bytes=budget_bytes,
        reserve_bytes=reserve_bytes,
    )


class PartsEngine(FakeEngine):
    """Loads hold what the target charges.

    Args:
        disk: positions of the disks.
    """

    def __init__(self, disk: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.disk = disk

    async def load(self, model: int, spec: ModelSpec, target: Target) -> Loaded:
        """Waits until the test ends it."""
        self.sizes[spec.name] = charges_of(target, await self.price(spec), self.disk)
        return await super().load(model, spec, target)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that a plan can change."""

    devices: tuple[tuple[int, bool], ...]
    placements: Mapping[str, Any]
    etag: str
    held: Mapping[str, Mapping[int, int]]
    pinned: frozenset[str]
    accounts: tuple[tuple[int, int, int, int, int], ...]
    stored: Any


class PlanBench:
    """Everything that a device plan touches.

    Args:
        devices: what there is.
        loads_per_device: loads that run on a device at once.

    Attributes:
        failing: how loads fail, by the model's name; the others end well.
    """

    def __init__(self, *devices: ManagedDevice, loads_per_device: int = 1) -> None:
        self.devices = devices
        self.names = [device.name for device in devices]
        self.clock = FakeClock()
        self.failing: dict[str, Exception] = {}
        disk = frozenset(i for i, device in enumerate(devices) if not device.executes)
        self.engine = PartsEngine(disk)
        self.catalog = Catalog()
        self.journal = Journal(capacity=10_000)
        self.residency = Residency(
            settings=YardSettings(
                budgets=tuple(device.budget_bytes for device in devices),
                loads_per_device=loads_per_device,
            ),
            device_names=self.names,
            engine=self.engine,
            journal=self.journal,
            now_ns=self.clock,
        )
        self.store = CatalogStore.open(None)
        self.writes = Writes(self.store)
        self.registry = Registry(
            catalog=self.catalog,
            engine=self.engine,
            residency=self.residency,
            devices=devices,
            roots={},
            writes=self.writes,
            journal=self.journal,
        )
        self.plans = DevicePlans(
            devices=devices,
            catalog=self.catalog,
            registry=self.registry,
            residency=self.residency,
            writes=self.writes,
            journal=self.journal,
        )

    async def close(self) -> None:
        """Sees that nothing is left."""
        await self.settle()
        assert self.residency.lease_count == 0
        assert self.residency.waiting_count == 0
        assert await self.residency.close(5)
        self.check()
        await self.store.close()
        ours = asyncio.all_tasks() - {asyncio.current_task()}
        assert not ours, ours

    # --- Models -------------------------------------------------------------------------------

    async def add(
        self,
        model_id: str,
        size: int | Structure,
        placement: Placement | None = None,
        *,
        pinned: bool = False,
        resident: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> Model:
        """Registers a model by the API; in memory and pinned if so asked."""
        if isinstance(size, Structure):
            self.engine.structures[model_id] = size
        self.engine.prices[model_id] = size if isinstance(size, int) else size.size_bytes
        draft = ModelDraft(id=model_id, runtime="fake", options=options or {}, placement=placement)
        async with self.writes.alone():
            await self.registry.create(draft)
        if resident:
            await self.load(model_id)
        if pinned:
            async with self.writes.alone():
                await self.run(self.registry.set_pinned(self.catalog.get(model_id), True))
        return self.catalog.get(model_id)

    async def load(self, model_id: str) -> None:
        """Loads a model."""
        (await self.lease(model_id)).release()

    async def lease(self, model_id: str) -> Lease:
        """A lease on a model."""
        handle = self.catalog.get(model_id).handle
        return await self.run(self.residency.lease(handle, NEVER_NS))

    def state(self, model_id: str) -> State:
        """Where a model stands."""
        return self.residency.use(self.catalog.get(model_id).handle).state

    def held(self) -> dict[str, dict[int, int]]:
        """What each model holds; those that hold nothing are left out."""
        uses = {m.id: self.residency.use(m.handle) for m in self.catalog.models()}
        return {name: dict(use.charges) for name, use in uses.items() if use.charges}

    # --- Plans --------------------------------------------------------------------------------

    def deadline(self, seconds: float = 1000) -> int:
        """A deadline from now."""
        return self.clock() + round(seconds * 1e9)

    async def apply(self, change: PlanChange, **settings: Any) -> Applied:
        """Applies a plan, with loads and unloads that end well."""

        async def alone() -> Applied:
            async with self.writes.alone():
                return await self.plans.apply(
                    change, **({"deadline_ns": self.deadline()} | settings)
                )

        return await self.run(alone())

    # --- Time ---------------------------------------------------------------------------------

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs work while every load and unload ends well."""
        task = asyncio.get_running_loop().create_task(work)
        while not task.done():
            if not await self.step():
                await asyncio.wait((task,), timeout=0.005)
        return task.result()

    async def step(self) -> bool:
        """Ends what loads and unloads now. False if nothing did."""
        await turns()
        self.check()
        running: list[PendingLoad | PendingUnload] = [
            *self.engine.loads.values(),
            *self.engine.unloads.values(),
        ]
        pending = [each for each in running if not each.future.done()]
        for each in pending:
            if isinstance(each, PendingLoad) and each.spec.name in self.failing:
                each.fail(self.failing[each.spec.name])
            else:
                each.finish()
        await turns()
        self.check()
        return bool(pending)

    async def settle(self) -> None:
        """Lets all loads and unloads end."""
        while await self.step():
            pass

    def check(self) -> None:
        """The yard's audit, and no device above its budget but for what it owes."""
        self.residency.audit()
        for i, name in enumerate(self.names):
            use = self.residency.device_use(i)
            used = use.reserved + use.resident + use.draining + use.quarantined
            assert used <= use.budget + use.deficit, (name, use)

    # --- Looking ------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """All that a plan can change, now."""
        plan = self.plans.plan()
        uses = [self.residency.device_use(i) for i in range(len(self.devices))]
        return Snapshot(
            devices=tuple((use.budget, self.residency.is_closed(i)) for i, use in enumerate(uses)),
            placements={name: placement_to_json(p) for name, p in plan.placements.items()},
            etag=plan.etag,
            held=self.held(),
            pinned=frozenset(
                m.id for m in self.catalog.models() if self.residency.use(m.handle).pinned
            ),
            accounts=tuple(
                (u.reserved, u.resident, u.draining, u.quarantined, u.deficit) for u in uses
            ),
            stored=self.store.read(),
        )

    def events(self, after: int = 0) -> list[Event]:
        """What the journal tells."""
        return self.journal.events_after(after)[0]


def devices_of(*budgets: int) -> Sequence[ManagedDevice]:
    """Devices cuda:0, cuda:1, ... of 1000 bytes with these budgets."""
    return [managed(f"cuda:{i}", budget) for i, budget in enumerate(budgets)]
