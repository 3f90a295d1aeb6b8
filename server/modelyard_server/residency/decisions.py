"""Decisions of the core in the words of the journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from modelyard_server import _core
from modelyard_server.devices.budgets import HOST_TIER
from modelyard_server.devices.sizes import format_size
from modelyard_server.residency.journal import Departure, Event, EventType, Journal, Waits

__all__ = ["OPERATOR", "publish_decision"]

OPERATOR = "operator"
"""The cause of what somebody asked for by hand."""

_SCORED = ("MODEL", "BUDGET")
"""Why a model leaves that was chosen among others."""

_DEPARTURES = frozenset({EventType.EVICTED, EventType.DRAINED, EventType.LOST})

_BY_OPERATORS = frozenset(
    {
        EventType.BUDGET_CHANGED,
        EventType.PINNED,
        EventType.UNPINNED,
        EventType.DEVICE_DRAINED,
        EventType.DEVICE_UNDRAINED,
    }
)

_WORDS = {
    EventType.LOAD_STARTED: "its load began, {size} are reserved",
    EventType.LOAD_DONE: "holds {size}",
    EventType.LOAD_FAILED: "its load failed or was stopped",
    EventType.EVICTED: "evicted",
    EventType.DRAINED: "told to leave when its requests end",
    EventType.UNLOADED: "has left, {size} are back",
    EventType.QUARANTINED: "has left, {size} are not back",
    EventType.REFUSED: "a request was refused",
    EventType.OVERSHOOT: "turned out {size} larger than what was reserved",
    EventType.BUDGET_CHANGED: "its budget is {size} now",
    EventType.PINNED: "pinned",
    EventType.UNPINNED: "unpinned",
    EventType.DEVICE_DRAINED: "takes no models any more",
    EventType.DEVICE_UNDRAINED: "takes models again",
    EventType.QUEUED: "asked for while not in memory",
    EventType.LOST: "lost {size}: the process that held it has died",
    EventType.COPY_KEPT: "a copy of its weights, {size}, is on the host tier",
    EventType.COPY_DROPPED: "its copy leaves the host tier, {size} come back",
}

_TIER_WORDS = {
    EventType.QUARANTINED: "its copy has left the host tier, {size} are not back",
}
"""What is said otherwise of the host tier than of a device."""


def publish_decision(
    journal: Journal,
    record: Mapping[str, Any],
    *,
    name_of: Callable[[int], str],
    device_name_of: Callable[[int], str],
) -> Event:
    """Publishes one explanation of the core, and marks the model it is about as changed.

    Args:
        journal: where it goes.
        record: one of Yard.explanations().
        name_of: a model's id by the core's id for it.
        device_name_of: a device's resource name by its position.

    Raises:
        KeyError: a decision that the contract has no event for.
    """
    type = EventType[record["decision"]]
    model: int = record["model"]
    device: int = record["device"]
    name = name_of(model) if model else ""
    where = device_name_of(device) if device >= 0 else ""
    subject = f"models/{name}" if model else where
    cause, because = _cause(record, where, name_of)
    if type in _BY_OPERATORS:
        cause = OPERATOR
    load_s: float | None = record["seconds"] if type is EventType.LOAD_DONE else None
    score: float | None = record["score"] if record["why"] in _SCORED else None
    waited_ns: int = record["waited_ns"]
    said = _TIER_WORDS.get(type, _WORDS[type]) if where == HOST_TIER else _WORDS[type]
    words = [said.format(size=format_size(record["bytes"]))]
    if record["shared_bytes"]:
        words.append(f"shares {format_size(record['shared_bytes'])} with others")
    if because:
        words.append(because)
    if type is EventType.REFUSED:
        words.append(_core.RefuseReason(int(record["score"])).name.lower().replace("_", " "))
    event = journal.publish(
        type,
        subject,
        cause=cause,
        size_bytes=record["bytes"],
        shared_bytes=record["shared_bytes"],
        score=score,
        waited_s=waited_ns * 1e-9 if waited_ns > 0 else None,
        load_s=load_s,
        description=", ".join(words),
        departure=_departure(type, record),
        waits=_waits(type, record),
    )
    if model:
        journal.changed(name)
    return event


def _departure(type: EventType, record: Mapping[str, Any]) -> Departure | None:
    # A model that was lost while it was leaving has left before: the core says nothing more of it.
    if type not in _DEPARTURES or not record["expected_s"]:
        return None
    return Departure(
        rule=record["rule"],
        expected_load_s=record["expected_s"],
        idle_s=record["idle_ns"] * 1e-9,
        resident_s=record["stayed_ns"] * 1e-9,
    )


def _waits(type: EventType, record: Mapping[str, Any]) -> Waits | None:
    if type is not EventType.LOAD_DONE or not record["waiting_count"]:
        return None
    return Waits(count=record["waiting_count"], sum_s=record["waited_sum_ns"] * 1e-9)


def _cause(record: Mapping[str, Any], where: str, name_of: Callable[[int], str]) -> tuple[str, str]:
    """For whom or what it was done: its resource name, and words."""
    match record["why"]:
        case "MODEL":
            cause = f"models/{name_of(record['cause'])}"
            return cause, f"for {cause}"
        case "BUDGET":
            holder = "the host tier" if where == HOST_TIER else where
            return where, f"because {holder} holds more than its budget"
        case "DEVICE_CLOSED":
            return where, f"because {where} is drained"
        case "DEVICE_BEHIND":
            return where, f"because {where} is behind with its work and others are not"
        case "OPERATOR":
            return OPERATOR, "because an operator asked for it"
        case "REMOVED":
            return OPERATOR, "because the model was deleted"
        case "NOT_WORTH":
            return "", "because loading from it takes no less time than from files"
        case "LOST":
            return "", "because the process that held it has died"
        case "REPLACED":
            return OPERATOR, "because another version of it has taken over"
        case _:
            return "", ""
