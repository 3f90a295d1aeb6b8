"""Models in parts over devices that count every byte and refuse tensors of other devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.support.fakegpu import FakeGpu
from tests.support.fakegpu import load as load_fakegpu
from tests.support.part_cases import assert_released, assert_same, case_of
from tests.support.part_devices import FIRST, ON_DISK, SECOND, FakeDevices
from tests.support.part_models import charges, cut, place_of
from tests.support.part_runs import PartsOnAccelerators

from modelyard_server.runtimes.targets import Target, staging_bytes

# Whoever comes first builds the library.
pytestmark = pytest.mark.timeout(900)

ORDINALS = {FIRST: 0, SECOND: 1}


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    gpu = load_fakegpu()
    gpu.reset()
    yield gpu
    gpu.reset()


@pytest.fixture
def accelerators(gpu: FakeGpu) -> FakeDevices:
    return FakeDevices(gpu)


class TestPartsOnFakeGpus(PartsOnAccelerators):
    """What holds on all accelerators, and what can be seen only where every byte is counted."""

    def test_a_budget_of_what_is_charged_is_enough_to_load_and_a_byte_less_is_not(
        self, tmp_path: Path, gpu: FakeGpu, accelerators: FakeDevices
    ) -> None:
        case = case_of(tmp_path, "feature-extraction")
        target = cut(case.structure, home=FIRST, over=(FIRST, SECOND))
        place = place_of(target, accelerators.torch_devices)
        charged = charges(case.structure, place)
        for device, ordinal in ORDINALS.items():
            gpu.set_budget(ordinal, charged[device])
        case.load(place).close()
        for device, ordinal in ORDINALS.items():
            gpu.set_budget(ordinal, charged[device] - 1)
            with pytest.raises(torch.OutOfMemoryError):
                case.load(place)
            accelerators.assert_holds({})
            gpu.set_budget(ordinal, charged[device])

    def test_a_run_that_finds_no_room_for_a_unit_fails_and_the_next_one_runs(
        self, tmp_path: Path, gpu: FakeGpu, accelerators: FakeDevices
    ) -> None:
        case = case_of(tmp_path, "feature-extraction")
        expected = case.expected()
        target = cut(case.structure, home=FIRST, over=(FIRST, ON_DISK, ON_DISK))
        model = case.load(place_of(target, accelerators.torch_devices))
        held = gpu.used_bytes(0)
        largest = staging_bytes(case.structure, target, frozenset({ON_DISK}))
        gpu.set_budget(0, held + largest - 1)
        with pytest.raises(torch.OutOfMemoryError):
            case.answer(model)
        accelerators.assert_holds({FIRST: held})
        gpu.reset()
        assert_same(case.answer(model), expected)
        accelerators.assert_holds({FIRST: held})
        assert_released(model)

    def test_no_more_than_the_largest_unit_visits_at_one_time(
        self, tmp_path: Path, gpu: FakeGpu, accelerators: FakeDevices
    ) -> None:
        case = case_of(tmp_path, "feature-extraction")
        structure = case.structure

        def peak_of(target: Target) -> int:
            model = case.load(place_of(target, accelerators.torch_devices))
            gpu.reset_peak(0)
            case.answer(model)
            peak = gpu.peak_bytes(0) - gpu.used_bytes(0)
            model.close()
            return peak

        activations = peak_of(Target(home=FIRST, parts=(("", FIRST),)))
        target = cut(structure, home=FIRST, over=(ON_DISK,))
        largest = staging_bytes(structure, target, frozenset({ON_DISK}))
        whole = structure.size_bytes
        assert largest <= peak_of(target) <= activations + largest < activations + whole // 4

    def test_memory_that_somebody_keeps_is_seen(
        self, gpu: FakeGpu, accelerators: FakeDevices
    ) -> None:
        """Negative control of the checks."""
        kept = torch.ones(4, device="fakegpu:1")
        accelerators.assert_holds({SECOND: kept.nbytes})
        for wrong in ({}, {FIRST: kept.nbytes}, {SECOND: kept.nbytes + 1}):
            with pytest.raises(AssertionError, match="bytes are held"):
                accelerators.assert_holds(wrong)
