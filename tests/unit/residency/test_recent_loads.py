"""Seconds of loads in the last minute, by a clock that the test moves."""

from __future__ import annotations

import random

import pytest

from modelyard_server.residency.recent_loads import RecentLoads

SECOND = 10**9


def test_a_load_counts_from_its_end_until_the_window_has_passed() -> None:
    loads = RecentLoads()
    assert loads.seconds(0) == 0
    loads.note(5 * SECOND, 1.5)
    loads.note(20 * SECOND, 100.0)
    assert loads.seconds(20 * SECOND) == 101.5, "also one that took longer than the window"
    assert loads.seconds(64 * SECOND) == 101.5
    assert loads.seconds(65 * SECOND) == 100.0
    assert loads.seconds(80 * SECOND) == 0
    loads.note(81 * SECOND, 2.0)
    assert loads.seconds(81 * SECOND) == 2.0


def test_many_loads_are_kept_as_few_numbers() -> None:
    loads = RecentLoads(3)
    chance = random.Random(1)
    ended = sorted(chance.randrange(100 * SECOND) for _ in range(5000))
    for count, now_ns in enumerate(ended, 1):
        loads.note(now_ns, 0.25)
        first = (now_ns // SECOND - 2) * SECOND
        within = sum(first <= each for each in ended[:count])
        assert loads.seconds(now_ns) == 0.25 * within
        assert len(loads._ended) <= 4


def test_a_window_is_a_second_at_least() -> None:
    with pytest.raises(ValueError, match="a window"):
        RecentLoads(0)
