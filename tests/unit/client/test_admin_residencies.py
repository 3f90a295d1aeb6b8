"""Admin: where models stand, and bringing them in and out."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from tests.support.fake_api import FakeServer

from modelyard.admin import Admin
from modelyard.resources import CopyState, DeviceCharge, LoadFailure, ResidencyState
from modelyard.v1 import (
    device_pb2,
    device_service_pb2,
    model_pb2,
    model_service_pb2,
    residency_pb2,
    residency_service_pb2,
)


class TestResidencies:
    @pytest.mark.parametrize(
        ("rpc", "method"),
        [
            ("LoadModel", "load"),
            ("UnloadModel", "unload"),
            ("PinModel", "pin"),
            ("UnpinModel", "unpin"),
        ],
    )
    def test_a_residency_is_told_whole(
        self, server: FakeServer, admin: Admin, rpc: str, method: str
    ) -> None:
        message = residency_pb2.Residency(
            name="residencies/m",
            model="models/m",
            state=residency_pb2.RESIDENCY_STATE_FAILED,
            charges=[
                residency_pb2.DeviceCharge(device="devices/cpu", size_bytes=7, shared_bytes=3)
            ],
            pinned=True,
            lease_count=1,
            waiting_request_count=2,
            load_count=3,
            load_duration=Duration(nanos=500_000_000),
            failure=residency_pb2.LoadFailure(
                message="truncated",
                transient=True,
                attempt_count=4,
                retry_time=Timestamp(seconds=1_700_000_000),
            ),
            quarantined=[residency_pb2.DeviceCharge(device="devices/cpu", size_bytes=1)],
            copy_state=residency_pb2.COPY_STATE_KEPT,
            copy_bytes=5,
            copy_load_duration=Duration(nanos=12_000_000),
        )
        response = getattr(residency_service_pb2, f"{rpc}Response")
        server.answer(rpc, lambda request, context: response(residency=message))
        residency = getattr(admin, method)("m")
        assert server.requests[0].model == "models/m"
        assert dataclasses.asdict(residency) == {
            "name": "residencies/m",
            "model": "models/m",
            "state": ResidencyState.FAILED,
            "charges": ({"device": "devices/cpu", "size_bytes": 7, "shared_bytes": 3},),
            "pinned": True,
            "lease_count": 1,
            "waiting_request_count": 2,
            "load_count": 3,
            "load_s": 0.5,
            "failure": dataclasses.asdict(
                LoadFailure(
                    message="truncated",
                    transient=True,
                    attempt_count=4,
                    retry_at=datetime.fromtimestamp(1_700_000_000, UTC),
                )
            ),
            "quarantined": (dataclasses.asdict(DeviceCharge(device="devices/cpu", size_bytes=1)),),
            "copy_state": CopyState.KEPT,
            "copy_bytes": 5,
            "copy_load_s": 0.012,
        }

    @pytest.mark.parametrize("state", residency_pb2.ResidencyState.values())
    def test_every_state_has_a_value(self, server: FakeServer, admin: Admin, state: Any) -> None:
        server.answer(
            "LoadModel",
            lambda request, context: residency_service_pb2.LoadModelResponse(
                residency=residency_pb2.Residency(state=state)
            ),
        )
        name = residency_pb2.ResidencyState.Name(state).removeprefix("RESIDENCY_STATE_")
        expected = "UNKNOWN" if name == "UNSPECIFIED" else name
        assert admin.load("m").state is ResidencyState[expected]

    @pytest.mark.parametrize("state", residency_pb2.CopyState.values())
    def test_every_state_of_a_copy_has_a_value(
        self, server: FakeServer, admin: Admin, state: Any
    ) -> None:
        server.answer(
            "LoadModel",
            lambda request, context: residency_service_pb2.LoadModelResponse(
                residency=residency_pb2.Residency(copy_state=state)
            ),
        )
        name = residency_pb2.CopyState.Name(state).removeprefix("COPY_STATE_")
        # A server that is older than the host tier says nothing of copies.
        expected = "NONE" if name == "UNSPECIFIED" else name
        assert admin.load("m").copy_state is CopyState[expected]

    def test_what_a_newer_server_says_is_tolerated(self, server: FakeServer, admin: Admin) -> None:
        newer: Any = 99
        strange = device_pb2.Device(type=newer)
        known = device_pb2.Device(type=device_pb2.DEVICE_TYPE_CPU)
        server.answer(
            "LoadModel",
            lambda request, context: residency_service_pb2.LoadModelResponse(
                residency=residency_pb2.Residency(state=newer, copy_state=newer)
            ),
        )
        assert admin.load("m").copy_state is CopyState.UNKNOWN
        server.answer(
            "GetDevice",
            lambda request, context: device_service_pb2.GetDeviceResponse(
                device=device_pb2.ManagedDevice(device=strange)
            ),
        )
        server.answer(
            "ListModels",
            lambda request, context: model_service_pb2.ListModelsResponse(
                models=[
                    model_pb2.Model(placement=device_pb2.ComponentDevice(single=strange)),
                    model_pb2.Model(
                        placement=device_pb2.ComponentDevice(
                            multiple=device_pb2.DeviceMap(devices={"a": known, "b": strange})
                        )
                    ),
                ]
            ),
        )
        assert admin.load("m").state is ResidencyState.UNKNOWN
        assert admin.get_device("npu").device is None
        assert [model.placement for model in admin.list_models()] == [None, None]

    def test_unload_waits_as_long_as_it_is_told(self, server: FakeServer, admin: Admin) -> None:
        left: list[float] = []

        def handler(request: Any, context: grpc.ServicerContext) -> Any:
            left.append(context.time_remaining())
            return residency_service_pb2.UnloadModelResponse()

        server.answer("UnloadModel", handler)
        admin.unload("m", timeout_s=120)
        assert 100 < left[0] < 130
