"""Admin: devices and their budgets."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tests.support.fake_api import FakeServer

from modelyard import errors
from modelyard.admin import Admin
from modelyard.devices import Device
from modelyard.v1 import device_pb2, device_service_pb2


class TestDevices:
    def test_a_device_is_told_whole(self, server: FakeServer, admin: Admin) -> None:
        message = device_pb2.ManagedDevice(
            name="devices/cuda-1",
            device=device_pb2.Device(type=device_pb2.DEVICE_TYPE_GPU, index=1),
            logical=True,
            budget_bytes=100,
            reserved_bytes=1,
            resident_bytes=2,
            draining_bytes=3,
            quarantined_bytes=4,
            deficit_bytes=5,
            peak_accounted_bytes=6,
            measured_bytes=7,
            peak_measured_bytes=8,
            load_count=9,
            eviction_count=10,
            etag='"e"',
            drained=True,
            total_bytes=11,
            transfer_bytes_per_second=12,
        )
        server.answer(
            "GetDevice",
            lambda request, context: device_service_pb2.GetDeviceResponse(device=message),
        )
        device = admin.get_device("cuda:1")
        assert dataclasses.asdict(device) == {
            **{
                field.name.replace("_per_second", "_per_s"): getattr(message, field.name)
                for field in message.DESCRIPTOR.fields
            },
            "device": dataclasses.asdict(Device.gpu(1)),
        }
        assert (device.id, device.accounted_bytes) == ("cuda-1", 10)

    @pytest.mark.parametrize("device", ["cuda:1", "cuda-1", "devices/cuda-1", Device.gpu(1)])
    def test_budgets_are_changed_by_any_name_of_a_device(
        self, server: FakeServer, admin: Admin, device: Any
    ) -> None:
        server.answer(
            "UpdateBudget", lambda request, context: device_service_pb2.UpdateBudgetResponse()
        )
        admin.update_budget(device, 5, etag='"1"')
        assert server.requests == [
            device_service_pb2.UpdateBudgetRequest(
                name="devices/cuda-1",
                budget_bytes=5,
                etag='"1"',
                request_id=server.requests[0].request_id,
            )
        ]

    @pytest.mark.parametrize(
        ("device", "budget", "error"),
        [
            (1, 1, TypeError),
            ("", 1, ValueError),
            ("cpu", 1.5, TypeError),
            ("cpu", True, TypeError),
            ("cpu", "1", TypeError),
            ("cpu", 2**63, ValueError),
        ],
    )
    def test_wrong_budgets_are_refused(
        self, server: FakeServer, admin: Admin, device: Any, budget: Any, error: type[Exception]
    ) -> None:
        with pytest.raises(error):
            admin.update_budget(device, budget)
        assert server.requests == []

    def test_an_answer_out_of_range_is_the_server_s_error(
        self, server: FakeServer, admin: Admin
    ) -> None:
        server.answer(
            "GetDevice",
            lambda request, context: device_service_pb2.GetDeviceResponse(
                device=device_pb2.ManagedDevice(
                    device=device_pb2.Device(type=device_pb2.DEVICE_TYPE_GPU, index=500)
                )
            ),
        )
        with pytest.raises(errors.ServerError, match="cannot be read: Device id must be <= 127"):
            admin.get_device("cuda:500")
