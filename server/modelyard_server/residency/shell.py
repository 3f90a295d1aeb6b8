"""The residency shell: carries out what the core decides, and tells it what became of it.

The core is pure: events in, actions out. This shell is where time, tasks and futures are. Every
event goes in on the event loop's thread, and the actions it returns are carried out before anything
else runs, so the core never sees two events at once and needs no lock.

A hit is one core call. A miss gets a ticket and a future; the core's Grant or Refuse settles it.
Loads and unloads are tasks of this shell, not of the request that caused them: a client that leaves
takes its ticket back and nothing else.

Its package is the only importer of the core's module.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, assert_never

from modelyard_server import _core
from modelyard_server.devices.placed import PlacedAs, placements_of, shared_of, shares_on
from modelyard_server.errors import Reason, Refusal
from modelyard_server.execution.engine import Engine, Loaded, Unloaded
from modelyard_server.residency.arrival_order import ArrivalOrder
from modelyard_server.residency.host_tier import HOST_TIER, tier_use, without_tier
from modelyard_server.residency.journal import Journal
from modelyard_server.residency.recent_loads import RecentLoads
from modelyard_server.residency.refusals import refusal_of
from modelyard_server.residency.rehearsal import Rehearsal, device_use
from modelyard_server.residency.shared import SharedTensors
from modelyard_server.residency.telling import Teller
from modelyard_server.residency.transfers import Transfers
from modelyard_server.residency.values import (
    GONE,
    NEVER_NS,
    CopyState,
    Departures,
    DeviceUse,
    ModelHandle,
    ModelUse,
    State,
    TierUse,
    YardSettings,
)
from modelyard_server.runtimes.api import (
    ModelSpec,
    Price,
)
from modelyard_server.runtimes.targets import Target

if TYPE_CHECKING:
    from modelyard_server._core import _Action  # Exists for type checkers only.

__all__ = ["Lease", "Residency", "heir_of"]

logger = logging.getLogger(__name__)

_COPY_PADDING_BYTES = 256 << 10
"""What is reserved for the pages of a model's first copy beyond its bytes: a copy pays for all
pages it has a byte in. One that needs more is not kept, and has as much the next time."""


class Lease:
    """The right that a resident model stays, until released. Release it exactly once."""

    __slots__ = ("_id", "_residency", "device", "handle", "load_s", "wait_s")

    def __init__(
        self,
        residency: Residency,
        lease_id: int,
        handle: ModelHandle,
        wait_s: float,
        load_s: float | None,
    ) -> None:
        self._residency = residency
        self._id = lease_id
        self.handle = handle
        self.device = residency.device_of(handle)
        self.wait_s = wait_s
        self.load_s = load_s

    def set_aside(self) -> None:
        """Says that no other request waits behind this one, however long it lasts.

        It goes on by runs between which others have their turn. So its device's pace, by which
        others are told how long they would wait, is not measured by it.
        """
        self._residency._set_aside(self._id)

    def release(self) -> None:
        """Gives it back. What that makes possible (an unload, a waiting load) begins at once."""
        self._residency._release(self._id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Residency:
    """Owns the yard and its tasks. All methods on the event loop's thread.

    Invariants: every action of the core is carried out once, in order, before the next event; a
    future that a waiter dropped never keeps a lease.

    Args:
        settings: how the core behaves.
        device_names: resource names of the devices, for errors.
        engine: what loads and unloads.
        journal: is told of every decision; None makes one of its own.
        now_ns: the clock; monotonic.
    """

    def __init__(
        self,
        *,
        settings: YardSettings,
        device_names: Sequence[str],
        engine: Engine,
        journal: Journal | None = None,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._yard = _core.Yard(
            budgets=list(settings.budgets),
            policy=settings.policy,
            max_waiting_per_model=settings.max_waiting_per_model,
            max_waiting=settings.max_waiting,
            loads_per_device=settings.loads_per_device,
            overdue_after_s=settings.overdue_after_s,
            backoff_initial_s=settings.backoff_initial_s,
            backoff_max_s=settings.backoff_max_s,
            explain_capacity=settings.explain_capacity,
            tier_budget=settings.tier_budget,
            above_tier=list(settings.above_tier),
            copy_padding=_COPY_PADDING_BYTES,
        )
        self._tier = self._yard.tier
        self._device_names = tuple(device_names)
        self._now_ns = now_ns
        self._handles: dict[int, ModelHandle] = {}
        self._tickets: dict[int, asyncio.Future[int]] = {}
        self._todo: deque[_Action] = deque()
        self._carrying_out = False
        self._timer: asyncio.TimerHandle | None = None
        self._targets: dict[int, Target] = {}
        self._closing = False
        self._drain_watchers: set[asyncio.Event] = set()
        self._recent_loads = RecentLoads()
        self._line: ArrivalOrder | None = None
        if settings.order == "fifo":
            self._line = ArrivalOrder(most_waiting=settings.max_waiting, now_ns=now_ns)
        self.journal = journal or Journal(capacity=settings.explain_capacity)
        self._teller = Teller(
            self._yard,
            self.journal,
            handles=self._handles,
            device_names=(*device_names, HOST_TIER),
        )
        self._engine = engine
        self._shared = SharedTensors(self._yard)
        self._transfers = Transfers(engine, device_names=device_names, outcomes=self)

    # --- Models -------------------------------------------------------------------------------

    def add(
        self,
        spec: ModelSpec,
        *,
        ways: Sequence[PlacedAs],
        replan: Callable[[Price], tuple[PlacedAs, ...]],
        priced_bytes: int,
        reload_s: float = 1.0,
        replaces: ModelHandle | None = None,
    ) -> ModelHandle:
        """Registers a model, cold.

        Args:
            spec: what the engine will load.
            ways: how it may be loaded, the preferred way first; their charges are upper bounds.
            replan: works the ways out anew if its files turn out to be larger.
            priced_bytes: peak bytes of the price that the ways were worked out for.
            reload_s: expected load time until one has been measured.
            replaces: a model whose place it is to take, and whose history it starts with. That one
                stays until `replace`.
        """
        shared = shared_of(ways)
        shares = self._shared.claim(shared)
        try:
            core_id = self._yard.add_model(
                spec.name,
                placements_of(ways, sum(shared.values())),
                reload_s,
                0 if replaces is None else replaces.core_id,
                shares,
                shares_on(ways),
            )
        except BaseException:
            self._shared.forget_unused(shares)
            raise
        self._shared.assign(core_id, shared)
        handle = ModelHandle(
            name=spec.name,
            core_id=core_id,
            spec=spec,
            ways=tuple(ways),
            replan=replan,
            priced_bytes=priced_bytes,
        )
        self._handles[core_id] = handle
        return handle

    def set_ways(self, handle: ModelHandle, ways: Sequence[PlacedAs]) -> None:
        """Replaces the ways in which a model may be loaded. What it holds now stays as it is."""
        handle.ways = tuple(ways)
        shared = shared_of(handle.ways)
        shares = self._shared.claim(shared)
        actions = self._yard.update_placements(
            handle.core_id,
            placements_of(handle.ways, sum(shared.values())),
            self._now_ns(),
            shares,
            shares_on(handle.ways),
        )
        self._shared.assign(handle.core_id, shared)
        self._apply(actions)

    def replace(self, old: ModelHandle, new: ModelHandle) -> None:
        """Lets one model take another's place: who waits for the old one waits for the new one.

        Requests that run on the old one are answered; its memory comes back after them. A pin
        moves along.
        """
        use = self.use(old)
        pinned = use.pinned
        new.loads_before, new.evictions_before = use.load_count, use.eviction_count
        old.successor = new
        self.remove(old)
        if pinned:
            self.set_pinned(new, True)

    def remove(self, handle: ModelHandle) -> None:
        """Takes a model out. Requests that run are answered; those that wait are refused."""
        self._apply(self._yard.remove_model(handle.core_id, self._now_ns()))
        self._forget_if_gone(handle)

    def set_pinned(self, handle: ModelHandle, pinned: bool) -> None:
        """Pins a model or lets it go. Pinning does not load it; see want."""
        change = self._yard.pin if pinned else self._yard.unpin
        self._apply(change(handle.core_id, self._now_ns()))

    def want(self, handle: ModelHandle) -> None:
        """Asks for a model to be resident, without waiting, as an operator does.

        Refused as a request would be.

        Raises:
            Refusal: it cannot be loaded now; see lease.
        """
        ticket, actions = self._yard.request(handle.core_id, self._now_ns(), NEVER_NS)
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._tickets[ticket] = future
        self._apply(actions, asked=handle.core_id)
        # Nobody waits for it: a grant is given back at once, a late refusal is the model's state.
        if future.done():
            self._release(future.result())
        else:
            future.add_done_callback(self._give_back)

    def forgive(self, handle: ModelHandle) -> None:
        """Forgets that loads of a model have failed: it may be loaded at once."""
        self._yard.forgive(handle.core_id, self._now_ns())
        self.journal.changed(handle.name)

    def lost(self, core_ids: Iterable[int]) -> tuple[ModelHandle, ...]:
        """What held these models has died: they leave, and their memory is back already.

        Args:
            core_ids: the yard's ids of models, in memory or not.

        Returns:
            Those that were there to be used.
        """
        gone = []
        for core_id in core_ids:
            entry, handle = self._yard.entry(core_id), self._handles.get(core_id)
            if entry is None or handle is None:
                continue
            if entry.state is State.RESIDENT and not entry.removed:
                gone.append(handle)
            if entry.state in (State.RESIDENT, State.DRAINING):
                self._apply(self._yard.lost(core_id, self._now_ns()))
        return tuple(gone)

    def copies_lost(self, core_ids: Iterable[int]) -> None:
        """What held the copies of these models has died; their memory is back when it is over.

        Args:
            core_ids: the yard's ids of models.
        """
        for core_id in core_ids:
            entry = self._yard.entry(core_id)
            # One that is being dropped ends with that.
            if entry is not None and entry.copy_state is CopyState.KEPT:
                self._apply(self._yard.copy_lost(core_id, self._now_ns()))

    def handle_of(self, core_id: int) -> ModelHandle | None:
        """The handle of a model that the yard knows, by the yard's id for it."""
        return self._handles.get(core_id)

    async def unload(self, handle: ModelHandle) -> None:
        """Takes a model out of memory and returns when its memory is back.

        For its copy it waits no longer than until that is known to be in use; see CopyState.

        Raises:
            Refusal: MODEL_IN_USE if it is pinned.
        """
        try:
            actions = self._yard.unload(handle.core_id, self._now_ns())
        except _core.PinnedError:
            raise Refusal(
                Reason.MODEL_IN_USE, f"model {handle.name!r} is pinned; unpin it first"
            ) from None
        self._apply(actions)
        while self._is_on_its_way(handle):
            settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            handle._settled.append(settled)
            await settled
            if self.use(handle).state is State.LOADING:
                break  # Somebody wants it again: it has left in between.

    async def gone(self, handle: ModelHandle) -> None:
        """Waits until a model that was removed holds nothing any more, but for what is lost."""
        while self._is_on_its_way(handle):
            settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            handle._settled.append(settled)
            await settled

    def _is_on_its_way(self, handle: ModelHandle) -> bool:
        """True while a model comes or goes, or its copy goes."""
        use = self.use(handle)
        if use.state in (State.LOADING, State.DRAINING, State.UNLOADING):
            return True
        # Nobody waits for a copy that is in use, unless what is missing of it is others' as well.
        in_use = use.copy_in_use and (use.copy_bytes > 0 or self._closing)
        return use.copy_state is CopyState.DROPPING and not in_use

    # --- Requests -----------------------------------------------------------------------------

    def try_lease(
        self, handle: ModelHandle, deadline_ns: int = NEVER_NS, *, asked: bool = False
    ) -> Lease | None:
        """The way of a hit: a lease if the model is resident, at the cost of one core call.

        Args:
            handle: the model.
            deadline_ns: of the residency's clock. None is given if it is out of reach; `lease`
                says then what it would take.
            asked: it is for an operator, who need not stand in line.
        """
        if self._line is not None and not asked and not self._line.is_empty:
            return None
        lease_id = self._yard.try_acquire(handle.core_id, self._now_ns(), deadline_ns)
        return Lease(self, lease_id, handle, 0.0, None) if lease_id else None

    async def lease(self, handle: ModelHandle, deadline_ns: int, *, asked: bool = False) -> Lease:
        """Waits until the model is resident and leases it.

        Args:
            handle: the model.
            deadline_ns: of the residency's clock; NEVER_NS for none.
            asked: it is for an operator, not for a request.

        Raises:
            Refusal: MODEL_NEVER_FITS, BUDGET_EXHAUSTED, QUEUE_FULL, LOAD_FAILED, MODEL_NOT_FOUND,
                DEADLINE_UNREACHABLE, DEADLINE_IN_QUEUE or DEADLINE_IN_LOAD.
        """
        began_ns = self._now_ns()
        if self._line is None or asked:
            return await self._lease_any(handle, began_ns, deadline_ns, asked)
        async with self._line.turn(deadline_ns):
            return await self._lease_any(handle, began_ns, deadline_ns, asked)

    async def _lease_any(
        self, handle: ModelHandle, began_ns: int, deadline_ns: int, asked: bool
    ) -> Lease:
        while True:
            # Another may have taken its place since the caller looked it up.
            handle = heir_of(handle)
            try:
                return await self._lease_this(handle, began_ns, deadline_ns, asked)
            except Refusal as refusal:
                if refusal.reason is not Reason.MODEL_NOT_FOUND or handle.successor is None:
                    raise

    async def _lease_this(
        self, handle: ModelHandle, began_ns: int, deadline_ns: int, asked: bool
    ) -> Lease:
        loop = asyncio.get_running_loop()
        try:
            ticket, actions = self._yard.request(handle.core_id, self._now_ns(), deadline_ns)
        except _core.StaleIdError:  # It was removed after the caller had looked it up.
            raise Refusal(Reason.MODEL_NOT_FOUND, f"no model {handle.name!r}") from None
        future: asyncio.Future[int] = loop.create_future()
        self._tickets[ticket] = future
        self._apply(actions, asked=handle.core_id if asked else 0)
        try:
            lease_id = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._release(future.result())  # Granted, and cancelled before it could be seen.
            elif self._tickets.pop(ticket, None) is not None:
                self._apply(self._yard.cancel(ticket, self._now_ns()))
                self.journal.changed(handle.name)  # It may wait no more, and no decision says so.
            raise
        now_ns = self._now_ns()
        wait_s = (now_ns - began_ns) * 1e-9
        began_loading = handle.load_started
        load_s = None if began_loading is None else max(0.0, loop.time() - began_loading)
        return Lease(self, lease_id, handle, wait_s, load_s)

    def device_of(self, handle: ModelHandle) -> int:
        """Position of the home device of a resident model."""
        return self._targets[handle.core_id].home

    def target_of(self, handle: ModelHandle) -> Target | None:
        """Where each part of a model is that is in memory, or about to leave it; else None."""
        return self._targets.get(handle.core_id)

    # --- Devices ------------------------------------------------------------------------------

    def set_budget(self, device: int, budget_bytes: int) -> None:
        """Changes a budget; what no longer fits drains."""
        self._engine.set_budget(device, budget_bytes)
        self._apply(self._yard.set_budget(device, budget_bytes, self._now_ns()))

    def set_closed(self, device: int, closed: bool) -> None:
        """Closes a device: nothing is loaded onto it, and what is there drains unless pinned."""
        self._apply(self._yard.set_device_closed(device, closed, self._now_ns()))

    def is_closed(self, device: int) -> bool:
        """True while a device is closed."""
        return self._yard.device_closed(device)

    def closed_to(self, handle: ModelHandle) -> tuple[str, ...]:
        """Names of closed devices for which a model cannot be loaded; empty if it can be."""
        touched = [set(filter(self.is_closed, way.charges)) for way in handle.ways]
        if not all(touched):
            return ()
        return tuple(self._device_names[device] for device in sorted(set().union(*touched)))

    # --- Looking ------------------------------------------------------------------------------

    def is_resident(self, handle: ModelHandle) -> bool:
        """True if a request for a model would be a hit now."""
        entry = self._yard.entry(heir_of(handle).core_id)
        return entry is not None and entry.state is State.RESIDENT

    def is_leaving(self, handle: ModelHandle) -> bool:
        """True if a model was asked to leave, and is there as long as it is leased."""
        entry = self._yard.entry(handle.core_id)
        return entry is not None and entry.state is State.DRAINING

    def fits_free(self, handle: ModelHandle) -> bool:
        """True if a model could be loaded now, and nobody had to leave or wait for it."""
        if self._yard.waiting_count:
            return False
        rehearsal = self.rehearse()
        return rehearsal.want(handle.core_id) and not rehearsal.departures

    @contextmanager
    def watching_drains(self) -> Iterator[asyncio.Event]:
        """Gives an event that is set whenever a model is asked to leave while it is leased."""
        told = asyncio.Event()
        self._drain_watchers.add(told)
        try:
            yield told
        finally:
            self._drain_watchers.discard(told)

    def use(self, handle: ModelHandle) -> ModelUse:
        """Where a model stands."""
        entry = self._yard.entry(handle.core_id)
        if entry is None:  # Removed, and everything is back.
            return GONE
        failed = entry.state is State.FAILED
        loads = entry.load_count + handle.loads_before
        charges = self._yard.held_with_shares(handle.core_id)
        alone = self._yard.exclusive(handle.core_id)
        return ModelUse(
            state=entry.state,
            charges=charges,
            shared={
                device: size - alone.get(device, 0)
                for device, size in charges.items()
                if size > alone.get(device, 0)
            },
            quarantined=without_tier(entry.quarantined, self._tier),
            pinned=entry.pinned,
            lease_count=entry.lease_count,
            waiting_count=entry.waiting_count,
            load_count=loads,
            eviction_count=entry.eviction_count + handle.evictions_before,
            load_duration_s=entry.reload_seconds if loads else None,
            failure_text=handle.failure_text if failed else "",
            failure_transient=failed and entry.failure is _core.LoadFailure.TRANSIENT,
            failure_count=entry.failure_count if failed else 0,
            retry_in_s=max(0, entry.retry_at_ns - self._now_ns()) * 1e-9 if failed else 0.0,
            copy_state=entry.copy_state,
            copy_bytes=self._yard.copy_exclusive(handle.core_id),
            copy_in_use=entry.copy_in_use,
            copy_duration_s=entry.copy_seconds or None,
        )

    def device_use(self, device: int) -> DeviceUse:
        """What a device has promised and holds."""
        return device_use(self._yard, device)

    def tier_use(self) -> TierUse | None:
        """What the host tier has promised and holds; None if there is none."""
        return tier_use(self._yard, self._handles)

    @property
    def counters(self) -> _core.Counters:
        """What the core has counted."""
        return self._yard.counters

    @property
    def recent_load_s(self) -> float:
        """Seconds of the loads that ended in the last minute."""
        return self._recent_loads.seconds(self._now_ns())

    @property
    def lru_load_s(self) -> float:
        """Seconds that LRU would have spent on loading; see csrc/include/modelyard/regret.hpp."""
        return self._yard.lru_seconds

    @property
    def departures(self) -> Departures:
        """Which models had to leave, and how old the last victims were."""
        ages = self._yard.victim_ages
        return Departures(
            counts=self._yard.departure_counts,
            idle_s=tuple(idle_ns * 1e-9 for idle_ns, _ in ages),
            resident_s=tuple(resident_ns * 1e-9 for _, resident_ns in ages),
        )

    @property
    def policy(self) -> str:
        """Name of the eviction policy."""
        return self._yard.policy

    @property
    def waiting_count(self) -> int:
        """Requests that wait for a model now, or for their turn to ask for one."""
        in_line = 0 if self._line is None else self._line.waiting_count
        return self._yard.waiting_count + in_line

    @property
    def lease_count(self) -> int:
        """Leases that are out now."""
        return self._yard.lease_count

    def explanations(self) -> list[dict[str, Any]]:
        """The last decisions, oldest first."""
        return self._yard.explanations()

    def rehearse(self) -> Rehearsal:
        """A rehearsal of what would happen from here; see Rehearsal."""
        return Rehearsal(self._yard, self._now_ns(), self._handles, self._shared)

    def audit(self) -> None:
        """Checks the core's invariants. Raises RuntimeError with the first violation."""
        self._yard.audit()

    # --- The end ------------------------------------------------------------------------------

    async def close(self, timeout_s: float) -> bool:
        """Refuses who waits, and waits for the loads and unloads that run.

        Returns:
            False if some still run after timeout_s.
        """
        self._closing = True
        self._transfers.stop()
        if self._line is not None:
            self._line.close()
        tickets, self._tickets = self._tickets, {}
        for ticket, future in tickets.items():
            if not future.done():
                future.set_exception(
                    Refusal(
                        Reason.SERVER_DRAINING, "the server is shutting down", retry_after_s=1.0
                    )
                )
            with suppress(_core.StaleIdError):  # Its deadline has passed meanwhile.
                self._apply(self._yard.cancel(ticket, self._now_ns()))
        if self._timer is not None:
            self._timer.cancel()
        for handle in self._handles.values():
            self._transfers.stop_load(handle)
        return await self._transfers.settle(timeout_s)

    # --- Actions ------------------------------------------------------------------------------

    def _apply(self, actions: list[_Action] | None, *, asked: int = 0) -> None:
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
                self._carry_out(self._todo.popleft())
        finally:
            self._carrying_out = False

    def _carry_out(self, action: _Action) -> None:
        match action:
            case _core.Grant():
                self._grant(action)
            case _core.Refuse():
                self._refuse(action)
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

    def _grant(self, grant: _core.Grant) -> None:
        future = self._tickets.pop(grant.ticket, None)
        if future is None or future.done():
            self._release(grant.lease)
        else:
            future.set_result(grant.lease)

    def _refuse(self, refuse: _core.Refuse) -> None:
        future = self._tickets.pop(refuse.ticket, None)
        if future is not None and not future.done():
            future.set_exception(
                refusal_of(refuse, device_names=self._device_names, name_of=self._teller.name_of)
            )

    def _set_aside(self, lease_id: int) -> None:
        self._yard.set_aside(lease_id)

    def _release(self, lease_id: int) -> None:
        actions = self._yard.release(lease_id, self._now_ns())
        if actions:
            self._apply(actions)

    def _give_back(self, future: asyncio.Future[int]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._release(future.result())

    def _wake_at(self, at_ns: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._closing:
            return
        delay_s = max(0, at_ns - self._now_ns()) * 1e-9
        # In a context of its own: what time brings about is not the doing of whoever set the timer.
        self._timer = asyncio.get_running_loop().call_later(
            delay_s, self._tick, context=contextvars.Context()
        )

    def _tick(self) -> None:
        self._timer = None
        self._apply(self._yard.tick(self._now_ns()))

    # --- What became of transfers (see Outcomes) --------------------------------------------------

    def repriced(self, handle: ModelHandle, ways: Sequence[PlacedAs]) -> None:
        """See Outcomes."""
        self.set_ways(handle, ways)

    def loaded(self, handle: ModelHandle, target: Target, loaded: Loaded, took_s: float) -> None:
        """See Outcomes."""
        core_id = handle.core_id
        self._targets[core_id] = target
        own_bytes, source = dict(loaded.own_bytes), _core.Source[loaded.source.name]
        now_ns = self._now_ns()
        self._recent_loads.note(now_ns, took_s)
        self._apply(self._yard.load_done(core_id, now_ns, own_bytes, took_s, source))
        self._settle(handle)

    def load_failed(self, handle: ModelHandle, failure: _core.LoadFailure) -> None:
        """See Outcomes."""
        self._apply(self._yard.load_failed(handle.core_id, self._now_ns(), failure))
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
        back = {device: size - missing.get(device, 0) for device, size in alone.items()}
        is_kept = unloaded.refused_bytes is None
        copy_bytes = unloaded.kept_bytes if is_kept else unloaded.refused_bytes
        self._apply(
            self._yard.unload_done(
                handle.core_id, self._now_ns(), back, copy_bytes, unloaded.keep_s, is_kept
            )
        )
        self._settle(handle)
        self._forget_if_gone(handle)
        return missing

    def reclaimed(self, handle: ModelHandle, back: Mapping[int, int]) -> None:
        """See Outcomes."""
        lost = self.use(handle).quarantined
        # Of what others held as well nothing was lost.
        found = {device: min(size, lost[device]) for device, size in back.items() if device in lost}
        self._apply(self._yard.reclaimed(handle.core_id, self._now_ns(), found))
        self.journal.changed(handle.name)
        self._forget_if_gone(handle)

    def is_short(self, handle: ModelHandle) -> bool:
        """See Outcomes."""
        return bool(self.use(handle).quarantined)

    def copy_in_use(self, handle: ModelHandle) -> int:
        """See Outcomes."""
        core_id = handle.core_id
        self._apply(self._yard.copy_in_use(core_id, self._now_ns()))
        self.journal.changed(handle.name)
        self._settle(handle)
        return self._yard.copy_exclusive(core_id)

    def copy_dropped(self, handle: ModelHandle) -> None:
        """See Outcomes."""
        core_id = handle.core_id
        freed = self._yard.copy_exclusive(core_id)
        self._apply(self._yard.copy_dropped(core_id, self._now_ns(), freed))
        self.journal.changed(handle.name)
        self._settle(handle)
        self._forget_if_gone(handle)

    def _settle(self, handle: ModelHandle) -> None:
        waiters, handle._settled = handle._settled, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _forget_if_gone(self, handle: ModelHandle) -> None:
        if self._yard.entry(handle.core_id) is None:
            self._handles.pop(handle.core_id, None)
            self._shared.drop(handle.core_id)
            self._teller.forget(handle.core_id)


def heir_of(handle: ModelHandle) -> ModelHandle:
    """The handle that has a model's place now: itself, unless another has taken over."""
    while handle.successor is not None:
        handle = handle.successor
    return handle
