"""The engine of threads with a runtime whose models do what the test says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from weakref import ReferenceType, ref

from modelyard_server.execution.engine import EngineDevice, RunOutcome, Work
from modelyard_server.execution.thread_engine import ThreadEngine
from modelyard_server.execution.transfer_pace import TransferPace
from modelyard_server.runtimes.api import (
    JsonValue,
    LoadedModel,
    ModelFilesError,
    ModelSpec,
    OptionError,
    Price,
    Runtime,
    StopCheck,
    Witness,
)
from modelyard_server.runtimes.targets import Place
from modelyard_server.runtimes.tensors import DType, TensorValue

__all__ = [
    "INPUT",
    "PATIENCE_S",
    "Answer",
    "BriefToy",
    "Toy",
    "ToyRuntime",
    "Weights",
    "running_engine",
    "spec_of",
    "toy_devices",
]

PATIENCE_S = 60
INPUT = TensorValue(name="x", dtype=DType.UINT8, shape=(3,), data=b"abc")


class Weights:
    """What a model holds on one device."""

    def __init__(self, device: int, size_bytes: int) -> None:
        self.device = device
        self.size_bytes = size_bytes


class Toy(LoadedModel):
    """Does what its runtime's on_run says.

    Attributes:
        parts: its weights, by position of the device.
    """

    def __init__(self, behaviour: Callable[[Any], Any]) -> None:
        self.parts: dict[int, Weights] = {}
        self._behaviour = behaviour

    def run(
        self, inputs: Sequence[TensorValue], parameters: Mapping[str, JsonValue]
    ) -> tuple[TensorValue, ...]:
        """Returns its inputs."""
        kept = tuple(self.parts.values())  # A local that an exception's frames would hold.
        assert kept, "it is run after it was closed"
        self._behaviour(self)
        return tuple(inputs)

    def measured_bytes(self) -> Mapping[int, int]:
        """Sizes of its parts."""
        return {device: part.size_bytes for device, part in self.parts.items()}

    def witnesses(self) -> tuple[Witness, ...]:
        """One for each part."""
        return tuple(
            Witness(device=device, reference=ref(part)) for device, part in self.parts.items()
        )

    def close(self) -> None:
        """Drops its parts."""
        self.parts.clear()


class BriefToy(Toy):
    """Runs in no time."""

    brief = True


class ToyRuntime(Runtime):
    """Loads toys of the sizes that their specs' options name.

    Attributes:
        on_load: called in the loader's thread after each part that came, with it and the stop
            check.
        on_run: called with the toy when it runs.
        kind: class of what is loaded.
        witnesses: to each part that ever was.
        loaded: to each toy that ever was.
        threads: names of the threads that loaded, one for each load.
        places: where to, one for each load.
    """

    def __init__(self) -> None:
        self.on_load: Callable[[Weights, StopCheck], None] = lambda weights, stop: None
        self.on_run: Callable[[Any], Any] = lambda toy: None
        self.kind: type[Toy] = Toy
        self.witnesses: list[ReferenceType[Weights]] = []
        self.loaded: list[ReferenceType[Toy]] = []
        self.threads: list[str] = []
        self.places: list[Place] = []
        self.warm_ups = 0

    @property
    def name(self) -> str:
        """What specs call it."""
        return "toy"

    def warm_up(self) -> None:
        """Counts."""
        self.warm_ups += 1

    def check(self, spec: ModelSpec) -> None:
        """Takes no task."""
        if spec.task:
            raise OptionError("task", "there is none")

    def price(self, spec: ModelSpec) -> Price:
        """Waits for option "gate", raises if option "broken", else the sum of the sizes."""
        if spec.options.get("broken"):
            raise ModelFilesError("cut short")
        if gate := spec.options.get("gate"):
            gate.wait(PATIENCE_S)
        size_bytes = sum(_sizes(spec, 0).values())
        return Price(resting_bytes=size_bytes, peak_bytes=size_bytes)

    def load(self, spec: ModelSpec, *, place: Place, stop: StopCheck) -> LoadedModel:
        """Makes one part after the other."""
        self.threads.append(threading.current_thread().name)
        self.places.append(place)
        toy = self.kind(self.on_run)
        self.loaded.append(ref(toy))
        for device, size_bytes in _sizes(spec, place.target.home).items():
            part = toy.parts[device] = Weights(device, size_bytes)
            self.witnesses.append(ref(part))
            self.on_load(part, stop)
        return toy


def _sizes(spec: ModelSpec, home: int) -> Mapping[int, int]:
    size = spec.options["size"]
    return size if isinstance(size, Mapping) else {home: size}


def spec_of(name: str = "m", size: int | Mapping[int, int] = 100, **options: Any) -> ModelSpec:
    """A toy that holds `size` bytes: on its home device, or by position of the device."""
    return ModelSpec(name=name, runtime="toy", options={"size": size} | options)


def toy_devices(*torch_devices: str) -> tuple[EngineDevice, ...]:
    """Devices toy0, toy1, ... with these torch names and one thread each."""
    return tuple(
        EngineDevice(name=f"toy{i}", torch_device=name, threads=1)
        for i, name in enumerate(torch_devices)
    )


@asynccontextmanager
async def running_engine(
    runtime: ToyRuntime, devices: Sequence[EngineDevice], *, pace: TransferPace | None = None
) -> AsyncIterator[ThreadEngine]:
    """An engine of toys; afterwards no thread of it is left and nothing was lost on the loop."""
    unexpected: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: unexpected.append(context))
    before = set(threading.enumerate())
    made = ThreadEngine(devices=devices, runtimes={"toy": runtime}, pace=pace)
    await made.start(["toy"])
    try:
        yield made
    finally:
        await asyncio.wait_for(made.stop(PATIENCE_S), PATIENCE_S)
    left = [t.name for t in set(threading.enumerate()) - before if "toy" in t.name]
    assert not left
    assert not unexpected


class Answer:
    """The outcome of a run."""

    def __init__(self, engine: ThreadEngine, model: int, *inputs: TensorValue) -> None:
        self.outcomes: list[RunOutcome | None] = []
        self._done = asyncio.Event()
        self.work: Work = engine.run(model, inputs or (INPUT,), {}, self._on_done)

    def _on_done(self, outcome: RunOutcome | None) -> None:
        self.outcomes.append(outcome)
        self._done.set()

    async def get(self) -> RunOutcome | None:
        """The outcome, once it is there."""
        async with asyncio.timeout(PATIENCE_S):
            await self._done.wait()
        (outcome,) = self.outcomes
        return outcome
