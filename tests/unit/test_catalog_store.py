"""The catalog's store: what it keeps, what it refuses, and which files it opens."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from tests.support.catalog_writer import NOON, change_of, integrity_of, model, state_of

from modelyard_server.catalog import schema
from modelyard_server.catalog.records import (
    Change,
    DeviceRecord,
    Owner,
    PlacementRecord,
    RequestRecord,
    RouteRecord,
)
from modelyard_server.catalog.store import (
    CatalogStore,
    StorageFailed,
    StoreDamaged,
    StoreError,
    StoreInUse,
    StoreTooNew,
)

LATER = NOON + timedelta(days=400, microseconds=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a folder?#%41" / "catalog.db"


@pytest.fixture(params=["file", "memory"])
async def store(request: pytest.FixtureRequest, path: Path) -> AsyncIterator[CatalogStore]:
    path.parent.mkdir()
    store = CatalogStore.open(path if request.param == "file" else None, now=lambda: NOON)
    yield store
    await store.close()
    assert not [thread for thread in threading.enumerate() if "catalog" in thread.name]
    if request.param == "file":
        assert integrity_of(path) == "ok"
        assert [file.name for file in path.parent.iterdir()] == [path.name]


def placement(model_id: str, value: Any = "cuda:1") -> PlacementRecord:
    return PlacementRecord(model=model_id, placement=value, origin="cpu")


def request(request_id: str, **values: Any) -> RequestRecord:
    fields: dict[str, Any] = {
        "method": "CreateModel",
        "digest": "d",
        "response": b"answer",
        "time": NOON,
    }
    return RequestRecord(request_id=request_id, **(fields | values))


def route(route_id: str, **values: Any) -> RouteRecord:
    fields: dict[str, Any] = {
        "owner": Owner.API,
        "keys": ("k",),
        "target": {"model": "a"},
        "created": NOON,
        "updated": NOON,
        "etag": '"1"',
        "origin": "",
    }
    return RouteRecord(id=route_id, **(fields | values))


# What is kept.


async def test_a_new_store_is_empty(store: CatalogStore) -> None:
    assert store.read() == state_of(0)
    assert await store.request("1") is None


async def test_records_come_back_as_they_were(store: CatalogStore) -> None:
    options = {
        "text": "ä\ud800\0'\"",
        "numbers": [1, 2**70, -0.5, 1e300, float("inf"), True, None],
        "nested": {"b": {}, "a": []},
    }
    models = (
        model(
            "a",
            owner=Owner.CONFIG,
            keys=("z", "a", "acme/A:1"),
            task="text-classification",
            options=MappingProxyType(options),
            placement={"encoder.layer.10": "cuda:1", "": "cpu"},
            pinned=True,
            created=LATER,
            etag='"é"',
            origin="sha256:1",
        ),
        model("b", placement="auto", root="", folder="", created=datetime(1, 1, 1, tzinfo=UTC)),
    )
    devices = (
        DeviceRecord(name="devices/cpu", budget_bytes=None, drained=True, origin=""),
        DeviceRecord(name="devices/cuda-1", budget_bytes=2**63 - 1, drained=False, origin="80%"),
    )
    placements = (placement("a", {"": "disk"}), placement("b", None))
    await store.write(Change(put_models=models, put_devices=devices, put_placements=placements))
    stored = store.read()
    assert (stored.models, stored.devices, stored.placements) == (models, devices, placements)
    first = stored.models[0]
    assert isinstance(first.placement, dict)
    assert list(first.placement) == ["encoder.layer.10", ""]  # The order of a device map counts.
    assert first.created.tzinfo is UTC


async def test_what_is_put_again_is_overwritten_and_what_is_deleted_is_gone(
    store: CatalogStore,
) -> None:
    device = DeviceRecord(name="devices/cpu", budget_bytes=5, drained=False, origin="")
    await store.write(
        Change(
            put_models=(model("a", keys=("k", "l")), model("b")),
            put_devices=(device,),
            put_placements=(placement("a"), placement("b")),
        )
    )
    new = model("a", keys=("l", "m"), owner=Owner.CONFIG, pinned=True, etag="2", created=LATER)
    await store.write(
        Change(
            put_models=(new,),
            put_devices=(replace(device, budget_bytes=None),),
            put_placements=(placement("a", "cpu"),),
            delete_placements=("b",),
        )
    )
    stored = store.read()
    assert stored.models == (new, model("b"))
    assert stored.devices == (replace(device, budget_bytes=None),)
    assert stored.placements == (placement("a", "cpu"),)
    gone = Change(delete_models=("b", "unknown"), delete_devices=(device.name, "unknown"))
    await store.write(gone)
    assert store.read() == replace(stored, models=(new,), devices=())


async def test_overwriting_a_model_keeps_its_placement_and_deleting_it_does_not(
    store: CatalogStore,
) -> None:
    await store.write(Change(put_models=(model("a"),), put_placements=(placement("a"),)))
    await store.write(Change(put_models=(model("a", etag="2"),)))
    assert store.read().placements == (placement("a"),)
    await store.write(Change(delete_models=("a",)))
    await store.write(Change(put_models=(model("a"),)))
    assert store.read().placements == ()


async def test_deletions_come_first_so_that_both_together_replace(store: CatalogStore) -> None:
    await store.write(
        Change(put_models=(model("a", keys=("k",)),), put_placements=(placement("a"),))
    )
    await store.write(
        Change(
            delete_models=("a",),
            put_models=(model("b", keys=("a", "k")),),
            delete_placements=("b",),
            put_placements=(placement("b"),),
        )
    )
    assert store.read().models == (model("b", keys=("a", "k")),)
    assert store.read().placements == (placement("b"),)


async def test_only_new_plans_count_the_revision_up(store: CatalogStore) -> None:
    assert await store.write(Change(put_models=(model("a"),))) == 0
    assert await store.write(Change(new_plan=True)) == 1
    assert store.read().plan_time == NOON
    assert await store.write(Change()) == 1
    assert await store.write(Change(new_plan=True)) == 2
    assert store.read().plan_revision == 2


async def test_answers_are_remembered(store: CatalogStore) -> None:
    first = request("0", method="ApplyPlan", digest="", response=bytes(range(256)), time=LATER)
    await store.write(Change(request=first))
    await store.write(Change(request=request("1", response=b"")))
    assert await store.request("0") == first
    assert await store.request("1") == request("1", response=b"")


async def test_the_oldest_answers_are_forgotten() -> None:
    store = CatalogStore.open(None)
    await store.write(Change(request=request("0")))
    # The clock is set back, as clocks are: newest means recorded last.
    early = datetime(2000, 1, 1, tzinfo=UTC)
    more = (request(str(i), time=early) for i in range(1, schema.KEPT_REQUESTS))
    await asyncio.gather(*(store.write(Change(request=one)) for one in more))
    assert await store.request("0") == request("0")
    await store.write(Change(request=request("last", time=early)))
    assert await store.request("0") is None
    assert await store.request("1") is not None
    assert await store.request("last") is not None
    await store.close()


async def test_routes_are_kept_changed_and_deleted(store: CatalogStore) -> None:
    first = route("r", keys=("k2", "k1"), target={"model": "gone"})
    await store.write(Change(put_models=(model("a", keys=("own",)),), put_routes=(first,)))
    await store.write(Change(put_routes=(route("q", keys=("k3",)),)))
    assert store.read().routes == (route("q", keys=("k3",)), first)
    assert [kept.keys for kept in store.read().models] == [("own",)]
    # A key goes from one route to another, and one from a route to a model, in one change.
    moved = route("q", keys=("k1", "k3"), target={"model": "a"}, etag='"2"', updated=LATER)
    await store.write(
        Change(
            put_routes=(replace(first, keys=("own",)), moved),
            put_models=(model("a", keys=("k2",)),),
        )
    )
    assert store.read().routes == (moved, replace(first, keys=("own",)))
    assert [kept.keys for kept in store.read().models] == [("k2",)]
    await store.write(Change(delete_models=("a",)))
    assert store.read().routes == (moved, replace(first, keys=("own",)))
    await store.write(
        Change(delete_routes=("q", "r"), put_models=(model("b", keys=("k1", "own")),))
    )
    assert store.read().routes == ()


async def test_targets_and_prefixes_of_routes_are_kept_changed_and_deleted(
    store: CatalogStore,
) -> None:
    split = {"split": {"branches": [{"name": "ä\ud800", "weight": 2**53}], "tolerance": 0.1}}
    first = route("r", keys=(), prefixes=("acme/", "", "acme/x"), target=split)
    await store.write(Change(put_routes=(first, route("q", prefixes=("b",)))))
    assert store.read().routes == (route("q", prefixes=("b",)), first)
    # A prefix goes from one route to another in one change.
    given, taken = replace(first, prefixes=("acme/",)), route("q", prefixes=("", "b"))
    await store.write(Change(put_routes=(taken, given)))
    assert store.read().routes == (taken, given)
    await store.write(Change(delete_routes=("r",)))
    await store.write(Change(put_routes=(replace(taken, prefixes=("acme/",)),)))
    assert store.read().routes == (replace(taken, prefixes=("acme/",)),)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda: Change(put_routes=(route("s", prefixes=("x", "p/")),)),
            "prefix 'p/' .* routes 'r' and 's'",
        ),
        (lambda: Change(put_routes=(route("s", prefixes=("", "")),)), "prefixes .* '' is given"),
        (lambda: Change(put_routes=(route("s", keys=("k1",)),)), "'k1' .* routes 'r' and 's'"),
        (lambda: Change(put_routes=(route("s", keys=("a",)),)), "'a' .* model 'a' .* route 's'"),
        (lambda: Change(put_models=(model("k1"),)), "'k1' .* model 'k1' .* route 'r'"),
        (lambda: Change(put_routes=(route("s"), route("s"))), "put_routes: 's' is given twice"),
        (lambda: Change(put_routes=(route("s", keys=()),)), "route 's' has no keys"),
        (lambda: Change(put_routes=(route("s", keys=("x", "x")),)), "'x' is given twice"),
    ],
)
async def test_a_route_whose_keys_are_taken_changes_nothing(
    store: CatalogStore, change: Any, text: str
) -> None:
    first = route("r", keys=("k1",), prefixes=("p/",))
    await store.write(Change(put_models=(model("a"),), put_routes=(first,)))
    before = store.read()
    with pytest.raises(ValueError, match=text):
        await store.write(change())
    assert store.read() == before


async def test_routes_of_a_file_that_knew_one_kind_mean_their_models(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        schema.migrate(connection, schema.MIGRATIONS[:2])
        connection.execute(
            "INSERT INTO models VALUES"
            " ('a', 'api', '', '', 'identity', '', '{}', 'null', 0, 0, 'e', '')"
        )
        connection.execute(
            "INSERT INTO route_records VALUES ('r', 'config', 'a.b-c_d', 1, 2, '\"e\"', 'o'),"
            " ('s', 'api', 'gone', 3, 3, '', '')"
        )
        connection.execute(
            "INSERT INTO routes VALUES ('a', 'a', NULL, NULL), ('k2', NULL, 'r', 0),"
            " ('k1', NULL, 'r', 1), ('k3', NULL, 's', 0)"
        )
    store = CatalogStore.open(path)
    first, second = store.read().routes
    assert (first.id, first.owner, first.keys) == ("r", Owner.CONFIG, ("k2", "k1"))
    assert (first.target, first.prefixes) == ({"model": "a.b-c_d"}, ())
    assert (first.etag, first.origin) == ('"e"', "o")
    assert first.updated - first.created == timedelta(microseconds=1)
    assert (second.id, second.target, second.keys) == ("s", {"model": "gone"}, ("k3",))
    with pytest.raises(ValueError, match="'k1' would mean"):
        await store.write(Change(put_models=(model("k1"),)))
    # What refers to the new tables goes with them.
    await store.write(Change(put_routes=(replace(first, prefixes=("p",)),)))
    await store.write(Change(delete_routes=("r",), delete_models=("a",)))
    await store.write(Change(put_models=(model("k1", keys=("a", "k2")),)))
    await store.write(Change(put_routes=(replace(second, prefixes=("p",)),)))
    await store.close()
    assert integrity_of(path) == "ok"


async def test_keys_of_a_file_without_routes_stay_those_of_its_models(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        schema.migrate(connection, schema.MIGRATIONS[:1])
        connection.execute(
            "INSERT INTO models VALUES"
            " ('a', 'api', '', '', 'identity', '', '{}', 'null', 0, 0, 'e', '')"
        )
        connection.execute(
            "INSERT INTO routes VALUES ('a', 'a', NULL), ('k2', 'a', 0), ('k1', 'a', 1)"
        )
    store = CatalogStore.open(path)
    (kept,) = store.read().models
    assert kept.keys == ("k2", "k1")
    assert store.read().routes == ()
    with pytest.raises(ValueError, match="'a' would mean"):
        await store.write(Change(put_routes=(route("r", keys=("a",)),)))
    await store.write(Change(delete_models=("a",)))
    await store.write(Change(put_routes=(route("r", keys=("a", "k1")),)))
    await store.close()
    assert integrity_of(path) == "ok"


# What is refused.


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (Change(put_models=(model("c", keys=("key-a",)),)), "'key-a' would mean .*'a' and 'c'"),
        (Change(put_models=(model("c", keys=("a",)),)), "'a' would mean"),
        (Change(put_models=(model("key-a"),)), "'key-a' would mean"),
        (Change(put_models=(model("c", keys=("x",)), model("d", keys=("x",)))), "'x' would mean"),
        (Change(put_placements=(placement("c"),)), "'c', which is not there"),
        (Change(delete_models=("a",), put_placements=(placement("a"),)), "'a', which is not there"),
        (Change(request=request("first")), "'first' was recorded before"),
    ],
)
async def test_a_change_that_contradicts_what_is_stored_changes_nothing(
    store: CatalogStore, path: Path, change: Change, text: str
) -> None:
    await store.write(
        Change(
            put_models=(model("a", keys=("key-a",)), model("b", keys=("key-b",))),
            request=request("first"),
            new_plan=True,
        )
    )
    before = store.read()
    also = DeviceRecord(name="devices/cpu", budget_bytes=1, drained=True, origin="")
    change = replace(
        change, put_devices=(also,), new_plan=True, request=change.request or request("second")
    )
    on_disk = content(path.parent)
    with pytest.raises(ValueError, match=text):
        await store.write(change)
    assert content(path.parent) == on_disk
    assert store.read() == before
    assert await store.request("second") is None


async def test_keys_can_be_exchanged_in_one_change(store: CatalogStore) -> None:
    await store.write(
        Change(put_models=(model("a", keys=("k", "l")), model("b", keys=("m",)), model("c")))
    )
    moved = (model("a", keys=("m",)), model("b", keys=("l", "k")))
    await store.write(Change(put_models=moved))
    assert store.read().models[:2] == moved


async def test_options_that_are_no_json_are_refused(store: CatalogStore) -> None:
    with pytest.raises(TypeError, match="set is no JSON"):
        await store.write(Change(put_models=(model("a", options={"x": {1}}),)))
    assert store.read() == state_of(0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: model("a", keys=("k", "l", "k")),
        lambda: model("a", created=datetime(2026, 1, 1)),  # noqa: DTZ001
        lambda: model("a", created=NOON.astimezone(timezone(timedelta(hours=1)))),
        lambda: request("1", time=datetime(2026, 1, 1)),  # noqa: DTZ001
        lambda: DeviceRecord(name="d", budget_bytes=-1, drained=False, origin=""),
        lambda: DeviceRecord(name="d", budget_bytes=2**63, drained=False, origin=""),
        lambda: Change(put_models=(model("a"), model("a", etag="2"))),
        lambda: Change(put_placements=(placement("a"), placement("a"))),
        lambda: Change(
            put_devices=(DeviceRecord(name="d", budget_bytes=1, drained=False, origin=""),) * 2
        ),
    ],
)
def test_wrong_values_are_refused_when_they_are_made(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError):
        make()


# Files.


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


async def test_a_new_file_belongs_to_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    store = CatalogStore.open(path)
    await store.write(Change(new_plan=True))
    for file in (path, path.with_name("catalog.db-wal")):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not path.with_name("catalog.db-shm").exists()
    await store.close()


async def test_the_open_connection_keeps_what_it_acknowledged_through_a_power_cut(
    tmp_path: Path,
) -> None:
    path = tmp_path / "catalog.db"
    for _ in range(2):  # Made, and opened again.
        store = CatalogStore.open(path)

        def ask(pragma: str, store: CatalogStore = store) -> object:
            return store._connection.execute(f"PRAGMA {pragma}").fetchone()[0]

        assert ask("journal_mode") == "wal"
        assert ask("synchronous") == 2  # FULL
        assert ask("locking_mode") == "exclusive"
        assert ask("foreign_keys") == 1
        assert ask("cache_spill") == 0
        assert ask("application_id") == schema.APPLICATION_ID
        assert ask("user_version") == len(schema.MIGRATIONS)
        await store.close()


async def test_a_file_that_was_closed_is_whole_without_its_log(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    store = CatalogStore.open(path, now=lambda: NOON)
    await store.write(change_of(1))
    await store.close()
    assert list(content(tmp_path)) == ["catalog.db"]
    store = CatalogStore.open(path)
    assert store.read() == state_of(1)
    await store.close()


OPEN_IN_CHILD = """
import sys
from pathlib import Path
from modelyard_server.catalog.store import CatalogStore, StoreError
try:
    CatalogStore.open(Path(sys.argv[1]))
