"""The commands that talk to a server, against a real one on loopback with made-up answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import typer
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from typer.testing import CliRunner

from modelyard.tensors import Bfloat16, to_tensor
from modelyard.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    device_pb2,
    device_service_pb2,
    device_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    residency_pb2,
    residency_service_pb2,
    residency_service_pb2_grpc,
)
from modelyard_server import cli_client

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


class FakeServer:
    """Answers Predict with `outputs`, everything else with fixed values; keeps the requests."""

    def __init__(self) -> None:
        self.outputs = [to_tensor(["POSITIVE", "NEGATIVE"], "label")]
        self.refusal: status_pb2.Status | None = None
        self.requests: list[Any] = []
        self.address = ""

    def answer(self, request: Any, context: grpc.ServicerContext, response: Any) -> Any:
        self.requests.append(request)
        if self.refusal is not None:
            details = self.refusal.SerializeToString()
            context.set_trailing_metadata((("grpc-status-details-bin", details),))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refusal.message)
        return response


def residencies(server: FakeServer) -> residency_service_pb2_grpc.ResidencyServiceServicer:
    class Fake(residency_service_pb2_grpc.ResidencyServiceServicer):
        def LoadModel(self, request: Any, context: Any) -> Any:  # noqa: N802
            return server.answer(
                request, context, residency_service_pb2.LoadModelResponse(residency=RESIDENCY)
            )

        def UnloadModel(self, request: Any, context: Any) -> Any:  # noqa: N802
            return server.answer(
                request, context, residency_service_pb2.UnloadModelResponse(residency=RESIDENCY)
            )

        def PinModel(self, request: Any, context: Any) -> Any:  # noqa: N802
            return server.answer(
                request, context, residency_service_pb2.PinModelResponse(residency=RESIDENCY)
            )

        def UnpinModel(self, request: Any, context: Any) -> Any:  # noqa: N802
            return server.answer(
                request, context, residency_service_pb2.UnpinModelResponse(residency=RESIDENCY)
            )

        def ListResidencies(self, request: Any, context: Any) -> Any:  # noqa: N802
            return server.answer(
                request,
                context,
                residency_service_pb2.ListResidenciesResponse(residencies=[RESIDENCY]),
            )

    return Fake()


def devices(server: FakeServer) -> device_service_pb2_grpc.DeviceServiceServicer:
    class Fake(device_service_pb2_grpc.DeviceServiceServicer):
        def GetDevice(self, request: Any, context: Any) -> Any:  # noqa: N802
            raise NotImplementedError

        def ListDevices(self, request: Any, context: Any) -> Any:  # noqa: N802
            return server.answer(
                request, context, device_service_pb2.ListDevicesResponse(devices=[CPU])
            )

        def UpdateBudget(self, request: Any, context: Any) -> Any:  # noqa: N802
            return server.answer(
                request, context, device_service_pb2.UpdateBudgetResponse(device=CPU)
            )

    return Fake()


def models(server: FakeServer) -> model_service_pb2_grpc.ModelServiceServicer:
    class Fake(model_service_pb2_grpc.ModelServiceServicer):
        def CreateModel(self, request: Any, context: Any) -> Any:  # noqa: N802
            raise NotImplementedError

        def GetModel(self, request: Any, context: Any) -> Any:  # noqa: N802
            raise NotImplementedError

        def DeleteModel(self, request: Any, context: Any) -> Any:  # noqa: N802
            raise NotImplementedError

        def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802
            placed = device_pb2.ComponentDevice(single=CPU.device)
            return server.answer(
                request,
                context,
                model_service_pb2.ListModelsResponse(
                    models=[
                        model_pb2.Model(name="models/m", runtime="torch", placement=placed),
                        model_pb2.Model(name="models/n", runtime="identity", keys=["a", "b"]),
                    ]
                ),
            )

    return Fake()


def admin(server: FakeServer) -> admin_service_pb2_grpc.AdminServiceServicer:
    class Fake(admin_service_pb2_grpc.AdminServiceServicer):
        def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
            return server.answer(
                request, context, admin_service_pb2.GetServerInfoResponse(version="9.9.9")
            )

        def GetStats(self, request: Any, context: Any) -> Any:  # noqa: N802
            return server.answer(
                request,
                context,
                admin_service_pb2.GetStatsResponse(
                    answered_count=41, error_counts={"QUEUE_FULL": 2}
                ),
            )

    return Fake()


def inference(server: FakeServer) -> inference_service_pb2_grpc.InferenceServiceServicer:
    class Fake(inference_service_pb2_grpc.InferenceServiceServicer):
        def Predict(self, request: Any, context: Any) -> Any:  # noqa: N802
            served = inference_service_pb2.Served(
                model="models/m",
                device="devices/cpu",
                cold=True,
                wait_duration=Duration(seconds=1, nanos=500_000_000),
                load_duration=Duration(nanos=250_000_000),
            )
            return server.answer(
                request,
                context,
                inference_service_pb2.PredictResponse(outputs=server.outputs, served=served),
            )

    return Fake()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    grpc_server = grpc.server(ThreadPoolExecutor(2))
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(inference(fake), grpc_server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(models(fake), grpc_server)
    device_service_pb2_grpc.add_DeviceServiceServicer_to_server(devices(fake), grpc_server)
    residency_service_pb2_grpc.add_ResidencyServiceServicer_to_server(
        residencies(fake), grpc_server
    )
    admin_service_pb2_grpc.add_AdminServiceServicer_to_server(admin(fake), grpc_server)
    fake.address = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
    grpc_server.start()
    yield fake
    grpc_server.stop(None).wait()


def run(server: FakeServer | str, *arguments: str, env: dict[str, str] | None = None) -> Any:
    app = typer.Typer()
    cli_client.register(app)
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
        server.outputs = [to_tensor(["POS", "NEG"], "label"), to_tensor(scores, "score")]
        result = run(server, "predict", "sentiment", "good", "bad")
        table = lines(result)
        assert table[0] == ["input", "label", "score"]
        assert ["good", "POS", "0.987654"] in table and ["bad", "NEG", "0.5"] in table
        assert "m on cpu, cold: waited 1.50s (250.0ms of it loading), ran 0.0ms" in result.stdout
        assert list(server.requests[0].inputs[0].text.values) == ["good", "bad"]

    def test_outputs_without_a_row_per_input_stand_below(self, server: FakeServer) -> None:
        server.outputs = [to_tensor(np.float32(2)), to_tensor(np.zeros((3, 1), np.int8), "x")]
        result = run(server, "predict", "k", "good", "bad")
        assert "output: 2\n" in result.stdout and "x: [[0], [0], [0]]" in result.stdout

    def test_json_has_everything(self, server: FakeServer) -> None:
        server.outputs = [
            to_tensor(["a"], "text"),
            to_tensor(b"\xff", "raw"),
            to_tensor(np.array([[np.nan, 1.5]]), "number"),
            to_tensor(Bfloat16.from_float32(np.ones(1, dtype=np.float32)), "half"),
            to_tensor(np.array([True]), "truth"),
        ]
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
            },
        }

    def test_no_output_drives_the_terminal_or_is_read_as_markup(self, server: FakeServer) -> None:
        server.outputs = [to_tensor(["\x1b[31mred[/]\n[bold]x"], "label")]
        result = run(server, "predict", "k", "[red]in[/red]")
        assert "\x1b" not in result.output
        assert "[31mred[/] [bold]x" in result.stdout and "[red]in[/red]" in result.stdout

    def test_long_cells_are_whole_in_a_pipe(self, server: FakeServer) -> None:
        server.outputs = [to_tensor(["word " * 60], "label")]
        result = run(server, "predict", "k", "x")
        assert ("word " * 60).strip() in result.stdout


class TestListings:
    def test_models(self, server: FakeServer) -> None:
        table = lines(run(server, "models"))
        assert ["m", "torch", '{"type":', '"single",', '"device":', '"cpu"}', "0B"] in table
        assert ["n", "a,", "b", "identity", "automatic", "0B"] in table

    def test_devices(self, server: FakeServer) -> None:
        assert lines(run(server, "devices"))[-1][:3] == ["cpu", "1GiB", "0B"]

    def test_residency(self, server: FakeServer) -> None:
        table = lines(run(server, "residency"))
        assert table[-1] == ["m", "resident", "cpu", "286.1MiB", "pinned", "2", "0", "0"]

    def test_stats(self, server: FakeServer) -> None:
        table = lines(run(server, "stats"))
        assert ["version", "9.9.9"] in table and ["answered", "41"] in table
        assert ["refused", "or", "failed", "QUEUE_FULL", "2"] in table

    @pytest.mark.parametrize(
        ("command", "path", "value"),
        [
            ("models", [0, "name"], "models/m"),
            ("models", [0, "placement"], {"type": "single", "device": "cpu"}),
            ("models", [1, "keys"], ["a", "b"]),
            ("devices", [0, "budget_bytes"], 2**30),
            ("devices", [0, "device"], "cpu"),
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
        server.refusal = status_pb2.Status(code=9, message="too large\nby far")
        for detail in (
            error_details_pb2.ErrorInfo(reason="MODEL_NEVER_FITS", domain="modelyard"),
            error_details_pb2.PreconditionFailure(
                violations=[{"subject": "devices/cpu", "description": "needs 9, has 5"}]
            ),
        ):
            packed = AnyMessage()
            packed.Pack(detail)
            server.refusal.details.append(packed)
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
