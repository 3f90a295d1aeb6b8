"""The log of requests: bounded, empty while nobody follows, honest about what is missing."""

from __future__ import annotations

import asyncio

import pytest

from modelyard_server.services.request_log import RequestFacts, RequestLog


def add(log: RequestLog, *numbers: int) -> None:
    for number in numbers:
        log.add(RequestFacts(number))


def arrivals(found: list[RequestFacts]) -> list[int]:
    return [facts.arrived_ns for facts in found]


def state(log: RequestLog) -> tuple[bool, int]:
    return log.followed, log.follower_count


def test_it_is_followed_exactly_while_somebody_follows() -> None:
    log = RequestLog()
    assert state(log) == (False, 0)
    with log.following():
        with log.following():
            assert state(log) == (True, 2)
        assert state(log) == (True, 1)
        add(log, 1, 2)
    assert state(log) == (False, 0)
    with log.following() as number:  # What was kept went with the last follower.
        assert log.after(number, most=10) == ([], 0, number)


def test_a_follower_is_told_of_what_came_after_it() -> None:
    log = RequestLog()
    with log.following() as first:
        add(log, 1, 2, 3)
        with log.following() as second:
            add(log, 4)
            found, missed, number = log.after(first, most=10)
            assert (arrivals(found), missed) == ([1, 2, 3, 4], 0)
            assert log.after(number, most=10) == ([], 0, number)
            assert arrivals(log.after(second, most=10)[0]) == [4]


def test_pages_follow_each_other_without_gaps() -> None:
    log = RequestLog(capacity=100)
    with log.following() as number:
        add(log, *range(10))
        seen: list[int] = []
        for size in (4, 4, 2, 0):
            found, missed, number = log.after(number, most=4)
            assert (len(found), missed) == (size, 0)
            seen += arrivals(found)
    assert seen == list(range(10))


def test_who_falls_behind_is_told_how_many_are_missing() -> None:
    log = RequestLog(capacity=3)
    with log.following() as number:
        add(log, *range(8))
        found, missed, number = log.after(number, most=2)
        assert (arrivals(found), missed) == ([5, 6], 5)
        add(log, 8)
        found, missed, number = log.after(number, most=2)
        assert (arrivals(found), missed) == ([7, 8], 0)


def test_a_log_keeps_at_least_one() -> None:
    with pytest.raises(ValueError, match="at least one"):
        RequestLog(capacity=0)


async def test_waiting_ends_with_the_next_request_for_everybody() -> None:
    log = RequestLog()
    with log.following() as number:
        waiters = [asyncio.create_task(log.wait(number)) for _ in range(3)]
        await asyncio.sleep(0)
        waiters[0].cancel()
        await asyncio.sleep(0)
        assert not waiters[1].done()
        add(log, 1)
        await asyncio.wait_for(asyncio.gather(*waiters[1:]), 5)
        assert waiters[0].cancelled()
        await asyncio.wait_for(log.wait(number), 5)  # There is one already.
