"""Admin: what a server tells of itself."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from tests.support.fake_api import FakeServer

from modelyard.admin import Admin
from modelyard.resources import (
    BatchFigures,
    Departures,
    HostTier,
    Regret,
    StoreCollected,
    StoreFigures,
)
from modelyard.v1 import admin_service_pb2

LIVE = ("recent_load_duration", "regret", "departures", "batches", "shadows", "store")
"""Fields of GetStatsResponse that are values of their own in the client."""


class TestServer:
    def test_the_server_tells_what_it_is(self, server: FakeServer, admin: Admin) -> None:
        server.answer(
            "GetServerInfo",
            lambda request, context: admin_service_pb2.GetServerInfoResponse(
                version="0.1.0",
                library_versions={"torch": "2.13.0"},
                start_time=Timestamp(seconds=1_700_000_000),
                eviction_policy="cost",
                runtimes=["identity", "torch"],
                process_id=12,
            ),
        )
        info = admin.info()
        assert (info.version, info.library_versions) == ("0.1.0", {"torch": "2.13.0"})
        assert info.started_at == datetime.fromtimestamp(1_700_000_000, UTC)
        assert (info.eviction_policy, info.runtimes) == ("cost", ("identity", "torch"))
        assert info.process_id == 12

    def test_the_server_tells_what_it_has_done(self, server: FakeServer, admin: Admin) -> None:
        message = admin_service_pb2.GetStatsResponse(
            answered_count=1,
            error_counts={"QUEUE_FULL": 2},
            hit_count=3,
            cold_count=4,
            load_count=5,
            load_failure_count=6,
            eviction_count=7,
            load_duration=Duration(seconds=8),
            active_request_count=9,
            waiting_request_count=10,
            process_resident_bytes=11,
            peak_process_resident_bytes=12,
        )
        server.answer("GetStats", lambda request, context: message)
        stats = dataclasses.asdict(admin.stats())
        assert stats == {
            **{
                field.name: getattr(message, field.name)
                for field in message.DESCRIPTOR.fields
                if field.name not in ("error_counts", "load_duration", "host_tier", *LIVE)
            },
            "error_counts": {"QUEUE_FULL": 2},
            "load_s": 8.0,
            "host_tier": None,
            # A server that is older than these says nothing of them.
            "recent_load_s": 0.0,
            "regret": None,
            "departures": None,
            "batches": None,
            "shadows": None,
            "store": None,
        }

    def test_the_server_tells_how_it_does(self, server: FakeServer, admin: Admin) -> None:
        batches = {
            field.name: number
            for number, field in enumerate(dataclasses.fields(BatchFigures), 1)
            if field.name != "padding_ratio"
        }
        message = admin_service_pb2.GetStatsResponse(
            recent_load_duration=Duration(seconds=1),
            regret=admin_service_pb2.Regret(
                lru_load_duration=Duration(seconds=5),
                regret_duration=Duration(seconds=-2, nanos=-500_000_000),
            ),
            departures=admin_service_pb2.Departures(
                counts={"MODEL": 3, "LOST": 1},
                age_count=3,
                median_idle_duration=Duration(seconds=1),
                p90_idle_duration=Duration(seconds=2),
                median_resident_duration=Duration(seconds=3),
                p90_resident_duration=Duration(seconds=4),
            ),
            batches=admin_service_pb2.BatchFigures(padding_ratio=0.25, **batches),
        )
        server.answer("GetStats", lambda request, context: message)
        stats = admin.stats()
        assert stats.recent_load_s == 1.0
        assert stats.regret == Regret(lru_load_s=5.0, regret_s=-2.5)
        assert stats.departures == Departures(
            counts={"LOST": 1, "MODEL": 3},
            age_count=3,
            median_idle_s=1.0,
            p90_idle_s=2.0,
            median_resident_s=3.0,
            p90_resident_s=4.0,
        )
        assert stats.batches == BatchFigures(padding_ratio=0.25, **batches)
        assert [field.name for field in dataclasses.fields(BatchFigures)] == [
            field.name for field in admin_service_pb2.BatchFigures.DESCRIPTOR.fields
        ]

    def test_what_has_not_been_yet_has_no_figure(self, server: FakeServer, admin: Admin) -> None:
        message = admin_service_pb2.GetStatsResponse(
            departures=admin_service_pb2.Departures(), batches=admin_service_pb2.BatchFigures()
        )
        server.answer("GetStats", lambda request, context: message)
        stats = admin.stats()
        assert stats.departures is not None and stats.departures.median_idle_s is None
        assert stats.batches is not None and stats.batches.padding_ratio is None

    def test_the_server_tells_of_its_store(self, server: FakeServer, admin: Admin) -> None:
        told: dict[str, Any] = {
            "stored_bytes": 1,
            "model_count": 2,
            "unused_bytes": 3,
            "unused_count": 4,
            "freed_bytes": 5,
            "freed_count": 6,
            "obstacle": "why",
        }
        message = admin_service_pb2.StoreFigures(due_time=Timestamp(seconds=7), **told)
        stats = admin_service_pb2.GetStatsResponse(store=message)
        server.answer("GetStats", lambda request, context: stats)
        store = StoreFigures(due_at=datetime.fromtimestamp(7, UTC), **told)
        assert admin.stats().store == store
        assert {field.name for field in dataclasses.fields(StoreFigures)} == {
            field.name.replace("due_time", "due_at") for field in message.DESCRIPTOR.fields
        }
        asked = []

        def collect(request: Any, context: Any) -> Any:
            asked.append(request)
            return admin_service_pb2.CollectStoreResponse(
                freed_bytes=8, freed_count=9, store=message
            )

        server.answer("CollectStore", collect)
        collected = StoreCollected(freed_bytes=8, freed_count=9, store=store)
        assert admin.collect_store() == collected
        assert admin.collect_store(keep_s=0, validate_only=True) == collected
        assert not asked[0].HasField("keep_duration") and not asked[0].validate_only
        assert asked[1].HasField("keep_duration") and asked[1].validate_only
        assert asked[1].keep_duration == Duration()
        for keep_s in (-1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="keep_s"):
                admin.collect_store(keep_s=keep_s)
        server.answer(
            "CollectStore", lambda request, context: admin_service_pb2.CollectStoreResponse()
        )
        assert admin.collect_store().store is None

    def test_the_server_tells_of_its_host_tier(self, server: FakeServer, admin: Admin) -> None:
        names = [field.name for field in dataclasses.fields(HostTier)]
        told = {name: number for number, name in enumerate(names, 1)}
        message = admin_service_pb2.GetStatsResponse(host_tier=admin_service_pb2.HostTier(**told))
        server.answer("GetStats", lambda request, context: message)
        tier = admin.stats().host_tier
        assert tier == HostTier(**told)
        assert tier.accounted_bytes == 2 + 3 + 4 + 5
        assert names == [field.name for field in admin_service_pb2.HostTier.DESCRIPTOR.fields]
