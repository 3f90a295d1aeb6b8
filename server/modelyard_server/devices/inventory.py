"""What devices this machine has, and how much room each of them has.

A probe that finds nothing costs nothing: torch's accelerator modules are asked only for devices
that the configuration names. Accelerator probes are exercised on machines that have them; elsewhere
a device is declared logical.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelyard.devices import Device, DeviceType
from modelyard_server.config import DeviceConfig
from modelyard_server.execution.engine import EngineDevice

__all__ = ["DeviceMissing", "ManagedDevice", "host_memory_bytes", "take_inventory"]

_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


class DeviceMissing(Exception):
    """The configuration names a device that this machine has not.

    Attributes:
        device: the device.
    """

    def __init__(self, device: Device) -> None:
        super().__init__(
            f"this machine has no {device}; leave it out, or declare it with logical = true"
        )
        self.device = device


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagedDevice:
    """A device the server manages.

    Attributes:
        name: resource name, "devices/cuda-1".
        device: what the configuration calls it.
        logical: a pool of host memory that stands for the device.
        torch_device: where tensors really go, in torch's words.
        threads: intra-op threads of its lane.
        total_bytes: what the probe saw.
        budget_bytes: most that models may hold; at most total_bytes unless it was given in bytes.
    """

    name: str
    device: Device
    logical: bool
    torch_device: str
    threads: int
    total_bytes: int
    budget_bytes: int

    def engine_device(self) -> EngineDevice:
        """As the engine sees it."""
        return EngineDevice(
            name=str(self.device), torch_device=self.torch_device, threads=self.threads
        )


def take_inventory(devices: Sequence[DeviceConfig]) -> tuple[ManagedDevice, ...]:
    """Finds the configured devices and resolves their budgets.

    Raises:
        DeviceMissing: one of them is not there.
    """
    return tuple(_find(config) for config in devices)


def host_memory_bytes() -> int:
    """Memory this process may have: what the machine has, or less if its control group says so."""
    lines = _MEMINFO.read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    for limit in _CGROUP_LIMITS:
        try:
            text = limit.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def _find(config: DeviceConfig) -> ManagedDevice:
    device = config.device
    if config.logical or device.type is DeviceType.CPU:
        total, torch_device = host_memory_bytes(), "cpu"
    else:
        total, torch_device = _accelerator_bytes(device), str(device)
    return ManagedDevice(
        name=f"devices/{str(device).replace(':', '-')}",
        device=device,
        logical=config.logical,
        torch_device=torch_device,
        threads=config.threads,
        total_bytes=total,
        budget_bytes=config.budget.resolve(total),
    )


def _accelerator_bytes(device: Device) -> int:
    import torch

    index = device.id or 0
    match device.type:
        case DeviceType.GPU if torch.cuda.is_available() and index < torch.cuda.device_count():
            return int(torch.cuda.mem_get_info(index)[1])
        case DeviceType.XPU if torch.xpu.is_available() and index < torch.xpu.device_count():
            return int(torch.xpu.get_device_properties(index).total_memory)
        case DeviceType.MPS if torch.backends.mps.is_available():
            return int(torch.mps.recommended_max_memory())
        case _:
            raise DeviceMissing(device)
