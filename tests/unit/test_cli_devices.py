"""`modelyard devices`, against a real server on loopback with made-up answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.support.fake_api import FakeServer, refuse, serving
from typer.testing import CliRunner

from modelyard.v1 import (
    admin_service_pb2,
    device_pb2,
    device_service_pb2,
    event_pb2,
    plan_pb2,
    residency_pb2,
    residency_service_pb2,
)
from modelyard_server.cli import plans as plan_commands
from modelyard_server.cli.main import app
from modelyard_server.cli.printing import print_line

GPU_1 = device_pb2.Device(type=device_pb2.DEVICE_TYPE_GPU, index=1)
GPU = device_pb2.ManagedDevice(
    name="devices/cuda-1", device=GPU_1, budget_bytes=2**30, logical=True, drained=True
)
CPU = device_pb2.ManagedDevice(
    name="devices/cpu",
    device=device_pb2.Device(type=device_pb2.DEVICE_TYPE_CPU),
    budget_bytes=2**30,
    etag='"1"',
)
PLAN = plan_pb2.DevicePlan(
    devices=[
        plan_pb2.DeviceSetting(device="devices/cuda-1", budget_bytes=2**30, drained=True),
        plan_pb2.DeviceSetting(device="devices/cpu", budget_bytes=2**20, drained=False),
    ],
    models=[
        plan_pb2.ModelPlacement(model="models/a"),
        plan_pb2.ModelPlacement(
            model="models/b", placement=device_pb2.ComponentDevice(single=GPU_1)
        ),
    ],
    etag='"7"',
    revision=7,
)


def charge(device: str, size_bytes: int) -> residency_pb2.DeviceCharge:
    return residency_pb2.DeviceCharge(device=f"devices/{device}", size_bytes=size_bytes)


REPORT = plan_pb2.PlanReport(
    models=[
        plan_pb2.ModelForecast(
            model="models/m",
            alternatives=[
                plan_pb2.PlacedModel(
                    parts=[
                        plan_pb2.PlacedPart(
                            device="devices/cuda-1",
                            prefixes=["encoder.0", "encoder.1", "encoder.2", "head"],
                            size_bytes=2**20,
                        ),
                        plan_pb2.PlacedPart(device="devices/cpu", prefixes=[""], size_bytes=1024),
                    ]
                )
            ],
            placement_changed=True,
            current=[charge("cpu", 2**21)],
            planned=[charge("cuda-1", 2**20), charge("cpu", 1024)],
            staged=True,
        )
    ],
    displaced=[
        plan_pb2.Displacement(
            model="models/n", charges=[charge("cuda-1", 2**22)], cause="models/m", in_use=True
        )
    ],
    devices=[
        plan_pb2.DeviceForecast(device="devices/cuda-1", budget_bytes=2**30, used_bytes=2**20)
    ],
)
OBSTACLE = plan_pb2.Obstacle(
    subject="models/o",
    reason="MODEL_NEVER_FITS",
    description="\x1b[31mtoo large",
    needed_bytes=2**31,
    available_bytes=2**30,
)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as fake:
        fake.reply("ListDevices", device_service_pb2.ListDevicesResponse(devices=[GPU, CPU]))
        fake.reply("GetStats", admin_service_pb2.GetStatsResponse())
        fake.reply("GetPlan", device_service_pb2.GetPlanResponse(plan=PLAN))
        fake.reply("PlanDevices", device_service_pb2.PlanDevicesResponse(report=REPORT))
        fake.reply("ApplyPlan", device_service_pb2.ApplyPlanResponse(plan=PLAN, report=REPORT))
        fake.answer("WatchEvents", quiet)
        yield fake


def quiet(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    """A server on which nothing happens."""
    gone = threading.Event()
    yield admin_service_pb2.WatchEventsResponse(epoch="e")
    if context.add_callback(gone.set):
        gone.wait(30)


@pytest.fixture
def plan_file(tmp_path: Path) -> str:
    file = tmp_path / "plan.toml"
    file.write_text(
        '[devices]\n"cuda:1" = { budget = "80%" }\n[models]\nm = "balanced"\n', encoding="utf-8"
    )
    return str(file)


def run(server: FakeServer, *arguments: str, typed: str | None = None) -> Any:
    given = ["devices", *arguments, "--server", server.address]
    return CliRunner().invoke(app, given, input=typed)


def names(server: FakeServer) -> list[str]:
    """Which calls were made, but for the watch, which comes when it comes."""
    found = [type(request).__name__.removesuffix("Request") for request in server.requests]
    return [name for name in found if name != "WatchEvents"]


def lines(result: Any) -> list[list[str]]:
    """The words of each line of a table that went well."""
    assert result.exit_code == 0, result.output
    return [line.split() for line in result.stdout.splitlines() if line.strip()]


class TestList:
    @pytest.mark.parametrize("arguments", [[], ["list"]])
    def test_devices_are_listed_with_or_without_the_word(
        self, server: FakeServer, arguments: list[str]
    ) -> None:
        table = lines(run(server, *arguments))
        assert table[-2][:4] == ["cuda:1", "(logical,", "drained)", "1GiB"]
        assert table[-1][:3] == ["cpu", "1GiB", "0B"]
        (first, second) = json.loads(run(server, *arguments, "--json").stdout)
        assert (first["device"], first["drained"]) == ("cuda:1", True)
        assert second["budget_bytes"] == 2**30

    def test_the_host_tier_stands_below_the_devices(self, server: FakeServer) -> None:
        assert "host tier" not in run(server).stdout
        tier = admin_service_pb2.HostTier(
            budget_bytes=2**30,
            reserved_bytes=2**20,
            resident_bytes=2**21,
            draining_bytes=2**20,
            copy_count=4,
        )
        server.reply("GetStats", admin_service_pb2.GetStatsResponse(host_tier=tier))
        result = run(server)
        assert result.stdout.splitlines()[-1] == "host tier: 4MiB of 1GiB in 4 copies"
        assert len(json.loads(run(server, "--json").stdout)) == 2

    def test_options_that_would_be_lost_are_refused(self, server: FakeServer) -> None:
        result = CliRunner().invoke(app, ["devices", "--server", server.address, "list"])
        assert result.exit_code == 2 and server.requests == []
        assert "write --server behind the command" in result.stderr

    def test_the_environment_is_for_all_of_them(self, server: FakeServer) -> None:
        for arguments in (["devices"], ["devices", "list"]):
            result = CliRunner().invoke(app, arguments, env={"MODELYARD_SERVER": server.address})
            assert result.exit_code == 0


class TestPlan:
    def test_without_a_file_the_plan_in_force_is_printed(self, server: FakeServer) -> None:
        table = lines(run(server, "plan"))
        assert ["cuda:1", "1GiB", "drained"] in table and ["cpu", "1MiB"] in table
        assert ["a", "auto"] in table and ["b", "cuda:1"] in table
        assert table[-1] == ["revision", "7,", "etag", '"7"']

    def test_the_plan_in_force_can_be_saved_and_applied_again(
        self, server: FakeServer, tmp_path: Path
    ) -> None:
        file = tmp_path / "plan.json"
        file.write_text(run(server, "plan", "--json").stdout, encoding="utf-8")
        assert run(server, "apply", str(file), "--yes").exit_code == 0
        applied = next(
            request
            for request in server.requests
            if isinstance(request, device_service_pb2.ApplyPlanRequest)
        )
        expected = plan_pb2.DevicePlan()
        expected.CopyFrom(PLAN)
        expected.revision = 0
        assert applied.plan == expected

    def test_a_plan_is_tried_and_what_it_does_is_told(
        self, server: FakeServer, plan_file: str
    ) -> None:
        result = run(server, "plan", plan_file)
        table = lines(result)
        assert names(server) == ["PlanDevices"]
        setting = server.requests[0].plan.devices[0]
        assert (setting.device, setting.budget_percent) == ("devices/cuda-1", 80)
        assert server.requests[0].plan.models[0].WhichOneof("where") == "automatic_placement"
        placed = "cuda:1 1MiB (encoder.0, encoder.1, encoder.2 and 1 more) + cpu 1KiB"
        assert placed in result.stdout
        assert "loaded before the old one leaves" in result.stdout
        assert ["n", "cuda:1", "4MiB", "m", "when", "its", "requests", "end"] in table
        assert table[-1] == ["cuda:1", "1GiB", "1MiB"]

    def test_obstacles_are_exit_code_1(self, server: FakeServer, plan_file: str) -> None:
        server.reply(
            "PlanDevices",
            device_service_pb2.PlanDevicesResponse(
                report=plan_pb2.PlanReport(obstacles=[OBSTACLE])
            ),
        )
        result = run(server, "plan", plan_file)
        assert result.exit_code == 1 and "\x1b" not in result.output
        assert "MODEL_NEVER_FITS" in result.stdout and "[31mtoo large" in result.stdout
        assert "the plan cannot be applied" in result.stdout
        result = run(server, "plan", plan_file, "--json")
        assert result.exit_code == 1
        assert json.loads(result.stdout)["obstacles"][0]["needed_bytes"] == 2**31

    @pytest.mark.parametrize(
        "text", ['{"devices": {"cpu": {"drained": false}}}', "[devices.cpu]\ndrained = false\n"]
    )
    def test_a_plan_can_come_from_standard_input(self, server: FakeServer, text: str) -> None:
        assert run(server, "plan", "-", typed=text).exit_code == 0
        (setting,) = server.requests[0].plan.devices
        assert setting.device == "devices/cpu" and setting.HasField("drained")

    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [
            ("plan.toml", "[devices", "plan.toml: "),
            ("plan.json", "{", "plan.json: "),
            ("plan.json", "[" * 100_000, "plan.json: "),
            ("plan.json", '{"models": {}, "models": {}}', "'models' is there twice"),
            ("plan.toml", "[device]\n", "unknown field 'device' in the plan"),
            ("plan.toml", '[models]\nm = "gpu"\n', "models['m']: Unknown device type"),
            ("plan.toml", '[devices.cpu]\nbudget = "5"\n', "devices['cpu']: '5' has no unit"),
        ],
    )
    def test_a_file_that_is_no_plan_is_exit_code_2(
        self, server: FakeServer, tmp_path: Path, name: str, text: str, said: str
    ) -> None:
        file = tmp_path / name
        file.write_text(text, encoding="utf-8")
        for command in (["plan", str(file)], ["apply", str(file), "--yes"]):
            result = run(server, *command)
            assert result.exit_code == 2 and result.stdout == ""
            assert said in result.stderr and result.stderr.count("\n") == 1
        assert server.requests == []

    def test_a_file_that_is_not_there_is_exit_code_2(
        self, server: FakeServer, tmp_path: Path
    ) -> None:
        result = run(server, "plan", str(tmp_path / "none.toml"))
        assert result.exit_code == 2 and "none.toml: No such file" in result.stderr


class TestApply:
    def test_it_asks_after_the_report_and_applies_what_it_asked_about(
        self, server: FakeServer, plan_file: str
    ) -> None:
        result = run(server, "apply", plan_file, typed="y\n")
        assert result.exit_code == 0, result.output
        assert names(server) == ["GetPlan", "PlanDevices", "ApplyPlan"]
        (applied,) = (r for r in server.requests if isinstance(r, _APPLY))
        assert applied.plan.etag == '"7"' and not applied.validate_only
        assert "Apply this plan?" in result.stdout
        assert 'the plan in force has revision 7, etag "7"' in result.stdout

    def test_no_is_an_answer(self, server: FakeServer, plan_file: str) -> None:
        assert run(server, "apply", plan_file, typed="n\n").exit_code == 1
        assert names(server) == ["GetPlan", "PlanDevices"]

    @pytest.mark.parametrize("extra", [[], ["--etag", '"3"']])
    def test_yes_does_not_ask(self, server: FakeServer, plan_file: str, extra: list[str]) -> None:
        assert run(server, "apply", plan_file, "--yes", *extra).exit_code == 0
        assert names(server) == ["PlanDevices", "ApplyPlan"]
        (applied,) = (r for r in server.requests if isinstance(r, _APPLY))
        assert applied.plan.etag == "".join(extra[1:])

    def test_json_is_the_plan_in_force_and_what_was_done(
        self, server: FakeServer, plan_file: str
    ) -> None:
        answer = json.loads(run(server, "apply", plan_file, "--yes", "--json").stdout)
        assert answer["plan"]["devices"]["cuda:1"] == {"budget": "1GiB", "drained": True}
        assert answer["plan"]["revision"] == 7
        assert answer["report"]["displaced"][0]["model"] == "models/n"

    @pytest.mark.parametrize("arguments", [["PLAN", "--json"], ["-"]])
    def test_where_nobody_can_be_asked_yes_is_needed(
        self, server: FakeServer, plan_file: str, arguments: list[str]
    ) -> None:
        given = [plan_file if argument == "PLAN" else argument for argument in arguments]
        result = run(server, "apply", *given, typed="{}")
        assert result.exit_code == 2 and "give --yes" in result.stderr
        assert server.requests == []

    def test_a_plan_with_obstacles_is_not_even_sent(
        self, server: FakeServer, plan_file: str
    ) -> None:
        server.reply(
            "PlanDevices",
            device_service_pb2.PlanDevicesResponse(
                report=plan_pb2.PlanReport(obstacles=[OBSTACLE])
            ),
        )
        assert run(server, "apply", plan_file, "--yes").exit_code == 1
        assert names(server) == ["PlanDevices"]

    def test_what_happens_meanwhile_is_told_on_stderr(
        self, server: FakeServer, plan_file: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told = threading.Event()

        def tell(text: str, *, err: bool = False) -> None:
            print_line(text, err=err)
            if "load_started" in text:
                told.set()

        monkeypatch.setattr(plan_commands, "print_line", tell)

        def events(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            gone = threading.Event()
            assert context.add_callback(gone.set)
            yield admin_service_pb2.WatchEventsResponse(
                epoch="e",
                revision=1,
                events=[
                    event_pb2.Event(
                        revision=1, type=event_pb2.EVENT_TYPE_REFUSED, subject="models/other"
                    ),
                    event_pb2.Event(
                        revision=2,
                        type=event_pb2.EVENT_TYPE_LOAD_STARTED,
                        subject="models/m\x1b[31m",
                        cause="operator",
                        size_bytes=2**20,
                    ),
                ],
            )
            gone.wait(30)

        def apply(request: Any, context: grpc.ServicerContext) -> Any:
            assert told.wait(10)
            return device_service_pb2.ApplyPlanResponse(plan=PLAN, report=REPORT)

        server.answer("WatchEvents", events)
        server.answer("ApplyPlan", apply)
        result = run(server, "apply", plan_file, "--yes")
        assert result.exit_code == 0 and "\x1b" not in result.output
        assert "load_started m\N{REPLACEMENT CHARACTER}[31m 1MiB for operator" in result.stderr
        assert "other" not in result.stderr

    def test_a_server_that_tells_no_events_applies_plans_all_the_same(
        self, server: FakeServer, plan_file: str
    ) -> None:
        server.answer("WatchEvents", refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"))
        assert run(server, "apply", plan_file, "--yes").exit_code == 0

    def test_a_refusal_is_one_line_and_exit_code_1(
        self, server: FakeServer, plan_file: str
    ) -> None:
        server.answer("ApplyPlan", refuse(grpc.StatusCode.ABORTED, "ETAG_MISMATCH"))
        result = run(server, "apply", plan_file, "--yes")
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1] == ("error: ETAG_MISMATCH: refused: ETAG_MISMATCH")


_APPLY = device_service_pb2.ApplyPlanRequest


def holding(model: str, *charges: residency_pb2.DeviceCharge, pinned: bool = False) -> Any:
    return residency_pb2.Residency(
        name=f"residencies/{model}", model=f"models/{model}", charges=charges, pinned=pinned
    )


class TestDrain:
    @pytest.fixture(autouse=True)
    def draining(self, server: FakeServer) -> None:
        server.reply(
            "DrainDevice",
            device_service_pb2.DrainDeviceResponse(device=GPU, pinned_models=["models/p"]),
        )
        server.reply("UndrainDevice", device_service_pb2.UndrainDeviceResponse(device=CPU))
        server.reply("GetDevice", device_service_pb2.GetDeviceResponse(device=GPU))

    def test_it_returns_at_once_and_tells_who_stays(self, server: FakeServer) -> None:
        result = run(server, "drain", "cuda:1")
        assert result.exit_code == 0 and names(server) == ["DrainDevice"]
        assert "cuda:1 (logical, drained)" in result.stdout
        assert "pinned, so they stay: p\n" in result.stdout
        answer = json.loads(run(server, "drain", "cuda:1", "--json").stdout)
        assert answer["device"]["drained"] and answer["pinned_models"] == ["models/p"]

    def test_waiting_ends_when_only_pinned_models_are_left(self, server: FakeServer) -> None:
        def changes(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            response = residency_service_pb2.WatchResidenciesResponse
            on_gpu = charge("cuda-1", 5)
            yield response(
                residencies=[holding("p", on_gpu, pinned=True), holding("else", charge("cpu", 5))],
                epoch="e",
                snapshot=True,
            )
            yield response(
                residencies=[holding("a", on_gpu), holding("b", on_gpu), holding("c", on_gpu)],
                epoch="e",
                snapshot=True,
                snapshot_complete=True,
            )
            yield response(residencies=[holding("a")], epoch="e", revision=2)
            yield response(removed=["residencies/b"], epoch="e", revision=3)
            # The model moves, to come back there is no matter of this command.
            yield response(residencies=[holding("c", charge("cpu", 5))], epoch="e", revision=4)
            raise AssertionError("nothing more is asked for")

        server.answer("WatchResidencies", changes)
        result = run(server, "drain", "cuda:1", "--wait")
        assert result.exit_code == 0
        assert result.stderr.splitlines() == [
            "still on cuda:1: a, b, c",
            "still on cuda:1: b, c",
            "still on cuda:1: c",
        ]
        assert names(server) == ["DrainDevice", "WatchResidencies", "GetDevice"]

    def test_waiting_has_an_end(self, server: FakeServer) -> None:
        def unchanging(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            gone = threading.Event()
            assert context.add_callback(gone.set)
            yield residency_service_pb2.WatchResidenciesResponse(
                residencies=[holding("a", charge("cuda-1", 5))],
                epoch="e",
                snapshot=True,
                snapshot_complete=True,
            )
            gone.wait(30)

        server.answer("WatchResidencies", unchanging)
        result = run(server, "drain", "cuda:1", "--wait", "--timeout", "0.5")
        assert result.exit_code == 1 and "lasted the 0.5 seconds" in result.stderr

    def test_undrain(self, server: FakeServer) -> None:
        assert lines(run(server, "undrain", "cpu"))[-1][0] == "cpu"
        assert json.loads(run(server, "undrain", "cpu", "--json").stdout)["etag"] == '"1"'
        assert server.requests[0].name == "devices/cpu"


class TestOthers:
    @pytest.mark.parametrize("dry_run", [False, True])
    def test_rebalance_tells_what_moved(self, server: FakeServer, dry_run: bool) -> None:
        response = device_service_pb2.RebalanceDevicesResponse(
            moves=[
                device_service_pb2.Move(
                    model="models/m",
                    source=[charge("cpu", 1024)],
                    destination=[charge("cuda-1", 2048)],
                )
            ],
            devices=REPORT.devices,
        )
        server.reply("RebalanceDevices", response)
        table = lines(run(server, "rebalance", *["--dry-run"] * dry_run))
        assert ["m", "cpu", "1KiB", "cuda:1", "2KiB"] in table
        assert table[-1] == ["cuda:1", "1GiB", "1MiB"]
        assert server.requests[0].validate_only is dry_run
        answer = json.loads(run(server, "rebalance", "--json").stdout)
        assert answer["moves"][0]["destination"][0]["size_bytes"] == 2048

    def test_even_devices_have_nothing_to_move(self, server: FakeServer) -> None:
        server.reply("RebalanceDevices", device_service_pb2.RebalanceDevicesResponse())
        assert "nothing to move" in run(server, "rebalance").stdout

    def test_budget(self, server: FakeServer) -> None:
        server.reply("UpdateBudget", device_service_pb2.UpdateBudgetResponse(device=CPU))
        assert lines(run(server, "budget", "cuda:1", "1.5GiB"))[-1][0] == "cpu"
        assert server.requests[0].name == "devices/cuda-1"
        assert server.requests[0].budget_bytes == 3 * 2**29
        assert run(server, "budget", "cpu", "5").exit_code == 2
