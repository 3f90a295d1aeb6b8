"""ModelStatistics: what models have done, and what they hold."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from modelyard.devices import Device, DeviceType
from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import Model
from modelyard_server.services.oip.meanings import ONLY_VERSION, Meanings
from modelyard_server.services.oip.messages import message
from modelyard_server.services.tallies import ModelTallies
from modelyard_server.transport.api import Call

__all__ = ["StatisticsService"]

_BREATH: Final = 64
"""Models that are told before the event loop has its turn."""


class StatisticsService:
    """Tells what models have done.

    Args:
        meanings: what names stand for.
        catalog: the registered models.
        tallies: what they have done.
        devices: by position.
    """

    def __init__(
        self,
        *,
        meanings: Meanings,
        catalog: Catalog,
        tallies: ModelTallies,
        devices: Sequence[Device],
    ) -> None:
        self._meanings = meanings
        self._catalog = catalog
        self._tallies = tallies
        self._devices = tuple(devices)

    async def model_statistics(self, request: Any, call: Call) -> Any:
        """See GRPCInferenceService.ModelStatistics."""
        response = message("ModelStatisticsResponse")()
        if request.name:
            meaning = self._meanings.of(request.name, request.version)
            for model in meaning.models:
                # A client looks for the name that it has asked for.
                name = meaning.name if len(meaning.models) == 1 else model.id
                self._fill(response.model_stats.add(), name, model)
            return response
        models = self._catalog.models()
        self._tallies.forget_all_but([model.id for model in models])
        for i, model in enumerate(models):
            self._fill(response.model_stats.add(), model.id, model)
            if i % _BREATH == _BREATH - 1:
                await asyncio.sleep(0)
        return response

    def _fill(self, entry: Any, name: str, model: Model) -> None:
        tally = self._tallies.of(model.id)
        entry.name = name
        entry.version = ONLY_VERSION
        entry.last_inference = tally.last_epoch_ms
        entry.inference_count = tally.row_count
        entry.execution_count = tally.answered_count
        figures, count = entry.inference_stats, tally.answered_count
        _set(figures.success, count, tally.answered_ns)
        _set(figures.fail, tally.failed_count, tally.failed_ns)
        _set(figures.queue, count, tally.waited_ns)
        _set(figures.compute_input, count, 0)
        _set(figures.compute_infer, count, tally.run_ns)
        _set(figures.compute_output, count, 0)
        _set(figures.cache_hit, 0, 0)
        _set(figures.cache_miss, 0, 0)
        for position, size_bytes in sorted(self._meanings.use(model).charges.items()):
            device = self._devices[position]
            entry.memory_usage.add(type=_type(device), id=device.id or 0, byte_size=size_bytes)


def _set(duration: Any, count: int, ns: int) -> None:
    # Also zeros: what is there can be told from what is not.
    duration.SetInParent()
    duration.count, duration.ns = count, ns


def _type(device: Device) -> str:
    return "GPU" if device.type is DeviceType.GPU else str(device.type.value).upper()
