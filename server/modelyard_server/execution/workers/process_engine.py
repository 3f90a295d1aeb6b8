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
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from modelyard_server.execution.engine import (
    DeviceMemory,
    EngineDevice,
    Loaded,
    ModelFailed,
    OnLost,
    OnMeasured,
    RunOutcome,
    Unloaded,
    Work,
    WorkerDeath,
    nobody,
)
from modelyard_server.execution.figures import LaneFigures
from modelyard_server.execution.workers.answers import (
    back_of,
    is_back_of,
    loaded_of,
    measured_of,
    outcome_of,
    price_of,
    unloaded_of,
)
from modelyard_server.execution.workers.copy_holders import CopyHolders
from modelyard_server.execution.workers.crew import Crew, Group
from modelyard_server.execution.workers.framing import MalformedMessage
from modelyard_server.execution.workers.keeper import Keeper, NoWorker
from modelyard_server.execution.workers.payload import understand
from modelyard_server.execution.workers.records import encode_spec, encode_target, plain
from modelyard_server.execution.workers.settings import RuntimeSource, WorkerSettings
from modelyard_server.execution.workers.shortages import Shortage, add_sizes, take_off
from modelyard_server.execution.workers.worker_process import (
    Answer,
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
        on_measured: is told what runs took that were measured; None for nobody. Must not raise.
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
        self.on_measured: OnMeasured | None = None
        self._runtimes: Mapping[str, Runtime] = source.make()
        self._held: dict[int, _Held] = {}
        self._loading: dict[int, _Loading] = {}
        self._short: dict[int, list[Shortage]] = {}
        self._copies = CopyHolders()
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

    def set_copies_budget(self, budget_bytes: int) -> None:
        """Lets each worker of models have as much more memory as copies may hold."""
        self._crew.set_copies_budget(budget_bytes)

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
        self._copies.clear()
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
            price = self._read(worker, partial(price_of, answer))
            if price is not None:
                return price
        raise ModelFilesError("its files could not be looked at now", transient=True)

    async def load(self, model: int, spec: ModelSpec, target: Target) -> Loaded:
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
            loaded = await self._load(model, encoded, target, group, loading)
        finally:
            del self._loading[model]
        self._crew.warm_up(runtime)
        return loaded

    def cancel_load(self, model: int) -> None:
        """See Engine."""
        loading = self._loading.get(model)
        if loading is not None:
            loading.is_cancelled = True
            if loading.worker is not None:
                loading.worker.tell("cancel", model=model)

    async def unload(
        self, model: int, *, keep: bool = False, most_bytes: int | None = None
    ) -> Unloaded:
        """See Engine. What was in a worker that has gone is back once its process is over."""
        held = self._held[model]
        if keep:
            self._copies.begin(model)
        del self._held[model]
        kept_in: WorkerProcess | None = None
        try:
            unloaded = await self._unload(model, held, keep, most_bytes)
            if unloaded.kept_bytes is not None:
                kept_in = held.worker
        finally:
            if keep:
                self._copies.end(model, kept_in)
        return unloaded

    async def drop_copy(self, model: int) -> bool:
        """See Engine. What was in a worker that has gone is back once its process is over."""
        if self._copies.is_being_made(model):
            return False
        worker = self._copies.holder(model)
        if worker is None:
            return True
        try:
            answer = await worker.ask("drop_copy", model=model)
            is_back = self._read(worker, partial(is_back_of, answer))
        except WorkerGone:
            is_back = None
        if is_back is None:
            await asyncio.shield(worker.exited)
        elif not is_back:
            return False
        self._copies.forget(model, worker)
        return True

    async def recheck(self, model: int) -> Mapping[int, int]:
        """See Engine."""
        back: dict[int, int] = {}
        asked: set[WorkerProcess] = set()
        for short in list(self._short.get(model, ())):
            if short.worker.exited.done():
                add_sizes(back, short.sizes)
                short.sizes.clear()
            elif short.worker not in asked:
                asked.add(short.worker)
                add_sizes(back, await self._recheck(model, short.worker))
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
        client: Callable[[], str] = nobody,
        waited_s: float = 0.0,
    ) -> Work:
        """See Engine."""
        worker = self._held[model].worker
        run = _Run(worker)

        def deliver(outcome: Answer | WorkerGone) -> None:
            run.is_over = True
            if isinstance(outcome, Answer) and "measured" in outcome.message:
                points = self._read(worker, partial(measured_of, outcome))
                if points and self.on_measured is not None:
                    self.on_measured(model, points)
            on_done(outcome_of(outcome))

        try:
            run.call = worker.call(
                "run",
                deliver,
                model=model,
                limit_s=self._settings.run_limit_s,
                tensors=inputs,
                parameters=plain(parameters) if parameters else {},
                client=client(),
                waited_s=waited_s,
            )
        except WorkerGone as gone:
            on_done(outcome_of(gone))
            return _Over()
        except ValueError as error:  # Too large to be sent, whoever the model is.
            on_done(ModelFailed("ValueError", str(error)))
            return _Over()
        return run

    def memory(self, device: int) -> DeviceMemory:
        """See Engine."""
        return self._crew.memory.read(device)

    @property
    def figures(self) -> LaneFigures:
        """See Engine."""
        return self._crew.figures

    @property
    def copies(self) -> DeviceMemory:
        """See Engine."""
        return self._crew.memory.read_copies()

    # --- Loads ------------------------------------------------------------------------------------

    @property
    def _count(self) -> int:
        return len(self._devices)

    async def _load(
        self, model: int, encoded: Any, target: Target, group: Group, loading: _Loading
    ) -> Loaded:
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
            read = self._read(worker, partial(loaded_of, answer, target, self._count))
            if read is None:
                raise _files_error("loaded", "it did not say what it holds")
            loaded, held = read
            self._crew.memory.note(worker)
            self._held[model] = _Held(worker, held)
            return loaded
        raise ModelFilesError("its workers died before its load began", transient=True)

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

    async def _unload(
        self, model: int, held: _Held, keep: bool, most_bytes: int | None
    ) -> Unloaded:
        worker = held.worker
        # Keeping is work like loading: it may fail like that, and is limited like that.
        limit_s = self._settings.load_limit_s if keep else None
        unloaded: Unloaded | None = None
        with contextlib.suppress(WorkerGone):
            answer = await worker.ask(
                "unload", model=model, limit_s=limit_s, keep=keep, most_bytes=most_bytes
            )
            unloaded = self._read(
                worker, partial(unloaded_of, answer, held.sizes, keep, self._count, most_bytes)
            )
        if unloaded is None:
            await asyncio.shield(worker.exited)
            return Unloaded(freed=dict(held.sizes))
        self._crew.memory.note(worker)
        short = {
            device: size - unloaded.freed.get(device, 0) for device, size in held.sizes.items()
        }
        short = {device: size for device, size in short.items() if size > 0}
        if short:
            self._short.setdefault(model, []).append(Shortage(worker, short))
        return unloaded

    async def _recheck(self, model: int, worker: WorkerProcess) -> Mapping[int, int]:
        shorts = [short for short in self._short.get(model, ()) if short.worker is worker]
        try:
            answer = await worker.ask("recheck", model=model)
        except WorkerGone:
            await asyncio.shield(worker.exited)
            back: dict[int, int] = {}
            for short in shorts:
                add_sizes(back, short.sizes)
                short.sizes.clear()
            return back
        said = self._read(worker, partial(back_of, answer, self._count))
        if said is None:
            return {}
        self._crew.memory.note(worker)
        return take_off(shorts, said)

    # --- Workers ----------------------------------------------------------------------------------

    def _on_end(self, worker: WorkerProcess, end: WorkerEnd) -> None:
        copies = self._copies.lost(worker)
        if self.on_lost is None:
            return
        death = WorkerDeath(
            worker=worker.name,
            models=frozenset(model for model, held in self._held.items() if held.worker is worker),
            copies=copies,
            suspects=end.suspects,
            cause=end.cause,
        )
        self.on_lost(death)

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


def _files_error(done: str, cause: str) -> ModelFilesError:
    return ModelFilesError(f"its worker died while it was {done} ({cause})", transient=True)
