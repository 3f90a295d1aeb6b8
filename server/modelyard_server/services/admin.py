"""modelyard.v1.AdminService."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version

from modelyard.v1 import admin_service_pb2 as pb
from modelyard_server.execution.engine import Engine
from modelyard_server.observability.process import (
    peak_resident_bytes,
    read_process_memory,
    resident_bytes,
)
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import TierUse
from modelyard_server.services.inference import InferenceFigures
from modelyard_server.transport.api import Call

__all__ = ["AdminService"]

_LIBRARIES = ("grpcio", "protobuf", "safetensors", "torch", "transformers")


class AdminService:
    """Tells what the server is and what it has done."""

    def __init__(
        self,
        *,
        residency: Residency,
        engine: Engine,
        figures: InferenceFigures,
        runtimes: Sequence[str],
    ) -> None:
        self._residency = residency
        self._engine = engine
        self._figures = figures
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
        tier = self._residency.tier_use()
        if tier is not None:
            response.host_tier.CopyFrom(_tier_message(tier, self._engine.copies.measured_bytes))
        return response


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
