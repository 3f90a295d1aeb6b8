"""Reference schedulers, for comparison: what a server does that does not think about its queue.

``fifo+lru`` serves one queue in order: while the oldest request waits for its model, nobody behind
it begins. ``fcfs+lru`` has a queue for each model: whoever's model is resident runs, oldest first,
and models are loaded in the order of their oldest requests: who cannot be loaded yet holds up all
younger ones. ``fcfs-each+lru`` has such a line for each device: it holds up those who want a device
that it wants. All evict the model that was used longest ago among those that no running request
uses, whether requests wait for it or not.

A model that spans devices needs a slot on each to run and a load channel of each to be loaded; who
waits for one holds up younger requests there.

They are plain simulators of their own with the slots, load channels and times of the timed replay.
The core has no part in them.
"""

from __future__ import annotations

import heapq
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from modelyard_server.simulation.machine import Machine, SimulationError, places_of
from modelyard_server.simulation.outcome import Outcome, Progress
from modelyard_server.simulation.timed_replay import nanoseconds
from modelyard_server.simulation.trace import Trace

__all__ = ["BASELINES", "replay_baseline"]

BASELINES: Final = ("fifo+lru", "fcfs+lru", "fcfs-each+lru")

_NS: Final = 1_000_000_000
_TELL_EVERY: Final = 4096


def replay_baseline(
    trace: Trace, machine: Machine, name: str, progress: Progress | None = None
) -> Outcome:
    """Replay a trace as time goes by with a reference scheduler.

    Args:
        trace: what was wanted when, and for how long.
        machine: budgets, slots and load channels; deadlines and the host tier are passed over.
        name: one of ``BASELINES``.
        progress: is told how many requests have arrived.

    Raises:
        TraceError: a model is larger than every budget, or the trace is too long for the clock.
        SimulationError: a request never ran.
    """
    trace.check_countable()
    trace.check_fits(machine.budgets)
    if name not in BASELINES:
        raise ValueError(f"no reference scheduler {name!r}; there are {', '.join(BASELINES)}")
    return _Baseline(trace, machine, name, in_order=name == "fifo+lru").run(progress)


@dataclass(slots=True)
class _Device:
    free_bytes: int
    free_slots: int
    free_channels: int
    # Resident models, the one used longest ago first.
    residents: dict[int, None] = field(default_factory=dict)


