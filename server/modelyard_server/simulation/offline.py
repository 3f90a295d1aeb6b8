"""The best offline schedule that is found: what somebody who knows the future gets by with.

Finding the best there is is hard, so several are made and the cheapest counts. Each is a schedule
that could be followed, so its seconds are an upper bound of the optimum, as ``bounds`` has a lower.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from modelyard_server.simulation.intervals import Intervals, find_intervals, next_requests
from modelyard_server.simulation.machine import places_of
from modelyard_server.simulation.outcome import Progress
from modelyard_server.simulation.trace import Floats, Integers, Trace

__all__ = ["best_offline_s", "cost_belady_s", "greedy_s", "spans_devices"]

_MOST_GREEDY: Final = 60_000
"""Requests up to which the greedy schedules are made: their time grows with the square."""
_TELL_EVERY: Final = 4096
_KEPT_STEPS: Final = 1000


def best_offline_s(
    trace: Trace,
    budgets: tuple[int, ...],
    kept: Floats | None = None,
    progress: Progress | None = None,
) -> float:
    """Return the seconds of loading of the cheapest schedule that is found.

    Args:
        trace: what was wanted, in which order.
        budgets: bytes of each device. With several only cost-Belady is tried.
        kept: float64[intervals], shares that the linear programme of the bound keeps, as a hint.
        progress: is told how many requests cost-Belady is through with.
    """
    found = [cost_belady_s(trace, budgets, progress)]
    if len(budgets) == 1 and len(trace) <= _MOST_GREEDY:
        intervals = find_intervals(trace)
        if len(intervals.first):
            worth = _worth(intervals)
            found.append(greedy_s(intervals, budgets[0], np.argsort(-worth, kind="stable")))
            if kept is not None and len(kept) == len(worth):
                # The programme's own order, and by worth among those it keeps as much of.
                steps = np.rint(kept * _KEPT_STEPS)
                found.append(greedy_s(intervals, budgets[0], np.lexsort((-worth, -steps))))
    return min(found)


def _worth(intervals: Intervals) -> Floats:
    """Seconds saved by keeping, for each byte and request that it takes."""
    lengths = intervals.last - intervals.first - 1
    return intervals.load_s / (intervals.size_bytes.astype(np.float64) * lengths)


def greedy_s(intervals: Intervals, budget_bytes: int, order: NDArray[np.intp]) -> float:
    """Keep intervals in an order, each if there still is room all the way.

    Returns:
        Seconds of loading of that schedule.
    """
    room = budget_bytes - intervals.needed_bytes
    loaded: list[float] = [intervals.unavoidable_s]
    first, last = intervals.first.tolist(), intervals.last.tolist()
    sizes, loads = intervals.size_bytes.tolist(), intervals.load_s.tolist()
    for i in order.tolist():
        between = room[first[i] + 1 : last[i]]
        if between.min() >= sizes[i]:
            between -= sizes[i]
        else:
            loaded.append(loads[i])
    return math.fsum(loaded)


def cost_belady_s(
    trace: Trace, budgets: tuple[int, ...], progress: Progress | None = None
) -> float:
    """Evict what costs least for the bytes and the time until it is wanted again.

    Belady's rule with sizes and costs. With several devices a model is loaded where that displaces
    least, among its places.

    Returns:
        Seconds of loading of that schedule.

    Raises:
        ValueError: a model would span several devices, which this does not do.
    """
    if spans_devices(trace, budgets):
        raise ValueError("models that span devices have no offline schedule here")
    return _CostBelady(trace, budgets).run(progress)


def spans_devices(trace: Trace, budgets: tuple[int, ...]) -> bool:
    """Return True if a model that is wanted is on several devices at once."""
    models = (trace.models[m] for m in trace.used())
    return any(
        model.parts(len(budgets))[0] > 1 or any(len(place) > 1 for place in model.places)
        for model in models
    )


class _CostBelady:
    def __init__(self, trace: Trace, budgets: tuple[int, ...]) -> None:
        self._sizes = [model.size_bytes for model in trace.models]
        self._loads = [model.load_s for model in trace.models]
        self._density = np.asarray(self._loads) / np.asarray(self._sizes, dtype=np.float64)
        self._devices = {
            m: [place[0] for place in places_of(trace.models[m], budgets)] for m in trace.used()
        }
        self._free = list(budgets)
        self._models: list[int] = trace.model.tolist()
        self._following: Integers = next_requests(trace)
        self._next = np.zeros(len(trace.models), dtype=np.float64)
        # Which models each device has; their scores are worked out all at once.
        self._has = [np.zeros(len(trace.models), dtype=np.bool_) for _ in budgets]
        self._where: dict[int, int] = {}

    def run(self, progress: Progress | None) -> float:
        loaded = []
        count = len(self._models)
        never = self._following == count
        following = np.where(never, np.inf, self._following.astype(np.float64)).tolist()
        for i, model in enumerate(self._models):
            if model not in self._where:
                self._load(model, i)
                loaded.append(self._loads[model])
            self._next[model] = following[i]
            if progress is not None and i % _TELL_EVERY == 0:
                progress(i)
        return math.fsum(loaded)

    def _load(self, model: int, now: int) -> None:
        size = self._sizes[model]
        best: tuple[float, int, list[int]] | None = None
        for device in self._devices[model]:
            price, victims = self._victims(device, size, now)
            if best is None or price < best[0]:
                best = (price, device, victims)
        if best is None:
            raise ValueError(f"model {model} fits on none of its devices")
        _, device, victims = best
        for victim in victims:
            del self._where[victim]
            self._has[device][victim] = False
            self._free[device] += self._sizes[victim]
        self._free[device] -= size
        self._has[device][model] = True
        self._where[model] = device

    def _victims(self, device: int, size: int, now: int) -> tuple[float, list[int]]:
        """Who has to leave a device, and what that costs."""
        short = size - self._free[device]
        if short <= 0:
            return 0.0, []
        residents = np.flatnonzero(self._has[device])
        # Wanted at `now` at the earliest; a resident is never wanted now, or it would be a hit.
        scores = self._density[residents] / (self._next[residents] - now)
        chosen: list[tuple[float, int]] = []
        for at in np.argsort(scores, kind="stable").tolist():
            if short <= 0:
                break
            victim = int(residents[at])
            chosen.append((float(scores[at]), victim))
            short -= self._sizes[victim]
        # Give back, dearest first, whose room turned out not to be needed.
        staying = set()
        for score, victim in sorted(chosen, reverse=True):
            if short + self._sizes[victim] <= 0:
                short += self._sizes[victim]
                staying.add((score, victim))
        leaving = [pair for pair in chosen if pair not in staying]
        price = sum(score * self._sizes[victim] for score, victim in leaving)
        return price, [victim for _, victim in leaving]
