"""Which budgets there can be: what a device has, and what the host's memory has for all its pools.

The host's memory is one thing with several names: "cpu", every logical device and the host tier
are pools of it. Each may be promised all of it, but together they may not, or the budgets would not
bound anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from modelyard.devices import DeviceType
from modelyard_server.errors import Violation

if TYPE_CHECKING:
    from modelyard_server.devices.host_tier import HostTier
    from modelyard_server.devices.inventory import ManagedDevice

__all__ = ["HOST_TIER", "MAX_BUDGET_BYTES", "BudgetImpossible", "budget_violations"]

HOST_TIER: Final = "hostTier"
"""Resource name of the host tier, of which there is at most one."""

MAX_BUDGET_BYTES: Final = 2**46 - 1
"""Largest budget, and largest price of a model, that the yard can hold: 64 TiB."""


class BudgetImpossible(Exception):
    """The configuration promises memory that there is not.

    Attributes:
        violations: what is wrong, at least one.
    """

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = tuple(violations)


def budget_violations(
    devices: Sequence[ManagedDevice], budgets: Sequence[int], tier: HostTier | None = None
) -> tuple[Violation, ...]:
    """What is wrong with budgets; empty if they can be.

    Args:
        devices: what the server manages.
        budgets: bytes by position, whatever somebody asked for.
        tier: the host tier, whose budget is a promise of host memory, too.

    Returns:
        Violations whose field is the resource name of the device, or of the first one where it is
        about several together; HOST_TIER where it is about the tier and no device.
    """
    return tuple(_violations(devices, budgets, tier))


def _violations(
    devices: Sequence[ManagedDevice], budgets: Sequence[int], tier: HostTier | None
) -> Iterator[Violation]:
    single = False
    for device, budget in zip(devices, budgets, strict=True):
        text = _single_text(device, budget)
        if text:
            single = True
            yield Violation(device.name, text)
    if tier is not None and (text := _tier_text(tier)):
        single = True
        yield Violation(HOST_TIER, text)
    host = [
        (device, budget)
        for device, budget in zip(devices, budgets, strict=True)
        if device.logical or device.device.type is DeviceType.CPU
    ]
    promises = [(device.name, budget) for device, budget in host]
    if tier is not None:
        promises.append(("the host tier", tier.budget_bytes))
    # One that is impossible by itself has been named; with it any sum is.
    if not host or len(promises) < 2 or single:
        return
    promised = sum(budget for _, budget in promises)
    total = min(device.total_bytes for device, _ in host)
    kept = sum(device.reserve_bytes for device, _ in host)
    if promised > total - kept:
        names = ", ".join(f"{name} {budget}" for name, budget in promises)
        reserved = f", less {kept} bytes in reserve" if kept else ""
        what = "devices in host memory" if tier is None else "devices in host memory and its tier"
        yield Violation(
            host[0][0].name,
            f"the budgets of {what} are {promised} bytes together ({names}), "
            f"and it has {total} bytes{reserved}",
        )


def _tier_text(tier: HostTier) -> str:
    if tier.budget_bytes > MAX_BUDGET_BYTES:
        return f"a budget is at most {MAX_BUDGET_BYTES} bytes, got {tier.budget_bytes}"
    if tier.budget_bytes > tier.total_bytes:
        return (
            f"budget {tier.budget_bytes} bytes is more than the host has, {tier.total_bytes} bytes"
        )
    return ""


def _single_text(device: ManagedDevice, budget: int) -> str:
    if budget < 0:
        return f"a budget is at least 0 bytes, got {budget}"
    if budget > MAX_BUDGET_BYTES:
        return f"a budget is at most {MAX_BUDGET_BYTES} bytes, got {budget}"
    available = device.total_bytes - device.reserve_bytes
    if available < 0:
        return (
            f"its reserve of {device.reserve_bytes} bytes is more than it has, "
            f"{device.total_bytes} bytes"
        )
    if budget > available:
        reserved = f", less {device.reserve_bytes} bytes in reserve" if device.reserve_bytes else ""
        return f"budget {budget} bytes is more than it has, {device.total_bytes} bytes{reserved}"
    return ""
