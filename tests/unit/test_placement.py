"""What a placement means: which devices, and in which order."""

from __future__ import annotations

import pytest

from modelyard.devices import ComponentDevice, Device, DeviceMap, DeviceType
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.devices.placement import resolve_placement
from modelyard_server.errors import Code, Reason, Refusal


def managed(*texts: str) -> list[ManagedDevice]:
    return [
        ManagedDevice(
            name=f"devices/{text.replace(':', '-')}",
            device=Device.from_str(text),
            logical=True,
            torch_device="cpu",
            threads=1,
            total_bytes=100,
            budget_bytes=100,
        )
        for text in texts
    ]


def single(text: str) -> ComponentDevice:
    return ComponentDevice.from_single(Device.from_str(text))


DEVICES = managed("cpu", "cuda:1", "xpu:0", "cuda:0", "mps")


def test_without_a_placement_every_device_will_do_accelerators_first() -> None:
    assert resolve_placement(None, DEVICES) == (1, 3, 2, 4, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("cuda:0", (3,)), ("cuda:1", (1,)), ("cuda", (1, 3)), ("cpu", (0,)), ("xpu", (2,))],
)
def test_a_device_is_itself_and_a_kind_is_any_of_its_kind(
    text: str, expected: tuple[int, ...]
) -> None:
    assert resolve_placement(single(text), DEVICES) == expected


@pytest.mark.parametrize("text", ["cuda:2", "cpu:3", "xpu:1"])
def test_a_device_the_server_has_not_is_refused_with_those_it_has(text: str) -> None:
    with pytest.raises(Refusal) as caught:
        resolve_placement(single(text), DEVICES)
    refusal = caught.value
    assert refusal.reason is Reason.PLACEMENT_INVALID
    assert refusal.code is Code.FAILED_PRECONDITION
    assert text in refusal.text
    assert "cpu, cuda:1, xpu:0, cuda:0, mps" in refusal.text
    assert [v.field for v in refusal.violations] == ["placement"]


def test_a_map_to_one_device_is_that_device() -> None:
    device = Device(DeviceType.GPU, 0)
    whole = ComponentDevice.from_multiple(DeviceMap({"encoder": device, "head": device}))
    assert resolve_placement(whole, DEVICES) == (3,)


def test_a_map_to_several_devices_is_refused() -> None:
    spread = ComponentDevice.from_multiple(
        DeviceMap({"encoder": Device(DeviceType.GPU, 0), "head": Device(DeviceType.GPU, 1)})
    )
    with pytest.raises(Refusal, match="several devices") as caught:
        resolve_placement(spread, DEVICES)
    assert caught.value.reason is Reason.PLACEMENT_INVALID


def test_the_only_device_is_the_choice() -> None:
    assert resolve_placement(None, managed("cpu")) == (0,)
