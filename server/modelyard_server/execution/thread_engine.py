"""An engine of threads: models live in this process.

Every device has a lane, which runs its models, and a loader thread, which loads and unloads them,
so that a hit on a device does not stand behind a load on it. Reading weights gives up the
interpreter's lock; what does not (building modules, tokenizers) is what a load still costs its
neighbours.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ReferenceType

from modelyard_server.execution.engine import (
    DeviceMemory,
    EngineDevice,
    ModelFailed,
    RunOutcome,
    Work,
)
from modelyard_server.execution.lane import Lane, LaneJob
from modelyard_server.runtimes.api import (
    JsonValue,
    LoadedModel,
    ModelFilesError,
    ModelSpec,
    OptionError,
    Price,
    Runtime,
)
from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.runtimes.tensors import TensorError, TensorValue

__all__ = ["ThreadEngine"]

logger = logging.getLogger(__name__)

_PRICERS = 4


@dataclass(slots=True)
class _Held:
    """A model that is in memory."""

    device: int
    size_bytes: int
    loaded: LoadedModel


@dataclass(slots=True)
class _Leak:
    """What an unload could not get back."""

    device: int
    size_bytes: int
    witnesses: tuple[ReferenceType[Any], ...]


@dataclass(slots=True)
class _Memory:
    """Measured bytes of a device; written from its loader thread and from the loop."""

    now: int = 0
    peak: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, size_bytes: int) -> None:
        with self.lock:
            self.now += size_bytes
            self.peak = max(self.peak, self.now)


def _return_freed_pages() -> None:
    """Gives the allocator's free pages back to the system, where it is glibc.

    A dead model's small allocations otherwise stay with the process, and a server that loads and
    unloads all day grows by them (measured: 1.4 GB after 200 cycles; 1.5 % with this).
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        logger.debug("this C library has no malloc_trim")


