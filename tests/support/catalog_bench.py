"""The catalog's parts over a fake engine and a real store, and a store that fails on demand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import pytest

from modelyard.devices import Device
from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import Model, ModelDraft
from modelyard_server.catalog.plans import DevicePlans
from modelyard_server.catalog.records import Change, RequestRecord
from modelyard_server.catalog.registry import Registry
from modelyard_server.catalog.restoring import Restorer
from modelyard_server.catalog.route_registry import RouteRegistry
from modelyard_server.catalog.store import CatalogStore, StorageFailed
from modelyard_server.catalog.writes import Writes
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.errors import Refusal
from modelyard_server.residency.journal import Event, Journal
from modelyard_server.residency.shell import Lease, Residency
from modelyard_server.residency.values import NEVER_NS, State, YardSettings
from tests.support.fake_engine import FakeEngine, turns

__all__ = ["CatalogBench", "GatedStore", "managed_device"]

T = TypeVar("T")

_HOST_BYTES = 1_000_000
_ROUNDS = 200
_PATIENCE_S = 60
_POLL_S = 0.001


def managed_device(name: str, budget_bytes: int) -> ManagedDevice:
    """A logical device, for instance "cuda:1"."""
    device = Device.from_str(name)
    return ManagedDevice(
        name=f"devices/{name.replace(':', '-')}",
        device=device,
        logical=True,
        torch_device="cpu",
        threads=1,
        total_bytes=_HOST_BYTES,
        budget_bytes=budget_bytes,
    )


class GatedStore(CatalogStore):
    """A real store whose writes wait and fail when the test says so. Make one with `opened`.

    Attributes:
        full: every write fails.
        gate: writes wait for it, if it is set.
        reads_fail: looking for a request fails.
        written: changes that are durable.
    """

    full: bool
    reads_fail: bool
    gate: asyncio.Event | None
    written: list[Change]

    @classmethod
    def opened(cls, path: Path | None = None) -> GatedStore:
        """Opens a file, or a store in memory."""
        real = CatalogStore.open(path)
        made = cls(real._connection, real._name, lambda: datetime.now(UTC))
        made.full = made.reads_fail = False
        made.gate = None
        made.written = []
        return made

    async def write(self, change: Change) -> int:
        """See CatalogStore."""
        if self.gate is not None:
            await self.gate.wait()
        if self.full:
            raise StorageFailed("the disk is full")
        revision = await super().write(change)
        self.written.append(change)
        return revision

    async def request(self, request_id: str) -> RequestRecord | None:
        """See CatalogStore."""
        if self.reads_fail:
            raise StorageFailed("the disk is gone")
        return await super().request(request_id)


class CatalogBench:
    """Catalog, registry, plans and restorer over devices cuda:0, cuda:1, ... with these budgets.

    Args:
        root: the folder of root "store".
        budgets: bytes, one a device.
        store: an open one; the bench closes it. None makes one in memory.
    """

    def __init__(
        self,
        root: Path,
        *,
        budgets: Sequence[int] = (250, 400),
        store: GatedStore | None = None,
        roots: Mapping[str, Path] | None = None,
    ) -> None:
        self.root = root
        self.engine = FakeEngine()
        self.catalog = Catalog()
        self.store = store or GatedStore.opened()
        self.writes = Writes(self.store)
        self.journal = Journal(capacity=1000)
        self.devices = [managed_device(f"cuda:{i}", size) for i, size in enumerate(budgets)]
        self.now_ns: Callable[[], int] = time.monotonic_ns
        self.residency = Residency(
            settings=YardSettings(budgets=tuple(budgets)),
            device_names=[device.name for device in self.devices],
            engine=self.engine,
            journal=self.journal,
            now_ns=lambda: self.now_ns(),
        )
        self.registry = Registry(
            catalog=self.catalog,
            engine=self.engine,
            residency=self.residency,
            devices=self.devices,
            roots={"store": root} if roots is None else roots,
            writes=self.writes,
            journal=self.journal,
        )
        self.plans = DevicePlans(
            devices=self.devices,
            catalog=self.catalog,
            registry=self.registry,
            residency=self.residency,
            writes=self.writes,
            journal=self.journal,
        )
        self.routes = RouteRegistry(
            catalog=self.catalog,
            residency=self.residency,
            writes=self.writes,
            journal=self.journal,
        )
        self.restorer = Restorer(
            devices=self.devices,
            registry=self.registry,
            routes=self.routes,
            plans=self.plans,
            residency=self.residency,
            writes=self.writes,
        )

    def draft(self, model_id: str = "m", **changes: Any) -> ModelDraft:
        """A model without files, of 100 bytes if the engine is not told otherwise."""
        return ModelDraft(**({"id": model_id, "runtime": "fake", "options": {}} | changes))

    async def create(self, model_id: str = "m", size: int = 100, **changes: Any) -> Model:
        """Registers a model of that many bytes."""
        self.engine.prices[model_id] = size
        async with self.writes.alone():
            made = await self.registry.create(self.draft(model_id, **changes))
        assert isinstance(made, Model)
        return made

    async def load(self, model: Model) -> Lease:
        """A lease on a model that is loaded for it."""
        task = asyncio.create_task(self.residency.lease(model.handle, NEVER_NS))
        await self.until(lambda: model.handle.core_id in self.engine.loads)
        self.engine.loads[model.handle.core_id].finish()
        return await task

    async def load_and_release(self, model: Model) -> None:
        """Makes a model resident and idle."""
        (await self.load(model)).release()

    def state(self, model: Model) -> State:
        """Where it stands."""
        return self.residency.use(model.handle).state

    def events(self) -> list[Event]:
        """All that was told, oldest first."""
        return self.journal.events_after(0)[0]

    async def until(self, holds: Callable[[], object]) -> None:
        """Lets the loop and the store's thread go on until something holds."""
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                if holds():
                    return
                # Not sleep(0) alone: the store works in another thread.
                await asyncio.sleep(_POLL_S)

    async def run_all(self, work: Awaitable[T]) -> T:
        """Awaits work, while every load and unload ends well and at once."""
        task = asyncio.ensure_future(work)

        def is_done() -> bool:
            self.end_all()
            return task.done()

        await self.until(is_done)
        return await task

    def end_all(self) -> None:
        """Ends the loads and unloads that run."""
        for load in [*self.engine.loads.values()]:
            if not load.future.done():
                load.finish()
        for unload in [*self.engine.unloads.values()]:
            if not unload.future.done():
                unload.finish()

    async def settle(self) -> None:
        """Ends loads and unloads until there are none."""
        for _ in range(_ROUNDS):
            self.end_all()
            await turns()
            if not self.engine.loads and not self.engine.unloads:
                return
        raise AssertionError("there is always something to load")

    async def refused(self, work: Awaitable[object]) -> Refusal:
        """The refusal of work, while loads and unloads end well."""
        with pytest.raises(Refusal) as caught:
            await self.run_all(work)
        return caught.value

    async def end(self) -> None:
        """Ends everything, and looks at what is left."""
        self.residency.audit()
        closing = asyncio.create_task(self.residency.close(10))
        await self.run_all(closing)
        await self.store.close()
        self.residency.audit()
        assert self.residency.lease_count == 0
        assert self.residency.waiting_count == 0
        assert not self.residency._actions._transfers.count
        assert not self.residency._tickets
        # A handle that nobody knows any more is a leak, and so is one that was lost.
        known = {model.handle.core_id for model in self.catalog.models()}
        assert set(self.residency._handles) == known
        assert self.residency._yard.model_count == len(known)
