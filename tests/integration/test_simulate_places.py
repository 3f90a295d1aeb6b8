"""Where models are: as recorded on a server with two devices, as replayed, and as asked for."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from tests.support.config_text import device_table, model_table
from tests.support.server import eventually, running_app
from typer.testing import CliRunner, Result

from modelyard import Admin, RecordedModel, RequestRecords
from modelyard_server.cli.main import app
from modelyard_server.cli.record import Recorder
from modelyard_server.cli.recorded_places import RecordedPlaces
from modelyard_server.simulation.baselines import BASELINES
from modelyard_server.simulation.request_logs import read_request_log

PAGE = Path(__file__).parents[2] / "docs" / "simulator.md"
CSV = (
    "time,model,execution_s,size_bytes,load_s,places\n"
    "0,a,1,5,1,cuda:1\n2,b,1,5,1,cuda:1\n4,a,1,,,\n6,b,1,,,\n"
)
DEVICES = "".join(device_table(f"cuda:{i}", "9B", logical=True) for i in (0, 1))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"NO_COLOR": "1"})


def told(*arguments: str) -> Any:
    result = run("simulate", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text(CSV)
    Path("server.toml").write_text(DEVICES)


def test_models_are_where_the_trace_says_on_devices_that_have_its_names() -> None:
    for mode in ("--serial", "--timed"):
        found = told("t.csv", "--devices", "server.toml", mode)
        assert (found["places"], found["places_note"]) == ("trace", "")
        assert {each["load_count"] for each in found["policies"]} == {4}
        assert found["best_offline_s"] == 4.0
    pytest.importorskip("highspy")
    found = told("t.csv", "--devices", "server.toml")
    assert 2.0 < found["offline_bound_s"] <= 4.0
    anywhere = told("t.csv", "--devices", "server.toml", "--places", "anywhere")
    assert anywhere["offline_bound_s"] == pytest.approx(2.0)
    title = run("simulate", "t.csv", "--devices", "server.toml").stdout.splitlines()[0]
    assert title.endswith("% of the models), models where the trace says")


def test_what_is_asked_for_counts_more_and_is_said() -> None:
    for places in ("anywhere", "dealt"):
        found = told("t.csv", "--devices", "server.toml", "--timed", "--places", places)
        assert found["places"] == places
        assert {each["load_count"] for each in found["policies"]} == {2}
    text = run("simulate", "t.csv", "--devices", "server.toml", "--places", "dealt").stdout
    assert "models dealt out for good" in text
    # They stay where they were dealt when budgets change.
    found = told("t.csv", "--devices", "server.toml", "--places", "dealt", "--what-if", "+9B")
    assert [each["places"] for each in (found, *found["what_ifs"])] == ["dealt", "dealt"]


def test_without_named_devices_the_places_are_not_used_and_one_line_says_so() -> None:
    for budgets in (["--budget", "9B"], ["--budget", "5B", "--budget", "5B"]):
        found = told("t.csv", *budgets)
        assert found["places"] == "anywhere"
        result = run("simulate", "t.csv", *budgets)
        (line,) = [line for line in result.stdout.splitlines() if "none here has a name" in line]
        assert line == found["places_note"]
    assert told("t.csv", "--budget", "9B", "--places", "anywhere")["places_note"] == ""


def test_models_on_several_devices_have_a_bound_and_no_schedule() -> None:
    pytest.importorskip("highspy")
    Path("t.csv").write_text(CSV.replace("0,a,1,5,1,cuda:1", "0,a,1,18,1,cuda:0+cuda:1"))
    found = told("t.csv", "--devices", "server.toml")
    assert found["best_offline_s"] is None
    assert "several devices at once" in found["schedule_note"]
    for each in found["policies"]:
        assert each["load_s"] == 4.0 >= found["offline_bound_s"] > 2.0
    result = run("simulate", "t.csv", "--devices", "server.toml")
    assert found["schedule_note"] in result.stdout.splitlines()
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["t.csv", "--devices", "one.toml"],
            "t.csv:2: model 'a' is on cuda:1, and there are cuda:0; --places anywhere or dealt",
        ),
        (
            ["t.csv", "--devices", "server.toml", "--what-if", "cuda:1=-5B"],
            "t.csv:2: model 'a' of 5B takes 5B of cuda:1: the budget there is 4B",
        ),
        (["zipf", "--places", "fixed"], "--places is anywhere or dealt, got 'fixed'"),
        (["bad.csv", "--devices", "server.toml"], "bad.csv:2: places: Unknown device type string"),
    ],
)
def test_what_is_wrong_with_places_is_one_line(arguments: list[str], error: str) -> None:
    Path("one.toml").write_text(device_table("cuda:0", "9B", logical=True))
    Path("bad.csv").write_text(CSV.replace("cuda:1", "gpu"))
    result = run("simulate", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: {error}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_the_page_shows_what_fixed_places_do() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("### Fixed places\n")[2]
    section = section.partition("\n### ")[0].partition("\n## ")[0]
    files = dict(re.findall(r"`([a-z.]+)`:\n\n```\w+\n(.*?)```", section, re.DOTALL))
    assert set(files) == {"day.csv", "two.toml"}
    for name, text in files.items():
        Path(name).write_text(text)
    commands = re.findall(r"^\$ modelyard (simulate .*?)(?: +#.*)?$", section, re.MULTILINE)
    assert len(commands) == 3
    found = [told(*command.split()[1:], "--no-bound") for command in commands]
    assert [each["places"] for each in found] == ["trace", "anywhere", "dealt"]
    for each in found:
        assert [p["policy"] for p in each["policies"]][1:] == ["lru", *BASELINES]
        assert each["mode"] == "timed"
    # What it is all about: at fixed places a model waits for its own device.
    loads = [{p["policy"]: p["load_count"] for p in each["policies"]} for each in found]
    assert loads[0]["fifo+lru"] > loads[1]["fifo+lru"]


async def is_recording(file: Path) -> None:
    await eventually("the file is there", lambda: file.exists() and file.stat().st_size > 30)


async def test_a_record_says_where_the_servers_models_are_and_a_replay_agrees(
    tmp_path: Path,
) -> None:
    config = '[yard]\npolicy = "lru"\n' + "".join(
        device_table(f"cuda:{i}", "2500B", logical=True) for i in (0, 1)
    )
    size = {"size_bytes": 1000}
    # All at home on the second device, where there is room for two of them.
    for name in ("a", "b", "c"):
        config += model_table(name, "identity", options=size, device="cuda:1")
    config += model_table("free", "identity", options=size)
    file = tmp_path / "live.jsonl"
    async with running_app(config, tmp_path) as yard:
        arguments = ["record", str(file), "--requests", "14", "--server", yard.target]
        recording = asyncio.create_task(asyncio.to_thread(run, *arguments))
        await is_recording(file)
        await yard.admin(
            Admin.create_model, "late", runtime="identity", options=size, placement="cuda:0"
        )
        either = {"strategy": "auto", "devices": ["cuda:0", "cuda:1"]}
        await yard.admin(
            Admin.create_model, "either", runtime="identity", options=size, placement=either
        )
        for name in ("a", "b", "c", "a", "b", "c", "a", "b", "c", "a", "b"):
            await yard.client.predict(name, "text")
        for name in ("late", "either", "free"):
            await yard.client.predict(name, "text")
        result = await recording
        assert result.exit_code == 0, result.output
        stats = await yard.admin(Admin.stats)
        assert stats.load_count == 14

    trace = read_request_log(file)
    assert {model.name: model.place_names for model in trace.models} == {
        **dict.fromkeys("abc", (("cuda:1",),)),
        "late": (("cuda:0",),),
        "either": (("cuda:0",), ("cuda:1",)),
        "free": (),
    }
    (tmp_path / "server.toml").write_text(config)
    at_home = told(str(file), "--devices", "server.toml", "--no-bound")
    assert at_home["places"] == "trace"
    assert at_home["policies"][0]["load_count"] == stats.load_count
    # If any model could be on any device, three of them would be loaded once.
    anywhere = told(str(file), "--devices", "server.toml", "--no-bound", "--places", "anywhere")
    assert anywhere["policies"][0]["load_count"] < 10


async def test_after_a_break_a_record_has_the_places_of_then(tmp_path: Path) -> None:
    config = "".join(device_table(f"cuda:{i}", "2500B", logical=True) for i in (0, 1))
    size = {"size_bytes": 1000}
    known = RecordedModel(model="models/m", size_bytes=1000, load_s=1.0, copy_load_s=None)

    def records(*, begins: bool) -> RequestRecords:
        now = datetime(2026, 1, 1, tzinfo=UTC)
        return RequestRecords(
            started_at=now, models=(known,), requests=(), missed_count=0, begins=begins
        )

    out = StringIO()
    async with running_app(config, tmp_path) as yard:
        await yard.admin(
            Admin.create_model, "m", runtime="identity", options=size, placement="cuda:0"
        )

        def write_all(admin: Admin) -> None:
            places = RecordedPlaces(admin)
            places.look()
            recorder = Recorder(out, most=None, places=places)
            recorder.write(records(begins=True))
            admin.update_model("m", placement="cuda:1")
            # It is not asked again for each line.
            recorder.write(records(begins=False))
            recorder.write(records(begins=True))
            assert places.of("models/nobody") == ()

        await yard.admin(write_all)
    lines = [json.loads(line) for line in out.getvalue().splitlines()[1:]]
    assert [line["places"] for line in lines] == [[["cuda:0"]], [["cuda:0"]], [["cuda:1"]]]
