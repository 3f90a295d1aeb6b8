"""What keeps workers there, what limits them, and the page on which they say what they do."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support.worker_engine import files_open, maps_of_segments, until

from modelyard_server.execution.figures import MOST_FIGURE, LaneFigures
from modelyard_server.execution.workers.board import Board, BoardWriter
from modelyard_server.execution.workers.keeper import Keeper, NoWorker
from modelyard_server.execution.workers.settings import RuntimeSource, WorkerSettings
from modelyard_server.execution.workers.worker_process import WorkerGone
from modelyard_server.execution.workers.zygote_client import ZygoteLost

# --- Keeping --------------------------------------------------------------------------------------


class FakeWorker:
    """A worker that does what the test says."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.exited: asyncio.Future[None] = loop.create_future()
        self.is_gone = False

    def kill(self, cause: str) -> None:
        """It is over at once."""
        self.is_gone = True
        if not self.exited.done():
            self.exited.set_result(None)

    async def stop(self, timeout_s: float) -> bool:
        """It is over at once."""
        self.kill("")
        return True


class Starts:
    """Starts fake workers, or fails."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self.outcomes = list(outcomes)
        self.workers: list[FakeWorker] = []
        self.replaced: list[bool] = []

    async def __call__(self, replace: bool) -> Any:
        self.replaced.append(replace)
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if isinstance(outcome, ZygoteLost):
            raise outcome
        worker = FakeWorker()
        self.workers.append(worker)
        if outcome is None:
            worker.ready.set_result(None)
        else:
            worker.ready.set_exception(outcome)
        return worker


def keeper_of(starts: Starts, tries: int = 3) -> Keeper:
    return Keeper(name="fake", start=starts, settings=WorkerSettings(start_tries=tries))


async def test_a_worker_that_goes_is_replaced_when_it_is_over_and_not_before() -> None:
    starts = Starts()
    keeper = keeper_of(starts)
    keeper.begin()
    first: Any = await keeper.ready()
    assert first is starts.workers[0]
    first.is_gone = True
    waiting = asyncio.create_task(keeper.ready())
    for _ in range(10):
        await asyncio.sleep(0)
    assert keeper.worker is None
    assert len(starts.workers) == 1
    first.exited.set_result(None)
    second: Any = await waiting
    assert second is starts.workers[1]
    assert await keeper.stop(1) is True
    assert starts.workers[1].is_gone


async def test_starts_that_fail_are_tried_again_and_whoever_waits_gets_the_one_that_does_not() -> (
    None
):
    starts = Starts(ZygoteLost("no zygote"), WorkerGone("exited with code 1", is_suspect=False))
    keeper = keeper_of(starts)
    keeper.begin()
    worker: Any = await keeper.ready()
    assert worker is starts.workers[1]
    assert starts.workers[0].is_gone
    await keeper.stop(1)


async def test_after_several_failures_nobody_waits_any_more() -> None:
    starts = Starts(*[ZygoteLost("no zygote") for _ in range(4)])
    keeper = keeper_of(starts)
    keeper.begin()
    with pytest.raises(NoWorker, match="worker fake does not start: no zygote"):
        await keeper.ready()
    with pytest.raises(NoWorker):
        await keeper.ready()
    # It goes on trying, with another zygote now, and has one in the end.
    await until(lambda: keeper.worker is not None)
    assert starts.replaced == [False, False, False, True, True]
    await keeper.stop(1)


async def test_a_worker_that_dies_when_it_starts_is_not_the_zygotes_fault() -> None:
    starts = Starts(*[WorkerGone("killed", is_suspect=False) for _ in range(4)])
    keeper = keeper_of(starts)
    keeper.begin()
    await until(lambda: keeper.worker is not None)
    assert not any(starts.replaced)
    await keeper.stop(1)


async def test_whoever_waits_is_told_of_the_stop() -> None:
    starts = Starts(*[ZygoteLost("no zygote") for _ in range(100)])
    keeper = keeper_of(starts, tries=100)
    keeper.begin()
    waiting = asyncio.create_task(keeper.ready())
    await until(lambda: bool(starts.replaced))
    await keeper.stop(1)
    with pytest.raises(NoWorker, match="the server stops"):
        await waiting


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"run_limit_s": 0},
        {"load_limit_s": -1},
        {"price_limit_s": float("inf")},
        {"start_limit_s": float("nan")},
        {"ping_interval_s": 0},
        {"ping_interval_s": 10, "ping_limit_s": 5},
        {"headroom_bytes": -1},
        {"start_tries": 0},
    ],
)
def test_limits_that_are_none_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        WorkerSettings(**settings)


def test_limits_are_looked_at_often_enough_and_not_all_the_time() -> None:
    assert WorkerSettings().tick_s == 0.5
    assert WorkerSettings(run_limit_s=0.001).tick_s == 0.01
    assert WorkerSettings(ping_interval_s=100, ping_limit_s=100).tick_s == 1.0


def test_the_runtimes_are_those_of_the_registry() -> None:
    assert "identity" in RuntimeSource().make()


# --- The board ------------------------------------------------------------------------------------


def test_the_board_shows_what_each_thread_runs() -> None:
    files, maps = len(files_open()), maps_of_segments()
    board = Board()
    assert board.running() == frozenset()
    _write(board, BoardWriter(os.dup(board.file.fileno())))
    assert board.running() == frozenset()
    board.close()
    board.close()
    assert len(files_open()) == files
    assert maps_of_segments() == maps


def test_the_board_shows_every_call_of_a_batch_and_gives_the_room_back() -> None:
    board = Board()
    writer = BoardWriter(os.dup(board.file.fileno()))
    before = writer.begin(1)
    # More often than there is room for without giving it back.
    for _ in range(10):
        batch = writer.begin_batch(range(100, 1100))
        assert board.running() == frozenset(range(100, 1100))
        writer.end_batch(batch)
        assert board.running() == {1}
    writer.end_batch(writer.begin_batch([5]))
    writer.end(before)
    assert board.running() == frozenset()
    board.close()


def test_a_batch_that_the_board_has_no_room_for_is_shown_in_part() -> None:
    board = Board()
    writer = BoardWriter(os.dup(board.file.fileno()))
    batch = writer.begin_batch(range(1, 5001))
    shown = board.running()
    assert 1000 < len(shown) < 5000
    assert shown == frozenset(range(1, len(shown) + 1))
    writer.end_batch(batch)
    assert board.running() == frozenset()
    board.close()


class FakeStream:
    """A stream that is as far as the test says."""

    def __init__(self) -> None:
        self.place = 10
        self.marks = 0
        self.is_full = False
        self.is_sending = False

    def at_least(self) -> int:
        """It."""
        return self.place

    def at_most(self) -> int:
        """It, or anything."""
        return 10**9 if self.is_sending else self.place

    def mark(self) -> int | None:
        """Moves it by 20."""
        if self.is_full:
            return None
        self.marks += 1
        self.place += 20
        return self.place


@pytest.fixture
def written() -> Iterator[tuple[Board, BoardWriter, FakeStream]]:
    board, stream = Board(), FakeStream()
    writer = BoardWriter(os.dup(board.file.fileno()))
    writer.follow(stream)
    yield board, writer, stream
    board.close()


Written = tuple[Board, BoardWriter, FakeStream]


def test_the_board_tells_who_had_begun_when_something_was_written(written: Written) -> None:
    board, writer, stream = written
    assert board.begun_by(10) == frozenset()
    writer.end(writer.begin(1, owner=7))
    # Nothing has been sent since that ended: a mark tells the two apart.
    writer.end(writer.begin(2, owner=8))
    assert stream.marks == 1
    stream.place = 100
    # The answer has left: that tells them apart as well.
    writer.begin(3, owner=9)
    assert stream.marks == 1
    assert board.begun_by(9) == frozenset()
    assert [board.begun_by(place) for place in (10, 29)] == [{1}, {1}]
    assert [board.begun_by(place) for place in (30, 99)] == [{2}, {2}]
    assert board.begun_by(100) == {3}


def test_what_was_being_sent_when_a_call_ended_does_not_tell_it_from_the_next(
    written: Written,
) -> None:
    board, writer, stream = written
    before = writer.begin(1, owner=7)
    stream.is_sending = True
    writer.end(before)
    stream.is_sending = False
    stream.place = 50
    writer.begin(2, owner=8)
    assert stream.marks == 1
    assert [board.begun_by(place) for place in (69, 70)] == [{1}, {2}]


def test_who_cannot_be_told_apart_is_named_together(written: Written) -> None:
    board, writer, stream = written
    stream.is_full = True
    writer.end(writer.begin(1, owner=7))
    writer.end(writer.begin(2, owner=8))
    assert board.begun_by(10) == {1, 2}
    stream.is_full = False
    writer.end(writer.begin(3, owner=9))
    # Calls of one model: no marks for those.
    writer.end(writer.begin(4, owner=9))
    stream.place = 50
    batch = writer.begin_batch([5, 6], owner=9)
    assert stream.marks == 1
    assert [board.begun_by(place) for place in (29, 30, 49)] == [{1, 2}, {3, 4}, {3, 4}]
    assert board.begun_by(50) == {3, 4, 5, 6}
    writer.end_batch(batch)
    writer.begin(7, owner=10)
    assert board.begun_by(50) == {3, 4, 5, 6}
    assert board.begun_by(70) == {7}


def test_each_thread_has_somebody_who_may_have_written_it(written: Written) -> None:
    board, writer, stream = written
    writer.begin(1, owner=7)

    def elsewhere() -> None:
        writer.begin(2, owner=8)
        stream.place = 50
        writer.begin(3, owner=9)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert board.begun_by(10) == {1, 2}
    assert board.begun_by(50) == {1, 3}


def test_of_what_a_thread_began_the_last_is_remembered(written: Written) -> None:
    board, writer, stream = written
    for call in range(1, 1001):
        writer.end(writer.begin(call, owner=call))
        stream.place += 100
    for call in range(800, 1001):
        assert board.begun_by(10 + 100 * (call - 1)) == {call}
    # Nobody is named for what was written long ago, rather than somebody who was not there.
    assert board.begun_by(10) == frozenset()
    batch = writer.begin_batch(range(2000, 3000), owner=2000)
    named = board.begun_by(stream.place)
    assert 250 < len(named) < 260
    assert named < frozenset(range(2000, 3000))
    writer.end_batch(batch)


def test_the_board_adds_up_what_its_lanes_have_run() -> None:
    board = Board()
    writer = BoardWriter(os.dup(board.file.fileno()))
    assert board.figures() == LaneFigures()
    writer.begin(3)
    for lane, figures in (
        (0, LaneFigures(batch_count=1, largest_row_count=9)),
        (15, LaneFigures(batch_count=5, largest_row_count=4)),
        (0, LaneFigures(batch_count=2, largest_row_count=9)),
        (16, LaneFigures(batch_count=1000)),  # No device has this place.
    ):
        writer.write_figures(lane, figures)
    assert board.figures() == LaneFigures(batch_count=7, largest_row_count=9)
    assert board.running() == {3}
    board.close()


def test_figures_that_no_message_can_carry_are_not_believed() -> None:
    board = Board()
    writer = BoardWriter(os.dup(board.file.fileno()))
    for lane in range(16):
        writer.write_figures(lane, LaneFigures(row_count=2**64 - 1))
    assert board.figures() == LaneFigures(row_count=MOST_FIGURE)
    board.close()


def _write(board: Board, writer: BoardWriter) -> None:
    outer = writer.begin(7)
    inner = writer.begin(2**63)
    assert board.running() == {2**63}

    def elsewhere() -> None:
        before = writer.begin(5)
        assert board.running() == {2**63, 5}
        writer.end(before)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    writer.end(inner)
    assert board.running() == {7}
    writer.end(outer)


# --- Limits ---------------------------------------------------------------------------------------

LIMITED = """
import os, socket, sys
from modelyard_server.execution.workers.limits import *

