"""GetStats over a real residency, whose engine and clock the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.support.fake_engine import FakeClock, FakeEngine, turns

from modelyard.v1 import admin_service_pb2 as pb
from modelyard_server.devices.placed import PlacedAs, whole
from modelyard_server.execution.figures import LaneFigures
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import NEVER_NS, ModelHandle, YardSettings
from modelyard_server.runtimes.api import ModelSpec, Price
from modelyard_server.services.admin import AdminService
from modelyard_server.services.inference import InferenceFigures
from modelyard_server.services.shadows import ShadowFigures
from modelyard_server.transport.api import Call

CALL = Call(b"", lambda: None, None)


class CountingEngine(FakeEngine):
    """An engine that says it has run what the test says.

    Attributes:
        ran: figures.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ran = LaneFigures()

    @property
    def figures(self) -> LaneFigures:
        return self.ran


class Yard:
    """Room for two models of 100 bytes, by LRU."""

    def __init__(self) -> None:
        self.engine = CountingEngine()
        self.clock = FakeClock()
        self.residency = Residency(
            settings=YardSettings(budgets=(250,), policy="lru"),
            device_names=("devices/cpu",),
            engine=self.engine,
            now_ns=self.clock,
        )
        self.service = AdminService(
            residency=self.residency,
            engine=self.engine,
            figures=InferenceFigures(),
            shadows=ShadowFigures(),
            runtimes=(),
        )

    def add(self, name: str) -> ModelHandle:
        def replan(price: Price) -> tuple[PlacedAs, ...]:
            return (whole(0, price),)

        price = Price(resting_bytes=100, peak_bytes=100)
        return self.residency.add(
            ModelSpec(name=name, runtime="fake"),
            ways=replan(price),
            replan=replan,
            priced_bytes=100,
        )

    async def load(self, handle: ModelHandle, took_s: float) -> None:
        """Asks for a model that is not there; its load takes so long."""
        task = asyncio.create_task(self.residency.lease(handle, NEVER_NS))
        await turns()
        for unload in [*self.engine.unloads.values()]:
            unload.finish()
        await turns()
        self.clock.advance(took_s)
        self.engine.loads[handle.core_id].finish()
        (await task).release()

    async def stats(self) -> pb.GetStatsResponse:
        return await self.service.get_stats(pb.GetStatsRequest(), CALL)


@pytest.fixture
async def yard() -> AsyncIterator[Yard]:
    made = Yard()
    yield made
    made.residency.audit()
    assert made.residency.lease_count == made.residency.waiting_count == 0


def seconds(duration: Any) -> float:
    value: float = duration.ToTimedelta().total_seconds()
    return value


async def test_nothing_has_happened_yet(yard: Yard) -> None:
    stats = await yard.stats()
    assert stats.HasField("regret") and stats.HasField("departures") and stats.HasField("batches")
    assert seconds(stats.recent_load_duration) == seconds(stats.regret.regret_duration) == 0
    assert dict(stats.departures.counts) == {}
    assert not stats.departures.HasField("median_idle_duration")
    assert not stats.batches.HasField("padding_ratio")


async def test_load_time_of_the_last_minute_is_that_of_the_last_minute(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The transfers measure by the loop's clock; here it is the test's.
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: yard.clock() * 1e-9)
    a, b = yard.add("a"), yard.add("b")
    await yard.load(a, 2.0)
    yard.clock.advance(30)
    await yard.load(b, 3.0)
    stats = await yard.stats()
    assert seconds(stats.recent_load_duration) == pytest.approx(5.0)
    assert seconds(stats.load_duration) == pytest.approx(5.0)
    yard.clock.advance(40)
    stats = await yard.stats()
    assert seconds(stats.recent_load_duration) == pytest.approx(3.0)
    assert seconds(stats.load_duration) == pytest.approx(5.0)
    yard.clock.advance(40)
    assert seconds((await yard.stats()).recent_load_duration) == 0


async def test_victims_are_counted_by_cause_and_aged(yard: Yard) -> None:
    handles = [yard.add(name) for name in "abcd"]
    for handle in handles[:2]:
        await yard.load(handle, 1.0)
    yard.clock.advance(10)
    await yard.load(handles[2], 1.0)  # a goes: loaded at 1 s, asked for at 0 s, told at 12 s.
    await yard.load(handles[3], 1.0)  # b goes: loaded at 2 s, asked for at 1 s, told at 13 s.
    unloading = asyncio.create_task(yard.residency.unload(handles[3]))
    await turns()
    for unload in [*yard.engine.unloads.values()]:
        unload.finish()
    await unloading
    departures = (await yard.stats()).departures
    assert dict(departures.counts) == {"MODEL": 2, "OPERATOR": 1}
    assert departures.age_count == 2
    assert seconds(departures.median_idle_duration) == pytest.approx(12.0)
    assert seconds(departures.p90_idle_duration) == pytest.approx(12.0)
    assert seconds(departures.median_resident_duration) == pytest.approx(11.0)
    assert seconds(departures.p90_resident_duration) == pytest.approx(11.0)


async def test_half_and_nine_in_ten_of_the_ages(yard: Yard) -> None:
    a, b = yard.add("a"), yard.add("b")
    yard.residency.set_budget(0, 150)  # For one of them.
    await yard.load(a, 0)
    for wait_s in range(1, 11):
        yard.clock.advance(wait_s)
        a, b = b, a
        await yard.load(a, 0)
    departures = (await yard.stats()).departures
    assert departures.age_count == 10
    assert seconds(departures.median_idle_duration) == pytest.approx(5)
    assert seconds(departures.p90_idle_duration) == pytest.approx(9)


async def test_a_closed_device_is_a_cause_by_the_contracts_name(yard: Yard) -> None:
    await yard.load(yard.add("a"), 1.0)
    yard.residency.set_closed(0, True)
    await turns()
    for unload in [*yard.engine.unloads.values()]:
        unload.finish()
    await turns()
    assert dict((await yard.stats()).departures.counts) == {"DEVICE_DRAINED": 1}


async def test_a_pin_is_regretted(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: yard.clock() * 1e-9)
    a, b, c = (yard.add(name) for name in "abc")
    await yard.load(a, 1.0)
    yard.residency.set_pinned(a, True)
    for handle in (b, c, b, c):  # LRU would have dropped a, and kept both.
        await yard.load(handle, 2.0)
    regret = (await yard.stats()).regret
    assert seconds(regret.lru_load_duration) == pytest.approx(1 + 2 + 2)
    assert seconds(regret.regret_duration) == pytest.approx(2 + 2)


async def test_batches_are_told_as_the_engine_says(yard: Yard) -> None:
    yard.engine.ran = LaneFigures(
        batch_count=4,
        request_count=9,
        row_count=11,
        largest_request_count=5,
        largest_row_count=6,
        alone_count=2,
        unshared_count=7,
        split_count=1,
        cell_count=200,
        padding_cell_count=50,
    )
    batches = (await yard.stats()).batches
    assert batches == pb.BatchFigures(
        batch_count=4,
        request_count=9,
        row_count=11,
        largest_request_count=5,
        largest_row_count=6,
        alone_count=2,
        unshared_count=7,
        split_count=1,
        padding_ratio=0.25,
    )
