"""Where models and devices stand, read from a yard."""

from __future__ import annotations

from modelyard_server import _core
from modelyard_server.residency.host_tier import without_tier
from modelyard_server.residency.values import GONE, DeviceUse, ModelHandle, ModelUse, State

__all__ = ["device_use", "model_use"]


def model_use(yard: _core.Yard, handle: ModelHandle, now_ns: int) -> ModelUse:
    """Where a model of a yard stands.

    Args:
        yard: what it is, or was, a model of.
        handle: the model.
        now_ns: the yard's time.
    """
    entry = yard.entry(handle.core_id)
    if entry is None:  # Removed, and everything is back.
        return GONE
    failed = entry.state is State.FAILED
    loads = entry.load_count + handle.loads_before
    next_load_s = entry.reload_seconds if loads else None
    has_copy = entry.copy_state is _core.CopyState.KEPT
    charges = yard.held_with_shares(handle.core_id)
    alone = yard.exclusive(handle.core_id)
    return ModelUse(
        state=entry.state,
        charges=charges,
        shared={
            device: size - alone.get(device, 0)
            for device, size in charges.items()
            if size > alone.get(device, 0)
        },
        quarantined=without_tier(entry.quarantined, yard.tier),
        pinned=entry.pinned,
        lease_count=entry.lease_count,
        waiting_count=entry.waiting_count,
        load_count=loads,
        eviction_count=entry.eviction_count + handle.evictions_before,
        load_duration_s=next_load_s,
        file_load_duration_s=handle.file_load_s if has_copy else next_load_s,
        failure_text=handle.failure_text if failed else "",
        failure_transient=failed and entry.failure is _core.LoadFailure.TRANSIENT,
        failure_count=entry.failure_count if failed else 0,
        retry_in_s=max(0, entry.retry_at_ns - now_ns) * 1e-9 if failed else 0.0,
        copy_state=entry.copy_state,
        copy_bytes=yard.copy_exclusive(handle.core_id),
        copy_in_use=entry.copy_in_use,
        copy_duration_s=entry.copy_seconds or None,
    )


def device_use(yard: _core.Yard, device: int) -> DeviceUse:
    """What a device of a yard has promised and holds."""
    account = yard.account(device)
    loads, evictions = yard.device_counters(device)
    return DeviceUse(
        budget=account.budget,
        reserved=account.reserved,
        resident=account.resident,
        draining=account.draining,
        quarantined=account.quarantined,
        deficit=account.deficit,
        peak=account.peak,
        saved=yard.saved(device),
        load_count=loads,
        eviction_count=evictions,
    )
