"""A residency over an engine whose every step the test decides."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from modelyard_server.devices.placed import PlacedAs, whole
from modelyard_server.errors import Refusal
from modelyard_server.residency.shell import Lease, Residency
from modelyard_server.residency.values import NEVER_NS, ModelHandle, State, YardSettings
from modelyard_server.runtimes.api import ModelSpec, Price
from tests.support.fake_engine import FakeClock, FakeEngine, turns

__all__ = ["BUDGET", "Bench", "Waiter", "refusal_of"]

BUDGET = 250

Waiter = asyncio.Task[Lease]
"""A client that waits for a lease."""


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


async def refusal_of(task: Waiter) -> Refusal:
    """What a client that waits is refused with."""
    with pytest.raises(Refusal) as caught:
        await task
    return caught.value
