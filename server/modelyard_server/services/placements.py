"""Devices and placements as messages, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from modelyard.devices import ComponentDevice, Device, DeviceMap, DeviceType
from modelyard.placements import AutomaticPlacement, Placement, PlacementStrategy
from modelyard.v1 import device_pb2, plan_pb2, residency_pb2
from modelyard_server.devices.placed import PlacedAs
from modelyard_server.errors import Violation
from modelyard_server.services.handler import invalid

__all__ = [
    "charge_messages",
    "device_message",
    "put_placement",
    "read_placement_of",
    "way_message",
]

_TYPES: Mapping[int, DeviceType] = {
    device_pb2.DEVICE_TYPE_CPU: DeviceType.CPU,
    device_pb2.DEVICE_TYPE_GPU: DeviceType.GPU,
    device_pb2.DEVICE_TYPE_DISK: DeviceType.DISK,
    device_pb2.DEVICE_TYPE_MPS: DeviceType.MPS,
    device_pb2.DEVICE_TYPE_XPU: DeviceType.XPU,
}
_NUMBERS = {kind: number for number, kind in _TYPES.items()}

_STRATEGIES: Mapping[int, PlacementStrategy] = {
    device_pb2.PLACEMENT_STRATEGY_UNSPECIFIED: PlacementStrategy.AUTO,
    device_pb2.PLACEMENT_STRATEGY_AUTO: PlacementStrategy.AUTO,
    device_pb2.PLACEMENT_STRATEGY_BALANCED: PlacementStrategy.BALANCED,
    device_pb2.PLACEMENT_STRATEGY_SEQUENTIAL: PlacementStrategy.SEQUENTIAL,
}
_STRATEGY_NUMBERS = {
    PlacementStrategy.AUTO: device_pb2.PLACEMENT_STRATEGY_AUTO,
    PlacementStrategy.BALANCED: device_pb2.PLACEMENT_STRATEGY_BALANCED,
    PlacementStrategy.SEQUENTIAL: device_pb2.PLACEMENT_STRATEGY_SEQUENTIAL,
}


class Placed(Protocol):
    """A message with the two ways to say where a model lives: Model and ModelPlacement."""

    @property
    def placement(self) -> device_pb2.ComponentDevice:
        """Where it lives."""

    @property
    def automatic_placement(self) -> device_pb2.AutomaticPlacement:
        """By which rule the server decides."""


def read_placement_of(message: Placed, which: str | None, field: str) -> Placement | None:
    """The placement that a message says; None if it leaves the choice to the server.

    Args:
        message: a Model or ModelPlacement.
        which: its WhichOneof("where").
        field: where the message stands in the request, with a dot behind, for errors.

    Raises:
        Refusal: INVALID_FIELD.
    """
    if which is None:
        return None
    try:
        if which == "automatic_placement":
            return _automatic(message.automatic_placement)
        return _component(message.placement)
    except (ValueError, TypeError) as error:
        raise invalid(Violation(f"{field}{which}", str(error))) from None


def put_placement(message: Placed, placement: Placement | None) -> None:
    """Writes a placement into a message; None leaves both ways unset."""
    match placement:
        case None:
            return
        case AutomaticPlacement():
            automatic = message.automatic_placement
            automatic.strategy = _STRATEGY_NUMBERS[placement.strategy]
            automatic.devices.extend(device_message(device) for device in placement.devices)
        case ComponentDevice(single=Device() as device):
            message.placement.single.CopyFrom(device_message(device))
        case ComponentDevice():
            for key, device in placement.multiple or ():
                message.placement.multiple.devices[key].CopyFrom(device_message(device))


def device_message(device: Device) -> device_pb2.Device:
    """The message of a device."""
    message = device_pb2.Device()
    message.type = _NUMBERS[device.type]  # type: ignore[assignment]  # an int is an enum value
    if device.id is not None:
        message.index = device.id
    return message


def way_message(way: PlacedAs, device_names: Sequence[str]) -> plan_pb2.PlacedModel:
    """The message of one way to load a model; the part that takes the inputs first."""
    return plan_pb2.PlacedModel(
        parts=[
            plan_pb2.PlacedPart(
                device=device_names[position],
                prefixes=way.prefixes.get(position, ()),
                size_bytes=way.charges.get(position, 0),
            )
            for position in way.target.devices
        ]
    )


def charge_messages(
    charges: Mapping[int, int], device_names: Sequence[str]
) -> list[residency_pb2.DeviceCharge]:
    """The messages of what is held, by position of the device."""
    return [
        residency_pb2.DeviceCharge(device=device_names[device], size_bytes=size_bytes)
        for device, size_bytes in sorted(charges.items())
    ]


def _component(message: device_pb2.ComponentDevice) -> ComponentDevice:
    which = message.WhichOneof("target")
    if which is None:
        raise ValueError("must be a single device or a map of several")
    if which == "single":
        return ComponentDevice.from_single(_device(message.single))
    if not message.multiple.devices:
        raise ValueError("a device map needs at least one entry")
    # A map has no order on the wire, and which device is home must not change by luck.
    return ComponentDevice.from_multiple(
        DeviceMap(
            {
                key: _device(message.multiple.devices[key])
                for key in sorted(message.multiple.devices)
            }
        )
    )


def _automatic(message: device_pb2.AutomaticPlacement) -> AutomaticPlacement:
    strategy = _STRATEGIES.get(message.strategy)
    if strategy is None:
        raise ValueError(f"placement strategy {message.strategy} is unknown")
    return AutomaticPlacement(
        strategy=strategy, devices=tuple(_device(device) for device in message.devices)
    )


def _device(message: device_pb2.Device) -> Device:
    kind = _TYPES.get(message.type)
    if kind is None:
        raise ValueError(f"device type {message.type} is unknown")
    return Device(kind, message.index if message.HasField("index") else None)
