"""The tables of the catalog's store: their versions, and how records become rows and come back.

Every function takes a connection in autocommit mode. `migrate` makes its own transactions; the
others run inside the caller's. Keys are rows of `routes`, those of models and those of routes, so
that the database itself sees to it that a key means one thing. A model's id is a key as well: its
row has no position unless the id was also given among the keys. Prefixes are rows of their own.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

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
from modelyard_server.runtimes.api import JsonValue

__all__ = [
    "APPLICATION_ID",
    "KEPT_REQUESTS",
    "MIGRATIONS",
    "apply_change",
    "migrate",
    "read_request",
    "read_stored",
    "version_of",
]

APPLICATION_ID = 0x4D594152
"""Marks a SQLite file as a catalog of modelyard: "MYAR" in its header."""

KEPT_REQUESTS = 10_000
"""How many answers are remembered, the newest ones."""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE models (
            id TEXT NOT NULL PRIMARY KEY,
            owner TEXT NOT NULL CHECK (owner IN ('config', 'api')),
            root TEXT NOT NULL,
            folder TEXT NOT NULL,
            runtime TEXT NOT NULL,
            task TEXT NOT NULL,
            options TEXT NOT NULL,
            placement TEXT NOT NULL,
            pinned INTEGER NOT NULL CHECK (pinned IN (0, 1)),
            created_us INTEGER NOT NULL,
            etag TEXT NOT NULL,
            origin TEXT NOT NULL
        )""",
        """CREATE TABLE routes (
            key TEXT NOT NULL PRIMARY KEY,
            model TEXT NOT NULL REFERENCES models ON DELETE CASCADE,
            position INTEGER
        )""",
        "CREATE INDEX routes_by_model ON routes (model, position)",
        """CREATE TABLE devices (
            name TEXT NOT NULL PRIMARY KEY,
            budget_bytes INTEGER CHECK (budget_bytes >= 0),
            drained INTEGER NOT NULL CHECK (drained IN (0, 1)),
            origin TEXT NOT NULL
        )""",
        """CREATE TABLE placements (
            model TEXT NOT NULL PRIMARY KEY REFERENCES models ON DELETE CASCADE,
            placement TEXT NOT NULL,
            origin TEXT NOT NULL
        )""",
        """CREATE TABLE plan (
            only INTEGER NOT NULL PRIMARY KEY CHECK (only = 1),
            revision INTEGER NOT NULL,
            time_us INTEGER
        )""",
        "INSERT INTO plan VALUES (1, 0, NULL)",
        """CREATE TABLE requests (
            number INTEGER NOT NULL PRIMARY KEY,
            request_id TEXT NOT NULL UNIQUE,
            method TEXT NOT NULL,
            digest TEXT NOT NULL,
            response BLOB NOT NULL,
            time_us INTEGER NOT NULL
        )""",
    ),
    (
        # No reference: a route outlives a model that left the configuration file.
        """CREATE TABLE route_records (
            id TEXT NOT NULL PRIMARY KEY,
            owner TEXT NOT NULL CHECK (owner IN ('config', 'api')),
            model TEXT NOT NULL,
            created_us INTEGER NOT NULL,
            updated_us INTEGER NOT NULL,
            etag TEXT NOT NULL,
            origin TEXT NOT NULL
        )""",
        "ALTER TABLE routes RENAME TO routes_before",
        "DROP INDEX routes_by_model",
        """CREATE TABLE routes (
            key TEXT NOT NULL PRIMARY KEY,
            model TEXT REFERENCES models ON DELETE CASCADE,
            route TEXT REFERENCES route_records ON DELETE CASCADE,
            position INTEGER,
            CHECK ((model IS NULL) <> (route IS NULL))
        )""",
        "INSERT INTO routes SELECT key, model, NULL, position FROM routes_before",
        "DROP TABLE routes_before",
        "CREATE INDEX routes_by_model ON routes (model, position)",
        "CREATE INDEX routes_by_route ON routes (route, position)",
    ),
    (
        # Both tables are made anew: to drop a table would drop what refers to it.
        "ALTER TABLE routes RENAME TO routes_before",
        "ALTER TABLE route_records RENAME TO route_records_before",
        "DROP INDEX routes_by_model",
        "DROP INDEX routes_by_route",
        """CREATE TABLE route_records (
            id TEXT NOT NULL PRIMARY KEY,
            owner TEXT NOT NULL CHECK (owner IN ('config', 'api')),
            target TEXT NOT NULL,
            created_us INTEGER NOT NULL,
            updated_us INTEGER NOT NULL,
            etag TEXT NOT NULL,
            origin TEXT NOT NULL
        )""",
        # An id holds nothing that JSON would escape.
        """INSERT INTO route_records SELECT
            id, owner, '{"model":"' || model || '"}', created_us, updated_us, etag, origin
            FROM route_records_before""",
        """CREATE TABLE routes (
            key TEXT NOT NULL PRIMARY KEY,
            model TEXT REFERENCES models ON DELETE CASCADE,
            route TEXT REFERENCES route_records ON DELETE CASCADE,
            position INTEGER,
            CHECK ((model IS NULL) <> (route IS NULL))
        )""",
        "INSERT INTO routes SELECT key, model, route, position FROM routes_before",
        "DROP TABLE routes_before",
        "DROP TABLE route_records_before",
        "CREATE INDEX routes_by_model ON routes (model, position)",
        "CREATE INDEX routes_by_route ON routes (route, position)",
        """CREATE TABLE prefixes (
            prefix TEXT NOT NULL PRIMARY KEY,
            route TEXT NOT NULL REFERENCES route_records ON DELETE CASCADE,
            position INTEGER NOT NULL
        )""",
        "CREATE INDEX prefixes_by_route ON prefixes (route, position)",
    ),
)
"""Step i takes a file from version i to i + 1. A step that was released never changes again."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def version_of(connection: sqlite3.Connection) -> int | None:
    """The version of the file's tables, 0 for an empty file; None if another program made it."""
    (mark,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if mark == APPLICATION_ID and version > 0:
        return int(version)
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return 0 if (mark, version, tables) == (0, 0, 0) else None


def migrate(connection: sqlite3.Connection, steps: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Takes the file to the version that the steps end at, each step in a transaction of its own.

    Args:
        connection: of a file whose `version_of` is at most the number of steps.
        steps: statements of each step; MIGRATIONS.

    Returns:
        The version it had and the version it has.

    Raises:
        sqlite3.Error: a step failed; the file is as the step before left it.
        ValueError: another program made the file, or it is newer than the steps.
    """
    before = version_of(connection)
    if before is None or before > len(steps):
        raise ValueError(f"version {before} cannot become version {len(steps)}")
    for version in range(before, len(steps)):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in steps[version]:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {version + 1}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    return before, len(steps)


def read_stored(connection: sqlite3.Connection) -> Stored:
    """All records but the requests.

    Raises:
        ValueError: a row is not what `apply_change` writes.
    """
    keys: dict[str, list[str]] = {}
    of_routes: dict[str, list[str]] = {}
    for key, model, route in connection.execute(
        "SELECT key, model, route FROM routes WHERE position IS NOT NULL"
        " ORDER BY model, route, position"
    ):
        (keys if route is None else of_routes).setdefault(model or route, []).append(key)
    prefixes: dict[str, list[str]] = {}
    for prefix, route in connection.execute(
        "SELECT prefix, route FROM prefixes ORDER BY route, position"
    ):
        prefixes.setdefault(route, []).append(prefix)
    revision, time_us = connection.execute("SELECT revision, time_us FROM plan").fetchone()
    return Stored(
        models=tuple(
            _model(row, tuple(keys.get(row[0], ())))
            for row in connection.execute(
                "SELECT id, owner, root, folder, runtime, task, options, placement, pinned,"
                " created_us, etag, origin FROM models ORDER BY id"
            )
        ),
        devices=tuple(
            DeviceRecord(name=name, budget_bytes=budget, drained=bool(drained), origin=origin)
            for name, budget, drained, origin in connection.execute(
                "SELECT name, budget_bytes, drained, origin FROM devices ORDER BY name"
            )
        ),
        placements=tuple(
            PlacementRecord(model=model, placement=json.loads(placement), origin=origin)
            for model, placement, origin in connection.execute(
                "SELECT model, placement, origin FROM placements ORDER BY model"
            )
        ),
        plan_revision=revision,
        plan_time=None if time_us is None else _time(time_us),
        routes=tuple(
            RouteRecord(
                id=name,
                owner=Owner(owner),
                keys=tuple(of_routes.get(name, ())),
                target=json.loads(target),
                created=_time(created_us),
                updated=_time(updated_us),
                etag=etag,
                origin=origin,
                prefixes=tuple(prefixes.get(name, ())),
            )
            for name, owner, target, created_us, updated_us, etag, origin in connection.execute(
                "SELECT id, owner, target, created_us, updated_us, etag, origin"
                " FROM route_records ORDER BY id"
            )
        ),
    )


def read_request(connection: sqlite3.Connection, request_id: str) -> RequestRecord | None:
    """The remembered answer to a request."""
    row = connection.execute(
        "SELECT method, digest, response, time_us FROM requests WHERE request_id = ?", (request_id,)
    ).fetchone()
    if row is None:
        return None
    method, digest, response, time_us = row
    return RequestRecord(
        request_id=request_id, method=method, digest=digest, response=response, time=_time(time_us)
    )


def apply_change(connection: sqlite3.Connection, change: Change, now: datetime) -> int:
    """Makes a change, inside the caller's transaction, and returns the plan's revision after it.

    Args:
        connection: with a transaction begun, and with foreign keys enforced.
        change: what to do.
        now: the time of the plan, if it is a new one.

    Raises:
        ValueError: a key would mean two things, a placement is for a model that is not there, or
            the request was recorded before. The caller rolls back.
    """
    _delete(connection, "models", "id", change.delete_models)
    _delete(connection, "route_records", "id", change.delete_routes)
    _delete(connection, "devices", "name", change.delete_devices)
    _delete(connection, "placements", "model", change.delete_placements)
    _put_models(connection, change.put_models)
    _put_routes(connection, change.put_routes)
    # Once nothing of the change holds its old keys, so that a key can go from one to another.
    for model in change.put_models:
        positions: dict[str, int | None] = {model.id: None}
        positions.update((key, position) for position, key in enumerate(model.keys))
        _put_keys(connection, positions, model=model.id)
    for route in change.put_routes:
        _put_keys(
            connection,
            {key: position for position, key in enumerate(route.keys)},
            route=route.id,
        )
        _put_prefixes(connection, route)
    for device in change.put_devices:
        connection.execute(
            "INSERT INTO devices (name, budget_bytes, drained, origin) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (name) DO UPDATE SET budget_bytes = excluded.budget_bytes,"
            " drained = excluded.drained, origin = excluded.origin",
            (device.name, device.budget_bytes, device.drained, device.origin),
        )
    for put in change.put_placements:
        try:
            connection.execute(
                "INSERT INTO placements (model, placement, origin) VALUES (?, ?, ?)"
                " ON CONFLICT (model) DO UPDATE SET placement = excluded.placement,"
                " origin = excluded.origin",
                (put.model, _json(put.placement), put.origin),
            )
        except sqlite3.IntegrityError:
            raise ValueError(
                f"a placement is for model {put.model!r}, which is not there"
            ) from None
    if change.request is not None:
        _put_request(connection, change.request)
    if change.new_plan:
        connection.execute(
            "UPDATE plan SET revision = revision + 1, time_us = ?",
            (_microseconds(change.plan_time or now),),
        )
    (revision,) = connection.execute("SELECT revision FROM plan").fetchone()
    return int(revision)


def _model(row: tuple[Any, ...], keys: tuple[str, ...]) -> ModelRecord:
    name, owner, root, folder, runtime, task, *rest = row
    options, placement, pinned, created, etag, origin = rest
    return ModelRecord(
        id=name,
        owner=Owner(owner),
        keys=keys,
        root=root,
        folder=folder,
        runtime=runtime,
        task=task,
        options=json.loads(options),
        placement=json.loads(placement),
        pinned=bool(pinned),
        created=_time(created),
        etag=etag,
        origin=origin,
    )


def _delete(connection: sqlite3.Connection, table: str, column: str, names: Iterable[str]) -> None:
    for name in names:
        connection.execute(f"DELETE FROM {table} WHERE {column} = ?", (name,))


def _put_models(connection: sqlite3.Connection, models: Sequence[ModelRecord]) -> None:
    for model in models:
        # Not INSERT OR REPLACE: that deletes the old row, and its placement by a plan with it.
        connection.execute(
            "INSERT INTO models (id, owner, root, folder, runtime, task, options,"
            " placement, pinned, created_us, etag, origin)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET owner = excluded.owner, root = excluded.root,"
            " folder = excluded.folder, runtime = excluded.runtime, task = excluded.task,"
            " options = excluded.options, placement = excluded.placement,"
            " pinned = excluded.pinned, created_us = excluded.created_us, etag = excluded.etag,"
            " origin = excluded.origin",
            (
                *(model.id, model.owner.value, model.root, model.folder, model.runtime, model.task),
                *(_json(model.options), _json(model.placement), model.pinned),
                *(_microseconds(model.created), model.etag, model.origin),
            ),
        )
        _delete(connection, "routes", "model", (model.id,))


def _put_routes(connection: sqlite3.Connection, routes: Sequence[RouteRecord]) -> None:
    for route in routes:
        connection.execute(
            "INSERT INTO route_records (id, owner, target, created_us, updated_us, etag, origin)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET owner = excluded.owner, target = excluded.target,"
            " created_us = excluded.created_us, updated_us = excluded.updated_us,"
            " etag = excluded.etag, origin = excluded.origin",
            (
                *(route.id, route.owner.value, _json(route.target)),
                *(_microseconds(route.created), _microseconds(route.updated)),
                *(route.etag, route.origin),
            ),
        )
        _delete(connection, "routes", "route", (route.id,))
        _delete(connection, "prefixes", "route", (route.id,))


def _put_keys(
    connection: sqlite3.Connection,
    positions: Mapping[str, int | None],
    *,
    model: str | None = None,
    route: str | None = None,
) -> None:
    """Gives keys to a model or to a route. Raises ValueError if one is taken."""
    for key, place in positions.items():
        try:
            connection.execute("INSERT INTO routes VALUES (?, ?, ?, ?)", (key, model, route, place))
        except sqlite3.IntegrityError:
            other, other_route = connection.execute(
                "SELECT model, route FROM routes WHERE key = ?", (key,)
            ).fetchone()
            if other is not None and model is not None:
                what = f"the models {other!r} and {model!r}"
            elif other is None and model is None:
                what = f"by the routes {other_route!r} and {route!r}"
            else:
                what = f"the model {model or other!r} and by the route {route or other_route!r}"
            raise ValueError(f"key {key!r} would mean {what}") from None


def _put_prefixes(connection: sqlite3.Connection, route: RouteRecord) -> None:
    """Gives prefixes to a route. Raises ValueError if one is taken."""
    for place, prefix in enumerate(route.prefixes):
        try:
            connection.execute("INSERT INTO prefixes VALUES (?, ?, ?)", (prefix, route.id, place))
        except sqlite3.IntegrityError:
            (other,) = connection.execute(
                "SELECT route FROM prefixes WHERE prefix = ?", (prefix,)
            ).fetchone()
            raise ValueError(
                f"prefix {prefix!r} would be one of the routes {other!r} and {route.id!r}"
            ) from None


def _put_request(connection: sqlite3.Connection, request: RequestRecord) -> None:
    try:
        connection.execute(
            "INSERT INTO requests (request_id, method, digest, response, time_us)"
            " VALUES (?, ?, ?, ?, ?)",
            (
                *(request.request_id, request.method, request.digest, request.response),
                _microseconds(request.time),
            ),
        )
    except sqlite3.IntegrityError:
        raise ValueError(f"request {request.request_id!r} was recorded before") from None
    # By number, not by time: clocks are set back. Numbers have no gaps, since only the oldest go.
    connection.execute(
        "DELETE FROM requests WHERE number <= (SELECT max(number) FROM requests) - ?",
        (KEPT_REQUESTS,),
    )


def _json(value: JsonValue) -> str:
    # ASCII: text that is no valid Unicode, such as half of a surrogate pair, comes back as it was.
    return json.dumps(value, separators=(",", ":"), default=_plain)


def _plain(value: object) -> dict[str, JsonValue]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


def _microseconds(time: datetime) -> int:
    return (time - _EPOCH) // _MICROSECOND


def _time(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)
