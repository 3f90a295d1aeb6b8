"""The arithmetic of `make bench-weights`, and its instruments: they see what they are to see."""

from __future__ import annotations

import asyncio
import math
import mmap
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench import weights_cache
from bench.weights import PARTS, combined, show
from bench.weights_cache import cold_read_s, drop, resident_share, warm
from bench.weights_figures import (
    BARS,
    NOTED,
    Bar,
    beyond_ledger,
    error_pct,
    longest_gap_ms,
    missed,
    over_limit,
    over_pct,
    paired_ratio,
    slope_per_100,
    within,
    worst_error_pct,
)
from bench.weights_models import Encoder, filed_bytes, make_encoders, make_fine_tunes
from bench.weights_server import ServerReport, beat, read_report, worker_pids
from bench.weights_tier import LoadRounds, rounds_figures
from tests.support.server import eventually

NEEDED = {
    "reload_vs_from_pretrained",
    "ttfi_vs_from_pretrained",
    "ttfi_vs_steady",
    "small_reload_vs_from_pretrained",
    "cold_vs_limit",
    "shared_50_ratio",
    "rss_over_baseline_pct",
    "rss_slope_mb_per_100",
    "fds_growth",
    "threads_growth",
    "maps_growth",
    "p99_during_load_ratio",
    "stall_ms",
    "measured_vs_ledger",
    "price_error_pct",
    "activation_error_pct",
}


