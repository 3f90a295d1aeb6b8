"""What an offline bound and a schedule look at: devices between which some model has a choice.

Models that may be on the same devices compete for them, and no others do. So a trace falls into
pools: some devices, and the requests of the models that may be there. In each pool, whatever
happens in another makes no difference, so the seconds of loading that no schedule can do without
add up, and so do those of schedules. Within a pool the bound takes all devices for one of all their
bytes: what fits on them fits on that one, too, so it holds for models with places, and for those
that are on several devices at once. Solved to its end it is not lower than the bound of all devices
as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from modelyard_server.simulation.bounds import LowerBound, lower_bound
from modelyard_server.simulation.machine import Machine
from modelyard_server.simulation.offline import best_offline_s
from modelyard_server.simulation.outcome import Progress
from modelyard_server.simulation.trace import Floats, Trace, TracedModel

__all__ = ["Pool", "bound_of_pools", "pools_of", "schedule_of_pools"]

_ROUNDING: Final = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Devices that share models with one another and with no others.

    Args:
        budgets: bytes of each of its devices.
        trace: the requests of the models that may be there, whose places are positions among them.
    """

    budgets: tuple[int, ...]
    trace: Trace


def pools_of(trace: Trace, machine: Machine) -> tuple[Pool, ...]:
    """Return the pools of a trace; every request is in one of them.

    Args:
        trace: what was wanted, and where its models may be.
        machine: whose devices. Those that no model is ever on are in no pool.
    """
    budgets = machine.budgets
    devices_of = {m: _devices(trace.models[m], budgets) for m in trace.used()}
    groups = _joined(devices_of.values())
    if len(groups) == 1 and len(groups[0]) == len(budgets):
        return (Pool(budgets=budgets, trace=trace),)
    return tuple(_pool(trace, budgets, group, devices_of) for group in groups)


def bound_of_pools(
    trace: Trace,
    pools: tuple[Pool, ...],
    *,
    time_limit_s: float | None = None,
    progress: Progress | None = None,
) -> tuple[float, list[Floats | None]]:
    """Compute what no schedule of a trace can do without.

    Args:
        trace: all of it.
        pools: of the trace.
        time_limit_s: see ``lower_bound``; of all pools together, in equal parts.
        progress: is told how many requests are behind it.

    Returns:
        Seconds, and for each pool what the programme keeps; see ``LowerBound``.

    Raises:
        BoundUnavailable: see ``lower_bound``.
    """
    found: list[LowerBound] = []
    done = 0
    for pool in pools:
        found.append(
            lower_bound(
                pool.trace,
                sum(pool.budgets),
                time_limit_s=None if time_limit_s is None else time_limit_s / len(pools),
                progress=_shifted(progress, done),
            )
        )
        done += len(pool.trace)
    kept = [each.kept for each in found]
    if len(found) == 1:
        return found[0].load_s, kept
    # Sums of rounded sums may be rounded up, and nobody may come out below the bound.
    together_s = math.fsum(each.load_s for each in found) * (1 - _ROUNDING)
    return max(trace.compulsory_s(), together_s), kept


def schedule_of_pools(
    pools: tuple[Pool, ...],
    kept: list[Floats | None] | None = None,
    progress: Progress | None = None,
) -> float:
    """Return the seconds of loading of the best schedule that is found.

    Args:
        pools: of a trace.
        kept: what ``bound_of_pools`` found, as a hint.
        progress: is told how many requests are behind it.

    Raises:
        ValueError: a model is on several devices at once; for those no schedule is looked for.
    """
    seconds = []
    done = 0
    for i, pool in enumerate(pools):
        hint = kept[i] if kept else None
        seconds.append(best_offline_s(pool.trace, pool.budgets, hint, _shifted(progress, done)))
        done += len(pool.trace)
    return math.fsum(seconds)


def _devices(model: TracedModel, budgets: tuple[int, ...]) -> frozenset[int]:
    """The devices that a model may ever be on."""
    _, part_bytes = model.parts(len(budgets))
    fitting = {d for d, budget in enumerate(budgets) if part_bytes <= budget}
    if not model.places:
        return frozenset(fitting)
    return frozenset(d for place in model.places if fitting.issuperset(place) for d in place)


def _joined(sets: Iterable[frozenset[int]]) -> list[frozenset[int]]:
    """Join sets that have something in common until none have; in the order of their least."""
    groups: list[frozenset[int]] = []
    for each in set(sets):
        apart = [group for group in groups if each.isdisjoint(group)]
        groups = [*apart, each.union(*(group for group in groups if group not in apart))]
    return sorted(groups, key=min)


def _pool(
    trace: Trace,
    budgets: tuple[int, ...],
    group: frozenset[int],
    devices_of: dict[int, frozenset[int]],
) -> Pool:
    devices = sorted(group)
    own = np.zeros(len(trace.models), dtype=np.bool_)
    models = list(trace.models)
    for m, on in devices_of.items():
        if on.isdisjoint(group):
            continue
        own[m] = True
        places = (place for place in models[m].places if on.issuperset(place))
        models[m] = replace(
            models[m], places=tuple(tuple(map(devices.index, place)) for place in places)
        )
    there = own[trace.model]
    return Pool(
        budgets=tuple(budgets[device] for device in devices),
        trace=replace(
            trace,
            models=tuple(models),
            arrival_s=trace.arrival_s[there],
            model=trace.model[there],
            run_s=trace.run_s[there],
        ),
    )


def _shifted(progress: Progress | None, by: int) -> Progress | None:
    return None if progress is None else lambda count: progress(by + count)
