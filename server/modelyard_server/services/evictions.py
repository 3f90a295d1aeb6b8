"""What it cost each time that a model had to leave: its next load, and who waited for that."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from modelyard_server.residency.journal import Event, EventType

__all__ = ["Eviction", "evictions_of"]

_TOLD_TO_LEAVE = (EventType.EVICTED, EventType.DRAINED, EventType.LOST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Eviction:
    """One time that a model had to leave.

    Attributes:
        event: that told it to.
        reload: the end of the first load after it that went well; None if there was none yet.
        failed_load_count: loads that failed or were stopped in between.
    """

    event: Event
    reload: Event | None
    failed_load_count: int


def evictions_of(model: str, events: Iterable[Event]) -> tuple[Eviction, ...]:
    """Each time that a model had to leave, oldest first.

    Args:
        model: its resource name.
        events: oldest first; those about other models are passed over.
    """
    found: list[Eviction] = []
    left: Event | None = None
    failed = 0
    for event in events:
        if event.subject != model:
            continue
        if event.type in _TOLD_TO_LEAVE and event.departure is not None:
            # One that is told again has been replaced, by one of the same name that was told too.
            if left is not None:
                found.append(Eviction(event=left, reload=None, failed_load_count=failed))
            left, failed = event, 0
        elif left is not None and event.type is EventType.LOAD_FAILED:
            failed += 1
        elif left is not None and event.type is EventType.LOAD_DONE:
            found.append(Eviction(event=left, reload=event, failed_load_count=failed))
            left = None
    if left is not None:
        found.append(Eviction(event=left, reload=None, failed_load_count=failed))
    return tuple(found)
