"""Loads onto devices that are declared with a bandwidth: held up by so much, and no longer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import pytest

from modelyard_server.execution.transfer_pace import TransferPace
from modelyard_server.runtimes.api import LoadCancelled

MIB = 1 << 20


class Time:
    """Passes when somebody waits, and never by itself.

    Attributes:
        now_s: the time.
        waits: how long somebody was ready to wait, each time.
        on_wait: called before a wait.
        share: what part of a wait really passes.
    """

    def __init__(self) -> None:
        self.now_s = 50.0
        self.waits: list[float] = []
        self.on_wait: Callable[[threading.Event], None] = lambda stop: None
        self.share = 1.0

    def clock(self) -> float:
        return self.now_s

    def wait(self, stop: threading.Event, timeout_s: float) -> bool:
        self.waits.append(timeout_s)
        self.on_wait(stop)
        if stop.is_set():
            return True
        self.now_s += timeout_s * self.share
        return False


def took_s(
    time: Time, bytes_per_s: Sequence[int], sizes: Mapping[int, int], *, busy_s: float = 0
) -> float:
    """How long a load of `sizes` takes that is busy for `busy_s` by itself."""
    pace = TransferPace(bytes_per_s, clock=time.clock, wait=time.wait)
    began_s = pace.now_s()
    time.now_s += busy_s
    pace.hold(sizes, began_s, threading.Event())
    return time.now_s - began_s


def test_a_load_takes_as_long_as_its_bytes_at_the_devices_bandwidth() -> None:
    assert took_s(Time(), [10 * MIB], {0: 25 * MIB}) == pytest.approx(2.5)


def test_what_the_load_has_taken_by_itself_counts() -> None:
    time = Time()
    assert took_s(time, [10 * MIB], {0: 25 * MIB}, busy_s=2.0) == pytest.approx(2.5)
    assert time.waits == [pytest.approx(0.5)]


def test_a_load_that_was_slow_enough_waits_no_more() -> None:
    time = Time()
    assert took_s(time, [10 * MIB], {0: 25 * MIB}, busy_s=3.0) == 3.0
    assert not time.waits


@pytest.mark.parametrize("sizes", [{}, {0: 0}, {1: 1 << 46}])
def test_devices_without_bandwidth_and_loads_without_bytes_are_never_waited_for(
    sizes: Mapping[int, int],
) -> None:
    time = Time()
    assert took_s(time, [10, 0], sizes) == 0
    assert not time.waits


@pytest.mark.parametrize(
    ("sizes", "seconds"),
    [({0: 100, 1: 100}, 10), ({0: 100, 1: 900}, 30), ({0: 100, 1: 100, 2: 10**9}, 10)],
)
def test_of_a_load_in_parts_the_slowest_link_decides(
    sizes: Mapping[int, int], seconds: float
) -> None:
    assert took_s(Time(), [10, 30, 0], sizes) == pytest.approx(seconds)


def test_a_wait_that_ends_early_is_taken_up_again() -> None:
    time = Time()
    time.share = 0.5
    assert took_s(time, [10], {0: 100}) == pytest.approx(10)
    assert len(time.waits) > 1


def test_the_slowest_link_there_can_be_asks_for_no_wait_that_a_thread_cannot_do() -> None:
    time = Time()

    def check(stop: threading.Event) -> None:
        assert time.waits[-1] <= threading.TIMEOUT_MAX
        if len(time.waits) > 3:
            stop.set()

    time.on_wait = check
    pace = TransferPace([1], clock=time.clock, wait=time.wait)
    with pytest.raises(LoadCancelled):
        pace.hold({0: 1 << 46}, pace.now_s(), threading.Event())


def test_a_stop_ends_the_wait_at_once() -> None:
    time = Time()
    time.on_wait = threading.Event.set
    pace = TransferPace([10], clock=time.clock, wait=time.wait)
    with pytest.raises(LoadCancelled):
        pace.hold({0: 100}, pace.now_s(), threading.Event())
    assert time.now_s == 50
    assert len(time.waits) == 1


def test_a_real_wait_is_ended_by_a_stop() -> None:
    stop = threading.Event()
    threading.Thread(target=stop.set).start()
    pace = TransferPace([1])
    # An hour, were it not stopped.
    with pytest.raises(LoadCancelled):
        pace.hold({0: 3600}, pace.now_s(), stop)


def test_a_negative_bandwidth_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        TransferPace([0, -1])
