"""The engine of threads and models in parts: bytes device by device, and one lane for all."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.toy_engine import (
    INPUT,
    PATIENCE_S,
    Answer,
    Toy,
    ToyRuntime,
    Weights,
    running_engine,
    spec_of,
    toy_devices,
)

from modelyard_server.execution.engine import Loaded
from modelyard_server.execution.thread_engine import ThreadEngine
from modelyard_server.execution.transfer_pace import TransferPace
from modelyard_server.runtimes.api import LoadCancelled, StopCheck
from modelyard_server.runtimes.targets import DISK, Place, Target

SPLIT = Target(home=0, parts=(("a", 0), ("b", 1)))
ON_DISK = Target(home=1, parts=(("a", 1), ("b", 2)))
SIZES = {0: 60, 1: 40}


@pytest.fixture
def runtime() -> ToyRuntime:
    return ToyRuntime()


@pytest.fixture
async def engine(runtime: ToyRuntime) -> AsyncIterator[ThreadEngine]:
    async with running_engine(runtime, toy_devices("cpu", "cpu", DISK)) as made:
        yield made


def measured(engine: ThreadEngine) -> list[int]:
    return [engine.memory(device).measured_bytes for device in range(3)]


# --- Loading and running --------------------------------------------------------------------------


async def test_a_model_in_parts_is_measured_and_comes_back_on_each_of_its_devices(
    engine: ThreadEngine, runtime: ToyRuntime
) -> None:
    assert (await engine.load(1, spec_of(size=SIZES), SPLIT)).own_bytes == SIZES
    assert (await engine.load(2, spec_of(size={1: 7, 2: 500}), ON_DISK)).own_bytes == {1: 7, 2: 500}
    assert runtime.places == [
        Place(target=SPLIT, torch_devices={0: "cpu", 1: "cpu"}),
        Place(target=ON_DISK, torch_devices={1: "cpu", 2: DISK}),
    ]
    assert measured(engine) == [60, 47, 500]
    assert (await engine.unload(1)).freed == SIZES
    assert measured(engine) == [0, 7, 500]
    assert (await engine.unload(2)).freed == {1: 7, 2: 500}
    assert measured(engine) == [0, 0, 0]
    assert [engine.memory(device).peak_measured_bytes for device in range(3)] == [60, 47, 500]


async def test_a_model_in_parts_is_loaded_and_run_by_the_threads_of_its_home_alone(
    runtime: ToyRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, int] = {}
    torch = SimpleNamespace(
        get_num_threads=lambda: 0,
        set_num_threads=lambda n: threads.update({threading.current_thread().name: n}),
    )
    where: list[str] = []
    runtime.on_run = lambda toy: where.append(threading.current_thread().name)
    devices = [
        replace(device, threads=n)
        for device, n in zip(toy_devices("cpu", "cpu"), (2, 5), strict=True)
    ]
    async with running_engine(runtime, devices) as engine:
        monkeypatch.setitem(sys.modules, "torch", torch)  # Its threads have been warmed by then.
        await engine.load(1, spec_of(size=SIZES), replace(SPLIT, home=1))
        assert await Answer(engine, 1).get() == (INPUT,)
        await engine.unload(1)
    assert runtime.threads == ["load-toy1"]
    assert where == ["lane-toy1"]
    assert threads == {"load-toy1": 1, "lane-toy1": 5}


async def test_a_loader_that_is_stuck_holds_up_no_model_that_has_only_parts_there(
    engine: ThreadEngine, runtime: ToyRuntime
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def stick(weights: Weights, stop: StopCheck) -> None:
        began.set()
        go_on.wait(PATIENCE_S)

    runtime.on_load = stick
    stuck = asyncio.create_task(engine.load(1, spec_of(), Target.whole(1)))
    try:
        await asyncio.to_thread(began.wait, PATIENCE_S)
        runtime.on_load = lambda weights, stop: None
        async with asyncio.timeout(PATIENCE_S / 2):
            assert (await engine.load(2, spec_of(size=SIZES), SPLIT)).own_bytes == SIZES
            assert await Answer(engine, 2).get() == (INPUT,)
            assert (await engine.unload(2)).freed == SIZES
        assert not stuck.done()
    finally:
        go_on.set()
    assert (await stuck).own_bytes == {1: 100}


async def test_the_disk_has_no_threads_and_is_nobodys_home(
    engine: ThreadEngine, runtime: ToyRuntime
) -> None:
    names = {thread.name for thread in threading.enumerate()}
    assert {"lane-toy0", "load-toy0", "lane-toy1", "load-toy1"} <= names
    assert not {"lane-toy2", "load-toy2"} & names
    for home in (2, 3):
        with pytest.raises(ValueError, match=f"device {home}"):
            await engine.load(1, spec_of(), Target.whole(home))
    assert not runtime.places
    # Nothing of it was left behind.
    assert (await engine.load(1, spec_of(), Target.whole(0))).own_bytes == {0: 100}


async def test_bytes_on_devices_that_were_not_given_fail_the_load_and_are_dropped(
    engine: ThreadEngine, runtime: ToyRuntime
) -> None:
    gc.disable()
    try:
        with pytest.raises(RuntimeError, match=r"was not given: \[1\]"):
            await engine.load(1, spec_of(size=SIZES), Target.whole(0))
        assert [witness() for witness in runtime.witnesses] == [None, None]
    finally:
        gc.enable()
    assert measured(engine) == [0, 0, 0]


async def test_a_model_that_cannot_be_measured_is_dropped(
    engine: ThreadEngine, runtime: ToyRuntime
) -> None:
    class Unmeasurable(Toy):
        def measured_bytes(self) -> Mapping[int, int]:
            raise LookupError("no such tensor")

    runtime.kind = Unmeasurable
    with pytest.raises(LookupError):
        await engine.load(1, spec_of(size=SIZES), SPLIT)
    assert [witness() for witness in runtime.witnesses] == [None, None]
    assert measured(engine) == [0, 0, 0]


# --- Memory that does not come --------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("on toy1"),
        RuntimeError("MPS backend out of memory (allocated: 1)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("is_cycle", [False, True])
async def test_out_of_memory_in_the_middle_of_a_load_drops_the_parts_that_came(
    engine: ThreadEngine, runtime: ToyRuntime, error: Exception, is_cycle: bool
) -> None:
    def fail_on_second(weights: Weights, stop: StopCheck) -> None:
        if is_cycle:
            weights.__dict__["me"] = weights
        if weights.device == 1:
            raise error

    runtime.on_load = fail_on_second
    gc.disable()
    try:
        with pytest.raises(MemoryError):
            await engine.load(1, spec_of(size=SIZES), SPLIT)
        # Although `error` is still here, and the traceback with it.
        assert [witness() for witness in runtime.witnesses] == [None, None]
    finally:
        gc.enable()
    assert measured(engine) == [0, 0, 0]
    assert engine.memory(0).peak_measured_bytes == 0
    runtime.on_load = lambda weights, stop: None
    assert (await engine.load(1, spec_of(size=SIZES), SPLIT)).own_bytes == SIZES


# --- Memory that does not come back ---------------------------------------------------------------


async def test_a_leak_on_one_device_does_not_hold_the_others_bytes(
    engine: ThreadEngine, runtime: ToyRuntime
) -> None:
    await engine.load(1, spec_of(size=SIZES), SPLIT)
    kept = runtime.witnesses[1]()
    assert kept is not None
    assert (await engine.unload(1)).freed == {0: 60, 1: 0}
    assert measured(engine) == [0, 40, 0]
    assert await engine.recheck(1) == {}
    del kept
    assert await engine.recheck(1) == {1: 40}
    assert measured(engine) == [0, 0, 0]
    assert await engine.recheck(1) == {}


async def test_leaks_come_back_device_by_device(engine: ThreadEngine, runtime: ToyRuntime) -> None:
    target = Target(home=0, parts=(("a", 0), ("b", 1), ("c", 2)))
    kept: dict[int, list[Weights | None]] = {0: [], 1: [], 2: []}
    for factor in (1, 10):
        sizes = {0: factor, 1: 2 * factor, 2: 3 * factor}
        await engine.load(1, spec_of(size=sizes), target)
        for device, witness in enumerate(runtime.witnesses[-3:]):
            kept[device].append(witness())
        assert (await engine.unload(1)).freed == {0: 0, 1: 0, 2: 0}
    assert measured(engine) == [11, 22, 33]
    # What lies on the disk comes back like everything else, though it has no loader.
    kept[2].clear()
    assert await engine.recheck(1) == {2: 33}
    kept[0][0] = kept[1][1] = None
    assert await engine.recheck(1) == {0: 1, 1: 20}
    assert measured(engine) == [10, 2, 0]
    kept.clear()
    assert await engine.recheck(1) == {0: 10, 1: 2}
    assert measured(engine) == [0, 0, 0]


async def test_garbage_is_collected_only_if_a_part_is_still_held(
    engine: ThreadEngine, runtime: ToyRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    collections: list[str] = []
    collect = gc.collect

    def count() -> int:
        collections.append("all")
        return collect()

    monkeypatch.setattr(gc, "collect", count)

    def tie(weights: Weights, stop: StopCheck) -> None:
        if weights.device == 1:
            weights.__dict__["me"] = weights

    gc.disable()
    try:
        await engine.load(1, spec_of(size=SIZES), SPLIT)
        assert (await engine.unload(1)).freed == SIZES
        assert collections == []
        runtime.on_load = tie
        await engine.load(1, spec_of(size=SIZES), SPLIT)
        assert (await engine.unload(1)).freed == SIZES
        assert collections == ["all"]
    finally:
        gc.enable()


async def test_caches_of_the_accelerators_that_got_something_back_are_emptied(
    runtime: ToyRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[list[str]] = []
    monkeypatch.setattr(
        "modelyard_server.execution.thread_engine.give_back_freed",
        lambda names: given_back.append(sorted(names)),
    )
    async with running_engine(runtime, toy_devices("cuda:0", "cuda:1", DISK)) as engine:
        await engine.load(1, spec_of(size=SIZES), SPLIT)
        assert not given_back
        kept = runtime.witnesses[1]()
        await engine.unload(1)
        assert given_back == [["cuda:0"]]
        del kept
        assert await engine.recheck(1) == {1: 40}

        def fail(weights: Weights, stop: StopCheck) -> None:
            raise LoadCancelled

        runtime.on_load = fail
        with pytest.raises(LoadCancelled):
            await engine.load(1, spec_of(size=SIZES), SPLIT)
    # The end of the engine waits for what recheck has begun.
    assert sorted(given_back) == [["cuda:0"], ["cuda:0", "cuda:1"], ["cuda:1"]]


# --- The pace of loads ----------------------------------------------------------------------------


class Link:
    """Time that stands still at a wait until the test lets it pass."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.waits: list[float] = []
        self.is_waited_for = threading.Event()
        self.passes = threading.Event()

    def wait(self, stop: threading.Event, timeout_s: float) -> bool:
        self.waits.append(timeout_s)
        self.is_waited_for.set()
        while not self.passes.wait(0.001):
            if stop.is_set():
                return True
        self.now_s += timeout_s
        return False


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
async def paced(runtime: ToyRuntime, link: Link) -> AsyncIterator[ThreadEngine]:
    pace = TransferPace([20, 10, 0], clock=lambda: link.now_s, wait=link.wait)
    async with running_engine(runtime, toy_devices("cpu", "cpu", DISK), pace=pace) as made:
        yield made


