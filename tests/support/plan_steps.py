"""Short words for placements and plans on the devices cuda:0, cuda:1, ... of a PlanBench."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from modelyard.devices import ComponentDevice, Device, DeviceMap
from modelyard.placements import AutomaticPlacement, PlacementStrategy
from modelyard_server.catalog.plans import Applied, PlanChange
from modelyard_server.errors import Refusal
from modelyard_server.residency.values import NEVER_NS
from tests.support.fake_engine import turns
from tests.support.plan_bench import PlanBench

__all__ = [
    "BALANCED",
    "A",
    "B",
    "C",
    "automatic",
    "change_device",
    "finished",
    "joined",
    "kinds",
    "on",
    "refusal_of",
    "split",
    "start",
    "until",
]

A, B, C = "devices/cuda-0", "devices/cuda-1", "devices/cuda-2"


def on(position: int) -> ComponentDevice:
    """A whole model on one device."""
    return ComponentDevice.from_single(Device.from_str(f"cuda:{position}"))


def split(**parts: int) -> ComponentDevice:
    """A model in parts: split(_0=0, _=1) has "0" on cuda:0 and the rest on cuda:1."""
    return ComponentDevice.from_multiple(
        DeviceMap({key[1:]: Device.from_str(f"cuda:{i}") for key, i in parts.items()})
    )


def automatic(strategy: PlacementStrategy, *positions: int) -> AutomaticPlacement:
    """Where the server decides among these devices."""
    devices = tuple(Device.from_str(f"cuda:{i}") for i in positions)
    return AutomaticPlacement(strategy=strategy, devices=devices)


BALANCED = automatic(PlacementStrategy.BALANCED, 0, 1)


async def refusal_of(call: Any) -> Refusal:
    """How a call is refused."""
    with pytest.raises(Refusal) as caught:
        await call
    return caught.value


def kinds(bench: PlanBench, after: int = 0) -> list[tuple[str, str, str]]:
    """Type, subject and cause of what the journal tells."""
    return [(event.type.name, event.subject, event.cause) for event in bench.events(after)]


def start(bench: PlanBench, change: PlanChange, **settings: Any) -> asyncio.Task[Applied]:
    """Begins to apply a plan, in its turn."""

    async def alone() -> Applied:
        async with bench.writes.alone():
            return await bench.plans.apply(change, **({"deadline_ns": NEVER_NS} | settings))

    return asyncio.get_running_loop().create_task(alone())


async def finished(task: asyncio.Task[Applied]) -> Applied:
    """Waits for a task; for PlanBench.run."""
    return await task


async def until(holds: Callable[[], bool]) -> None:
    """Lets the loop go round until something holds."""
    async with asyncio.timeout(20):
        while not holds():
            await turns(1)


async def change_device(bench: PlanBench, position: int, **change: Any) -> Any:
    """Changes one device, in its turn; answers with how it is right after."""
    async with bench.writes.alone():
        return await bench.plans.change_device(position, answer=lambda use: use, **change)


async def joined(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    """Waits for tasks; for PlanBench.run."""
    return await asyncio.gather(*tasks)
