"""Messages about events and changes as values."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from google.protobuf.message import Message

from modelyard._admin_messages import residency_from, time_from
from modelyard._predict_messages import seconds_from
from modelyard.events import (
    Event,
    EventType,
    Eviction,
    Explanation,
    ResidencyChange,
    WatchPosition,
)
from modelyard.v1 import event_pb2, residency_service_pb2

__all__ = ["event_from", "explanation_from", "residency_change_from"]

_PREFIX: Final = "EVENT_TYPE_"
_TYPES: Final[Mapping[int, EventType]] = MappingProxyType(
    {
        value: EventType[name.removeprefix(_PREFIX)]
        for name, value in event_pb2.EventType.items()
        # Of the same build as this module; what a newer server sends is in neither.
        if name.removeprefix(_PREFIX) in EventType.__members__
    }
)


def event_from(message: event_pb2.Event) -> Event:
    """Return an event. Raises ``ValueError`` if a time is out of range."""
    return Event(
        revision=message.revision,
        happened_at=time_from(message.time) if message.HasField("time") else None,
        type=_TYPES.get(message.type, EventType.UNKNOWN),
        subject=message.subject,
        cause=message.cause,
        size_bytes=message.size_bytes,
        score=message.score if message.HasField("score") else None,
        waited_s=_seconds(message, "waited"),
        load_s=_seconds(message, "load_duration"),
        description=message.description,
        identity=message.identity,
        shared_bytes=message.shared_bytes,
        rule=message.rule,
        expected_load_s=_seconds(message, "expected_load_duration"),
        idle_s=_seconds(message, "idle_duration"),
        resident_s=_seconds(message, "resident_duration"),
        waited_request_count=message.waited_request_count,
        waited_sum_s=_seconds(message, "waited_sum"),
    )


def _eviction_from(message: residency_service_pb2.Eviction) -> Eviction:
    return Eviction(
        event=event_from(message.event),
        waited_request_count=message.waited_request_count,
        longest_wait_s=_seconds(message, "longest_wait"),
        waited_sum_s=_seconds(message, "waited_sum"),
        reload_s=_seconds(message, "reload_duration"),
        reloaded_at=time_from(message.reload_time) if message.HasField("reload_time") else None,
        failed_load_count=message.failed_load_count,
    )


def _seconds(message: Message, name: str) -> float | None:
    return seconds_from(getattr(message, name)) if message.HasField(name) else None


def explanation_from(message: residency_service_pb2.ExplainModelResponse) -> Explanation:
    """Return why a model is where it is. Raises ``ValueError`` if a time is out of range."""
    return Explanation(
        residency=residency_from(message.residency) if message.HasField("residency") else None,
        events=tuple(map(event_from, message.events)),
        summary=message.summary,
        truncated=message.truncated,
        evictions=tuple(map(_eviction_from, message.evictions)),
    )


def residency_change_from(
    message: residency_service_pb2.WatchResidenciesResponse,
    *,
    begins: bool,
    position: WatchPosition | None,
) -> ResidencyChange:
    """Return a part of a snapshot, or a change.

    Args:
        message: what the server sent.
        begins: whether a snapshot begins with it.
        position: where to resume behind it.

    Raises:
        ValueError: a time is out of range.
    """
    return ResidencyChange(
        residencies=tuple(map(residency_from, message.residencies)),
        removed=tuple(message.removed),
        snapshot=message.snapshot,
        snapshot_begins=begins,
        snapshot_complete=message.snapshot_complete,
        position=position,
    )
