"""The host tier as the machine has it: how much of host memory it may use, and for which devices.

It is no device: nothing runs there, and no model can be placed on it. Its budget is a promise of
host memory like those of the cpu and of logical devices, and adds up with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelyard.devices import DeviceType
from modelyard_server.config import HostTierConfig
from modelyard_server.devices.budgets import BudgetImpossible, budget_violations
from modelyard_server.devices.probes import Probe, probes

if TYPE_CHECKING:
    from modelyard_server.devices.inventory import ManagedDevice

__all__ = ["HostTier", "take_host_tier"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTier:
    """The host tier of a server.

    Attributes:
        budget_bytes: most that copies may hold together.
        total_bytes: what host memory the probe saw.
        above: for each device, by position, if copies of its models may be kept.
    """

    budget_bytes: int
    total_bytes: int
    above: tuple[bool, ...]


def take_host_tier(
    config: HostTierConfig,
    devices: Sequence[ManagedDevice],
    *,
    using: Mapping[DeviceType, Probe] | None = None,
) -> HostTier | None:
    """Resolves the budget of the host tier; None if the configuration has none.

    Args:
        config: of the tier.
        devices: what the server manages.
        using: other probes, by kind; those of this machine if None.

    Raises:
        BudgetImpossible: with the devices' budgets it promises more than there is.
    """
    if config.budget is None:
        return None
    (host,) = (probes() if using is None else using)[DeviceType.CPU]()
    tier = HostTier(
        budget_bytes=config.budget.resolve(host.total_bytes),
        total_bytes=host.total_bytes,
        above=tuple(
            device.logical or device.device.type not in (DeviceType.CPU, DeviceType.DISK)
            for device in devices
        ),
    )
    violations = budget_violations(devices, [device.budget_bytes for device in devices], tier)
    if violations:
        raise BudgetImpossible(violations)
    return tier
