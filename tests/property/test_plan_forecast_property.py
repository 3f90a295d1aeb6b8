"""What a plan is forecast to do is what it does, and forecasting does nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tests.support.plan_bench import PlanBench, layers, managed

from modelyard.devices import ComponentDevice, Device, DeviceMap
from modelyard.placements import AutomaticPlacement, Placement, PlacementStrategy
from modelyard_server.catalog.plans import Applied, PlanChange
from modelyard_server.errors import Reason, Refusal
from modelyard_server.residency.shell import Lease
from modelyard_server.residency.values import State
from modelyard_server.runtimes.targets import Structure

DEVICES = 3
LAYERS = 4


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """A model to be there, and whether it is in memory, in use, pinned."""

    sizes: tuple[int, ...]
    placement: Placement | None
    resident: bool
    leased: bool
    pinned: bool

    def structure(self) -> int | Structure:
        return self.sizes[0] if len(self.sizes) == 1 else layers(*self.sizes)


sizes = st.one_of(
    st.tuples(st.sampled_from([20, 50, 100, 150, 200])),
    st.tuples(*[st.sampled_from([10, 30, 50, 80])] * LAYERS),
)
budgets = st.sampled_from([0, 60, 100, 150, 200, 250, 300, 400])
positions = st.integers(0, DEVICES - 1)


def device(position: int) -> Device:
    return Device.from_str(f"cuda:{position}")


single = positions.map(lambda i: ComponentDevice.from_single(device(i)))
automatic = st.builds(
    lambda strategy, chosen: AutomaticPlacement(
        strategy=strategy, devices=tuple(device(i) for i in chosen)
    ),
    st.sampled_from(list(PlacementStrategy)),
    st.lists(positions, unique=True),
)
mapped = st.builds(
    lambda first, rest, head: ComponentDevice.from_multiple(
        DeviceMap({**{str(i): device(first) for i in range(head)}, "": device(rest)})
    ),
    positions,
    positions,
    st.integers(0, LAYERS - 1),
)
placements: st.SearchStrategy[Placement | None] = st.one_of(
    st.none(), single, single, automatic, mapped
)
models = st.builds(
    ModelPlan,
    sizes=sizes,
    placement=placements,
    resident=st.booleans(),
    leased=st.sampled_from([False, False, True]),
    pinned=st.sampled_from([False, False, False, True]),
)


def changes(count: int) -> st.SearchStrategy[PlanChange]:
    return st.builds(
        PlanChange,
        budgets=st.dictionaries(positions, budgets, max_size=2),
        drained=st.dictionaries(positions, st.booleans(), max_size=1),
        placements=st.dictionaries(
            st.integers(0, count - 1).map(lambda i: f"m{i}"), placements, max_size=3
        ),
    )


cases = st.lists(models, min_size=1, max_size=6).flatmap(
    lambda found: st.tuples(
        st.lists(budgets, min_size=DEVICES, max_size=DEVICES),
        st.just(found),
        st.lists(changes(len(found)), min_size=1, max_size=3),
    )
)


@settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases)
def test_what_is_forecast_is_what_happens(
    case: tuple[list[int], list[ModelPlan], list[PlanChange]],
) -> None:
    asyncio.run(_run(*case))


async def _run(
    start: Sequence[int], wanted: Sequence[ModelPlan], plans: Sequence[PlanChange]
) -> None:
    bench = PlanBench(*(managed(f"cuda:{i}", budget) for i, budget in enumerate(start)))
    leases: list[Lease] = []
    for i, model in enumerate(wanted):
        await _add(bench, f"m{i}", model, leases)
    await bench.settle()
    try:
        for change in plans:
            await _change(bench, change, leases)
    finally:
        for lease in leases:
            lease.release()
        await bench.close()


async def _add(bench: PlanBench, name: str, model: ModelPlan, leases: list[Lease]) -> None:
    """Adds a model, loads, leases and pins it as far as there is room."""
    try:
        await bench.add(name, model.structure(), model.placement)
    except Refusal as refusal:
        assert refusal.reason in (Reason.MODEL_NEVER_FITS, Reason.PLACEMENT_INVALID), refusal
        # Whatever it was, somebody is there by that name.
        await bench.add(name, 0)
        return
    handle = bench.catalog.get(name).handle
    rehearsal = bench.residency.rehearse()
    rehearsal.settle()
    if not model.resident or not rehearsal.want(handle.core_id):
        return
    lease = await bench.lease(name)
    if model.leased:
        leases.append(lease)
    else:
        lease.release()
    if model.pinned:
        async with bench.writes.alone():
            await bench.run(bench.registry.set_pinned(bench.catalog.get(name), True))


async def _change(bench: PlanBench, change: PlanChange, leases: list[Lease]) -> None:
    before, revision = bench.snapshot(), bench.journal.revision
    report = await bench.plans.forecast(change)
    assert bench.snapshot() == before
    assert bench.journal.revision == revision

    try:
        applied = await bench.apply(change)
    except Refusal as refusal:
        event("refused")
        assert report.obstacles, refusal
        assert refusal.reason is report.obstacles[0].refusal.reason
        assert bench.snapshot() == before
        assert bench.journal.revision == revision
        return
    assert not report.obstacles
    assert applied.report == report
    assert applied.plan == bench.plans.plan()
    await _settle(bench, leases)
    _compare(bench, before.held, applied)


async def _settle(bench: PlanBench, leases: list[Lease]) -> None:
    """Requests of models that are to leave end; then loads and unloads do."""
    owed = [bench.residency.device_use(i).deficit for i in range(DEVICES)]
    while True:
        ran = await bench.step()
        now = [bench.residency.device_use(i).deficit for i in range(DEVICES)]
        assert all(new <= old for new, old in zip(now, owed, strict=True)), (owed, now)
        owed = now
        over = [lease for lease in leases if _is_leaving(bench, lease)]
        for lease in over:
            leases.remove(lease)
            lease.release()
        if not ran and not over:
            return


def _is_leaving(bench: PlanBench, lease: Lease) -> bool:
    return bench.residency.use(lease.handle).state is State.DRAINING


def _compare(bench: PlanBench, before: Any, applied: Applied) -> None:
    report, held = applied.report, bench.held()
    if any(model.staged for model in report.models):
        event("staged")
    if report.displaced:
        event("displaced")
    expected = before | {model.model: dict(model.planned) for model in report.models}
    assert held == {name: charges for name, charges in expected.items() if charges}
    for i, forecast in enumerate(report.devices):
        use = bench.residency.device_use(i)
        used = use.reserved + use.resident + use.draining + use.quarantined
        assert used == forecast.used_bytes, (forecast, use)
        assert use.budget == forecast.budget_bytes
        assert bench.residency.is_closed(i) == forecast.drained
    for model in report.models:
        assert dict(model.current) == before.get(model.model, {})
        # Who is loaded beside itself is there afterwards, unless it is named as displaced.
        gone = {each.model for each in report.displaced}
        if model.staged:
            assert model.planned or f"models/{model.model}" in gone
    left = {f"models/{name}" for name in before if name not in held}
    moved = {f"models/{each.model}" for each in report.models if each.placement_changed}
    assert {each.model for each in report.displaced} - moved == left - moved
    for each in report.displaced:
        assert each.model.removeprefix("models/") not in held
        assert each.cause.startswith(("devices/", "models/")), each
        assert each.charges
