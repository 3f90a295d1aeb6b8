"""What a server has: models, devices, what is in memory, and the server itself. Values only.

Each mirrors a message of the contract; ``name`` fields are resource names (``models/{model}``,
``devices/{device}``), sizes are bytes, durations are seconds, times are aware and in UTC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from modelyard._struct_messages import JsonValue
from modelyard.devices import Device
from modelyard.placements import Placement

__all__ = [
    "BatchFigures",
    "CopyState",
    "Departures",
    "DeviceCharge",
    "HostTier",
    "LoadFailure",
    "ManagedDevice",
    "Model",
    "ModelOwner",
    "PlacedModel",
    "PlacedPart",
    "Regret",
    "Residency",
    "ResidencyState",
    "ServerInfo",
    "ServerStats",
    "ShadowFigures",
    "StoreCollected",
    "StoreFigures",
]


class ModelOwner(Enum):
    """Who owns a model's record, and with it who may change or delete it."""

    UNKNOWN = "unknown"
    """An owner this version does not know."""
    CONFIG = "config"
    """The server's configuration file. Pins and device plans still apply."""
    API = "api"
    """Whoever calls the API; kept in the catalog until it is deleted."""

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedPart:
    """A part of a model on one device.

    Args:
        device: resource name of the device.
        prefixes: module-path prefixes of what is there, each a whole subtree; ``""`` is the whole
            model.
        size_bytes: of parameters and buffers there, tied ones once, and what loading and running
            it needs beside them.
    """

    device: str
    prefixes: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedModel:
    """One way to load a model; ``parts`` begin with the one that takes the inputs."""

    parts: tuple[PlacedPart, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes on all devices together."""
        return sum(part.size_bytes for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A registered source of weights and the runtime that executes them.

    Args:
        name: resource name, ``models/{model}``.
        keys: keys that mean this model, besides its id.
        root: name of the server's folder that holds the weights; None for runtimes without any.
        folder: folder below it.
        runtime: what executes it, for instance ``transformers``.
        task: what the runtime does with it; empty for runtimes that do one thing.
        options: options of the runtime.
        placement: where it lives: a ``ComponentDevice``, or the ``AutomaticPlacement`` by which
            the server decides. None when nothing was said, which leaves the choice to the server,
            and when it names a kind of device or a strategy this version does not know.
        estimated_bytes: bytes reserved for it before a load, the most of its alternatives.
        created_at: when it was registered.
        etag: changes whenever the model changes.
        owner: who may change or delete it.
        placed_by_plan: True if ``placement`` was given by a device plan.
        pinned: True while it is never evicted.
        alternatives: the ways to load it, as placement and files have it.
        warnings: what an operator should know and is no error.
        estimated_activation_bytes: what a run of the largest batch takes beside the weights, as
            predicted and corrected by what runs really took; 0 if nobody knows. Not charged to the
            device.
    """

    name: str
    keys: tuple[str, ...]
    root: str | None
    folder: str | None
    runtime: str
    task: str
    options: Mapping[str, JsonValue]
    placement: Placement | None
    estimated_bytes: int
    created_at: datetime | None
    etag: str
    owner: ModelOwner
    placed_by_plan: bool
    pinned: bool
    alternatives: tuple[PlacedModel, ...]
    warnings: tuple[str, ...]
    estimated_activation_bytes: int = 0

    @property
    def id(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagedDevice:
    """A device the server manages, with its budget and what it holds.

    Args:
        name: resource name, ``devices/{device}``.
        device: the device; None when it is of a kind this version does not know.
        logical: True for a pool of host memory that stands for a device.
        budget_bytes: most bytes that models may hold together.
        reserved_bytes: promised to models that are being loaded.
        resident_bytes: of models that are resident.
        draining_bytes: of models that are being unloaded.
        quarantined_bytes: what unloads should have given back and did not.
        deficit_bytes: above the budget; repaid before anything else is loaded.
        peak_accounted_bytes: highest sum of the four kinds since the server started.
        measured_bytes: measured in the tensors the server holds there now.
        peak_measured_bytes: highest value of the same.
        load_count: models loaded onto it since the server started.
        eviction_count: models evicted from it since the server started.
        etag: changes whenever the budget or ``drained`` changes.
        drained: True while nothing is loaded onto it and what is there leaves.
        total_bytes: what the device has; for the disk, what its file system has.
        transfer_bytes_per_s: how fast weights come onto it at most, for logical devices that were
            declared so; 0 is as fast as it goes.
        saved_bytes: what its models would hold more there if each held alone what it shares with
            others.
    """

    name: str
    device: Device | None
    logical: bool
    budget_bytes: int
    reserved_bytes: int
    resident_bytes: int
    draining_bytes: int
    quarantined_bytes: int
    deficit_bytes: int
    peak_accounted_bytes: int
    measured_bytes: int
    peak_measured_bytes: int
    load_count: int
    eviction_count: int
    etag: str
    drained: bool
    total_bytes: int
    transfer_bytes_per_s: int
    saved_bytes: int = 0

    @property
    def id(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]

    @property
    def accounted_bytes(self) -> int:
        """Bytes that count against the budget: reserved, resident, draining and quarantined."""
        return (
            self.reserved_bytes + self.resident_bytes + self.draining_bytes + self.quarantined_bytes
        )


class ResidencyState(Enum):
    """Where a model stands between cold and resident."""

    UNKNOWN = "unknown"
    """A state this version does not know."""
    COLD = "cold"
    """No weights in memory and nobody waits for them."""
    QUEUED = "queued"
    """Requests wait for it; its load has not begun."""
    LOADING = "loading"
    """Its bytes are reserved and its weights are being read."""
    RESIDENT = "resident"
    """Its weights are in memory and requests run."""
    DRAINING = "draining"
    """It takes no new requests and leaves when the running ones have ended."""
    UNLOADING = "unloading"
    """Its memory is being given back, and counts until that is measured."""
    FAILED = "failed"
    """Its last load failed; it is tried again later."""

    def __str__(self) -> str:
        return str(self.value)


class CopyState(Enum):
    """Where a model's copy on the host tier stands."""

    UNKNOWN = "unknown"
    """A state this version does not know."""
    NONE = "none"
    """There is none."""
    MAKING = "making"
    """The model is leaving its device, and its weights are being copied, or will be if there is
    room."""
    KEPT = "kept"
    """It is there, and loads read from it."""
    DROPPING = "dropping"
    """It is being given back, and counts until its memory is really free."""

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCharge:
    """Bytes on one device; ``device`` is its resource name.

    Args:
        device: where.
        size_bytes: all that is held.
        shared_bytes: of ``size_bytes``, what other models hold as well. The device is charged for
            it once.
    """

    device: str
    size_bytes: int
    shared_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailure:
    """Why a model's last load failed.

    Args:
        message: what is wrong with the model.
        transient: True when the same files may load another time.
        attempt_count: loads that have failed since one succeeded.
        retry_at: requests before this time are refused at once.
    """

    message: str
    transient: bool
    attempt_count: int
    retry_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """One model's place in memory. Every registered model has one.

    Args:
        name: resource name, ``residencies/{model}``.
        model: resource name of the model.
        state: where it stands.
        charges: what it holds on each device.
        pinned: True while it is never evicted.
        lease_count: requests that use it now.
        waiting_request_count: requests that wait for it now.
        load_count: loads since the server started.
        load_s: how long its next load is expected to take, from what was measured; None before the
            first load.
        failure: set while the state is FAILED.
        quarantined: what it should have given back and did not.
        copy_state: where its copy on the host tier stands.
        copy_bytes: what comes back when that copy is dropped.
        copy_load_s: how long loading from a copy takes, as measured; None before the first time.
    """

    name: str
    model: str
    state: ResidencyState
    charges: tuple[DeviceCharge, ...]
    pinned: bool
    lease_count: int
    waiting_request_count: int
    load_count: int
    load_s: float | None
    failure: LoadFailure | None
    quarantined: tuple[DeviceCharge, ...]
    copy_state: CopyState = CopyState.NONE
    copy_bytes: int = 0
    copy_load_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a server is.

    Args:
        version: version of modelyard.
        library_versions: versions of what it stands on, by name.
        started_at: when it started.
        eviction_policy: name of the policy in use.
        runtimes: runtimes it can execute.
        process_id: process id on its machine.
    """

    version: str
    library_versions: Mapping[str, str]
    started_at: datetime | None
    eviction_policy: str
    runtimes: tuple[str, ...]
    process_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTier:
    """What a server's host tier holds and has done: copies of weights of evicted models.

    Args:
        budget_bytes: most bytes that copies may hold together.
        reserved_bytes: promised to copies that are being made.
        resident_bytes: of copies that are kept.
        draining_bytes: of copies that are being dropped, until their memory is really free.
        quarantined_bytes: what dropped copies should have given back and did not.
        peak_bytes: highest sum of the four kinds since the server started.
        saved_bytes: what the copies would hold more if each held alone what it shares with others.
        measured_bytes: measured in the copies that are kept now.
        copy_count: copies there are now, those included that are being made or dropped.
        kept_count: copies made since the server started.
        dropped_count: copies dropped or lost since then.
        promotion_count: loads from a copy since then.
    """

    budget_bytes: int
    reserved_bytes: int
    resident_bytes: int
    draining_bytes: int
    quarantined_bytes: int
    peak_bytes: int
    saved_bytes: int
    measured_bytes: int
    copy_count: int
    kept_count: int
    dropped_count: int
    promotion_count: int

    @property
    def accounted_bytes(self) -> int:
        """Bytes that count against the budget: reserved, resident, draining and quarantined."""
        return (
            self.reserved_bytes + self.resident_bytes + self.draining_bytes + self.quarantined_bytes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """What a server spends on loading, beside what a cache that evicts by LRU would have.

    That one is a shadow of the same devices and budgets, asked for the same models one after the
    other. It has no pins, nothing in its way, and no host tier: single seconds do not compare.

    Args:
        lru_load_s: what LRU would have spent.
        regret_s: what the server has spent, less that; negative if it has spent less.
    """

    lru_load_s: float
    regret_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Departures:
    """Which models had to leave, and how old they were.

    Args:
        counts: models that were told to leave, by cause: ``MODEL`` (for another one), ``BUDGET``,
            ``DEVICE_DRAINED``, ``DEVICE_BEHIND`` (given away by a device that had more to do than
            others), ``OPERATOR``, ``REMOVED``, ``LOST``; without zeros.
        age_count: of how many models the ages are: the last 256 that were chosen to leave. The
            ages are None without any.
        median_idle_s: half of them had been asked for more lately than this.
        p90_idle_s: nine in ten had.
        median_resident_s: half of them had been loaded more lately than this.
        p90_resident_s: nine in ten had.
    """

    counts: Mapping[str, int]
    age_count: int
    median_idle_s: float | None
    p90_idle_s: float | None
    median_resident_s: float | None
    p90_resident_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFigures:
    """What was run, alone and together.

    Args:
        batch_count: runs that requests could share, those included that one had for itself.
        request_count: requests that were in them.
        row_count: rows of these.
        largest_request_count: most requests that one of them had.
        largest_row_count: most rows that one of them had.
        alone_count: of ``request_count``, those that had a run for themselves.
        unshared_count: requests that cannot share a run; in none of the above.
        split_count: batches that failed and were run again in parts.
        padding_ratio: share of what they computed that was padding to the longest of another
            request, at most: some models compute less of it. None if nothing was computed.
    """

    batch_count: int
    request_count: int
    row_count: int
    largest_request_count: int
    largest_row_count: int
    alone_count: int
    unshared_count: int
    split_count: int
    padding_ratio: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowFigures:
    """What has become of requests that were to be tried by the shadows of routes.

    Args:
        answered_count: they were answered.
        failed_count: they failed, or were refused.
        dropped_count: their device was busy, or there was no free room for the model.
    """

    answered_count: int
    failed_count: int
    dropped_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFigures:
    """What a server's weight store holds, and what has been given back of it.

    A model counts by its content: every version of a registered model's files is one.

    Args:
        stored_bytes: of all of its files.
        model_count: models in it.
        unused_bytes: of ``stored_bytes``, what nobody uses and is kept for a while.
        unused_count: models that are.
        due_at: when the first of them will have been kept for long enough; None without any.
        freed_bytes: what the server has given back since it started.
        freed_count: models that it has.
        obstacle: why nothing can be given back now; empty if it can.
    """

    stored_bytes: int
    model_count: int
    unused_bytes: int
    unused_count: int
    due_at: datetime | None
    freed_bytes: int
    freed_count: int
    obstacle: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCollected:
    """What a collection of a server's weight store has given back, or would.

    Args:
        freed_bytes: of the files that were removed.
        freed_count: models that were.
        store: what it holds now; None if the server has no store.
    """

    freed_bytes: int
    freed_count: int
    store: StoreFigures | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStats:
    """What a server has done since it started.

    Args:
        answered_count: predictions answered with outputs.
        error_counts: predictions refused or failed, by reason.
        hit_count: answered predictions that found their model resident.
        cold_count: answered predictions that waited for a load.
        load_count: loads that ended well.
        load_failure_count: loads that failed.
        eviction_count: models unloaded to make room or because a budget was lowered.
        load_s: seconds spent loading, summed over loads.
        active_request_count: predictions in progress.
        waiting_request_count: requests that wait for a model now.
        process_resident_bytes: resident set of the server's process.
        peak_process_resident_bytes: highest value of the same since it started.
        worker_resident_bytes: memory of the processes that models run in, where the server has
            such.
        host_tier: copies of evicted models; None on a server without a host tier.
        recent_load_s: seconds of those loads that ended in the last minute.
        regret: what LRU would have spent on loading. This and the following are None on a server
            that is older than they are.
        departures: which models had to leave.
        batches: what was run, alone and together.
        shadows: what has become of requests that were only tried.
        store: what the weight store holds; None on a server without one, too.
    """

    answered_count: int
    error_counts: Mapping[str, int]
    hit_count: int
    cold_count: int
    load_count: int
    load_failure_count: int
    eviction_count: int
    load_s: float
    active_request_count: int
    waiting_request_count: int
    process_resident_bytes: int
    peak_process_resident_bytes: int
    worker_resident_bytes: int = 0
    host_tier: HostTier | None = None
    recent_load_s: float = 0.0
    regret: Regret | None = None
    departures: Departures | None = None
    batches: BatchFigures | None = None
    shadows: ShadowFigures | None = None
    store: StoreFigures | None = None
