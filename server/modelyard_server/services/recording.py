"""WatchRequests: what became of each request, and what the models are that they asked for."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from datetime import UTC, datetime, timedelta
from time import monotonic_ns
from typing import NamedTuple

from google.protobuf.duration_pb2 import Duration

from modelyard.v1 import admin_service_pb2 as pb
from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import Model
from modelyard_server.errors import QuotaViolation, Reason, Refusal
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import State
from modelyard_server.services.request_log import RequestFacts, RequestLog
from modelyard_server.transport.api import Call

__all__ = ["RecordingService"]

_PAGE = 500
"""Most requests or models in a message."""

_MOST_WATCHES = 8
_RETRY_S = 5.0
_MOST_KEY = 256


class _Told(NamedTuple):
    """What a watch has been told of a model."""

    size_bytes: int
    load_s: float | None
    copy_load_s: float | None


class RecordingService:
    """Tells of requests.

    Args:
        log: of requests.
        catalog: the registered models.
        residency: where each model stands.
    """

    def __init__(self, *, log: RequestLog, catalog: Catalog, residency: Residency) -> None:
        self._log = log
        self._catalog = catalog
        self._residency = residency
        self._began_ns = monotonic_ns()
        self._began = datetime.now(UTC)

    async def watch_requests(
        self, request: pb.WatchRequestsRequest, call: Call
    ) -> AsyncGenerator[pb.WatchRequestsResponse, None]:
        """See AdminService.WatchRequests."""
        log = self._log
        if log.follower_count >= _MOST_WATCHES:
            text = f"{_MOST_WATCHES} watches of requests are open already"
            raise Refusal(
                Reason.QUEUE_FULL,
                text,
                quota=(QuotaViolation("watches", text),),
                retry_after_s=_RETRY_S,
            )
        told: dict[str, _Told] = {}
        with log.following() as number:
            models = self._news((model.id for model in self._catalog.models()), told)
            for start in range(0, max(1, len(models)), _PAGE):
                yield self._message(models=models[start : start + _PAGE])
            while True:
                await log.wait(number)
                facts, missed, number = log.after(number, most=_PAGE)
                yield self._message(
                    models=self._news(dict.fromkeys(each.model for each in facts), told),
                    requests=map(self._request_message, facts),
                    missed_count=missed,
                )

    def _message(
        self,
        *,
        models: Iterable[pb.RecordedModel],
        requests: Iterable[pb.RecordedRequest] = (),
        missed_count: int = 0,
    ) -> pb.WatchRequestsResponse:
        message = pb.WatchRequestsResponse(
            models=models, requests=requests, missed_count=missed_count
        )
        message.start_time.FromDatetime(self._began)
        return message

    def _news(self, ids: Iterable[str], told: dict[str, _Told]) -> list[pb.RecordedModel]:
        """What is known of models beyond what a watch was told; it counts as told then."""
        messages = []
        for model_id in ids:
            try:
                model = self._catalog.get(model_id)
            except Refusal:
                continue  # Of a request that asked for none, or deleted since.
            before = told.get(model_id)
            now = self._known(model, before)
            if now != before:
                told[model_id] = now
                messages.append(_model_message(model_id, now))
        return messages

    def _known(self, model: Model, before: _Told | None) -> _Told:
        use = self._residency.use(model.handle)
        if use.state is State.RESIDENT:
            size_bytes = sum(use.charges.values())
        else:
            size_bytes = model.estimated_bytes if before is None else before.size_bytes
        return _Told(size_bytes, use.file_load_duration_s, use.copy_duration_s)

    def _request_message(self, facts: RequestFacts) -> pb.RecordedRequest:
        message = pb.RecordedRequest(
            key=facts.key[:_MOST_KEY],
            model=f"models/{facts.model}" if facts.model else "",
            device=facts.device,
            cold=facts.cold,
            row_count=facts.row_count,
        )
        offset_ns = facts.arrived_ns - self._began_ns
        message.arrival_offset.FromNanoseconds(offset_ns)
        message.arrival_time.FromDatetime(self._began + timedelta(microseconds=offset_ns // 1000))
        waited_until_ns = facts.leased_ns or facts.ended_ns
        message.wait_duration.FromNanoseconds(waited_until_ns - facts.arrived_ns)
        if facts.leased_ns:
            message.run_duration.FromNanoseconds(facts.ended_ns - facts.leased_ns)
        if facts.load_s is not None:
            _set_seconds(message.load_duration, facts.load_s)
        if facts.reason is not None:
            message.reason = facts.reason.number  # type: ignore[assignment]  # an enum's value
        return message


def _model_message(model_id: str, told: _Told) -> pb.RecordedModel:
    message = pb.RecordedModel(model=f"models/{model_id}", size_bytes=told.size_bytes)
    if told.load_s is not None:
        _set_seconds(message.load_duration, told.load_s)
    if told.copy_load_s is not None:
        _set_seconds(message.copy_load_duration, told.copy_load_s)
    return message


def _set_seconds(duration: Duration, seconds: float) -> None:
    duration.FromNanoseconds(round(seconds * 1e9))
