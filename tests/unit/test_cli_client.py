"""The commands that talk to a server, against a real one on loopback with made-up answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from tests.support.fake_api import FakeServer, refuse, serving
from typer.testing import CliRunner

from modelyard.tensors import Bfloat16, to_tensor
from modelyard.v1 import (
    admin_service_pb2,
    device_pb2,
    device_service_pb2,
    inference_service_pb2,
    residency_pb2,
    residency_service_pb2,
    tensor_pb2,
)
from modelyard_server.cli.main import app

RESIDENCY = residency_pb2.Residency(
    name="residencies/m",
    model="models/m",
    state=residency_pb2.RESIDENCY_STATE_RESIDENT,
    charges=[residency_pb2.DeviceCharge(device="devices/cpu", size_bytes=300_000_000)],
    pinned=True,
    lease_count=2,
)
CPU = device_pb2.ManagedDevice(
    name="devices/cpu",
    device=device_pb2.Device(type=device_pb2.DEVICE_TYPE_CPU),
    budget_bytes=2**30,
    etag='"1"',
)


PREDICTED = inference_service_pb2.Served(
    model="models/m",
    device="devices/cpu",
    cold=True,
    wait_duration=Duration(seconds=1, nanos=500_000_000),
    load_duration=Duration(nanos=250_000_000),
)


def predict(server: FakeServer, *outputs: tensor_pb2.Tensor) -> None:
    server.reply(
        "Predict", inference_service_pb2.PredictResponse(outputs=outputs, served=PREDICTED)
    )


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as fake:
        predict(fake, to_tensor(["POSITIVE", "NEGATIVE"], "label"))
        for rpc in ("LoadModel", "UnloadModel", "PinModel", "UnpinModel"):
            fake.reply(rpc, getattr(residency_service_pb2, f"{rpc}Response")(residency=RESIDENCY))
        fake.reply(
            "ListResidencies",
            residency_service_pb2.ListResidenciesResponse(residencies=[RESIDENCY]),
        )
        fake.reply("UpdateBudget", device_service_pb2.UpdateBudgetResponse(device=CPU))
        fake.reply("GetServerInfo", admin_service_pb2.GetServerInfoResponse(version="9.9.9"))
        fake.reply(
            "GetStats",
            admin_service_pb2.GetStatsResponse(answered_count=41, error_counts={"QUEUE_FULL": 2}),
        )
        yield fake


def run(server: FakeServer | str, *arguments: str, env: dict[str, str] | None = None) -> Any:
    where = server if isinstance(server, str) else server.address
    given = [*arguments, "--server", where] if where else [*arguments]
    return CliRunner().invoke(app, given, env=env)


def lines(result: Any) -> list[list[str]]:
    """The words of each line of a table that went well."""
    assert result.exit_code == 0, result.output
    return [line.split() for line in result.stdout.splitlines() if line.strip()]


class TestPredict:
    def test_outputs_stand_beside_their_inputs(self, server: FakeServer) -> None:
        scores = np.array([0.98765432, 0.5], dtype=np.float32)
        predict(server, to_tensor(["POS", "NEG"], "label"), to_tensor(scores, "score"))
        result = run(server, "predict", "sentiment", "good", "bad")
        table = lines(result)
        assert table[0] == ["input", "label", "score"]
        assert ["good", "POS", "0.987654"] in table and ["bad", "NEG", "0.5"] in table
        assert "m on cpu, cold: waited 1.50s (250.0ms of it loading), ran 0.0ms" in result.stdout
        assert list(server.requests[0].inputs[0].text.values) == ["good", "bad"]

    def test_outputs_without_a_row_per_input_stand_below(self, server: FakeServer) -> None:
        predict(server, to_tensor(np.float32(2)), to_tensor(np.zeros((3, 1), np.int8), "x"))
        result = run(server, "predict", "k", "good", "bad")
        assert "output: 2\n" in result.stdout and "x: [[0], [0], [0]]" in result.stdout

    def test_json_has_everything(self, server: FakeServer) -> None:
        predict(
            server,
            to_tensor(["a"], "text"),
            to_tensor(b"\xff", "raw"),
            to_tensor(np.array([[np.nan, 1.5]]), "number"),
            to_tensor(Bfloat16.from_float32(np.ones(1, dtype=np.float32)), "half"),
            to_tensor(np.array([True]), "truth"),
        )
        result = run(server, "predict", "k", "x", "--json")
        assert json.loads(result.stdout) == {
            "outputs": {
                "text": ["a"],
                "raw": ["/w=="],
                "number": [[None, 1.5]],
                "half": [1.0],
                "truth": [True],
            },
            "served": {
                "model": "models/m",
                "device": "devices/cpu",
                "cold": True,
                "wait_s": 1.5,
                "load_s": 0.25,
                "run_s": 0.0,
                "route": "",
                "branch": "",
                "version": "",
                "steps": [],
            },
        }

    def test_no_output_drives_the_terminal_or_is_read_as_markup(self, server: FakeServer) -> None:
        predict(server, to_tensor(["\x1b[31mred[/]\n[bold]x"], "label"))
        result = run(server, "predict", "k", "[red]in[/red]")
        assert "\x1b" not in result.output
        assert "[31mred[/] [bold]x" in result.stdout and "[red]in[/red]" in result.stdout

    def test_long_cells_are_whole_in_a_pipe(self, server: FakeServer) -> None:
        predict(server, to_tensor(["word " * 60], "label"))
        result = run(server, "predict", "k", "x")
        assert ("word " * 60).strip() in result.stdout


class TestListings:
    def test_residency(self, server: FakeServer) -> None:
        table = lines(run(server, "residency"))
        assert table[-1] == ["m", "resident", "cpu", "286.1MiB", "pinned", "2", "0", "0"]

    def test_residency_tells_of_copies(self, server: FakeServer) -> None:
        copied = residency_pb2.Residency(
            model="models/m",
            state=residency_pb2.RESIDENCY_STATE_COLD,
            failure=residency_pb2.LoadFailure(message="truncated"),
        )
        for state, size_bytes, nanos, words in (
            (residency_pb2.COPY_STATE_NONE, 0, 0, "truncated"),
            (residency_pb2.COPY_STATE_MAKING, 0, 0, "truncated; copy (making)"),
            (residency_pb2.COPY_STATE_MAKING, 2**20, 0, "truncated; copy (making) 1MiB"),
            (residency_pb2.COPY_STATE_KEPT, 2**20, 12_000_000, "truncated; copy 1MiB, 12.0ms"),
            (residency_pb2.COPY_STATE_DROPPING, 2**20, 0, "truncated; copy (dropping) 1MiB"),
        ):
            copied.copy_state, copied.copy_bytes = state, size_bytes
            copied.ClearField("copy_load_duration")
            if nanos:
                copied.copy_load_duration.nanos = nanos
            server.reply(
                "ListResidencies",
                residency_service_pb2.ListResidenciesResponse(residencies=[copied]),
            )
            assert " ".join(lines(run(server, "residency"))[-1]).endswith(words)
            (found,) = json.loads(run(server, "residency", "--json").stdout)
            assert found["copy_bytes"] == size_bytes
            assert found["copy_load_s"] == (0.012 if nanos else None)

    def test_stats_tell_of_the_host_tier_where_there_is_one(self, server: FakeServer) -> None:
        assert "host" not in run(server, "stats").stdout
        assert json.loads(run(server, "stats", "--json").stdout)["stats"]["host_tier"] is None
        tier = admin_service_pb2.HostTier(
            budget_bytes=2**30, resident_bytes=2**20, copy_count=3, promotion_count=7
        )
        server.reply("GetStats", admin_service_pb2.GetStatsResponse(host_tier=tier))
        table = lines(run(server, "stats"))
        assert ["host", "tier", "1MiB", "of", "1GiB"] in table
        assert ["copies", "3"] in table and ["loads", "from", "copies", "7"] in table
        found = json.loads(run(server, "stats", "--json").stdout)["stats"]["host_tier"]
        assert (found["budget_bytes"], found["promotion_count"]) == (2**30, 7)

    def test_stats_tell_how_the_server_does(self, server: FakeServer) -> None:
        answer = admin_service_pb2.GetStatsResponse(
            recent_load_duration=Duration(seconds=2),
            regret=admin_service_pb2.Regret(
                lru_load_duration=Duration(seconds=9), regret_duration=Duration(seconds=-4)
            ),
            departures=admin_service_pb2.Departures(
                counts={"MODEL": 5, "LOST": 1, "SULKED": 2},
                age_count=5,
                median_idle_duration=Duration(seconds=3),
                p90_idle_duration=Duration(seconds=8),
                median_resident_duration=Duration(seconds=4),
                p90_resident_duration=Duration(seconds=9),
            ),
            batches=admin_service_pb2.BatchFigures(
                batch_count=4,
                request_count=9,
                row_count=11,
                largest_request_count=5,
                largest_row_count=6,
                alone_count=2,
                unshared_count=7,
                split_count=1,
                padding_ratio=0.125,
            ),
        )
        server.reply("GetStats", answer)
        rows = [" ".join(words) for words in lines(run(server, "stats"))]
        for row in (
            "in the last minute 2.00s",
            "under LRU 9.00s, it is 4.00s less here",
            "models told to leave 8",
            "to make room for a model 5",
            "lost with their process 1",
            "sulked 2",
            "idle before median 3.00s, p90 8.00s (last 5 chosen)",
            "resident before median 4.00s, p90 9.00s (last 5 chosen)",
            "batches 4 of 9 requests, 11 rows",
            "at most 5 requests, 6 rows",
            "requests alone 2",
            "run again in parts 1",
            "padding 12.5% at most",
            "requests that share no run 7",
        ):
            assert row in rows
        told = json.loads(run(server, "stats", "--json").stdout)["stats"]
        assert told["recent_load_s"] == 2.0
        assert told["regret"] == {"lru_load_s": 9.0, "regret_s": -4.0}
        assert told["departures"]["counts"] == {"LOST": 1, "MODEL": 5, "SULKED": 2}
        assert told["batches"]["padding_ratio"] == 0.125

    def test_stats_of_an_older_server_leave_out_what_it_does_not_tell(
        self, server: FakeServer
    ) -> None:
        told = run(server, "stats").stdout
        for words in ("under LRU", "told to leave", "batches", "padding"):
            assert words not in told

    def test_stats(self, server: FakeServer) -> None:
        table = lines(run(server, "stats"))
        assert ["version", "9.9.9"] in table and ["answered", "41"] in table
        assert ["refused", "or", "failed", "QUEUE_FULL", "2"] in table

    @pytest.mark.parametrize(
        ("command", "path", "value"),
        [
            ("residency", [0, "state"], "resident"),
            ("residency", [0, "charges", 0, "size_bytes"], 300_000_000),
            ("stats", ["stats", "answered_count"], 41),
            ("stats", ["server", "version"], "9.9.9"),
            ("stats", ["server", "started_at"], None),
        ],
    )
    def test_json(self, server: FakeServer, command: str, path: list[Any], value: Any) -> None:
        found = json.loads(run(server, command, "--json").stdout)
        for step in path:
            found = found[step]
        assert found == value


class TestChanges:
    @pytest.mark.parametrize("command", ["load", "unload", "pin", "unpin"])
    def test_residency_commands_name_the_model_and_show_where_it_stands(
        self, server: FakeServer, command: str
    ) -> None:
        assert lines(run(server, command, "m"))[-1][:2] == ["m", "resident"]
        assert json.loads(run(server, command, "m", "--json").stdout)["model"] == "models/m"
        assert [request.model for request in server.requests] == ["models/m"] * 2

    @pytest.mark.parametrize(
        ("size", "size_bytes"), [("300MB", 300_000_000), ("1.5GiB", 3 * 2**29), ("0B", 0)]
    )
    def test_budgets_take_sizes_as_people_write_them(
        self, server: FakeServer, size: str, size_bytes: int
    ) -> None:
        assert lines(run(server, "budget", "cuda:1", size))[-1][0] == "cpu"
        assert server.requests[0].name == "devices/cuda-1"
        assert server.requests[0].budget_bytes == size_bytes


class TestFailures:
    def test_a_refusal_is_one_line_and_exit_code_1(self, server: FakeServer) -> None:
        violation = {"subject": "devices/cpu", "description": "needs 9, has 5"}
        server.answer(
            "Predict",
            refuse(
                grpc.StatusCode.FAILED_PRECONDITION,
                "MODEL_NEVER_FITS",
                error_details_pb2.PreconditionFailure(violations=[violation]),
                text="too large\nby far",
            ),
        )
        result = run(server, "predict", "k", "x")
        assert result.exit_code == 1 and result.stdout == ""
        assert result.stderr == (
            "error: MODEL_NEVER_FITS: too large by far; devices/cpu: needs 9, has 5\n"
        )

    @pytest.mark.parametrize("command", [["stats"], ["predict", "k", "x"], ["load", "m"]])
    def test_no_server_is_exit_code_3(self, command: list[str]) -> None:
        result = run("127.0.0.1:1", *command)
        assert result.exit_code == 3 and result.stdout == ""
        assert result.stderr.startswith("error: the server at 127.0.0.1:1 cannot be reached")
        assert result.stderr.count("\n") == 1

    @pytest.mark.parametrize(
        ("command", "text"),
        [
            (["budget", "cpu", "300"], "'300' has no unit"),
            (["budget", "cpu", "many"], "is no size"),
            (["stats", "--timeout", "0"], "timeout_s is 0"),
            (["predict", "k"], "Missing argument"),
            (["predict", "k", "x", "--timeout", "soon"], "Invalid value for '--timeout'"),
            (["load"], "Missing argument"),
        ],
    )
    def test_wrong_usage_is_exit_code_2(
        self, server: FakeServer, command: list[str], text: str
    ) -> None:
        result = run(server, *command)
        assert result.exit_code == 2 and text in result.stderr
        assert server.requests == []

    def test_a_target_that_is_none_is_exit_code_2(self) -> None:
        result = run("http://there:1", "stats")
        assert result.exit_code == 2 and "without http://" in result.stderr

    def test_the_server_can_come_from_the_environment(self, server: FakeServer) -> None:
        result = run("", "stats", "--json", env={"MODELYARD_SERVER": server.address})
        assert result.exit_code == 0 and json.loads(result.stdout)["stats"]["hit_count"] == 0
