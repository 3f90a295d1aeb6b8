"""The configured devices, as the probes of a machine see them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

import pytest

from modelyard.devices import Device, DeviceType
from modelyard_server.config import Budget, DeviceConfig, HostTierConfig
from modelyard_server.devices.host_tier import HostTier, take_host_tier
from modelyard_server.devices.inventory import (
    BudgetImpossible,
    DeviceMissing,
    ManagedDevice,
    take_inventory,
)
from modelyard_server.devices.probes import (
    Probe,
    Probed,
    host_memory_bytes,
    probe_all,
    probes,
)
from modelyard_server.runtimes.targets import DISK


def config(text: str, budget: str = "50%", **given: object) -> DeviceConfig:
    return DeviceConfig(
        device=Device.from_str(text),
        budget=Budget.from_str(budget),
        **given,  # type: ignore[arg-type]
    )


def probed(text: str, total_bytes: int, torch_device: str | None = None) -> Probed:
    return Probed(
        device=Device.from_str(text), torch_device=torch_device or text, total_bytes=total_bytes
    )


def refuse() -> tuple[Probed, ...]:
    raise AssertionError("nobody named a device of this kind")


def machine(*found: Probed) -> Mapping[DeviceType, Probe]:
    """A machine that has these devices; kinds of which it has none must not be asked for."""
    by_kind: dict[DeviceType, tuple[Probed, ...]] = {}
    for each in found:
        by_kind[each.device.type] = (*by_kind.get(each.device.type, ()), each)

    def probe_for(kind: DeviceType) -> Probe:
        return (lambda: by_kind[kind]) if kind in by_kind else refuse

    return {kind: probe_for(kind) for kind in DeviceType}


TWO_GPUS = machine(
    probed("cpu", 1000), probed("cuda:0", 200), probed("cuda:1", 400, "fakegpu:1")
)  # fmt: skip


def test_devices_are_what_their_probes_saw() -> None:
    (device,) = take_inventory([config("cuda:1", threads=3)], using=TWO_GPUS)
    assert device == ManagedDevice(
        name="devices/cuda-1",
        device=Device.gpu(1),
        logical=False,
        torch_device="fakegpu:1",
        threads=3,
        total_bytes=400,
        budget_bytes=200,
    )
    assert device.executes


def test_kinds_that_nobody_named_are_not_probed() -> None:
    (device,) = take_inventory([config("cpu")], using=machine(probed("cpu", 1000)))
    assert device.total_bytes == 1000
    with pytest.raises(AssertionError, match="nobody"):
        take_inventory([config("cuda:0")], using=machine(probed("cpu", 1000)))


def test_a_kind_is_probed_once() -> None:
    asked: list[None] = []

    def probe() -> tuple[Probed, ...]:
        asked.append(None)
        return probed("cuda:0", 10), probed("cuda:1", 10)

    take_inventory([config("cuda:0"), config("cuda:1")], using={DeviceType.GPU: probe})
    assert len(asked) == 1


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(DeviceMissing, match=r"no cuda:2; leave it out, or declare it") as caught:
        take_inventory([config("cuda:2")], using=TWO_GPUS)
    assert caught.value.device == Device.gpu(2)


def test_logical_devices_are_pools_of_host_memory() -> None:
    devices = take_inventory(
        [
            config("cpu", "40%"),
            config("cpu:1", "100B", logical=True),
            config("cuda:7", "30%", logical=True, transfer_bandwidth="1kB/s"),
        ],
        using=machine(probed("cpu", 1000)),
    )
    assert [device.torch_device for device in devices] == ["cpu"] * 3
    assert [device.total_bytes for device in devices] == [1000] * 3
    assert [device.budget_bytes for device in devices] == [400, 100, 300]
    assert [device.engine_device().transfer_bytes_per_s for device in devices] == [0, 0, 1000]


def test_percentages_are_of_what_the_reserve_leaves() -> None:
    (device,) = take_inventory([config("cuda:0", "50%", reserve=20)], using=TWO_GPUS)
    assert (device.budget_bytes, device.reserve_bytes) == (90, 20)


@pytest.mark.parametrize(
    ("configs", "text"),
    [
        ([config("cuda:0", "201B")], "devices/cuda-0: budget 201 bytes is more than it has"),
        ([config("cuda:0", "150B", reserve=51)], "less 51 bytes in reserve"),
        ([config("cuda:0", "50%", reserve=201)], "reserve of 201 bytes is more"),
        ([config("cpu", "60%"), config("cpu:1", "50%", logical=True)], "1100 bytes together"),
    ],
)
def test_budgets_that_cannot_be_stop_the_start(configs: list[DeviceConfig], text: str) -> None:
    with pytest.raises(BudgetImpossible) as caught:
        take_inventory(configs, using=TWO_GPUS)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


class TestHostTier:
    @staticmethod
    def taken(budget: str, *configs: DeviceConfig) -> HostTier | None:
        devices = take_inventory(configs, using=TWO_GPUS)
        tier = HostTierConfig(budget=Budget.from_str(budget))
        return take_host_tier(tier, devices, using=TWO_GPUS)

    def test_percentages_are_of_host_memory_and_it_is_above_what_is_dearer(self) -> None:
        tier = self.taken(
            "25%",
            config("cpu", "10%"),
            config("cuda:0"),
            config("cpu:1", "10%", logical=True),
            config("mps", "10%", logical=True),
        )
        assert tier == HostTier(budget_bytes=250, total_bytes=1000, above=(False, True, True, True))

    def test_without_a_budget_there_is_none_and_nothing_is_probed(self) -> None:
        devices = take_inventory([config("cuda:0")], using=TWO_GPUS)
        assert take_host_tier(HostTierConfig(), devices, using={}) is None

    @pytest.mark.parametrize(
        ("budget", "configs", "text"),
        [
            ("1001B", [config("cuda:0")], "hostTier: budget 1001 bytes is more than the host has"),
            ("50%", [config("cuda:0", logical=True), config("cpu", "1B")], "1001 bytes together"),
        ],
    )
    def test_budgets_that_cannot_be_stop_the_start(
        self, budget: str, configs: list[DeviceConfig], text: str
    ) -> None:
        with pytest.raises(BudgetImpossible) as caught:
            self.taken(budget, *configs)
        assert text in str(caught.value)


class TestThisMachine:
    def test_host_memory_is_found(self) -> None:
        (found,) = probes()[DeviceType.CPU]()
        assert found == Probed(
            device=Device.cpu(), torch_device="cpu", total_bytes=host_memory_bytes()
        )
        assert found.total_bytes > 2**20

    def test_the_disk_is_the_file_systems_of_the_roots(self, tmp_path: Path) -> None:
        below = tmp_path / "below"
        below.mkdir()
        (one,) = take_inventory([config("disk", "1%")], roots=[tmp_path])
        assert (one.name, one.torch_device) == ("devices/disk", DISK)
        assert not one.executes
        assert one.budget_bytes == int(one.total_bytes * Decimal("0.01"))
        (two,) = take_inventory([config("disk", "1%")], roots=[tmp_path, below])
        assert two.total_bytes == one.total_bytes, "one file system counts once"

    def test_without_roots_there_is_no_disk(self) -> None:
        with pytest.raises(DeviceMissing, match="where the roots are"):
            take_inventory([config("disk", "1%")])

    def test_all_of_it_can_be_listed(self, tmp_path: Path) -> None:
        found = probe_all([tmp_path])
        assert [each.device for each in found][-2:] == [Device.cpu(), Device.disk()]
        assert all(each.total_bytes > 0 for each in found)
        assert all(each.device == each.device.canonical() for each in found)

    @pytest.mark.parametrize("kind", [DeviceType.GPU, DeviceType.XPU, DeviceType.MPS])
    def test_accelerators_agree_with_torch(self, kind: DeviceType) -> None:
        import torch

        expected = {
            DeviceType.GPU: torch.cuda.device_count() if torch.cuda.is_available() else 0,
            DeviceType.XPU: torch.xpu.device_count() if torch.xpu.is_available() else 0,
            DeviceType.MPS: int(torch.backends.mps.is_available()),
        }
        assert len(probes()[kind]()) == expected[kind]

    def test_torch_is_not_imported_for_host_memory_and_disk(self, tmp_path: Path) -> None:
        program = """
import pathlib, sys
from modelyard.devices import Device
from modelyard_server.config import Budget, DeviceConfig
from modelyard_server.devices.inventory import take_inventory
devices = [("cpu", False), ("cuda:0", True), ("disk", False)]
take_inventory(
    [
        DeviceConfig(device=Device.from_str(name), budget=Budget.from_str("1%"), logical=logical)
        for name, logical in devices
    ],
    roots=[pathlib.Path(sys.argv[1])],
)
sys.exit("torch" in sys.modules)
"""
        subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=120)
