"""modelyard.v1.ResidencyService."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from modelyard.v1 import residency_pb2
from modelyard.v1 import residency_service_pb2 as pb
from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import Model
from modelyard_server.catalog.registry import Registry
from modelyard_server.catalog.writes import Writes
from modelyard_server.errors import Reason, Refusal
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import ModelHandle
from modelyard_server.services.models import model_id_of
from modelyard_server.services.paging import page
from modelyard_server.services.residency_messages import residency_message
from modelyard_server.transport.api import Call

__all__ = ["ResidencyService"]


class ResidencyService:
    """Loads, unloads and pins models by hand, and tells where each stands.

    Args:
        catalog: which models there are.
        registry: how they are pinned.
        residency: which are in memory.
        writes: keeps changes apart.
        device_names: resource names of the devices, by position.
        max_deadline_s: longest that a call waits.
        forgive: lets a model be loaded at once that was barred for bringing its workers down, or
            whose last load has failed.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        registry: Registry,
        residency: Residency,
        writes: Writes,
        device_names: Sequence[str],
        max_deadline_s: float,
        forgive: Callable[[ModelHandle], None],
    ) -> None:
        self._catalog = catalog
        self._registry = registry
        self._residency = residency
        self._writes = writes
        self._device_names = tuple(device_names)
        self._max_deadline_s = max_deadline_s
        self._forgive = forgive

    async def load_model(self, request: pb.LoadModelRequest, call: Call) -> pb.LoadModelResponse:
        """See ResidencyService.LoadModel."""
        model = self._model(request.model)
        self._forgive(model.handle)
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
        async with self._writes.alone():
            model = self._model(request.model)
            self._forgive(model.handle)
            await self._registry.set_pinned(model, True)
        return pb.PinModelResponse(residency=self._message(model))

    async def unpin_model(self, request: pb.UnpinModelRequest, call: Call) -> pb.UnpinModelResponse:
        """See ResidencyService.UnpinModel."""
        async with self._writes.alone():
            model = self._model(request.model)
            await self._registry.set_pinned(model, False)
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
        return residency_message(model.id, use, self._device_names)