async def begin(engine: ThreadEngine, link: Link) -> asyncio.Task[Loaded]:
    load = asyncio.create_task(engine.load(1, spec_of(size=SIZES), SPLIT))
    await asyncio.to_thread(link.is_waited_for.wait, PATIENCE_S)
    return load


async def test_a_load_ends_when_its_slowest_link_has_brought_its_bytes(
    paced: ThreadEngine, link: Link
) -> None:
    load = await begin(paced, link)
    for _ in range(3):
        await asyncio.sleep(0)
    assert not load.done()
    link.passes.set()
    assert (await load).own_bytes == SIZES
    assert link.waits == [4.0]
    # Where there is no limit nothing waits.
    assert (await paced.load(2, spec_of(size={1: 0, 2: 10**9}), ON_DISK)).own_bytes == {
        1: 0,
        2: 10**9,
    }
    assert link.waits == [4.0]


async def test_cancel_load_reaches_a_load_that_is_held_up_and_drops_it(
    paced: ThreadEngine, runtime: ToyRuntime, link: Link
) -> None:
    gc.disable()
    try:
        load = await begin(paced, link)
        assert all(witness() is not None for witness in runtime.witnesses)
        paced.cancel_load(1)
        with pytest.raises(LoadCancelled):
            await load
        assert [witness() for witness in runtime.witnesses] == [None, None]
    finally:
        gc.enable()
    assert measured(paced) == [0, 0, 0]
    link.passes.set()
    assert (await paced.load(1, spec_of(size=SIZES), SPLIT)).own_bytes == SIZES


