"""`modelyard models`, against a real server on loopback with made-up answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from tests.support.fake_api import FakeServer, refuse, serving
from typer.testing import CliRunner

from modelyard.v1 import (
    device_pb2,
    model_pb2,
    model_service_pb2,
    plan_pb2,
    residency_pb2,
    residency_service_pb2,
)
from modelyard_server.cli.main import app

CPU = device_pb2.Device(type=device_pb2.DEVICE_TYPE_CPU)
GPU_1 = device_pb2.Device(type=device_pb2.DEVICE_TYPE_GPU, index=1)
MODEL = model_pb2.Model(
    name="models/m",
    keys=["a", "b"],
    source=model_pb2.ModelSource(root="main", folder="team/m"),
    runtime="torch",
    task="t",
    placement=device_pb2.ComponentDevice(single=CPU),
    estimated_bytes=2**20,
    create_time=Timestamp(seconds=1_700_000_000),
    etag='"1"',
    owner=model_pb2.MODEL_OWNER_API,
    placed_by_plan=True,
    pinned=True,
    alternatives=[
        plan_pb2.PlacedModel(
            parts=[
                plan_pb2.PlacedPart(device="devices/cuda-1", prefixes=["encoder"], size_bytes=1024),
                plan_pb2.PlacedPart(device="devices/cpu", prefixes=[""], size_bytes=2048),
            ]
        )
    ],
    warnings=["\x1b[31mdevice_map beats it"],
)
SPLIT = device_pb2.ComponentDevice(
    multiple=device_pb2.DeviceMap(devices={"": CPU, "encoder": GPU_1})
)
AUTOMATIC = device_pb2.AutomaticPlacement(
    strategy=device_pb2.PLACEMENT_STRATEGY_BALANCED, devices=[GPU_1, CPU]
)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as fake:
        fake.reply(
            "ListModels",
            model_service_pb2.ListModelsResponse(
                models=[
                    MODEL,
                    model_pb2.Model(name="models/n", runtime="identity"),
                    model_pb2.Model(name="models/o", placement=SPLIT),
                    model_pb2.Model(name="models/p", automatic_placement=AUTOMATIC),
                ]
            ),
        )
        for rpc in ("GetModel", "CreateModel", "UpdateModel"):
            fake.reply(rpc, getattr(model_service_pb2, f"{rpc}Response")(model=MODEL))
        fake.reply("DeleteModel", model_service_pb2.DeleteModelResponse())
        residency = residency_pb2.Residency(name="residencies/m", model="models/m")
        for rpc in ("LoadModel", "UnloadModel", "PinModel", "UnpinModel"):
            fake.reply(rpc, getattr(residency_service_pb2, f"{rpc}Response")(residency=residency))
        yield fake


def run(server: FakeServer, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["models", *arguments, "--server", server.address])


def lines(result: Any) -> list[list[str]]:
    """The words of each line of a table that went well."""
    assert result.exit_code == 0, result.output
    return [line.split() for line in result.stdout.splitlines() if line.strip()]


class TestList:
    @pytest.mark.parametrize("arguments", [[], ["list"]])
    def test_models_are_listed_with_or_without_the_word(
        self, server: FakeServer, arguments: list[str]
    ) -> None:
        table = lines(run(server, *arguments))
        assert ["m", "a,", "b", "torch", "t", "cpu", "1MiB", "api", "pinned"] in table
        assert ["n", "identity", "auto", "0B", "unknown"] in table
        assert ["o", "(rest):", "cpu,", "encoder:", "cuda:1", "0B", "unknown"] in table
        assert ["p", "balanced", "of", "cuda:1,", "cpu", "0B", "unknown"] in table

    def test_json_has_placements_in_forms_that_can_be_read_again(self, server: FakeServer) -> None:
        models = json.loads(run(server, "--json").stdout)
        assert [model["placement"] for model in models] == [
            {"type": "single", "device": "cpu"},
            None,
            {"type": "multiple", "device_map": {"": "cpu", "encoder": "cuda:1"}},
            {"strategy": "balanced", "devices": ["cuda:1", "cpu"]},
        ]
        assert models[0]["owner"] == "api"

    def test_options_that_would_be_lost_are_refused(self, server: FakeServer) -> None:
        result = CliRunner().invoke(app, ["models", "--json", "rm", "m"])
        assert result.exit_code == 2 and "models rm --json" in result.stderr


class TestShow:
    def test_a_model_is_told_whole(self, server: FakeServer) -> None:
        result = run(server, "show", "m")
        table = lines(result)
        assert ["weights", "main:", "team/m"] in table and ["owner", "api"] in table
        assert ["placement", "cpu", "(by", "the", "device", "plan)"] in table
        assert ["1", "cuda:1", "1KiB", "encoder"] in table
        assert ["1", "cpu", "2KiB", "(all)"] in table
        assert "\x1b" not in result.output and "[31mdevice_map beats it" in result.stdout
        assert server.requests[0].name == "models/m"

    def test_json(self, server: FakeServer) -> None:
        model = json.loads(run(server, "show", "m", "--json").stdout)
        assert model["alternatives"][0]["parts"][0]["size_bytes"] == 1024
        assert model["placed_by_plan"] and model["etag"] == '"1"'

    def test_a_model_nobody_knows_is_exit_code_1(self, server: FakeServer) -> None:
        server.answer("GetModel", refuse(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"))
        result = run(server, "show", "x")
        assert result.exit_code == 1 and result.stderr.startswith("error: MODEL_NOT_FOUND")


class TestAdd:
    def test_everything_can_be_said(self, server: FakeServer) -> None:
        result = run(
            server,
            *("add", "m", "--runtime", "torch", "--root", "main", "--folder", "team/m"),
            *("--task", "t", "--key", "a", "--key", "b", "--device", "cuda:1"),
            *("--option", "top_k=5", "--option", 'device_map={"": "cpu"}', "--dry-run"),
        )
        assert result.exit_code == 0, result.output
        (request,) = server.requests
        assert request.model_id == "m" and request.validate_only
        assert request.model.runtime == "torch" and list(request.model.keys) == ["a", "b"]
        assert request.model.source == MODEL.source
        assert request.model.options["top_k"] == 5
        assert dict(request.model.options["device_map"]) == {"": "cpu"}
        assert request.model.placement == device_pb2.ComponentDevice(single=GPU_1)

    @pytest.mark.parametrize(
        ("text", "where"),
        [
            ("balanced", "automatic_placement"),
            ("auto", "automatic_placement"),
            ('{"": "cpu", "encoder": "cuda:1"}', "placement"),
            ('{"strategy": "balanced", "devices": ["cuda:1", "cpu"]}', "automatic_placement"),
        ],
    )
    def test_placements_are_text_or_a_table(
        self, server: FakeServer, text: str, where: str
    ) -> None:
        run(server, "add", "m", "--runtime", "identity", "--device", text)
        (request,) = server.requests
        assert request.model.WhichOneof("where") == where
        if where == "placement":
            assert request.model.placement == SPLIT
        elif text.startswith("{"):
            assert request.model.automatic_placement == AUTOMATIC

    def test_what_is_not_said_is_left_unset(self, server: FakeServer) -> None:
        run(server, "add", "m", "--runtime", "identity")
        assert server.requests[0].model == model_pb2.Model(runtime="identity")
        assert not server.requests[0].validate_only and server.requests[0].request_id

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["add", "m"], "Missing option '--runtime'"),
            (["add", "m", "--runtime", "x", "--root", "r"], "root and folder go together"),
            (["add", "m", "--runtime", "x", "--device", "gpu"], "Unknown device type"),
            (["add", "m", "--runtime", "x", "--device", "{"], "--device is no JSON"),
            (["add", "m", "--runtime", "x", "--option", "k"], "must be NAME=JSON"),
            (["add", "m", "--runtime", "x", "--option", "k=v"], "text needs its quotes: 'k=\"te"),
            (
                ["add", "m", "--runtime", "x", "--option", "k=1", "--option", "k=2"],
                "given twice",
            ),
            (["update", "m"], "nothing to change"),
            (["update", "m", "--key", "k", "--no-keys"], "not both"),
            (["update", "m", "--option", "k=1", "--no-options"], "not both"),
        ],
    )
    def test_wrong_usage_is_exit_code_2(
        self, server: FakeServer, arguments: list[str], said: str
    ) -> None:
        result = run(server, *arguments)
        assert result.exit_code == 2 and said in result.stderr
        assert server.requests == []


class TestUpdate:
    @pytest.mark.parametrize(
        ("arguments", "paths"),
        [
            (["--task", "t"], ["task"]),
            (["--root", "r", "--folder", "f", "--runtime", "torch"], ["source", "runtime"]),
            (["--key", "k"], ["keys"]),
            (["--no-keys"], ["keys"]),
            (["--option", "k=1"], ["options"]),
            (["--no-options"], ["options"]),
            (["--device", "cuda:1"], ["placement"]),
            (["--device", "sequential"], ["automatic_placement"]),
        ],
    )
    def test_only_what_is_given_is_changed(
        self, server: FakeServer, arguments: list[str], paths: list[str]
    ) -> None:
        result = run(server, "update", "m", *arguments, "--etag", '"1"', "--dry-run")
        assert result.exit_code == 0, result.output
        (request,) = server.requests
        assert list(request.update_mask.paths) == paths
        assert (request.model.name, request.model.etag) == ("models/m", '"1"')
        assert request.validate_only


class TestOthers:
    def test_rm(self, server: FakeServer) -> None:
        assert run(server, "rm", "m").stdout == "removed m\n"
        answer = json.loads(run(server, "rm", "m", "--etag", '"1"', "--json").stdout)
        assert answer == {"removed": "models/m"}
        assert [(request.name, request.etag) for request in server.requests] == [
            ("models/m", ""),
            ("models/m", '"1"'),
        ]

    def test_a_model_of_the_configuration_cannot_be_removed(self, server: FakeServer) -> None:
        server.answer("DeleteModel", refuse(grpc.StatusCode.FAILED_PRECONDITION, "CONFIG_OWNED"))
        result = run(server, "rm", "m")
        assert result.exit_code == 1 and "CONFIG_OWNED" in result.stderr

    @pytest.mark.parametrize("command", ["load", "unload", "pin", "unpin"])
    def test_what_is_in_memory_can_be_changed_from_here_too(
        self, server: FakeServer, command: str
    ) -> None:
        assert lines(run(server, command, "m"))[-1][0] == "m"
        assert server.requests[0].model == "models/m"
