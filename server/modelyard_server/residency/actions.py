"""The core's actions, and what becomes of them.

Every event of the core ends here: it returns actions, and they are carried out in order before
anything else runs. A Grant or a Refuse settles a ticket. A Load or an Unload begins a transfer,
whose end is the next event: the core is told of it, and answers with further actions. So a reload
goes round in this module: ``carry_out`` begins the unload of a victim, ``unloaded`` tells of its
end, whose actions begin the load; ``loaded`` tells of that, and its actions grant who waits.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, assert_never

from modelyard_server import _core
from modelyard_server.devices.placed import PlacedAs
from modelyard_server.execution.engine import Engine, Loaded, Unloaded
from modelyard_server.residency.journal import Journal
from modelyard_server.residency.recent_loads import RecentLoads
from modelyard_server.residency.telling import Teller
from modelyard_server.residency.tickets import Tickets
from modelyard_server.residency.transfers import Transfers
from modelyard_server.residency.uses import model_use
from modelyard_server.residency.values import ModelHandle
from modelyard_server.runtimes.targets import Target

if TYPE_CHECKING:
    from modelyard_server._core import _Action  # Exists for type checkers only.

__all__ = ["Actions"]

logger = logging.getLogger(__name__)


class Actions:
    """Carries out what the core decides. All methods on the event loop's thread.

    Invariant: every action is carried out once, in order, before the next event.

    Args:
        yard: what decides.
        now_ns: the yard's clock.
        engine: what loads and unloads.
        device_names: resource names of the devices, for the log.
        handles: models by the yard's id for them; a live view, with all that hold something.
        tickets: what grants and refusals are for.
        teller: tells the journal of every decision.
        journal: is told of what changes without one.
        set_ways: gives a model other ways to be loaded, see Residency.set_ways.
        forget_if_gone: drops what is known of a model, if the yard does not know it any more.
    """

    def __init__(
        self,
        yard: _core.Yard,
        *,
        now_ns: Callable[[], int],
        engine: Engine,
        device_names: Sequence[str],
        handles: Mapping[int, ModelHandle],
        tickets: Tickets,
        teller: Teller,
        journal: Journal,
        set_ways: Callable[[ModelHandle, Sequence[PlacedAs]], None],
        forget_if_gone: Callable[[ModelHandle], None],
    ) -> None:
        self._yard = yard
        self._now_ns = now_ns
        self._handles = handles
        self._tickets = tickets
        self._teller = teller
        self._journal = journal
        self._set_ways = set_ways
        self._forget_if_gone = forget_if_gone
        self._transfers = Transfers(engine, device_names=device_names, outcomes=self)
        self._todo: deque[_Action] = deque()
        self._carrying_out = False
        self._timer: asyncio.TimerHandle | None = None
        self._targets: dict[int, Target] = {}
        self._drain_watchers: set[asyncio.Event] = set()
        self._recent_loads = RecentLoads()
        self._closing = False

    @property
    def is_closing(self) -> bool:
        """True once it was told to stop."""
        return self._closing

    @property
    def recent_load_s(self) -> float:
        """Seconds of the loads that ended in the last minute."""
        return self._recent_loads.seconds(self._now_ns())

    @property
    def targets(self) -> Mapping[int, Target]:
        """Where each part of the models is that are in memory, by the yard's ids for them."""
        return self._targets

    @contextmanager
    def watching_drains(self) -> Iterator[asyncio.Event]:
        """Gives an event that is set whenever a model is asked to leave while it is leased."""
        told = asyncio.Event()
        self._drain_watchers.add(told)
        try:
            yield told
        finally:
            self._drain_watchers.discard(told)

    def carry_out(self, actions: list[_Action] | None, *, asked: int = 0) -> None:
        """Carries actions out, in order; those that come of carrying one out after the others.

        Args:
            actions: of one event.
            asked: the core's id for the model, if the event was an operator's asking for one.
        """
        self._teller.tell(asked=asked)
        if not actions:
            return
        self._todo.extend(actions)
        if self._carrying_out:
            return
        self._carrying_out = True
        try:
            while self._todo:
                self._carry_out_one(self._todo.popleft())
        finally:
            self._carrying_out = False

    def tick(self) -> None:
        """Tells the core that time has passed."""
        self._timer = None
        self.carry_out(self._yard.tick(self._now_ns()))

    def stop(self) -> None:
        """From now on no load begins, no copy is made, and nothing is waited for."""
        self._closing = True
        self._transfers.stop()

    async def end(self, timeout_s: float) -> bool:
        """Stops the loads that run, and waits for them and for the unloads.

        Returns:
            False if some still run after timeout_s.
        """
        if self._timer is not None:
            self._timer.cancel()
        for handle in self._handles.values():
            self._transfers.stop_load(handle)
        return await self._transfers.settle(timeout_s)

    def _carry_out_one(self, action: _Action) -> None:
        match action:
            case _core.Grant():
                self._tickets.grant(action)
            case _core.Refuse():
                self._tickets.refuse(action)
            case _core.Load():
                handle = self._handles[action.model]
                self._transfers.load(handle, handle.ways[action.placement].target)
            case _core.CancelLoad():
                self._transfers.stop_load(self._handles[action.model])
            case _core.Drain():
                logger.debug("draining %s", self._handles[action.model].name)
                for told in self._drain_watchers:
                    told.set()
            case _core.Unload():
                del self._targets[action.model]
                handle = self._handles[action.model]
                # Who stops makes no copies any more: nobody would load from them.
                keep = action.keep and not self._closing
                self._transfers.unload(handle, keep=keep, most_bytes=action.most)
            case _core.DropCopy():
                self._transfers.drop_copy(self._handles[action.model])
            case _core.WakeAt():
                self._wake_at(action.at_ns)
            case _:
                assert_never(action)

    def _wake_at(self, at_ns: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._closing:
            return
        delay_s = max(0, at_ns - self._now_ns()) * 1e-9
        # In a context of its own: what time brings about is not the doing of whoever set the timer.
        self._timer = asyncio.get_running_loop().call_later(
            delay_s, self.tick, context=contextvars.Context()
        )

    # --- What became of transfers (see Outcomes) --------------------------------------------------

    def repriced(self, handle: ModelHandle, ways: Sequence[PlacedAs]) -> None:
        """See Outcomes."""
        self._set_ways(handle, ways)

    def loaded(self, handle: ModelHandle, target: Target, loaded: Loaded, took_s: float) -> None:
        """See Outcomes."""
        core_id = handle.core_id
        self._targets[core_id] = target
        own_bytes, source = dict(loaded.own_bytes), _core.Source[loaded.source.name]
        now_ns = self._now_ns()
        self._recent_loads.note(now_ns, took_s)
        self.carry_out(self._yard.load_done(core_id, now_ns, own_bytes, took_s, source))
        entry = self._yard.entry(core_id)
        if entry is not None and entry.copy_state is not _core.CopyState.KEPT:
            handle.file_load_s = entry.reload_seconds
        self._settle(handle)

    def load_failed(self, handle: ModelHandle, failure: _core.LoadFailure) -> None:
        """See Outcomes."""
        self.carry_out(self._yard.load_failed(handle.core_id, self._now_ns(), failure))
        self._settle(handle)
        self._forget_if_gone(handle)

    def unloaded(self, handle: ModelHandle, unloaded: Unloaded) -> Mapping[int, int]:
        """See Outcomes."""
        freed = unloaded.freed
        held = self._yard.held_with_shares(handle.core_id)
        alone = self._yard.exclusive(handle.core_id)
        missing = {
            # What others hold as well is theirs to give back.
            device: min(alone.get(device, 0), size - freed.get(device, 0))
            for device, size in held.items()
            if size > freed.get(device, 0) and alone.get(device, 0)
        }
        for device, size in held.items():
            if size > freed.get(device, 0):
                handle.losses.add(
                    device,
                    left_bytes=size - freed.get(device, 0),
                    missing_bytes=missing.get(device, 0),
                )
        back = {device: size - missing.get(device, 0) for device, size in alone.items()}
        is_kept = unloaded.refused_bytes is None
        copy_bytes = unloaded.kept_bytes if is_kept else unloaded.refused_bytes
        self.carry_out(
            self._yard.unload_done(
                handle.core_id, self._now_ns(), back, copy_bytes, unloaded.keep_s, is_kept
            )
        )
        self._settle(handle)
        self._forget_if_gone(handle)
        return missing

    def reclaimed(self, handle: ModelHandle, back: Mapping[int, int]) -> int:
        """See Outcomes."""
        # Of what others held as well nothing was lost.
        found = handle.losses.take_off(back)
        if found:
            self.carry_out(self._yard.reclaimed(handle.core_id, self._now_ns(), found))
            self._journal.changed(handle.name)
            self._forget_if_gone(handle)
        return sum(found.values())

    def is_short(self, handle: ModelHandle) -> bool:
        """See Outcomes."""
        return bool(model_use(self._yard, handle, self._now_ns()).quarantined)

    def copy_in_use(self, handle: ModelHandle) -> int:
        """See Outcomes."""
        core_id = handle.core_id
        self.carry_out(self._yard.copy_in_use(core_id, self._now_ns()))
        self._journal.changed(handle.name)
        self._settle(handle)
        return self._yard.copy_exclusive(core_id)

    def copy_dropped(self, handle: ModelHandle) -> None:
        """See Outcomes."""
        core_id = handle.core_id
        freed = self._yard.copy_exclusive(core_id)
        self.carry_out(self._yard.copy_dropped(core_id, self._now_ns(), freed))
        self._journal.changed(handle.name)
        self._settle(handle)
        self._forget_if_gone(handle)

    def _settle(self, handle: ModelHandle) -> None:
        waiters, handle._settled = handle._settled, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
