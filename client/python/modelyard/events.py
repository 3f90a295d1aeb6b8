"""What happened on a server, in order, and how to go on reading behind it. Values only.

``subject`` and ``cause`` are resource names of models or devices, or words: an event about the
whole plan has the subject ``plan``, and what an operator asked for has the cause ``operator``.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from modelyard.resources import Residency

__all__ = [
    "Event",
    "EventType",
    "Eviction",
    "Explanation",
    "ResidencyChange",
    "WatchPosition",
]


class EventType(Enum):
    """What an event tells."""

    UNKNOWN = "unknown"
    """Something this version does not know."""
    LOAD_STARTED = "load_started"
    """A load began; ``size_bytes`` are reserved."""
    LOAD_DONE = "load_done"
    """A load ended well; the model holds ``size_bytes``."""
    LOAD_FAILED = "load_failed"
    """A load failed, or was cancelled."""
    EVICTED = "evicted"
    """An idle model was told to leave; ``cause`` is for whom, ``score`` why this one."""
    DRAINED = "drained"
    """A model in use was told to leave when its requests end."""
    UNLOADED = "unloaded"
    """A model has left and its memory is back."""
    QUARANTINED = "quarantined"
    """Memory that a model should have given back and did not."""
    REFUSED = "refused"
    """A request was refused."""
    OVERSHOOT = "overshoot"
    """A model turned out larger than reserved, by ``size_bytes``."""
    BUDGET_CHANGED = "budget_changed"
    """A device's budget was set to ``size_bytes``."""
    PINNED = "pinned"
    """A model was pinned."""
    UNPINNED = "unpinned"
    """A model was unpinned."""
    DEVICE_DRAINED = "device_drained"
    """A device was drained."""
    DEVICE_UNDRAINED = "device_undrained"
    """A device takes models again."""
    MODEL_CREATED = "model_created"
    """A model was registered."""
    MODEL_UPDATED = "model_updated"
    """A registered model was changed."""
    MODEL_DELETED = "model_deleted"
    """A model was deleted."""
    PLACEMENT_CHANGED = "placement_changed"
    """A model's placement was changed."""
    PLAN_APPLIED = "plan_applied"
    """A device plan was applied."""
    PLAN_ROLLED_BACK = "plan_rolled_back"
    """A device plan failed half-way and was taken back."""
    QUEUED = "queued"
    """The first request began to wait for a model that is not resident."""
    LOST = "lost"
    """A model's memory is gone: the process that held it has died."""
    COPY_KEPT = "copy_kept"
    """A copy of an evicted model's weights is on the host tier."""
    COPY_DROPPED = "copy_dropped"
    """A model's copy leaves the host tier; ``cause`` is for whom, ``score`` why this one."""
    ROUTE_CREATED = "route_created"
    """A route was registered; it is the subject."""
    ROUTE_UPDATED = "route_updated"
    """A route was changed: its keys, or what they mean."""
    ROUTE_DELETED = "route_deleted"
    """A route was deleted: its keys mean nothing now."""

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened.

    Args:
        revision: its place in the order of events of one run of the server, from 1.
        happened_at: when.
        type: what.
        subject: what it is about.
        cause: for whom or what it was done; empty where nobody asked.
        size_bytes: bytes it is about, over all devices; of a model that leaves, what comes back.
        score: the policy's score of a model that was chosen to leave; comparable within one
            policy only.
        waited_s: how long the oldest request had waited when it was decided.
        load_s: how long a load took.
        description: for people.
        identity: who asked, as they call themselves; empty if unknown.
        shared_bytes: what the model holds besides ``size_bytes``, and others with it.
        rule: by which rule a model was chosen to leave; empty if nobody chose.
        expected_load_s: what loading it again was expected to take when it was told to leave.
        idle_s: how long it had not been asked for then.
        resident_s: how long it had been there then.
        waited_request_count: how many requests had waited for a load that ended.
        waited_sum_s: how long these had waited, all of them together.
    """

    revision: int
    happened_at: datetime | None
    type: EventType
    subject: str
    cause: str
    size_bytes: int
    score: float | None
    waited_s: float | None
    load_s: float | None
    description: str
    identity: str
    shared_bytes: int = 0
    rule: str = ""
    expected_load_s: float | None = None
    idle_s: float | None = None
    resident_s: float | None = None
    waited_request_count: int = 0
    waited_sum_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Eviction:
    """One time that a model had to leave, why, and what it cost.

    Args:
        event: that told it to leave.
        waited_request_count: requests that waited for its next load.
        longest_wait_s: how long the first of them waited; None if nobody did, or there was no such
            load yet.
        waited_sum_s: how long they waited, all of them together; None likewise.
        reload_s: how long that load took; None if there was none yet.
        reloaded_at: when it ended; None likewise.
        failed_load_count: loads that failed or were stopped in between.
    """

    event: Event
    waited_request_count: int
    longest_wait_s: float | None
    waited_sum_s: float | None
    reload_s: float | None
    reloaded_at: datetime | None
    failed_load_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a model is where it is.

    Args:
        residency: where it stands; None if it is not registered any more.
        events: about it, and those it was the cause of, oldest first.
        summary: one or two sentences, for people.
        truncated: True if older events have been dropped from the log.
        evictions: each time that it had to leave, as far as ``events`` tell, oldest first.
    """

    residency: Residency | None
    events: tuple[Event, ...]
    summary: str
    truncated: bool
    evictions: tuple[Eviction, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchPosition:
    """Up to where a watch has told everything; a later one can resume behind it.

    Args:
        epoch: which run of the server ``revision`` is of.
        revision: of the last event that was told.

    Raises:
        TypeError: a field of another type.
        ValueError: ``epoch`` is empty, or ``revision`` negative.
    """

    epoch: str
    revision: int

    def __post_init__(self) -> None:
        if not isinstance(self.epoch, str):
            raise TypeError(f"epoch must be a str, got {type(self.epoch).__name__}")
        if type(self.revision) is not int:
            raise TypeError(f"revision must be an int, got {type(self.revision).__name__}")
        if not self.epoch:
            raise ValueError("epoch is empty: take a position from a watch")
        if self.revision < 0:
            raise ValueError(f"revision is {self.revision}: 0 or more may be")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencyChange:
    """A part of a snapshot of all residencies, or what has changed since.

    Args:
        residencies: as they are now.
        removed: resource names of residencies that are gone with their models.
        snapshot: True if this is a part of a snapshot.
        snapshot_begins: True on a snapshot's first part: forget what was known before.
        snapshot_complete: True on a snapshot's last part.
        position: where a later watch can resume; None inside a snapshot, which cannot be resumed.
    """

    residencies: tuple[Residency, ...]
    removed: tuple[str, ...]
    snapshot: bool
    snapshot_begins: bool
    snapshot_complete: bool
    position: WatchPosition | None
