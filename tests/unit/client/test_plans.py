"""Device plans in the client: their values, their written form, and the calls about them."""

from __future__ import annotations

import json
import threading
import tomllib
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from tests.support.fake_api import FakeServer, Handler, refuse

from modelyard import errors
from modelyard.admin import UNSET, Admin
from modelyard.devices import ComponentDevice, Device, DeviceMap
from modelyard.placements import AutomaticPlacement, Placement, PlacementStrategy
from modelyard.plans import (
    MAX_BUDGET_BYTES,
    DeviceForecast,
    DevicePlan,
    DeviceSetting,
    Displacement,
    ModelForecast,
    ModelPlacement,
    Move,
    Obstacle,
    PlanReport,
    Rebalanced,
)
from modelyard.resources import DeviceCharge, ModelOwner, PlacedModel, PlacedPart
from modelyard.v1 import (
    device_pb2,
    device_service_pb2,
    model_pb2,
    model_service_pb2,
    plan_pb2,
    residency_pb2,
)

GPU_1 = device_pb2.Device(type=device_pb2.DEVICE_TYPE_GPU, index=1)
CPU = device_pb2.Device(type=device_pb2.DEVICE_TYPE_CPU)
BALANCED = AutomaticPlacement(strategy=PlacementStrategy.BALANCED)
SPLIT = ComponentDevice.from_multiple(DeviceMap({"": Device.cpu(), "encoder": Device.gpu(1)}))


class TestValues:
    @pytest.mark.parametrize("device", ["cuda:1", "cuda-1", "devices/cuda-1"])
    def test_devices_and_models_go_by_any_of_their_names(self, device: str) -> None:
        assert DeviceSetting(device=device).device == "devices/cuda-1"
        assert ModelPlacement(model="m") == ModelPlacement(model="models/m")

    @pytest.mark.parametrize(
        ("make", "error", "text"),
        [
            (lambda: DeviceSetting(device=""), ValueError, "device is empty"),
            (lambda: DeviceSetting(device="cpu", budget_bytes=True), TypeError, "got bool"),
            (lambda: DeviceSetting(device="cpu", budget_bytes=-1), ValueError, "budget_bytes is"),
            (
                lambda: DeviceSetting(device="cpu", budget_bytes=MAX_BUDGET_BYTES + 1),
                ValueError,
                "0 to",
            ),
            (lambda: DeviceSetting(device="cpu", budget_percent=0), ValueError, "above 0"),
            (lambda: DeviceSetting(device="cpu", budget_percent=101), ValueError, "at most 100"),
            (
                lambda: DeviceSetting(device="cpu", budget_percent=float("nan")),
                ValueError,
                "at most 100",
            ),
            (lambda: DeviceSetting(device="cpu", budget_percent="5"), TypeError, "a number"),  # type: ignore[arg-type]  # refused
            (
                lambda: DeviceSetting(device="cpu", budget_percent=5, budget_bytes=5),
                ValueError,
                "not both",
            ),
            (lambda: DeviceSetting(device="cpu", drained=1), TypeError, "must be a bool"),  # type: ignore[arg-type]  # refused
            (lambda: ModelPlacement(model="models/"), ValueError, "model is empty"),
            (lambda: ModelPlacement(model="m", placement="cpu"), TypeError, "read_placement"),  # type: ignore[arg-type]  # refused
            (lambda: DevicePlan(devices=("cpu",)), TypeError, "must hold DeviceSetting"),  # type: ignore[arg-type]  # refused
            (lambda: DevicePlan(models=("m",)), TypeError, "must hold ModelPlacement"),  # type: ignore[arg-type]  # refused
            (
                lambda: DevicePlan(
                    devices=(DeviceSetting(device="cuda:1"), DeviceSetting(device="cuda-1"))
                ),
                ValueError,
                "devices/cuda-1 is named twice",
            ),
            (
                lambda: DevicePlan(models=(ModelPlacement(model="m"), ModelPlacement(model="m"))),
                ValueError,
                "models/m is named twice",
            ),
            (lambda: DevicePlan(etag=None), TypeError, "etag must be a str"),  # type: ignore[arg-type]  # refused
        ],
    )
    def test_what_a_plan_cannot_say_is_refused(
        self, make: Any, error: type[Exception], text: str
    ) -> None:
        with pytest.raises(error, match=text):
            make()


