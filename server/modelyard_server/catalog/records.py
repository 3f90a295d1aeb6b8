"""What the catalog's store keeps: plain values, without devices, memory or requests in them."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from modelyard_server.runtimes.api import JsonValue

__all__ = [
    "Change",
    "DeviceRecord",
    "ModelRecord",
    "Owner",
    "PlacementRecord",
    "RequestRecord",
    "RouteRecord",
    "Stored",
]

_MOST_BYTES = 2**63 - 1


class Owner(enum.Enum):
    """Who says what a model or route is: the configuration file, or whoever called the API."""

    CONFIG = "config"
    API = "api"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """A registered model.

    Args:
        id: the model's id, which is always one of its keys too.
        owner: who says what it is.
        keys: its keys, as they were given; the id may be left out.
        root: the name of the root its folder is below, or "".
        folder: its folder below the root, or "".
        runtime: what runs it.
        task: what it is for, or "".
        options: of its runtime.
        placement: JSON form of its placement; the store does not read it.
        pinned: whether it stays in memory.
        created: when it was registered, in UTC.
        etag: changes whenever the model changes.
        origin: for Owner.CONFIG a digest of what the file said; "" for Owner.API.

    Raises:
        ValueError: a key is given twice, or the time is not in UTC.
    """

    id: str
    owner: Owner
    keys: tuple[str, ...]
    root: str
    folder: str
    runtime: str
    task: str
    options: Mapping[str, JsonValue]
    placement: JsonValue
    pinned: bool
    created: datetime
    etag: str
    origin: str

    def __post_init__(self) -> None:
        _check_distinct(f"keys of model {self.id!r}", self.keys)
        _check_utc("created", self.created)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRecord:
    """A registered route.

    Args:
        id: the route's id.
        owner: who says what it is.
        keys: its keys, in order.
        target: JSON form of what they mean; the store does not read it. What it leads to may be
            gone.
        created: when it was registered, in UTC.
        updated: when it was last changed, in UTC.
        etag: changes whenever the route changes.
        origin: for Owner.CONFIG a digest of what the file said; "" for Owner.API.
        prefixes: beginnings of keys, in order.

    Raises:
        ValueError: there is neither key nor prefix, or one is given twice, or a time is not in UTC.
    """

    id: str
    owner: Owner
    keys: tuple[str, ...]
    target: JsonValue
    created: datetime
    updated: datetime
    etag: str
    origin: str
    prefixes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.keys and not self.prefixes:
            raise ValueError(f"route {self.id!r} has no keys")
        _check_distinct(f"keys of route {self.id!r}", self.keys)
        _check_distinct(f"prefixes of route {self.id!r}", self.prefixes)
        _check_utc("created", self.created)
        _check_utc("updated", self.updated)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRecord:
    """What was changed on a device, over what the configuration says.

    Args:
        name: of the device, for example "devices/cuda-1".
        budget_bytes: its budget; None: as configured.
        drained: whether nothing is placed there.
        origin: what the configuration file said when it was overridden.

    Raises:
        ValueError: the budget is negative or above 2**63 - 1.
    """

    name: str
    budget_bytes: int | None
    drained: bool
    origin: str

    def __post_init__(self) -> None:
        if self.budget_bytes is not None and not 0 <= self.budget_bytes <= _MOST_BYTES:
            raise ValueError(f"budget_bytes must be 0 to 2**63 - 1, got {self.budget_bytes}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRecord:
    """A placement that a device plan gave to a model, over the model's own.

    Args:
        model: the model's id.
        placement: JSON form of the placement; the store does not read it.
        origin: what it replaced.
    """

    model: str
    placement: JsonValue
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """The first answer to a request that can be sent again.

    Args:
        request_id: as the client gave it.
        method: the RPC.
        digest: of the request, to tell a replay from a second use of the id.
        response: the answer, serialised.
        time: when it was answered, in UTC.

    Raises:
        ValueError: the time is not in UTC.
    """

    request_id: str
    method: str
    digest: str
    response: bytes
    time: datetime

    def __post_init__(self) -> None:
        _check_utc("time", self.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One transaction: all of it or nothing.

    Deletions come first, so that deleting and putting the same thing replaces it. To put what is
    there overwrites it; to delete what is not there does nothing.

    Args:
        put_models: models to add or overwrite; their placements by a plan stay.
        delete_models: ids of models to delete, with their keys and their placements by a plan.
        put_routes: routes to add or overwrite.
        delete_routes: ids of routes to delete, with their keys and prefixes.
        put_devices: devices to add or overwrite.
        put_placements: placements to add or overwrite.
        delete_placements: ids of models that go back to their own placement.
        delete_devices: names of devices that go back to what is configured.
        new_plan: counts the plan's revision up by one and stamps the plan's time.
        plan_time: that time, in UTC; None: when it is written.
        request: an answer to remember.

    Raises:
        ValueError: something is put twice, or the time is not in UTC.
    """

    put_models: tuple[ModelRecord, ...] = ()
    delete_models: tuple[str, ...] = ()
    put_routes: tuple[RouteRecord, ...] = ()
    delete_routes: tuple[str, ...] = ()
    put_devices: tuple[DeviceRecord, ...] = ()
    put_placements: tuple[PlacementRecord, ...] = ()
    delete_placements: tuple[str, ...] = ()
    delete_devices: tuple[str, ...] = ()
    new_plan: bool = False
    plan_time: datetime | None = None
    request: RequestRecord | None = None

    def __post_init__(self) -> None:
        if self.plan_time is not None:
            _check_utc("plan_time", self.plan_time)
        _check_distinct("put_models", (model.id for model in self.put_models))
        _check_distinct("put_routes", (route.id for route in self.put_routes))
        _check_distinct("put_devices", (device.name for device in self.put_devices))
        _check_distinct("put_placements", (put.model for put in self.put_placements))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """All that is stored, but for the remembered requests.

    Attributes:
        models: in the order of their ids.
        devices: in the order of their names.
        placements: in the order of their models.
        plan_revision: how many plans were applied.
        plan_time: when the last one was, in UTC; None: never.
        routes: in the order of their ids.
    """

    models: tuple[ModelRecord, ...]
    devices: tuple[DeviceRecord, ...]
    placements: tuple[PlacementRecord, ...]
    plan_revision: int
    plan_time: datetime | None
    routes: tuple[RouteRecord, ...] = ()


def _check_distinct(what: str, names: Iterable[str]) -> None:
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ValueError(f"{what}: {twice[0]!r} is given twice")


def _check_utc(what: str, time: datetime) -> None:
    if time.utcoffset() != timedelta(0):
        raise ValueError(f"{what} must be a time in UTC, got {time!r}")
