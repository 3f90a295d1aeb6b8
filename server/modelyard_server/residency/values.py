"""What the residency tells and is told: settings, handles, and where models and devices stand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from modelyard_server import _core
from modelyard_server.devices.placed import PlacedAs
from modelyard_server.residency.losses import Losses
from modelyard_server.runtimes.api import ModelSpec, Price

__all__ = [
    "GONE",
    "MAX_BYTES",
    "NEVER_NS",
    "POLICIES",
    "CopyState",
    "Departures",
    "DeviceUse",
    "ModelHandle",
    "ModelUse",
    "State",
    "TierUse",
    "YardSettings",
]

NEVER_NS: int = _core.NEVER_NS
"""The deadline of a request that has none."""

MAX_BYTES: int = _core.MAX_BYTES
"""The largest amount the core can hold, as a budget or as a model on one device."""

POLICIES: tuple[str, ...] = _core.POLICIES
"""Names of the eviction policies, the default first."""

State = _core.State
"""Where a model stands: COLD, QUEUED, LOADING, RESIDENT, DRAINING, UNLOADING or FAILED."""

CopyState = _core.CopyState
"""Where its copy on the host tier stands: NONE, AWAITED, MAKING, KEPT or DROPPING.

One that is dropped while somebody is still in its memory stays DROPPING, and on the books, until it
is back. Nobody waits for it once it is known to be in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class YardSettings:
    """How the core behaves; see YardOptions in csrc/include/modelyard/yard.hpp.

    Attributes:
        budgets: bytes, one a device.
        policy: name of the eviction policy.
        order: "urgency": the core chooses whom to serve next; "fifo": requests are told to it one
            at a time, in the order of their arrival.
        max_waiting_per_model: most requests that wait for one model.
        max_waiting: most requests that wait at all.
        loads_per_device: loads that run on a device at once.
        overdue_after_s: age at which a waiting request may make models in use drain.
        backoff_initial_s: first pause after a failed load.
        backoff_max_s: longest such pause.
        explain_capacity: decisions that are remembered.
        tier_budget: bytes of the host tier; 0 for none.
        above_tier: for each device, if copies of its models may be kept on the host tier.
    """

    budgets: tuple[int, ...]
    policy: str = "ensemble"
    order: str = "urgency"
    max_waiting_per_model: int = 1024
    max_waiting: int = 65536
    loads_per_device: int = 1
    overdue_after_s: float = 30.0
    backoff_initial_s: float = 1.0
    backoff_max_s: float = 60.0
    explain_capacity: int = 4096
    tier_budget: int = 0
    above_tier: tuple[bool, ...] = ()


@dataclass(slots=True, kw_only=True, eq=False)
class ModelHandle:
    """A registered model, as the rest of the server passes it around.

    Attributes:
        name: id of the model.
        core_id: the yard's id for it.
        spec: what the engine loads.
        ways: how it may be loaded, the preferred way first.
        replan: works the ways out anew for another price. Raises Refusal if there is none.
        priced_bytes: the price that the ways were worked out for.
        successor: the handle that took its place, once one has.
        loads_before: loads of the handles whose place it took.
        evictions_before: evictions of those.
        file_load_s: what loads from files take, as of the last one; None before the first.
        load_started: set while it is being loaded: the loop's time when that began, in seconds.
        load_stopped: its load was told to stop.
        failure_text: why its last load failed, while it is FAILED.
        barred_text: why it is not to be loaded any more; empty if it may be.
        finished_runs: requests it has answered; what speaks for it when a worker dies.
        losses: what its unloads could not get back.
    """

    name: str
    core_id: int
    spec: ModelSpec
    ways: tuple[PlacedAs, ...]
    replan: Callable[[Price], tuple[PlacedAs, ...]]
    priced_bytes: int
    successor: ModelHandle | None = None
    loads_before: int = 0
    evictions_before: int = 0
    file_load_s: float | None = None
    load_started: float | None = None
    load_stopped: bool = False
    failure_text: str = ""
    barred_text: str = ""
    finished_runs: int = 0
    losses: Losses = field(default_factory=Losses)
    _settled: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def needed_bytes(self) -> int:
        """Upper bound of what a load takes, over all devices and in the largest of the ways."""
        return max(sum(way.charges.values()) for way in self.ways)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelUse:
    """Where a model stands, at one moment. Charges are bytes by position of the device.

    Attributes:
        charges: all it holds.
        shared: what of that other models hold as well.
        load_duration_s: what its next load is expected to take; None before the first.
        file_load_duration_s: the same, were there no copy of it.
        copy_state: where its copy on the host tier stands.
        copy_bytes: what comes back when that copy is dropped.
        copy_in_use: it is being dropped, and somebody is still in its memory.
        copy_duration_s: what loads from a copy took; None before the first.
    """

    state: _core.State
    charges: dict[int, int]
    shared: dict[int, int]
    quarantined: dict[int, int]
    pinned: bool
    lease_count: int
    waiting_count: int
    load_count: int
    eviction_count: int
    load_duration_s: float | None
    failure_text: str
    failure_transient: bool
    failure_count: int
    retry_in_s: float
    file_load_duration_s: float | None = None
    copy_state: _core.CopyState = CopyState.NONE
    copy_bytes: int = 0
    copy_in_use: bool = False
    copy_duration_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    """What a device has promised and holds, at one moment, in bytes.

    `saved` is what its models would hold more if each held alone what it shares with others.
    """

    budget: int
    reserved: int
    resident: int
    draining: int
    quarantined: int
    deficit: int
    peak: int
    saved: int
    load_count: int
    eviction_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Departures:
    """Which models had to leave, and how old those were that were chosen to.

    Attributes:
        counts: models that were told to leave, by why; without zeros.
        idle_s: of the last 256 that were chosen, in no order: since it was last asked for.
        resident_s: of the same, in the same order: since its load ended.
    """

    counts: Mapping[str, int]
    idle_s: tuple[float, ...]
    resident_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierUse:
    """What the host tier has promised and holds, at one moment, in bytes.

    Attributes:
        saved: what its copies would hold more if each held alone what it shares with others.
        copies: how many there are, those included that are being made or dropped.
        kept_count: copies made since the server started.
        dropped_count: copies dropped.
        promotion_count: loads from a copy.
    """

    budget: int
    reserved: int
    resident: int
    draining: int
    quarantined: int
    deficit: int
    peak: int
    saved: int
    copies: int
    kept_count: int
    dropped_count: int
    promotion_count: int


GONE = ModelUse(
    state=State.COLD,
    charges={},
    shared={},
    quarantined={},
    pinned=False,
    lease_count=0,
    waiting_count=0,
    load_count=0,
    eviction_count=0,
    load_duration_s=None,
    failure_text="",
    failure_transient=False,
    failure_count=0,
    retry_in_s=0.0,
)
"""Where a model stands that was removed and holds nothing any more."""
