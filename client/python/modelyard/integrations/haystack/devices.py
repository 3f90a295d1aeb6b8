"""Device values to and from those of Haystack (the package haystack-ai, 3.x).

::

    from modelyard import resolve_device
    from modelyard.integrations.haystack import from_haystack, to_haystack

    component = SomeHaystackComponent(device=to_haystack(resolve_device("cuda:1")))
    placement = from_haystack(component.device)

Both directions give new values that share nothing with the argument; Haystack's can be changed
afterwards. All of our values exist there, so ``to_haystack`` refuses nothing but foreign types.
The opposite is not so: Haystack checks little when a value is made and nothing when it is changed.
``from_haystack`` takes what modelyard takes and refuses the rest, saying what is wrong with it.

Importing this module imports Haystack, which imports torch where it is installed.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import cast, overload

from haystack.utils import device as theirs

from modelyard.devices import ComponentDevice, Device, DeviceMap, DeviceType

__all__ = ["from_haystack", "to_haystack"]


@overload
def to_haystack(value: DeviceType) -> theirs.DeviceType: ...
@overload
def to_haystack(value: Device) -> theirs.Device: ...
@overload
def to_haystack(value: DeviceMap) -> theirs.DeviceMap: ...
@overload
def to_haystack(value: ComponentDevice) -> theirs.ComponentDevice: ...


def to_haystack(
    value: DeviceType | Device | DeviceMap | ComponentDevice,
) -> theirs.DeviceType | theirs.Device | theirs.DeviceMap | theirs.ComponentDevice:
    """Return Haystack's counterpart of a device value, as a new object.

    Args:
        value: a value of ``modelyard.devices``. For anything else that stands for a device there,
            such as a string, call ``resolve_device`` first.

    Raises:
        TypeError: a value of another type.
    """
    match value:
        case DeviceType():
            return theirs.DeviceType(value.value)
        case Device():
            return theirs.Device(theirs.DeviceType(value.type.value), value.id)
        case DeviceMap():
            return theirs.DeviceMap({key: to_haystack(device) for key, device in value})
        case ComponentDevice():
            if value.single is not None:
                return theirs.ComponentDevice.from_single(to_haystack(value.single))
            # A component device that exists holds exactly one of the two.
            return theirs.ComponentDevice.from_multiple(
                to_haystack(cast(DeviceMap, value.multiple))
            )
        case _:
            # Callers without a type checker get here.
            raise TypeError(
                f"Cannot convert {_shortened(value)} to Haystack: give a device value of "
                "modelyard; resolve_device makes one of a string"
            )


@overload
def from_haystack(value: theirs.DeviceType) -> DeviceType: ...
@overload
def from_haystack(value: theirs.Device) -> Device: ...
@overload
def from_haystack(value: theirs.DeviceMap) -> DeviceMap: ...
@overload
def from_haystack(value: theirs.ComponentDevice) -> ComponentDevice: ...


def from_haystack(
    value: theirs.DeviceType | theirs.Device | theirs.DeviceMap | theirs.ComponentDevice,
) -> DeviceType | Device | DeviceMap | ComponentDevice:
    """Return our counterpart of a Haystack device value; later changes to it do not show.

    Args:
        value: a ``DeviceType``, ``Device``, ``DeviceMap`` or ``ComponentDevice`` of
            ``haystack.utils``.

    Raises:
        TypeError: a value of another type, or one that holds a wrong type where Haystack does not
            look: an id that is a bool, a device map with text in it. The text names the key.
        ValueError: an id under 0 or over 127, a component device that is empty or holds both kinds,
            the disk as its single device.
    """
    match value:
        case theirs.DeviceType():
            # By name: a kind that a later Haystack adds is refused with our list of kinds.
            return DeviceType.from_str(value.value)
        case theirs.Device():
            return _device(value)
        case theirs.DeviceMap():
            return _device_map(value)
        case theirs.ComponentDevice():
            return _component_device(value)
        case _:
            raise TypeError(
                f"Cannot convert {_shortened(value)} from Haystack: give a DeviceType, Device, "
                "DeviceMap or ComponentDevice of haystack.utils"
            )


def _device(value: theirs.Device) -> Device:
    if not isinstance(value.type, theirs.DeviceType):
        raise TypeError(
            f"Haystack device has no DeviceType but {_shortened(value.type)} as its type"
        )
    # Our constructor looks at the id.
    return Device(DeviceType.from_str(value.type.value), value.id)


def _device_map(value: theirs.DeviceMap) -> DeviceMap:
    entries: object = value.mapping
    if not isinstance(entries, Mapping):
        raise TypeError(f"Haystack device map holds no mapping but {_shortened(entries)}")
    devices: dict[str, Device] = {}
    for key, device in entries.items():
        if not isinstance(device, theirs.Device):
            raise TypeError(
                f"Haystack device map has no Device but {_shortened(device)} for key "
                f"{_shortened(key)}"
            )
        try:
            devices[key] = _device(device)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (device map key {_shortened(key)})") from error
    # Our constructor looks at the keys.
    return DeviceMap(devices)


def _component_device(value: theirs.ComponentDevice) -> ComponentDevice:
    # Private, but there is no other way to the parts: to_dict writes them as text, in which a bool
    # or a string looks like a device, and shows only one where both are set. Tested against the
    # installed release.
    single, multiple = value._single_device, value._multiple_devices
    if (single is None) == (multiple is None):
        held = "neither" if single is None else "both"
        raise ValueError(
            "Haystack component device has to hold a single device or a device map: "
            f"it holds {held}"
        )
    if single is not None:
        if not isinstance(single, theirs.Device):
            raise TypeError(f"Haystack component device holds no Device but {_shortened(single)}")
        return ComponentDevice.from_single(_device(single))
    if not isinstance(multiple, theirs.DeviceMap):
        raise TypeError(f"Haystack component device holds no DeviceMap but {_shortened(multiple)}")
    return ComponentDevice.from_multiple(_device_map(multiple))


def _shortened(value: object) -> str:
    return reprlib.repr(value)
