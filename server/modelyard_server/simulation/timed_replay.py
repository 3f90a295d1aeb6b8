"""The timed replay: arrivals, load channels and execution slots under a virtual clock.

The simulator stands where the server stands. It tells the core what happened and when, and carries
out what the core decides: a load ends after its seconds, memory is back a little after an unload,
a granted request takes one of its device's execution slots when its turn comes and gives its lease
back when it has run. Times are integers, nanoseconds from the first arrival, so that a replay comes
out the same everywhere.
"""

from __future__ import annotations

import heapq
import random
from array import array
from bisect import insort
from collections.abc import Iterable
from enum import IntEnum
from typing import Final

import numpy as np

from modelyard_server import _core
from modelyard_server.simulation.disturbances import (
    Clock,
    Disturbances,
    StallingClock,
    load_factor,
)
from modelyard_server.simulation.machine import Machine, SimulationError, bind_yard
from modelyard_server.simulation.outcome import Outcome, Progress
from modelyard_server.simulation.trace import Trace

__all__ = ["nanoseconds", "replay_timed"]

_NS: Final = 1_000_000_000
_TELL_EVERY: Final = 4096
_STEPS_PER_REQUEST: Final = 1000
"""More events than this for each request mean that the replay goes round in circles."""


class _State(IntEnum):
    """Where a request is."""

    TO_COME = 0
    WAITING = 1  # For its model.
    GRANTED = 2  # It has a lease and waits for a slot.
    RUNNING = 3
    SERVED = 4
    REFUSED = 5
    CANCELLED = 6


class _Kind(IntEnum):
    """What happens at a time. At equal times ends come before beginnings."""

    RUN_END = 0
    LOAD_END = 1
    UNLOAD_END = 2
    DROP_END = 3
    CANCEL = 4
    WAKE = 5


_Event = tuple[int, int, int, int, int]
"""Time, kind, serial number, and two numbers that depend on the kind."""


