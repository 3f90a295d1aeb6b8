"""`modelyard simulate`: what it prints, its pictures, and what it refuses."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from modelyard_server import _core
from modelyard_server.cli.main import app
from modelyard_server.simulation.baselines import BASELINES
from modelyard_server.simulation.families import family_trace
from modelyard_server.simulation.machine import Machine
from modelyard_server.simulation.serial_replay import replay_serially

SMALL = ("zipf:0.9", "--requests", "600", "--model-count", "20", "--budget", "0.4")
CSV = "time,model,execution_s,size_bytes,load_s\n0,a,1,5,1\n1,b,1,5,2\n2,a,1,,\n"
PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["simulate", *arguments], env={"NO_COLOR": "1"})


def told(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_it_tells_what_the_replay_found() -> None:
    pytest.importorskip("highspy")
    found = told(*SMALL)
    trace = family_trace("zipf:0.9", requests=600, models=20)
    budget = int(0.4 * trace.footprint_bytes())
    assert found["budgets"] == [pytest.approx(budget, abs=1)]
    assert [each["policy"] for each in found["policies"]] == [_core.POLICIES[0], "lru"]
    for each in found["policies"]:
        outcome = replay_serially(trace, Machine(budgets=tuple(found["budgets"])), each["policy"])
        assert each["load_s"] == pytest.approx(outcome.load_s)
        assert each["evictions"] == outcome.evictions
        assert each["ratio_to_bound"] == pytest.approx(outcome.load_s / found["offline_bound_s"])
    assert found["offline_bound_s"] <= found["best_offline_s"]
    assert "wait_s" not in found["policies"][0]


def test_the_table_has_every_policy_the_bound_and_the_schedule() -> None:
    pytest.importorskip("highspy")
    result = run(*SMALL, "--policy", "all")
    assert result.exit_code == 0, result.output
    for word in (*_core.POLICIES, "bound", "offline", "evicted: idle models only"):
        assert word in result.stdout
    assert result.stdout.startswith("zipf:0.9: 600 requests for 20 models of ")
    assert result.stderr == ""


def test_timed_it_tells_waits_and_reference_schedulers() -> None:
    found = told(*SMALL, "--timed", "--slots", "2", "--no-bound")
    names = [each["policy"] for each in found["policies"]]
    assert names == [_core.POLICIES[0], "lru", "fifo+lru", "fcfs+lru", "fcfs-each+lru"]
    for each in found["policies"]:
        waits = each["wait_s"]
        assert 0 <= waits["p50"] <= waits["p90"] <= waits["p99"] <= waits["max"]
        assert each["served_count"] == 600
    assert found["offline_bound_s"] is None
    refused = told(*SMALL, "--timed", "--no-bound", "--deadline", "2")["policies"][0]
    assert set(refused["refused"]) <= {
        "DEADLINE_IN_LOAD",
        "DEADLINE_IN_QUEUE",
        "DEADLINE_UNREACHABLE",
    }
    assert sum(refused["refused"].values()) + refused["served_count"] == 600


def test_a_reference_scheduler_can_be_asked_for_by_its_name() -> None:
    def names(*policies: str) -> list[str]:
        asked = [each for policy in policies for each in ("--policy", policy)]
        found = told(*SMALL, "--timed", "--no-bound", *asked)["policies"]
        assert all(each["served_count"] == 600 and each["ratio_to_lru"] for each in found)
        return [each["policy"] for each in found]

    assert names("fifo+lru") == ["fifo+lru", "lru"]
    assert names("fcfs+lru", "ensemble", "fcfs+lru") == ["fcfs+lru", "ensemble", "lru"]
    assert names("lru") == ["lru", *BASELINES]
    assert names("all") == [*_core.POLICIES, *BASELINES]
    assert names("all", "fifo+lru") == [*_core.POLICIES, "fifo+lru"]


def test_what_if_shows_the_difference() -> None:
    found = told(*SMALL, "--no-bound", "--what-if", "+1TB", "--what-if", "-1MB")
    more, less = found["what_ifs"]
    assert more["what_if"] == "+1TB"
    assert more["budgets"][0] == found["budgets"][0] + 10**12
    assert more["policies"][0]["load_s"] == pytest.approx(found["compulsory_load_s"])
    assert less["budgets"][0] == found["budgets"][0] - 10**6
    text = run(*SMALL, "--no-bound", "--what-if", "+1TB").stdout
    change = more["policies"][0]["load_s"] - found["policies"][0]["load_s"]
    assert f"{change:+.0f}s" in text


def test_a_file_and_devices_of_a_server(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(CSV)
    config = tmp_path / "server.toml"
    config.write_text('[yard]\npolicy = "lru"\n[[devices]]\ndevice = "cpu"\nbudget = "9B"\n')
    found = told(str(trace), "--devices", str(config), "--no-bound")
    assert (found["budgets"], found["devices"]) == ([9], ["cpu"])
    assert [each["policy"] for each in found["policies"]] == ["lru"]
    assert found["policies"][0]["load_s"] == 4.0
    assert told(str(trace), "--budget", "10B", "--no-bound")["policies"][0]["load_s"] == 3.0
    assert told(str(trace), "--budget", "10B", "--requests", "1")["request_count"] == 1


def test_devices_of_a_server_whose_folders_are_elsewhere(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(CSV)
    config = tmp_path / "server.toml"
    text = (
        '[catalog]\nfile = "/nowhere/modelyard.db"\n[weights]\nstore = "/nowhere/store"\n'
        '[roots]\nstore = "/nowhere/models"\n[models.a]\nruntime = "torch"\nroot = "store"\n'
        'folder = "a"\n[[devices]]\ndevice = "cuda:0"\nbudget = "9B"\n'
    )
    config.write_text(text)
    found = told(str(trace), "--devices", str(config), "--no-bound")
    assert (found["budgets"], found["devices"]) == ([9], ["cuda:0"])
    config.write_text(text.replace('"torch"', '"tortch"'))
    refused = run(str(trace), "--devices", str(config), "--no-bound")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: server.toml:8: models.a.runtime")
    assert refused.stderr.count("\n") == 1


def test_models_that_fit_may_together_be_larger_than_any_device(tmp_path: Path) -> None:
    rows = [f"{i},m{i % 12},1,7e12,1" for i in range(40)]
    (tmp_path / "t.csv").write_text(CSV.splitlines()[0] + "\n" + "\n".join(rows) + "\n")
    arguments = (str(tmp_path / "t.csv"), "--policy", "all")
    for mode in ("--serial", "--timed"):
        found = told(*arguments, "--budget", "20TB", mode)
        assert found["footprint_bytes"] == 84 * 10**12
        # With room for two of twelve in turn each load is needed.
        assert min(each["load_count"] for each in found["policies"]) >= 12
        assert found["best_offline_s"] <= 40
    refused = run(*arguments, "--budget", "100%")
    assert refused.exit_code == 2
    assert "'100%' of 76.4TiB: a budget is at least 1 byte and at most 64TiB" in refused.stderr


def test_a_trace_that_no_clock_can_count_is_cut_by_requests(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(CSV.replace("\n2,a", "\n9e9,a"))
    arguments = (str(tmp_path / "t.csv"), "--budget", "9B", "--no-bound")
    assert told(*arguments)["request_count"] == 3
    refused = run(*arguments, "--timed")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: t: a timed replay could take 9e+09 seconds of its own")
    assert told(*arguments, "--timed", "--requests", "2")["request_count"] == 2


def test_a_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, more in (("serial.png", ["--what-if", "+8GB"]), ("timed.png", ["--timed"])):
        picture = tmp_path / name
        result = run(*SMALL, "--no-bound", "--plot", str(picture), *more)
        assert result.exit_code == 0, result.output
        content = picture.read_bytes()
        assert content.startswith(PNG)
        # An empty picture of this size is far smaller.
        assert len(content) > 20_000


def test_a_picture_may_be_of_a_trace_of_any_name(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trace = tmp_path / "x$\\frac{$\x1b[31m\u4e2d.csv"
    trace.write_text(CSV)
    picture = tmp_path / "p.png"
    result = run(str(trace), "--budget", "9B", "--no-bound", "--plot", str(picture))
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert picture.read_bytes().startswith(PNG)


def test_a_picture_that_cannot_be_written_leaves_the_one_that_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "p.png"
    picture.write_text("precious")
    write_bytes = Path.write_bytes

    def half(path: Path, content: bytes) -> int:
        write_bytes(path, content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    result = run(*SMALL, "--no-bound", "--plot", str(picture))
    assert (result.exit_code, result.stderr) == (2, "error: p.png: No space left on device\n")
    assert picture.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [picture]


def test_a_servers_host_tier_is_replayed_and_its_order_is_said_not_to_be(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(
        "time,model,execution_s,size_bytes,load_s,host_load_s\n"
        "0,a,1,5,4,1\n1,b,1,5,4,1\n2,a,1,,,\n3,b,1,,,\n"
    )
    config = tmp_path / "server.toml"
    config.write_text(
        '[yard]\norder = "fifo"\n[host_tier]\nbudget = "20B"\n'
        '[[devices]]\ndevice = "cpu"\nbudget = "9B"\nlogical = true\n'
    )
    arguments = (str(trace), "--devices", str(config), "--policy", "lru", "--no-bound")
    found = told(*arguments)
    assert found["host_budget_bytes"] == 20
    assert found["policies"][0]["load_s"] == 4 + 4 + 1 + 1
    assert told(*arguments, "--host-budget", "0B")["policies"][0]["load_s"] == 16
    assert run(*arguments).stderr == ""
    timed = run(*arguments, "--timed")
    assert timed.exit_code == 0
    assert 'order = "fifo" of server.toml is not replayed' in timed.stderr


def test_a_host_tier_is_used_and_has_no_bound() -> None:
    found = told(*SMALL, "--host-budget", "1TB")
    assert found["policies"][0]["host_load_count"] > 0
    assert found["offline_bound_s"] is None
    assert "host tier" in found["bound_note"]


def test_without_the_solver_there_is_everything_but_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "highspy", None)
    result = run(*SMALL)
    assert result.exit_code == 0
    assert "pip install 'modelyard[simulate]'" in result.stderr
    assert "offline: the best schedule found" in result.stdout
    assert "bound: no schedule" not in result.stdout


def test_without_matplotlib_a_picture_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("nowhere.csv", "--plot", str(tmp_path / "p.png"))
    assert result.exit_code == 2
    assert "a picture needs the package matplotlib" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nonsense"], "'nonsense' is neither a .csv, .npz or .jsonl file nor a made-up trace"),
        (["none.csv"], "none.csv: No such file"),
        (["t.csv", "--budget", "4B"], "t.csv:2: model 'a' of 5B is larger than the largest"),
        (["t.csv", "--budget", "5B", "--what-if", "-1B"], "t.csv:2: model 'a' of 5B is larger"),
        (["t.csv", "--budget", "0"], "as a share of all models is above 0"),
        (["t.csv", "--what-if", "8GB"], "write for example '+8GB'"),
        (["t.csv", "--policy", "arc"], f"no policy 'arc'; there are {', '.join(_core.POLICIES)}"),
        (["t.csv", "--policy", "arc", "--timed"], f"with --timed also {', '.join(BASELINES)}"),
        (["t.csv", "--policy", "fifo+lru"], "'fifo+lru' is a reference scheduler of timed replays"),
        (["t.csv", "--model-count", "9"], "--model-count is for made-up traces"),
        (["zipf", "--models", "t.csv"], "--models is for .csv traces"),
        (["zipf:7"], "'zipf:7': the number behind the colon is 0 to 3"),
        (["zipf", "--devices", "nine.toml", "--budget", "1GB"], "give one of them"),
        (["zipf", "--devices", "d.toml"], "d.toml"),
        (["zipf", "--devices", "half.toml"], "the budget of cpu is 50%"),
        (["zipf", "--host-budget", "8"], "has no unit"),
        (["zipf", "--deadline", "-1"], "deadline_s is above 0"),
        (["zipf", "--plot", "p.gif"], "p.gif: the picture is a PNG"),
        (["zipf", "--plot", "none/p.png"], "there is no folder 'none' for it"),
        (["zipf", "--plot", "folder.png"], "folder.png: is there, and no file that could be"),
        (["zipf", "--host-budget", ""], "'' is no size"),
        (["a" * 300], "is neither a .csv, .npz or .jsonl file nor a made-up trace"),
        (["t.csv", "--models", "."], "error: .: Is a directory"),
        (["t.csv", "--devices", "."], "error: .:1: cannot be read: Is a directory"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    arguments: list[str],
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text(CSV)
    Path("folder.png").mkdir()
    Path("nine.toml").write_text('[[devices]]\ndevice = "cpu"\nbudget = "9GB"\n')
    Path("half.toml").write_text('[[devices]]\ndevice = "cpu"\nbudget = "50%"\n')
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert error in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert str(tmp_path) not in result.stderr
    assert result.stdout == ""
