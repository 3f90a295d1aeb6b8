"""Messages about requests as values."""

from __future__ import annotations

from modelyard._admin_messages import time_from
from modelyard._predict_messages import seconds_from
from modelyard._status import reason_name
from modelyard.recordings import RecordedModel, RecordedRequest, RequestRecords
from modelyard.v1 import admin_service_pb2

__all__ = ["request_records_from"]


def request_records_from(
    message: admin_service_pb2.WatchRequestsResponse, *, begins: bool
) -> RequestRecords:
    """Return what a message tells.

    Args:
        message: what the server sent.
        begins: whether it is the first of its call.

    Raises:
        ValueError: a time is out of range.
    """
    return RequestRecords(
        started_at=time_from(message.start_time),
        models=tuple(map(_model_from, message.models)),
        requests=tuple(map(_request_from, message.requests)),
        missed_count=message.missed_count,
        begins=begins,
    )


def _model_from(message: admin_service_pb2.RecordedModel) -> RecordedModel:
    return RecordedModel(
        model=message.model,
        size_bytes=message.size_bytes,
        load_s=seconds_from(message.load_duration) if message.HasField("load_duration") else None,
        copy_load_s=(
            seconds_from(message.copy_load_duration)
            if message.HasField("copy_load_duration")
            else None
        ),
    )


def _request_from(message: admin_service_pb2.RecordedRequest) -> RecordedRequest:
    return RecordedRequest(
        arrival_s=seconds_from(message.arrival_offset),
        arrived_at=time_from(message.arrival_time),
        key=message.key,
        model=message.model,
        device=message.device,
        cold=message.cold,
        wait_s=seconds_from(message.wait_duration),
        load_s=seconds_from(message.load_duration) if message.HasField("load_duration") else None,
        run_s=seconds_from(message.run_duration) if message.HasField("run_duration") else None,
        row_count=message.row_count,
        reason=reason_name(message.reason),
    )
