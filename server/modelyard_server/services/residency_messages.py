"""Where a model stands, and what happened, as messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from modelyard.v1 import event_pb2, residency_pb2, residency_service_pb2
from modelyard_server.residency.journal import Event
from modelyard_server.residency.values import CopyState, ModelUse, State
from modelyard_server.services.evictions import Eviction

__all__ = ["event_message", "eviction_message", "residency_message"]

_STATES = {
    State.COLD: residency_pb2.RESIDENCY_STATE_COLD,
    State.QUEUED: residency_pb2.RESIDENCY_STATE_QUEUED,
    State.LOADING: residency_pb2.RESIDENCY_STATE_LOADING,
    State.RESIDENT: residency_pb2.RESIDENCY_STATE_RESIDENT,
    State.DRAINING: residency_pb2.RESIDENCY_STATE_DRAINING,
    State.UNLOADING: residency_pb2.RESIDENCY_STATE_UNLOADING,
    State.FAILED: residency_pb2.RESIDENCY_STATE_FAILED,
}

_COPY_STATES = {
    CopyState.NONE: residency_pb2.COPY_STATE_NONE,
    CopyState.AWAITED: residency_pb2.COPY_STATE_MAKING,
    CopyState.MAKING: residency_pb2.COPY_STATE_MAKING,
    CopyState.KEPT: residency_pb2.COPY_STATE_KEPT,
    CopyState.DROPPING: residency_pb2.COPY_STATE_DROPPING,
}


def residency_message(
    model_id: str,
    use: ModelUse,
    device_names: Sequence[str],
    *,
    now: datetime | None = None,
) -> residency_pb2.Residency:
    """The Residency of a model.

    Args:
        model_id: the model.
        use: where it stands.
        device_names: resource names of the devices, by position.
        now: when it stood there, in UTC; None: just now.
    """
    message = residency_pb2.Residency(
        name=f"residencies/{model_id}",
        model=f"models/{model_id}",
        state=_STATES[use.state],
        charges=_charges(use.charges, device_names, use.shared),
        pinned=use.pinned,
        lease_count=use.lease_count,
        waiting_request_count=use.waiting_count,
        load_count=use.load_count,
        quarantined=_charges(use.quarantined, device_names),
        copy_state=_COPY_STATES[use.copy_state],
        copy_bytes=use.copy_bytes,
    )
    if use.copy_duration_s is not None:
        message.copy_load_duration.FromTimedelta(timedelta(seconds=use.copy_duration_s))
    if use.load_duration_s is not None:
        message.load_duration.FromTimedelta(timedelta(seconds=use.load_duration_s))
    if use.state is State.FAILED:
        message.failure.message = use.failure_text
        message.failure.transient = use.failure_transient
        message.failure.attempt_count = use.failure_count
        retry = (now or datetime.now(UTC)) + timedelta(seconds=use.retry_in_s)
        message.failure.retry_time.FromDatetime(retry)
    return message


def event_message(event: Event) -> event_pb2.Event:
    """An event of the journal."""
    message = event_pb2.Event(
        revision=event.revision,
        type=event_pb2.EventType.Value(f"EVENT_TYPE_{event.type.name}"),
        subject=event.subject,
        cause=event.cause,
        size_bytes=event.size_bytes,
        shared_bytes=event.shared_bytes,
        score=event.score,
        description=event.description,
        identity=event.identity,
    )
    message.time.FromDatetime(event.time)
    if event.waited_s is not None:
        message.waited.FromTimedelta(timedelta(seconds=event.waited_s))
    if event.load_s is not None:
        message.load_duration.FromTimedelta(timedelta(seconds=event.load_s))
    if (left := event.departure) is not None:
        message.rule = left.rule
        message.expected_load_duration.FromTimedelta(timedelta(seconds=left.expected_load_s))
        message.idle_duration.FromTimedelta(timedelta(seconds=left.idle_s))
        message.resident_duration.FromTimedelta(timedelta(seconds=left.resident_s))
    if event.waits is not None:
        message.waited_request_count = event.waits.count
        message.waited_sum.FromTimedelta(timedelta(seconds=event.waits.sum_s))
    return message


def eviction_message(eviction: Eviction) -> residency_service_pb2.Eviction:
    """One time that a model had to leave."""
    message = residency_service_pb2.Eviction(
        event=event_message(eviction.event), failed_load_count=eviction.failed_load_count
    )
    reload = eviction.reload
    if reload is None:
        return message
    message.reload_time.FromDatetime(reload.time)
    if reload.load_s is not None:
        message.reload_duration.FromTimedelta(timedelta(seconds=reload.load_s))
    if reload.waits is not None:
        message.waited_request_count = reload.waits.count
        message.waited_sum.FromTimedelta(timedelta(seconds=reload.waits.sum_s))
        message.longest_wait.FromTimedelta(timedelta(seconds=reload.waited_s or 0.0))
    return message


def _charges(
    charges: Mapping[int, int],
    device_names: Sequence[str],
    shared: Mapping[int, int] = MappingProxyType({}),
) -> list[residency_pb2.DeviceCharge]:
    return [
        residency_pb2.DeviceCharge(
            device=device_names[device], size_bytes=size, shared_bytes=shared.get(device, 0)
        )
        for device, size in sorted(charges.items())
    ]
