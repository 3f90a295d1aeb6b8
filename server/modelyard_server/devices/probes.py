"""What devices this machine has, one probe for each kind.

A probe that finds nothing costs nothing: torch is imported by the probes of accelerators, and those
are asked only for devices that somebody named. Where the library or the driver is missing there are
no such devices, which is no error. Probes of accelerators are exercised on machines that have them;
elsewhere a device is declared logical.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from modelyard.devices import Device, DeviceType
from modelyard_server.devices.process_limit import process_limit_bytes
from modelyard_server.runtimes.targets import DISK

__all__ = ["Probe", "Probed", "host_memory_bytes", "probe_all", "probes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """A device that a probe saw.

    Attributes:
        device: in the form that names a place ("cuda:0", "mps:0", "cpu").
        torch_device: torch's name of it, or targets.DISK.
        total_bytes: what it has.
    """

    device: Device
    torch_device: str
    total_bytes: int


Probe: TypeAlias = Callable[[], tuple[Probed, ...]]
"""Says which devices of one kind there are; raises nothing where there are none."""


def probes(roots: Iterable[Path] = ()) -> Mapping[DeviceType, Probe]:
    """The probe of each kind.

    Args:
        roots: folders whose file systems are the disk; without any there is no disk.
    """
    folders = tuple(roots)
    return MappingProxyType(
        {
            DeviceType.GPU: _cuda,
            DeviceType.XPU: _xpu,
            DeviceType.MPS: _mps,
            DeviceType.CPU: _cpu,
            DeviceType.DISK: lambda: _disk(folders),
        }
    )


def probe_all(roots: Iterable[Path] = ()) -> list[Probed]:
    """What this machine has, accelerators first. Imports torch, if it is installed."""
    return [found for probe in probes(roots).values() for found in probe()]


def host_memory_bytes() -> int:
    """Memory this process may have: the machine's, or less if its control groups say so."""
    return process_limit_bytes().bytes


def _cpu() -> tuple[Probed, ...]:
    return (Probed(device=Device.cpu(), torch_device="cpu", total_bytes=host_memory_bytes()),)


def _disk(folders: tuple[Path, ...]) -> tuple[Probed, ...]:
    """The file systems that the folders are on, each counted once, as one device."""
    systems = {folder.stat().st_dev: os.statvfs(folder) for folder in folders}
    if not systems:
        return ()
    total = sum(system.f_blocks * system.f_frsize for system in systems.values())
    return (Probed(device=Device.disk(), torch_device=DISK, total_bytes=total),)


def _cuda() -> tuple[Probed, ...]:
    try:
        import torch
    except ImportError:
        return ()
    if not torch.cuda.is_available():
        return ()
    # Properties, not mem_get_info: that makes a context on every device, which takes memory.
    return tuple(
        Probed(
            device=Device.gpu(i),
            torch_device=f"cuda:{i}",
            total_bytes=int(torch.cuda.get_device_properties(i).total_memory),
        )
        for i in range(torch.cuda.device_count())
    )


def _xpu() -> tuple[Probed, ...]:
    try:
        import torch
    except ImportError:
        return ()
    # Older releases have no torch.xpu.
    xpu = getattr(torch, "xpu", None)
    if xpu is None or not xpu.is_available():
        return ()
    return tuple(
        Probed(
            device=Device(DeviceType.XPU, i),
            torch_device=f"xpu:{i}",
            total_bytes=int(xpu.get_device_properties(i).total_memory),
        )
        for i in range(xpu.device_count())
    )


def _mps() -> tuple[Probed, ...]:
    try:
        import torch
    except ImportError:
        return ()
    if not torch.backends.mps.is_available():
        return ()
    return (
        Probed(
            device=Device.mps().canonical(),
            torch_device="mps:0",
            total_bytes=int(torch.mps.recommended_max_memory()),
        ),
    )
