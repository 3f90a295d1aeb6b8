"""The engine of threads on devices that fail like real ones and count their own bytes."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Iterator

import pytest
import torch
from tests.support.fakegpu import FakeGpu, load
from tests.support.toy_engine import (
    INPUT,
    Answer,
    ToyRuntime,
    Weights,
    running_engine,
    spec_of,
    toy_devices,
)

from modelyard_server.execution.thread_engine import ThreadEngine
from modelyard_server.runtimes.api import StopCheck
from modelyard_server.runtimes.targets import Target

# Whoever comes first builds the library.
pytestmark = pytest.mark.timeout(900)

SPLIT = Target(home=0, parts=(("a", 0), ("b", 1)))
SIZES = {0: 6000, 1: 4000}


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    gpu = load()
    gpu.reset()
    yield gpu
    gpu.reset()


@pytest.fixture
def runtime() -> ToyRuntime:
    """Its toys hold tensors on the devices."""

    def fill(weights: Weights, stop: StopCheck) -> None:
        device = f"fakegpu:{weights.device}"
        weights.__dict__["data"] = torch.ones(weights.size_bytes, dtype=torch.uint8, device=device)

    runtime = ToyRuntime()
    runtime.on_load = fill
    return runtime


@pytest.fixture
async def engine(gpu: FakeGpu, runtime: ToyRuntime) -> AsyncIterator[ThreadEngine]:
    async with running_engine(runtime, toy_devices("fakegpu:0", "fakegpu:1")) as made:
        yield made


def used(gpu: FakeGpu) -> list[int]:
    return [gpu.used_bytes(device) for device in range(2)]


async def test_what_the_engine_measures_is_what_the_devices_count(
    engine: ThreadEngine, gpu: FakeGpu
) -> None:
    assert (await engine.load(1, spec_of(size=SIZES), SPLIT)).own_bytes == SIZES
    assert used(gpu) == [6000, 4000]
    assert await Answer(engine, 1).get() == (INPUT,)
    assert (await engine.unload(1)).freed == SIZES
    assert used(gpu) == [0, 0]


async def test_a_device_that_is_full_leaves_nothing_of_the_load_on_the_others(
    engine: ThreadEngine, gpu: FakeGpu
) -> None:
    gpu.set_budget(1, 3999)
    gc.disable()
    try:
        with pytest.raises(MemoryError):
            await engine.load(1, spec_of(size=SIZES), SPLIT)
        assert used(gpu) == [0, 0]
    finally:
        gc.enable()
    assert gpu.peak_bytes(0) >= 6000, "the first part never came"
    assert [engine.memory(device).measured_bytes for device in range(2)] == [0, 0]
    gpu.set_budget(1, 4000)
    assert (await engine.load(1, spec_of(size=SIZES), SPLIT)).own_bytes == SIZES
    assert (await engine.unload(1)).freed == SIZES


async def test_bytes_that_are_said_to_be_back_are_back_and_those_kept_are_not(
    engine: ThreadEngine, runtime: ToyRuntime, gpu: FakeGpu
) -> None:
    await engine.load(1, spec_of(size=SIZES), SPLIT)
    kept = runtime.witnesses[0]()
    assert kept is not None
    assert (await engine.unload(1)).freed == {0: 0, 1: 4000}
    assert used(gpu) == [6000, 0]
    del kept
    assert await engine.recheck(1) == {0: 6000}
    assert used(gpu) == [0, 0]


async def test_the_cache_of_an_accelerator_is_emptied_after_an_unload(
    engine: ThreadEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[str] = []
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: emptied.append("accelerator"))
    await engine.load(1, spec_of(size=SIZES), SPLIT)
    assert not emptied
    await engine.unload(1)
    assert emptied == ["accelerator"]
