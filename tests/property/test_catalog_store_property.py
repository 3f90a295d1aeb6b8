"""Random changes to the catalog's store beside a dictionary, reopened at random points."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from tests.support.catalog_writer import integrity_of

from modelyard_server.catalog.records import (
    Change,
    DeviceRecord,
    ModelRecord,
    Owner,
    PlacementRecord,
    RequestRecord,
    Stored,
)
from modelyard_server.catalog.store import CatalogStore

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
# Few names, so that changes meet. Some are models' ids and keys of others.
IDS = st.sampled_from(["a", "b", "c", "d"])
KEYS = st.sampled_from(["a", "b", "k", "l", "m/n:1"])
DEVICES = st.sampled_from(["devices/cpu", "devices/cuda-0"])
REQUESTS = st.sampled_from(["r1", "r2", "r3", "r4", "r5"])
TIMES = st.datetimes(timezones=st.just(UTC))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MODELS = st.builds(
    ModelRecord,
    id=IDS,
    owner=st.sampled_from(Owner),
    keys=st.lists(KEYS, unique=True, max_size=3).map(tuple),
    root=TEXT,
    folder=TEXT,
    runtime=TEXT,
    task=TEXT,
    options=st.dictionaries(TEXT, JSON, max_size=3),
    placement=JSON,
    pinned=st.booleans(),
    created=TIMES,
    etag=TEXT,
    origin=TEXT,
)
DEVICE_RECORDS = st.builds(
    DeviceRecord,
    name=DEVICES,
    budget_bytes=st.none() | st.integers(0, 2**63 - 1),
    drained=st.booleans(),
    origin=TEXT,
)
PLACEMENTS = st.builds(PlacementRecord, model=IDS, placement=JSON, origin=TEXT)
REQUEST_RECORDS = st.builds(
    RequestRecord,
    request_id=REQUESTS,
    method=TEXT,
    digest=TEXT,
    response=st.binary(max_size=6000),
    time=TIMES,
)


def some(strategy: st.SearchStrategy[Any], name: str) -> st.SearchStrategy[tuple[Any, ...]]:
    def unique_by(value: Any) -> object:
        return getattr(value, name) if name else value

    return st.lists(strategy, max_size=3, unique_by=unique_by).map(tuple)


CHANGES = st.builds(
    Change,
    put_models=some(MODELS, "id"),
    delete_models=some(IDS, ""),
    put_devices=some(DEVICE_RECORDS, "name"),
    put_placements=some(PLACEMENTS, "model"),
    delete_placements=some(IDS, ""),
    delete_devices=some(DEVICES, ""),
    new_plan=st.booleans(),
    request=st.none() | REQUEST_RECORDS,
)

EMPTY = Stored(models=(), devices=(), placements=(), plan_revision=0, plan_time=None)


class Contradiction(Exception):
    pass


def changed(before: Stored, change: Change, now: datetime) -> Stored:
    """What the change makes of what was stored, said the simplest way."""
    models = {m.id: m for m in before.models if m.id not in change.delete_models}
    placements = {p.model: p for p in before.placements if p.model in models}
    for name in change.delete_placements:
        placements.pop(name, None)
    models |= {m.id: m for m in change.put_models}
    placements |= {p.model: p for p in change.put_placements}
    devices = {d.name: d for d in before.devices if d.name not in change.delete_devices}
    devices |= {d.name: d for d in change.put_devices}
    keys = [key for m in models.values() for key in {m.id, *m.keys}]
    if len(keys) != len(set(keys)) or not placements.keys() <= models.keys():
        raise Contradiction
    return Stored(
        models=tuple(models[name] for name in sorted(models)),
        devices=tuple(devices[name] for name in sorted(devices)),
        placements=tuple(placements[name] for name in sorted(placements)),
        plan_revision=before.plan_revision + change.new_plan,
        plan_time=now if change.new_plan else before.plan_time,
    )


class StoreMachine(RuleBasedStateMachine):
    """The store, in a file or in memory, and what should be in it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path: Path | None = None
        self.runner = asyncio.Runner()
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.expected = EMPTY
        self.requests: dict[str, RequestRecord] = {}

    @initialize(in_file=st.booleans())
    def open(self, in_file: bool) -> None:
        self.path = Path(self.folder.name) / "catalog.db" if in_file else None
        self.store = CatalogStore.open(self.path, now=lambda: self.now)

    @rule(change=CHANGES)
    def write(self, change: Change) -> None:
        self.now += timedelta(microseconds=1)
        try:
            expected = changed(self.expected, change, self.now)
            if change.request is not None and change.request.request_id in self.requests:
                raise Contradiction
        except Contradiction:
            try:
                self.runner.run(self.store.write(change))
            except ValueError:
                return
            raise AssertionError("a contradiction was stored") from None
        revision = self.runner.run(self.store.write(change))
        self.expected = expected
        assert revision == expected.plan_revision
        if change.request is not None:
            self.requests[change.request.request_id] = change.request

    @rule(keys=st.permutations(["k", "l", "m/n:1"]))
    def move_keys(self, keys: list[str]) -> None:
        """Gives the keys that are no ids to the models that are there, which is often allowed."""
        models = [
            replace(m, keys=(key,)) for m, key in zip(self.expected.models, keys, strict=False)
        ]
        self.write(Change(put_models=tuple(models)))

    @rule()
    def reopen(self) -> None:
        if self.path is not None:
            self.runner.run(self.store.close())
            assert integrity_of(self.path) == "ok"
            self.store = CatalogStore.open(self.path, now=lambda: self.now)

    @rule(request_id=REQUESTS)
    def ask(self, request_id: str) -> None:
        assert self.runner.run(self.store.request(request_id)) == self.requests.get(request_id)

    @invariant()
    def holds_what_it_should(self) -> None:
        if hasattr(self, "store"):
            assert self.store.read() == self.expected

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.runner.run(self.store.close())
        self.runner.close()
        self.folder.cleanup()


def test_the_store_holds_what_a_dictionary_would() -> None:
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=150,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            print_blob=True,
        ),
    )