class TestWrittenForm:
    def test_every_form_of_a_placement_can_be_written(self) -> None:
        plan = DevicePlan.from_dict(
            tomllib.loads("""
                [devices]
                "cuda:0" = { budget = "12GiB" }
                "cuda:1" = { budget = "80%", drained = true }
                cpu = {}
                [models]
                sentiment = "cuda:1"
                chat = { "" = "cpu", encoder = "cuda:1" }
                tiny = "balanced"
                far = { strategy = "sequential", devices = ["cuda:1", "disk"] }
            """)
        )
        assert plan.devices == (
            DeviceSetting(device="cuda:0", budget_bytes=12 * 2**30),
            DeviceSetting(device="cuda:1", budget_percent=80, drained=True),
            DeviceSetting(device="cpu"),
        )
        assert plan.models == (
            ModelPlacement(model="sentiment", placement=ComponentDevice.from_str("cuda:1")),
            ModelPlacement(model="chat", placement=SPLIT),
            ModelPlacement(model="tiny", placement=BALANCED),
            ModelPlacement(
                model="far",
                placement=AutomaticPlacement(
                    strategy=PlacementStrategy.SEQUENTIAL, devices=(Device.gpu(1), Device.disk())
                ),
            ),
        )

    def test_a_plan_in_force_survives_its_written_form(self) -> None:
        plan = DevicePlan(
            devices=(
                DeviceSetting(device="cuda:1", budget_bytes=12 * 2**30 + 1, drained=False),
                DeviceSetting(device="cpu", budget_percent=33.3),
                DeviceSetting(device="disk", budget_bytes=0),
            ),
            models=(
                ModelPlacement(model="a", placement=None),
                ModelPlacement(model="b", placement=SPLIT),
                ModelPlacement(model="c", placement=AutomaticPlacement(devices=(Device.gpu(0),))),
                ModelPlacement(model="d", placement=ComponentDevice.from_multiple(DeviceMap({}))),
                ModelPlacement(
                    model="e",
                    placement=ComponentDevice.from_multiple(
                        DeviceMap({"strategy": Device.cpu(), "type": Device.gpu(0)})
                    ),
                ),
            ),
            etag='"7"',
            revision=7,
            updated_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        )
        assert DevicePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan

    def test_a_change_says_nothing_of_etags(self) -> None:
        assert DevicePlan().to_dict() == {"devices": {}, "models": {}}

    @pytest.mark.parametrize(
        ("data", "error", "text"),
        [
            ([], TypeError, "the plan must be a table, got list"),
            ({"device": {}}, ValueError, "unknown field 'device' in the plan: .* devices, models"),
            ({"devices": []}, TypeError, "devices must be a table"),
            ({1: {}}, TypeError, "keys of the plan must be text"),
            ({"devices": {"cpu": "1GiB"}}, TypeError, r"devices\['cpu'\] must be a table"),
            (
                {"devices": {"cpu": {"bugdet": "1GiB"}}},
                ValueError,
                r"unknown field 'bugdet' in devices\['cpu'\]: there may be budget, drained",
            ),
            ({"devices": {"cpu": {"budget": "1"}}}, ValueError, r"devices\['cpu'\]: '1' has no u"),
            ({"devices": {"cpu": {"budget": "-1B"}}}, ValueError, "is no size"),
            ({"devices": {"cpu": {"budget": "101%"}}}, ValueError, "at most 100"),
            ({"devices": {"cpu": {"budget": "0%"}}}, ValueError, "above 0"),
            ({"devices": {"cpu": {"budget": 5}}}, TypeError, "budget must be text such as"),
            ({"devices": {"cpu": {"drained": "yes"}}}, TypeError, "drained must be a bool"),
            ({"models": {"m": "gpu"}}, ValueError, r"models\['m'\]: Unknown device type"),
            ({"models": {"m": 5}}, TypeError, r"models\['m'\]: placement must be text"),
            (
                {"models": {"m": {"type": "single"}}},
                ValueError,
                r"models\['m'\]: .*'device' is m",
            ),
            ({"models": {"": "cpu"}}, ValueError, r"models\[''\]: model is empty"),
            ({"devices": {"cuda:1": {}, "cuda-1": {}}}, ValueError, "named twice"),
            ({"updated_at": "soon"}, ValueError, "updated_at: "),
            ({"etag": 1}, TypeError, "etag must be a str"),
        ],
    )
    def test_a_mistake_in_a_file_is_refused_with_its_place(
        self, data: Any, error: type[Exception], text: str
    ) -> None:
        with pytest.raises(error, match=text):
            DevicePlan.from_dict(data)


