"""The offline bound and offline schedules, against all schedules there are."""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import numpy as np
import pytest
from tests.support.traces import least_load_s, shared_bounds, shared_trace, small_trace

from modelyard_server import _core
from modelyard_server.simulation import bounds
from modelyard_server.simulation.bounds import BoundUnavailable, lower_bound, most_saved_s
from modelyard_server.simulation.families import family_trace
from modelyard_server.simulation.intervals import find_intervals, next_requests
from modelyard_server.simulation.machine import Machine
from modelyard_server.simulation.offline import best_offline_s, cost_belady_s
from modelyard_server.simulation.serial_replay import replay_serially
from modelyard_server.simulation.trace import Trace

ROUNDING = 1e-6


def random_case(seed: int) -> tuple[Trace, int]:
    chance = random.Random(seed)
    models = chance.randint(2, 6)
    sizes = [chance.randint(1, 9) << 20 for _ in range(models)]
    trace = small_trace(
        [chance.randrange(models) for _ in range(chance.randint(1, 25))],
        sizes=sizes,
        loads=[chance.choice((0.5, 1.0, 3.0, 10.0)) for _ in range(models)],
    )
    largest = max(trace.models[m].size_bytes for m in trace.used())
    return trace, chance.randint(largest, sum(sizes))


def test_intervals_are_between_requests_of_the_same_model() -> None:
    trace = small_trace([0, 1, 0, 0, 1], sizes=[3, 4], loads=[1.0, 2.0])
    assert next_requests(trace).tolist() == [2, 4, 3, 5, 5]
    intervals = find_intervals(trace)
    assert intervals.first.tolist() == [0, 1]
    assert intervals.last.tolist() == [2, 4]
    assert intervals.size_bytes.tolist() == [3, 4]
    assert intervals.all_loaded_s == 3.0 + 1.0 + 2.0


@pytest.mark.parametrize("seed", range(60))
def test_the_optimum_is_between_the_bound_and_the_best_schedule_found(seed: int) -> None:
    pytest.importorskip("highspy")
    trace, budget = random_case(seed)
    optimum = least_load_s(trace, budget)
    bound = lower_bound(trace, budget)
    assert bound.load_s <= optimum + ROUNDING
    assert optimum <= best_offline_s(trace, (budget,), bound.kept) + ROUNDING
    assert optimum <= best_offline_s(trace, (budget,)) + ROUNDING
    assert bound.load_s >= trace.compulsory_s() - ROUNDING


def test_nobody_comes_out_below_the_bound_by_rounding() -> None:
    pytest.importorskip("highspy")
    for seed in range(150):
        trace, budget = random_case(seed)
        chance = random.Random(seed)
        models = tuple(replace(m, load_s=chance.uniform(0.001, 10)) for m in trace.models)
        trace = replace(trace, models=models)
        bound = lower_bound(trace, budget)
        assert bound.load_s <= best_offline_s(trace, (budget,), bound.kept), f"seed {seed}"
        for policy in ("lru", _core.POLICIES[0]):
            outcome = replay_serially(trace, Machine(budgets=(budget,)), policy)
            assert bound.load_s <= outcome.load_s, f"seed {seed}, {policy}"


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_is_the_optimum_where_all_sizes_are_alike(seed: int) -> None:
    pytest.importorskip("highspy")
    # The programme's matrix is one of intervals: with whole capacities its optimum is whole.
    chance = random.Random(seed)
    trace = small_trace(
        [chance.randrange(6) for _ in range(25)],
        sizes=[1 << 20] * 6,
        loads=[chance.uniform(0.5, 10.0) for _ in range(6)],
    )
    budget = chance.randint(1, 5) << 20
    assert lower_bound(trace, budget).load_s == pytest.approx(least_load_s(trace, budget))


@pytest.mark.parametrize("seed", range(20))
def test_any_prices_make_a_bound(seed: int) -> None:
    trace, budget = random_case(seed)
    intervals = find_intervals(trace)
    prices = np.random.default_rng(seed).exponential(0.2, len(trace))
    saved_s = most_saved_s(intervals, budget - intervals.needed_bytes, prices)
    assert intervals.all_loaded_s - saved_s <= least_load_s(trace, budget) + ROUNDING


@pytest.mark.parametrize("seed", range(20))
def test_a_bound_in_pieces_holds_and_is_little_lower(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("highspy")
    trace, budget = random_case(seed)
    monkeypatch.setattr(bounds, "_PIECE", 7)
    monkeypatch.setattr(bounds, "_MARGIN", 3)
    assert lower_bound(trace, budget).load_s <= least_load_s(trace, budget) + ROUNDING
    monkeypatch.undo()

    longer = family_trace("zipf:0.9", requests=3000, models=30, seed=seed)
    share = int(0.4 * longer.footprint_bytes())
    whole = lower_bound(longer, share)
    monkeypatch.setattr(bounds, "_PIECE", 600)
    monkeypatch.setattr(bounds, "_MARGIN", 200)
    done: list[int] = []
    pieces = lower_bound(longer, share, progress=done.append)
    assert done == [600, 1200, 1800, 2400, 3000]
    assert pieces.kept is None
    assert 0.99 * whole.load_s <= pieces.load_s <= whole.load_s + ROUNDING


def test_everything_fits_into_enough_memory() -> None:
    pytest.importorskip("highspy")
    trace = small_trace([0, 1, 2] * 5, sizes=[1 << 20] * 3)
    assert lower_bound(trace, 3 << 20).load_s == pytest.approx(3.0)
    assert cost_belady_s(trace, (3 << 20,)) == 3.0
    # Into two it goes around once more for one of three each time: 1 0 2 stay by turns.
    assert lower_bound(trace, 2 << 20).load_s == pytest.approx(3 + 12 / 2)


def test_several_devices_have_a_schedule_too() -> None:
    trace = small_trace([0, 1, 0, 1, 0, 1], sizes=[2, 2])
    assert cost_belady_s(trace, (2, 2)) == 2.0
    assert cost_belady_s(trace, (2, 1)) == 6.0
    assert best_offline_s(trace, (2, 2)) == 2.0


def test_for_models_that_span_devices_there_is_no_schedule() -> None:
    trace = small_trace([0], sizes=[4])
    split = replace(trace, models=(replace(trace.models[0], spans=2),))
    assert cost_belady_s(split, (4,)) == 1.0
    with pytest.raises(ValueError, match="no offline schedule"):
        cost_belady_s(split, (4, 4))


def test_without_the_solver_there_is_help_and_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highspy", None)
    trace, budget = random_case(1)
    with pytest.raises(BoundUnavailable, match=r"pip install 'modelyard\[simulate\]'"):
        lower_bound(trace, budget)


def test_the_shared_bounds_hold_and_schedules_as_good_are_found() -> None:
    pytest.importorskip("highspy")
    for known in shared_bounds():
        if known["budget_share"] != 0.4:
            continue
        trace, budget = shared_trace(known)
        assert trace.compulsory_s() == pytest.approx(known["compulsory_s"], abs=0.1)
        bound = lower_bound(trace, budget)
        # Theirs was computed with prices rounded up, so it is a little lower.
        assert known["lower_bound_s"] - 0.1 <= bound.load_s <= known["best_offline_s"] + 0.1
        found = best_offline_s(trace, (budget,), bound.kept)
        assert bound.load_s - 0.1 <= found <= known["best_offline_s"] * 1.01