except StoreError as error:
    print(type(error).__name__, error.text)
"""


def open_in_child(path: Path) -> str:
    command = [sys.executable, "-c", OPEN_IN_CHILD, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


async def test_a_second_process_is_told_which_file_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    text = f"StoreInUse {path} is in use by another process\n"
    for _ in range(2):  # Made, and opened again without a write.
        store = CatalogStore.open(path)
        assert open_in_child(path) == text
        with pytest.raises(StoreInUse, match=str(path)):  # Nor twice in one process.
            CatalogStore.open(path)
        assert open_in_child(path) == text  # Which took nothing from the first.
        await store.write(Change(new_plan=True))
        await store.close()
    assert open_in_child(path) == ""


DAMAGES: dict[str, bytes] = {
    "text": b"[server]\n",
    "zeros": bytes(8192),
    "half a header": b"SQLite format 3\0",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(name: str, tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    path.write_bytes(DAMAGES[name])
    with pytest.raises(StoreDamaged, match=str(path)):
        CatalogStore.open(path)
    assert content(tmp_path) == {path.name: DAMAGES[name]}


@pytest.mark.parametrize("mark", ["CREATE TABLE t (x)", "PRAGMA user_version = 1"])
def test_another_programs_database_is_refused_and_left_as_it_is(mark: str, tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(mark)
    before = content(tmp_path)
    with pytest.raises(StoreDamaged, match="another program's"):
        CatalogStore.open(path)
    assert content(tmp_path) == before


async def filled(path: Path) -> None:
    store = CatalogStore.open(path, now=lambda: NOON)
    for number in range(1, 6):
        await store.write(change_of(number))
    await store.close()


async def test_every_page_that_is_overwritten_is_seen_at_opening(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    await filled(path)
    whole = content(tmp_path)[path.name]
    size = 4096
    seen = 0
    for page in range(len(whole) // size):
        damaged = whole[: page * size] + b"\xa5" * size + whole[(page + 1) * size :]
        path.write_bytes(damaged)
        try:
            store = CatalogStore.open(path)
        except StoreDamaged:
            seen += 1
            assert content(tmp_path) == {path.name: damaged}
        else:
            # A page that holds only the middle of an answer has no structure to check.
            stored = store.read()
            await store.close()
            assert stored == state_of(5)
    assert seen >= len(schema.MIGRATIONS[0])  # Every table, at the least.


async def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    await filled(path)
    whole = content(tmp_path)[path.name]
    for size in (50, 5000, len(whole) - 4096):
        path.write_bytes(whole[:size])
        with pytest.raises(StoreDamaged, match=str(path)):
            CatalogStore.open(path)
        assert path.read_bytes() == whole[:size]


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE models SET options = '{'",
        "UPDATE models SET created_us = 'noon'",
        "DROP TABLE placements",
        "DELETE FROM plan",
    ],
)
async def test_rows_that_cannot_be_read_are_damage(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    await filled(path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(damage)
    store = CatalogStore.open(path)
    with pytest.raises(StoreDamaged, match=str(path)):
        store.read()
    await store.close()


async def test_a_file_of_a_newer_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    await filled(path)
    newer = len(schema.MIGRATIONS) + 1
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {newer}")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = content(tmp_path)
    with pytest.raises(StoreTooNew, match=f"{path} has version {newer}"):
        CatalogStore.open(path)
    assert content(tmp_path) == before


def test_a_file_that_cannot_be_made_or_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "catalog.db")
    for path in (tmp_path / "none" / "catalog.db", tmp_path, tmp_path / "dangling"):
        with pytest.raises(StorageFailed, match=str(path)):
            CatalogStore.open(path)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed, match="Not a directory"):
        CatalogStore.open(tmp_path / "file" / "catalog.db")


def test_every_error_of_the_store_has_its_text() -> None:
    for kind in (StoreInUse, StoreDamaged, StoreTooNew, StorageFailed):
        error: StoreError = kind("what")
        assert (error.text, str(error)) == ("what", "what")


# Versions.


async def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    path.touch(0o640)
    store = CatalogStore.open(path, now=lambda: NOON)
    await store.write(change_of(1))
    await store.close()
    assert integrity_of(path) == "ok"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640  # Its maker decided.


NEXT_STEP = (
    "ALTER TABLE models ADD COLUMN note TEXT NOT NULL DEFAULT 'none'",
    "UPDATE models SET note = 'old' WHERE id = 'lasting-0'",
)


async def test_a_file_of_an_older_version_is_migrated_with_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "catalog.db"
    await filled(path)
    newer = len(schema.MIGRATIONS) + 1
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, NEXT_STEP))
    store = CatalogStore.open(path)
    assert store.read() == state_of(5)
    await store.close()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (newer,)
        notes = connection.execute("SELECT note FROM models ORDER BY id LIMIT 2").fetchall()
        assert notes == [("old",), ("none",)]


async def test_a_step_that_fails_leaves_the_file_at_the_version_before_it(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    await filled(path)
    version = len(schema.MIGRATIONS)
    steps = (*schema.MIGRATIONS, NEXT_STEP, ("DELETE FROM models", "DELETE FROM nothing"))
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        with pytest.raises(sqlite3.OperationalError, match="nothing"):
            schema.migrate(connection, steps)
        assert schema.version_of(connection) == version + 1
        assert connection.execute("SELECT count(*) FROM models").fetchone() != (0,)
        assert schema.migrate(connection, steps[:-1]) == (version + 1, version + 1)
        with pytest.raises(ValueError, match="cannot become"):
            schema.migrate(connection, schema.MIGRATIONS)


async def test_every_step_of_making_a_file_can_be_its_last(tmp_path: Path) -> None:
    """As if the process had died there: the next one makes what is missing."""
    for statements in range(len(schema.MIGRATIONS[0])):
        path = tmp_path / f"{statements}.db"
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("BEGIN")
            for statement in schema.MIGRATIONS[0][:statements]:
                connection.execute(statement)
        store = CatalogStore.open(path, now=lambda: NOON)
        await store.write(change_of(1))
        assert store.read() == state_of(1)
        await store.close()


# Writing.


async def test_a_full_database_fails_the_write_changes_nothing_and_goes_on_afterwards(
    store: CatalogStore,
) -> None:
    await store.write(change_of(1))
    before = store.read()
    (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    large = replace(change_of(2), request=request("large", response=bytes(10**6)))
    for _ in range(2):
        with pytest.raises(StorageFailed, match=f"{re.escape(store._name)}.*full"):
            await store.write(large)
        assert store.read() == before
        assert await store.request("large") is None
    assert await store.request("change-1") == change_of(1).request
    store._connection.execute("PRAGMA max_page_count = 1000000")
    assert await store.write(large) == 2
    assert store.read() == state_of(2)


async def test_writes_are_made_in_the_order_of_the_calls(store: CatalogStore) -> None:
    revisions = await asyncio.gather(*(store.write(change_of(n)) for n in range(1, 30)))
    assert revisions == list(range(1, 30))
    assert store.read() == state_of(29)


class HeldStore:
    """A store whose thread waits before it commits, until it is let go."""

    def __init__(self, store: CatalogStore) -> None:
        self.store = store
        self.begun = threading.Event()
        self.go = threading.Event()
        store._now = self._now

    def _now(self) -> datetime:
        self.begun.set()
        assert self.go.wait(30)
        return NOON


async def test_a_write_leaves_the_event_loop_free_and_outlives_its_cancelled_caller(
    store: CatalogStore,
) -> None:
    held = HeldStore(store)
    task = asyncio.create_task(store.write(change_of(1)))
    await asyncio.to_thread(held.begun.wait, 30)  # The loop turns while the write runs.
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()  # How it ends is not known yet.
    held.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.read() == state_of(1)


async def test_a_cancelled_write_that_fails_ends_in_its_cancellation(store: CatalogStore) -> None:
    held = HeldStore(store)
    task = asyncio.create_task(store.write(Change(put_placements=(placement("none"),))))
    await asyncio.to_thread(held.begun.wait, 30)
    task.cancel()
    held.go.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert isinstance(caught.value.__cause__, ValueError)
    assert store.read() == state_of(0)


async def test_a_timeout_round_a_write_is_a_timeout(store: CatalogStore) -> None:
    held = HeldStore(store)

    async def write_with_timeout() -> None:
        async with asyncio.timeout(0):
            await store.write(change_of(1))

    task = asyncio.create_task(write_with_timeout())
    await asyncio.to_thread(held.begun.wait, 30)
    held.go.set()
    with pytest.raises(TimeoutError):
        await task
    assert store.read() == state_of(1)


async def test_closing_waits_for_the_writes_that_were_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    store = CatalogStore.open(path, now=lambda: NOON)
    held = HeldStore(store)
    writes = [asyncio.create_task(store.write(change_of(n))) for n in (1, 2, 3)]
    await asyncio.to_thread(held.begun.wait, 30)
    closes = [asyncio.create_task(store.close()) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="closed"):
        await store.write(change_of(4))
    held.go.set()
    await asyncio.gather(*closes)
    assert [write.result() for write in writes] == [1, 2, 3]
    await store.close()
    for ask in (store.read, lambda: asyncio.run(store.request("1"))):
        with pytest.raises(RuntimeError, match="closed"):
            await asyncio.to_thread(ask)
    store = CatalogStore.open(path)
    assert store.read() == state_of(3)
    await store.close()


def test_a_store_serves_one_event_loop_after_another(tmp_path: Path) -> None:
    store = CatalogStore.open(tmp_path / "catalog.db", now=lambda: NOON)
    for number in (1, 2):
        asyncio.run(store.write(change_of(number)))
    assert store.read() == state_of(2)
    asyncio.run(store.close())
