"""Loads and unloads: tasks that do what the core asked for, and say what became of it.

A load that fails in whatever way ends as one of the core's three kinds of failure and a text for
people; an unload that does not get everything back is looked at again until it has.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Protocol

from modelyard_server import _core
from modelyard_server.devices.placed import PlacedAs, shared_of
from modelyard_server.errors import Refusal
from modelyard_server.execution.engine import Engine, Loaded, Unloaded
from modelyard_server.residency.values import MAX_BYTES, ModelHandle
from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError, OptionError
from modelyard_server.runtimes.targets import Target

__all__ = ["Outcomes", "Transfers"]

logger = logging.getLogger(__name__)

_RECHECK_S = (0.1, 1.0, 5.0, 30.0)
"""When an unload's missing memory is looked for again; the last one repeats. And at each unload.
For a copy's memory likewise."""


class Outcomes(Protocol):
    """What is told of how transfers end. Called on the event loop's thread."""

    def repriced(self, handle: ModelHandle, ways: Sequence[PlacedAs]) -> None:
        """A model turned out to need more before its load began; it is given up (load_failed)."""

    def loaded(self, handle: ModelHandle, target: Target, loaded: Loaded, took_s: float) -> None:
        """A load has ended well."""

    def load_failed(self, handle: ModelHandle, failure: _core.LoadFailure) -> None:
        """A load has failed and holds nothing."""

    def unloaded(self, handle: ModelHandle, unloaded: Unloaded) -> Mapping[int, int]:
        """An unload has ended; returns what is missing, by position of the device."""

    def copy_in_use(self, handle: ModelHandle) -> int:
        """Somebody is still in the memory of a copy that is being dropped.

        Returns:
            What no other copy holds of it, in bytes.
        """

    def copy_dropped(self, handle: ModelHandle) -> None:
        """The memory of the copy that a model had is back."""

    def reclaimed(self, handle: ModelHandle, back: Mapping[int, int]) -> int:
        """Memory that unloads of a model could not get back is back after all; see Engine.recheck.

        Returns:
            How many bytes are quarantined no more.
        """

    def is_short(self, handle: ModelHandle) -> bool:
        """True while a model's memory is missing on a device."""


