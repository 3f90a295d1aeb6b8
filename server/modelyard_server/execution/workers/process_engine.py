"""The engine of worker processes: what a model does to its process, it does to nobody else.

The server's process, in which gRPC runs, holds no model and imports no framework. It checks specs
and requests itself, with runtimes of its own that touch no files. Everything else happens in
workers, each of which is an engine of threads that is spoken to over a channel:

    one for files    prices models: reads headers, builds empty modules. Files come from outside.
    one a group      loads and runs the models of a group of devices.

Workers are forked from a zygote that has imported everything. When one dies its models are gone,
its memory is free, and the next one is there in a fraction of a second. What was running is told
that it may be to blame; what only stood in line is told to ask again; loads and looks at files that
had not begun are given to the next worker without a word. Who is to blame how often, and what is
loaded again, is decided by whoever is told (on_lost).

What a worker says is checked before it is believed: it is the process in which models run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from modelyard_server.execution.engine import (
    DeviceMemory,
    EngineDevice,
    ModelFailed,
    OnLost,
    RunOutcome,
    Work,
    WorkerDeath,
    WorkerLost,
)
from modelyard_server.execution.workers.crew import Crew, Group
from modelyard_server.execution.workers.framing import MalformedMessage
from modelyard_server.execution.workers.keeper import Keeper, NoWorker
from modelyard_server.execution.workers.payload import understand
from modelyard_server.execution.workers.records import (
    decode_bytes,
    decode_price,
    encode_spec,
    encode_target,
    plain,
)
from modelyard_server.execution.workers.settings import RuntimeSource, WorkerSettings
from modelyard_server.execution.workers.worker_process import (
    Answer,
    ModelMissing,
    WorkerEnd,
    WorkerGone,
    WorkerProcess,
)
from modelyard_server.runtimes.api import (
    JsonValue,
    LoadCancelled,
    ModelFilesError,
    ModelSpec,
    OptionError,
    Price,
    Runtime,
)
from modelyard_server.runtimes.targets import DISK, Target
from modelyard_server.runtimes.tensors import TensorValue

__all__ = ["ProcessEngine"]

T = TypeVar("T")

_TRIES = 3
"""How many workers in a row a call is given to that begins in none of them."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A model that is loaded, or was when its worker went.

    Attributes:
        worker: that it is in.
        sizes: all bytes it holds, by position of the device.
    """

    worker: WorkerProcess
    sizes: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class _Short:
    """Bytes that an unload could not get back."""

    worker: WorkerProcess
    sizes: dict[int, int]


@dataclass(slots=True)
class _Loading:
    """A load that runs or waits for a worker."""

    is_cancelled: bool = False
    worker: WorkerProcess | None = None


@dataclass(slots=True)
class _Run:
    """A run in a worker. See Work."""

    worker: WorkerProcess
    call: int = 0
    is_over: bool = False

    def abandon(self) -> None:
        """See Work."""
        if not self.is_over:
            self.worker.tell("abandon", call=self.call)


@dataclass(frozen=True, slots=True)
class _Over:
    """A run that ended before it began."""

    def abandon(self) -> None:
        """See Work."""


class ProcessEngine:
    """Models in worker processes. See Engine for the contract. Linux only.

    Args:
        devices: by their position in the yard.
        source: of the runtimes.
        settings: limits of the workers.
        budgets: bytes of each device, by position. Workers are kept from having more memory than
            these and the headroom; None for no such limit.

    Attributes:
        on_lost: is told when a worker of models dies; None for nobody. To be set before start.
    """

    def __init__(
        self,
        *,
        devices: Sequence[EngineDevice],
        source: RuntimeSource,
        settings: WorkerSettings | None = None,
        budgets: Sequence[int] | None = None,
    ) -> None:
        self._devices = tuple(devices)
        self._settings = settings or WorkerSettings()
        self.on_lost: OnLost | None = None
        self._runtimes: Mapping[str, Runtime] = source.make()
        self._held: dict[int, _Held] = {}
        self._loading: dict[int, _Loading] = {}
        self._short: dict[int, list[_Short]] = {}
        self._crew = Crew(
            devices=self._devices,
            source=source,
            settings=self._settings,
            budgets=budgets,
            on_end=self._on_end,
        )

    @property
    def pids(self) -> Mapping[str, int]:
        """Numbers of the processes there are, by what they are called."""
        return self._crew.pids

    def set_budget(self, device: int, budget_bytes: int) -> None:
        """Lets the worker of a device have as much memory as its budget now says."""
        self._crew.set_budget(device, budget_bytes)

    # --- Engine -----------------------------------------------------------------------------------

    async def start(self, runtimes: Sequence[str]) -> None:
        """See Engine. To be called before gRPC starts.

        Raises:
            NoWorker: the workers do not start.
        """
        await self._crew.start(name for name in runtimes if name in self._runtimes)

    async def stop(self, timeout_s: float) -> bool:
        """See Engine. Afterwards none of its processes is left, whatever it returns."""
        for loading in self._loading.values():
            loading.is_cancelled = True
        ended = await self._crew.stop(timeout_s)
        self._held.clear()
        self._short.clear()
        return ended

    def check(self, spec: ModelSpec) -> None:
        """See Engine."""
        self._runtime(spec).check(spec)

    def check_request(
        self,
        spec: ModelSpec,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, JsonValue],
    ) -> None:
        """See Engine."""
        self._runtime(spec).check_request(spec, inputs, parameters)

    async def price(self, spec: ModelSpec) -> Price:
        """See Engine."""
        self._runtime(spec)
        encoded = _encoded(spec)
        for _ in range(_TRIES):
            worker = await _ready(self._crew.files)
            try:
                answer = await worker.ask(
                    "price", limit_s=self._settings.price_limit_s, spec=encoded
                )
            except WorkerGone as gone:
                if gone.is_suspect:
                    raise _files_error("priced", gone.cause) from None
                continue
            price = self._read(worker, partial(_price_of, answer))
            if price is not None:
                return price
        raise ModelFilesError("its files could not be looked at now", transient=True)

    async def load(self, model: int, spec: ModelSpec, target: Target) -> Mapping[int, int]:
        """See Engine.

        Raises:
            ValueError: the home of the target is a disk, or no device at all.
            OptionError: its parts lie in several groups.
        """
        runtime = self._runtime(spec).name
        group = self._group_of(spec, target)
        encoded = _encoded(spec)
        loading = self._loading[model] = _Loading()
        try:
            own = await self._load(model, encoded, target, group, loading)
        finally:
            del self._loading[model]
        self._crew.warm_up(runtime)
        return own

    def cancel_load(self, model: int) -> None:
        """See Engine."""
        loading = self._loading.get(model)
        if loading is not None:
            loading.is_cancelled = True
            if loading.worker is not None:
                loading.worker.tell("cancel", model=model)

    async def unload(self, model: int) -> Mapping[int, int]:
        """See Engine. What was in a worker that has gone is back once its process is over."""
        held = self._held.pop(model)
        worker = held.worker
        try:
            answer = await worker.ask("unload", model=model)
        except WorkerGone:
            await asyncio.shield(worker.exited)
            return dict(held.sizes)
        back = self._read(worker, lambda: decode_bytes(answer.message["result"], self._count))
        if back is None or any(size > held.sizes.get(device, 0) for device, size in back.items()):
            worker.kill("gave back what it did not have")
            await asyncio.shield(worker.exited)
            return dict(held.sizes)
        self._crew.memory.note(worker)
        short = {device: size - back.get(device, 0) for device, size in held.sizes.items()}
        short = {device: size for device, size in short.items() if size > 0}
        if short:
            self._short.setdefault(model, []).append(_Short(worker, short))
        return back

    async def recheck(self, model: int) -> Mapping[int, int]:
        """See Engine."""
        back: dict[int, int] = {}
        asked: set[WorkerProcess] = set()
        for short in list(self._short.get(model, ())):
            if short.worker.exited.done():
                _add(back, short.sizes)
                short.sizes.clear()
            elif short.worker not in asked:
                asked.add(short.worker)
                _add(back, await self._recheck(model, short.worker))
        left = [short for short in self._short.pop(model, ()) if short.sizes]
        if left:
            self._short[model] = left
        return back

    def run(
        self,
        model: int,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, JsonValue],
        on_done: Callable[[RunOutcome | None], None],
    ) -> Work:
        """See Engine."""
        worker = self._held[model].worker
        run = _Run(worker)

        def deliver(outcome: Answer | WorkerGone) -> None:
            run.is_over = True
            on_done(_outcome_of(outcome))

        try:
            run.call = worker.call(
                "run",
                deliver,
                model=model,
                limit_s=self._settings.run_limit_s,
                tensors=inputs,
                parameters=plain(parameters) if parameters else {},
            )
        except WorkerGone as gone:
            on_done(_outcome_of(gone))
            return _Over()
        except ValueError as error:  # Too large to be sent, whoever the model is.
            on_done(ModelFailed("ValueError", str(error)))
            return _Over()
        return run

    def memory(self, device: int) -> DeviceMemory:
        """See Engine."""
        return self._crew.memory.read(device)

    # --- Loads ------------------------------------------------------------------------------------

    @property
    def _count(self) -> int:
        return len(self._devices)

    async def _load(
        self, model: int, encoded: Any, target: Target, group: Group, loading: _Loading
    ) -> Mapping[int, int]:
        for _ in range(_TRIES):
            worker = await _ready(group.keeper)
            if loading.is_cancelled:
                raise LoadCancelled
            loading.worker = worker
            try:
                answer = await worker.ask(
                    "load",
                    model=model,
                    limit_s=self._settings.load_limit_s,
                    spec=encoded,
                    target=encode_target(target),
                )
            except WorkerGone as gone:
                loading.worker = None
                if gone.is_suspect:
                    raise _files_error("loaded", gone.cause) from None
                continue
            sizes = self._read(worker, partial(self._sizes_of, answer, target))
            if sizes is None:
                raise _files_error("loaded", "it did not say what it holds")
            own, held = sizes
            self._crew.memory.note(worker)
            self._held[model] = _Held(worker, held)
            return own
        raise ModelFilesError("its workers died before its load began", transient=True)

    def _sizes_of(self, answer: Answer, target: Target) -> tuple[dict[int, int], dict[int, int]]:
        own = decode_bytes(answer.message["result"], self._count)
        held = decode_bytes(answer.message["held"], self._count)
        if not own.keys() <= held.keys() <= set(target.devices):
            raise ValueError("it is on devices it was not given")
        return own, held

    def _group_of(self, spec: ModelSpec, target: Target) -> Group:
        home = target.home
        if not 0 <= home < self._count or self._devices[home].torch_device == DISK:
            raise ValueError(f"{spec.name} cannot be at home on device {home}: it has no lane")
        group = self._crew.groups[self._devices[home].group]
        for device in target.devices:
            if device not in group.devices:
                raise OptionError(
                    "placement",
                    f"{self._devices[home].name} and {self._devices[device].name} are of different "
                    "groups; the parts of a model must be in one",
                )
        return group

    async def _recheck(self, model: int, worker: WorkerProcess) -> Mapping[int, int]:
        shorts = [short for short in self._short.get(model, ()) if short.worker is worker]
        try:
            answer = await worker.ask("recheck", model=model)
        except WorkerGone:
            await asyncio.shield(worker.exited)
            back: dict[int, int] = {}
            for short in shorts:
                _add(back, short.sizes)
                short.sizes.clear()
            return back
        said = self._read(worker, lambda: decode_bytes(answer.message["result"], self._count))
        if said is None:
            return {}
        self._crew.memory.note(worker)
        return _take_off(shorts, said)

    # --- Workers ----------------------------------------------------------------------------------

    def _on_end(self, worker: WorkerProcess, end: WorkerEnd) -> None:
        if self.on_lost is None:
            return
        models = frozenset(model for model, held in self._held.items() if held.worker is worker)
        self.on_lost(
            WorkerDeath(worker=worker.name, models=models, suspects=end.suspects, cause=end.cause)
        )

    def _read(self, worker: WorkerProcess, read: Callable[[], T]) -> T | None:
        """Reads something out of an answer; None, and the worker dies, if it cannot be read."""
        try:
            return understand(read)
        except MalformedMessage as error:
            worker.kill(f"sent what cannot be understood ({error.text})")
            return None

    def _runtime(self, spec: ModelSpec) -> Runtime:
        try:
            return self._runtimes[spec.runtime]
        except KeyError:
            known = ", ".join(sorted(self._runtimes))
            raise OptionError(
                "runtime", f"{spec.runtime!r} is unknown; there are: {known}"
            ) from None


async def _ready(keeper: Keeper) -> WorkerProcess:
    try:
        return await keeper.ready()
    except NoWorker as error:
        raise ModelFilesError(error.text, transient=True) from None


def _encoded(spec: ModelSpec) -> Any:
    try:
        return encode_spec(spec)
    except TypeError as error:
        raise OptionError("options", str(error)) from None


def _price_of(answer: Answer) -> Price:
    return decode_price(answer.message["result"])


def _files_error(done: str, cause: str) -> ModelFilesError:
    return ModelFilesError(f"its worker died while it was {done} ({cause})", transient=True)


def _outcome_of(outcome: Answer | WorkerGone) -> RunOutcome | None:
    if isinstance(outcome, WorkerGone):
        if outcome.is_suspect:
            return ModelFailed("WorkerDied", f"its worker died while it ran ({outcome.cause})")
        return WorkerLost(f"its worker died ({outcome.cause})")
    if isinstance(outcome.error, ModelMissing):
        return WorkerLost("its worker does not have it any more")
    if outcome.error is not None:
        return outcome.error
    return outcome.tensors if "result" in outcome.message else None


def _add(sizes: dict[int, int], more: Mapping[int, int]) -> None:
    for device, size_bytes in more.items():
        sizes[device] = sizes.get(device, 0) + size_bytes


def _take_off(shorts: Sequence[_Short], said: Mapping[int, int]) -> dict[int, int]:
    """Takes what is said to be back off what is missing. Returns what was really taken off."""
    back: dict[int, int] = {}
    for device, size_bytes in said.items():
        for short in shorts:
            taken = min(size_bytes, short.sizes.get(device, 0))
            if taken:
                short.sizes[device] -= taken
                size_bytes -= taken
                _add(back, {device: taken})
    for short in shorts:
        for device in [device for device, left in short.sizes.items() if not left]:
            del short.sizes[device]
    return back
