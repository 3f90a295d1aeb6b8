"""The host tier, and the devices that it is for: ``[host_tier]``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelyard.devices import DeviceType
from modelyard_server.config import rules
from modelyard_server.config.budget import Budget
from modelyard_server.config.devices import MAX_DEVICES
from modelyard_server.config.rules import Finding
from modelyard_server.config.sections import check, ruled

__all__ = ["HostTierConfig", "tier_conflicts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTierConfig:
    """Where copies of evicted models' weights are kept: ``[host_tier]``.

    Raises:
        ValueError: a field breaks its rule.
    """

    budget: Budget | None = field(default=None, metadata=ruled(rules.optional_budget))
    """Most host memory that copies may hold together; None for no host tier."""

    def __post_init__(self) -> None:
        check(self)

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Finding]:
        """See ``Section``."""
        yield from ()


def tier_conflicts(
    budget: Budget | None, devices: Sequence[Mapping[str, Any]]
) -> Iterator[Finding]:
    """Yield what is wrong between the host tier and devices that are each right.

    Args:
        budget: of the tier; None for none.
        devices: as ``plan_conflicts`` takes them.
    """
    if budget is None:
        return
    if len(devices) == MAX_DEVICES:
        yield (
            ("devices",),
            f"at most {MAX_DEVICES - 1} devices beside a host tier, got {len(devices)}",
        )
    readable = all({"device", "logical"} <= given.keys() for given in devices)
    if devices and readable and not any(map(_is_above_tier, devices)):
        yield (
            ("host_tier", "budget"),
            "there is no device whose models it could keep: it is for accelerators and logical "
            "devices, because what leaves the cpu stays in the page cache as it is; remove "
            "[host_tier], or raise the budget of the cpu",
        )


def _is_above_tier(given: Mapping[str, Any]) -> bool:
    """True for a device whose memory is dearer than host memory, or stands for such."""
    return given["logical"] or given["device"].type not in {DeviceType.CPU, DeviceType.DISK}