REPORT = plan_pb2.PlanReport(
    models=[
        plan_pb2.ModelForecast(
            model="models/m",
            alternatives=[
                plan_pb2.PlacedModel(
                    parts=[
                        plan_pb2.PlacedPart(device="devices/cpu", prefixes=["a", "b"], size_bytes=3)
                    ]
                )
            ],
            placement_changed=True,
            current=[residency_pb2.DeviceCharge(device="devices/cuda-1", size_bytes=2)],
            planned=[residency_pb2.DeviceCharge(device="devices/cpu", size_bytes=3)],
            staged=True,
        )
    ],
    displaced=[
        plan_pb2.Displacement(
            model="models/n",
            charges=[residency_pb2.DeviceCharge(device="devices/cpu", size_bytes=1)],
            cause="models/m",
            in_use=True,
        )
    ],
    obstacles=[
        plan_pb2.Obstacle(
            subject="models/o",
            reason="MODEL_NEVER_FITS",
            description="no",
            needed_bytes=9,
            available_bytes=5,
        )
    ],
    devices=[
        plan_pb2.DeviceForecast(device="devices/cpu", budget_bytes=5, used_bytes=3, drained=True)
    ],
)
REPORT_VALUE = PlanReport(
    models=(
        ModelForecast(
            model="models/m",
            alternatives=(
                PlacedModel(
                    parts=(PlacedPart(device="devices/cpu", prefixes=("a", "b"), size_bytes=3),)
                ),
            ),
            placement_changed=True,
            current=(DeviceCharge(device="devices/cuda-1", size_bytes=2),),
            planned=(DeviceCharge(device="devices/cpu", size_bytes=3),),
            staged=True,
        ),
    ),
    displaced=(
        Displacement(
            model="models/n",
            charges=(DeviceCharge(device="devices/cpu", size_bytes=1),),
            cause="models/m",
            in_use=True,
        ),
    ),
    obstacles=(
        Obstacle(
            subject="models/o",
            reason="MODEL_NEVER_FITS",
            description="no",
            needed_bytes=9,
            available_bytes=5,
        ),
    ),
    devices=(DeviceForecast(device="devices/cpu", budget_bytes=5, used_bytes=3, drained=True),),
)


