"""Traces for tests of the simulator."""

from __future__ import annotations

import itertools
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from modelyard_server.simulation.trace import Table, Trace, make_trace
from modelyard_server.simulation.trace_files import read_trace

__all__ = [
    "SHARED",
    "least_load_s",
    "least_placed_load_s",
    "lru_load_s",
    "shared_bounds",
    "shared_trace",
    "small_trace",
    "sparing_lru",
]

SHARED = Path(__file__).parents[3] / "shared" / "traces"

_Held = frozenset[tuple[int, tuple[int, ...]]]
"""Resident models, and on which devices."""


def small_trace(
    wanted: Sequence[int],
    *,
    sizes: Sequence[int],
    loads: Sequence[float] | None = None,
    host_loads: Sequence[float] | None = None,
    arrivals: Sequence[float] | None = None,
    runs: Sequence[float] | None = None,
) -> Trace:
    """A trace by hand; loads take a second, requests come a second apart and run for none."""

    def locate(table: Table, index: int) -> str:
        return f"small:{table}:{index}"

    count = len(sizes)
    load_s = list(loads or [1.0] * count)
    return make_trace(
        "small",
        names=[f"m{i}" for i in range(count)],
        size_bytes=sizes,
        load_s=load_s,
        host_load_s=list(host_loads or load_s),
        arrival_s=list(arrivals or map(float, range(len(wanted)))),
        model=list(wanted),
        run_s=list(runs or [0.0] * len(wanted)),
        locate=locate,
    )


def sparing_lru(trace: Trace, budget: int) -> tuple[list[float], int]:
    """The core's LRU for models of any size, worked out without the core.

    Who was used longest ago is looked at first, until there is room; then who turned out not to be
    needed stays, the one used last first.

    Returns:
        Seconds of each load, and how many models had to leave.
    """
    held: OrderedDict[int, int] = OrderedDict()
    loads, left = [], 0
    for model in trace.model.tolist():
        if model in held:
            held.move_to_end(model)
            continue
        size = trace.models[model].size_bytes
        short = size - (budget - sum(held.values()))
        leaving = []
        for candidate in held:
            if short <= 0:
                break
            leaving.append(candidate)
            short -= held[candidate]
        for candidate in reversed(leaving):
            if short + held[candidate] <= 0:
                short += held[candidate]
            else:
                del held[candidate]
                left += 1
        held[model] = size
        loads.append(trace.models[model].load_s)
    return loads, left


def lru_load_s(trace: Trace, budget: int) -> float:
    """Seconds of loading by LRU, worked out without the core."""
    held: OrderedDict[int, int] = OrderedDict()
    load_s = 0.0
    for model in trace.model.tolist():
        if model in held:
            held.move_to_end(model)
            continue
        facts = trace.models[model]
        load_s += facts.load_s
        while sum(held.values()) + facts.size_bytes > budget:
            held.popitem(last=False)
        held[model] = facts.size_bytes
    return load_s


def least_load_s(trace: Trace, budget: int) -> float:
    """Least seconds of loading of any schedule, by trying all; for short traces of few models."""
    best: dict[frozenset[int], float] = {frozenset(): 0.0}
    for model in trace.model.tolist():
        facts = trace.models[model]
        after: dict[frozenset[int], float] = {}
        for held, spent in best.items():
            price = spent if model in held else spent + facts.load_s
            others = held - {model}
            for count in range(len(others) + 1):
                for kept in itertools.combinations(sorted(others), count):
                    total = facts.size_bytes + sum(trace.models[m].size_bytes for m in kept)
                    if total <= budget:
                        now = frozenset((model, *kept))
                        after[now] = min(price, after.get(now, float("inf")))
        best = after
    return min(best.values())


def least_placed_load_s(trace: Trace, budgets: Sequence[int]) -> float:
    """The same where models have places, or may be on any of several devices; for shorter ones."""

    def fits(held: _Held) -> bool:
        free = list(budgets)
        for model, place in held:
            for device in place:
                free[device] -= trace.models[model].parts(len(budgets))[1]
        return min(free) >= 0

    best: dict[_Held, float] = {frozenset(): 0.0}
    for model in trace.model.tolist():
        facts = trace.models[model]
        count, _ = facts.parts(len(budgets))
        places = facts.places or tuple(itertools.combinations(range(len(budgets)), count))
        after: dict[_Held, float] = {}
        for held, spent in best.items():
            at = [place for m, place in held if m == model]
            others = sorted(each for each in held if each[0] != model)
            for place in at or places:
                price = spent if at else spent + facts.load_s
                for left in range(len(others) + 1):
                    for kept in itertools.combinations(others, left):
                        now: _Held = frozenset(((model, place), *kept))
                        if fits(now) and price < after.get(now, float("inf")):
                            after[now] = price
        best = after
    return min(best.values())


def shared_bounds() -> list[dict[str, Any]]:
    """What is known of the shared traces; skips the test if they are not there."""
    path = SHARED / "bounds.json"
    if not path.is_file():
        pytest.skip("the shared traces are not there: shared/traces beside this repository")
    known: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return known


def shared_trace(known: dict[str, Any]) -> tuple[Trace, int]:
    """The trace of an entry of ``shared_bounds``, and its budget in bytes."""
    trace = read_trace(SHARED / f"{known['trace']}.npz").first(known["requests"])
    return trace, int(known["budget_share"] * trace.footprint_bytes())
