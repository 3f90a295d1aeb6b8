"""Watches of requests: values, and what a break makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from tests.support.fake_api import FakeServer, refuse

from modelyard import Admin, QueueFull, RecordedModel, RecordedRequest, RequestRecords, ServerError
from modelyard.v1 import admin_service_pb2 as pb
from modelyard.v1 import error_reason_pb2

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
START = Timestamp()
START.FromDatetime(NOON)


def telling(*messages: pb.WatchRequestsResponse) -> Callable[[Any, Any], Iterator[Any]]:
    """A stream of messages that breaks behind the last."""

    def handler(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield from messages
        context.abort(grpc.StatusCode.UNAVAILABLE, "broken")

    return handler


def test_messages_become_values(server: FakeServer, admin: Admin) -> None:
    request = pb.RecordedRequest(
        arrival_offset=Duration(seconds=3, nanos=500_000_000),
        arrival_time=START,
        key="k",
        model="models/m",
        device="devices/cpu",
        cold=True,
        wait_duration=Duration(seconds=2),
        load_duration=Duration(seconds=1),
        run_duration=Duration(nanos=1000),
        row_count=7,
    )
    refused = pb.RecordedRequest(
        arrival_time=START, key="no", reason=error_reason_pb2.ERROR_REASON_KEY_NOT_FOUND
    )
    models = [
        pb.RecordedModel(
            model="models/m",
            size_bytes=5,
            load_duration=Duration(seconds=1),
            copy_load_duration=Duration(nanos=500_000_000),
        ),
        pb.RecordedModel(model="models/n", size_bytes=6),
    ]
    server.answer(
        "WatchRequests",
        telling(
            pb.WatchRequestsResponse(start_time=START, models=models),
            pb.WatchRequestsResponse(start_time=START, requests=[request, refused], missed_count=4),
        ),
    )
    with admin.watch_requests() as watch:
        assert next(watch) == RequestRecords(
            started_at=NOON,
            models=(
                RecordedModel(model="models/m", size_bytes=5, load_s=1.0, copy_load_s=0.5),
                RecordedModel(model="models/n", size_bytes=6, load_s=None, copy_load_s=None),
            ),
            requests=(),
            missed_count=0,
            begins=True,
        )
        told = next(watch)
        assert (told.begins, told.missed_count, told.models) == (False, 4, ())
        assert told.requests[0] == RecordedRequest(
            arrival_s=3.5,
            arrived_at=NOON,
            key="k",
            model="models/m",
            device="devices/cpu",
            cold=True,
            wait_s=2.0,
            load_s=1.0,
            run_s=1e-6,
            row_count=7,
            reason=None,
        )
        second = told.requests[1]
        assert (second.reason, second.run_s, second.load_s) == ("KEY_NOT_FOUND", None, None)
        # The stream breaks here, and begins again: nothing tells where it could go on.
        assert next(watch).begins
        assert watch.position is None
    assert len(server.requests) == 2


def test_a_refusal_ends_it(server: FakeServer, admin: Admin) -> None:
    server.answer("WatchRequests", refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"))
    with admin.watch_requests() as watch, pytest.raises(QueueFull):
        next(watch)
    assert next(watch, None) is None


def test_a_time_out_of_range_is_the_servers_error(server: FakeServer, admin: Admin) -> None:
    odd = Timestamp(seconds=2**60)
    server.answer("WatchRequests", telling(pb.WatchRequestsResponse(start_time=odd)))
    with admin.watch_requests() as watch, pytest.raises(ServerError, match="cannot be read"):
        next(watch)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(admin: Admin, timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        admin.watch_requests(timeout_s=timeout_s)
