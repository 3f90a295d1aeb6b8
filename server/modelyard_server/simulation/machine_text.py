"""Machines as people write them: budgets, a server's file, and what if there were more."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from modelyard.devices import DeviceType
from modelyard_server import _core
from modelyard_server.devices.sizes import format_size, parse_size
from modelyard_server.simulation.machine import Machine

if TYPE_CHECKING:
    from modelyard_server.config import Config

__all__ = ["WhatIf", "describe_budgets", "machine_of_config", "parse_budget", "parse_what_if"]

_SHARE: Final = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)( ?%)?", re.ASCII)
_QUOTE_LIMIT: Final = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """A change of budgets to try.

    Args:
        text: as it was written.
        device: name of the device whose budget it is about; empty for each device's.
        more_bytes: how much more, negative for less.
    """

    text: str
    device: str
    more_bytes: int

    def applied_to(self, machine: Machine) -> Machine:
        """Return the machine with changed budgets.

        Raises:
            ValueError: there is no such device, or a budget would be out of range.
        """
        names = machine.device_names
        if self.device and self.device not in names:
            known = ", ".join(names) or "none with a name: they come from --devices"
            raise ValueError(f"{self.text!r}: no device {self.device!r}; there are {known}")
        budgets = tuple(
            budget + self.more_bytes if not self.device or names[i] == self.device else budget
            for i, budget in enumerate(machine.budgets)
        )
        if min(budgets) < 1 or max(budgets) > _core.MAX_BYTES:
            raise ValueError(f"{self.text!r}: a budget would be {min(budgets)} bytes")
        return replace(machine, budgets=budgets)


def parse_what_if(text: str) -> WhatIf:
    """Read ``+8GB``, ``-512MiB`` or ``cuda:0=+8GB``.

    Raises:
        ValueError: it is none of these.
    """
    device, equals, change = text.rpartition("=")
    if not change.startswith(("+", "-")) or bool(equals) != bool(device):
        raise ValueError(
            f"{text[:_QUOTE_LIMIT]!r}: write for example '+8GB', '-2GiB' or 'cuda:0=+8GB'"
        )
    size = parse_size(change[1:])
    return WhatIf(text=text, device=device, more_bytes=-size if change[0] == "-" else size)


def parse_budget(text: str, footprint_bytes: int) -> int:
    """Read a budget: a size, or a share of all models together such as ``0.2`` or ``20%``.

    Raises:
        ValueError: it is neither, or no budget.
    """
    match = _SHARE.fullmatch(text)
    if match is None:
        budget = parse_size(text)
    else:
        share = Fraction(match[1]) / (100 if match[2] else 1)
        if not 0 < share <= 1:
            raise ValueError(
                f"{text!r} as a share of all models is above 0 and at most 1 (or 100%); "
                "for bytes write a unit, such as '8GiB'"
            )
        budget = int(share * footprint_bytes)
    if not 1 <= budget <= _core.MAX_BYTES:
        largest = format_size(_core.MAX_BYTES)
        what = repr(text) if match is None else f"{text!r} of {format_size(footprint_bytes)}"
        raise ValueError(f"{what}: a budget is at least 1 byte and at most {largest}")
    return budget


def machine_of_config(
    config: Config, base: Machine, host_budget_bytes: int | None = None
) -> Machine:
    """Return a machine with a server's devices, budgets, host tier and waiting rules.

    Args:
        config: the server's.
        base: for what its file does not say.
        host_budget_bytes: of the host tier, 0 for none; None for what the file says.

    Raises:
        ValueError: a budget is a percentage of what only the server's machine knows.
    """
    devices = [device for device in config.devices if device.device.type is not DeviceType.DISK]
    budgets = []
    for device in devices:
        if device.budget.size_bytes is None:
            raise ValueError(
                f"the budget of {device.device} is {device.budget}: nobody knows here of how much; "
                "write it as a size, or give --budget"
            )
        budgets.append(device.budget.size_bytes)
    if host_budget_bytes is None:
        host_budget_bytes = _tier_bytes(config)
    return replace(
        base,
        budgets=tuple(budgets),
        device_names=tuple(str(device.device) for device in devices),
        host_budget_bytes=host_budget_bytes,
        above_tier=tuple(
            device.logical or device.device.type is not DeviceType.CPU for device in devices
        ),
        max_waiting=config.yard.max_waiting,
        max_waiting_per_model=config.yard.max_waiting_per_model,
        loads_per_device=config.yard.loads_per_device,
        overdue_after_s=config.yard.overdue_after_s,
        backoff_initial_s=config.yard.backoff_initial_s,
        backoff_max_s=config.yard.backoff_max_s,
    )


def _tier_bytes(config: Config) -> int:
    tier = config.host_tier.budget
    if tier is None:
        return 0
    if tier.size_bytes is None:
        raise ValueError(
            f"the budget of the host tier is {tier}: nobody knows here of how much; write it as a "
            "size, or give --host-budget"
        )
    return tier.size_bytes


def describe_budgets(budgets: Sequence[int], names: Sequence[str]) -> str:
    """Return budgets for people."""
    if len(budgets) == 1 and not names:
        return format_size(budgets[0])
    titles = names or [f"device {i}" for i in range(len(budgets))]
    return ", ".join(f"{title} {format_size(b)}" for title, b in zip(titles, budgets, strict=True))