class _Baseline:
    def __init__(self, trace: Trace, machine: Machine, name: str, *, in_order: bool) -> None:
        self._trace = trace
        self._machine = machine
        self._name = name
        self._in_order = in_order
        self._a_line_each = name == "fcfs-each+lru"
        self._model: list[int] = trace.model.tolist()
        self._arrival_ns = nanoseconds(trace.arrival_s)
        self._run_ns = nanoseconds(trace.run_s)
        self._places: dict[int, tuple[tuple[int, ...], ...]] = {
            position: places_of(trace.models[position], machine.budgets)
            for position in trace.used()
        }
        # What each takes of every device that it is on.
        self._part = [model.parts(len(machine.budgets))[1] for model in trace.models]
        self._devices = [
            _Device(budget, machine.slots, machine.loads_per_device) for budget in machine.budgets
        ]
        self._where: dict[int, tuple[int, ...]] = {}
        self._loading: dict[int, tuple[int, ...]] = {}
        self._running = [0] * len(trace.models)
        # One queue in order, or one a model and the heads of those that cannot run at once.
        self._queue: deque[int] = deque()
        self._queues: dict[int, deque[int]] = {}
        self._events: list[tuple[int, int, int]] = []
        self._arrived = 0
        self._hit = bytearray(len(trace))
        self._start_ns = array("q", [-1]) * len(trace)
        self._load_at = array("q")
        self._load_took_s = array("d")
        self._eviction_count = 0
        self._ended_ns = 0
        self._step_count = 0

    def run(self, progress: Progress | None) -> Outcome:
        count = len(self._model)
        while self._events or self._arrived < count:
            i = self._arrived
            if self._events and (i == count or self._events[0][0] <= self._arrival_ns[i]):
                at_ns, is_load, subject = heapq.heappop(self._events)
                if is_load:
                    self._end_load(subject)
                else:
                    self._end_run(subject, at_ns)
            else:
                at_ns = self._arrival_ns[i]
                self._arrived += 1
                self._arrive(i)
            if self._in_order:
                self._serve_in_order(at_ns)
            else:
                self._serve_by_model(at_ns)
            self._step_count += 1
            if progress is not None and self._step_count % _TELL_EVERY == 0:
                progress(self._arrived)
        if min(self._start_ns) < 0:
            raise SimulationError(f"{self._name}: requests never ran")
        return self._outcome()

    # --- Events

    def _arrive(self, i: int) -> None:
        model = self._model[i]
        self._hit[i] = model in self._where
        if self._in_order:
            self._queue.append(i)
        else:
            self._queues.setdefault(model, deque()).append(i)

    def _end_load(self, model: int) -> None:
        place = self._loading.pop(model)
        self._where[model] = place
        for device in place:
            self._devices[device].residents[model] = None
            self._devices[device].free_channels += 1

    def _end_run(self, i: int, at_ns: int) -> None:
        model = self._model[i]
        self._running[model] -= 1
        for device in self._where[model]:
            self._devices[device].free_slots += 1
        self._ended_ns = at_ns

    # --- The two disciplines

    def _serve_in_order(self, at_ns: int) -> None:
        queue = self._queue
        while queue:
            i = queue[0]
            model = self._model[i]
            place = self._where.get(model)
            if place is None:
                self._load(model, at_ns)
                return
            if any(self._devices[device].free_slots == 0 for device in place):
                return
            queue.popleft()
            self._start(i, place, at_ns)

    def _serve_by_model(self, at_ns: int) -> None:
        if any(device.free_slots for device in self._devices):
            self._run_residents(at_ns)
        if not any(device.free_channels for device in self._devices):
            return
        absent = [m for m in self._queues if m not in self._where and m not in self._loading]
        held_up: set[int] = set()
        for model in sorted(absent, key=lambda model: self._queues[model][0]):
            # Who cannot be loaded yet is not overtaken by younger ones: not on its own devices, or,
            # where there is one line for all of them, nowhere.
            places = self._places[model]
            if all(held_up.intersection(place) for place in places) or not self._load(model, at_ns):
                if not self._a_line_each:
                    return
                held_up.update(*places)
                if len(held_up) == len(self._devices):
                    return

    def _run_residents(self, at_ns: int) -> None:
        """Start the oldest request of any resident model, until there are no slots."""
        oldest = [(self._queues[model][0], model) for model in self._queues if model in self._where]
        heapq.heapify(oldest)
        busy = {d for d, device in enumerate(self._devices) if device.free_slots == 0}
        while oldest and len(busy) < len(self._devices):
            i, model = heapq.heappop(oldest)
            place = self._where[model]
            if not busy.isdisjoint(place):
                # The slots that there are will not be taken from under it.
                busy.update(place)
                continue
            queue = self._queues[model]
            queue.popleft()
            self._start(i, place, at_ns)
            busy.update(device for device in place if self._devices[device].free_slots == 0)
            if queue:
                heapq.heappush(oldest, (queue[0], model))
            else:
                del self._queues[model]

    def _start(self, i: int, place: tuple[int, ...], at_ns: int) -> None:
        model = self._model[i]
        for device in place:
            state = self._devices[device]
            state.free_slots -= 1
            # Used just now: to the end of the order.
            del state.residents[model]
            state.residents[model] = None
        self._running[model] += 1
        self._start_ns[i] = at_ns
        heapq.heappush(self._events, (at_ns + self._run_ns[i], 0, i))

    # --- Loads

    def _load(self, model: int, at_ns: int) -> bool:
        """Begin to load a model where the fewest have to leave; False if that is nowhere."""
        if model in self._loading:
            return True
        best: tuple[int, tuple[int, ...], set[int]] | None = None
        for place in self._places[model]:
            if any(self._devices[d].free_channels == 0 for d in place):
                continue
            victims = self._victims(place, self._part[model])
            if victims is not None and (best is None or len(victims) < best[0]):
                best = (len(victims), place, victims)
        if best is None:
            return False
        _, place, victims = best
        for victim in victims:
            for d in self._where.pop(victim):
                del self._devices[d].residents[victim]
                self._devices[d].free_bytes += self._part[victim]
        for d in place:
            self._devices[d].free_bytes -= self._part[model]
            self._devices[d].free_channels -= 1
        self._eviction_count += len(victims)
        self._loading[model] = place
        took_s = self._trace.models[model].load_s
        self._load_at.append(self._arrived - 1)
        self._load_took_s.append(took_s)
        pause_s = self._machine.unload_s if victims else 0.0
        end_ns = at_ns + max(1, int((took_s + pause_s) * _NS))
        heapq.heappush(self._events, (end_ns, 1, model))
        return True

    def _victims(self, place: tuple[int, ...], part: int) -> set[int] | None:
        """Who has to leave so that there is room on each device; None if there is none even so."""
        victims: set[int] = set()
        for d in place:
            device = self._devices[d]
            free = device.free_bytes
            # Who leaves another of the devices leaves this one, too.
            free += sum(self._part[v] for v in victims if d in self._where[v])
            for resident in device.residents:
                if free >= part:
                    break
                if self._running[resident] == 0 and resident not in victims:
                    victims.add(resident)
                    free += self._part[resident]
            if free < part:
                return None
        return victims

    def _outcome(self) -> Outcome:
        start_ns = np.asarray(self._start_ns, dtype=np.float64)
        waits = (start_ns - np.asarray(self._arrival_ns, dtype=np.float64)) / _NS
        return Outcome(
            policy=self._name,
            timed=True,
            request_count=len(waits),
            served_count=len(waits),
            hit=np.frombuffer(self._hit, dtype=np.bool_),
            wait_s=waits,
            load_at=np.asarray(self._load_at, dtype=np.int64),
            load_took_s=np.asarray(self._load_took_s, dtype=np.float64),
            evictions={"idle_for_model": self._eviction_count} if self._eviction_count else {},
            makespan_s=self._ended_ns / _NS,
            step_count=self._step_count,
            leader="lru",
        )