class TestPlanCalls:
    def test_the_plan_in_force_is_told_whole(self, server: FakeServer, admin: Admin) -> None:
        message = plan_pb2.DevicePlan(
            devices=[
                plan_pb2.DeviceSetting(device="devices/cpu", budget_bytes=0, drained=False),
                plan_pb2.DeviceSetting(device="devices/cuda-1"),
            ],
            models=[
                plan_pb2.ModelPlacement(model="models/a"),
                plan_pb2.ModelPlacement(
                    model="models/b", placement=device_pb2.ComponentDevice(single=GPU_1)
                ),
            ],
            etag='"3"',
            revision=3,
            update_time=Timestamp(seconds=1_700_000_000),
        )
        server.reply("GetPlan", device_service_pb2.GetPlanResponse(plan=message))
        assert admin.get_plan() == DevicePlan(
            devices=(
                DeviceSetting(device="cpu", budget_bytes=0, drained=False),
                DeviceSetting(device="cuda:1"),
            ),
            models=(
                ModelPlacement(model="a"),
                ModelPlacement(model="b", placement=ComponentDevice.from_str("cuda:1")),
            ),
            etag='"3"',
            revision=3,
            updated_at=datetime.fromtimestamp(1_700_000_000, UTC),
        )

    def test_what_a_change_does_not_name_is_left_unset(
        self, server: FakeServer, admin: Admin
    ) -> None:
        server.reply("PlanDevices", device_service_pb2.PlanDevicesResponse(report=REPORT))
        change = DevicePlan(
            devices=(
                DeviceSetting(device="cpu", budget_bytes=0),
                DeviceSetting(device="cuda:1", budget_percent=50, drained=False),
            ),
            models=(ModelPlacement(model="a"), ModelPlacement(model="b", placement=SPLIT)),
        )
        assert admin.plan_devices(change) == REPORT_VALUE
        split = device_pb2.DeviceMap(devices={"": CPU, "encoder": GPU_1})
        assert server.requests == [
            device_service_pb2.PlanDevicesRequest(
                plan=plan_pb2.DevicePlan(
                    devices=[
                        plan_pb2.DeviceSetting(device="devices/cpu", budget_bytes=0),
                        plan_pb2.DeviceSetting(
                            device="devices/cuda-1", budget_percent=50, drained=False
                        ),
                    ],
                    models=[
                        plan_pb2.ModelPlacement(model="models/a"),
                        plan_pb2.ModelPlacement(
                            model="models/b",
                            placement=device_pb2.ComponentDevice(multiple=split),
                        ),
                    ],
                )
            )
        ]
        assert server.requests[0].plan.models[0].WhichOneof("where") is None

    @pytest.mark.parametrize(
        ("of_plan", "given", "sent"),
        [("", None, ""), ('"1"', None, '"1"'), ('"1"', '"2"', '"2"'), ('"1"', "", "")],
    )
    def test_a_plan_is_applied_under_its_etag_or_the_one_given(
        self, server: FakeServer, admin: Admin, of_plan: str, given: str | None, sent: str
    ) -> None:
        answer = device_service_pb2.ApplyPlanResponse(
            plan=plan_pb2.DevicePlan(etag='"9"', revision=9), report=REPORT
        )
        server.reply("ApplyPlan", answer)
        applied = admin.apply_plan(DevicePlan(etag=of_plan, revision=8), etag=given)
        assert applied.report == REPORT_VALUE
        assert applied.plan == DevicePlan(etag='"9"', revision=9)
        assert server.requests[0].plan == plan_pb2.DevicePlan(etag=sent)
        assert not server.requests[0].validate_only

    def test_a_plan_is_a_plan(self, server: FakeServer, admin: Admin) -> None:
        plan: Any = {"devices": {}}
        with pytest.raises(TypeError, match=r"DevicePlan\.from_dict makes one"):
            admin.apply_plan(plan)
        with pytest.raises(TypeError, match="etag must be a str"):
            admin.apply_plan(DevicePlan(), etag=7)  # type: ignore[arg-type]  # refused
        assert server.requests == []

    def test_a_plan_that_breaks_a_rule_is_the_server_s_error(
        self, server: FakeServer, admin: Admin
    ) -> None:
        twice = [plan_pb2.DeviceSetting(device="devices/cpu")] * 2
        server.reply(
            "GetPlan",
            device_service_pb2.GetPlanResponse(plan=plan_pb2.DevicePlan(devices=twice)),
        )
        with pytest.raises(errors.ServerError, match="named twice"):
            admin.get_plan()

    def test_drained_devices_tell_who_stays(self, server: FakeServer, admin: Admin) -> None:
        device = device_pb2.ManagedDevice(name="devices/cuda-1", device=GPU_1, drained=True)
        server.reply(
            "DrainDevice",
            device_service_pb2.DrainDeviceResponse(device=device, pinned_models=["models/p"]),
        )
        server.reply("UndrainDevice", device_service_pb2.UndrainDeviceResponse(device=device))
        drained = admin.drain_device("cuda:1", etag='"1"')
        assert drained.device.drained and drained.pinned_models == ("models/p",)
        assert admin.undrain_device(Device.gpu(1)).name == "devices/cuda-1"
        names = [(request.name, request.etag) for request in server.requests]
        assert names == [("devices/cuda-1", '"1"'), ("devices/cuda-1", "")]

    def test_evening_out_tells_what_moved(self, server: FakeServer, admin: Admin) -> None:
        response = device_service_pb2.RebalanceDevicesResponse(
            moves=[
                device_service_pb2.Move(
                    model="models/m",
                    source=[residency_pb2.DeviceCharge(device="devices/cpu", size_bytes=1)],
                    destination=[residency_pb2.DeviceCharge(device="devices/cuda-1", size_bytes=2)],
                )
            ],
            devices=REPORT.devices,
        )
        server.reply("RebalanceDevices", response)
        assert admin.rebalance_devices(validate_only=True) == Rebalanced(
            moves=(
                Move(
                    model="models/m",
                    source=(DeviceCharge(device="devices/cpu", size_bytes=1),),
                    destination=(DeviceCharge(device="devices/cuda-1", size_bytes=2),),
                ),
            ),
            devices=REPORT_VALUE.devices,
        )
        assert server.requests[0].validate_only


