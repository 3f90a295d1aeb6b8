"""Why a model is where it is, in one or two sentences for people."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime

from modelyard_server.residency.decisions import OPERATOR
from modelyard_server.residency.journal import Event, EventType
from modelyard_server.residency.values import CopyState, ModelUse, State

__all__ = ["summary_of"]

_LEAVING = (EventType.EVICTED, EventType.DRAINED)


def summary_of(
    model: str,
    use: ModelUse | None,
    events: Sequence[Event],
    *,
    device_names: Sequence[str],
    truncated: bool,
) -> str:
    """What the events tell about where a model stands and how often it had to leave.

    Args:
        model: its resource name.
        use: where it stands; None if it is not registered any more.
        events: about it, and those it was the cause of; oldest first.
        device_names: resource names of the devices, by position.
        truncated: older events are missing.
    """
    own = [event for event in events if event.subject == model]
    sentence = "not registered any more" if use is None else _place(use, own, device_names)
    evictions = [e for e in own if e.type in _LEAVING and e.cause != OPERATOR]
    if evictions:
        times = "once" if len(evictions) == 1 else f"{len(evictions)} times"
        least = "at least " if truncated else ""
        last = ", last" if len(evictions) > 1 else ""
        sentence += f"; evicted {least}{times}{last}{_for(evictions[-1])}"
    if use is not None and use.pinned:
        sentence += "; pinned"
    if use is not None and use.copy_state is CopyState.KEPT:
        sentence += "; a copy of its weights is on the host tier"
    victims = {e.subject for e in events if e.cause == model and e.type in _LEAVING}
    others = f" It made {_named(victims)} leave." if victims else ""
    return f"{sentence[0].upper()}{sentence[1:]}.{others}"


def _place(use: ModelUse, own: Sequence[Event], device_names: Sequence[str]) -> str:
    charged = " and ".join(device_names[device] for device in sorted(use.charges))
    where = f" on {charged}" if charged else ""
    match use.state:
        case State.RESIDENT:
            return f"resident{where}{_loaded(_last(own, EventType.LOAD_DONE))}"
        case State.LOADING:
            return f"being loaded{where}{_since(_last(own, EventType.LOAD_STARTED))}"
        case State.QUEUED:
            return f"waiting for memory{_since(_last(own, EventType.QUEUED))}"
        case State.FAILED:
            failed = _last(own, EventType.LOAD_FAILED)
            reason = f": {use.failure_text}" if use.failure_text else ""
            return f"not in memory, its last load failed{_at(failed)}{reason}"
        case State.DRAINING | State.UNLOADING:
            leave = _last(own, *_LEAVING)
            cause = _for(leave) if leave is not None else ""
            how = "when its requests end" if use.state is State.DRAINING else "now"
            return f"leaving {charged or 'memory'} {how}{cause}"
        case _:
            left = _last(own, EventType.UNLOADED, EventType.QUARANTINED)
            leave = _last(own, *_LEAVING)
            if left is not None:
                why = "" if leave is None else f", it left{_for(leave)}"
                return f"not in memory{_since(left)}{why}"
            return "not in memory" if use.load_count else "not in memory, never loaded"


def _loaded(event: Event | None) -> str:
    if event is None or event.load_s is None:
        return ""
    text = f"{_since(event)}, loaded in {event.load_s:.2f} s"
    if event.waited_s is not None:
        text += f", {event.waited_s:.2f} s after it was asked for"
    return text


def _last(events: Sequence[Event], *types: EventType) -> Event | None:
    return next((event for event in reversed(events) if event.type in types), None)


def _for(event: Event) -> str:
    if event.cause == OPERATOR:
        return f" because an operator asked for it{_at(event)}"
    if event.cause.startswith("devices/"):
        return f" because of {event.cause}{_at(event)}"
    return f" for {event.cause}{_at(event)}" if event.cause else _at(event)


def _since(event: Event | None) -> str:
    return "" if event is None else f" since {_clock(event.time)}"


def _at(event: Event | None) -> str:
    return "" if event is None else f" at {_clock(event.time)}"


def _clock(time: datetime) -> str:
    return f"{time:%H:%M:%S} UTC"


def _named(subjects: Collection[str]) -> str:
    shown = sorted(subjects)[:3]
    more = len(subjects) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
