"""Models that are only tried: some requests are given to them when there is nothing else to do.

A shadow costs whoever asked nothing: it begins after the answer, when its device is idle; its model
is loaded only where there is free room and nobody waits; and what waits here is bounded, in number,
in bytes and in time. What becomes of it is counted and told to nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic_ns
from typing import Protocol

from modelyard_server.catalog.model import Model
from modelyard_server.errors import Refusal
from modelyard_server.residency.shell import Residency
from modelyard_server.runtimes.api import JsonValue
from modelyard_server.runtimes.tensors import TensorValue
from modelyard_server.services.asked import Asked
from modelyard_server.services.request_log import RequestFacts

__all__ = ["ShadowFigures", "Shadows", "size_of"]

logger = logging.getLogger(__name__)

_MOST = 64
_MOST_BYTES = 16 << 20
_MOST_AGE_NS = 10_000_000_000
_LOOK_S = 0.02
_RUN_S = 60.0
_LOAD_AGAIN_NS = 1_000_000_000
"""How long after a look for free room there is another."""


class _Runner(Protocol):
    async def answer(
        self,
        asked: Asked,
        facts: RequestFacts,
        timeout_s: float,
        client: Callable[[], str],
    ) -> tuple[TensorValue, ...]: ...

    def is_idle(self, device: int) -> bool: ...


class ShadowFigures:
    """What has become of requests that were to be tried."""

    def __init__(self) -> None:
        self.answered_count = 0
        self.failed_count = 0
        self.dropped_count = 0


@dataclass(frozen=True, slots=True)
class _Waiting:
    asked: Asked
    size_bytes: int
    since_ns: int


class Shadows:
    """Tries models with requests that others have answered.

    Args:
        models: runs one.
        residency: tells what is resident and where there is room.

    Attributes:
        figures: what has become of them.
    """

    def __init__(self, models: _Runner, residency: Residency) -> None:
        self.figures = ShadowFigures()
        self._models = models
        self._residency = residency
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._looked_ns: dict[int, int] = {}
        self._task: asyncio.Task[None] | None = None

    def add(
        self, model: Model, inputs: tuple[TensorValue, ...], parameters: Mapping[str, JsonValue]
    ) -> None:
        """Notes a request to be tried. What there is no room for is counted and dropped."""
        size_bytes = sum(size_of(value) for value in inputs)
        if len(self._waiting) >= _MOST or self._waiting_bytes + size_bytes > _MOST_BYTES:
            self.figures.dropped_count += 1
            return
        asked = Asked(model.id, model, inputs, parameters)
        self._waiting.append(_Waiting(asked, size_bytes, monotonic_ns()))
        self._waiting_bytes += size_bytes
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work(), name="shadows")

    async def stop(self) -> None:
        """Ends what is being tried."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _work(self) -> None:
        while self._waiting:
            first = self._waiting.popleft()
            self._waiting_bytes -= first.size_bytes
            try:
                await self._try(first)
            except Exception:
                self.figures.failed_count += 1
                logger.exception("shadow models/%s", first.asked.model.id)

    async def _try(self, waiting: _Waiting) -> None:
        handle = waiting.asked.model.handle
        while not self._may_begin(waiting.asked.model):
            if monotonic_ns() - waiting.since_ns > _MOST_AGE_NS:
                self.figures.dropped_count += 1
                return
            await asyncio.sleep(_LOOK_S)
        try:
            await self._models.answer(
                waiting.asked, RequestFacts(monotonic_ns()), _RUN_S, lambda: "shadow"
            )
        except Refusal as refusal:
            self.figures.failed_count += 1
            logger.info("shadow models/%s: %s", handle.name, refusal.text)
        else:
            self.figures.answered_count += 1

    def _may_begin(self, model: Model) -> bool:
        handle = model.handle
        if self._residency.is_resident(handle):
            return self._models.is_idle(self._residency.device_of(handle))
        now_ns = monotonic_ns()
        if now_ns - self._looked_ns.get(handle.core_id, -_LOAD_AGAIN_NS) < _LOAD_AGAIN_NS:
            return False
        self._looked_ns[handle.core_id] = now_ns
        # What follows asks for the model before anything else happens: nobody can come in between.
        return self._residency.fits_free(handle)


def size_of(value: TensorValue) -> int:
    """Bytes of a tensor's elements; of text its characters."""
    if isinstance(value.data, bytes):
        return len(value.data)
    return sum(len(element) for element in value.data)
