"""A process that writes numbered changes to a catalog's store and says which were acknowledged.

Change n makes the state `state_of(n)` out of `state_of(n - 1)` and touches every table, so that a
change that is lost or half there shows. Run as a program it goes on from what the file holds:

    catalog_writer.py FILE [--changes N] [--synchronous WORD] [--checkpoint-pages N]
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from modelyard_server.catalog.records import (
    Change,
    DeviceRecord,
    ModelRecord,
    Owner,
    PlacementRecord,
    RequestRecord,
    RouteRecord,
    Stored,
)
from modelyard_server.catalog.store import CatalogStore

__all__ = ["NOON", "change_of", "check_file", "integrity_of", "marker_of", "model", "state_of"]

NOON = datetime(2026, 3, 4, 12, 0, 0, 5, tzinfo=UTC)
_LASTING = 3
_PASSING = 4


def model(name: str, **values: object) -> ModelRecord:
    """A record of a model; what is not given does not matter."""
    fields: dict[str, object] = {
        "id": name,
        "owner": Owner.API,
        "keys": (),
        "root": "store",
        "folder": f"acme/{name}",
        "runtime": "identity",
        "task": "",
        "options": {},
        "placement": None,
        "pinned": False,
        "created": NOON,
        "etag": '"0"',
        "origin": "",
    }
    return ModelRecord(**(fields | values))  # type: ignore[arg-type]


def marker_of(number: int) -> str:
    """What is written everywhere by a change."""
    return f"change-{number}"


def change_of(number: int) -> Change:
    """The change of a number, 1 or more."""
    after = state_of(number)
    return Change(
        put_models=tuple(m for m in after.models if m.etag == marker_of(number)),
        delete_models=(f"passing-{number - _PASSING}",),
        put_routes=tuple(r for r in after.routes if r.etag == marker_of(number)),
        delete_routes=(f"passing-{number - _PASSING}",),
        put_devices=after.devices,
        put_placements=after.placements,
        new_plan=True,
        request=RequestRecord(
            request_id=marker_of(number),
            method="ApplyPlan",
            digest=str(number),
            response=bytes([number % 256]) * (number * 997 % 9000),
            time=NOON,
        ),
    )


def state_of(number: int) -> Stored:
    """What is stored once the changes up to a number are made."""
    if number == 0:
        return Stored(models=(), devices=(), placements=(), plan_revision=0, plan_time=None)
    marker = marker_of(number)
    # The keys go round, so that every change takes keys from one model and gives them to another.
    lasting = [
        model(f"lasting-{i}", keys=(f"key-{(i + number) % _LASTING}",), etag=marker)
        for i in range(_LASTING)
    ]
    passing = [
        model(f"passing-{n}", etag=marker_of(n))
        for n in range(max(1, number - _PASSING + 1), number + 1)
    ]
    routes = [
        _route(f"lasting-{i}", (i + number) % _LASTING, marker, keys=True) for i in range(_LASTING)
    ]
    routes += [
        _route(f"passing-{n}", n + _LASTING, marker_of(n), keys=False)
        for n in range(max(1, number - _PASSING + 1), number + 1)
    ]
    return Stored(
        models=tuple(sorted(lasting + passing, key=lambda m: m.id)),
        devices=(
            DeviceRecord(
                name="devices/cuda-1", budget_bytes=number, drained=number % 2 == 0, origin=marker
            ),
        ),
        placements=(PlacementRecord(model="lasting-0", placement={"": marker}, origin=marker),),
        plan_revision=number,
        plan_time=NOON,
        routes=tuple(sorted(routes, key=lambda r: r.id)),
    )


def _route(name: str, place: int, marker: str, *, keys: bool) -> RouteRecord:
    """A route of a key, if it is to have one, and a prefix, both of a place."""
    return RouteRecord(
        id=name,
        owner=Owner.API,
        keys=(f"routed-{place}",) if keys else (),
        target={"fallback": {"targets": [marker, f"routes/{name}"]}},
        created=NOON,
        updated=NOON,
        etag=marker,
        origin="",
        prefixes=(f"prefix-{place}/",),
    )


def check_file(path: Path, acknowledged: int) -> int:
    """Opens the file as a server does, and returns how many changes it holds.

    Args:
        path: of the file. If changes were begun after the last acknowledged one, then at most one.
        acknowledged: how many changes were acknowledged.

    Raises:
        AssertionError: a change is lost or half there, or the file is not whole.
    """
    store = CatalogStore.open(path)
    try:
        stored = store.read()
        number = stored.plan_revision
        assert number in (acknowledged, acknowledged + 1), (
            f"{acknowledged} changes were acknowledged, {number} are there"
        )
        assert stored == state_of(number), f"change {number} is half there: {stored}"
        asyncio.run(_check_requests(store, number))
    finally:
        asyncio.run(store.close())
    assert integrity_of(path) == "ok"
    return number


async def _check_requests(store: CatalogStore, number: int) -> None:
    for n in range(max(1, number - 5), number + 1):
        assert await store.request(marker_of(n)) == change_of(n).request, n
    assert await store.request(marker_of(number + 1)) is None


def integrity_of(path: Path) -> str:
    """What SQLite finds wrong with a file that nobody has open; "ok" if nothing."""
    with closing(sqlite3.connect(path)) as connection:
        found: list[tuple[str]] = connection.execute("PRAGMA integrity_check").fetchall()
        assert not connection.execute("PRAGMA foreign_key_check").fetchall()
    return "; ".join(line for (line,) in found)


async def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--changes", type=int, default=10**9)
    parser.add_argument("--synchronous")
    parser.add_argument("--checkpoint-pages", type=int)
    arguments = parser.parse_args()
    store = CatalogStore.open(arguments.file, now=lambda: NOON)
    if arguments.synchronous:
        store._connection.execute(f"PRAGMA synchronous = {arguments.synchronous}")
    if arguments.checkpoint_pages:
        store._connection.execute(f"PRAGMA wal_autocheckpoint = {arguments.checkpoint_pages}")
    # There if tests/support/disk_shim.c was loaded into this process.
    note = getattr(ctypes.CDLL(None), "disk_note", None)
    number = store.read().plan_revision
    os.write(1, b"open\n")
    for _ in range(arguments.changes):
        number += 1
        await store.write(change_of(number))
        if note is not None:
            note(ctypes.c_int64(number))
        os.write(1, f"{number}\n".encode())
    await store.close()


if __name__ == "__main__":
    asyncio.run(_main())
