"""The host tier as the server sees it: copies that are dropped, lost, and looked for until back."""

from __future__ import annotations

from collections.abc import Iterable

from modelyard_server import _core
from modelyard_server.devices.budgets import HOST_TIER
from modelyard_server.residency.values import CopyState, TierUse

__all__ = ["HOST_TIER", "tier_use", "without_tier"]


def tier_use(yard: _core.Yard, core_ids: Iterable[int]) -> TierUse | None:
    """What the host tier of a yard has promised and holds; None if there is none.

    Args:
        yard: whose tier it is.
        core_ids: the yard's ids of all its models.
    """
    tier = yard.tier
    if tier is None:
        return None
    account, counters = yard.account(tier), yard.counters
    entries = (yard.entry(core_id) for core_id in core_ids)
    return TierUse(
        budget=account.budget,
        reserved=account.reserved,
        resident=account.resident,
        draining=account.draining,
        quarantined=account.quarantined,
        deficit=account.deficit,
        peak=account.peak,
        saved=yard.saved(tier),
        copies=sum(
            1
            for entry in entries
            if entry is not None and entry.copy_state not in (CopyState.NONE, CopyState.AWAITED)
        ),
        kept_count=counters.copy_count,
        dropped_count=counters.copy_drop_count,
        promotion_count=counters.promotion_count,
    )


def without_tier(charges: dict[int, int], tier: int | None) -> dict[int, int]:
    """Bytes by position of the device, without what is on the tier."""
    return {device: size for device, size in charges.items() if device != tier}