class TestBars:
    def test_every_figure_that_is_asked_for_has_one(self) -> None:
        names = [bar.figure for bar in BARS]
        assert set(names) >= NEEDED
        assert len(set(names)) == len(names)

    @pytest.mark.parametrize(
        ("at_least", "value", "is_met"),
        [
            (True, 10.0, True),
            (True, 9.99, False),
            (False, 10.0, True),
            (False, 10.01, False),
            (True, math.inf, True),
            (False, -3.0, True),
            (True, math.nan, False),
            (False, math.nan, False),
            (True, None, False),
            (False, None, False),
        ],
    )
    def test_a_bar_is_met_up_to_its_limit(
        self, at_least: bool, value: float | None, is_met: bool
    ) -> None:
        bar = Bar(figure="x", limit=10, at_least=at_least, text="")
        assert bar.is_met(value) is is_met
        assert bar.shown == (">= 10" if at_least else "<= 10")

    def test_what_was_not_measured_is_not_missed(self) -> None:
        bars = [Bar(figure="a", limit=1, text=""), Bar(figure="b", limit=1, text="")]
        assert missed({"a": 2.0}, bars) == [bars[0]]
        assert missed({"a": 1.0, "b": None}, bars) == [bars[1]]
        assert missed({}, bars) == []

    def test_a_missed_bar_is_shown_as_missed(self, capsys: pytest.CaptureFixture[str]) -> None:
        show({"stall_ms": 51.0, "ttfi_vs_steady": 1.4, "shared_50_ratio": None}, quick=False)
        lines = capsys.readouterr().out.splitlines()
        assert sum("MISSED" in line for line in lines) == 2
        (steady,) = (line for line in lines if "1.4" in line)
        assert "MISSED" not in steady

    def test_figures_without_a_bar_are_shown_and_never_missed(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert not NOTED.keys() & {bar.figure for bar in BARS}
        show({"tier_rps_vs_none": 0.5, "tier_warm_copies": 7}, quick=False)
        printed = capsys.readouterr().out
        assert "MISSED" not in printed
        lines = printed.splitlines()
        assert any("requests/s" in line and "0.5" in line and "none" in line for line in lines)
        assert any("copies made" in line and "7" in line for line in lines)
        assert not any("loads from copies" in line for line in lines)


class TestArithmetic:
    def test_a_ratio_is_the_median_of_the_rounds_ratios(self) -> None:
        # Each side by itself has the median 3; in no round they were alike.
        assert paired_ratio([1.0, 3.0, 30.0], [3.0, 1.0, 3.0]) == 3.0
        assert paired_ratio([10.0, 100.0], [1.0, 10.0]) == 10.0

    @pytest.mark.parametrize(("over", "under"), [([], []), ([1.0], []), ([1.0], [1.0, 2.0])])
    def test_rounds_come_in_pairs(self, over: list[float], under: list[float]) -> None:
        with pytest.raises(ValueError, match="pairs"):
            paired_ratio(over, under)

    def test_a_limit_is_reading_and_then_a_run(self) -> None:
        assert over_limit([0.3, 0.6], [0.2, 0.5], [0.1, 0.1, 9.0]) == pytest.approx(1.0)
        assert over_limit([0.6], [0.2], [0.1]) == pytest.approx(2.0)

    def test_a_slope_is_of_a_hundred_steps(self) -> None:
        assert slope_per_100([5.0 + 0.25 * step for step in range(40)]) == pytest.approx(25.0)
        assert slope_per_100([7.0] * 10) == 0.0
        assert slope_per_100([3.0, 2.0, 1.0]) == pytest.approx(-100.0)
        # One high value at the end is no growth of all.
        assert slope_per_100([0.0] * 99 + [1.0]) < 0.1
        with pytest.raises(ValueError, match="two"):
            slope_per_100([1.0])

    def test_errors_have_a_sign_and_the_worst_keeps_it(self) -> None:
        assert error_pct(110, 100) == pytest.approx(10)
        assert error_pct(95, 100) == pytest.approx(-5)
        assert error_pct(0, 0) == 0
        assert error_pct(1, 0) == math.inf
        assert worst_error_pct([1.0, -3.0, 2.0]) == -3.0
        assert over_pct(105, 100) == pytest.approx(5)
        assert over_pct(90, 100) == pytest.approx(-10)

    def test_memory_is_held_against_the_ledger_beyond_its_room(self) -> None:
        assert beyond_ledger(132, 100, room_bytes=32) == 1.0
        assert beyond_ledger(137, 100, room_bytes=32) == pytest.approx(1.05)
        assert beyond_ledger(20, 100, room_bytes=32) == 0.0
        assert beyond_ledger((32 << 20) + 210, 200) == pytest.approx(1.05)

    def test_only_gaps_within_windows_count(self) -> None:
        gaps = [(0.5, 0.9), (1.0, 0.02), (1.5, 0.004), (2.5, 0.7), (3.2, 0.03)]
        windows = [(1.0, 2.0), (3.0, 4.0)]
        assert longest_gap_ms(gaps, windows) == pytest.approx(30)
        assert longest_gap_ms(gaps, [(1.2, 2.0)]) == pytest.approx(4)
        assert longest_gap_ms(gaps, [(8.0, 9.0)]) == 0
        assert within(2.0, windows)
        assert not within(2.1, windows)

    def test_parts_are_put_together(self) -> None:
        parts: list[dict[str, Any]] = [
            {"answers_wrong": 1, "engine_kind": "process", "shared_measured_vs_ledger": 0.9},
            {"answers_wrong": 2, "engine_kind": "process", "mixed_measured_vs_ledger": 1.1},
        ]
        found = combined(parts)
        assert found["answers_wrong"] == 3
        assert found["measured_vs_ledger"] == 1.1
        assert combined(parts[:1])["measured_vs_ledger"] == 0.9
        assert "measured_vs_ledger" not in combined([])
        with pytest.raises(ValueError, match="engine_kind"):
            combined([*parts, {"engine_kind": "thread"}])

    def test_a_load_from_a_copy_is_held_against_those_of_its_round(self) -> None:
        rounds = LoadRounds(keep=[0.2, 0.6, 0.4], gb=[0.5, 0.5, 0.5])
        for cold, cached, copy in ((2.0, 0.5, 1.0), (8.0, 1.0, 2.0), (3.0, 0.3, 1.0)):
            rounds.add("storage", cold, cold + 1)
            rounds.add("page cache", cached, cached + 1)
            rounds.add("copy", copy, copy + 1)
        figures = rounds_figures(rounds)
        # More than 1 is a copy that is faster.
        assert figures["promotion_vs_cold"] == 3.0
        assert figures["promotion_vs_cache"] == 0.5
        assert figures["promotion_ttfi_vs_cold"] == 2.0
        assert figures["promotion_ttfi_vs_cache"] == round(2 / 3, 3)
        assert figures["demote_seconds_per_gb"] == 0.8
        assert (figures["tier_cold_load_ms"], figures["tier_copy_load_ms"]) == (3000.0, 1000.0)

    def test_every_part_says_how_it_can_be_called_alone(self) -> None:
        assert list(PARTS) == ["loads", "cycles", "shared", "loading", "sizes", "tier"]


class TestPageCache:
    def test_what_was_just_written_is_in_memory(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(os.urandom(3 * mmap.PAGESIZE + 1))
        warm([path])
        assert resident_share(path) == 1.0
        (tmp_path / "empty").touch()
        assert resident_share(tmp_path / "empty") == 0.0

    @pytest.mark.parametrize("act", [drop, cold_read_s])
    def test_a_file_that_stays_is_an_error(
        self, act: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(weights_cache, "_DROP_PAUSE_S", 0)
        path = tmp_path / "file"
        path.write_bytes(b"x" * 2 * mmap.PAGESIZE)
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with mapping:
            assert mapping[0] == mapping[mmap.PAGESIZE] == ord("x")
            with pytest.raises(RuntimeError, match=r"% of file stays in the page cache"):
                act([path])


class TestHeartbeat:
    async def test_a_loop_that_is_kept_busy_is_seen(self, tmp_path: Path) -> None:
        report = ServerReport()
        engine = SimpleNamespace(pids={"models-a": 11, "models-b": 12, "files": 13, "zygote": 14})
        file = tmp_path / "report.pids"
        task = asyncio.create_task(beat(engine, report, file))
        await eventually("a first beat", file.exists)
        begin = time.monotonic()
        time.sleep(0.03)  # noqa: ASYNC251 - what is to be seen
        beats = report.beats
        await eventually("the next beat", lambda: report.beats > beats)
        end = time.monotonic()
        task.cancel()
        assert longest_gap_ms(report.gaps, [(begin, end)]) >= 29
        assert report.engine_kind == "process"
        assert worker_pids(tmp_path / "report.json") == (11, 12)

    async def test_an_engine_without_workers_is_the_server_itself(self, tmp_path: Path) -> None:
        report = ServerReport()
        task = asyncio.create_task(beat(SimpleNamespace(), report, tmp_path / "report.pids"))
        await eventually("a first beat", (tmp_path / "report.pids").exists)
        task.cancel()
        assert report.engine_kind == "thread"
        assert worker_pids(tmp_path / "report.json") == (os.getpid(),)

    def test_a_report_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        path = tmp_path / "report.json"
        path.write_text('{"engine_kind": "process", "beats": 7, "gaps": [[1.5, 0.25]]}')
        assert read_report(path) == ServerReport(engine_kind="process", beats=7, gaps=[(1.5, 0.25)])


class TestModels:
    SMALL = Encoder(name="small", hidden=8, layers=1, heads=2)

    def test_fine_tunes_differ_in_their_heads_alone(self, tmp_path: Path) -> None:
        one, two = make_fine_tunes(tmp_path, self.SMALL, 2)
        encoders = [model.folder / "encoder.safetensors" for model in (one, two)]
        assert encoders[0].samefile(encoders[1])
        heads = [(model.folder / "head.safetensors").read_bytes() for model in (one, two)]
        assert heads[0] != heads[1]
        assert filed_bytes(one.folder) == filed_bytes(two.folder)
        # Two rows of the encoder's width, and two numbers.
        without = filed_bytes(one.folder) - (2 * 8 + 2) * 4
        (one.folder / "head.safetensors").unlink()
        assert filed_bytes(one.folder) == without

    def test_encoders_differ_in_every_tensor(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        weights = [
            load_file(model.folder / "model.safetensors")
            for model in make_encoders(tmp_path, self.SMALL, ["a", "b"])
        ]
        assert weights[0].keys() == weights[1].keys()
        assert not [name for name in weights[0] if weights[0][name].equal(weights[1][name])]
        assert filed_bytes(tmp_path / "a") == sum(t.nbytes for t in weights[0].values())
