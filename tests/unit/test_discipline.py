"""What a process does once, and what is known of it afterwards."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import torch

from modelyard_server.execution import discipline
from modelyard_server.execution.discipline import (
    SWITCH_INTERVAL_S,
    ProcessMemory,
    read_process_memory,
    settle_process,
    warm_thread,
    warm_threads,
)
from modelyard_server.execution.lane import Lane
from modelyard_server.observability.process import resident_bytes

MIB = 2**20


@pytest.fixture
def settled() -> Iterator[Callable[[], ProcessMemory]]:
    """settle_process, with everything put back afterwards."""
    interval = sys.getswitchinterval()
    yield settle_process
    sys.setswitchinterval(interval)
    gc.unfreeze()


@pytest.fixture
async def lanes() -> AsyncIterator[list[Lane]]:
    loop = asyncio.get_running_loop()
    made = [Lane(f"lane-{index}", loop) for index in range(2)]
    threads = torch.get_num_threads()
    yield made
    for lane in made:
        assert await lane.stop(30)
    torch.set_num_threads(threads)


class TestSettling:
    def test_what_is_alive_is_frozen(self, settled: Callable[[], ProcessMemory]) -> None:
        gc.unfreeze()
        settled()
        assert gc.get_freeze_count() > 10_000

    def test_cycles_of_the_start_are_gone_and_not_frozen(
        self, settled: Callable[[], ProcessMemory]
    ) -> None:
        class Knot:
            def __init__(self) -> None:
                self.itself = self
                self.freed = freed

            def __del__(self) -> None:
                self.freed.append(True)

        freed: list[bool] = []
        gc.disable()
        try:
            Knot()
            assert freed == []
            settled()
        finally:
            gc.enable()
        assert freed == [True]

    def test_the_lock_is_given_up_sooner(self, settled: Callable[[], ProcessMemory]) -> None:
        settled()
        assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)

    def test_freed_memory_goes_back_and_the_baseline_is_read_afterwards(
        self, settled: Callable[[], ProcessMemory], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order: list[str] = []
        monkeypatch.setattr(gc, "freeze", lambda: order.append("freeze"))
        monkeypatch.setattr(discipline, "give_back_freed", lambda _: order.append("give back"))

        def read() -> ProcessMemory:
            order.append("read")
            return ProcessMemory(resident_bytes=7)

        monkeypatch.setattr(discipline, "read_process_memory", read)
        assert settled() == ProcessMemory(resident_bytes=7)
        assert order == ["freeze", "give back", "read"]

    def test_it_can_be_done_twice(self, settled: Callable[[], ProcessMemory]) -> None:
        settled()
        assert settled().resident_bytes > 0


class TestWarming:
    async def test_every_lane_gets_its_own_number_of_threads(
        self, lanes: list[Lane], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        warmed: dict[str, int] = {}

        def note(threads: int) -> None:
            warmed[threading.current_thread().name] = threads

        monkeypatch.setattr(discipline, "warm_thread", note)
        await warm_threads([(lanes[0], 1), (lanes[1], 3)])
        assert warmed == {"lane-0": 1, "lane-1": 3}

    async def test_lanes_are_warmed_at_the_same_time(
        self, lanes: list[Lane], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # One after the other would wait here for ever.
        together = threading.Barrier(2, timeout=30)
        monkeypatch.setattr(discipline, "warm_thread", lambda threads: together.wait())
        await warm_threads([(lane, 1) for lane in lanes])

    async def test_a_warm_lane_runs_as_told(self, lanes: list[Lane]) -> None:
        await warm_threads([(lanes[0], 1), (lanes[1], 1)])
        for lane in lanes:
            assert await lane.call(torch.get_num_threads) == 1
        await warm_threads([(lanes[0], 2)])
        assert await lanes[0].call(torch.get_num_threads) == 2

    async def test_a_number_of_threads_that_cannot_be_touches_no_lane(
        self, lanes: list[Lane], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(discipline, "warm_thread", lambda threads: pytest.fail("touched"))
        with pytest.raises(ValueError, match="at least 1 intra-op thread, got 0"):
            await warm_threads([(lanes[0], 1), (lanes[1], 0)])
        with pytest.raises(ValueError, match="got -1"):
            warm_thread(-1)

    def test_a_process_without_torch_stays_without(self) -> None:
        program = (
            "import sys\n"
            "from modelyard_server.execution.discipline import settle_process, warm_thread\n"
            "warm_thread(1)\n"
            "print(settle_process().resident_bytes)\n"
            "sys.exit('torch' in sys.modules)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, timeout=120
        )
        assert 0 < int(done.stdout) < 200 * MIB


class TestProcessMemory:
    def test_this_process_is_read(self) -> None:
        memory = read_process_memory()
        assert memory.anonymous_bytes < memory.resident_bytes
        assert 0 < memory.private_bytes <= memory.resident_bytes
        assert 0 < memory.proportional_bytes <= memory.resident_bytes
        assert abs(memory.resident_bytes - resident_bytes()) < 64 * MIB
        assert memory.mappings > 50
        assert read_process_memory(os.getpid()).resident_bytes > 0

    def test_what_is_taken_is_seen(self, tmp_path: Path) -> None:
        before = read_process_memory()
        taken = bytearray(os.urandom(1)) * (64 * MIB)
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait)
        thread.start()
        with (tmp_path / "file").open("w"):
            after = read_process_memory()
        stop.set()
        thread.join()
        assert after.anonymous_bytes - before.anonymous_bytes > 60 * MIB
        assert after.threads == before.threads + 1
        assert after.open_files == before.open_files + 1
        del taken

    def test_all_figures_come_from_their_files(self, tmp_path: Path) -> None:
        folder = tmp_path / "17"
        for name in ("fd/0", "fd/1", "fd/2", "task/17", "task/18"):
            (folder / name).mkdir(parents=True)
        (folder / "maps").write_text("a\nb\nc\nd\n")
        (folder / "status").write_text("Name:\tx\nVmRSS:\t 900 kB\nRssAnon:\t 800 kB\n")
        (folder / "smaps_rollup").write_text(
            "0-f ---p 0 0 0 [rollup]\nRss: 100 kB\nPss: 60 kB\nPss_Anon: 1 kB\n"
            "Private_Clean: 20 kB\nPrivate_Dirty: 30 kB\nAnonymous: 40 kB\n"
        )
        assert read_process_memory(17, proc=tmp_path) == ProcessMemory(
            resident_bytes=102_400,
            proportional_bytes=61_440,
            anonymous_bytes=40_960,
            private_bytes=51_200,
            threads=2,
            open_files=3,
            mappings=4,
        )

    def test_of_a_process_that_is_kept_from_us_the_plain_figures_are_known(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "17/task/17").mkdir(parents=True)
        (tmp_path / "17/status").write_text("VmRSS:\t 900 kB\nRssAnon:\t 800 kB\n")
        assert read_process_memory(17, proc=tmp_path) == ProcessMemory(
            resident_bytes=921_600, anonymous_bytes=819_200, threads=1
        )

    def test_a_process_that_is_not_there_is_no_process_of_zero_bytes(self, tmp_path: Path) -> None:
        with pytest.raises(ProcessLookupError, match="no process 17"):
            read_process_memory(17, proc=tmp_path)

    def test_without_proc_nothing_is_known(self, tmp_path: Path) -> None:
        assert read_process_memory(proc=tmp_path / "none") == ProcessMemory()
