"""An engine whose loads, unloads and runs end when the test says so, and as the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modelyard_server.execution.engine import DeviceMemory, RunOutcome
from modelyard_server.runtimes.api import JsonValue, LoadCancelled, ModelSpec, Price
from modelyard_server.runtimes.tensors import TensorValue

__all__ = ["FakeClock", "FakeEngine", "FakeRun", "PendingLoad", "PendingUnload", "turns"]

_TURNS = 12


async def turns(count: int = _TURNS) -> None:
    """Lets the event loop go round, so that whatever is ready runs."""
    for _ in range(count):
        await asyncio.sleep(0)


class FakeClock:
    """Nanoseconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, seconds: float) -> None:
        """Lets time pass. No timer of the loop hears of it."""
        self.now_ns += round(seconds * 1e9)


class PendingLoad:
    """A load that runs until it is ended."""

    def __init__(self, model: int, spec: ModelSpec, device: int) -> None:
        self.model = model
        self.spec = spec
        self.device = device
        self.cancelled = False
        self.future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def finish(self, size_bytes: int) -> None:
        """It holds size_bytes."""
        self.future.set_result(size_bytes)

    def fail(self, error: Exception) -> None:
        """It holds nothing."""
        self.future.set_exception(error)


class PendingUnload:
    """An unload that runs until it is ended."""

    def __init__(self, model: int, size_bytes: int) -> None:
        self.model = model
        self.size_bytes = size_bytes
        self.future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def finish(self, leaked: int = 0) -> None:
        """All is back but `leaked` bytes."""
        self.future.set_result(self.size_bytes - leaked)


class FakeRun:
    """A piece of work that runs until it is ended."""

    def __init__(
        self,
        model: int,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, JsonValue],
        on_done: Callable[[RunOutcome | None], None],
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.parameters = parameters
        self.abandoned = False
        self._on_done = on_done

    def abandon(self) -> None:
        """Nobody wants the answer."""
        self.abandoned = True

    def finish(self, outcome: RunOutcome | None = ()) -> None:
        """It has really ended."""
        self._on_done(outcome)


class FakeEngine:
    """See Engine.

    Attributes:
        prices: peak bytes, by the model's name; 100 for others.
        price_errors: what pricing raises, by the model's name.
        price_gate: pricing waits for it, if it is set.
        check_error: what check raises.
        loads: loads that run, by model.
        load_log: names in the order their loads began.
        unloads: unloads that run, by model.
        held: bytes and device of what is loaded, by model.
        back: what the next recheck of a model finds on a device.
        rechecks: models in the order they were looked at again.
        runs: what was given to run.
        run_error: what run raises.
    """

    def __init__(self) -> None:
        self.prices: dict[str, int] = {}
        self.price_errors: dict[str, Exception] = {}
        self.price_gate: asyncio.Event | None = None
        self.priced: list[str] = []
        self.check_error: Exception | None = None
        self.checked: list[ModelSpec] = []
        self.loads: dict[int, PendingLoad] = {}
        self.load_log: list[str] = []
        self.unloads: dict[int, PendingUnload] = {}
        self.held: dict[int, tuple[int, int]] = {}
        self.back: dict[tuple[int, int], int] = {}
        self.rechecks: list[int] = []
        self.runs: list[FakeRun] = []
        self.run_error: Exception | None = None

    async def start(self, runtimes: Sequence[str]) -> None:
        """Does nothing."""

    async def stop(self, timeout_s: float) -> bool:
        """Does nothing."""
        return True

    def check(self, spec: ModelSpec) -> None:
        """Raises check_error."""
        self.checked.append(spec)
        if self.check_error is not None:
            raise self.check_error

    def check_request(
        self,
        spec: ModelSpec,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, JsonValue],
    ) -> None:
        """Finds nothing wrong."""

    async def price(self, spec: ModelSpec) -> Price:
        """Waits for the gate, then raises or answers."""
        self.priced.append(spec.name)
        if self.price_gate is not None:
            await self.price_gate.wait()
        if (error := self.price_errors.get(spec.name)) is not None:
            raise error
        size_bytes = self.prices.get(spec.name, 100)
        return Price(resting_bytes=size_bytes, peak_bytes=size_bytes)

    async def load(self, model: int, spec: ModelSpec, device: int) -> int:
        """Waits until the test ends it."""
        assert model not in self.loads, "one load of a model at a time"
        assert model not in self.held, "it is loaded already"
        pending = self.loads[model] = PendingLoad(model, spec, device)
        self.load_log.append(spec.name)
        try:
            size_bytes = await pending.future
        finally:
            del self.loads[model]
        self.held[model] = (size_bytes, device)
        return size_bytes

    def cancel_load(self, model: int) -> None:
        """Ends a load that runs, if the test has not."""
        if (pending := self.loads.get(model)) is not None:
            pending.cancelled = True
            if not pending.future.done():
                pending.fail(LoadCancelled())

    async def unload(self, model: int) -> int:
        """Waits until the test ends it."""
        size_bytes, _ = self.held.pop(model)
        pending = self.unloads[model] = PendingUnload(model, size_bytes)
        try:
            return await pending.future
        finally:
            del self.unloads[model]

    async def recheck(self, model: int, device: int) -> int:
        """Answers with what the test put there, once."""
        self.rechecks.append(model)
        return self.back.pop((model, device), 0)

    def run(
        self,
        model: int,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, Any],
        on_done: Callable[[RunOutcome | None], None],
    ) -> FakeRun:
        """Runs until the test ends it."""
        if self.run_error is not None:
            raise self.run_error
        run = FakeRun(model, inputs, parameters, on_done)
        self.runs.append(run)
        return run

    def memory(self, device: int) -> DeviceMemory:
        """What is loaded there."""
        size_bytes = sum(size for size, where in self.held.values() if where == device)
        return DeviceMemory(measured_bytes=size_bytes, peak_measured_bytes=size_bytes)