@pytest.mark.parametrize("is_kept", [False, True])
async def test_a_load_given_up_that_keeps_memory_is_told(
    paced: ThreadEngine,
    runtime: ToyRuntime,
    link: Link,
    caplog: pytest.LogCaptureFixture,
    is_kept: bool,
) -> None:
    class Passive(Toy):
        def close(self) -> None:
            """Its memory goes when it does."""

    runtime.kind = Passive
    load = await begin(paced, link)
    kept = runtime.witnesses[1]() if is_kept else None
    gc.disable()
    try:
        paced.cancel_load(1)
        with pytest.raises(LoadCancelled):
            await load
    finally:
        gc.enable()
    assert [witness() for witness in runtime.witnesses] == [None, kept]
    assert ("kept memory" in caplog.text) is is_kept
    # As always when a load fails, nothing of it is accounted for.
    assert measured(paced) == [0, 0, 0]
    assert await paced.recheck(1) == {}


async def test_stop_ends_a_load_that_is_held_up(
    runtime: ToyRuntime, link: Link, paced: ThreadEngine
) -> None:
    load = await begin(paced, link)
    assert await asyncio.wait_for(paced.stop(PATIENCE_S), PATIENCE_S)
    with pytest.raises(LoadCancelled):
        await load
    assert [witness() for witness in runtime.witnesses] == [None, None]


async def test_devices_say_themselves_how_fast_they_are(runtime: ToyRuntime) -> None:
    devices = [replace(device, transfer_bytes_per_s=1) for device in toy_devices("cpu")]
    came = threading.Event()
    runtime.on_load = lambda weights, stop: came.set()
    async with running_engine(runtime, devices) as engine:
        # Would take an hour.
        load: asyncio.Task[Any] = asyncio.create_task(
            engine.load(1, spec_of(size=3600), Target.whole(0))
        )
        await asyncio.to_thread(came.wait, PATIENCE_S)
        engine.cancel_load(1)
        with pytest.raises(LoadCancelled):
            await load
