"""What became of requests, as a server tells it to who watches. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

__all__ = ["RecordedModel", "RecordedRequest", "RequestRecords"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedModel:
    """What a model takes.

    Args:
        model: resource name.
        size_bytes: bytes it holds over all devices; an upper bound until it was resident.
        load_s: seconds that a load from its files takes; None before the first.
        copy_load_s: seconds that a load from its copy on the host tier takes; None before the
            first.
    """

    model: str
    size_bytes: int
    load_s: float | None
    copy_load_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRequest:
    """A request that has ended.

    Args:
        arrival_s: when it arrived, in seconds since the server began to answer.
        arrived_at: the same on the server's wall clock, in UTC.
        key: what it asked for.
        model: resource name of what the key meant; empty if nothing.
        device: resource name of the device that ran it; empty if none did.
        cold: whether it found its model not resident and waited for it.
        wait_s: seconds from its arrival until it had its model, or until it was refused.
        load_s: the part of ``wait_s`` during which the model was being loaded; None for a hit.
        run_s: seconds from having its model to its end; None if it never had.
        row_count: rows it asked for: the first dimension of its first input.
        reason: why it was refused or failed; None if it was answered.
    """

    arrival_s: float
    arrived_at: datetime
    key: str
    model: str
    device: str
    cold: bool
    wait_s: float
    load_s: float | None
    run_s: float | None
    row_count: int
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecords:
    """Requests that have ended, in the order in which they did.

    Args:
        started_at: when the server began to answer, which ``arrival_s`` counts from, in UTC.
        models: all models where the watch begins; later those that are new or better known.
        requests: what has ended.
        missed_count: how many ended before these and are lost, because they were not read in time.
        begins: whether the watch begins here. It does so again when the connection broke: what
            ended meanwhile is lost, and nobody knows how many they were.
    """

    started_at: datetime
    models: tuple[RecordedModel, ...]
    requests: tuple[RecordedRequest, ...]
    missed_count: int
    begins: bool
