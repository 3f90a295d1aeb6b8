"""Replays through the core: serial ones against a plain LRU, timed ones against the clock."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.support.simulated_faults import check_outcome, disturbed_replay, run_seed
from tests.support.traces import lru_load_s, shared_bounds, shared_trace, small_trace, sparing_lru

from modelyard_server import _core
from modelyard_server.simulation.baselines import BASELINES, replay_baseline
from modelyard_server.simulation.disturbances import Clock, Disturbances, StallingClock
from modelyard_server.simulation.families import FAMILIES, family_trace
from modelyard_server.simulation.machine import Machine, SimulationError
from modelyard_server.simulation.outcome import (
    Outcome,
    hit_ratio_over_time,
    load_seconds_over_time,
)
from modelyard_server.simulation.serial_replay import replay_serially
from modelyard_server.simulation.timed_replay import _TimedReplay, replay_timed
from modelyard_server.simulation.trace import Trace, TraceError


def same(one: Outcome, other: Outcome) -> bool:
    return (
        one.evictions == other.evictions
        and one.step_count == other.step_count
        and np.array_equal(one.wait_s, other.wait_s, equal_nan=True)
        and np.array_equal(one.load_took_s, other.load_took_s)
        and np.array_equal(one.hit, other.hit)
    )


# --- Serial


@pytest.mark.parametrize("family", list(FAMILIES))
def test_lru_through_the_core_loads_what_a_plain_lru_loads(family: str) -> None:
    # Sizes are alike: else the core gives back victims that it turns out not to need.
    made = family_trace(family, requests=1500, models=30, seed=3)
    models = len(made.models)
    trace = small_trace(
        made.model.tolist(), sizes=[10] * models, loads=[m.load_s for m in made.models]
    )
    outcome = replay_serially(trace, Machine(budgets=(75,)), "lru")
    assert outcome.load_s == pytest.approx(lru_load_s(trace, 75))
    assert outcome.load_count == int((~outcome.hit).sum())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_lru_through_the_core_is_lru_for_models_of_any_size(family: str) -> None:
    for seed in range(4):
        trace = family_trace(family, requests=500, models=25, seed=seed)
        largest = max(trace.models[m].size_bytes for m in trace.used())
        budget = max(largest, trace.footprint_bytes() * (1 + seed) // 6)
        outcome = replay_serially(trace, Machine(budgets=(budget,)), "lru")
        loads, left = sparing_lru(trace, budget)
        assert outcome.load_took_s.tolist() == loads
        assert outcome.eviction_count == left
        assert len(loads) + int(outcome.hit.sum()) == len(trace)


@pytest.mark.parametrize("policy", _core.POLICIES)
def test_a_serial_replay_adds_up(policy: str) -> None:
    trace = family_trace("zipf:0.9", requests=2000, models=40, seed=2)
    budget = int(0.3 * trace.footprint_bytes())
    machine = Machine(budgets=(budget,))
    outcome = replay_serially(trace, machine, policy)
    assert outcome.served_count == outcome.request_count == 2000
    assert outcome.load_s >= trace.compulsory_s()
    assert outcome.load_count == 2000 - int(outcome.hit.sum())
    assert outcome.evictions == {"idle_for_model": outcome.eviction_count}
    assert 0 < outcome.eviction_count < outcome.load_count
    assert same(outcome, replay_serially(trace, machine, policy))
    requests, ratios = hit_ratio_over_time(outcome, 10)
    assert requests[-1] == 2000
    assert ratios.mean() == pytest.approx(outcome.hit_ratio)
    assert load_seconds_over_time(outcome)[1][-1] == pytest.approx(outcome.load_s)


def test_a_serial_replay_uses_several_devices() -> None:
    trace = small_trace([0, 1, 0, 1], sizes=[4, 6])
    outcome = replay_serially(trace, Machine(budgets=(6, 6)), "lru")
    assert outcome.hit.tolist() == [False, False, True, True]


def test_a_host_tier_makes_loads_cheaper() -> None:
    trace = small_trace([0, 1] * 10, sizes=[4, 4], loads=[8.0, 8.0], host_loads=[1.0, 1.0])
    plain = replay_serially(trace, Machine(budgets=(4,)), "lru")
    tiered = replay_serially(trace, Machine(budgets=(4,), host_budget_bytes=8), "lru")
    assert plain.load_s == 20 * 8.0
    assert (tiered.load_count, tiered.host_load_count) == (20, 18)
    assert tiered.load_s == 2 * 8.0 + 18 * 1.0


def test_only_devices_above_the_host_tier_have_copies_kept() -> None:
    trace = small_trace([0, 1] * 5, sizes=[6, 6], loads=[2.0, 2.0], host_loads=[0.5, 0.5])
    for above, load_s in ((True, 2 * 2.0 + 8 * 0.5), (False, 10 * 2.0)):
        machine = Machine(budgets=(10,), host_budget_bytes=20, above_tier=(above,))
        assert replay_serially(trace, machine, "lru").load_s == load_s


def test_no_more_wait_than_may() -> None:
    trace = small_trace([0] * 6 + [1] * 6, sizes=[5, 5], arrivals=[0.0] * 12)
    machine = Machine(budgets=(10,), max_waiting=5, max_waiting_per_model=4)
    outcome = replay_timed(trace, machine, "lru")
    assert (outcome.served_count, outcome.refused) == (5, {"QUEUE_FULL": 7})


def test_a_model_that_fits_nowhere_is_refused_before_anything_runs() -> None:
    trace = small_trace([0, 1], sizes=[4, 9])
    machine = Machine(budgets=(8, 8))
    for replay in (replay_serially, replay_timed):
        with pytest.raises(TraceError, match="small:model:1: model 'm1' of 9B is larger"):
            replay(trace, machine, "lru")
    with pytest.raises(TraceError, match="small:model:1"):
        replay_baseline(trace, machine, "fcfs+lru")


def test_the_default_policy_beats_lru_on_the_shared_traces() -> None:
    ratios = []
    for known in shared_bounds():
        if known["budget_share"] != 0.2:
            continue
        trace, budget = shared_trace(known)
        machine = Machine(budgets=(budget,))
        best, lru = (replay_serially(trace, machine, p).load_s for p in (_core.POLICIES[0], "lru"))
        assert known["lower_bound_s"] <= best <= 1.03 * lru
        ratios.append(math.log(best / lru))
    # Measured 0.80; see docs/simulator.md.
    assert math.exp(sum(ratios) / len(ratios)) < 0.85


# --- Timed


def test_a_request_waits_for_its_load_and_later_ones_for_a_slot() -> None:
    trace = small_trace(
        [0, 0, 0], sizes=[4], loads=[2.0], arrivals=[0.0, 1.0, 5.0], runs=[3.0, 1.0, 1.0]
    )
    outcome = replay_timed(trace, Machine(budgets=(4,), slots=1), "lru")
    # Loaded at 2, runs until 5 and until 6, then the last until 7.
    assert outcome.wait_s.tolist() == [2.0, 4.0, 1.0]
    assert outcome.hit.tolist() == [False, False, True]
    assert (outcome.load_count, outcome.load_s, outcome.makespan_s) == (1, 2.0, 7.0)


def test_an_unload_and_a_load_channel_take_their_time() -> None:
    trace = small_trace(
        [0, 1, 0],
        sizes=[4, 4],
        loads=[1.0, 2.0],
        arrivals=[0.0, 0.5, 5.0],
        runs=[1.0, 1.0, 1.0],
    )
    machine = Machine(budgets=(4,), unload_s=0.25)
    outcome = replay_timed(trace, machine, "lru")
    # m0 runs from 1 to 2; m1 is there at 2 + 0.25 + 2; m0 comes back at 5.25 + 0.25 + 1.
    assert outcome.wait_s.tolist() == [1.0, 3.75, 1.5]
    assert outcome.evictions == {"idle_for_model": 2}
    both = replay_timed(trace, Machine(budgets=(8,), loads_per_device=2), "lru")
    assert both.wait_s.tolist() == [1.0, 2.0, 0.0]
    one = replay_timed(trace, Machine(budgets=(8,)), "lru")
    assert one.wait_s.tolist() == [1.0, 2.5, 0.0]


def test_a_deadline_refuses_who_waits_longer() -> None:
    trace = small_trace([0, 0], sizes=[4], loads=[2.0], arrivals=[0.0, 1.5], runs=[0.5, 0.5])
    outcome = replay_timed(trace, Machine(budgets=(4,), deadline_s=1.0), "lru")
    assert outcome.refused == {"DEADLINE_IN_LOAD": 1}
    assert outcome.served_count == 1
    assert math.isnan(outcome.wait_s[0])
    assert outcome.wait_s[1] == 0.5


def test_every_third_load_fails_and_its_requests_are_refused() -> None:
    trace = small_trace(
        [0, 1, 2, 3], sizes=[1] * 4, arrivals=[0.0, 10.0, 20.0, 30.0], loads=[1.0] * 4
    )
    outcome = replay_timed(trace, Machine(budgets=(4,)), "lru", Disturbances(seed=1, fail_every=3))
    assert outcome.refused == {"LOAD_FAILED": 1}
    assert (outcome.failed_load_count, outcome.load_count) == (1, 4)
    assert np.isnan(outcome.wait_s).tolist() == [False, False, True, False]


def test_who_is_cancelled_gives_back_its_slot() -> None:
    trace = small_trace([0] * 50, sizes=[1], arrivals=[0.0] * 50, runs=[1000.0] * 50)
    disturbed = Disturbances(seed=1, cancel_share=1.0, cancel_within_s=10.0)
    outcome = replay_timed(trace, Machine(budgets=(1,), slots=2), "lru", disturbed)
    assert (outcome.cancelled_count, outcome.served_count) == (50, 0)
    assert outcome.makespan_s <= 10.0


def test_a_stalling_clock_stands_still_and_then_jumps() -> None:
    clock = StallingClock(random.Random(1), 1.0, 1.0)
    times = range(0, 100_000_000_000, 10_000_000)
    shown = [clock.read(at) for at in times]
    assert shown == sorted(shown)
    late = [at - now for at, now in zip(times, shown, strict=True)]
    assert min(late) == 0
    assert 0.3 < sum(each > 0 for each in late) / len(late) < 0.7
    at = next(at for at, now in zip(times, shown, strict=True) if at > now)
    stalled = StallingClock(random.Random(1), 1.0, 1.0)
    after = stalled.next_reading(at)
    assert after > at
    assert stalled.read(after) == after
    assert Clock().next_reading(5) == 6


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_lost_when_everything_goes_wrong(seed: int) -> None:
    tally = run_seed(seed, 4000)
    assert tally.steps >= 4000
    assert tally.failed_loads > 0
    assert tally.refused + tally.cancelled + tally.served == tally.requests


def test_a_disturbed_replay_comes_out_the_same_again() -> None:
    one, other = (disturbed_replay(5, 1500) for _ in range(2))
    check_outcome(one)
    assert same(one, other)
    assert not same(one, disturbed_replay(6, 1500))


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("_end_load", "requests were never answered, the first is"),
        ("_end_unload", "requests were never answered, the first is"),
        ("_end_run", "requests were never answered, the first is"),
    ],
)
def test_a_lost_end_is_noticed(monkeypatch: pytest.MonkeyPatch, method: str, error: str) -> None:
    def ignore(*_: Any, **__: Any) -> None:
        pass

    monkeypatch.setattr(_TimedReplay, method, ignore)
    trace = small_trace([0, 1], sizes=[1, 1], arrivals=[0.0, 10.0], runs=[0.5, 0.5])
    with pytest.raises(SimulationError, match=error):
        replay_timed(trace, Machine(budgets=(1,)), "lru")


def test_an_outcome_that_does_not_add_up_is_noticed() -> None:
    trace = small_trace([0], sizes=[1])
    outcome = replay_timed(trace, Machine(budgets=(1,)), "lru")
    object.__setattr__(outcome, "served_count", 0)
    with pytest.raises(SimulationError, match="1 requests, and 0 ended"):
        check_outcome(outcome)


# --- Reference schedulers


def test_in_order_one_cold_model_holds_up_everybody() -> None:
    trace = small_trace(
        [0, 1, 0],
        sizes=[4, 4],
        loads=[1.0, 5.0],
        arrivals=[0.0, 2.0, 3.0],
        runs=[0.5, 0.5, 0.5],
    )
    machine = Machine(budgets=(8,))
    assert replay_baseline(trace, machine, "fifo+lru").wait_s.tolist() == [1.0, 5.0, 4.0]
    assert replay_baseline(trace, machine, "fcfs+lru").wait_s.tolist() == [1.0, 5.0, 0.0]


def test_reference_schedulers_evict_who_was_used_longest_ago_and_runs_not() -> None:
    trace = small_trace(
        [0, 1, 2, 1, 0],
        sizes=[4, 4, 4],
        arrivals=[0.0, 2.0, 4.0, 9.0, 12.0],
        runs=[0.5] * 5,
    )
    outcome = replay_baseline(trace, Machine(budgets=(8,), unload_s=0.25), "fcfs+lru")
    assert outcome.wait_s.tolist() == [1.0, 1.0, 1.25, 0.0, 1.25]
    assert outcome.evictions == {"idle_for_model": 2}


def test_who_cannot_be_loaded_yet_holds_up_others_or_those_of_its_devices() -> None:
    # The first device loads until 5 s; 1 waits for it, and 2 is at home on the other.
    made = small_trace(
        [0, 1, 2],
        sizes=[4, 4, 4],
        loads=[5.0, 1.0, 1.0],
        arrivals=[0.0, 1.0, 2.0],
        runs=[0.5] * 3,
    )
    places = [((0,),), ((0,),), ((1,),)]
    models = tuple(replace(m, places=p) for m, p in zip(made.models, places, strict=True))
    trace, machine = replace(made, models=models), Machine(budgets=(8, 8))
    assert replay_baseline(trace, machine, "fcfs+lru").wait_s.tolist() == [5.0, 5.0, 4.0]
    assert replay_baseline(trace, machine, "fcfs-each+lru").wait_s.tolist() == [5.0, 5.0, 1.0]


@pytest.mark.parametrize("name", BASELINES)
def test_reference_schedulers_serve_everybody(name: str) -> None:
    trace = family_trace("zipf:0.9", requests=2000, models=30, seed=4)
    largest = max(model.size_bytes for model in trace.models)
    machine = Machine(budgets=(largest, int(0.3 * trace.footprint_bytes())))
    outcome = replay_baseline(trace, machine, name)
    assert outcome.served_count == 2000
    assert outcome.wait_s.min() >= 0
    with pytest.raises(ValueError, match=r"there are fifo\+lru, fcfs\+lru, fcfs-each\+lru"):
        replay_baseline(trace, machine, "lru")


# --- Models that span devices


def spanning(trace: Trace, spans: Mapping[int, int]) -> Trace:
    """A trace some of whose models are split over several devices."""
    return replace(
        trace,
        models=tuple(replace(m, spans=spans.get(i, 1)) for i, m in enumerate(trace.models)),
    )


def replay(trace: Trace, machine: Machine, name: str) -> Outcome:
    if name in BASELINES:
        return replay_baseline(trace, machine, name)
    return replay_timed(trace, machine, name)


SCHEDULERS = ("lru", *BASELINES)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_spanning_model_holds_its_part_of_each_device(name: str) -> None:
    # Of 7 bytes each device has 4: beside it 6 of a device's 10 are free.
    made = small_trace([0, 1, 2, 0], sizes=[7, 6, 6], arrivals=[0.0, 2.0, 4.0, 6.0])
    outcome = replay(spanning(made, {0: 2}), Machine(budgets=(10, 10)), name)
    assert outcome.load_count == 3
    assert not outcome.evictions
    # Of 9 it has 5: one of the others has to go, and it needs both devices to come back.
    made = small_trace([0, 1, 2, 0], sizes=[9, 6, 6], arrivals=[0.0, 2.0, 4.0, 6.0])
    outcome = replay(spanning(made, {0: 2}), Machine(budgets=(10, 10)), name)
    assert outcome.load_count == 4
    assert outcome.eviction_count == 3


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_model_that_names_its_places_is_nowhere_else(name: str) -> None:
    made = small_trace([0, 1, 0, 1], sizes=[6, 6], arrivals=[0.0, 2.0, 4.0, 6.0])
    machine = Machine(budgets=(10, 10))
    assert replay(made, machine, name).load_count == 2
    at_home = replace(made, models=tuple(replace(m, places=((1,),)) for m in made.models))
    assert replay(at_home, machine, name).load_count == 4, "the second device takes one of them"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_spanning_model_runs_in_a_slot_of_each_device(name: str) -> None:
    made = small_trace(
        [0, 1, 2, 0, 1, 2],
        sizes=[4, 2, 2],
        arrivals=[0.0, 0.1, 0.2, 10.0, 11.0, 11.5],
        runs=[0.0, 0.0, 0.0, 5.0, 1.0, 1.0],
    )
    machine = Machine(budgets=(4, 4), slots=1)
    outcome = replay(spanning(made, {0: 2}), machine, name)
    assert outcome.load_count == 3
    # The other two are on a device each, and wait until it has run on both.
    assert outcome.wait_s[3:].tolist() == pytest.approx([0.0, 4.0, 3.5])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_who_waits_for_several_slots_is_not_overtaken_for_ever(name: str) -> None:
    # Both devices are always busy with one-device requests, and never idle at once.
    count = 40
    made = small_trace(
        [0, 1, 2, *([1, 2] * count)[:10], 0, *([1, 2] * count)],
        sizes=[4, 2, 2],
        arrivals=[0.0, 0.1, 0.2, *(10 + 0.5 * i for i in range(10)), 15.0]
        + [15 + 0.5 * i for i in range(2 * count)],
        runs=[0.0, 0.0, 0.0, *([1.0] * 10), 1.0, *([1.0] * 2 * count)],
    )
    machine = Machine(budgets=(4, 4), slots=1)
    outcome = replay(spanning(made, {0: 2}), machine, name)
    assert outcome.wait_s[13] <= 2.0


@pytest.mark.parametrize("name", SCHEDULERS)
def test_on_one_device_a_spanning_model_is_whole(name: str) -> None:
    made = family_trace("zipf:0.9", requests=800, models=20, seed=4)
    machine = Machine(budgets=(int(0.5 * made.footprint_bytes()),))
    split = spanning(made, dict.fromkeys(range(20), 4))
    assert same(replay(made, machine, name), replay(split, machine, name))


@pytest.mark.parametrize("seed", range(4))
def test_nobody_is_lost_when_spanning_models_meet_faults(seed: int) -> None:
    made = family_trace("zipf:0.6", requests=1500, models=24, seed=seed)
    trace = spanning(made, {i: 1 + i % 3 for i in range(24)})
    budget = int(0.15 * trace.footprint_bytes()) + max(m.size_bytes for m in trace.models)
    machine = Machine(budgets=(budget,) * 3, slots=2, deadline_s=40.0)
    disturbances = Disturbances(
        seed=seed, load_spread=5, fail_every=3, cancel_share=0.2, audit_every=100
    )
    outcome = replay_timed(trace, machine, "ensemble", disturbances)
    assert outcome.cancelled_count > 0
    check_outcome(outcome)


def test_a_spanning_model_must_fit_on_as_many_devices() -> None:
    trace = spanning(small_trace([0], sizes=[20]), {0: 2})
    trace.check_fits((10, 10, 3))
    with pytest.raises(TraceError, match=r"takes 10B of each of 2 devices, and fewer .* above 9B"):
        trace.check_fits((30, 9))
    with pytest.raises(TraceError, match="of 20B is larger than the largest budget, 19B"):
        trace.check_fits((19,))


# --- Machines


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"budgets": ()}, "1 to 16 devices"),
        ({"budgets": (1,) * 17}, "1 to 16 devices"),
        ({"budgets": (0,)}, "a budget is 1 to"),
        ({"budgets": (_core.MAX_BYTES + 1,)}, "a budget is 1 to"),
        ({"device_names": ("a", "b")}, "a name for each device"),
        ({"above_tier": (True, False)}, "of each device if it is above the tier"),
        ({"slots": 0}, "at least one slot"),
        ({"unload_s": -1.0}, "unload_s is 0 to 3600"),
        ({"deadline_s": 0.0}, "deadline_s is above 0"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(changed: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Machine(**{"budgets": (1,), **changed})


@pytest.mark.parametrize(
    "changed",
    [
        {"load_spread": 0.5},
        {"fail_every": 1},
        {"fail_every": -1},
        {"cancel_share": 1.5},
        {"stall_s": -1.0},
    ],
)
def test_disturbances_that_cannot_be_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Disturbances(seed=1, **changed)
