"""modelyard.v1.ResidencyService."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from modelyard.v1 import residency_pb2
from modelyard.v1 import residency_service_pb2 as pb
from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import Model
from modelyard_server.errors import Reason, Refusal
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import State
from modelyard_server.services.models import model_id_of
from modelyard_server.services.paging import page
from modelyard_server.transport.api import Call

__all__ = ["ResidencyService"]

_STATES = {
    State.COLD: residency_pb2.RESIDENCY_STATE_COLD,
    State.QUEUED: residency_pb2.RESIDENCY_STATE_QUEUED,
    State.LOADING: residency_pb2.RESIDENCY_STATE_LOADING,
    State.RESIDENT: residency_pb2.RESIDENCY_STATE_RESIDENT,
    State.DRAINING: residency_pb2.RESIDENCY_STATE_DRAINING,
    State.UNLOADING: residency_pb2.RESIDENCY_STATE_UNLOADING,
    State.FAILED: residency_pb2.RESIDENCY_STATE_FAILED,
}


class ResidencyService:
    """Loads, unloads and pins models by hand, and tells where each stands."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        residency: Residency,
        device_names: Sequence[str],
        max_deadline_s: float,
    ) -> None:
        self._catalog = catalog
        self._residency = residency
        self._device_names = tuple(device_names)
        self._max_deadline_s = max_deadline_s

    async def load_model(self, request: pb.LoadModelRequest, call: Call) -> pb.LoadModelResponse:
        """See ResidencyService.LoadModel."""
        model = self._model(request.model)
        self._residency.want(model.handle)
        return pb.LoadModelResponse(residency=self._message(model))

    async def unload_model(
        self, request: pb.UnloadModelRequest, call: Call
    ) -> pb.UnloadModelResponse:
        """See ResidencyService.UnloadModel."""
        model = self._model(request.model)
        limit = self._max_deadline_s
        if call.remaining_s is not None:
            limit = min(limit, call.remaining_s * 0.95)
        try:
            async with asyncio.timeout(limit):
                await self._residency.unload(model.handle)
        except TimeoutError:
            raise Refusal(
                Reason.DEADLINE_IN_QUEUE,
                "the deadline passed before the model's memory was back; the unload goes on",
            ) from None
        return pb.UnloadModelResponse(residency=self._message(model))

    async def pin_model(self, request: pb.PinModelRequest, call: Call) -> pb.PinModelResponse:
        """See ResidencyService.PinModel."""
        model = self._model(request.model)
        # The wish first: if it is refused, the model is not pinned either.
        self._residency.want(model.handle)
        self._residency.set_pinned(model.handle, True)
        return pb.PinModelResponse(residency=self._message(model))

    async def unpin_model(self, request: pb.UnpinModelRequest, call: Call) -> pb.UnpinModelResponse:
        """See ResidencyService.UnpinModel."""
        model = self._model(request.model)
        self._residency.set_pinned(model.handle, False)
        return pb.UnpinModelResponse(residency=self._message(model))

    async def list_residencies(
        self, request: pb.ListResidenciesRequest, call: Call
    ) -> pb.ListResidenciesResponse:
        """See ResidencyService.ListResidencies."""
        chosen, token = page(
            self._catalog.models(),
            size=request.page_size,
            token=request.page_token,
            name=lambda model: model.id,
        )
        return pb.ListResidenciesResponse(
            residencies=[self._message(model) for model in chosen], next_page_token=token
        )

    def _model(self, name: str) -> Model:
        return self._catalog.get(model_id_of(name, "model"))

    def _message(self, model: Model) -> residency_pb2.Residency:
        use = self._residency.use(model.handle)
        message = residency_pb2.Residency(
            name=f"residencies/{model.id}",
            model=f"models/{model.id}",
            state=_STATES[use.state],
            charges=self._charges(use.charges),
            pinned=use.pinned,
            lease_count=use.lease_count,
            waiting_request_count=use.waiting_count,
            load_count=use.load_count,
            quarantined=self._charges(use.quarantined),
        )
        if use.load_duration_s is not None:
            message.load_duration.FromTimedelta(timedelta(seconds=use.load_duration_s))
        if use.state is State.FAILED:
            message.failure.message = use.failure_text
            message.failure.transient = use.failure_transient
            message.failure.attempt_count = use.failure_count
            retry = datetime.now(UTC) + timedelta(seconds=use.retry_in_s)
            message.failure.retry_time.FromDatetime(retry)
        return message

    def _charges(self, charges: Mapping[int, int]) -> list[residency_pb2.DeviceCharge]:
        return [
            residency_pb2.DeviceCharge(device=self._device_names[device], size_bytes=size)
            for device, size in sorted(charges.items())
        ]
