"""modelyard.v1.DeviceService."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from modelyard.devices import ComponentDevice, Device, DeviceMap, DeviceType
from modelyard.v1 import device_pb2
from modelyard.v1 import device_service_pb2 as pb
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.errors import Reason, Refusal, Resource, Violation
from modelyard_server.execution.engine import Engine
from modelyard_server.residency.shell import Residency
from modelyard_server.services.handler import invalid
from modelyard_server.services.paging import page
from modelyard_server.transport.api import Call

__all__ = ["DeviceService", "placement_of", "to_component_message", "to_device_message"]

_MAX_BUDGET_BYTES = 2**46 - 1

_TYPES: dict[int, DeviceType] = {
    device_pb2.DEVICE_TYPE_CPU: DeviceType.CPU,
    device_pb2.DEVICE_TYPE_GPU: DeviceType.GPU,
    device_pb2.DEVICE_TYPE_DISK: DeviceType.DISK,
    device_pb2.DEVICE_TYPE_MPS: DeviceType.MPS,
    device_pb2.DEVICE_TYPE_XPU: DeviceType.XPU,
}
_NUMBERS = {kind: number for number, kind in _TYPES.items()}


def placement_of(message: device_pb2.ComponentDevice, field: str) -> ComponentDevice | None:
    """The placement of a message; None if it says nothing.

    Raises:
        Refusal: INVALID_FIELD for a type or index that is none.
    """
    which = message.WhichOneof("target")
    if which is None:
        return None
    try:
        if which == "single":
            return ComponentDevice.from_single(_device_of(message.single))
        if not message.multiple.devices:
            raise ValueError("a device map needs at least one entry")
        return ComponentDevice.from_multiple(
            DeviceMap({key: _device_of(device) for key, device in message.multiple.devices.items()})
        )
    except (ValueError, TypeError) as error:
        raise invalid(Violation(field, str(error))) from None


def _device_of(message: device_pb2.Device) -> Device:
    kind = _TYPES.get(message.type)
    if kind is None:
        raise ValueError(f"device type {message.type} is unknown")
    return Device(kind, message.index if message.HasField("index") else None)


def to_device_message(device: Device) -> device_pb2.Device:
    """The message of a device."""
    message = device_pb2.Device()
    message.type = _NUMBERS[device.type]  # type: ignore[assignment]  # an int is an enum value
    if device.id is not None:
        message.index = device.id
    return message


def to_component_message(placement: ComponentDevice) -> device_pb2.ComponentDevice:
    """The message of a placement."""
    if placement.single is not None:
        return device_pb2.ComponentDevice(single=to_device_message(placement.single))
    message = device_pb2.ComponentDevice()
    for key, device in placement.multiple or ():
        message.multiple.devices[key].CopyFrom(to_device_message(device))
    return message


class DeviceService:
    """Tells what the devices hold and changes their budgets."""

    def __init__(
        self, *, devices: Sequence[ManagedDevice], residency: Residency, engine: Engine
    ) -> None:
        self._devices = tuple(devices)
        self._residency = residency
        self._engine = engine

    async def list_devices(
        self, request: pb.ListDevicesRequest, call: Call
    ) -> pb.ListDevicesResponse:
        """See DeviceService.ListDevices."""
        # In the order of the configuration, which is the order of positions: page by those.
        chosen, token = page(
            range(len(self._devices)),
            size=request.page_size,
            token=request.page_token,
            name=lambda i: f"{i:04}",
        )
        return pb.ListDevicesResponse(
            devices=[self._message(i) for i in chosen], next_page_token=token
        )

    async def get_device(self, request: pb.GetDeviceRequest, call: Call) -> pb.GetDeviceResponse:
        """See DeviceService.GetDevice."""
        return pb.GetDeviceResponse(device=self._message(self._position(request.name)))

    async def update_budget(
        self, request: pb.UpdateBudgetRequest, call: Call
    ) -> pb.UpdateBudgetResponse:
        """See DeviceService.UpdateBudget."""
        if not 0 <= request.budget_bytes <= _MAX_BUDGET_BYTES:
            raise invalid(Violation("budget_bytes", f"must be 0 to {_MAX_BUDGET_BYTES}"))
        position = self._position(request.name)
        if request.etag and request.etag != self._etag(position):
            raise Refusal(
                Reason.ETAG_MISMATCH,
                f"{request.name} has changed since its etag was read",
                resource=Resource("device", request.name),
            )
        self._residency.set_budget(position, request.budget_bytes)
        return pb.UpdateBudgetResponse(device=self._message(position))

    def _position(self, name: str) -> int:
        if not name.startswith("devices/"):
            raise invalid(Violation("name", 'must be "devices/{device}"'))
        for i, device in enumerate(self._devices):
            if device.name == name:
                return i
        raise Refusal(
            Reason.DEVICE_NOT_FOUND,
            f"the server manages no {name[:64]!r}",
            resource=Resource("device", name[:64]),
        )

    def _etag(self, position: int) -> str:
        budget = self._residency.device_use(position).budget
        text = f"{self._devices[position].name}\0{budget}"
        return f'"{hashlib.sha256(text.encode()).hexdigest()[:16]}"'

    def _message(self, position: int) -> device_pb2.ManagedDevice:
        device = self._devices[position]
        use = self._residency.device_use(position)
        memory = self._engine.memory(position)
        return device_pb2.ManagedDevice(
            name=device.name,
            device=to_device_message(device.device),
            logical=device.logical,
            budget_bytes=use.budget,
            reserved_bytes=use.reserved,
            resident_bytes=use.resident,
            draining_bytes=use.draining,
            quarantined_bytes=use.quarantined,
            deficit_bytes=use.deficit,
            peak_accounted_bytes=use.peak,
            measured_bytes=memory.measured_bytes,
            peak_measured_bytes=memory.peak_measured_bytes,
            load_count=use.load_count,
            eviction_count=use.eviction_count,
            etag=self._etag(position),
        )
