"""An engine whose loads, unloads and runs end when the test says so, and as the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modelyard_server.execution.engine import DeviceMemory, Loaded, RunOutcome, Unloaded, nobody
from modelyard_server.execution.figures import LaneFigures
from modelyard_server.runtimes.api import JsonValue, LoadCancelled, LoadSource, ModelSpec, Price
from modelyard_server.runtimes.targets import Structure, Target
from modelyard_server.runtimes.tensors import TensorValue

__all__ = [
    "FakeClock",
    "FakeEngine",
    "FakeRun",
    "PendingDrop",
    "PendingLoad",
    "PendingUnload",
    "turns",
]

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
    """A load that runs until it is ended.

    Args:
        model: its id.
        spec: what is loaded.
        target: where to.
        sizes: bytes it holds in the end, by position of the device, if the test says nothing else.
    """

    def __init__(
        self, model: int, spec: ModelSpec, target: Target, sizes: Mapping[int, int]
    ) -> None:
        self.model = model
        self.spec = spec
        self.target = target
        self.sizes = sizes
        self.cancelled = False
        loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Loaded] = loop.create_future()

    @property
    def device(self) -> int:
        """The home device."""
        return self.target.home

    def finish(
        self,
        sizes: int | Mapping[int, int] | None = None,
        *,
        source: LoadSource = LoadSource.STORAGE,
    ) -> None:
        """It holds these bytes: a number is all on the home device, None is what was declared."""
        own_bytes = _by_device(self.sizes if sizes is None else sizes, self.device)
        self.future.set_result(Loaded(own_bytes=own_bytes, source=source))

    def fail(self, error: Exception) -> None:
        """It holds nothing."""
        self.future.set_exception(error)


class PendingUnload:
    """An unload that runs until it is ended.

    Args:
        model: its id.
        home: position of its home device.
        sizes: bytes it holds, by position of the device.
        keep: its weights are to be kept.
    """

    def __init__(self, model: int, home: int, sizes: Mapping[int, int], keep: bool) -> None:
        self.model = model
        self.home = home
        self.sizes = sizes
        self.keep = keep
        self.most_bytes: int | None = None
        loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Unloaded] = loop.create_future()

    def finish(
        self,
        leaked: int | Mapping[int, int] = 0,
        *,
        kept_bytes: int | None = None,
        keep_s: float = 0.0,
        refused_bytes: int | None = None,
    ) -> None:
        """All is back but the leaked bytes; a number is on the home device.

        Args:
            leaked: these.
            kept_bytes: own bytes of the copy that was made; None for no copy.
            keep_s: how long that took.
            refused_bytes: what a copy would have held that was not allowed to.
        """
        assert kept_bytes is None or self.keep, "nobody asked for a copy"
        missing = _by_device(leaked, self.home)
        back = {device: size - missing.get(device, 0) for device, size in self.sizes.items()}
        self.future.set_result(
            Unloaded(freed=back, kept_bytes=kept_bytes, keep_s=keep_s, refused_bytes=refused_bytes)
        )


class PendingDrop:
    """A copy that is being dropped until that is ended.

    Args:
        model: its id.
    """

    def __init__(self, model: int) -> None:
        self.model = model
        self.future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def finish(self, is_back: bool = True) -> None:
        """Its memory is back, or somebody still reads from it."""
        self.future.set_result(is_back)


def _by_device(sizes: int | Mapping[int, int], home: int) -> Mapping[int, int]:
    return {home: sizes} if isinstance(sizes, int) else dict(sizes)


class FakeRun:
    """A piece of work that runs until it is ended."""

    def __init__(
        self,
        model: int,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, JsonValue],
        on_done: Callable[[RunOutcome | None], None],
        waited_s: float = 0.0,
    ) -> None:
        self.model = model
        self.waited_s = waited_s
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
        structures: what models are made of, by their name; others cannot be cut.
        shared: what of its price a model shares when it is whole on one device, by its name.
        sizes: bytes that a model holds once loaded, by its name and by position of the device;
            others hold their price on their home device. Tests may say otherwise load by load.
        price_errors: what pricing raises, by the model's name.
        price_gate: pricing waits for it, if it is set.
        check_error: what check raises.
        loads: loads that run, by model.
        load_log: names in the order their loads began.
        unloads: unloads that run, by model.
        drops: copies that are being dropped, by model.
        kept: own bytes of the copies that are there, by model.
        held: bytes of what is loaded, by model and by position of the device.
        homes: position of the home device of what is loaded, by model.
        back: what the next recheck finds, by model and device.
        rechecks: models in the order they were looked at again.
        runs: what was given to run.
        run_error: what run raises.
        budgets: what was set, by position of the device.
        copies_budget: what was set for copies.
    """

    def __init__(self) -> None:
        self.prices: dict[str, int] = {}
        self.structures: dict[str, Structure] = {}
        self.shared: dict[str, Mapping[str, int]] = {}
        self.sizes: dict[str, Mapping[int, int]] = {}
        self.price_errors: dict[str, Exception] = {}
        self.price_gate: asyncio.Event | None = None
        self.priced: list[str] = []
        self.check_error: Exception | None = None
        self.checked: list[ModelSpec] = []
        self.loads: dict[int, PendingLoad] = {}
        self.load_log: list[str] = []
        self.unloads: dict[int, PendingUnload] = {}
        self.drops: dict[int, PendingDrop] = {}
        self.kept: dict[int, int] = {}
        self.held: dict[int, Mapping[int, int]] = {}
        self.homes: dict[int, int] = {}
        self.back: dict[tuple[int, int], int] = {}
        self.rechecks: list[int] = []
        self.runs: list[FakeRun] = []
        self.run_error: Exception | None = None
        self.budgets: dict[int, int] = {}
        self.copies_budget = 0

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
        structure = self.structures.get(spec.name)
        return Price(
            resting_bytes=size_bytes,
            peak_bytes=size_bytes,
            structure=structure,
            shared=self.shared.get(spec.name, {}),
        )

    async def load(self, model: int, spec: ModelSpec, target: Target) -> Loaded:
        """Waits until the test ends it."""
        assert model not in self.loads, "one load of a model at a time"
        assert model not in self.held, "it is loaded already"
        shared = self.shared.get(spec.name, {}) if target.is_whole else {}
        shared_bytes = sum(shared.values())
        own_bytes = self.prices.get(spec.name, 100) - shared_bytes
        sizes = self.sizes.get(spec.name, {target.home: own_bytes})
        pending = self.loads[model] = PendingLoad(model, spec, target, sizes)
        self.load_log.append(spec.name)
        try:
            loaded = await pending.future
        finally:
            del self.loads[model]
        assert set(loaded.own_bytes) <= set(target.devices), "bytes on devices it was not given"
        self.held[model] = {
            device: size + (shared_bytes if device == target.home else 0)
            for device, size in loaded.own_bytes.items()
        }
        self.homes[model] = target.home
        return loaded

    def cancel_load(self, model: int) -> None:
        """Ends a load that runs, if the test has not."""
        if (pending := self.loads.get(model)) is not None:
            pending.cancelled = True
            if not pending.future.done():
                pending.fail(LoadCancelled())

    async def unload(
        self, model: int, *, keep: bool = False, most_bytes: int | None = None
    ) -> Unloaded:
        """Waits until the test ends it."""
        assert not keep or model not in self.kept, "there is a copy already"
        sizes, home = self.held.pop(model), self.homes.pop(model)
        pending = self.unloads[model] = PendingUnload(model, home, sizes, keep)
        pending.most_bytes = most_bytes
        try:
            unloaded = await pending.future
        finally:
            del self.unloads[model]
        if unloaded.kept_bytes is not None:
            self.kept[model] = unloaded.kept_bytes
        return unloaded

    async def drop_copy(self, model: int) -> bool:
        """Waits until the test ends it, if there is a copy."""
        if model not in self.kept:
            return True
        assert model not in self.drops, "it is being dropped already"
        pending = self.drops[model] = PendingDrop(model)
        try:
            is_back = await pending.future
        finally:
            del self.drops[model]
        if is_back:
            self.kept.pop(model, None)
        return is_back

    async def recheck(self, model: int) -> Mapping[int, int]:
        """Answers with what the test put there, once."""
        self.rechecks.append(model)
        found = [key for key in self.back if key[0] == model]
        return {device: self.back.pop((model, device)) for _, device in found}

    def run(
        self,
        model: int,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, Any],
        on_done: Callable[[RunOutcome | None], None],
        client: Callable[[], str] = nobody,
        waited_s: float = 0.0,
    ) -> FakeRun:
        """Runs until the test ends it."""
        if self.run_error is not None:
            raise self.run_error
        run = FakeRun(model, inputs, parameters, on_done, waited_s)
        self.runs.append(run)
        return run

    def set_budget(self, device: int, budget_bytes: int) -> None:
        """Remembers it."""
        self.budgets[device] = budget_bytes

    def set_copies_budget(self, budget_bytes: int) -> None:
        """Remembers it."""
        self.copies_budget = budget_bytes

    @property
    def pids(self) -> Mapping[str, int]:
        """There are none."""
        return {}

    def memory(self, device: int) -> DeviceMemory:
        """What is loaded there."""
        size_bytes = sum(sizes.get(device, 0) for sizes in self.held.values())
        return DeviceMemory(measured_bytes=size_bytes, peak_measured_bytes=size_bytes)

    @property
    def figures(self) -> LaneFigures:
        """Nothing has run."""
        return LaneFigures()

    @property
    def copies(self) -> DeviceMemory:
        """What copies hold beside what they share."""
        size_bytes = sum(self.kept.values())
        return DeviceMemory(measured_bytes=size_bytes, peak_measured_bytes=size_bytes)
