"""Admin: models, and the lists of models, devices and residencies."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from tests.support.fake_api import FakeServer, Handler

from modelyard import errors
from modelyard.admin import Admin
from modelyard.devices import ComponentDevice, Device, DeviceMap
from modelyard.v1 import (
    device_pb2,
    device_service_pb2,
    model_pb2,
    model_service_pb2,
    residency_pb2,
    residency_service_pb2,
)

MODEL = model_pb2.Model(
    name="models/m",
    keys=["a", "b"],
    source=model_pb2.ModelSource(root="main", folder="team/m"),
    runtime="transformers",
    task="text-classification",
    placement=device_pb2.ComponentDevice(
        single=device_pb2.Device(type=device_pb2.DEVICE_TYPE_GPU, index=1)
    ),
    estimated_bytes=1000,
    create_time=Timestamp(seconds=1_700_000_000),
    etag='"1"',
)


class TestModels:
    def test_a_model_is_registered_as_described(self, server: FakeServer, admin: Admin) -> None:
        answer = model_pb2.Model()
        answer.CopyFrom(MODEL)
        answer.options.update({"threads": 2, "deep": {"list": [1.5, None, True, "s"]}})
        server.answer(
            "CreateModel",
            lambda request, context: model_service_pb2.CreateModelResponse(model=answer),
        )
        model = admin.create_model(
            "m",
            root="main",
            folder="team/m",
            runtime="transformers",
            task="text-classification",
            keys=["a", "b"],
            options={"threads": 2},
            placement="cuda:1",
            validate_only=True,
        )

        sent = server.requests[0]
        assert sent.model_id == "m" and sent.validate_only
        assert (sent.model.source.root, sent.model.source.folder) == ("main", "team/m")
        assert list(sent.model.keys) == ["a", "b"]
        assert dict(sent.model.options) == {"threads": 2}
        assert sent.model.placement == MODEL.placement
        assert not sent.model.name

        assert (model.name, model.id, model.keys) == ("models/m", "m", ("a", "b"))
        assert (model.root, model.folder) == ("main", "team/m")
        assert model.options == {"threads": 2, "deep": {"list": [1.5, None, True, "s"]}}
        assert model.placement == ComponentDevice.from_str("cuda:1")
        assert model.created_at == datetime.fromtimestamp(1_700_000_000, UTC)
        assert (model.estimated_bytes, model.etag) == (1000, '"1"')

    def test_what_is_left_out_is_left_unset(self, server: FakeServer, admin: Admin) -> None:
        server.answer(
            "CreateModel",
            lambda request, context: model_service_pb2.CreateModelResponse(
                model=model_pb2.Model(name="models/i", runtime="identity")
            ),
        )
        model = admin.create_model("i", runtime="identity")
        sent = server.requests[0].model
        fields = [descriptor.name for descriptor, _ in sent.ListFields()]
        assert fields == ["runtime"]
        assert (model.root, model.folder, model.placement, model.created_at) == (None,) * 4
        assert model.options == {}

    @pytest.mark.parametrize(
        ("placement", "text"),
        [
            ("cpu", "cpu"),
            (Device.gpu(0), "cuda:0"),
            (ComponentDevice.from_single(Device.xpu()), "xpu"),
            (DeviceMap({"encoder": Device.gpu(1), "": Device.cpu()}), None),
            (
                ComponentDevice.from_multiple(
                    DeviceMap({"encoder": Device.gpu(1), "lm_head": Device.disk()})
                ),
                None,
            ),
        ],
    )
    def test_a_placement_comes_back_as_it_was(
        self, server: FakeServer, admin: Admin, placement: Any, text: str | None
    ) -> None:
        server.answer(
            "CreateModel",
            lambda request, context: model_service_pb2.CreateModelResponse(model=request.model),
        )
        model = admin.create_model("m", runtime="identity", placement=placement)
        if text is not None:
            assert model.placement == ComponentDevice.from_str(text)
        elif isinstance(placement, DeviceMap):
            assert model.placement == ComponentDevice.from_multiple(placement)
        else:
            assert model.placement == placement

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({"model": 1}, TypeError, "model must be a str"),
            ({"keys": "abc"}, TypeError, r"write \[key\]"),
            ({"root": "main"}, ValueError, "root and folder go together"),
            ({"folder": "m"}, ValueError, "root and folder go together"),
            ({"options": {"a": {1}}}, TypeError, r"options\['a'\] is a set"),
            ({"placement": 0}, TypeError, "placement must be text, a table, Device"),
            ({"placement": "gpu"}, ValueError, "Unknown device type"),
            ({"placement": "disk"}, ValueError, "only be used as a part of device maps"),
            ({"timeout_s": 0}, ValueError, "above 0"),
        ],
    )
    def test_wrong_models_are_refused_before_sending(
        self,
        server: FakeServer,
        admin: Admin,
        arguments: Any,
        error: type[Exception],
        text: str,
    ) -> None:
        with pytest.raises(error, match=text):
            admin.create_model(**{"model": "m", "runtime": "identity", **arguments})
        assert server.requests == []

    @pytest.mark.parametrize("model", ["m", "models/m"])
    def test_models_go_by_id_and_by_name(
        self, server: FakeServer, admin: Admin, model: str
    ) -> None:
        server.answer(
            "GetModel", lambda request, context: model_service_pb2.GetModelResponse(model=MODEL)
        )
        server.answer(
            "DeleteModel", lambda request, context: model_service_pb2.DeleteModelResponse()
        )
        assert admin.get_model(model).name == "models/m"
        admin.delete_model(model, etag='"1"')
        admin.delete_model(model)
        assert [request.name for request in server.requests] == ["models/m"] * 3
        assert [request.etag for request in server.requests[1:]] == ['"1"', ""]


class TestLists:
    def test_lists_are_read_to_their_last_page(self, server: FakeServer, admin: Admin) -> None:
        tokens = ["", "t1", "t2"]

        def pages(response: Any, field: str, item: Any) -> Handler:
            def handler(request: Any, context: grpc.ServicerContext) -> Any:
                number = tokens.index(request.page_token)
                answer = response(next_page_token=(*tokens, "")[number + 1])
                # An empty page in the middle is no end.
                getattr(answer, field).extend(
                    [] if number == 1 else [item(name=f"{field}/{number}")]
                )
                return answer

            return handler

        server.answer(
            "ListModels", pages(model_service_pb2.ListModelsResponse, "models", model_pb2.Model)
        )
        server.answer(
            "ListDevices",
            pages(device_service_pb2.ListDevicesResponse, "devices", device_pb2.ManagedDevice),
        )
        server.answer(
            "ListResidencies",
            pages(
                residency_service_pb2.ListResidenciesResponse,
                "residencies",
                residency_pb2.Residency,
            ),
        )
        assert [model.name for model in admin.list_models()] == ["models/0", "models/2"]
        assert [device.name for device in admin.list_devices()] == ["devices/0", "devices/2"]
        names = [residency.name for residency in admin.list_residencies()]
        assert names == ["residencies/0", "residencies/2"]
        assert [request.page_token for request in server.requests] == tokens * 3

    def test_pages_without_end_are_an_error(self, server: FakeServer, admin: Admin) -> None:
        server.answer(
            "ListModels",
            lambda request, context: model_service_pb2.ListModelsResponse(next_page_token="again"),
        )
        with pytest.raises(errors.ServerError, match="page token came twice"):
            admin.list_models()

    def test_the_deadline_of_a_list_is_for_all_of_its_pages(
        self, server: FakeServer, admin: Admin
    ) -> None:
        # Pages without end, each in time: only the deadline of the whole can end this.
        server.answer(
            "ListModels",
            lambda request, context: model_service_pb2.ListModelsResponse(
                next_page_token=str(len(server.requests))
            ),
        )
        with pytest.raises(errors.DeadlineExceeded):
            admin.list_models(timeout_s=0.3)
        assert len(server.requests) > 1
