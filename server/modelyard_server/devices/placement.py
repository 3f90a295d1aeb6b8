"""What a placement means on this server: which of its devices a model may be loaded onto."""

from __future__ import annotations

from collections.abc import Sequence

from modelyard.devices import ComponentDevice, DeviceType
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.errors import Reason, Refusal, Violation

__all__ = ["resolve_placement"]

_PREFERENCE = (DeviceType.GPU, DeviceType.XPU, DeviceType.MPS, DeviceType.CPU)


def resolve_placement(
    placement: ComponentDevice | None, devices: Sequence[ManagedDevice]
) -> tuple[int, ...]:
    """Positions of the devices a model may be loaded onto, the preferred one first.

    The yard chooses among them at every load: where there is room, or where making room costs
    least.

    Args:
        placement: None leaves the choice to the server: every device, accelerators first. A device
            without an id means any instance of its kind.
        devices: what the server manages.

    Raises:
        Refusal: PLACEMENT_INVALID. The server manages no such device, or the placement spreads the
            model over several, which this version does not do.
    """
    if placement is None:
        order = sorted(range(len(devices)), key=lambda i: _PREFERENCE.index(devices[i].device.type))
        return tuple(order)
    if placement.multiple is not None:
        wanted = dict.fromkeys(device for _, device in placement.multiple)
        if len(wanted) != 1:
            raise _invalid("a model on several devices is not supported by this version")
        (device,) = wanted
    else:
        assert placement.single is not None
        device = placement.single
    exact = tuple(i for i, managed in enumerate(devices) if managed.device == device)
    if exact:
        return exact
    of_kind = tuple(
        i
        for i, managed in enumerate(devices)
        if device.id is None and managed.device.type is device.type
    )
    if of_kind:
        return of_kind
    names = ", ".join(str(managed.device) for managed in devices)
    raise _invalid(f"the server manages no device {device}; there are: {names}")


def _invalid(text: str) -> Refusal:
    return Refusal(Reason.PLACEMENT_INVALID, text, violations=(Violation("placement", text),))
