"""What keeps workers there, what limits them, and the page on which they say what they do."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest
from tests.support.worker_engine import files_open, maps_of_segments, until

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