def replay_timed(
    trace: Trace,
    machine: Machine,
    policy: str,
    disturbances: Disturbances | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Replay a trace through the core as time goes by.

    Args:
        trace: what was wanted when, and for how long.
        machine: budgets, slots and load channels.
        policy: one of ``_core.POLICIES``.
        disturbances: what goes wrong; None for nothing.
        progress: is told how many requests have arrived.

    Raises:
        TraceError: a model is larger than every budget, or the trace is too long for the clock.
        SimulationError: a request got no answer, the core's audit failed, or it never ended.
    """
    trace.check_countable()
    return _TimedReplay(trace, machine, policy, disturbances).run(progress)


def nanoseconds(seconds: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[int]:
    """Return seconds as whole nanoseconds."""
    return [int(ns) for ns in np.rint(seconds * _NS).astype(np.int64).tolist()]


class _TimedReplay:
    def __init__(
        self, trace: Trace, machine: Machine, policy: str, disturbances: Disturbances | None
    ) -> None:
        self._trace = trace
        self._machine = machine
        self._policy = policy
        self._bound = bind_yard(trace, machine, policy)
        self._yard = self._bound.yard
        self._disturbances = disturbances or Disturbances(seed=0)
        self._chance = random.Random(self._disturbances.seed)
        self._clock = self._make_clock()
        count = len(trace)
        self._model: list[int] = trace.model.tolist()
        self._arrival_ns = nanoseconds(trace.arrival_s)
        self._run_ns = nanoseconds(trace.run_s)
        self._unload_ns = int(machine.unload_s * _NS)
        self._at_ns = 0
        self._now_ns = 0
        self._arrived = 0
        self._ended_ns = 0
        self._events: list[_Event] = []
        self._serial = 0
        self._step_count = 0
        # Requests.
        self._state = bytearray(count)
        self._lease = [0] * count
        self._ticket_of: dict[int, int] = {}
        self._request_of: dict[int, int] = {}
        self._hit = bytearray(count)
        self._start_ns = array("q", [-1]) * count
        self._refused: dict[str, int] = {}
        # Models and devices.
        self._place: list[tuple[int, ...]] = [()] * len(trace.models)
        self._load_serial: dict[int, int] = {}
        self._load_s: dict[int, float] = {}
        self._free_slots = [machine.slots] * len(machine.budgets)
        self._lanes: list[list[int]] = [[] for _ in machine.budgets]
        # Loads.
        self._load_at = array("q")
        self._load_took_s = array("d")
        self._loads_begun = 0
        self._host_load_count = 0
        self._failed_load_count = 0

    def _make_clock(self) -> Clock:
        told = self._disturbances
        if told.stall_every_s <= 0 or told.stall_s <= 0:
            return Clock()
        return StallingClock(random.Random(told.seed + 1), told.stall_every_s, told.stall_s)

    def run(self, progress: Progress | None) -> Outcome:
        count = len(self._model)
        most_steps = _STEPS_PER_REQUEST * (count + 1000)
        audit_every = self._disturbances.audit_every
        while self._events or self._arrived < count:
            self._step()
            self._step_count += 1
            if audit_every and self._step_count % audit_every == 0:
                self._audit()
            if progress is not None and self._step_count % _TELL_EVERY == 0:
                progress(self._arrived)
            if self._step_count > most_steps:
                raise SimulationError(
                    f"still going on after {most_steps} steps, at {self._at_ns / _NS:.3f} s"
                )
        self._audit()
        self._check_answered()
        return self._outcome()

    # --- Events

    def _step(self) -> None:
        i = self._arrived
        events = self._events
        if events and (i == len(self._model) or events[0][0] <= self._arrival_ns[i]):
            at_ns, kind, serial, first, second = heapq.heappop(events)
            self._go_to(at_ns)
            self._happen(kind, serial, first, second)
        else:
            self._arrived += 1
            self._go_to(self._arrival_ns[i])
            self._arrive(i)

    def _go_to(self, at_ns: int) -> None:
        self._at_ns = at_ns
        self._now_ns = self._clock.read(at_ns)

    def _push(self, at_ns: int, kind: int, first: int, second: int = 0) -> int:
        self._serial += 1
        heapq.heappush(self._events, (at_ns, kind, self._serial, first, second))
        return self._serial

    def _happen(self, kind: int, serial: int, first: int, second: int) -> None:
        if kind == _Kind.RUN_END:
            self._end_run(first)
        elif kind == _Kind.LOAD_END:
            self._end_load(first, serial, second)
        elif kind == _Kind.UNLOAD_END:
            self._end_unload(first, keep=bool(second))
        elif kind == _Kind.DROP_END:
            freed = self._yard.copy_exclusive(first)
            self._carry_out(self._yard.copy_dropped(first, self._now_ns, freed))
        elif kind == _Kind.CANCEL:
            self._cancel(first)
        elif self._now_ns < first:
            # The core's clock stands still: it would take no notice.
            self._push(self._clock.next_reading(self._at_ns), _Kind.WAKE, first)
        else:
            self._carry_out(self._yard.tick(self._now_ns))

    def _arrive(self, i: int) -> None:
        core_id = self._bound.core_ids[self._model[i]]
        if self._disturbances.cancel_share > 0:
            self._plan_cancel(i)
        lease = self._yard.try_acquire(core_id, self._now_ns)
        if lease:
            self._hit[i] = 1
            self._grant(i, lease)
            return
        deadline_s = self._machine.deadline_s
        deadline = _core.NEVER_NS if deadline_s is None else self._now_ns + int(deadline_s * _NS)
        ticket, actions = self._yard.request(core_id, self._now_ns, deadline)
        self._state[i] = _State.WAITING
        self._request_of[ticket] = i
        self._ticket_of[i] = ticket
        self._carry_out(actions)

    def _plan_cancel(self, i: int) -> None:
        if self._chance.random() < self._disturbances.cancel_share:
            within_s = self._chance.uniform(0.0, self._disturbances.cancel_within_s)
            self._push(self._at_ns + int(within_s * _NS), _Kind.CANCEL, i)

    # --- What the core decides

    def _carry_out(self, actions: Iterable[_core._Action] | None) -> None:
        if not actions:
            return
        for action in actions:
            kind = type(action)
            # mypy narrows by isinstance only; the types are final.
            if isinstance(action, _core.Grant):
                self._grant(self._answered(action.ticket), action.lease)
            elif isinstance(action, _core.Load):
                self._begin_load(action.model, action.placement)
            elif isinstance(action, _core.Unload):
                self._begin_unload(action.model, keep=action.keep)
            elif isinstance(action, _core.WakeAt):
                self._push(max(action.at_ns, self._at_ns), _Kind.WAKE, action.at_ns)
            elif isinstance(action, _core.Refuse):
                self._refuse(self._answered(action.ticket), action.reason.name)
            elif isinstance(action, _core.DropCopy):
                self._push(self._at_ns, _Kind.DROP_END, action.model)
            elif isinstance(action, _core.CancelLoad):
                self._cancel_load(action.model)
            elif kind is not _core.Drain:
                raise SimulationError(f"the core wants {kind.__name__}, which nobody knows")
        self._bound.read_log()

    def _answered(self, ticket: int) -> int:
        i = self._request_of.pop(ticket, -1)
        if i < 0:
            raise SimulationError(f"ticket {ticket} was answered twice, or never given")
        del self._ticket_of[i]
        return i

    def _refuse(self, i: int, reason: str) -> None:
        self._state[i] = _State.REFUSED
        self._refused[reason] = self._refused.get(reason, 0) + 1
        self._ended_ns = self._at_ns

    # --- Loads

    def _begin_load(self, core_id: int, placement: int) -> None:
        position = self._bound.positions[core_id]
        model = self._trace.models[position]
        self._place[position] = self._bound.devices[position][placement]
        entry = self._yard.entry(core_id)
        from_copy = entry is not None and entry.copy_state is _core.CopyState.KEPT
        took_s = model.host_load_s if from_copy else model.load_s
        took_s *= load_factor(self._chance, self._disturbances.load_spread)
        self._loads_begun += 1
        fail_every = self._disturbances.fail_every
        fails = fail_every > 0 and self._loads_begun % fail_every == 0
        if fails:
            took_s /= 2
        outcome = 2 if fails else int(from_copy)
        end_ns = self._at_ns + max(1, int(took_s * _NS))
        self._load_serial[core_id] = self._push(end_ns, _Kind.LOAD_END, core_id, outcome)
        self._load_s[core_id] = took_s
        self._load_at.append(self._arrived - 1)
        self._load_took_s.append(took_s)
        self._host_load_count += from_copy and not fails

    def _cancel_load(self, core_id: int) -> None:
        self._load_serial[core_id] = self._push(self._at_ns, _Kind.LOAD_END, core_id, 3)

    def _end_load(self, core_id: int, serial: int, outcome: int) -> None:
        if self._load_serial.get(core_id) != serial:
            return  # It was called off.
        del self._load_serial[core_id]
        yard = self._yard
        if outcome >= 2:
            self._failed_load_count += 1
            failure = _core.LoadFailure.TRANSIENT if outcome == 2 else _core.LoadFailure.CANCELLED
            self._carry_out(yard.load_failed(core_id, self._now_ns, failure))
            return
        entry = yard.entry(core_id)
        if entry is None:
            raise SimulationError("a load of a model that there is not")
        took_s = self._load_s[core_id]
        source = _core.Source.COPY if outcome else _core.Source.STORAGE
        self._carry_out(yard.load_done(core_id, self._now_ns, entry.held, took_s, source))

    def _begin_unload(self, core_id: int, *, keep: bool) -> None:
        model = self._trace.models[self._bound.positions[core_id]]
        took_ns = self._unload_ns + (int(model.host_load_s * _NS) if keep else 0)
        self._push(self._at_ns + took_ns, _Kind.UNLOAD_END, core_id, int(keep))

    def _end_unload(self, core_id: int, *, keep: bool) -> None:
        yard = self._yard
        freed = yard.exclusive(core_id)
        if not keep:
            self._carry_out(yard.unload_done(core_id, self._now_ns, freed))
            return
        model = self._trace.models[self._bound.positions[core_id]]
        self._carry_out(
            yard.unload_done(core_id, self._now_ns, freed, model.size_bytes, model.host_load_s)
        )

    # --- Runs

    def _grant(self, i: int, lease: int) -> None:
        self._lease[i] = lease
        place = self._place[self._model[i]]
        if all(self._free_slots[device] > 0 and not self._lanes[device] for device in place):
            self._start(i, place)
        else:
            self._state[i] = _State.GRANTED
            for device in place:
                insort(self._lanes[device], i)  # In the order of arrival.
            # It may be before one that waits for a slot on another device.
            self._serve_lanes(place)

    def _start(self, i: int, place: tuple[int, ...]) -> None:
        for device in place:
            self._free_slots[device] -= 1
        self._state[i] = _State.RUNNING
        self._start_ns[i] = self._at_ns
        self._push(self._at_ns + self._run_ns[i], _Kind.RUN_END, i)

    def _serve_lanes(self, devices: Iterable[int]) -> None:
        """Start who is first in its lanes, as long as all of them have slots.

        In a lane nobody is overtaken, so that a model on many devices finds them free together.
        """
        todo = list(devices)
        while todo:
            lane = self._lanes[device := todo.pop()]
            while lane:
                first = lane[0]
                place = self._place[self._model[first]]
                if any(self._free_slots[d] == 0 or self._lanes[d][0] != first for d in place):
                    break
                for d in place:
                    del self._lanes[d][0]
                self._start(first, place)
                # Behind it others may be first now.
                todo += [d for d in place if d != device]

    def _end_run(self, i: int) -> None:
        if self._state[i] == _State.RUNNING:
            self._leave_slot(i, _State.SERVED)

    def _leave_slot(self, i: int, state: _State) -> None:
        self._state[i] = state
        self._ended_ns = self._at_ns
        place = self._place[self._model[i]]
        for device in place:
            self._free_slots[device] += 1
        self._carry_out(self._yard.release(self._lease[i], self._now_ns))
        self._serve_lanes(place)

    def _cancel(self, i: int) -> None:
        state = self._state[i]
        if state == _State.WAITING:
            self._state[i] = _State.CANCELLED
            ticket = self._ticket_of.pop(i)
            del self._request_of[ticket]
            self._carry_out(self._yard.cancel(ticket, self._now_ns))
        elif state == _State.GRANTED:
            self._state[i] = _State.CANCELLED
            place = self._place[self._model[i]]
            for device in place:
                self._lanes[device].remove(i)
            self._carry_out(self._yard.release(self._lease[i], self._now_ns))
            self._serve_lanes(place)
        elif state == _State.RUNNING:
            self._start_ns[i] = -1
            self._leave_slot(i, _State.CANCELLED)

    # --- The end

    def _audit(self) -> None:
        try:
            self._yard.audit()
        except RuntimeError as error:
            raise SimulationError(f"after {self._step_count} steps: {error}") from error

    def _check_answered(self) -> None:
        unanswered = [i for i, state in enumerate(self._state) if state < _State.SERVED]
        if unanswered:
            i = unanswered[0]
            raise SimulationError(
                f"{len(unanswered)} requests were never answered, the first is {i}: "
                f"{_State(self._state[i]).name}"
            )
        if self._yard.waiting_count or self._yard.lease_count:
            raise SimulationError(
                f"{self._yard.waiting_count} tickets and {self._yard.lease_count} leases are left"
            )

    def _outcome(self) -> Outcome:
        start_ns = np.asarray(self._start_ns, dtype=np.float64)
        arrival_ns = np.asarray(self._arrival_ns, dtype=np.float64)
        states = np.frombuffer(self._state, dtype=np.uint8)
        return Outcome(
            policy=self._policy,
            timed=True,
            request_count=len(states),
            served_count=int((states == _State.SERVED).sum()),
            refused=dict(sorted(self._refused.items())),
            cancelled_count=int((states == _State.CANCELLED).sum()),
            hit=np.frombuffer(self._hit, dtype=np.bool_),
            wait_s=np.where(start_ns >= 0, (start_ns - arrival_ns) / _NS, np.nan),
            load_at=np.asarray(self._load_at, dtype=np.int64),
            load_took_s=np.asarray(self._load_took_s, dtype=np.float64),
            host_load_count=self._host_load_count,
            failed_load_count=self._failed_load_count,
            evictions=self._bound.evictions(),
            makespan_s=self._ended_ns / _NS,
            step_count=self._step_count,
            leader=self._yard.leader,
        )