class TestModels:
    @pytest.mark.parametrize(
        ("given", "path", "sent"),
        [
            ("cuda:1", "placement", device_pb2.ComponentDevice(single=GPU_1)),
            (None, "placement", None),
            ({"": "cuda:1"}, "placement", None),
            ("balanced", "automatic_placement", None),
            (BALANCED, "automatic_placement", None),
        ],
    )
    def test_a_placement_is_changed_by_any_form_of_it(
        self, server: FakeServer, admin: Admin, given: Any, path: str, sent: Any
    ) -> None:
        server.reply("UpdateModel", model_service_pb2.UpdateModelResponse())
        admin.update_model("m", placement=given)
        request = server.requests[0]
        assert list(request.update_mask.paths) == [path]
        assert request.model.WhichOneof("where") == (None if given is None else path)
        if sent is not None:
            assert request.model.placement == sent

    def test_only_what_is_given_is_changed(self, server: FakeServer, admin: Admin) -> None:
        server.reply("UpdateModel", model_service_pb2.UpdateModelResponse())
        admin.update_model("m", task="t", etag='"1"', validate_only=True)
        admin.update_model("models/m", keys=[], options=None, root=None, folder=None)
        admin.update_model(
            "m", keys=["k"], options={"n": 1}, root="r", folder="f", runtime="torch", task=UNSET
        )
        first, second, third = server.requests
        assert first.model == model_pb2.Model(name="models/m", task="t", etag='"1"')
        assert list(first.update_mask.paths) == ["task"] and first.validate_only
        assert second.model == model_pb2.Model(name="models/m")
        assert list(second.update_mask.paths) == ["keys", "source", "options"]
        assert list(third.update_mask.paths) == ["keys", "source", "runtime", "options"]
        assert dict(third.model.options) == {"n": 1}
        assert third.model.source == model_pb2.ModelSource(root="r", folder="f")

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({}, ValueError, "nothing to change"),
            ({"etag": '"1"'}, ValueError, "nothing to change"),
            ({"root": "r"}, ValueError, "root and folder go together"),
            ({"root": "r", "folder": None}, ValueError, "root and folder go together"),
            ({"keys": "abc"}, TypeError, r"write \[key\]"),
            ({"placement": 7}, TypeError, "placement must be text"),
            ({"task": "t", "etag": 7}, TypeError, "etag must be a str"),
            ({"task": "t", "request_id": 7}, TypeError, "request_id must be a str"),
            ({"task": "t", "request_id": ""}, ValueError, "1 to 128 printable"),
            ({"task": "t", "request_id": "x" * 129}, ValueError, "1 to 128 printable"),
            ({"task": "t", "request_id": "ü"}, ValueError, "1 to 128 printable"),
        ],
    )
    def test_wrong_changes_are_refused_before_sending(
        self,
        server: FakeServer,
        admin: Admin,
        arguments: Any,
        error: type[Exception],
        text: str,
    ) -> None:
        with pytest.raises(error, match=text):
            admin.update_model("m", **arguments)
        assert server.requests == []

    def test_a_model_tells_who_owns_it_and_where_it_may_be(
        self, server: FakeServer, admin: Admin
    ) -> None:
        message = model_pb2.Model(
            name="models/m",
            owner=model_pb2.MODEL_OWNER_CONFIG,
            placed_by_plan=True,
            pinned=True,
            alternatives=REPORT.models[0].alternatives,
            warnings=["device_map beats the placement"],
        )
        server.reply("GetModel", model_service_pb2.GetModelResponse(model=message))
        model = admin.get_model("m")
        assert (model.owner, model.placed_by_plan, model.pinned) == (ModelOwner.CONFIG, True, True)
        assert model.alternatives == REPORT_VALUE.models[0].alternatives
        assert model.alternatives[0].size_bytes == 3
        assert model.warnings == ("device_map beats the placement",)

    @pytest.mark.parametrize(
        ("message", "placement"),
        [
            (device_pb2.AutomaticPlacement(), AutomaticPlacement()),
            (
                device_pb2.AutomaticPlacement(
                    strategy=device_pb2.PLACEMENT_STRATEGY_SEQUENTIAL, devices=[GPU_1, CPU]
                ),
                AutomaticPlacement(
                    strategy=PlacementStrategy.SEQUENTIAL, devices=(Device.gpu(1), Device.cpu())
                ),
            ),
            # What a newer server may say.
            (device_pb2.AutomaticPlacement(strategy=99), None),  # type: ignore[arg-type]  # newer
            (device_pb2.AutomaticPlacement(devices=[device_pb2.Device(type=99)]), None),  # type: ignore[arg-type]  # newer
        ],
    )
    def test_automatic_placements_are_read(
        self, server: FakeServer, admin: Admin, message: Any, placement: Placement | None
    ) -> None:
        model = model_pb2.Model(automatic_placement=message, owner=99)  # type: ignore[arg-type]  # newer
        server.reply("GetModel", model_service_pb2.GetModelResponse(model=model))
        answer = admin.get_model("m")
        assert answer.placement == placement and answer.owner is ModelOwner.UNKNOWN


