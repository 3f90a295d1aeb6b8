"""The devices that models may live on: ``[[devices]]``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from modelyard.devices import Device, DeviceType
from modelyard_server.config import placement, rules
from modelyard_server.config.budget import Budget
from modelyard_server.config.rules import Finding
from modelyard_server.config.sections import check, ruled
from modelyard_server.devices.sizes import MAX_SIZE_BYTES

__all__ = ["MAX_DEVICES", "DeviceConfig"]

MAX_DEVICES: Final = 16
"""Most devices of a yard; the core's own limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """A device that models may live on: one element of ``[[devices]]``.

    Raises:
        ValueError: a field breaks its rule, or two contradict each other.
    """

    device: Device = field(metadata=ruled(placement.device))
    """The device, in the form that names a place (``cuda:0``, not ``cuda``; ``cpu``)."""
    budget: Budget = field(metadata=ruled(rules.budget))
    """Most that models may hold on it."""
    logical: bool = field(default=False, metadata=ruled(rules.boolean))
    """Whether this is a pool of host memory that stands for the device."""
    threads: int = field(default=1, metadata=ruled(rules.integer(1, 1024)))
    """Intra-op threads of its lane."""
    reserve: int = field(default=0, metadata=ruled(rules.size(0, MAX_SIZE_BYTES)))
    """What budgets leave alone of what it has, in bytes."""
    transfer_bandwidth: int = field(default=0, metadata=ruled(rules.bandwidth))
    """Most that loads bring onto it, in bytes a second; 0 is as fast as it goes."""
    worker: str = field(default="models", metadata=ruled(rules.identifier))
    """The worker process that its models are in; devices that name the same one share it."""

    def __post_init__(self) -> None:
        check(self)

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Finding]:
        """See ``Section``."""
        device = given.get("device")
        if given.get("transfer_bandwidth") and not given.get("logical", True):
            yield (
                ("transfer_bandwidth",),
                "is for logical devices: a real one has the bandwidth that it has",
            )
        if device is not None and device.type is DeviceType.DISK:
            if given.get("logical"):
                yield ("logical",), "must be false: the disk is no pool of host memory"
            if given.get("threads", 1) != 1:
                yield ("threads",), "must be left out: nothing runs on the disk"
            return
        if device is None or given.get("logical", True):
            return
        if device.type is DeviceType.CPU and device.id is not None:
            yield (
                ("device",),
                f"{device} is no device of its own, because host memory is one: "
                'write "cpu", or set logical = true to make it a pool',
            )
