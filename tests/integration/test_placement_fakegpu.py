"""A whole server on devices that count every byte, run out of memory and cannot be mixed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.fakegpu import FakeGpu
from tests.support.fakegpu import load as load_fakegpu
from tests.support.part_cases import case_of
from tests.support.part_devices import FIRST, SECOND, FakeDevices
from tests.support.part_servers import (
    ServersOnAccelerators,
    ask,
    asking,
    assert_equal,
    charged,
    create,
    placed,
    serving,
)
from tests.support.server import refusal_of

from modelyard import Admin, LoadFailed, ModelFailed, ResidencyState

# Whoever comes first builds the library.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    gpu = load_fakegpu()
    gpu.reset()
    yield gpu
    gpu.reset()


@pytest.fixture
def accelerators(gpu: FakeGpu) -> FakeDevices:
    return FakeDevices(gpu)


class TestServersOnFakeGpus(ServersOnAccelerators):
    """What holds on all accelerators, and what can be seen only where every byte is counted."""

    async def test_devices_as_large_as_what_is_charged_are_enough_and_a_byte_less_is_not(
        self, tmp_path: Path, gpu: FakeGpu, accelerators: FakeDevices
    ) -> None:
        case = case_of(tmp_path / "store", "feature-extraction")
        async with serving(accelerators, tmp_path) as yard:
            await create(yard, "m", case, {"": "cuda:1", "encoder.layer.0": "cuda:0"})
            (way,) = (await yard.admin(Admin.get_model, "m")).alternatives
            sizes = {part.device: part.size_bytes for part in way.parts}
            assert sum(sizes.values()) == case.structure.size_bytes
            ordinals = {0: sizes["devices/cuda-0"], 1: sizes["devices/cuda-1"]}
            for ordinal, size_bytes in ordinals.items():
                gpu.set_budget(ordinal, size_bytes)
            for ordinal, size_bytes in ordinals.items():
                gpu.set_budget(ordinal, size_bytes - 1)
                assert isinstance(await refusal_of(ask(yard, "m", case)), LoadFailed)
                assert await charged(yard, accelerators) == {FIRST: 0, SECOND: 0}
                gpu.set_budget(ordinal, size_bytes)
            await yard.admin(Admin.pin, "m")
            await yard.becomes("m", ResidencyState.RESIDENT)
            assert await charged(yard, accelerators) == {FIRST: ordinals[0], SECOND: ordinals[1]}

    async def test_a_run_that_finds_no_memory_fails_alone_and_the_next_one_is_answered(
        self, tmp_path: Path, gpu: FakeGpu, accelerators: FakeDevices
    ) -> None:
        case = case_of(tmp_path / "store", "feature-extraction")
        parts = {"": "cuda:0", "encoder.layer.0": "cuda:1", "encoder.layer.1": "disk"}
        async with serving(accelerators, tmp_path) as yard:
            await create(yard, "m", case, parts)
            await create(yard, "other", case, "cuda:1")
            expected = await ask(yard, "m", case)
            await ask(yard, "other", case)
            await yard.at_rest()
            held = accelerators.used_bytes(FIRST)
            async with asking(yard, "other", case):
                # Not even the inputs, and all but the part that is on the disk.
                for left_bytes in (0, placed(case, accelerators, parts)[1][FIRST] - 1):
                    with accelerators.starved(FIRST, left_bytes=left_bytes):
                        error = await refusal_of(ask(yard, "m", case))
                    assert isinstance(error, ModelFailed)
                    assert error.exception_type == "OutOfMemoryError"
                    assert accelerators.used_bytes(FIRST) == held
                answer = await ask(yard, "m", case)
            assert not answer.served.cold
            assert_equal(answer, expected)
            await yard.admin(Admin.unload, "m")
            accelerators.assert_holds({SECOND: case.structure.size_bytes})
