"""The serial replay: one request after the other, which is how eviction policies are compared.

Each request needs its model and is over before the next one comes. So nothing waits, nothing is in
use while something else is loaded, and the seconds of loading depend on the choice of victims
alone.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from typing import Final

import numpy as np

from modelyard_server import _core
from modelyard_server.simulation.machine import BoundYard, Machine, SimulationError, bind_yard
from modelyard_server.simulation.outcome import Outcome, Progress
from modelyard_server.simulation.trace import Trace

__all__ = ["replay_serially"]

_TELL_EVERY: Final = 4096


def replay_serially(
    trace: Trace, machine: Machine, policy: str, progress: Progress | None = None
) -> Outcome:
    """Replay a trace through the core, in order, without time.

    The virtual clock counts requests. Arrivals and execution times of the trace have no effect.

    Args:
        trace: what was wanted.
        machine: budgets; how fast its devices are has no effect.
        policy: one of ``_core.POLICIES``.
        progress: is told how many requests are over.

    Raises:
        TraceError: a model is larger than every budget.
        SimulationError: the core refused a request that it should have served.
    """
    return _SerialReplay(trace, bind_yard(trace, machine, policy)).run(policy, progress)


class _SerialReplay:
    def __init__(self, trace: Trace, bound: BoundYard) -> None:
        self._trace = trace
        self._bound = bound
        self._yard = bound.yard
        self._load_at = array("q")
        self._load_took_s = array("d")
        self._host_load_count = 0
        self._step_count = 0

    def run(self, policy: str, progress: Progress | None) -> Outcome:
        yard, core_ids = self._yard, self._bound.core_ids
        try_acquire, release = yard.try_acquire, yard.release
        hit = bytearray(len(self._trace))
        for i, position in enumerate(self._trace.model.tolist()):
            core_id = core_ids[position]
            lease = try_acquire(core_id, i)
            if lease:
                hit[i] = 1
                release(lease, i)
            else:
                self._miss(core_id, i)
            if progress is not None and i % _TELL_EVERY == 0:
                progress(i)
        yard.audit()
        return Outcome(
            policy=policy,
            timed=False,
            request_count=len(hit),
            served_count=len(hit),
            hit=np.frombuffer(hit, dtype=np.bool_),
            wait_s=np.zeros(0),
            load_at=np.asarray(self._load_at, dtype=np.int64),
            load_took_s=np.asarray(self._load_took_s, dtype=np.float64),
            host_load_count=self._host_load_count,
            evictions=self._bound.evictions(),
            makespan_s=float(sum(self._load_took_s)),
            step_count=self._step_count + len(hit),
            leader=yard.leader,
        )

    def _miss(self, core_id: int, now: int) -> None:
        _, actions = self._yard.request(core_id, now, _core.NEVER_NS)
        todo = deque(actions or ())
        granted = False
        while todo:
            action = todo.popleft()
            self._step_count += 1
            if type(action) is _core.Grant:
                granted = True
                todo.extend(self._yard.release(action.lease, now) or ())
            elif type(action) is _core.Refuse:
                raise SimulationError(f"request {now} was refused: {action.reason.name}")
            else:
                todo.extend(self._carry_out(action, now) or ())
        if not granted:
            raise SimulationError(f"request {now} was never granted")
        self._bound.read_log()

    def _carry_out(self, action: object, now: int) -> Sequence[_core._Action] | None:
        yard = self._yard
        if type(action) is _core.Load:
            return self._load(action.model, now)
        if type(action) is _core.Unload:
            freed = yard.exclusive(action.model)
            if not action.keep:
                return yard.unload_done(action.model, now, freed)
            model = self._trace.models[self._bound.positions[action.model]]
            return yard.unload_done(action.model, now, freed, model.size_bytes, model.host_load_s)
        if type(action) is _core.DropCopy:
            return yard.copy_dropped(action.model, now, yard.copy_exclusive(action.model))
        return None

    def _load(self, core_id: int, now: int) -> Sequence[_core._Action] | None:
        entry = self._yard.entry(core_id)
        if entry is None:
            raise SimulationError("a load of a model that there is not")
        model = self._trace.models[self._bound.positions[core_id]]
        from_copy = entry.copy_state is _core.CopyState.KEPT
        took_s = model.host_load_s if from_copy else model.load_s
        self._host_load_count += from_copy
        self._load_at.append(now)
        self._load_took_s.append(took_s)
        source = _core.Source.COPY if from_copy else _core.Source.STORAGE
        return self._yard.load_done(core_id, now, entry.held, took_s, source)
