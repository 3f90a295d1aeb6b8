"""modelyard.v1.AdminService."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version

from modelyard.v1 import admin_service_pb2 as pb
from modelyard_server.config.storage import MAX_KEEP_S
from modelyard_server.errors import Reason, Refusal, Violation
from modelyard_server.execution.engine import Engine
from modelyard_server.execution.figures import LaneFigures
from modelyard_server.observability.process import (
    peak_resident_bytes,
    read_process_memory,
    resident_bytes,
)
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import Departures, TierUse
from modelyard_server.runtimes.api import ModelFilesError
from modelyard_server.services.handler import invalid
from modelyard_server.services.inference import InferenceFigures
from modelyard_server.services.shadows import ShadowFigures
from modelyard_server.transport.api import Call
from modelyard_server.weights.store_keeper import StoreFigures, StoreKeeper

__all__ = ["AdminService"]

_CAUSES = {"DEVICE_CLOSED": "DEVICE_DRAINED"}
"""What the core calls otherwise than the contract."""

_LIBRARIES = ("grpcio", "protobuf", "safetensors", "torch", "transformers")


class AdminService:
    """Tells what the server is and what it has done."""

    def __init__(
        self,
        *,
        store: StoreKeeper | None = None,
        residency: Residency,
        engine: Engine,
        figures: InferenceFigures,
        shadows: ShadowFigures,
        runtimes: Sequence[str],
    ) -> None:
        self._store = store
        self._residency = residency
        self._engine = engine
        self._figures = figures
        self._shadows = shadows
        self._runtimes = tuple(sorted(runtimes))
        self._started = datetime.now(UTC)

    async def get_server_info(
        self, request: pb.GetServerInfoRequest, call: Call
    ) -> pb.GetServerInfoResponse:
        """See AdminService.GetServerInfo."""
        response = pb.GetServerInfoResponse(
            version=_version("modelyard"),
            library_versions={name: _version(name) for name in _LIBRARIES},
            eviction_policy=self._residency.policy,
            runtimes=self._runtimes,
            process_id=os.getpid(),
        )
        response.start_time.FromDatetime(self._started)
        return response

    async def get_stats(self, request: pb.GetStatsRequest, call: Call) -> pb.GetStatsResponse:
        """See AdminService.GetStats."""
        figures, counters = self._figures, self._residency.counters
        response = pb.GetStatsResponse(
            answered_count=figures.answered_count,
            error_counts=figures.error_counts,
            hit_count=figures.hit_count,
            cold_count=figures.cold_count,
            load_count=counters.load_count,
            load_failure_count=counters.load_failure_count,
            eviction_count=counters.eviction_count,
            active_request_count=figures.active_count,
            waiting_request_count=self._residency.waiting_count,
            process_resident_bytes=resident_bytes(),
            peak_process_resident_bytes=peak_resident_bytes(),
            worker_resident_bytes=await asyncio.to_thread(_held_by, self._engine.pids.values()),
        )
        response.load_duration.FromTimedelta(timedelta(seconds=counters.load_seconds))
        response.recent_load_duration.FromTimedelta(
            timedelta(seconds=self._residency.recent_load_s)
        )
        lru_s = self._residency.lru_load_s
        response.regret.lru_load_duration.FromTimedelta(timedelta(seconds=lru_s))
        response.regret.regret_duration.FromTimedelta(
            timedelta(seconds=counters.load_seconds - lru_s)
        )
        response.departures.CopyFrom(_departures_message(self._residency.departures))
        response.batches.CopyFrom(_batches_message(self._engine.figures))
        shadows = self._shadows
        response.shadows.answered_count = shadows.answered_count
        response.shadows.failed_count = shadows.failed_count
        response.shadows.dropped_count = shadows.dropped_count
        tier = self._residency.tier_use()
        if tier is not None:
            response.host_tier.CopyFrom(_tier_message(tier, self._engine.copies.measured_bytes))
        if self._store is not None:
            response.store.CopyFrom(_store_message(self._store.figures))
        return response

    async def collect_store(
        self, request: pb.CollectStoreRequest, call: Call
    ) -> pb.CollectStoreResponse:
        """See AdminService.CollectStore."""
        keep_s = None
        if request.HasField("keep_duration"):
            keep_s = request.keep_duration.seconds + request.keep_duration.nanos / 1e9
            if not 0 <= keep_s <= MAX_KEEP_S:
                raise invalid(Violation("keep_duration", f"must be 0 to {MAX_KEEP_S} seconds"))
        if self._store is None:
            return pb.CollectStoreResponse()
        try:
            found = await self._store.collect(keep_s=keep_s, validate_only=request.validate_only)
        except ModelFilesError as error:
            raise Refusal(
                Reason.LOAD_FAILED, error.text, transient=True, retry_after_s=1.0
            ) from None
        return pb.CollectStoreResponse(
            freed_bytes=found.freed_bytes,
            freed_count=found.freed_count,
            store=_store_message(replace(self._store.figures, last=found)),
        )


def _store_message(figures: StoreFigures) -> pb.StoreFigures:
    last = figures.last
    message = pb.StoreFigures(
        stored_bytes=last.stored_bytes,
        model_count=last.model_count,
        unused_bytes=last.unused_bytes,
        unused_count=last.unused_count,
        freed_bytes=figures.freed_bytes,
        freed_count=figures.freed_count,
        obstacle=last.obstacle,
    )
    if last.due_at_s is not None:
        message.due_time.FromNanoseconds(int(last.due_at_s * 1e9))
    return message


def _departures_message(departures: Departures) -> pb.Departures:
    message = pb.Departures(
        counts={_CAUSES.get(why, why): count for why, count in departures.counts.items()},
        age_count=len(departures.idle_s),
    )
    if departures.idle_s:
        idle_s, resident_s = sorted(departures.idle_s), sorted(departures.resident_s)
        for duration, ages_s, share in (
            (message.median_idle_duration, idle_s, 0.5),
            (message.p90_idle_duration, idle_s, 0.9),
            (message.median_resident_duration, resident_s, 0.5),
            (message.p90_resident_duration, resident_s, 0.9),
        ):
            duration.FromTimedelta(timedelta(seconds=_quantile(ages_s, share)))
    return message


def _quantile(ascending: Sequence[float], share: float) -> float:
    """The least of the values that at least this share of them does not exceed."""
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)]


def _batches_message(figures: LaneFigures) -> pb.BatchFigures:
    message = pb.BatchFigures(
        batch_count=figures.batch_count,
        request_count=figures.request_count,
        row_count=figures.row_count,
        largest_request_count=figures.largest_request_count,
        largest_row_count=figures.largest_row_count,
        alone_count=figures.alone_count,
        unshared_count=figures.unshared_count,
        split_count=figures.split_count,
    )
    if figures.cell_count:
        message.padding_ratio = min(1.0, figures.padding_cell_count / figures.cell_count)
    return message


def _tier_message(tier: TierUse, measured_bytes: int) -> pb.HostTier:
    return pb.HostTier(
        budget_bytes=tier.budget,
        reserved_bytes=tier.reserved,
        resident_bytes=tier.resident,
        draining_bytes=tier.draining,
        quarantined_bytes=tier.quarantined,
        peak_bytes=tier.peak,
        saved_bytes=tier.saved,
        measured_bytes=measured_bytes,
        copy_count=tier.copies,
        kept_count=tier.kept_count,
        dropped_count=tier.dropped_count,
        promotion_count=tier.promotion_count,
    )


def _held_by(pids: Iterable[int]) -> int:
    """Bytes that processes hold together. Reading it takes milliseconds."""
    held = 0
    for pid in pids:
        with suppress(ProcessLookupError):  # It has died just now.
            held += read_process_memory(pid).proportional_bytes
    return held


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
