"""What a trace is replayed on: devices and their budgets, and a yard that owns them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import Final

from modelyard_server import _core
from modelyard_server.simulation.trace import Trace, TracedModel, TraceError

__all__ = ["MOST_PLACES", "BoundYard", "Machine", "SimulationError", "bind_yard", "places_of"]

MOST_PLACES: Final = 16
"""Placements of a model that the core takes."""
_MOST_BOUND: Final = 1 << 16
"""Models that the core takes."""
_EXPLAIN_CAPACITY: Final = 8192
_READ_EVERY: Final = 1024
_LEAVING: Final = frozenset({"EVICTED", "DRAINED"})


class SimulationError(Exception):
    """The core and the simulator disagree, or a request was lost: a bug in one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Devices, and how fast they are.

    Args:
        budgets: bytes of each device; a model that names no places may live on any device that it
            fits on, and one that spans several on any of so many.
        device_names: of each device, for people.
        host_budget_bytes: of the host tier that keeps copies; 0 for none.
        above_tier: for each device, if copies of its models may be kept; of all if empty.
        slots: requests that run on a device at once. A serial replay has no use for it.
        loads_per_device: loads that run on a device at once. The same.
        unload_s: from an Unload until its memory is back, in seconds. The same.
        deadline_s: of each request, from its arrival; None for none. The same.
        overdue_after_s: see ``YardConfig``.
        backoff_initial_s: see ``YardConfig``.
        backoff_max_s: see ``YardConfig``.
        max_waiting: most requests that wait.
        max_waiting_per_model: most that wait for one model.

    Raises:
        ValueError: there is no device, or a number is out of range.
    """

    budgets: tuple[int, ...]
    device_names: tuple[str, ...] = ()
    host_budget_bytes: int = 0
    above_tier: tuple[bool, ...] = ()
    slots: int = 4
    loads_per_device: int = 1
    unload_s: float = 0.02
    deadline_s: float | None = None
    overdue_after_s: float = 30.0
    backoff_initial_s: float = 1.0
    backoff_max_s: float = 60.0
    max_waiting: int = 10_000_000
    max_waiting_per_model: int = 10_000_000

    def __post_init__(self) -> None:
        if not 1 <= len(self.budgets) <= _core.MAX_DEVICES:
            raise ValueError(f"there must be 1 to {_core.MAX_DEVICES} devices")
        for budget in (*self.budgets, max(1, self.host_budget_bytes)):
            if not 1 <= budget <= _core.MAX_BYTES:
                raise ValueError(f"a budget is 1 to {_core.MAX_BYTES} bytes, got {budget}")
        if self.device_names and len(self.device_names) != len(self.budgets):
            raise ValueError("there must be a name for each device, or none at all")
        if self.above_tier and len(self.above_tier) != len(self.budgets):
            raise ValueError("it must be said of each device if it is above the tier, or of none")
        if self.slots < 1 or self.loads_per_device < 1:
            raise ValueError("a device has at least one slot and one load channel")
        if not 0 <= self.unload_s <= 3600:
            raise ValueError(f"unload_s is 0 to 3600, got {self.unload_s:g}")
        if self.deadline_s is not None and not 0 < self.deadline_s <= 1e6:
            raise ValueError(f"deadline_s is above 0 and at most 1000000, got {self.deadline_s:g}")

    @property
    def total_bytes(self) -> int:
        """All budgets together, without the host tier."""
        return sum(self.budgets)


@dataclass(slots=True, kw_only=True)
class BoundYard:
    """A yard that knows the models of a trace.

    Args:
        yard: the core.
        core_ids: the yard's id of each of the trace's models, by position; 0 if it never occurs.
        positions: the other way round.
        devices: for each of the trace's models, the devices of each of its placements.
    """

    yard: _core.Yard
    core_ids: list[int]
    positions: dict[int, int]
    devices: list[tuple[tuple[int, ...], ...]]
    _told: int = 0
    _causes: dict[str, int] = field(default_factory=dict)

    def read_log(self, *, all_of_it: bool = False) -> None:
        """Count what the yard's log says of evictions, before the log drops it."""
        if not all_of_it and self.yard.last_explained - self._told < _READ_EVERY:
            return
        for record in self.yard.explanations_after(self._told):
            if record["decision"] in _LEAVING:
                state = "idle" if record["decision"] == "EVICTED" else "in_use"
                cause = f"{state}_for_{record['why'].lower()}"
                self._causes[cause] = self._causes.get(cause, 0) + 1
        self._told = self.yard.last_explained

    def evictions(self) -> dict[str, int]:
        """Return evictions by cause: who left in which state, and for what.

        ``unknown`` is what the yard's log had dropped before it could be read.
        """
        self.read_log(all_of_it=True)
        causes = dict(sorted(self._causes.items()))
        unknown = self.yard.counters.eviction_count - sum(causes.values())
        return causes if unknown <= 0 else {**causes, "unknown": unknown}


def places_of(model: TracedModel, budgets: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return where a model may live: for each placement the devices that it is on at once.

    Those that the model names; else, of one that spans several devices, at most sixteen, the first
    in the order of devices. Without those where it does not fit.
    """
    count, part_bytes = model.parts(len(budgets))
    if model.places:
        return tuple(
            place for place in model.places if all(part_bytes <= budgets[d] for d in place)
        )
    fitting = [d for d, budget in enumerate(budgets) if part_bytes <= budget]
    return tuple(islice(combinations(fitting, count), MOST_PLACES if count > 1 else None))


def bind_yard(trace: Trace, machine: Machine, policy: str) -> BoundYard:
    """Make a yard for the models of a trace.

    Args:
        trace: whose models.
        machine: what they are loaded onto.
        policy: one of ``_core.POLICIES``.

    Raises:
        TraceError: a model fits on no device, or there are too many.
    """
    trace.check_fits(machine.budgets)
    used = trace.used()
    if len(used) > _MOST_BOUND:
        raise TraceError(
            f"{trace.name}: {len(used)} models are wanted: the core takes {_MOST_BOUND}"
        )
    tiered = machine.host_budget_bytes > 0
    yard = _core.Yard(
        budgets=list(machine.budgets),
        policy=policy,
        max_waiting_per_model=machine.max_waiting_per_model,
        max_waiting=machine.max_waiting,
        loads_per_device=machine.loads_per_device,
        overdue_after_s=machine.overdue_after_s,
        backoff_initial_s=machine.backoff_initial_s,
        backoff_max_s=machine.backoff_max_s,
        explain_capacity=_EXPLAIN_CAPACITY,
        tier_budget=machine.host_budget_bytes,
        above_tier=(machine.above_tier or [True] * len(machine.budgets)) if tiered else (),
    )
    bound = BoundYard(
        yard=yard,
        core_ids=[0] * len(trace.models),
        positions={},
        devices=[()] * len(trace.models),
    )
    for position in used:
        model = trace.models[position]
        places = places_of(model, machine.budgets)
        _, part_bytes = model.parts(len(machine.budgets))
        placements = [dict.fromkeys(place, part_bytes) for place in places]
        core_id = yard.add_model(model.name, placements, model.load_s)
        bound.core_ids[position] = core_id
        bound.positions[core_id] = position
        bound.devices[position] = places
    return bound