class Transfers:
    """Runs loads and unloads.

    Args:
        engine: what loads and unloads.
        device_names: resource names of the devices, for the log.
        outcomes: is told how they end.
    """

    def __init__(self, engine: Engine, *, device_names: Sequence[str], outcomes: Outcomes) -> None:
        self._engine = engine
        self._device_names = tuple(device_names)
        self._outcomes = outcomes
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._rechecks: set[asyncio.Task[None]] = set()
        # Set at the end of the next unload.
        self._unloaded = asyncio.Event()

    @property
    def count(self) -> int:
        """Loads and unloads that run."""
        return len(self._tasks)

    def load(self, handle: ModelHandle, target: Target) -> None:
        """Begins a load."""
        # Here and not in its task: it may be told to stop before that has begun.
        handle.load_stopped = False
        self._start(self._tasks, self._load(handle, target), f"load {handle.name}")

    def stop_load(self, handle: ModelHandle) -> None:
        """Asks a load to stop."""
        handle.load_stopped = True
        self._engine.cancel_load(handle.core_id)

    def unload(self, handle: ModelHandle, *, keep: bool, most_bytes: int) -> None:
        """Begins an unload, with a copy of the weights if they are to be kept; see Engine."""
        self._start(self._tasks, self._unload(handle, keep, most_bytes), f"unload {handle.name}")

    def drop_copy(self, handle: ModelHandle) -> None:
        """Begins to drop the copy of a model's weights."""
        self._start(self._tasks, self._drop_copy(handle), f"drop the copy of {handle.name}")

    def stop(self) -> None:
        """Loads from now on end before they begin, and nothing is looked for any more."""
        self._closing = True
        for task in self._rechecks:
            task.cancel()

    async def settle(self, timeout_s: float) -> bool:
        """Waits for what runs. False if some of it still does after timeout_s."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while tasks := self._tasks | self._rechecks:
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0:
                return False
            await asyncio.wait(tasks, timeout=left_s)
        return True

    def _start(
        self, tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None], name: str
    ) -> None:
        # In a context of its own: what comes of it is not the doing of whoever began it.
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(
            work, name=name, context=contextvars.Context()
        )
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(_log_defect)

    async def _load(self, handle: ModelHandle, target: Target) -> None:
        loop = asyncio.get_running_loop()
        handle.load_started = began = loop.time()
        handle.load_stopped = handle.load_stopped or self._closing
        try:
            if handle.barred_text:
                raise ModelFilesError(handle.barred_text)
            await self._price_again(handle)
            # The engine did not know of the load until now, and could not stop it.
            if handle.load_stopped:
                raise LoadCancelled
            loaded = await self._engine.load(handle.core_id, handle.spec, target)
        except LoadCancelled:
            failure = _core.LoadFailure.CANCELLED
        except ModelFilesError as error:
            handle.failure_text = error.text
            failure = (
                _core.LoadFailure.TRANSIENT if error.transient else _core.LoadFailure.PERMANENT
            )
            logger.warning("loading %s failed: %s", handle.name, error.text)
        except OptionError as error:  # Of a stored model, and not known to this version.
            handle.failure_text = f"{error.option}: {error.text}"
            failure = _core.LoadFailure.PERMANENT
            logger.warning("loading %s failed: %s", handle.name, handle.failure_text)
        except MemoryError:
            handle.failure_text = "the machine has no memory for it now"
            failure = _core.LoadFailure.TRANSIENT
            logger.exception("loading %s failed", handle.name)
        except Exception as error:  # the task's edge: it becomes an event and one log line
            handle.failure_text = f"its loader raised {type(error).__name__}"
            failure = _core.LoadFailure.PERMANENT
            logger.exception("loading %s failed", handle.name)
        else:
            took_s = loop.time() - began
            logger.info("loaded %s in %.3f s, from %s", handle.name, took_s, loaded.source.value)
            handle.failure_text = ""
            self._outcomes.loaded(handle, target, loaded, took_s)
            # Only now: whoever is granted by this load still reads when it began.
            loop.call_soon(setattr, handle, "load_started", None)
            return
        handle.load_started = None
        self._outcomes.load_failed(handle, failure)

    async def _price_again(self, handle: ModelHandle) -> None:
        """Looks whether the files have grown since they were priced, or hold other tensors.

        If so, what is reserved is too little: the load is given up, and the core, told the new
        price, makes room for it and asks again.
        """
        price = await self._engine.price(handle.spec)
        shared = shared_of(handle.ways)
        is_same = not shared or price.shared is shared or price.shared == shared
        if price.peak_bytes <= handle.priced_bytes and is_same:
            return
        if price.peak_bytes > MAX_BYTES:
            raise ModelFilesError(f"needs {price.peak_bytes} bytes, more than any device has")
        try:
            ways = handle.replan(price)
        except Refusal as refusal:
            raise ModelFilesError(refusal.text) from None
        handle.priced_bytes = price.peak_bytes
        self._outcomes.repriced(handle, ways)
        raise LoadCancelled

    async def _unload(self, handle: ModelHandle, keep: bool, most_bytes: int) -> None:
        unloaded = await self._engine.unload(
            handle.core_id, keep=keep, most_bytes=most_bytes if keep else None
        )
        missing = self._outcomes.unloaded(handle, unloaded)
        self._unloaded.set()
        self._unloaded = asyncio.Event()
        for device, size_bytes in missing.items():
            logger.error(
                "%s kept %d bytes on %s after its unload; they are quarantined",
                handle.name,
                size_bytes,
                self._device_names[device],
            )
        if missing and not self._closing:
            recheck = self._recheck(handle, self._unloaded)
            self._start(self._rechecks, recheck, f"recheck {handle.name}")

    async def _drop_copy(self, handle: ModelHandle) -> None:
        # It stays on the books as it is until it is back. To give it up, and say what is missing,
        # would not do: what it shares with a copy that is just being made would be on that one's
        # account, and on none if that fails.
        while not await self._engine.drop_copy(handle.core_id):
            missing = self._outcomes.copy_in_use(handle)
            if self._closing:
                return
            if missing:
                logger.warning("%d bytes of a copy of %s are still in use", missing, handle.name)
                self._start(self._rechecks, self._recheck_copy(handle), f"recheck {handle.name}")
                return
            # Others are making or dropping copies of all of it: it will not be long.
            await asyncio.sleep(_RECHECK_S[0])
        self._outcomes.copy_dropped(handle)

    async def _recheck_copy(self, handle: ModelHandle) -> None:
        attempt = 0
        while True:
            await asyncio.sleep(_RECHECK_S[min(attempt, len(_RECHECK_S) - 1)])
            attempt += 1
            if await self._engine.drop_copy(handle.core_id):
                logger.info("the copy of %s is not in use any more", handle.name)
                self._outcomes.copy_dropped(handle)
                return

    async def _recheck(self, handle: ModelHandle, unloaded: asyncio.Event) -> None:
        attempt = 0
        while self._outcomes.is_short(handle):
            try:
                async with asyncio.timeout(_RECHECK_S[min(attempt, len(_RECHECK_S) - 1)]):
                    # It may be in an allocation that another model keeps: then it is back with that
                    # one, and a load may be waiting for it.
                    await unloaded.wait()
            except TimeoutError:
                attempt += 1
            # Before it is looked for: an unload that ends meanwhile may not have been seen.
            unloaded = self._unloaded
            back = await self._engine.recheck(handle.core_id)
            if back and (freed := self._outcomes.reclaimed(handle, back)):
                logger.info("%d quarantined bytes of %s are back", freed, handle.name)


def _log_defect(task: asyncio.Task[None]) -> None:
    """Says it at once if a transfer has ended as none should: its model stays where it was."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s broke", task.get_name(), exc_info=error)
