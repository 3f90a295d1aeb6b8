"""In words: why a model had to leave, and what that cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from modelyard_server.cli.printing import clock, duration, short_name

if TYPE_CHECKING:
    from modelyard import Eviction

__all__ = ["eviction_lines", "evictions_told"]

_MOST_TOLD: Final = 10
"""Last ones that people are told of; programs get all."""


def evictions_told(evictions: Sequence[Eviction]) -> list[str]:
    """Return lines about the last of some evictions, and one about those that are left out."""
    lines = []
    if (older := len(evictions) - _MOST_TOLD) > 0:
        lines.append(f"it had to leave {older} times before that; --json tells of all")
    for eviction in evictions[-_MOST_TOLD:]:
        lines += eviction_lines(eviction)
    return lines


def eviction_lines(eviction: Eviction) -> list[str]:
    """Return two lines about one time that a model had to leave: why, and what it cost."""
    event = eviction.event
    why = [f"{clock(event.happened_at)} {event.type} {_cause(eviction)}".strip()]
    if event.rule:
        chosen = f"chosen by the rule {event.rule}"
        why.append(chosen if event.score is None else f"{chosen}, score {event.score:.4g}")
    if event.idle_s is not None:
        why.append(f"not asked for since {duration(event.idle_s)}")
    if event.resident_s is not None:
        why.append(f"loaded {duration(event.resident_s)} before")
    return ["; ".join(why), f"  {_cost(eviction)}"]


def _cause(eviction: Eviction) -> str:
    from modelyard import EventType

    event = eviction.event
    if event.type is EventType.LOST:
        return "with the process that held it, which died"
    if event.cause == "operator":
        return "by a call of an operator"
    name = short_name(event.cause)
    if event.cause.startswith("models/"):
        return f"because {name} needed the room"
    if event.cause.startswith("devices/"):
        # Nobody chooses among those that a drained device holds.
        return f"because {name} {'held more than its budget' if event.rule else 'was drained'}"
    return f"for {name}" if name else ""


def _cost(eviction: Eviction) -> str:
    event = eviction.event
    words = []
    if eviction.reload_s is not None:
        at = clock(eviction.reloaded_at)
        done = f", done at {at}" if at else ""
        words.append(f"cost {duration(eviction.reload_s)}: loaded again{done}")
        words.append(_waits(eviction))
    elif eviction.failed_load_count:
        words.append("not loaded again so far")
    else:
        words.append("cost nothing so far: not loaded again")
    if eviction.failed_load_count:
        tries = (
            "a load" if eviction.failed_load_count == 1 else f"{eviction.failed_load_count} loads"
        )
        words.append(f"{tries} failed or stopped")
    if event.expected_load_s is not None:
        words.append(f"a load was expected to take {duration(event.expected_load_s)}")
    return "; ".join(words)


def _waits(eviction: Eviction) -> str:
    count = eviction.waited_request_count
    if not count:
        return "nobody waited for it"
    longest, together = duration(eviction.longest_wait_s or 0), duration(eviction.waited_sum_s or 0)
    if count == 1:
        return f"1 request waited {longest} for it"
    return f"{count} requests waited for it, the first {longest}, all together {together}"
