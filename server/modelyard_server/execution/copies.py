"""Copies of models' weights that are kept in host memory: made, measured, and really dropped.

A copy is made by the thread that unloads its model, before the model is dropped, and found again by
the loads of a runtime, of which nothing is known here. What is known here is which model has one,
what that holds, and when its memory is back: letting go of a copy is not the end of it while a load
still reads from it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from modelyard_server.execution.engine import DeviceMemory
from modelyard_server.execution.freed_memory import give_back_freed
from modelyard_server.execution.lane import Lane, LaneJob
from modelyard_server.execution.memory import HeldModel, MeasuredMemory
from modelyard_server.runtimes.api import KeptWeights
from modelyard_server.runtimes.frames import forget_frames

__all__ = ["Copies", "MadeCopy"]

logger = logging.getLogger(__name__)

_FIRST_WAIT_S = 0.001
_LONGEST_WAIT_S = 0.05


@dataclass(frozen=True, slots=True)
class MadeCopy:
    """A copy that was made.

    Attributes:
        own_bytes: what it holds beside its shared tensors.
        keep_s: how long making it took.
        is_kept: False if it was larger than it was allowed to be, and has gone again.
    """

    own_bytes: int
    keep_s: float
    is_kept: bool = True


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy that is there, with what is measured of it."""

    kept: KeptWeights
    own_bytes: int
    shared: Mapping[str, int]


class Copies:
    """The copies of an engine. Methods from the event loop only, unless they say otherwise.

    Invariants: a model has at most one copy, a copy that is being made included. What is measured
    is what was added and is not known to be back.

    Args:
        patience_s: how long `drop` waits for the memory of a copy.
        clock: seconds; monotonic.
    """

    def __init__(
        self, *, patience_s: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._patience_s = patience_s
        self._clock = clock
        # None for one that is being made. Loader threads replace that, so the lock.
        self._copies: dict[int, _Copy | None] = {}
        self._lock = threading.Lock()
        self._memory = MeasuredMemory()
        self._is_stopping = False
        # Of its own: a copy that is dropped makes room for a load, and must not stand behind one.
        self._lane: Lane | None = None

    def start(self) -> None:
        """Begins. To be called before anything is made."""
        self._lane = Lane("copies", asyncio.get_running_loop())

    def begin_stop(self) -> None:
        """Keeps no new copies, and waits for none to be back any more."""
        self._is_stopping = True

    async def stop(self, timeout_s: float) -> bool:
        """Lets go of every copy. Those that are still being made are not kept.

        Returns:
            False if the thread that drops them still runs after timeout_s.
        """
        self.begin_stop()
        if self._lane is None:
            return True
        with self._lock:
            left = [copy for copy in self._copies.values() if copy is not None]
            self._copies.clear()
        for copy in left:
            self._memory.take_off(copy.own_bytes, copy.shared)
            self._lane.submit(LaneJob(partial(_let_go, copy.kept), lambda job: None))
        return await self._lane.stop(timeout_s)

    def read(self) -> DeviceMemory:
        """What is measured in all of them."""
        return self._memory.read()

    # --- Making -----------------------------------------------------------------------------------

    def begin(self, model: int) -> None:
        """Says that a copy will be made; `make` must follow.

        Raises:
            ValueError: there is one, or memory of one that was let go of.
        """
        with self._lock:
            if model in self._copies:
                raise ValueError(f"there is a copy of model {model} already")
            self._copies[model] = None

    def make(self, model: int, held: HeldModel, most_bytes: int | None = None) -> MadeCopy | None:
        """Makes a copy, in the thread that calls.

        Args:
            model: that `begin` was called for.
            held: the model.
            most_bytes: what it may hold beside its shared tensors.

        Returns:
            None if there is none: the model has nothing to be kept, or it failed, which is logged.
        """
        copy: _Copy | None = None
        began_s = self._clock()
        kept = None if self._is_stopping else _keep(held)
        keep_s = self._clock() - began_s
        if kept is not None:
            copy = _measured(held.name, kept)
        fits = copy is None or most_bytes is None or copy.own_bytes <= most_bytes
        with self._lock:
            if copy is not None and fits and not self._is_stopping:
                self._copies[model] = copy
                self._memory.add(copy.own_bytes, copy.shared)
                return MadeCopy(copy.own_bytes, keep_s)
            self._copies.pop(model, None)
        if copy is None:
            return None
        _let_go(copy.kept)
        return None if fits else MadeCopy(copy.own_bytes, keep_s, is_kept=False)

    # --- Dropping ---------------------------------------------------------------------------------

    async def drop(self, model: int) -> bool:
        """Lets go of a copy, and waits for its memory. See Engine.drop_copy."""
        if model not in self._copies:
            return True
        copy = self._copies[model]
        if copy is None:
            return False
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + self._patience_s
        wait_s = _FIRST_WAIT_S
        assert self._lane is not None  # Or there were no copies.
        # A lane that stops answers nobody.
        while self._copies.get(model) is copy and not self._is_stopping:
            if await self._lane.call(partial(_is_back, copy.kept)):
                self._forget(model, copy)
                return True
            if loop.time() >= ends_s:
                return False
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        # If it is gone without a stop, somebody else has dropped it meanwhile.
        return not self._is_stopping

    def _forget(self, model: int, copy: _Copy) -> None:
        with self._lock:
            # Whoever else waits for it may have been faster.
            if self._copies.get(model) is not copy:
                return
            del self._copies[model]
        self._memory.take_off(copy.own_bytes, copy.shared)


def _keep(held: HeldModel) -> KeptWeights | None:
    # What is loaded is no variable of this frame: an error that somebody keeps would keep it too.
    try:
        return held.loaded.keep()
    except MemoryError as error:
        forget_frames(error)
        logger.warning("there is no memory for a copy of the weights of %s", held.name)
    except BaseException as error:  # the model is to be dropped whatever its copy comes to
        logger.exception("a copy of the weights of %s cannot be made", held.name)
        forget_frames(error)
    return None


def _measured(name: str, kept: KeptWeights) -> _Copy | None:
    try:
        return _Copy(kept, kept.own_bytes, dict(kept.shared))
    except Exception as error:
        logger.exception("a copy of the weights of %s does not say what it holds", name)
        forget_frames(error)
        _let_go(kept)
        return None


def _is_back(kept: KeptWeights) -> bool:
    """Lets go of a copy, and says whether its memory is back."""
    _let_go(kept)
    if kept.is_held:
        return False
    give_back_freed(())
    return True


def _let_go(kept: KeptWeights) -> None:
    try:
        kept.release()
    except Exception as error:
        # Whether its memory is back is what it says, not how it took its leave.
        logger.exception("a copy of a model's weights failed while it was let go of")
        forget_frames(error)