kept, lent = socket.socketpair()
close_all_but((0, 1, 2, kept.fileno()))
limit_process()
isolated = refuse_network()
kept_works = True
try:
    kept.send(b"x")
except BrokenPipeError:
    pass
refused = []
calls = {
    "socket": lambda: socket.socket(),
    "udp": lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM),
    "lookup": lambda: socket.getaddrinfo("localhost", 80),
    "lookup2": lambda: socket.gethostbyname("localhost"),
    "unix": lambda: socket.socket(socket.AF_UNIX).connect("/tmp/none"),
    "bind": lambda: socket.socket(socket.AF_UNIX).bind("/tmp/none-either"),
    "sendto": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"x", "/tmp/none"),
}
for name, call in calls.items():
    try:
        call()
    except PermissionError as error:
        if "a worker has no network" in str(error):
            refused.append(name)
assert refused == list(calls), refused
socket.socketpair()
if isolated:
    assert open("/proc/net/dev").read().count(":") <= 1, "there are other interfaces than lo"
limit_data(0, data_bytes() + 2**26)
try:
    bytearray(2**27)
except MemoryError:
    print("refused")
limit_data(0, data_bytes() + 2**28)
bytearray(2**27)
print("fine")
"""


def test_a_limited_process_has_no_network_and_no_more_memory_than_it_may() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["refused", "fine"], done.stderr


def test_this_process_is_not_limited() -> None:
    """Nothing of the above may ever happen to the process that the tests, or a server, run in."""
    with socket.create_server(("127.0.0.1", 0)):
        pass
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
