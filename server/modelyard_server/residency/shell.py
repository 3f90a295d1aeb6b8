"""The residency shell: carries out what the core decides, and tells it what became of it.

The core is pure: events in, actions out. This shell is where time, tasks and futures are. Every
event goes in on the event loop's thread, and the actions it returns are carried out before anything
else runs, so the core never sees two events at once and needs no lock.

A hit is one core call. A miss gets a ticket and a future; the core's Grant or Refuse settles it.
Loads
and unloads are tasks of this shell, not of the request that caused them: a client that leaves takes
its ticket back and nothing else.

Its package is the only importer of the core's module.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, assert_never

from modelyard_server import _core
from modelyard_server.errors import Reason, Refusal
from modelyard_server.execution.engine import Engine
from modelyard_server.residency.refusals import refusal_of
from modelyard_server.residency.values import (
    GONE,
    NEVER_NS,
    DeviceUse,
    ModelHandle,
    ModelUse,
    State,
    YardSettings,
)
from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError, ModelSpec

if TYPE_CHECKING:
    from modelyard_server._core import _Action  # Exists for type checkers only.

__all__ = ["Lease", "Residency"]

logger = logging.getLogger(__name__)

_RECHECK_S = (0.1, 1.0, 5.0, 30.0)
"""When an unload's missing memory is looked for again; the last one repeats."""


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
        future
    that a waiter dropped never keeps a lease.

    Args:
        settings: how the core behaves.
        device_names: resource names of the devices, for errors.
        engine: what loads and unloads.
        now_ns: the clock; monotonic.
    """

    def __init__(
        self,
        *,
        settings: YardSettings,
        device_names: Sequence[str],
        engine: Engine,
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
        )
        self._device_names = tuple(device_names)
        self._engine = engine
        self._now_ns = now_ns
        self._handles: dict[int, ModelHandle] = {}
        self._tickets: dict[int, asyncio.Future[int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._rechecks: set[asyncio.Task[None]] = set()
        self._todo: deque[_Action] = deque()
        self._carrying_out = False
        self._timer: asyncio.TimerHandle | None = None
        self._device_of: dict[int, int] = {}
        self._closing = False

    # --- Models -------------------------------------------------------------------------------

    def add(
        self,
        spec: ModelSpec,
        *,
        placements: Sequence[int],
        needed_bytes: int,
        reload_s: float = 1.0,
    ) -> ModelHandle:
        """Registers a model, cold.

        Args:
            spec: what the engine will load.
            placements: positions of the devices it may be loaded onto, the preferred one first.
            needed_bytes: upper bound of what a load takes.
            reload_s: expected load time until one has been measured.
        """
        core_id = self._yard.add_model(
            spec.name, [{device: needed_bytes} for device in placements], reload_s
        )
        handle = ModelHandle(
            name=spec.name,
            core_id=core_id,
            spec=spec,
            placements=tuple(placements),
            needed_bytes=needed_bytes,
        )
        self._handles[core_id] = handle
        return handle

    def remove(self, handle: ModelHandle) -> None:
        """Takes a model out. Requests that run are answered; those that wait are refused."""
        self._apply(self._yard.remove_model(handle.core_id, self._now_ns()))
        self._forget_if_gone(handle)

    def set_pinned(self, handle: ModelHandle, pinned: bool) -> None:
        """Pins a model or lets it go. Pinning does not load it; see want."""
        change = self._yard.pin if pinned else self._yard.unpin
        self._apply(change(handle.core_id, self._now_ns()))

    def want(self, handle: ModelHandle) -> None:
        """Asks for a model to be resident, without waiting. Refused as a request would be.

        Raises:
            Refusal: it cannot be loaded now; see lease.
        """
        ticket, actions = self._yard.request(handle.core_id, self._now_ns(), NEVER_NS)
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._tickets[ticket] = future
        self._apply(actions)
        # Nobody waits for it: a grant is given back at once, a late refusal is the model's state.
        if future.done():
            self._release(future.result())
        else:
            future.add_done_callback(self._give_back)

    async def unload(self, handle: ModelHandle) -> None:
        """Takes a model out of memory and returns when its memory is back.

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
        while self.use(handle).state in (State.LOADING, State.DRAINING, State.UNLOADING):
            settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            handle._settled.append(settled)
            await settled
            if self.use(handle).state is State.LOADING:
                break  # Somebody wants it again: it has left in between.

    # --- Requests -----------------------------------------------------------------------------

    def try_lease(self, handle: ModelHandle) -> Lease | None:
        """The way of a hit: a lease if the model is resident, at the cost of one core call."""
        lease_id = self._yard.try_acquire(handle.core_id, self._now_ns())
        return Lease(self, lease_id, handle, 0.0, None) if lease_id else None

    async def lease(self, handle: ModelHandle, deadline_ns: int) -> Lease:
        """Waits until the model is resident and leases it.

        Args:
            handle: the model.
            deadline_ns: of the residency's clock; NEVER_NS for none.

        Raises:
            Refusal: MODEL_NEVER_FITS, BUDGET_EXHAUSTED, QUEUE_FULL, LOAD_FAILED, MODEL_NOT_FOUND,
                DEADLINE_IN_QUEUE or DEADLINE_IN_LOAD.
        """
        began_ns = self._now_ns()
        loop = asyncio.get_running_loop()
        ticket, actions = self._yard.request(handle.core_id, began_ns, deadline_ns)
        future: asyncio.Future[int] = loop.create_future()
        self._tickets[ticket] = future
        self._apply(actions)
        try:
            lease_id = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._release(future.result())  # Granted, and cancelled before it could be seen.
            elif self._tickets.pop(ticket, None) is not None:
                self._apply(self._yard.cancel(ticket, self._now_ns()))
            raise
        now_ns = self._now_ns()
        wait_s = (now_ns - began_ns) * 1e-9
        began_loading = handle.load_started
        load_s = None if began_loading is None else max(0.0, loop.time() - began_loading)
        return Lease(self, lease_id, handle, wait_s, load_s)

    def device_of(self, handle: ModelHandle) -> int:
        """Position of the device a resident model is on."""
        return self._device_of[handle.core_id]

    # --- Devices ------------------------------------------------------------------------------

    def set_budget(self, device: int, budget_bytes: int) -> None:
        """Changes a budget; what no longer fits drains."""
        self._apply(self._yard.set_budget(device, budget_bytes, self._now_ns()))

    # --- Looking ------------------------------------------------------------------------------

    def use(self, handle: ModelHandle) -> ModelUse:
        """Where a model stands."""
        entry = self._yard.entry(handle.core_id)
        if entry is None:  # Removed, and everything is back.
            return GONE
        failed = entry.state is State.FAILED
        return ModelUse(
            state=entry.state,
            charges=entry.held,
            quarantined=entry.quarantined,
            pinned=entry.pinned,
            lease_count=entry.lease_count,
            waiting_count=entry.waiting_count,
            load_count=entry.load_count,
            eviction_count=entry.eviction_count,
            load_duration_s=entry.reload_seconds if entry.load_count else None,
            failure_text=handle.failure_text if failed else "",
            failure_transient=failed and entry.failure is _core.LoadFailure.TRANSIENT,
            failure_count=entry.failure_count if failed else 0,
            retry_in_s=max(0, entry.retry_at_ns - self._now_ns()) * 1e-9 if failed else 0.0,
        )

    def device_use(self, device: int) -> DeviceUse:
        """What a device has promised and holds."""
        account = self._yard.account(device)
        loads, evictions = self._yard.device_counters(device)
        return DeviceUse(
            budget=account.budget,
            reserved=account.reserved,
            resident=account.resident,
            draining=account.draining,
            quarantined=account.quarantined,
            deficit=account.deficit,
            peak=account.peak,
            load_count=loads,
            eviction_count=evictions,
        )

    @property
    def counters(self) -> _core.Counters:
        """What the core has counted."""
        return self._yard.counters

    @property
    def policy(self) -> str:
        """Name of the eviction policy."""
        return self._yard.policy

    @property
    def waiting_count(self) -> int:
        """Requests that wait for a model now."""
        return self._yard.waiting_count

    @property
    def lease_count(self) -> int:
        """Leases that are out now."""
        return self._yard.lease_count

    def explanations(self) -> list[dict[str, Any]]:
        """The last decisions, oldest first."""
        return self._yard.explanations()

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
        for task in self._rechecks:
            task.cancel()
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
            self._stop_load(handle)
        deadline = asyncio.get_running_loop().time() + timeout_s
        while tasks := self._tasks | self._rechecks:
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0:
                return False
            await asyncio.wait(tasks, timeout=left_s)
        return True

    # --- Actions ------------------------------------------------------------------------------

    def _apply(self, actions: list[_Action] | None) -> None:
        """Carries actions out, in order; those that come of carrying one out after the others."""
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
                self._start(self._load(action.model, action.placement), "load", action.model)
            case _core.CancelLoad():
                self._stop_load(self._handles[action.model])
            case _core.Drain():
                logger.debug("draining %s", self._handles[action.model].name)
            case _core.Unload():
                self._start(self._unload(action.model), "unload", action.model)
            case _core.WakeAt():
                self._wake_at(action.at_ns)
            case _:
                assert_never(action)

    def _stop_load(self, handle: ModelHandle) -> None:
        handle.load_stopped = True
        self._engine.cancel_load(handle.core_id)

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
                refusal_of(refuse, device_names=self._device_names, name_of=self._name_of)
            )

    def _name_of(self, core_id: int) -> str:
        handle = self._handles.get(core_id)
        return "a removed model" if handle is None else handle.name

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
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._apply(self._yard.tick(self._now_ns()))

    def _start(self, work: Coroutine[Any, Any, None], what: str, core_id: int) -> None:
        name = f"{what} {self._handles[core_id].name}"
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _start_recheck(self, handle: ModelHandle, device: int) -> None:
        task = asyncio.get_running_loop().create_task(
            self._recheck(handle, device), name=f"recheck {handle.name}"
        )
        self._rechecks.add(task)
        task.add_done_callback(self._rechecks.discard)

    async def _load(self, core_id: int, placement: int) -> None:
        handle = self._handles[core_id]
        device = handle.placements[placement]
        loop = asyncio.get_running_loop()
        handle.load_started = began = loop.time()
        handle.load_stopped = self._closing
        try:
            await self._price_again(handle)
            # The engine did not know of the load until now, and could not stop it.
            if handle.load_stopped:
                raise LoadCancelled
            size_bytes = await self._engine.load(core_id, handle.spec, device)
        except LoadCancelled:
            outcome = _core.LoadFailure.CANCELLED
        except ModelFilesError as error:
            handle.failure_text = error.text
            outcome = (
                _core.LoadFailure.TRANSIENT if error.transient else _core.LoadFailure.PERMANENT
            )
            logger.warning("loading %s failed: %s", handle.name, error.text)
        except MemoryError:
            handle.failure_text = "the machine has no memory for it now"
            outcome = _core.LoadFailure.TRANSIENT
            logger.exception("loading %s failed", handle.name)
        except Exception as error:  # the task's edge: it becomes an event and one log line
            handle.failure_text = f"its loader raised {type(error).__name__}"
            outcome = _core.LoadFailure.PERMANENT
            logger.exception("loading %s failed", handle.name)
        else:
            took_s = loop.time() - began
            logger.info("loaded %s in %.3f s", handle.name, took_s)
            self._device_of[core_id] = device
            handle.failure_text = ""
            self._apply(self._yard.load_done(core_id, self._now_ns(), {device: size_bytes}, took_s))
            # Only now: whoever is granted by this load still reads when it began.
            loop.call_soon(setattr, handle, "load_started", None)
            self._settle(handle)
            return
        handle.load_started = None
        self._apply(self._yard.load_failed(core_id, self._now_ns(), outcome))
        self._settle(handle)
        self._forget_if_gone(handle)

    async def _price_again(self, handle: ModelHandle) -> None:
        """Looks whether the files have grown since they were priced.

        If so, what is reserved is too little: the load is given up, and the core, told the new
        price, makes room for it and asks again.
        """
        needed = (await self._engine.price(handle.spec)).peak_bytes
        if needed <= handle.needed_bytes:
            return
        if needed > _core.MAX_BYTES:
            raise ModelFilesError(f"needs {needed} bytes, more than any device has")
        handle.needed_bytes = needed
        placements = [{device: needed} for device in handle.placements]
        self._apply(self._yard.update_placements(handle.core_id, placements, self._now_ns()))
        raise LoadCancelled

    async def _unload(self, core_id: int) -> None:
        handle = self._handles[core_id]
        device = self._device_of.pop(core_id)
        freed = await self._engine.unload(core_id)
        use = self.use(handle)
        missing = use.charges.get(device, 0) - freed
        self._apply(self._yard.unload_done(core_id, self._now_ns(), {device: freed}))
        self._settle(handle)
        if missing > 0:
            logger.error(
                "%s kept %d bytes on %s after its unload; they are quarantined",
                handle.name,
                missing,
                self._device_names[device],
            )
            self._start_recheck(handle, device)
        self._forget_if_gone(handle)

    async def _recheck(self, handle: ModelHandle, device: int) -> None:
        attempt = 0
        while device in self.use(handle).quarantined:
            await asyncio.sleep(_RECHECK_S[min(attempt, len(_RECHECK_S) - 1)])
            attempt += 1
            back = await self._engine.recheck(handle.core_id, device)
            if back:
                logger.info("%d quarantined bytes of %s are back", back, handle.name)
                self._apply(self._yard.reclaimed(handle.core_id, self._now_ns(), {device: back}))
        self._forget_if_gone(handle)

    def _settle(self, handle: ModelHandle) -> None:
        waiters, handle._settled = handle._settled, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _forget_if_gone(self, handle: ModelHandle) -> None:
        if self._yard.entry(handle.core_id) is None:
            self._handles.pop(handle.core_id, None)
