"""Messages about models, residencies and the server as values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Final

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from modelyard._device_messages import placement_from
from modelyard._predict_messages import seconds_from
from modelyard._struct_messages import struct_to_dict
from modelyard.resources import (
    BatchFigures,
    CopyState,
    Departures,
    DeviceCharge,
    HostTier,
    LoadFailure,
    Model,
    ModelOwner,
    PlacedModel,
    PlacedPart,
    Regret,
    Residency,
    ResidencyState,
    ServerInfo,
    ServerStats,
    ShadowFigures,
    StoreCollected,
    StoreFigures,
)
from modelyard.v1 import admin_service_pb2, model_pb2, plan_pb2, residency_pb2

__all__ = [
    "charges_from",
    "model_from",
    "placed_model_from",
    "residency_from",
    "server_info_from",
    "server_stats_from",
    "store_collected_from",
    "time_from",
]

_STATES: Final[Mapping[int, ResidencyState]] = MappingProxyType(
    {
        residency_pb2.RESIDENCY_STATE_COLD: ResidencyState.COLD,
        residency_pb2.RESIDENCY_STATE_QUEUED: ResidencyState.QUEUED,
        residency_pb2.RESIDENCY_STATE_LOADING: ResidencyState.LOADING,
        residency_pb2.RESIDENCY_STATE_RESIDENT: ResidencyState.RESIDENT,
        residency_pb2.RESIDENCY_STATE_DRAINING: ResidencyState.DRAINING,
        residency_pb2.RESIDENCY_STATE_UNLOADING: ResidencyState.UNLOADING,
        residency_pb2.RESIDENCY_STATE_FAILED: ResidencyState.FAILED,
    }
)

_COPY_STATES: Final[Mapping[int, CopyState]] = MappingProxyType(
    {
        # A server that is older than the host tier says nothing.
        residency_pb2.COPY_STATE_UNSPECIFIED: CopyState.NONE,
        residency_pb2.COPY_STATE_NONE: CopyState.NONE,
        residency_pb2.COPY_STATE_MAKING: CopyState.MAKING,
        residency_pb2.COPY_STATE_KEPT: CopyState.KEPT,
        residency_pb2.COPY_STATE_DROPPING: CopyState.DROPPING,
    }
)

_OWNERS: Final[Mapping[int, ModelOwner]] = MappingProxyType(
    {
        model_pb2.MODEL_OWNER_CONFIG: ModelOwner.CONFIG,
        model_pb2.MODEL_OWNER_API: ModelOwner.API,
    }
)


def model_from(message: model_pb2.Model) -> Model:
    """Return a model. Raises ``ValueError`` if its placement or a time is out of range."""
    has_source = message.HasField("source")
    return Model(
        name=message.name,
        keys=tuple(message.keys),
        root=message.source.root if has_source else None,
        folder=message.source.folder if has_source else None,
        runtime=message.runtime,
        task=message.task,
        options=struct_to_dict(message.options),
        placement=placement_from(message),
        estimated_bytes=message.estimated_bytes,
        estimated_activation_bytes=message.estimated_activation_bytes,
        created_at=time_from(message.create_time) if message.HasField("create_time") else None,
        etag=message.etag,
        owner=_OWNERS.get(message.owner, ModelOwner.UNKNOWN),
        placed_by_plan=message.placed_by_plan,
        pinned=message.pinned,
        alternatives=tuple(map(placed_model_from, message.alternatives)),
        warnings=tuple(message.warnings),
    )


def placed_model_from(message: plan_pb2.PlacedModel) -> PlacedModel:
    """Return one way to load a model."""
    return PlacedModel(
        parts=tuple(
            PlacedPart(
                device=part.device, prefixes=tuple(part.prefixes), size_bytes=part.size_bytes
            )
            for part in message.parts
        )
    )


def residency_from(message: residency_pb2.Residency) -> Residency:
    """Return a residency. Raises ``ValueError`` if a time is out of range."""
    return Residency(
        name=message.name,
        model=message.model,
        state=_STATES.get(message.state, ResidencyState.UNKNOWN),
        charges=charges_from(message.charges),
        pinned=message.pinned,
        lease_count=message.lease_count,
        waiting_request_count=message.waiting_request_count,
        load_count=message.load_count,
        load_s=seconds_from(message.load_duration) if message.HasField("load_duration") else None,
        failure=_failure_from(message.failure) if message.HasField("failure") else None,
        quarantined=charges_from(message.quarantined),
        copy_state=_COPY_STATES.get(message.copy_state, CopyState.UNKNOWN),
        copy_bytes=message.copy_bytes,
        copy_load_s=(
            seconds_from(message.copy_load_duration)
            if message.HasField("copy_load_duration")
            else None
        ),
    )


def server_info_from(message: admin_service_pb2.GetServerInfoResponse) -> ServerInfo:
    """Return what a server is. Raises ``ValueError`` if a time is out of range."""
    return ServerInfo(
        version=message.version,
        library_versions=dict(sorted(message.library_versions.items())),
        started_at=time_from(message.start_time) if message.HasField("start_time") else None,
        eviction_policy=message.eviction_policy,
        runtimes=tuple(message.runtimes),
        process_id=message.process_id,
    )


def server_stats_from(message: admin_service_pb2.GetStatsResponse) -> ServerStats:
    """Return what a server has done."""
    return ServerStats(
        answered_count=message.answered_count,
        error_counts=dict(sorted(message.error_counts.items())),
        hit_count=message.hit_count,
        cold_count=message.cold_count,
        load_count=message.load_count,
        load_failure_count=message.load_failure_count,
        eviction_count=message.eviction_count,
        load_s=seconds_from(message.load_duration),
        active_request_count=message.active_request_count,
        waiting_request_count=message.waiting_request_count,
        process_resident_bytes=message.process_resident_bytes,
        peak_process_resident_bytes=message.peak_process_resident_bytes,
        worker_resident_bytes=message.worker_resident_bytes,
        host_tier=_tier_from(message.host_tier) if message.HasField("host_tier") else None,
        recent_load_s=seconds_from(message.recent_load_duration),
        regret=_regret_from(message.regret) if message.HasField("regret") else None,
        departures=_departures_from(message.departures) if message.HasField("departures") else None,
        batches=_batches_from(message.batches) if message.HasField("batches") else None,
        shadows=_shadows_from(message.shadows) if message.HasField("shadows") else None,
        store=_store_from(message.store) if message.HasField("store") else None,
    )


def store_collected_from(message: admin_service_pb2.CollectStoreResponse) -> StoreCollected:
    """Return what a collection did. Raises ``ValueError`` if a time is out of range."""
    return StoreCollected(
        freed_bytes=message.freed_bytes,
        freed_count=message.freed_count,
        store=_store_from(message.store) if message.HasField("store") else None,
    )


def _store_from(message: admin_service_pb2.StoreFigures) -> StoreFigures:
    return StoreFigures(
        stored_bytes=message.stored_bytes,
        model_count=message.model_count,
        unused_bytes=message.unused_bytes,
        unused_count=message.unused_count,
        due_at=time_from(message.due_time) if message.HasField("due_time") else None,
        freed_bytes=message.freed_bytes,
        freed_count=message.freed_count,
        obstacle=message.obstacle,
    )


def _shadows_from(message: admin_service_pb2.ShadowFigures) -> ShadowFigures:
    return ShadowFigures(
        answered_count=message.answered_count,
        failed_count=message.failed_count,
        dropped_count=message.dropped_count,
    )


def _regret_from(message: admin_service_pb2.Regret) -> Regret:
    return Regret(
        lru_load_s=seconds_from(message.lru_load_duration),
        regret_s=seconds_from(message.regret_duration),
    )


def _departures_from(message: admin_service_pb2.Departures) -> Departures:
    fields: Message = message

    def age(name: str) -> float | None:
        return seconds_from(getattr(message, name)) if fields.HasField(name) else None

    return Departures(
        counts=dict(sorted(message.counts.items())),
        age_count=message.age_count,
        median_idle_s=age("median_idle_duration"),
        p90_idle_s=age("p90_idle_duration"),
        median_resident_s=age("median_resident_duration"),
        p90_resident_s=age("p90_resident_duration"),
    )


def _batches_from(message: admin_service_pb2.BatchFigures) -> BatchFigures:
    return BatchFigures(
        batch_count=message.batch_count,
        request_count=message.request_count,
        row_count=message.row_count,
        largest_request_count=message.largest_request_count,
        largest_row_count=message.largest_row_count,
        alone_count=message.alone_count,
        unshared_count=message.unshared_count,
        split_count=message.split_count,
        padding_ratio=message.padding_ratio if message.HasField("padding_ratio") else None,
    )


def _tier_from(message: admin_service_pb2.HostTier) -> HostTier:
    return HostTier(
        budget_bytes=message.budget_bytes,
        reserved_bytes=message.reserved_bytes,
        resident_bytes=message.resident_bytes,
        draining_bytes=message.draining_bytes,
        quarantined_bytes=message.quarantined_bytes,
        peak_bytes=message.peak_bytes,
        saved_bytes=message.saved_bytes,
        measured_bytes=message.measured_bytes,
        copy_count=message.copy_count,
        kept_count=message.kept_count,
        dropped_count=message.dropped_count,
        promotion_count=message.promotion_count,
    )


def charges_from(messages: Iterable[residency_pb2.DeviceCharge]) -> tuple[DeviceCharge, ...]:
    """Return bytes per device."""
    return tuple(
        DeviceCharge(
            device=charge.device,
            size_bytes=charge.size_bytes,
            shared_bytes=charge.shared_bytes,
        )
        for charge in messages
    )


def _failure_from(message: residency_pb2.LoadFailure) -> LoadFailure:
    return LoadFailure(
        message=message.message,
        transient=message.transient,
        attempt_count=message.attempt_count,
        retry_at=time_from(message.retry_time) if message.HasField("retry_time") else None,
    )


def time_from(timestamp: Timestamp) -> datetime:
    """Return a time, in UTC. Raises ``ValueError`` if it is out of range."""
    return timestamp.ToDatetime(tzinfo=UTC)
