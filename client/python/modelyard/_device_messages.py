"""Device values as messages, and back."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from modelyard.devices import ComponentDevice, Device, DeviceLike, DeviceMap, DeviceType
from modelyard.resources import ManagedDevice
from modelyard.v1 import device_pb2

__all__ = [
    "component_device_from",
    "component_device_message",
    "device_from",
    "device_message",
    "device_name",
    "managed_device_from",
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


def component_device_message(placement: DeviceLike) -> device_pb2.ComponentDevice | None:
    """Return a placement, in any form callers give it in, as a message; None stays None.

    Raises:
        TypeError: no such form.
        ValueError: text that names no device, or the disk as a single device.
    """
    match placement:
        case None:
            return None
        case ComponentDevice():
            value = placement
        case Device():
            value = ComponentDevice.from_single(placement)
        case DeviceMap():
            value = ComponentDevice.from_multiple(placement)
        case str():
            value = ComponentDevice.from_str(placement)
        case _:
            # Callers without a type checker get here.
            raise TypeError(
                "placement must be a str, Device, DeviceMap, ComponentDevice or None, "
                f"got {type(placement).__name__}"
            )
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


def device_name(device: Device | str) -> str:
    """Return the resource name of a device.

    Args:
        device: a ``Device``, its text (``cuda:1``), its id (``cuda-1``) or its resource name.

    Raises:
        TypeError: anything else.
        ValueError: the text is empty.
    """
    if not isinstance(device, Device | str):
        raise TypeError(f"device must be a Device or a str, got {type(device).__name__}")
    text = str(device)
    if not text:
        raise ValueError("device is empty: give for instance 'cpu' or 'cuda:1'")
    return text if text.startswith("devices/") else f"devices/{text.replace(':', '-')}"


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
    )
