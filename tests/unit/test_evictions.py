"""What an eviction cost, read from the events behind it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from modelyard_server.residency.journal import Departure, Event, EventType, Waits
from modelyard_server.services.evictions import Eviction, evictions_of

NOON = datetime(2030, 1, 2, 12, tzinfo=UTC)
LEFT = Departure(rule="lru", expected_load_s=2.0, idle_s=5.0, resident_s=9.0)


class Story:
    """Events, numbered as they come."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def tell(self, type: EventType, subject: str = "models/a", **values: Any) -> Event:
        event = Event(
            revision=len(self.events) + 1, time=NOON, type=type, subject=subject, **values
        )
        self.events.append(event)
        return event

    def evictions(self) -> tuple[Eviction, ...]:
        return evictions_of("models/a", self.events)


def test_an_eviction_costs_the_next_load_of_its_model() -> None:
    story = Story()
    story.tell(EventType.LOAD_DONE, load_s=1.0)
    left = story.tell(EventType.EVICTED, cause="models/b", departure=LEFT)
    story.tell(EventType.LOAD_DONE, "models/b", load_s=7.0)
    story.tell(EventType.LOAD_FAILED)
    back = story.tell(EventType.LOAD_DONE, load_s=3.0, waits=Waits(count=2, sum_s=4.0))
    again = story.tell(EventType.DRAINED, cause="devices/cpu", departure=LEFT)
    assert story.evictions() == (
        Eviction(event=left, reload=back, failed_load_count=1),
        Eviction(event=again, reload=None, failed_load_count=0),
    )


def test_evictions_of_others_are_theirs() -> None:
    story = Story()
    story.tell(EventType.EVICTED, "models/b", cause="models/a", departure=LEFT)
    story.tell(EventType.LOAD_DONE, load_s=1.0)
    assert story.evictions() == ()


def test_a_model_that_is_lost_while_it_leaves_has_left_once() -> None:
    story = Story()
    left = story.tell(EventType.DRAINED, cause="models/b", departure=LEFT)
    story.tell(EventType.LOST)  # The core says nothing of its age: it has left before.
    story.tell(EventType.LOAD_FAILED)
    assert story.evictions() == (Eviction(event=left, reload=None, failed_load_count=1),)


def test_one_that_is_lost_from_memory_has_left() -> None:
    story = Story()
    lost = story.tell(EventType.LOST, departure=LEFT)
    back = story.tell(EventType.LOAD_DONE, load_s=1.0)
    assert story.evictions() == (Eviction(event=lost, reload=back, failed_load_count=0),)


def test_two_of_one_name_that_leave_are_two() -> None:
    story = Story()
    first = story.tell(EventType.DRAINED, cause="operator", departure=LEFT)
    second = story.tell(EventType.EVICTED, cause="operator", departure=LEFT)
    assert [eviction.event for eviction in story.evictions()] == [first, second]
