"""Registering routes: what is loaded first, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.support.catalog_bench import CatalogBench
from tests.support.catalog_writer import NOON

from modelyard.devices import ComponentDevice, Device
from modelyard.placements import Placement
from modelyard_server.catalog.ensembles import fit_together
from modelyard_server.catalog.model import Model
from modelyard_server.catalog.records import Change, RequestRecord
from modelyard_server.catalog.route import (
    MOST_KEYS,
    MOST_PREFIXES,
    Route,
    RouteDraft,
    name_violations,
)
from modelyard_server.catalog.route_registry import RouteAnswer
from modelyard_server.errors import Reason, Refusal
from modelyard_server.residency.values import NEVER_NS, State
from modelyard_server.routing.target_json import read_target
from modelyard_server.routing.targets import Canary, Target, Transform, Versions
from modelyard_server.runtimes.api import ModelFilesError

_READ = read_target(
    {
        "versions": {
            "versions": [
                {"name": "v1", "target": "a"},
                {"name": "v2", "target": "routes/both"},
                {"name": "v3", "target": "c"},
            ],
            "current": "v1",
            "canary": {"version": "v2", "percent": 5},
        }
    }
)
assert isinstance(_READ, Versions)
VERSIONS: Versions = _READ


def sequence(*targets: str) -> Target:
    return read_target({"sequence": {"steps": [{"target": target} for target in targets]}})


def ensemble(*targets: str) -> Target:
    members = [{"name": f"m{i}", "target": target} for i, target in enumerate(targets)]
    return read_target({"ensemble": {"members": members, "combine": "all"}})


class Bench(CatalogBench):
    """Models a, b, c and d over one device, and a route "both" of a sequence of b and c."""

    async def creating(self, route_id: str, target: Target, *keys: str, **values: Any) -> Route:
        draft = RouteDraft(id=route_id, keys=keys or (f"k-{route_id}",), target=target)
        async with self.writes.alone():
            return (await self.routes.create(draft, **values)).route

    async def updating(self, old: Route, **changes: Any) -> RouteAnswer:
        given = {"keys": old.keys, "prefixes": old.prefixes, "target": old.target} | changes
        async with self.writes.alone():
            return await self.routes.update(old, RouteDraft(id=old.id, **given))

    async def promoting(self, old: Route) -> RouteAnswer:
        async with self.writes.alone():
            return await self.routes.promote(old)

    async def refused_change(self, work: Any) -> Refusal:
        """The refusal of a change, which must leave nothing behind."""
        routes, written = self.catalog.routes(), list(self.store.written)
        refusal = await self.refused(work)
        assert self.catalog.routes() == routes
        assert self.store.written == written
        assert self.residency.lease_count == 0
        return refusal


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path, budgets=(400,))
    for name in "abcd":
        await made.create(name, 100)
    await made.creating("both", sequence("b", "c"))
    yield made
    await made.end()


# --- Load, then switch ----------------------------------------------------------------------------


async def test_all_that_a_version_needs_is_loaded_before_it_is_current(bench: Bench) -> None:
    route = await bench.creating("r", VERSIONS)
    models = {name: bench.catalog.get(name) for name in "abc"}
    await bench.load_and_release(models["a"])
    promoting = asyncio.create_task(bench.promoting(route))
    for held, name in enumerate("bc", start=1):
        core_id = models[name].handle.core_id
        await bench.until(partial(bench.engine.loads.__contains__, core_id))
        # Nobody sees the new version before all of it is there, and nobody takes the old one away.
        assert bench.catalog.get_route("r") is route
        assert bench.residency.lease_count == held
        bench.engine.loads[core_id].finish()
    promoted = (await promoting).route
    assert promoted.target == replace(VERSIONS, current="v2", canary=None)
    assert bench.catalog.get_route("r") is promoted
    assert [bench.state(model) for model in models.values()] == [State.RESIDENT] * 3
    assert bench.residency.lease_count == 0


async def test_a_version_that_cannot_be_loaded_changes_nothing(bench: Bench) -> None:
    route = await bench.creating("r", VERSIONS)
    c = bench.catalog.get("c")
    await bench.load_and_release(bench.catalog.get("a"))

    async def promotes() -> None:
        promoting = asyncio.create_task(bench.promoting(route))
        await bench.until(lambda: bench.catalog.get("b").handle.core_id in bench.engine.loads)
        bench.end_all()
        await bench.until(lambda: c.handle.core_id in bench.engine.loads)
        bench.engine.loads[c.handle.core_id].fail(ModelFilesError("torn"))
        await promoting

    routes = bench.catalog.routes()
    with pytest.raises(Refusal) as caught:
        await promotes()
    assert caught.value.reason is Reason.LOAD_FAILED
    assert "models/c, for routes/r" in caught.value.text
    assert bench.catalog.routes() == routes
    assert bench.residency.lease_count == 0


@pytest.mark.parametrize("present", ["nothing", "a part of it", "too little room"])
async def test_nothing_is_loaded_where_nobody_would_wait_less(bench: Bench, present: str) -> None:
    back = replace(VERSIONS, current="v2", canary=Canary("v1", 5))
    route = await bench.creating("r", back if present == "a part of it" else VERSIONS)
    if present == "a part of it":
        await bench.load_and_release(bench.catalog.get("b"))
    if present == "too little room":
        await bench.load_and_release(bench.catalog.get("a"))
        bench.residency.set_budget(0, 250)
    loads = len(bench.engine.loads)
    await bench.promoting(route)
    assert len(bench.engine.loads) == loads
    found = bench.catalog.get_route("r").target
    assert isinstance(found, Versions) and found.canary is None


async def test_a_model_becomes_a_route_of_versions_without_anybody_waiting(bench: Bench) -> None:
    route = await bench.creating("r", read_target({"model": "a"}))
    await bench.load_and_release(bench.catalog.get("a"))
    await bench.run_all(bench.updating(route, target=replace(VERSIONS, current="v3", canary=None)))
    assert bench.state(bench.catalog.get("c")) is State.RESIDENT
    # The same model by another name needs no load.
    changed = bench.catalog.get_route("r")
    await bench.updating(changed, target=read_target({"model": "c"}))
    assert not bench.engine.loads


# --- What cannot be stored ------------------------------------------------------------------------


async def test_what_cannot_be_stored_is_not_there(bench: Bench) -> None:
    route = await bench.creating("r", VERSIONS)
    bench.store.full = True
    for work in (
        bench.creating("s", sequence("a")),
        bench.updating(route, prefixes=("p/",)),
        bench.promoting(route),
        bench.routes.abort(route),
        bench.routes.delete(route),
    ):
        assert (await bench.refused_change(work)).reason is Reason.CATALOG_UNAVAILABLE
    assert bench.catalog.routed("p/x") is None
    bench.store.full = False


async def test_ending_no_trial_is_remembered_all_the_same(bench: Bench) -> None:
    route = await bench.creating("r", replace(VERSIONS, canary=None))
    record = RequestRecord(
        request_id="1", method="AbortCanary", digest="d", response=b"", time=NOON
    )
    answer = await bench.routes.abort(route, remember=lambda answer: record)
    assert answer.route is route
    assert bench.store.written[-1] == Change(request=record)
    written = len(bench.store.written)
    await bench.routes.abort(route)
    assert len(bench.store.written) == written


# --- What is refused ------------------------------------------------------------------------------


def test_names_are_told_at_once_and_there_may_be_so_many() -> None:
    keys = [f"k{i}" for i in range(MOST_KEYS)]
    prefixes = [f"p{i}" for i in range(MOST_PREFIXES)]
    assert list(name_violations("r", [*keys, "k0"], [*prefixes, "p0"])) == []
    assert list(name_violations("r", [], [""])) == []
    found = list(name_violations("R", [*keys, "/"], [*prefixes, "a..b", ""]))
    assert [each.field for each in found] == [
        "route_id",
        f"route.keys[{MOST_KEYS}]",
        f"route.prefixes[{MOST_PREFIXES}]",
        "route.keys",
        "route.prefixes",
    ]
    assert [each.field for each in name_violations("r", [], [])] == ["route.keys"]


async def test_transforms_are_checked_by_whoever_knows_them(bench: Bench) -> None:
    def check(transform: Transform) -> list[tuple[str, str]]:
        return [("name", f"there is no {transform.name}")]

    bench.routes._check_transform = check
    steps = [{"target": "a"}, {"transform": {"name": "nonsense"}}]
    target = read_target({"sequence": {"steps": steps}})
    refusal = await bench.refused_change(bench.creating("r", target))
    assert refusal.reason is Reason.INVALID_FIELD
    assert [each.field for each in refusal.violations] == ["route.sequence.steps[1].transform.name"]


async def test_steps_whose_tasks_do_not_meet_are_refused(bench: Bench) -> None:
    for name, task in (("emb", "feature-extraction"), ("gen", "text-generation")):
        await bench.create(name, 10, runtime="transformers", task=task)
    refusal = await bench.refused_change(bench.creating("r", sequence("emb", "gen", "gone")))
    assert refusal.reason is Reason.INVALID_FIELD
    assert [each.field for each in refusal.violations] == [
        "route.sequence.steps[1]",
        "route.sequence.steps[2].target",
    ]
    await bench.creating("r", sequence("gen"))


# --- Ensembles ------------------------------------------------------------------------------------


async def test_members_fit_or_not_whatever_is_there_today(bench: Bench) -> None:
    big = await bench.create("big", 201)
    await bench.load_and_release(big)
    async with bench.writes.alone():
        await bench.registry.set_pinned(big, True)
    lease = await bench.load(bench.catalog.get("d"))
    bench.residency.set_closed(0, True)
    # Beside the pinned one they do not fit, without it they do.
    await bench.creating("all", ensemble("a", "b", "c", "d"))
    refusal = await bench.refused(bench.creating("more", ensemble("a", "b", "big")))
    assert refusal.reason is Reason.MODEL_NEVER_FITS
    assert refusal.metadata == {"route": "routes/more"}
    assert bench.state(big) is State.RESIDENT
    lease.release()
    bench.residency.set_closed(0, False)
    await bench.settle()


async def test_a_member_whose_load_has_failed_has_its_size_all_the_same(
    bench: Bench,
) -> None:
    a = bench.catalog.get("a")
    lease = asyncio.create_task(bench.residency.lease(a.handle, NEVER_NS))
    await bench.until(lambda: a.handle.core_id in bench.engine.loads)
    bench.engine.loads[a.handle.core_id].fail(ModelFilesError("torn"))
    assert (await bench.refused(lease)).reason is Reason.LOAD_FAILED
    await bench.creating("r", ensemble("a", "b"))


def on(*devices: str) -> Placement:
    (device,) = devices
    return ComponentDevice.from_single(Device.from_str(device))


@pytest.mark.parametrize(
    ("sizes", "budgets", "fits"),
    [
        # Wherever there is room, and each where it must be: name, bytes and device.
        ([("x", 100, ""), ("y", 100, "cuda:0")], (100, 100), True),
        ([("x", 100, "cuda:0"), ("y", 100, "cuda:0")], (100, 100), False),
        ([("x", 60, "auto"), ("y", 100, "cuda:1"), ("z", 40, "auto")], (100, 100), True),
        ([("x", 40, "auto"), ("y", 60, "auto"), ("z", 100, "auto")], (100, 100), True),
        ([("x", 60, "auto"), ("y", 60, "auto"), ("z", 60, "auto")], (100, 100), False),
    ],
)
async def test_members_are_placed_as_they_would_be_for_a_request(
    tmp_path: Path, sizes: list[tuple[str, int, str]], budgets: tuple[int, ...], fits: bool
) -> None:
    bench = Bench(tmp_path, budgets=budgets)
    models: list[Model] = []
    for name, size, device in sizes:
        placement = on(device) if device.startswith("cuda") else None
        models.append(await bench.create(name, size, placement=placement))
    for order in (models, models[::-1]):
        assert fit_together(bench.residency, [model.handle.ways for model in order]) is fits
    assert not bench.engine.loads
    await bench.end()