class ThreadEngine:
    """Models in threads of this process. See Engine for the contract.

    Args:
        devices: by their position in the yard.
        runtimes: by name.
    """

    def __init__(self, *, devices: Sequence[EngineDevice], runtimes: Mapping[str, Runtime]) -> None:
        self._devices = tuple(devices)
        self._runtimes = runtimes
        self._lanes: list[Lane] = []
        self._loaders: list[Lane] = []
        self._memory = [_Memory() for _ in devices]
        self._held: dict[int, _Held] = {}
        self._leaks: dict[int, list[_Leak]] = {}
        self._stops: dict[int, threading.Event] = {}
        # Of their own, so that looking at one model's files does not wait for another's load; and
        # several, so that files that hang hold up only themselves.
        self._pricers: list[Lane] = []

    async def start(self, runtimes: Sequence[str]) -> None:
        """See Engine."""
        loop = asyncio.get_running_loop()
        for device in self._devices:
            self._lanes.append(Lane(f"lane-{device.name}", loop))
            self._loaders.append(Lane(f"load-{device.name}", loop))
        self._pricers += [Lane(f"price-{i}", loop) for i in range(_PRICERS)]
        for name in runtimes:
            await self._pricers[0].call(self._runtimes[name].warm_up)

    async def stop(self, timeout_s: float) -> bool:
        """See Engine."""
        for stop in self._stops.values():
            stop.set()
        threads = (*self._lanes, *self._loaders, *self._pricers)
        ended = await asyncio.gather(*(lane.stop(timeout_s) for lane in threads))
        for held in self._held.values():
            held.loaded.close()
        for started in (self._held, self._lanes, self._loaders, self._pricers):
            started.clear()
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

    async def load(self, model: int, spec: ModelSpec, device: int) -> int:
        """See Engine."""
        stop = threading.Event()
        self._stops[model] = stop
        try:
            held = await self._loaders[device].call(partial(self._load, spec, device, stop))
        finally:
            del self._stops[model]
        self._held[model] = held
        return held.size_bytes

    def cancel_load(self, model: int) -> None:
        """See Engine."""
        if (stop := self._stops.get(model)) is not None:
            stop.set()

    async def unload(self, model: int) -> int:
        """See Engine."""
        held = self._held.pop(model)
        device, size_bytes = held.device, held.size_bytes
        leak = await self._loaders[device].call(partial(_drop, held))
        if leak is not None:
            self._leaks.setdefault(model, []).append(leak)
            return 0
        self._memory[device].add(-size_bytes)
        return size_bytes

    async def recheck(self, model: int, device: int) -> int:
        """See Engine."""
        leaks = self._leaks.pop(model, [])
        back = [leak for leak in leaks if leak.device == device and not _alive(leak.witnesses)]
        if left := [leak for leak in leaks if leak not in back]:
            self._leaks[model] = left
        size_bytes = sum(leak.size_bytes for leak in back)
        self._memory[device].add(-size_bytes)
        return size_bytes

    def run(
        self,
        model: int,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, JsonValue],
        on_done: Callable[[RunOutcome | None], None],
    ) -> Work:
        """See Engine."""
        held = self._held[model]

        def deliver(job: LaneJob) -> None:
            if job.dropped:
                on_done(None)
            elif job.error is None:
                on_done(job.result)
            else:
                on_done(_outcome_of(job.error))

        lane = self._lanes[held.device]
        if held.loaded.brief:
            job = LaneJob(partial(held.loaded.run, inputs, parameters), deliver)
            lane.submit_brief(job)
        else:
            threads = self._devices[held.device].threads
            job = LaneJob(partial(_run, held.loaded, threads, inputs, parameters), deliver)
            lane.submit(job)
        return job

    def memory(self, device: int) -> DeviceMemory:
        """See Engine."""
        memory = self._memory[device]
        with memory.lock:
            return DeviceMemory(measured_bytes=memory.now, peak_measured_bytes=memory.peak)

    def _runtime(self, spec: ModelSpec) -> Runtime:
        try:
            return self._runtimes[spec.runtime]
        except KeyError:
            known = ", ".join(sorted(self._runtimes))
            raise OptionError(
                "runtime", f"{spec.runtime!r} is unknown; there are: {known}"
            ) from None

    def _load(self, spec: ModelSpec, device: int, stop: threading.Event) -> _Held:
        try:
            _set_threads(1)
            loaded = self._runtime(spec).load(
                spec, device=self._devices[device].torch_device, stop=stop.is_set
            )
        except BaseException as error:
            # The frames of the traceback hold what was loaded so far.
            forget_frames(error)
            _return_freed_pages()
            if _is_out_of_memory(error):
                raise MemoryError from None
            raise
        size_bytes = loaded.measured_bytes()
        self._memory[device].add(size_bytes)
        return _Held(device=device, size_bytes=size_bytes, loaded=loaded)


def _set_threads(threads: int) -> None:
    """Sets torch's intra-op threads for work of this thread, where torch is used at all.

    A server of models without torch does not import it: its process stays a tenth of the size.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _run(
    loaded: LoadedModel,
    threads: int,
    inputs: Sequence[TensorValue],
    parameters: Mapping[str, JsonValue],
) -> tuple[TensorValue, ...]:
    _set_threads(threads)
    return loaded.run(inputs, parameters)


def _drop(held: _Held) -> _Leak | None:
    """Drops a model and looks whether its memory is back. None if it is."""
    witnesses = held.loaded.witnesses()
    try:
        held.loaded.close()
    except Exception as error:
        # Whether its memory is back is what the witnesses say, not how it took its leave.
        logger.exception("a model failed while it was closed")
        forget_frames(error)
    leak = _Leak(device=held.device, size_bytes=held.size_bytes, witnesses=witnesses)
    del held.loaded
    if _alive(witnesses):
        # Models go by reference count alone; only a cycle through user code needs this.
        gc.collect()
    if _alive(witnesses):
        return leak
    _return_freed_pages()
    return None


def _alive(witnesses: tuple[ReferenceType[Any], ...]) -> bool:
    return any(witness() is not None for witness in witnesses)


def _is_out_of_memory(error: BaseException) -> bool:
    """True for torch's ways of saying so; its class for accelerators, its text for the host."""
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _outcome_of(error: BaseException) -> BaseException:
    """What the loop gets for what the model raised, without the frames that hold its tensors."""
    if isinstance(error, TensorError | OptionError):
        forget_frames(error)
        return error.with_traceback(None)
    text = "".join(traceback.format_exception(error))
    forget_frames(error)
    return ModelFailed(type(error).__name__, text)
