"""An engine of threads: models live in this process.

Every device has a lane, which runs its models, and a loader thread, which loads and unloads them,
so that a hit on a device does not stand behind a load on it. Reading weights gives up the
interpreter's lock; what does not (building modules, tokenizers) is what a load still costs its
neighbours.

A model in parts on several devices is loaded and run by the threads of its home device, and by no
others: it is one call of one module, and whoever took turns between lanes in the middle of it would
stand behind other models' runs with half a result in hand. The disk runs and loads nothing, so it
has neither thread.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import monotonic

from modelyard_server.execution.batcher import BatchLimits
from modelyard_server.execution.copies import Copies, MadeCopy
from modelyard_server.execution.discipline import warm_threads
from modelyard_server.execution.engine import (
    DeviceMemory,
    EngineDevice,
    Loaded,
    OnMeasured,
    RunOutcome,
    Unloaded,
    Work,
    nobody,
)
from modelyard_server.execution.figures import LaneFigures
from modelyard_server.execution.freed_memory import give_back_freed
from modelyard_server.execution.lane import Lane, LaneJob, Seat
from modelyard_server.execution.memory import HeldModel, Leak, MeasuredMemory, drop
from modelyard_server.execution.model_runs import (
    ModelRun,
    is_out_of_memory,
    outcome_of,
    set_threads,
)
from modelyard_server.execution.transfer_pace import TransferPace
from modelyard_server.runtimes.api import (
    JsonValue,
    ModelFilesError,
    ModelSpec,
    OptionError,
    Price,
    Runtime,
)
from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.runtimes.targets import DISK, Place, Target
from modelyard_server.runtimes.tensors import TensorValue

__all__ = ["ThreadEngine"]

logger = logging.getLogger(__name__)

_PRICERS = 4


class ThreadEngine:
    """Models in threads of this process. See Engine for the contract.

    Args:
        devices: by their position in the yard.
        runtimes: by name.
        pace: how fast loads may be; default: as the devices say.
        copies: where copies of weights are kept; default: its own.
        batches: limits of what the lanes run at one time; default: those of BatchLimits.
        on_ran: is told a lane's figures by its thread, with the position of its device, whenever
            they have changed; must not raise.

    Attributes:
        on_measured: is told what runs took that were measured; None for nobody. Must not raise.
    """

    def __init__(
        self,
        *,
        devices: Sequence[EngineDevice],
        runtimes: Mapping[str, Runtime],
        pace: TransferPace | None = None,
        copies: Copies | None = None,
        batches: BatchLimits | None = None,
        on_ran: Callable[[int, LaneFigures], None] | None = None,
    ) -> None:
        self._devices = tuple(devices)
        self._runtimes = runtimes
        self.on_measured: OnMeasured | None = None
        self._pace = pace or TransferPace([device.transfer_bytes_per_s for device in devices])
        # By position. The disk has none.
        self._lanes: dict[int, Lane] = {}
        self._loaders: dict[int, Lane] = {}
        self._memory = [MeasuredMemory() for _ in devices]
        self._held: dict[int, HeldModel] = {}
        self._copies = copies or Copies()
        self._batches = batches or BatchLimits()
        self._on_ran = on_ran
        self._leaks: dict[int, list[Leak]] = {}
        self._stops: dict[int, threading.Event] = {}
        # Of their own, so that looking at one model's files does not wait for another's load; and
        # several, so that files that hang hold up only themselves.
        self._pricers: list[Lane] = []

    async def start(self, runtimes: Sequence[str]) -> None:
        """See Engine."""
        loop = asyncio.get_running_loop()
        for position, device in enumerate(self._devices):
            if device.torch_device != DISK:
                on_ran = None if self._on_ran is None else partial(self._on_ran, position)
                self._lanes[position] = Lane(f"lane-{device.name}", loop, self._batches, on_ran)
                self._loaders[position] = Lane(f"load-{device.name}", loop)
        self._copies.start()
        self._pricers += [Lane(f"price-{i}", loop) for i in range(_PRICERS)]
        for name in runtimes:
            if name not in self._runtimes:
                continue  # Of a newer version's catalog; its models say so when they are asked for.
            await self._pricers[0].call(self._runtimes[name].warm_up)
        threads = [(lane, self._devices[device].threads) for device, lane in self._lanes.items()]
        await warm_threads([*threads, *((loader, 1) for loader in self._loaders.values())])

    async def stop(self, timeout_s: float) -> bool:
        """See Engine."""
        for stop in self._stops.values():
            stop.set()
        threads = (*self._lanes.values(), *self._loaders.values(), *self._pricers)
        self._copies.begin_stop()
        ended = await asyncio.gather(
            *(lane.stop(timeout_s) for lane in threads), self._copies.stop(timeout_s)
        )
        for held in self._held.values():
            held.loaded.close()
        self._held.clear()
        self._lanes.clear()
        self._loaders.clear()
        self._pricers.clear()
        return all(ended)

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
        # The least busy one: whatever hangs in one of them must not take others' turns.
        pricer = min(self._pricers, key=lambda lane: lane.unfinished)
        try:
            return await pricer.call(partial(self._runtime(spec).price, spec))
        except (ModelFilesError, OptionError):
            raise
        except Exception as error:  # code of a model: whatever it raises is the model's failure
            logger.exception("pricing %s failed", spec.name)
            kind = type(error.__cause__ or error).__name__
            raise ModelFilesError(f"its runtime raised {kind} when it was priced") from None

    async def load(self, model: int, spec: ModelSpec, target: Target) -> Loaded:
        """See Engine.

        Raises:
            ValueError: the home of the target is a disk, or no device at all.
        """
        loader = self._loaders.get(target.home)
        if loader is None:
            raise ValueError(
                f"{spec.name} cannot be at home on device {target.home}: it has no lane"
            )
        stop = threading.Event()
        self._stops[model] = stop
        try:
            held = await loader.call(partial(self._load, spec, target, stop))
        finally:
            del self._stops[model]
        self._held[model] = held
        return Loaded(own_bytes=held.own_sizes, source=held.source)

    def cancel_load(self, model: int) -> None:
        """See Engine."""
        if (stop := self._stops.get(model)) is not None:
            stop.set()

    async def unload(
        self, model: int, *, keep: bool = False, most_bytes: int | None = None
    ) -> Unloaded:
        """See Engine."""
        held = self._held[model]
        if keep:
            self._copies.begin(model)
        del self._held[model]
        unload = partial(self._unload, model, held, keep, most_bytes)
        made, leaks = await self._loaders[held.home].call(unload)
        back = dict(held.sizes)
        if leaks:
            self._leaks.setdefault(model, []).extend(leaks)
            back |= {leak.device: 0 for leak in leaks}
        leaking = {leak.device for leak in leaks}
        for device, own_bytes in held.own_sizes.items():
            if device not in leaking:
                self._memory[device].take_off(own_bytes, held.shared.get(device, {}))
        if made is None:
            return Unloaded(freed=back)
        if not made.is_kept:
            return Unloaded(freed=back, refused_bytes=made.own_bytes)
        return Unloaded(freed=back, kept_bytes=made.own_bytes, keep_s=made.keep_s)

    async def drop_copy(self, model: int) -> bool:
        """See Engine."""
        return await self._copies.drop(model)

    async def recheck(self, model: int) -> Mapping[int, int]:
        """See Engine."""
        back: dict[int, int] = {}
        left: list[Leak] = []
        for leak in self._leaks.pop(model, []):
            if leak.is_held:
                left.append(leak)
            else:
                back[leak.device] = back.get(leak.device, 0) + leak.size_bytes
                self._memory[leak.device].take_off(leak.own_bytes, leak.shared)
        if left:
            self._leaks[model] = left
        for device in back:
            if (loader := self._loaders.get(device)) is not None:
                # Not waited for: the next model of this process has the bytes either way, and a
                # loader that hangs must not hold up what is found on other devices.
                give_back = partial(give_back_freed, (self._devices[device].torch_device,))
                loader.submit(LaneJob(give_back, lambda job: None))
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
        held = self._held[model]

        def deliver(job: LaneJob) -> None:
            if job.dropped:
                on_done(None)
            elif job.error is None:
                self._tell_measured(model)
                on_done(job.result)
            else:
                on_done(outcome_of(job.error))

        lane = self._lanes[held.home]
        if held.loaded.brief:
            job = LaneJob(partial(held.loaded.run, inputs, parameters), deliver)
            lane.submit_brief(job)
        else:
            threads = self._devices[held.home].threads
            run = ModelRun(held.loaded, threads, inputs, parameters)
            since = monotonic() - waited_s
            seat = Seat(group=model, client=client(), together=run, since=since)
            job = LaneJob(run.run, deliver, seat)
            lane.submit(job)
        return job

    def _tell_measured(self, model: int) -> None:
        held = self._held.get(model)
        if self.on_measured is None or held is None:
            return
        points = held.loaded.take_measured()
        if points:
            self.on_measured(model, points)

    def set_budget(self, device: int, budget_bytes: int) -> None:
        """See Engine. What the yard admits is all that is loaded here."""

    def set_copies_budget(self, budget_bytes: int) -> None:
        """See Engine. What the yard asks for is all that is kept here."""

    @property
    def pids(self) -> Mapping[str, int]:
        """See Engine: there are none."""
        return {}

    @property
    def figures(self) -> LaneFigures:
        """See Engine."""
        figures = LaneFigures()
        for lane in self._lanes.values():
            figures.add(lane.figures)
        return figures

    def memory(self, device: int) -> DeviceMemory:
        """See Engine."""
        return self._memory[device].read()

    @property
    def copies(self) -> DeviceMemory:
        """See Engine."""
        return self._copies.read()

    def _runtime(self, spec: ModelSpec) -> Runtime:
        try:
            return self._runtimes[spec.runtime]
        except KeyError:
            known = ", ".join(sorted(self._runtimes))
            raise OptionError(
                "runtime", f"{spec.runtime!r} is unknown; there are: {known}"
            ) from None

    def _load(self, spec: ModelSpec, target: Target, stop: threading.Event) -> HeldModel:
        names = {device: self._devices[device].torch_device for device in target.devices}
        try:
            set_threads(1)
            held = self._load_at_pace(spec, Place(target=target, torch_devices=names), stop)
        except BaseException as error:
            # The frames of the traceback hold what was loaded so far.
            forget_frames(error)
            was_out_of_memory = is_out_of_memory(error)
            if was_out_of_memory:
                # What was loaded so far has no witnesses yet, and a module that is half spread over
                # devices may be a cycle; it must be gone before somebody asks again.
                gc.collect()
            give_back_freed(names.values())
            if was_out_of_memory:
                raise MemoryError from None
            raise
        for device, own_bytes in held.own_sizes.items():
            self._memory[device].add(own_bytes, held.shared.get(device, {}))
        return held

    def _load_at_pace(self, spec: ModelSpec, place: Place, stop: threading.Event) -> HeldModel:
        began_s = self._pace.now_s()
        loaded = self._runtime(spec).load(spec, place=place, stop=stop.is_set)
        held = HeldModel(name=spec.name, home=place.target.home, sizes={}, loaded=loaded)
        try:
            held.source = loaded.source
            held.sizes = dict(loaded.measured_bytes())
            held.shared = loaded.shared_bytes()
            if strange := held.sizes.keys() - place.torch_devices.keys():
                raise RuntimeError(f"{spec.name} is on devices it was not given: {sorted(strange)}")
            self._pace.hold(held.sizes, began_s, stop)
        except BaseException:
            del loaded
            if drop(held):
                logger.error("%s kept memory although its load was given up", spec.name)
            raise
        return held

    def _unload(
        self, model: int, held: HeldModel, keep: bool, most_bytes: int | None
    ) -> tuple[MadeCopy | None, tuple[Leak, ...]]:
        made = self._copies.make(model, held, most_bytes) if keep else None
        leaks = drop(held)
        back = held.sizes.keys() - {leak.device for leak in leaks}
        give_back_freed([self._devices[device].torch_device for device in back])
        return made, leaks
