"""The residency shell: the core's yard as the rest of the server sees it.

The core is pure: events in, actions out. This package is where time, tasks and futures are. Every
event goes in on the event loop's thread, and the actions it returns are carried out before anything
else runs, so the core never sees two events at once and needs no lock.

A hit is one core call. A miss gets a ticket and a future (tickets.py); the core's Grant or Refuse
settles it. Loads and unloads (begun by actions.py, done by transfers.py) are tasks of this package,
not of the request that caused them: a client that leaves takes its ticket back and nothing else.

Its package is the only importer of the core's module.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from modelyard_server import _core
from modelyard_server.devices.placed import PlacedAs, placements_of, shared_of, shares_on
from modelyard_server.errors import Reason, Refusal
from modelyard_server.execution.engine import Engine
from modelyard_server.residency.actions import Actions
from modelyard_server.residency.arrival_order import ArrivalOrder
from modelyard_server.residency.host_tier import HOST_TIER, tier_use
from modelyard_server.residency.journal import Journal
from modelyard_server.residency.rehearsal import Rehearsal
from modelyard_server.residency.shared import SharedTensors
from modelyard_server.residency.telling import Teller
from modelyard_server.residency.tickets import Tickets
from modelyard_server.residency.uses import device_use, model_use
from modelyard_server.residency.values import (
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
from modelyard_server.runtimes.api import ModelSpec, Price
from modelyard_server.runtimes.targets import Target

if TYPE_CHECKING:
    from modelyard_server._core import _Action  # Exists for type checkers only.

__all__ = ["Lease", "Residency", "heir_of"]

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
        self._residency._yard.set_aside(self._id)

    def release(self) -> None:
        """Gives it back. What that makes possible (an unload, a waiting load) begins at once."""
        self._residency._tickets.release(self._id)

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
        self._device_names = tuple(device_names)
        self._now_ns = now_ns
        self._handles: dict[int, ModelHandle] = {}
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
        self._tickets = Tickets(
            self._yard,
            now_ns=now_ns,
            carry_out=self._carry_out,
            journal=self.journal,
            device_names=device_names,
            name_of=self._teller.name_of,
        )
        self._actions = Actions(
            self._yard,
            now_ns=now_ns,
            engine=engine,
            device_names=device_names,
            handles=self._handles,
            tickets=self._tickets,
            teller=self._teller,
            journal=self.journal,
            set_ways=self.set_ways,
            forget_if_gone=self._forget_if_gone,
        )

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
        self._carry_out(actions)

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
        self._carry_out(self._yard.remove_model(handle.core_id, self._now_ns()))
        self._forget_if_gone(handle)

    def set_pinned(self, handle: ModelHandle, pinned: bool) -> None:
        """Pins a model or lets it go. Pinning does not load it; see want."""
        change = self._yard.pin if pinned else self._yard.unpin
        self._carry_out(change(handle.core_id, self._now_ns()))

    def want(self, handle: ModelHandle) -> None:
        """Asks for a model to be resident, without waiting, as an operator does.

        Refused as a request would be.

        Raises:
            Refusal: it cannot be loaded now; see lease.
        """
        self._tickets.want(handle)

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
                self._carry_out(self._yard.lost(core_id, self._now_ns()))
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
                self._carry_out(self._yard.copy_lost(core_id, self._now_ns()))

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
        self._carry_out(actions)
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
        in_use = use.copy_in_use and (use.copy_bytes > 0 or self._actions.is_closing)
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
        lease_id = await self._tickets.lease_id(handle, deadline_ns, asked=asked)
        now_ns = self._now_ns()
        wait_s = (now_ns - began_ns) * 1e-9
        began_loading = handle.load_started
        load_s = None if began_loading is None else max(0.0, loop.time() - began_loading)
        return Lease(self, lease_id, handle, wait_s, load_s)

    def device_of(self, handle: ModelHandle) -> int:
        """Position of the home device of a resident model."""
        return self._actions.targets[handle.core_id].home

    def target_of(self, handle: ModelHandle) -> Target | None:
        """Where each part of a model is that is in memory, or about to leave it; else None."""
        return self._actions.targets.get(handle.core_id)

    # --- Devices ------------------------------------------------------------------------------

    def set_budget(self, device: int, budget_bytes: int) -> None:
        """Changes a budget; what no longer fits drains."""
        self._engine.set_budget(device, budget_bytes)
        self._carry_out(self._yard.set_budget(device, budget_bytes, self._now_ns()))

    def set_closed(self, device: int, closed: bool) -> None:
        """Closes a device: nothing is loaded onto it, and what is there drains unless pinned."""
        self._carry_out(self._yard.set_device_closed(device, closed, self._now_ns()))

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

    def watching_drains(self) -> AbstractContextManager[asyncio.Event]:
        """Gives an event that is set whenever a model is asked to leave while it is leased."""
        return self._actions.watching_drains()

    def use(self, handle: ModelHandle) -> ModelUse:
        """Where a model stands."""
        return model_use(self._yard, handle, self._now_ns())

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
        return self._actions.recent_load_s

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
        self._actions.stop()
        if self._line is not None:
            self._line.close()
        self._tickets.close()
        return await self._actions.end(timeout_s)

    # --- What the parts share -----------------------------------------------------------------

    def _carry_out(self, actions: list[_Action] | None, *, asked: int = 0) -> None:
        self._actions.carry_out(actions, asked=asked)

    def _forget_if_gone(self, handle: ModelHandle) -> None:
        """Drops what is known of a model, if the yard does not know it any more."""
        if self._yard.entry(handle.core_id) is None:
            self._handles.pop(handle.core_id, None)
            self._shared.drop(handle.core_id)
            self._teller.forget(handle.core_id)


def heir_of(handle: ModelHandle) -> ModelHandle:
    """The handle that has a model's place now: itself, unless another has taken over."""
    while handle.successor is not None:
        handle = handle.successor
    return handle
