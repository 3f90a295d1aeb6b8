"""WatchRequests and `modelyard record`: what a server was asked, and what a replay makes of it."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import faulty_models
from tests.support.config_text import ALLOWED, CPU, ROOTS, device_table, model_table
from tests.support.server import (
    COMMAND,
    RunningApp,
    child_environment,
    eventually,
    refusal_of,
    running_app,
)
from typer.testing import CliRunner, Result

from modelyard import (
    Admin,
    BatchItem,
    ModelyardError,
    QueueFull,
    RecordedModel,
    RecordedRequest,
    RequestRecords,
    RequestWatch,
)
from modelyard.v1 import admin_service_pb2 as pb
from modelyard_server.cli.main import app
from modelyard_server.cli.record import Recorder, parse_duration
from modelyard_server.errors import Reason
from modelyard_server.services.recording import RecordingService
from modelyard_server.services.request_log import RequestFacts, RequestLog
from modelyard_server.simulation.request_logs import read_request_log
from modelyard_server.transport.api import Call

X = np.ones(3, np.float32)
PATIENCE_S = 60


async def quietly(yard: RunningApp, key: str, inputs: Any, **settings: Any) -> None:
    with suppress(ModelyardError):
        await yard.client.predict(key, inputs, **settings)


@asynccontextmanager
async def watching(yard: RunningApp) -> AsyncIterator[RequestWatch]:
    """A watch of requests; its first message is still to come."""
    watch = await yard.admin(Admin.watch_requests)
    try:
        yield watch
    finally:
        await asyncio.to_thread(watch.close)


async def read(watch: RequestWatch) -> RequestRecords:
    return await asyncio.wait_for(asyncio.to_thread(next, watch), PATIENCE_S)


async def read_until(watch: RequestWatch, count: int) -> RequestRecords:
    """The next so many requests and what came with them, as one."""
    models: list[RecordedModel] = []
    requests: list[RecordedRequest] = []
    missed, records = 0, None
    while len(requests) < count:
        records = await read(watch)
        models += records.models
        requests += records.requests
        missed += records.missed_count
    assert records is not None and len(requests) == count
    return RequestRecords(
        started_at=records.started_at,
        models=tuple(models),
        requests=tuple(requests),
        missed_count=missed,
        begins=False,
    )


# The watch


async def test_a_watch_begins_with_the_models_and_tells_every_request(tmp_path: Path) -> None:
    for name in ("good", "raising"):
        faulty_models.make_weights(tmp_path / "store" / name)
    factory = faulty_models.factory
    config = CPU + ROOTS + ALLOWED
    config += model_table("good", "torch", options={"factory": factory("Adding")}, keys=["a/b"])
    raising: dict[str, object] = {"factory": factory("Raising")}
    raising["factory_options"] = {"kind": "ValueError"}
    config += model_table("raising", "torch", options=raising)
    config += model_table("never", "identity", options={"size_bytes": 1000})
    async with running_app(config, tmp_path) as yard, watching(yard) as watch:
        first = await read(watch)
        assert first.begins and first.requests == () and first.missed_count == 0
        known = {model.model: model for model in first.models}
        assert set(known) == {"models/good", "models/raising", "models/never"}
        assert all(model.load_s is None for model in known.values())
        assert known["models/never"].size_bytes == 1000

        cold = await yard.client.predict("a/b", np.ones((4, 3), np.float32))
        await yard.client.predict("good", X)
        await quietly(yard, "raising", X)
        await quietly(yard, "nobody", X)
        await quietly(yard, "good", X, parameters={"odd": 1})
        await yard.client.predict_batch(
            [BatchItem(key="good", inputs=np.float32(7)), ("..", X), ("good", X)]
        )
        told = await read_until(watch, 8)
        assert not told.begins and told.missed_count == 0
        assert told.started_at == first.started_at
        requests = told.requests
        assert [(each.key, each.model, each.reason, each.row_count) for each in requests[:5]] == [
            ("a/b", "models/good", None, 4),
            ("good", "models/good", None, 3),
            ("raising", "models/raising", "MODEL_FAILED", 3),
            ("nobody", "", "KEY_NOT_FOUND", 0),
            ("good", "models/good", "INVALID_FIELD", 3),
        ]
        # Of a batch first what was refused at once.
        assert [(each.key, each.reason, each.row_count) for each in requests[5:]] == [
            ("..", "INVALID_FIELD", 0),
            ("good", None, 1),
            ("good", None, 3),
        ]
        served = cold.served
        assert requests[0].cold and not requests[1].cold
        assert requests[0].load_s == pytest.approx(served.load_s, abs=1e-6)
        assert requests[0].wait_s == pytest.approx(served.wait_s, abs=1e-6)
        assert requests[0].run_s == pytest.approx(served.run_s, abs=1e-6)
        assert requests[0].device == served.device == "devices/cpu"
        assert requests[1].load_s is None
        assert requests[2].run_s is not None and requests[2].device == "devices/cpu"
        assert requests[3].run_s is None and requests[3].device == ""
        arrivals = [each.arrival_s for each in requests]
        assert arrivals == sorted(arrivals) and arrivals[0] > 0
        for each in requests:
            assert (each.arrived_at - told.started_at).total_seconds() == pytest.approx(
                each.arrival_s, abs=1e-5
            )
        better = {model.model: model for model in told.models}
        assert better["models/good"].load_s is not None
        assert better["models/good"].size_bytes == 4 * faulty_models.ROWS
        assert "models/never" not in better


async def test_there_are_so_many_watches_and_no_more(tmp_path: Path) -> None:
    async with running_app(CPU + model_table("echo", "identity"), tmp_path) as yard:
        watches = [await yard.admin(Admin.watch_requests) for _ in range(8)]
        for watch in watches:
            await read(watch)
        async with watching(yard) as ninth:
            with pytest.raises(QueueFull) as caught:
                await read(ninth)
            assert caught.value.retry_after_s is not None
        await asyncio.to_thread(watches[0].close)

        async def is_free() -> bool:
            async with watching(yard) as again:
                try:
                    return (await read(again)).begins
                except QueueFull:
                    return False

        await eventually("a place is free again", is_free)
        for watch in watches:
            await asyncio.to_thread(watch.close)


async def test_a_slow_reader_is_told_how_many_it_missed(tmp_path: Path) -> None:
    async with running_app(CPU + model_table("echo", "identity"), tmp_path) as yard:
        log = RequestLog(capacity=3)
        service = RecordingService(log=log, catalog=yard.app.catalog, residency=yard.app.residency)
        stream = service.watch_requests(pb.WatchRequestsRequest(), Call(b"", tuple, None))
        assert [model.model for model in (await anext(stream)).models] == ["models/echo"]
        assert log.followed
        for number in range(10):
            facts = RequestFacts(10**15 + number)
            facts.ended_ns, facts.key, facts.reason = 10**15 + 50, str(number), Reason.QUEUE_FULL
            log.add(facts)
        told = await anext(stream)
        assert (told.missed_count, [each.key for each in told.requests]) == (7, ["7", "8", "9"])
        await stream.aclose()
        assert log.follower_count == 0


async def test_models_that_come_while_it_is_watched_are_told(tmp_path: Path) -> None:
    config = CPU + model_table("echo", "identity")
    async with running_app(config, tmp_path) as yard, watching(yard) as watch:
        await read(watch)
        await yard.admin(
            Admin.create_model, "late", runtime="identity", options={"size_bytes": 500}
        )
        await yard.client.predict("late", "a")
        told = await read_until(watch, 1)
        assert [(each.model, each.size_bytes) for each in told.models] == [("models/late", 500)]


# The command


def record(*arguments: str | Path) -> asyncio.Task[Result]:
    """Runs `modelyard record` in a thread of its own."""
    command = ["record", *map(str, arguments)]
    return asyncio.create_task(
        asyncio.to_thread(CliRunner().invoke, app, command, env={"NO_COLOR": "1"})
    )


async def is_recording(file: Path) -> None:
    await eventually("the file is there", lambda: file.exists() and file.stat().st_size > 30)


async def test_a_replay_of_the_record_agrees_with_the_server(tmp_path: Path) -> None:
    config = '[yard]\npolicy = "lru"\n' + device_table("cpu", "3500B")
    names = [f"m{index}" for index in range(8)]
    for name in names:
        config += model_table(name, "identity", options={"size_bytes": 1000})
    file = tmp_path / "live.jsonl"
    chance = random.Random(2)
    async with running_app(config, tmp_path) as yard:
        recording = record(file, "--requests", "300", "--server", yard.target, "--json")
        await is_recording(file)
        before = await yard.admin(Admin.stats)
        left = 300
        while left:
            name = names[min(int(chance.expovariate(0.5)), 7)]
            if chance.random() < 0.2:
                count = min(left, chance.randrange(1, 6))
                await yard.client.predict_batch([(name, "text")] * count)
            else:
                count = 1
                await yard.client.predict(name, "text")
            left -= count
            if chance.random() < 0.1:
                await refusal_of(yard.client.predict("nobody", "text"))
        result = await recording
        assert result.exit_code == 0, result.output
        stats = await yard.admin(Admin.stats)
        told = json.loads(result.stdout)
        assert told["request_count"] == stats.answered_count - before.answered_count == 300
        assert told["missed_count"] == told["break_count"] == 0
        refused = stats.error_counts["KEY_NOT_FOUND"]
        # One that was refused behind the last of them may be in none of the pages.
        assert refused - 1 <= told["left_out"]["KEY_NOT_FOUND"] <= refused

    trace = read_request_log(file)
    assert len(trace) == 300
    arguments = ["simulate", str(file), "--policy", "lru", "--budget", "3500B", "--json"]
    replay = CliRunner().invoke(app, [*arguments, "--no-bound"], env={"NO_COLOR": "1"})
    assert replay.exit_code == 0, replay.output
    found = json.loads(replay.stdout)
    assert found["request_count"] == 300
    (outcome,) = found["policies"]
    assert outcome["load_count"] == stats.load_count - before.load_count
    assert stats.load_count > 20  # It was a trace worth replaying.
    # The server's loads took what the record says that loads of these models take.
    assert outcome["load_s"] == pytest.approx(stats.load_s, rel=1.0)


async def test_mixed_traffic_of_many_at_once_is_recorded_whole(tmp_path: Path) -> None:
    config = device_table("cpu", "3500B")
    names = [f"m{index}" for index in range(6)]
    for name in names:
        config += model_table(name, "identity", options={"size_bytes": 1000})
    file = tmp_path / "live.jsonl"
    chance = random.Random(4)
    async with running_app(config, tmp_path) as yard:
        recording = record(file, "--requests", "600", "--server", yard.target)
        await is_recording(file)

        async def ask() -> None:
            for _ in range(10):
                await yard.client.predict(chance.choice(names), "text")
            await yard.client.predict_batch([(chance.choice(names), "text") for _ in range(20)])

        await asyncio.gather(*(ask() for _ in range(20)))
        result = await recording
        assert result.exit_code == 0, result.output
        assert result.stdout == "live.jsonl: 600 requests for 6 models\n"
        stats = await yard.admin(Admin.stats)
        assert stats.answered_count == 600
    trace = read_request_log(file)
    assert (len(trace), len(trace.used())) == (600, 6)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    cold = [line for line in lines if line.get("load_s", 0) > 0 and "t" in line]
    assert len(cold) == stats.cold_count
    assert {line["size_bytes"] for line in lines if "size_bytes" in line} == {1000}


async def test_requests_that_used_no_model_are_left_out_and_counted(tmp_path: Path) -> None:
    faulty_models.make_weights(tmp_path / "store" / "raising")
    raising: dict[str, object] = {"factory": faulty_models.factory("Raising")}
    raising["factory_options"] = {"kind": "ValueError"}
    config = CPU + ROOTS + ALLOWED + model_table("raising", "torch", options=raising)
    config += model_table("large", "identity", options={"size_bytes": 10_000_000})
    config += model_table("pinned", "identity", options={"size_bytes": 60_000_000}, pinned=True)
    file = tmp_path / "live.jsonl"
    async with running_app(config, tmp_path) as yard:
        recording = record(file, "--requests", "3", "--server", yard.target, "--json")
        await is_recording(file)
        await quietly(yard, "raising", X)  # It ran, and took its model's time.
        await quietly(yard, "nobody", X)
        await quietly(yard, "large", "text")  # No room, and nobody knows what its load takes.
        await yard.admin(Admin.unpin, "pinned")
        await yard.client.predict("large", "text")
        await yard.client.predict("large", "text")
        result = await recording
        told = json.loads(result.stdout)
        assert told["left_out"] == {"KEY_NOT_FOUND": 1, "BUDGET_EXHAUSTED": 1}
        assert (told["request_count"], told["model_count"]) == (3, 2)
    assert len(read_request_log(file)) == 3


REASONS = [
    "BUDGET_EXHAUSTED",
    "QUEUE_FULL",
    "DEADLINE_UNREACHABLE",
    "DEADLINE_IN_QUEUE",
    "DEADLINE_IN_LOAD",
]


@pytest.mark.parametrize("reason", REASONS)
def test_who_is_refused_for_want_of_room_or_time_is_among_the_requests(reason: str) -> None:
    began = datetime(2026, 1, 1, tzinfo=UTC)
    request = RecordedRequest(
        arrival_s=1.0,
        arrived_at=began + timedelta(seconds=1),
        key="a",
        model="models/a",
        device="",
        cold=True,
        wait_s=0.5,
        load_s=None,
        run_s=None,
        row_count=1,
        reason=reason,
    )
    model = RecordedModel(model="models/a", size_bytes=5, load_s=2.0, copy_load_s=None)
    out = StringIO()
    Recorder(out, most=None).write(
        RequestRecords(
            started_at=began, models=(model,), requests=(request,), missed_count=0, begins=True
        )
    )
    (line,) = [line for line in map(json.loads, out.getvalue().splitlines()) if "t" in line]
    assert (line["t"], line["model"], line["run_s"]) == (1.0, "a", 0.0)


async def test_it_ends_when_its_time_is_over(tmp_path: Path) -> None:
    file = tmp_path / "live.jsonl"
    async with running_app(CPU + model_table("echo", "identity"), tmp_path) as yard:
        recording = record(file, "--for", "2s", "--server", yard.target)
        await is_recording(file)
        await yard.client.predict("echo", "a")
        result = await recording
        assert (result.exit_code, result.stdout) == (0, "live.jsonl: 1 requests for 1 models\n")


async def test_ctrl_c_ends_it_well(tmp_path: Path) -> None:
    file = tmp_path / "live.jsonl"
    async with running_app(CPU + model_table("echo", "identity"), tmp_path) as yard:
        process = subprocess.Popen(  # noqa: ASYNC220 - it is waited for in a thread
            [COMMAND, "record", file, "--server", yard.target],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=child_environment(),
        )
        try:
            await is_recording(file)
            for _ in range(20):
                await yard.client.predict("echo", "a")

            def lines() -> int:
                return file.read_text().count('"t"')

            await eventually("all are written", lambda: lines() == 20)
            process.send_signal(signal.SIGINT)
            out, err = await asyncio.to_thread(process.communicate, timeout=PATIENCE_S)
        finally:
            process.kill()
            process.wait()
        assert (process.returncode, err) == (0, "")
        assert out == "live.jsonl: 20 requests for 1 models\n"
    assert len(read_request_log(file)) == 20


async def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    there = tmp_path / "there.jsonl"
    there.write_text("precious")
    async with running_app(CPU + model_table("echo", "identity"), tmp_path) as yard:
        for arguments, code, text in (
            ([there], 2, "there.jsonl is there already; --force writes over it"),
            ([tmp_path / "no" / "file"], 2, "file cannot be written: No such file"),
            ([tmp_path / "f", "--for", "soon"], 2, "'soon' is no duration"),
            ([tmp_path / "f", "--for", "0s"], 2, "above 0"),
            ([".", "--force"], 2, "error: . cannot be written: Is a directory"),
        ):
            result = await record(*arguments, "--server", yard.target)
            assert (result.exit_code, text in result.stderr) == (code, True), result.output
            assert str(tmp_path) not in result.stderr
        assert there.read_text() == "precious"
        result = await record(there, "--force", "--for", "1s", "--server", yard.target)
        assert result.exit_code == 0
        assert there.read_text().startswith('{"modelyard_record":1}\n')
    gone = await record(tmp_path / "f", "--server", yard.target, "--timeout", "1")
    assert gone.exit_code == 3
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("0.5s", 0.5)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "10 m", "-1s", "1d", "1e3", "0", "721h", "9" * 400])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        parse_duration(text)
