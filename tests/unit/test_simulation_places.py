"""Where models may be: what traces say, what is asked for, what replays and bounds make of it."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.support.traces import least_placed_load_s, small_trace, sparing_lru

from modelyard_server.simulation.baselines import BASELINES, replay_baseline
from modelyard_server.simulation.bounds import lower_bound
from modelyard_server.simulation.families import family_trace
from modelyard_server.simulation.machine import Machine, places_of
from modelyard_server.simulation.places import (
    Places,
    dealt_out,
    parse_places,
    place_models,
    read_place_cell,
)
from modelyard_server.simulation.pools import bound_of_pools, pools_of, schedule_of_pools
from modelyard_server.simulation.request_logs import RequestLogWriter
from modelyard_server.simulation.serial_replay import replay_serially
from modelyard_server.simulation.timed_replay import replay_timed
from modelyard_server.simulation.trace import Trace, TraceError
from modelyard_server.simulation.trace_files import read_trace

HEADER = "time,model,execution_s,size_bytes,load_s,places\n"
LOG = '{"modelyard_record": 1}\n'
TWO = Machine(budgets=(9, 9), device_names=("cuda:0", "cuda:1"))
ROUNDING = 1e-6


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def at(trace: Trace, places: Sequence[tuple[tuple[int, ...], ...]]) -> Trace:
    """A trace whose models have places."""
    pairs = zip(trace.models, places, strict=True)
    models = (replace(m, places=p, spans=len(p[0]) if p else m.spans) for m, p in pairs)
    return replace(trace, models=tuple(models))


# --- What files say


def test_a_csv_trace_says_where_its_models_are(tmp_path: Path) -> None:
    rows = "0,a,1,5,1,cuda:0|cuda:1\n1,b,1,5,1, devices/cuda-1 + cuda:0\n2,c,1,5,1,\n3,a,1,,,\n"
    trace = read_trace(write(tmp_path, "t.csv", HEADER + rows))
    assert [model.place_names for model in trace.models] == [
        (("cuda:0",), ("cuda:1",)),
        (("cuda:1", "cuda:0"),),
        (),
    ]
    assert [model.spans for model in trace.models] == [1, 2, 1]
    assert [model.places for model in trace.models] == [(), (), ()]
    models = write(tmp_path, "m.csv", "model,size_bytes,load_s,places\na,5,1,cpu|disk+cpu\n")
    apart = read_trace(write(tmp_path, "t.csv", "t,k,e\n0,a,1\n"), models)
    # The disk is no memory: both are the same place.
    assert apart.models[0].place_names == (("cpu",),)


@pytest.mark.parametrize(
    ("cell", "error"),
    [
        ("gpu0", "places: Unknown device type string 'gpu0'"),
        ("cuda:0|", "places: Unknown device type string ''"),
        ("cuda:0+cuda:x", "places: Device id must be an integer, got x"),
        ("disk", "places: one of them names no device"),
        ("cuda:0+cuda", r"places: cuda:0\+cuda:0 names a device twice"),
        ("cuda:0|cuda:1+cuda:2", r"places: cuda:0\|cuda:1\+cuda:2: a model is on as many"),
        ("|".join(f"cuda:{i}" for i in range(17)), "places: at most 16 may be"),
    ],
)
def test_wrong_places_of_a_csv_trace_are_refused_by_line(
    tmp_path: Path, cell: str, error: str
) -> None:
    path = write(tmp_path, "t.csv", HEADER + f"0,b,1,5,1,cuda:0\n1,a,1,5,1,{cell}\n")
    with pytest.raises(TraceError, match=f"^t.csv:3: {error}") as refused:
        read_trace(path)
    assert "\n" not in str(refused.value)


def test_a_model_has_the_same_places_on_all_lines(tmp_path: Path) -> None:
    rows = "0,a,1,5,1,cuda:0\n1,a,1,5,1,cuda:0\n2,a,1,5,1,cuda:1\n"
    with pytest.raises(TraceError, match=r"^t\.csv:4: model 'a' is not what line 2 says it is"):
        read_trace(write(tmp_path, "t.csv", HEADER + rows))


def test_a_request_log_says_where_its_models_are(tmp_path: Path) -> None:
    file = io.StringIO()
    writer = RequestLogWriter(file)
    writer.model("a", size_bytes=5, load_s=1.0, places=[["cuda:0"]])
    writer.model("b", size_bytes=5, load_s=1.0)
    writer.model("a", size_bytes=5, load_s=1.0, places=[("cuda:1", "cuda:0")])
    for name in "ab":
        writer.request(1.0, name, wait_s=0.0, load_s=0.0, run_s=0.5)
    trace = read_trace(write(tmp_path, "l.jsonl", file.getvalue()))
    assert [model.place_names for model in trace.models] == [(("cuda:1", "cuda:0"),), ()]
    # Logs of before have no such field, and those without any places are as they were.
    assert file.getvalue().splitlines()[2] == '{"model":"b","size_bytes":5,"load_s":1.0}'


@pytest.mark.parametrize(
    ("places", "error"),
    [
        ('"cuda:0"', "places must be a list of lists of devices"),
        ('["cuda:0"]', "places must be a list of lists of devices"),
        ("[[0]]", "places must be a list of lists of devices"),
        ("null", "places must be a list of lists of devices"),
        ("[[]]", "places: one of them names no device"),
        ('[["cuda:0", "gpu"]]', "places: Unknown device type string 'gpu'"),
    ],
)
def test_wrong_places_of_a_log_are_refused_by_line(tmp_path: Path, places: str, error: str) -> None:
    line = f'{{"model": "a", "size_bytes": 5, "load_s": 1, "places": {places}}}\n'
    text = LOG + line + '{"t": 0, "model": "a", "run_s": 1}\n'
    with pytest.raises(TraceError, match=f"^l.jsonl:2: {error}"):
        read_trace(write(tmp_path, "l.jsonl", text))


# --- Which count


def named_trace(tmp_path: Path) -> Trace:
    rows = "0,a,1,5,1,cuda:1\n1,b,1,5,1,cuda:1\n2,a,1,,,\n3,c,1,8,1,cuda:1+cuda:0\n4,d,1,5,1,\n"
    return read_trace(write(tmp_path, "t.csv", HEADER + rows))


def test_names_become_positions_of_the_devices_that_have_them(tmp_path: Path) -> None:
    trace, placing = place_models(named_trace(tmp_path), TWO)
    assert [model.places for model in trace.models] == [((1,),), ((1,),), ((1, 0),), ()]
    assert (placing.places, placing.note) == (Places.TRACE, "")


def test_a_device_that_there_is_not_is_told_by_the_models_line(tmp_path: Path) -> None:
    made = named_trace(tmp_path)
    other = replace(TWO, device_names=("cuda:0", "cpu"))
    with pytest.raises(
        TraceError, match=r"^t\.csv:2: model 'a' is on cuda:1, and there are cuda:0, cpu; --places"
    ):
        place_models(made, other)
    for wanted in (Places.ANYWHERE, Places.DEALT):
        assert place_models(made, other, wanted)[1].places is wanted
    # A model that nobody wants may be anywhere.
    assert place_models(family_trace("zipf", requests=5), other)[1].places is Places.ANYWHERE


def test_without_names_of_devices_places_are_not_used_and_that_is_said(tmp_path: Path) -> None:
    for budgets in ((9,), (9, 9)):
        trace, placing = place_models(named_trace(tmp_path), Machine(budgets=budgets))
        assert placing.places is Places.ANYWHERE
        assert "none here has a name" in placing.note
        assert {model.places for model in trace.models} == {()}
        # What was cut in two stays so, where there are two.
        assert trace.models[2].parts(len(budgets))[0] == len(budgets)


def test_what_is_asked_for_counts_more_than_what_the_trace_says(tmp_path: Path) -> None:
    made = named_trace(tmp_path)
    anywhere, placing = place_models(made, TWO, Places.ANYWHERE)
    assert {model.places for model in anywhere.models} == {()}
    assert (placing.places, placing.note) == (Places.ANYWHERE, "")
    dealt, placing = place_models(made, TWO, Places.DEALT)
    # c takes 4 of each, then a, b and d go where least is.
    assert [m.places for m in dealt.models] == [((0,),), ((1,),), ((0, 1),), ((0,),)]
    assert [m.place_names for m in dealt.models][2:] == [(("cuda:0", "cuda:1"),), (("cuda:0",),)]
    assert placing.places is Places.DEALT


@pytest.mark.parametrize("text", ["", "trace", "Anywhere", "dealt "])
def test_what_is_no_way_to_place_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--places is anywhere or dealt, got"):
        parse_places(text)


def test_models_are_dealt_out_so_that_all_devices_are_as_full() -> None:
    trace = family_trace("zipf", requests=2000, models=120, seed=3)
    for budgets in ((1 << 40,) * 4, (1 << 40, 3 << 40, 2 << 40)):
        held = [0] * len(budgets)
        for model in dealt_out(trace.models, budgets):
            ((device,),) = model.places
            held[device] += model.size_bytes
        fullness = [h / b for h, b in zip(held, budgets, strict=True)]
        assert max(fullness) <= 1.05 * min(fullness)


def test_models_are_dealt_out_to_devices_that_they_fit_on() -> None:
    models = small_trace([0, 1, 2], sizes=[20, 5, 5]).models
    assert [m.places for m in dealt_out(models, (10, 30))] == [((1,),), ((0,),), ((0,),)]
    spanning = tuple(replace(m, spans=2) for m in models)
    assert [m.places for m in dealt_out(spanning, (9, 10, 30))] == [((1, 2),), ((0, 2),), ((0, 2),)]


def test_a_model_must_fit_where_it_may_be(tmp_path: Path) -> None:
    trace, _ = place_models(named_trace(tmp_path), TWO)
    trace.check_fits((4, 9))
    with pytest.raises(
        TraceError, match=r"^t\.csv:2: model 'a' of 5B takes 5B of cuda:1: the budget there is 4B"
    ):
        trace.check_fits((9, 4))
    with pytest.raises(
        TraceError, match=r"^t\.csv:5: model 'c' of 8B takes 4B of cuda:1 and cuda:0: .* is 3B"
    ):
        trace.check_fits((3, 9))
    several = at(small_trace([0], sizes=[5]), [((0,), (1,))])
    several.check_fits((4, 5))
    assert places_of(several.models[0], (4, 5)) == ((1,),)
    with pytest.raises(TraceError, match="5B of device 0 or device 1: the budget there is 4B"):
        several.check_fits((4, 3))


# --- Replays


def of_device(trace: Trace, device: int) -> Trace:
    """The requests of the models that are on one device, as if there were no other."""
    there = np.asarray([trace.models[m].places == ((device,),) for m in trace.model])
    return replace(
        trace,
        models=tuple(replace(model, places=()) for model in trace.models),
        arrival_s=trace.arrival_s[there],
        model=trace.model[there],
        run_s=trace.run_s[there],
    )


def fixed(seed: int) -> tuple[Trace, Machine]:
    trace = family_trace("zipf:0.8", requests=600, models=24, seed=seed)
    largest = max(model.size_bytes for model in trace.models)
    machine = Machine(budgets=(2 * largest, 3 * largest), slots=2)
    return place_models(trace, machine, Places.DEALT)[0], machine


def test_one_after_the_other_each_device_is_on_its_own() -> None:
    trace, machine = fixed(1)
    parts = [of_device(trace, device) for device in (0, 1)]
    assert min(len(part) for part in parts) > 100
    loads, left = zip(
        *(sparing_lru(part, b) for part, b in zip(parts, machine.budgets, strict=True)),
        strict=True,
    )
    outcome = replay_serially(trace, machine, "lru")
    assert outcome.load_s == pytest.approx(sum(map(sum, loads)))
    assert outcome.eviction_count == sum(left)
    anywhere = place_models(trace, machine, Places.ANYWHERE)[0]
    assert replay_serially(anywhere, machine, "lru").load_count != outcome.load_count


@pytest.mark.parametrize("name", ["lru", "fcfs-each+lru"])
def test_as_time_goes_by_a_line_for_each_device_is_on_its_own(name: str) -> None:
    trace, machine = fixed(2)
    replay = replay_baseline if name in BASELINES else replay_timed
    outcome = replay(trace, machine, name)
    for device, budget in enumerate(machine.budgets):
        part = of_device(trace, device)
        alone = replay(part, replace(machine, budgets=(budget,)), name)
        there = [trace.models[m].places == ((device,),) for m in trace.model]
        assert outcome.wait_s[there].tolist() == alone.wait_s.tolist()


@pytest.mark.parametrize("name", BASELINES)
def test_reference_schedulers_choose_among_places(name: str) -> None:
    made = small_trace([0, 1, 2, 0, 1, 2], sizes=[6, 6, 6], arrivals=[0, 2, 4, 6, 8, 10])
    machine = Machine(budgets=(6, 6, 6))
    assert replay_baseline(at(made, [((0,), (2,))] * 3), machine, name).load_count > 3
    free = at(made, [((0,), (2,)), ((0,), (2,)), ((1,), (2,))])
    assert replay_baseline(free, machine, name).load_count == 3


# --- Bounds and schedules


def random_case(seed: int) -> tuple[Trace, Machine]:
    chance = random.Random(seed)
    devices = chance.randint(2, 3)
    models = chance.randint(2, 5)
    trace = small_trace(
        [chance.randrange(models) for _ in range(chance.randint(4, 12))],
        sizes=[chance.randint(1, 6) << 20 for _ in range(models)],
        loads=[chance.choice((0.5, 1.0, 3.0, 10.0)) for _ in range(models)],
    )
    some: list[list[tuple[int, ...]]] = [[(0,)], [(1,)], [(devices - 1,)], [(0,), (1,)], []]
    if seed % 3 == 0:
        some += [[(0, 1)], [(0, 1), (0, devices - 1)]] if devices > 2 else [[(0, 1)]]
    trace = at(trace, [tuple(chance.choice(some)) for _ in trace.models])
    return trace, Machine(budgets=tuple(chance.randint(6, 9) << 20 for _ in range(devices)))


@pytest.mark.parametrize("seed", range(60))
def test_with_places_the_optimum_is_between_the_bound_and_the_schedule(seed: int) -> None:
    pytest.importorskip("highspy")
    trace, machine = random_case(seed)
    pools = pools_of(trace, machine)
    assert sum(len(pool.trace) for pool in pools) == len(trace)
    optimum = least_placed_load_s(trace, machine.budgets)
    bound_s, kept = bound_of_pools(trace, pools)
    assert bound_s <= optimum + ROUNDING
    # Devices on their own say more than all as one.
    assert bound_s >= lower_bound(trace, machine.total_bytes).load_s - ROUNDING
    assert bound_s >= trace.compulsory_s()
    for policy in ("lru", "ensemble"):
        outcome = replay_serially(trace, machine, policy)
        assert bound_s <= outcome.load_s
        assert optimum <= outcome.load_s + ROUNDING
    if all(len(place) == 1 for model in trace.models for place in model.places):
        assert optimum <= schedule_of_pools(pools, kept) + ROUNDING
    else:
        assert any(len(pool.budgets) > 1 for pool in pools)


def test_a_bound_of_too_few_places_is_found_out_by_the_optimum() -> None:
    pytest.importorskip("highspy")
    too_high = 0
    for seed in range(60):
        trace, machine = random_case(seed)
        fewer = at(trace, [model.places[:1] or ((0,),) for model in trace.models])
        bound_s, _ = bound_of_pools(fewer, pools_of(fewer, machine))
        too_high += bound_s > least_placed_load_s(trace, machine.budgets) + ROUNDING
    assert too_high > 5


def test_pools_are_of_devices_that_share_models() -> None:
    made = small_trace([0, 1, 2, 3, 1], sizes=[5, 5, 5, 5])
    machine = Machine(budgets=(5, 6, 7, 8, 9))
    pools = pools_of(at(made, [((0,),), ((3,), (1,)), ((1,),), ((0,),)]), machine)
    assert [(pool.budgets, pool.trace.model.tolist()) for pool in pools] == [
        ((5,), [0, 3]),
        ((6, 8), [1, 2, 1]),
    ]
    assert [pools[1].trace.models[m].places for m in (1, 2)] == [((1,), (0,)), ((0,),)]
    # Where a model may be on any there is one pool, of those that it fits on.
    (whole,) = pools_of(made, machine)
    assert whole.trace is made
    (part,) = pools_of(made, Machine(budgets=(4, 5, 6)))
    assert part.budgets == (5, 6)


def test_the_bound_of_fixed_places_is_that_of_each_device() -> None:
    pytest.importorskip("highspy")
    trace, machine = fixed(3)
    bound_s, kept = bound_of_pools(trace, pools_of(trace, machine))
    apart = [
        lower_bound(of_device(trace, device), budget).load_s
        for device, budget in enumerate(machine.budgets)
    ]
    assert bound_s == pytest.approx(sum(apart))
    assert bound_s > lower_bound(trace, machine.total_bytes).load_s
    assert bound_s <= schedule_of_pools(pools_of(trace, machine), kept)
    done: list[int] = []
    schedule_of_pools(pools_of(trace, machine), progress=done.append)
    assert done == [0, len(of_device(trace, 0))]


def test_a_cell_without_anything_says_nothing(tmp_path: Path) -> None:
    assert read_place_cell("", "t.csv:2") == ()
    rows = "0,a,1,5,1,cuda:0|cuda:1\n1,a,1,5,1,\n"
    (model,) = read_trace(write(tmp_path, "t.csv", HEADER + rows)).models
    assert model.place_names == (("cuda:0",), ("cuda:1",))


def test_names_of_one_device_are_one() -> None:
    assert read_place_cell("cpu:0", "t.csv:2") == (("cpu",),)
    assert read_place_cell("cuda|cuda:0|devices/cuda-0", "t.csv:2") == (("cuda:0",),)