CHANGES = [
    ("CreateModel", lambda admin, **rest: admin.create_model("m", runtime="identity", **rest)),
    ("UpdateModel", lambda admin, **rest: admin.update_model("m", task="t", **rest)),
    ("DeleteModel", lambda admin, **rest: admin.delete_model("m", **rest)),
    ("UpdateBudget", lambda admin, **rest: admin.update_budget("cpu", 1, **rest)),
    ("DrainDevice", lambda admin, **rest: admin.drain_device("cpu", **rest)),
    ("UndrainDevice", lambda admin, **rest: admin.undrain_device("cpu", **rest)),
    ("ApplyPlan", lambda admin, **rest: admin.apply_plan(DevicePlan(), **rest)),
]


def responding(rpc: str) -> Handler:
    service = model_service_pb2 if rpc.endswith("Model") else device_service_pb2
    return lambda request, context: getattr(service, f"{rpc}Response")()


def broken(request: Any, context: grpc.ServicerContext) -> Any:
    """End a call as a connection that breaks does: without a reason of the contract."""
    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")


@pytest.mark.parametrize(("rpc", "call"), CHANGES)
class TestRequestIds:
    def test_each_change_has_an_id_of_its_own(
        self, server: FakeServer, admin: Admin, rpc: str, call: Any
    ) -> None:
        server.answer(rpc, responding(rpc))
        call(admin)
        call(admin)
        call(admin, request_id="mine")
        ids = [request.request_id for request in server.requests]
        assert len(set(ids)) == 3 and all(ids) and ids[2] == "mine"

    def test_a_change_is_repeated_once_under_the_same_id_if_the_connection_breaks(
        self, server: FakeServer, admin: Admin, rpc: str, call: Any
    ) -> None:
        server.answer(
            rpc,
            lambda request, context: (broken if len(server.requests) < 2 else responding(rpc))(
                request, context
            ),
        )
        call(admin)
        first, second = server.requests
        assert first == second and first.request_id

    def test_a_second_break_is_the_caller_s(
        self, server: FakeServer, admin: Admin, rpc: str, call: Any
    ) -> None:
        server.answer(rpc, broken)
        with pytest.raises(errors.ServerUnavailable):
            call(admin)
        assert len(server.requests) == 2

    def test_a_refusal_is_not_repeated(
        self, server: FakeServer, admin: Admin, rpc: str, call: Any
    ) -> None:
        server.answer(
            rpc,
            refuse(
                grpc.StatusCode.UNAVAILABLE, "CATALOG_UNAVAILABLE", retry_after=Duration(seconds=2)
            ),
        )
        with pytest.raises(errors.CatalogUnavailable) as caught:
            call(admin)
        assert caught.value.retry_after_s == 2 and len(server.requests) == 1


class TestRepetition:
    def test_there_is_none_when_time_is_over(self, server: FakeServer, admin: Admin) -> None:
        server.answer("DeleteModel", broken)
        with pytest.raises(errors.ServerUnavailable):
            admin.delete_model("m", timeout_s=0.2)
        assert len(server.requests) == 1

    def test_it_ends_with_the_deadline_of_the_call(self, server: FakeServer, admin: Admin) -> None:
        gone = threading.Event()

        def handler(request: Any, context: grpc.ServicerContext) -> Any:
            if len(server.requests) == 1:
                return broken(request, context)
            assert context.add_callback(gone.set)
            gone.wait(30)
            return model_service_pb2.DeleteModelResponse()

        server.answer("DeleteModel", handler)
        with pytest.raises(errors.DeadlineExceeded):
            admin.delete_model("m", timeout_s=1)
        assert len(server.requests) == 2
        gone.set()

    def test_trying_without_changing_takes_no_id(self, server: FakeServer, admin: Admin) -> None:
        server.answer("ApplyPlan", responding("ApplyPlan"))
        admin.apply_plan(DevicePlan(), validate_only=True)
        admin.apply_plan(DevicePlan(), validate_only=True, request_id="mine")
        assert [request.request_id for request in server.requests] == ["", "mine"]
        assert all(request.validate_only for request in server.requests)

    def test_config_owned_records_have_their_error(self, server: FakeServer, admin: Admin) -> None:
        server.answer("DeleteModel", refuse(grpc.StatusCode.FAILED_PRECONDITION, "CONFIG_OWNED"))
        with pytest.raises(errors.ConfigOwned, match="CONFIG_OWNED"):
            admin.delete_model("m")
