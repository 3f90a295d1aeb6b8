"""Device values as messages, and back."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, assert_never

from modelyard.devices import ComponentDevice, Device, DeviceMap, DeviceType
from modelyard.placements import AutomaticPlacement, Placement, PlacementStrategy
from modelyard.resources import ManagedDevice
from modelyard.v1 import device_pb2, model_pb2, plan_pb2

__all__ = [
    "component_device_from",
    "component_device_message",
    "device_from",
    "device_message",
    "managed_device_from",
    "placement_from",
    "set_placement",
]

_TO_WIRE: Final[Mapping[DeviceType, device_pb2.DeviceType.ValueType]] = MappingProxyType(
    {
        DeviceType.CPU: device_pb2.DEVICE_TYPE_CPU,
        DeviceType.GPU: device_pb2.DEVICE_TYPE_GPU,
        DeviceType.DISK: device_pb2.DEVICE_TYPE_DISK,
        DeviceType.MPS: device_pb2.DEVICE_TYPE_MPS,
        DeviceType.XPU: device_pb2.DEVICE_TYPE_XPU,
    }
)
_STRATEGY_TO_WIRE: Final[Mapping[PlacementStrategy, device_pb2.PlacementStrategy.ValueType]] = (
    MappingProxyType(
        {
            PlacementStrategy.AUTO: device_pb2.PLACEMENT_STRATEGY_AUTO,
            PlacementStrategy.BALANCED: device_pb2.PLACEMENT_STRATEGY_BALANCED,
            PlacementStrategy.SEQUENTIAL: device_pb2.PLACEMENT_STRATEGY_SEQUENTIAL,
        }
    )
)
_STRATEGY_FROM_WIRE: Final[Mapping[int, PlacementStrategy]] = MappingProxyType(
    {
        # The contract: unspecified is the same as auto.
        device_pb2.PLACEMENT_STRATEGY_UNSPECIFIED: PlacementStrategy.AUTO,
        **{wire: strategy for strategy, wire in _STRATEGY_TO_WIRE.items()},
    }
)
_FROM_WIRE: Final = MappingProxyType({wire: device_type for device_type, wire in _TO_WIRE.items()})


def device_message(device: Device) -> device_pb2.Device:
    """Return a device as a message."""
    # None leaves the index unset, which is not index 0.
    return device_pb2.Device(type=_TO_WIRE[device.type], index=device.id)


def device_from(message: device_pb2.Device) -> Device | None:
    """Return the device of a message; None for a kind this version does not know.

    Raises:
        ValueError: the index is out of range.
    """
    device_type = _FROM_WIRE.get(message.type)
    if device_type is None:
        return None
    return Device(device_type, message.index if message.HasField("index") else None)


def component_device_message(value: ComponentDevice) -> device_pb2.ComponentDevice:
    """Return an explicit placement as a message."""
    message = device_pb2.ComponentDevice()
    if value.single is not None:
        message.single.CopyFrom(device_message(value.single))
    if value.multiple is not None:
        # SetInParent: the server, not a vanished field, tells that an empty map is wrong.
        message.multiple.SetInParent()
        for key, device in value.multiple.items():
            message.multiple.devices[key].CopyFrom(device_message(device))
    return message


def component_device_from(message: device_pb2.ComponentDevice) -> ComponentDevice | None:
    """Return the placement of a message.

    None stands for an unset one, and for one with a kind of device this version does not know.

    Raises:
        ValueError: the message breaks a rule of placements.
    """
    match message.WhichOneof("target"):
        case "single":
            device = device_from(message.single)
            return None if device is None else ComponentDevice.from_single(device)
        case "multiple":
            devices: dict[str, Device] = {}
            # Sorted, because a protobuf map has no order and values should not differ by luck.
            for key in sorted(message.multiple.devices):
                device = device_from(message.multiple.devices[key])
                if device is None:
                    return None
                devices[key] = device
            return ComponentDevice.from_multiple(DeviceMap(devices))
        case _:
            return None


def set_placement(
    message: model_pb2.Model | plan_pb2.ModelPlacement, placement: Placement | None
) -> None:
    """Say in a message where its model lives; None leaves it unsaid."""
    match placement:
        case None:
            return
        case ComponentDevice():
            message.placement.CopyFrom(component_device_message(placement))
        case AutomaticPlacement():
            message.automatic_placement.CopyFrom(
                device_pb2.AutomaticPlacement(
                    strategy=_STRATEGY_TO_WIRE[placement.strategy],
                    devices=map(device_message, placement.devices),
                )
            )
        case _:
            assert_never(placement)


def placement_from(message: model_pb2.Model | plan_pb2.ModelPlacement) -> Placement | None:
    """Return where the model of a message lives.

    None stands for a placement that is unset, and for one with a kind of device or a strategy
    this version does not know.

    Raises:
        ValueError: the message breaks a rule of placements.
    """
    match message.WhichOneof("where"):
        case "placement":
            return component_device_from(message.placement)
        case "automatic_placement":
            automatic = message.automatic_placement
            strategy = _STRATEGY_FROM_WIRE.get(automatic.strategy)
            found = [device_from(device) for device in automatic.devices]
            devices = tuple(device for device in found if device is not None)
            if strategy is None or len(devices) != len(found):
                return None
            return AutomaticPlacement(strategy=strategy, devices=devices)
        case _:
            return None


def managed_device_from(message: device_pb2.ManagedDevice) -> ManagedDevice:
    """Return a managed device. Raises ``ValueError`` if its index is out of range."""
    return ManagedDevice(
        name=message.name,
        device=device_from(message.device),
        logical=message.logical,
        budget_bytes=message.budget_bytes,
        reserved_bytes=message.reserved_bytes,
        resident_bytes=message.resident_bytes,
        draining_bytes=message.draining_bytes,
        quarantined_bytes=message.quarantined_bytes,
        deficit_bytes=message.deficit_bytes,
        peak_accounted_bytes=message.peak_accounted_bytes,
        measured_bytes=message.measured_bytes,
        peak_measured_bytes=message.peak_measured_bytes,
        load_count=message.load_count,
        eviction_count=message.eviction_count,
        etag=message.etag,
        drained=message.drained,
        total_bytes=message.total_bytes,
        transfer_bytes_per_s=message.transfer_bytes_per_second,
        saved_bytes=message.saved_bytes,
    )
