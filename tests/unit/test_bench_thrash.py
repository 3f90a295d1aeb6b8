"""The arithmetic of the thrash benchmark, and what it asks for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from bench.thrash import OF_PART, PARTS, show, unmeasured
from bench.thrash_asking import refusal_facts, zipf_draws
from bench.thrash_batching import short_texts
from bench.thrash_fairness import BACKLOGGED, DEMANDS, FLOOD, ROWS, demand_askers
from bench.thrash_figures import (
    BARS,
    Answer,
    LoadInstance,
    Turn,
    answers_of,
    arrival_us,
    fair_shares,
    fairness_summary,
    jain,
    loads_summary,
    overload_summary,
    passed_by,
    recovery_s,
)
from bench.thrash_loads import family_jobs, load_instance, trace_jobs
from bench.thrash_overload import long_texts
from bench.thrash_rates import (
    PRODUCT,
    SETTINGS,
    Setting,
    at_rate,
    base_trace,
    combined,
    highest_rate,
    machine_of,
    summary,
)
from google.rpc import error_details_pb2, status_pb2

from modelyard_server.simulation.machine import Machine, places_of
from modelyard_server.simulation.serial_replay import replay_serially
from modelyard_server.simulation.trace_files import read_trace

NEEDED = {
    "geomean_vs_bound",
    "worst_vs_lru",
    "loops_vs_bound",
    "rate_vs_fifo_lru",
    "rate_vs_fcfs_lru",
    "rate_vs_fcfs_lru_min",
    "round_robin_loads",
    "zipf_rps_vs_lru_fifo",
    "zipf_loads_per_request",
    "goodput_5x",
    "batching_c64",
    "batching_c1",
    "fairness_jain",
    "fairness_quiet_runs",
    "fairness_line_share",
    "arrival_us_300",
}


class TestBars:
    def test_every_figure_that_is_asked_for_has_one(self) -> None:
        names = [bar.figure for bar in BARS]
        assert set(names) >= NEEDED
        assert len(set(names)) == len(names)

    def test_every_bar_is_of_a_part(self) -> None:
        assert OF_PART.keys() == PARTS.keys()
        of_parts = [name for names in OF_PART.values() for name in names]
        assert sorted(of_parts) == sorted(bar.figure for bar in BARS)

    def test_what_a_part_should_have_measured_is_missed(self) -> None:
        figures = {"batching_c64": 3.0}
        assert unmeasured(figures, ["batching"]) == ["batching_c1"]
        assert unmeasured(figures | {"batching_c1": None}, ["batching"]) == []
        assert unmeasured({}, []) == []

    def test_met_missed_and_missing_are_told_apart(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        show({"batching_c64": 3.0, "goodput_5x": None}, ["batching", "overload"], ["a note"])
        lines = capsys.readouterr().out.splitlines()
        (met,) = (line for line in lines if " met " in line)
        assert " 3 " in met
        (missed,) = (line for line in lines if " missed " in line)
        assert "unknown" in missed
        assert sum("MISSING" in line for line in lines) == 4
        assert not any("BM_Arrival" in line or "an arrival" in line for line in lines)
        assert lines[-1] == "a note"


class TestHighestRate:
    @pytest.mark.parametrize("limit", [0.02, 0.7, 3.0, 9.9])
    def test_it_is_within_the_precision(self, limit: float) -> None:
        asked: list[float] = []

        def keeps_up(rate: float) -> bool:
            asked.append(rate)
            return rate <= limit

        found = highest_rate(keeps_up, 0.01, 10.0, 1.03)
        assert limit / 1.03 <= found <= limit
        assert found in asked
        # Half the logarithm each time.
        assert len(asked) <= 11

    def test_the_upper_bound_may_be_kept(self) -> None:
        assert highest_rate(lambda _: True, 1.0, 10.0) == 10.0

    def test_the_lower_bound_must_be_kept(self) -> None:
        with pytest.raises(ValueError, match="not even 1 a second"):
            highest_rate(lambda _: False, 1.0, 10.0)
        assert highest_rate(lambda rate: rate == 1.0, 1.0, 10.0) == 1.0

    @pytest.mark.parametrize(
        ("low", "high", "precision"), [(0.0, 1.0, 1.03), (2.0, 1.0, 1.03), (1.0, 2.0, 1.0)]
    )
    def test_bounds_that_are_none_are_refused(
        self, low: float, high: float, precision: float
    ) -> None:
        with pytest.raises(ValueError, match="no bounds"):
            highest_rate(lambda _: True, low, high, precision)


class TestRates:
    def test_there_are_all_settings(self) -> None:
        assert len({setting.name for setting in SETTINGS}) == len(SETTINGS) == 48

    def test_a_rate_is_that_of_the_arrivals(self) -> None:
        trace = base_trace(SETTINGS[0], 1)
        for rate in (0.5, 4.0):
            part = at_rate(trace, rate)
            assert len(part) >= 3000
            assert (len(part) - 1) / part.arrival_s[-1] == pytest.approx(rate, rel=0.05)
        assert at_rate(trace, 0.5).model.tolist() == at_rate(trace, 1.0).model.tolist()

    def test_large_models_are_split_where_there_are_devices(self) -> None:
        for devices in (1, 4):
            setting = Setting(family="zipf", devices=devices, working_set=5.0)
            trace = base_trace(setting, 1)
            machine = machine_of(setting, trace)
            assert machine.total_bytes == pytest.approx(trace.footprint_bytes() / 5, rel=1e-6)
            trace.check_fits(machine.budgets)
            spans = {model.spans for model in trace.models}
            assert spans == ({1} if devices == 1 else {1, 2, 4})
            for model in trace.models:
                part = model.parts(devices)[1]
                assert part <= 0.4 * machine.budgets[0] or model.spans == devices
                assert model.load_s == pytest.approx(0.4 + part / 2e9, rel=1e-6)

    def test_each_model_has_devices_of_its_own_unless_it_may_be_anywhere(self) -> None:
        setting = Setting(family="zipf", devices=4, working_set=5.0)
        trace = base_trace(setting, 1)
        machine = machine_of(setting, trace)
        held = [0] * 4
        for model in trace.models:
            assert [len(place) for place in model.places] == [model.spans]
            assert places_of(model, machine.budgets) == model.places
            for device in model.places[0]:
                held[device] += model.parts(4)[1]
        assert max(held) <= 1.02 * min(held)
        anywhere = base_trace(replace(setting, anywhere=True), 1)
        assert {len(places_of(model, machine.budgets)) for model in anywhere.models} == {4, 6, 1}
        assert [m.size_bytes for m in anywhere.models] == [m.size_bytes for m in trace.models]

    def test_seeds_are_combined_by_their_geometric_mean(self) -> None:
        assert combined([{"a": 1.0}, {"a": 4.0}]) == {"a": 2.0}

    def test_a_summary_is_of_the_ratios(self) -> None:
        found = {
            SETTINGS[0]: {PRODUCT: 4.0, "fifo+lru": 1.0, "fcfs+lru": 4.0, "fcfs-each+lru": 2.0},
            SETTINGS[1]: {PRODUCT: 9.0, "fifo+lru": 1.0, "fcfs+lru": 1.0, "fcfs-each+lru": 18.0},
        }
        anywhere = next(setting for setting in SETTINGS if setting.anywhere)
        found[anywhere] = {PRODUCT: 8.0, "fifo+lru": 1.0, "fcfs+lru": 16.0, "fcfs-each+lru": 16.0}
        figures = summary(found)
        assert figures["rate_vs_fifo_lru"] == 6.0
        assert figures["rate_vs_fcfs_lru"] == 3.0
        assert figures["rate_anywhere_vs_fifo_lru"] == 8.0
        assert figures["rate_anywhere_vs_fcfs_lru"] == 0.5
        assert figures["rate_vs_fcfs_lru_min"] == 0.5, "of all of them"
        assert figures["rate_vs_fcfs_each_lru"] == 1.0
        assert figures[f"rate_{SETTINGS[1].name}_vs_fcfs_lru"] == 9.0


class TestLoads:
    def instance(self, load_s: float, *, is_loop: bool = False) -> LoadInstance:
        return LoadInstance(
            name="x", share=0.1, is_loop=is_loop, load_s=load_s, lru_s=4.0, bound_s=1.0
        )

    def test_the_mean_is_geometric_and_the_worst_counts(self) -> None:
        figures = loads_summary(
            [self.instance(1.0), self.instance(2.0, is_loop=True), self.instance(4.0)]
        )
        assert figures["geomean_vs_bound"] == 2.0
        assert figures["worst_vs_lru"] == 1.0
        assert figures["loops_vs_bound"] == 2.0
        assert figures["load_instances"] == 3
        assert "loops_best_offline_vs_bound" not in figures
        known = [replace(self.instance(9.0, is_loop=True), best_s=best) for best in (1.5, 1.25)]
        assert loads_summary(known)["loops_best_offline_vs_bound"] == 1.5

    def test_without_loops_there_is_no_figure_of_them(self) -> None:
        assert "loops_vs_bound" not in loads_summary([self.instance(1.0)])
        with pytest.raises(ValueError, match="no instances"):
            loads_summary([])

    def test_traces_that_are_not_there_are_named(self, tmp_path: Path) -> None:
        assert trace_jobs(tmp_path) == ([], [str(tmp_path / "bounds.json")])
        entries = [
            {
                "trace": name,
                "budget_share": share,
                "requests": 7,
                "lower_bound_s": 3.5,
            }
            for name in ("here", "gone")
            for share in (0.1, 0.2)
        ]
        (tmp_path / "bounds.json").write_text(json.dumps(entries))
        (tmp_path / "here.npz").touch()
        jobs, missing = trace_jobs(tmp_path)
        assert missing == [str(tmp_path / "gone.npz")]
        assert [(job.name, job.share, job.bound_s) for job in jobs] == [
            ("here", 0.1, 3.5),
            ("here", 0.2, 3.5),
        ]

    def test_an_entry_for_several_devices_is_replayed_on_so_many(self, tmp_path: Path) -> None:
        wanted = np.random.default_rng(7).integers(0, 6, 400)
        sizes = np.array([10, 10, 10, 20, 20, 30])
        np.savez(
            tmp_path / "six.npz",
            t=np.arange(400.0),
            k=wanted,
            e=np.zeros(400),
            size_mb=sizes,
            cost_disk=sizes / 10,
            cost_host=sizes / 10,
        )
        entry = {"trace": "six", "budget_share": 0.6, "requests": 400, "lower_bound_s": 1.0}
        told = [1, 2, 3, 17, 0, "two"]
        (tmp_path / "bounds.json").write_text(
            json.dumps([entry, *({**entry, "devices": devices} for devices in told)])
        )
        jobs, _ = trace_jobs(tmp_path)
        trace = read_trace(tmp_path / "six.npz")
        unsaid, one, two, *none = map(load_instance, jobs)
        assert isinstance(one, LoadInstance) and isinstance(two, LoadInstance)
        assert unsaid == one
        assert (one.name, two.name) == ("six", "six on 2 devices")
        for instance, budgets in ((one, (60 << 20,)), (two, (30 << 20,) * 2)):
            found = replay_serially(trace, Machine(budgets=budgets), "lru")
            assert instance.lru_s == pytest.approx(found.load_s)
        assert one.lru_s != two.lru_s
        for reason, text in zip(
            none,
            ("is larger than the largest budget", "1 to 16 devices", "are 0: a", "are 'two': a"),
            strict=True,
        ):
            assert isinstance(reason, str) and text in reason

    def test_loops_are_slightly_over_capacity_and_nothing_else_is_a_loop(self) -> None:
        jobs = family_jobs()
        assert {job.name for job in jobs if job.is_loop} == {"loop:0.25", "loop:1"}
        assert all(job.share >= 0.8 for job in jobs if job.is_loop)
        assert len({(job.name, job.share, job.seed) for job in jobs}) == len(jobs)


class TestOverload:
    def test_only_what_is_answered_in_its_time_and_in_the_overload_counts(self) -> None:
        answers = [
            Answer(due_s=10.0, ended_s=11.0),
            Answer(due_s=12.0, ended_s=13.9),
            Answer(due_s=12.0, ended_s=14.1),  # Late.
            Answer(due_s=19.0, ended_s=20.5),  # In its time, after the overload.
            Answer(due_s=13.0, ended_s=13.1, error="QUEUE_FULL", has_retry=True),
            Answer(due_s=13.0, ended_s=13.1, error="BUDGET_EXHAUSTED"),
            Answer(due_s=13.0, ended_s=14.99, error="DEADLINE_EXCEEDED"),
        ]
        figures = overload_summary(answers, begin_s=10.0, end_s=20.0, deadline_s=2.0, peak=0.4)
        assert figures["goodput_5x"] == pytest.approx(0.5)
        assert figures["overload_refused"] == 2
        assert figures["overload_refusals_with_retry"] == 0.5
        assert figures["overload_late"] == 2
        assert figures["overload_accepted_in_time"] == 0.6
        assert figures["overload_answer_p99_s"] == pytest.approx(2.1)
        assert figures["overload_queue_full"] == 1
        assert figures["overload_deadline_exceeded"] == 1

    def test_without_refusals_there_is_no_share_of_them(self) -> None:
        figures = overload_summary(
            [Answer(due_s=0.0, ended_s=1.0)], begin_s=0.0, end_s=1.0, deadline_s=2.0, peak=1.0
        )
        assert figures["overload_refusals_with_retry"] is None
        assert figures["overload_accepted_in_time"] == 1.0

    def test_it_is_over_after_the_last_request_that_came_too_late(self) -> None:
        answers = [
            Answer(due_s=10.5, ended_s=13.0),
            Answer(due_s=11.5, ended_s=11.6, error="QUEUE_FULL"),
            Answer(due_s=12.0, ended_s=12.5),
        ]
        assert recovery_s(answers, end_s=10.0, deadline_s=2.0) == 1.5
        assert recovery_s(answers[2:], end_s=10.0, deadline_s=2.0) == 0.0


def turns_of(text: str) -> list[Turn]:
    """Answers such as "a0 b0 a1": whose, and after how many it was asked for."""
    return [Turn(client=word[0], asked=int(word[1:]), seconds=1.0) for word in text.split()]


class TestFairness:
    def test_jains_index(self) -> None:
        assert jain([7, 7, 7]) == pytest.approx(1.0)
        assert jain([5, 0, 0, 0, 0]) == pytest.approx(0.2)
        # Of the paper: 20 with one unit each, of a hundred.
        assert jain([1] * 20 + [0] * 80) == pytest.approx(0.2)
        assert jain([1, 3]) == jain([10, 30]) == pytest.approx(0.8)

    def test_nothing_is_divided_neither_fairly_nor_unfairly(self) -> None:
        with pytest.raises(ValueError, match="nobody"):
            jain([0, 0])
        with pytest.raises(ValueError, match="nobody"):
            fair_shares({"a": 0})

    def test_answers_are_counted_also_of_those_who_have_none(self) -> None:
        counts = answers_of(turns_of("a0 b0 a1 c0"), ["a", "b", "z"])
        assert counts == {"a": 2, "b": 1, "z": 0}
        assert fair_shares(counts) == {"a": 2.0, "b": 1.0, "z": 0.0}

    def test_those_pass_who_are_answered_between_a_question_and_its_answer(self) -> None:
        turns = turns_of("f0 q0 f0 f1 c0 q2 q6")
        assert passed_by(turns, "q", "f") == [1, 2, 0]
        assert passed_by(turns, "q", "c") == [0, 1, 0]

    def test_those_who_asked_later_are_told_apart(self) -> None:
        # Of the five that pass two were asked for when q had been asked for, and another answered.
        turns = turns_of("f0 f0 f1 f2 f0 f3 q1 f4")
        assert passed_by(turns, "q", "f") == [5]
        assert passed_by(turns, "q", "f", later=True) == [2]
        assert passed_by(turns_of("f0 q1"), "q", "f", later=True) == [0]

    def test_what_has_a_bar_is_of_the_worse_server(self) -> None:
        found = {}
        for rows, jains, share, runs, wait in ((1, 1.0, 0.9, 2.0, 3.0), (8, 0.97, 1.0, 1.9, 13.0)):
            found[f"fairness_jain_rows_{rows}"] = jains
            found[f"fairness_line_share_rows_{rows}"] = share
            found[f"fairness_quiet_runs_rows_{rows}"] = runs
            found[f"fairness_quiet_wait_ratio_rows_{rows}"] = wait
        assert fairness_summary(found, (1, 8)) == {
            "fairness_jain": 0.97,
            "fairness_line_share": 0.9,
            "fairness_quiet_runs": 2.0,
            "fairness_quiet_wait_ratio": 13.0,
        }

    def test_order_of_arrival_would_miss_the_bars_of_turns(self) -> None:
        bars = {bar.figure: bar for bar in BARS}
        backlogged = [demand for demand in DEMANDS if demand >= BACKLOGGED]
        # Answers as many in flight, and the whole flood before each question.
        assert not bars["fairness_jain"].is_met(jain(backlogged))
        assert all(not bars["fairness_quiet_runs"].is_met(FLOOD / rows) for rows in ROWS)

    def test_who_counts_as_always_waiting_has_more_than_a_run_of_equal_parts_takes(self) -> None:
        askers = demand_askers()
        assert len({asker.client for asker in askers}) == len(askers) == len(DEMANDS)
        assert all(2 * rows / len(askers) < BACKLOGGED for rows in ROWS)
        assert sum(asker.in_flight >= BACKLOGGED for asker in askers) >= 2


class TestRefusals:
    def error(self, *details: Any) -> grpc.aio.AioRpcError:
        status = status_pb2.Status(code=8)
        for detail in details:
            status.details.add().Pack(detail)
        metadata = grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))
        return grpc.aio.AioRpcError(
            grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), metadata, "no"
        )

    def test_a_refusal_has_its_reason_and_perhaps_a_time(self) -> None:
        info = error_details_pb2.ErrorInfo(reason="QUEUE_FULL")
        assert refusal_facts(self.error(info)) == ("QUEUE_FULL", False)
        retry = error_details_pb2.RetryInfo()
        assert refusal_facts(self.error(info, retry)) == ("QUEUE_FULL", True)

    def test_what_the_server_did_not_say_is_the_status_code(self) -> None:
        bare = grpc.aio.AioRpcError(
            grpc.StatusCode.DEADLINE_EXCEEDED, grpc.aio.Metadata(), grpc.aio.Metadata(), ""
        )
        assert refusal_facts(bare) == ("DEADLINE_EXCEEDED", False)


class TestWhatIsAsked:
    def test_texts_are_always_the_same(self) -> None:
        assert short_texts() == short_texts()
        assert len(set(short_texts())) == 64
        assert {len(text.split()) for text in short_texts()} <= set(range(3, 13))
        assert long_texts(3) == long_texts(3)
        assert [len(text.split()) for text in long_texts(2, 50)] == [50, 50]

    def test_draws_are_by_zipfs_law(self) -> None:
        drawn = zipf_draws(["a", "b", "c", "d"], 1.0, 5000, 1)
        assert drawn == zipf_draws(["a", "b", "c", "d"], 1.0, 5000, 1)
        assert drawn.count("a") / drawn.count("d") == pytest.approx(4, rel=0.2)


class TestArrival:
    def run(self, name: str, cpu_time: float, **more: Any) -> dict[str, Any]:
        return {"run_name": name, "cpu_time": cpu_time, "time_unit": "us", **more}

    def test_the_median_of_the_policys_run_counts(self) -> None:
        name = "BM_ArrivalWithShadows/ensemble/300"
        runs = [
            self.run(name, 9.0, run_type="iteration"),
            self.run(name, 2.5, run_type="aggregate", aggregate_name="median"),
            self.run(name, 2.7, run_type="aggregate", aggregate_name="mean"),
            self.run("BM_ArrivalWithShadows/learned/300", 7.0, run_type="iteration"),
        ]
        assert arrival_us({"benchmarks": runs}, "ensemble", 300) == 2.5
        assert arrival_us({"benchmarks": runs}, "learned", 300) == 7.0

    def test_nanoseconds_are_read_as_such(self) -> None:
        run = self.run("BM_ArrivalWithShadows/gap/300", 900.0) | {"time_unit": "ns"}
        assert arrival_us({"benchmarks": [run]}, "gap", 300) == 0.9

    def test_a_report_without_the_run_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no run of BM_ArrivalWithShadows/gap/300"):
            arrival_us({"benchmarks": []}, "gap", 300)
