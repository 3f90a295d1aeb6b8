"""The journal: what it keeps, whom it wakes, and what the core's decisions become in it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from tests.support.fake_engine import turns

from modelyard.v1 import event_pb2
from modelyard_server import _core
from modelyard_server.residency.decisions import publish_decision
from modelyard_server.residency.journal import Departure, Event, EventType, Journal, Position, Waits

NOON = datetime(2030, 1, 2, 12, tzinfo=UTC)


def journal_of(capacity: int = 8, **settings: Any) -> Journal:
    return Journal(capacity=capacity, now=lambda: NOON, **settings)


def filled(count: int, capacity: int = 8) -> Journal:
    """A journal in which model i was queued as event i."""
    journal = journal_of(capacity)
    for i in range(1, count + 1):
        journal.publish(EventType.QUEUED, f"models/m{i}")
    return journal


def revisions(events: list[Event]) -> list[int]:
    return [event.revision for event in events]


# --- Events ---------------------------------------------------------------------------------------


def test_event_types_are_those_of_the_contract() -> None:
    ours = {f"EVENT_TYPE_{type.name}": type.value for type in EventType}
    assert ours == {k: v for k, v in event_pb2.EventType.items() if v}


def test_each_run_has_an_epoch_of_its_own() -> None:
    assert journal_of().epoch != journal_of().epoch


def test_an_event_says_all_that_was_said_of_it() -> None:
    journal = journal_of()
    event = journal.publish(
        EventType.EVICTED,
        "models/a",
        cause="models/b",
        size_bytes=7,
        score=0.5,
        waited_s=1.5,
        load_s=0.25,
        description="why",
    )
    assert event == Event(
        revision=1,
        time=NOON,
        type=EventType.EVICTED,
        subject="models/a",
        cause="models/b",
        size_bytes=7,
        score=0.5,
        waited_s=1.5,
        load_s=0.25,
        description="why",
        identity="",
    )
    assert journal.revision == 1
    assert journal.events_after(0) == ([event], False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"revision": 0},
        {"subject": ""},
        {"time": NOON.replace(tzinfo=None)},
        {"time": datetime(2030, 1, 2, 12, tzinfo=timezone(timedelta(hours=1)))},
    ],
)
def test_an_event_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {
        "revision": 1,
        "time": NOON,
        "type": EventType.PINNED,
        "subject": "models/a",
    }
    Event(**right)
    with pytest.raises(ValueError, match="event"):
        Event(**right | wrong)


@pytest.mark.parametrize("wrong", [{"capacity": 0}, {"capacity": 1, "most_changed": 0}])
def test_a_journal_keeps_at_least_one(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Journal(**wrong)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 9, 20])
@pytest.mark.parametrize("after", [0, 1, 4, 7, 19, 20, 99])
@pytest.mark.parametrize("most", [None, 1, 3])
def test_the_log_answers_like_a_list_that_forgets(count: int, after: int, most: int | None) -> None:
    capacity = 4
    journal = filled(count, capacity)
    whole = list(range(1, count + 1))
    kept = whole[-capacity:]
    events, truncated = journal.events_after(after, most=most)
    assert revisions(events) == [r for r in kept if r > after][:most]
    assert truncated == any(r > after for r in whole[:-capacity])
    assert all(event.subject == f"models/m{event.revision}" for event in events)


def test_events_about_a_model_are_its_own_and_those_it_caused() -> None:
    journal = journal_of(3)
    journal.publish(EventType.QUEUED, "models/b")
    journal.publish(EventType.EVICTED, "models/a", cause="models/b")
    journal.publish(EventType.QUEUED, "models/c")
    assert [e.subject for e in journal.about("models/b")[0]] == ["models/b", "models/a"]
    assert not journal.about("models/b")[1]
    assert journal.about("models/none") == ([], False)
    journal.publish(EventType.QUEUED, "models/c")
    assert [e.subject for e in journal.about("models/b")[0]] == ["models/a"]
    assert journal.about("models/b")[1]


async def test_events_carry_who_acted_also_from_tasks_begun_meanwhile() -> None:
    journal, other = journal_of(), journal_of()

    async def later() -> str:
        await asyncio.sleep(0)
        return journal.publish(EventType.LOAD_DONE, "models/a").identity

    with journal.acting("ann"):
        task = asyncio.create_task(later())
        with journal.acting("bob"):
            assert journal.publish(EventType.PINNED, "models/a").identity == "bob"
            assert other.publish(EventType.PINNED, "models/a").identity == ""
        assert journal.publish(EventType.PINNED, "models/a").identity == "ann"
    assert journal.publish(EventType.PINNED, "models/a").identity == ""
    assert await task == "ann"


# --- Changes --------------------------------------------------------------------------------------


def test_of_each_model_only_the_last_change_is_told_in_order() -> None:
    journal = journal_of()
    begin = journal.position
    journal.changed("a")
    middle = journal.position
    journal.publish(EventType.QUEUED, "models/b")
    for model in ("b", "c", "a"):
        journal.changed(model)
    assert journal.changes_after(begin) == (["b", "c", "a"], [])
    assert journal.changes_after(middle) == (["b", "c", "a"], [])
    assert journal.changes_after(journal.position) == ([], [])
    assert journal.changes_after(Position(1, 1)) == (["c", "a"], [])


def test_a_model_is_changed_or_gone_as_it_was_last() -> None:
    journal = journal_of()
    begin = journal.position
    journal.changed("a")
    journal.removed("a")
    assert journal.changes_after(begin) == ([], ["a"])
    journal.changed("a")
    assert journal.changes_after(begin) == (["a"], [])


def test_who_resumes_from_a_revision_misses_no_change_without_an_event() -> None:
    journal = journal_of()
    journal.publish(EventType.QUEUED, "models/a")
    journal.changed("a")
    told = journal.revision
    journal.changed("b")
    assert journal.changes_after(Position(told)) == (["a", "b"], [])
    # Nor hears of what was before it.
    journal.publish(EventType.QUEUED, "models/c")
    journal.changed("c")
    assert journal.changes_after(Position(journal.revision)) == (["c"], [])


def test_changes_that_are_forgotten_are_not_passed_over() -> None:
    journal = journal_of(most_changed=2)
    begin = journal.position
    journal.changed("a")
    first = journal.position
    journal.removed("b")
    assert journal.changes_after(begin) == (["a"], ["b"])
    journal.changed("c")
    assert journal.changes_after(begin) is None
    assert journal.changes_after(first) == (["c"], ["b"])


def test_a_position_of_the_future_is_not_known() -> None:
    journal = filled(2)
    assert journal.changes_after(Position(2)) == ([], [])
    assert journal.changes_after(Position(3)) is None


# --- Waiting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["publish", "changed", "removed"])
async def test_whatever_happens_wakes_all_who_wait(what: str) -> None:
    journal = filled(1)
    waits = [asyncio.create_task(journal.wait(journal.position)) for _ in range(3)]
    await turns()
    assert not any(wait.done() for wait in waits)
    match what:
        case "publish":
            journal.publish(EventType.QUEUED, "models/a")
        case "changed":
            journal.changed("a")
        case _:
            journal.removed("a")
    assert await asyncio.gather(*waits) == [True] * 3
    assert not journal._waiters


async def test_what_has_happened_already_is_not_waited_for() -> None:
    journal = filled(1)
    assert await journal.wait(Position(0))


async def test_something_that_happens_before_the_waiter_runs_is_not_lost() -> None:
    journal = filled(1)
    at = journal.position
    wait = asyncio.create_task(journal.wait(at))
    journal.publish(EventType.QUEUED, "models/a")  # Its task has not begun.
    assert await wait
    wait = asyncio.create_task(journal.wait(journal.position))
    await turns()
    journal.publish(EventType.QUEUED, "models/a")
    journal.publish(EventType.QUEUED, "models/a")  # It is woken, and has not run.
    assert await wait
    assert not journal._waiters


async def test_a_waiter_that_is_cancelled_takes_nobody_with_it() -> None:
    journal = journal_of()
    waits = [asyncio.create_task(journal.wait(journal.position)) for _ in range(3)]
    await turns()
    waits[1].cancel()
    await turns()
    assert [wait.cancelled() for wait in waits] == [False, True, False]
    assert len(journal._waiters) == 2
    journal.changed("a")
    waits[2].cancel()  # Woken and cancelled in one: it is cancelled.
    assert await waits[0]
    await turns()
    assert waits[2].cancelled()
    assert not journal._waiters


async def test_close_ends_every_wait_now_and_later() -> None:
    journal = filled(1)
    wait = asyncio.create_task(journal.wait(journal.position))
    await turns()
    journal.close()
    assert not await wait
    assert not await journal.wait(journal.position)
    # What happened before is still told.
    assert await journal.wait(Position(0))


# --- Decisions of the core ------------------------------------------------------------------------


def record_of(decision: str, **values: Any) -> dict[str, Any]:
    nothing: dict[str, Any] = {
        "sequence": 1,
        "at_ns": 0,
        "decision": decision,
        "model": 1,
        "cause": 0,
        "why": "NONE",
        "device": -1,
        "score": 0.0,
        "bytes": 100,
        "shared_bytes": 0,
        "waited_ns": 0,
        "seconds": 0.0,
        "idle_ns": 0,
        "stayed_ns": 0,
        "expected_s": 0.0,
        "rule": "",
        "waiting_count": 0,
        "waited_sum_ns": 0,
    }
    assert values.keys() <= nothing.keys()
    return nothing | values


def published(decision: str, **values: Any) -> tuple[Event, Journal]:
    journal = journal_of()
    event = publish_decision(
        journal,
        record_of(decision, **values),
        name_of={1: "a", 2: "b"}.__getitem__,
        device_name_of=["devices/cpu", "devices/x", "hostTier"].__getitem__,
    )
    assert journal.events_after(0) == ([event], False)
    return event, journal


@pytest.mark.parametrize("decision", ["EVICTED", "DRAINED", "LOST"])
def test_a_model_that_leaves_is_told_of_with_its_age_and_price(decision: str) -> None:
    event, _ = published(
        decision, rule="gdsf", expected_s=1.5, idle_ns=2 * 10**9, stayed_ns=3 * 10**9
    )
    assert event.departure == Departure(
        rule="gdsf", expected_load_s=1.5, idle_s=2.0, resident_s=3.0
    )
    # What has left before, and what is no departure, has neither.
    assert published(decision)[0].departure is None
    assert published("UNLOADED", expected_s=1.5)[0].departure is None


def test_a_load_tells_who_waited_for_it() -> None:
    event, _ = published("LOAD_DONE", waiting_count=3, waited_sum_ns=6 * 10**9)
    assert event.waits == Waits(count=3, sum_s=6.0)
    assert published("LOAD_DONE")[0].waits is None
    assert published("LOAD_STARTED", waiting_count=3)[0].waits is None


@pytest.mark.parametrize(
    ("values", "cause", "score", "description"),
    [
        ({"why": "MODEL", "cause": 2, "score": 0.1}, "models/b", 0.1, ", for models/b"),
        (
            {"why": "BUDGET", "score": 2.0},
            "hostTier",
            2.0,
            ", because the host tier holds more than its budget",
        ),
        ({"why": "OPERATOR"}, "operator", None, ", because an operator asked for it"),
        ({"why": "REMOVED"}, "operator", None, ", because the model was deleted"),
        (
            {"why": "REPLACED"},
            "operator",
            None,
            ", because another version of it has taken over",
        ),
        ({"why": "LOST"}, "", None, ", because the process that held it has died"),
    ],
)
def test_a_copy_that_goes_says_for_whom_or_what(
    values: dict[str, Any], cause: str, score: float | None, description: str
) -> None:
    event, journal = published("COPY_DROPPED", device=2, bytes=2**20, **values)
    assert (event.type, event.subject) == (EventType.COPY_DROPPED, "models/a")
    assert (event.cause, event.score, event.size_bytes) == (cause, score, 2**20)
    assert event.description == f"its copy leaves the host tier, 1MiB come back{description}"
    assert journal.changes_after(Position(0)) == (["a"], [])


def test_a_copy_that_was_made_is_told() -> None:
    event, journal = published("COPY_KEPT", device=2, bytes=2**20)
    assert (event.type, event.subject, event.cause) == (EventType.COPY_KEPT, "models/a", "")
    assert event.description == "a copy of its weights, 1MiB, is on the host tier"
    assert journal.changes_after(Position(0)) == (["a"], [])


def test_what_is_not_back_is_said_of_the_device_or_of_the_host_tier() -> None:
    event, _ = published("QUARANTINED", device=2, bytes=2**20)
    assert event.description == "its copy has left the host tier, 1MiB are not back"
    for device in (-1, 1):
        event, _ = published("QUARANTINED", device=device, bytes=2**20)
        assert event.description == "has left, 1MiB are not back"


def test_the_budget_of_the_host_tier_is_a_budget_like_others() -> None:
    event, _ = published("BUDGET_CHANGED", model=0, device=2, bytes=2**20)
    assert (event.subject, event.cause) == ("hostTier", "operator")
    assert event.description == "its budget is 1MiB now"


@pytest.mark.parametrize(
    ("values", "cause", "score", "description"),
    [
        (
            {"why": "MODEL", "cause": 2, "score": 0.1234},
            "models/b",
            0.1234,
            "evicted, for models/b",
        ),
        (
            {"why": "BUDGET", "device": 1, "score": 2.0},
            "devices/x",
            2.0,
            "evicted, because devices/x holds more than its budget",
        ),
        (
            {"why": "DEVICE_CLOSED", "device": 0},
            "devices/cpu",
            None,
            "evicted, because devices/cpu is drained",
        ),
        (
            {"why": "DEVICE_BEHIND", "device": 1},
            "devices/x",
            None,
            "evicted, because devices/x is behind with its work and others are not",
        ),
        ({"why": "OPERATOR"}, "operator", None, "evicted, because an operator asked for it"),
        ({"why": "REMOVED"}, "operator", None, "evicted, because the model was deleted"),
        ({}, "", None, "evicted"),
    ],
)
def test_an_eviction_says_for_whom_or_what(
    values: dict[str, Any], cause: str, score: float | None, description: str
) -> None:
    event, journal = published("EVICTED", **values)
    assert (event.type, event.subject) == (EventType.EVICTED, "models/a")
    assert (event.cause, event.score, event.description) == (cause, score, description)
    assert event.size_bytes == 100
    assert journal.changes_after(Position(0)) == (["a"], [])


def test_a_load_that_is_done_says_how_long_it_took_and_who_waited() -> None:
    # The core puts the seconds where others have their score.
    event, _ = published("LOAD_DONE", seconds=0.25, score=0.25, waited_ns=1_500_000_000)
    assert (event.load_s, event.waited_s, event.score) == (0.25, 1.5, None)
    assert event.description == "holds 100B"


def test_a_refusal_says_why() -> None:
    reason = list(_core.RefuseReason).index(_core.RefuseReason.NEVER_FITS)
    event, _ = published("REFUSED", score=float(reason))
    assert (event.description, event.score) == ("a request was refused, never fits", None)


def test_what_is_done_to_a_device_is_about_the_device_and_changes_no_model() -> None:
    event, journal = published("BUDGET_CHANGED", model=0, device=1, bytes=5)
    assert (event.type, event.subject) == (EventType.BUDGET_CHANGED, "devices/x")
    assert (event.cause, event.description) == ("operator", "its budget is 5B now")
    assert journal.changes_after(Position(0)) == ([], [])


DECISIONS = [
    "LOAD_STARTED",
    "LOAD_DONE",
    "LOAD_FAILED",
    "EVICTED",
    "DRAINED",
    "UNLOADED",
    "QUARANTINED",
    "REFUSED",
    "OVERSHOOT",
    "BUDGET_CHANGED",
    "PINNED",
    "UNPINNED",
    "DEVICE_DRAINED",
    "DEVICE_UNDRAINED",
    "QUEUED",
]


@pytest.mark.parametrize("decision", DECISIONS)
def test_every_decision_has_an_event_and_words(decision: str) -> None:
    event, _ = published(decision)
    assert event.type is EventType[decision]
    assert event.description


def test_a_decision_without_an_event_is_an_error() -> None:
    with pytest.raises(KeyError, match="GUESSED"):
        published("GUESSED")
