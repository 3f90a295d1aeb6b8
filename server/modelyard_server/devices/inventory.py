"""The devices that the server manages: those of the configuration, as this machine has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelyard.devices import Device, DeviceType
from modelyard_server.config import DeviceConfig
from modelyard_server.devices.budgets import BudgetImpossible, budget_violations
from modelyard_server.devices.probes import Probe, Probed, host_memory_bytes, probes
from modelyard_server.execution.engine import EngineDevice

__all__ = [
    "BudgetImpossible",
    "DeviceMissing",
    "ManagedDevice",
    "host_memory_bytes",
    "take_inventory",
]


class DeviceMissing(Exception):
    """The configuration names a device that this machine has not.

    Attributes:
        device: the device.
    """

    def __init__(self, device: Device) -> None:
        advice = (
            "it is where the roots are, and there are none"
            if device.type is DeviceType.DISK
            else "leave it out, or declare it with logical = true"
        )
        super().__init__(f"this machine has no {device}; {advice}")
        self.device = device


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagedDevice:
    """A device the server manages.

    Attributes:
        name: resource name, "devices/cuda-1".
        device: what the configuration calls it.
        logical: a pool of host memory that stands for the device.
        torch_device: where tensors really go, in torch's words; targets.DISK for the disk.
        threads: intra-op threads of its lane.
        total_bytes: what the probe saw; for the disk, of the file systems that the roots are on.
        budget_bytes: most that models may hold when the server starts.
        reserve_bytes: what budgets leave alone of total_bytes.
        transfer_bytes_per_s: a logical device's bandwidth for loads; 0 for no limit.
        worker: the worker process that its models are in, where the engine has such. A model in
            parts is in one.
    """

    name: str
    device: Device
    logical: bool
    torch_device: str
    threads: int
    total_bytes: int
    budget_bytes: int
    reserve_bytes: int = 0
    transfer_bytes_per_s: int = 0
    worker: str = "models"

    @property
    def executes(self) -> bool:
        """True if models can run on it; the disk only keeps weights."""
        return self.device.type is not DeviceType.DISK

    def engine_device(self) -> EngineDevice:
        """As the engine sees it."""
        return EngineDevice(
            name=str(self.device),
            torch_device=self.torch_device,
            threads=self.threads,
            transfer_bytes_per_s=self.transfer_bytes_per_s,
            group=self.worker,
        )


def take_inventory(
    devices: Sequence[DeviceConfig],
    *,
    roots: Iterable[Path] = (),
    using: Mapping[DeviceType, Probe] | None = None,
) -> tuple[ManagedDevice, ...]:
    """Finds the configured devices and resolves their budgets.

    Each kind is probed once, and only if a device of it is configured.

    Args:
        devices: of the configuration.
        roots: folders whose file systems are the disk.
        using: other probes, by kind; those of this machine if None.

    Raises:
        DeviceMissing: one of the devices is not there.
        BudgetImpossible: the budgets promise more than there is.
    """
    asked = probes(roots) if using is None else using
    seen: dict[DeviceType, tuple[Probed, ...]] = {}
    managed = []
    for config in devices:
        wanted = Device.cpu() if config.logical else config.device
        if wanted.type not in seen:
            seen[wanted.type] = asked[wanted.type]()
        probed = next((found for found in seen[wanted.type] if found.device == wanted), None)
        if probed is None:
            raise DeviceMissing(config.device)
        managed.append(_managed(config, probed))
    violations = budget_violations(managed, [device.budget_bytes for device in managed])
    if violations:
        raise BudgetImpossible(violations)
    return tuple(managed)


def _managed(config: DeviceConfig, probed: Probed) -> ManagedDevice:
    available = max(0, probed.total_bytes - config.reserve)
    return ManagedDevice(
        name=f"devices/{str(config.device).replace(':', '-')}",
        device=config.device,
        logical=config.logical,
        torch_device=probed.torch_device,
        threads=config.threads,
        total_bytes=probed.total_bytes,
        budget_bytes=config.budget.resolve(available),
        reserve_bytes=config.reserve,
        transfer_bytes_per_s=config.transfer_bandwidth,
        worker=config.worker,
    )
