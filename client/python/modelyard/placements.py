"""Where a model lives: an explicit ``ComponentDevice``, or a rule by which the server decides.

A placement has three written forms, read by ``read_placement`` wherever one is taken:

* text: a device (``"cuda:1"``), or the name of a strategy (``"auto"``, ``"balanced"``);
* a table: parts of the model to devices (``{"encoder": "cuda:0", "": "cpu"}``), Haystack's shape
  (``{"type": "single", "device": "cpu"}``), or ``{"strategy": "balanced", "devices": [...]}``;
* None: the server chooses at each load, which is what ``"auto"`` means as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from modelyard.devices import ComponentDevice, Device, DeviceMap, DeviceType

__all__ = [
    "AutomaticPlacement",
    "Placement",
    "PlacementLike",
    "PlacementStrategy",
    "placement_text",
    "placement_to_json",
    "read_placement",
]


class PlacementStrategy(Enum):
    """How the server places a model when it decides itself."""

    AUTO = "auto"
    BALANCED = "balanced"
    SEQUENTIAL = "sequential"

    def __str__(self) -> str:
        """Return the name used in configuration files and on the command line."""
        return str(self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class AutomaticPlacement:
    """A rule by which the server places a model.

    Args:
        strategy: ``AUTO``: whole, on the device where loading it displaces least, chosen at each
            load. ``BALANCED``: in parts, each device with about the same share of its budget.
            ``SEQUENTIAL``: in parts, one device after the other filled to its budget.
        devices: to choose among, in this order; empty for all the server has. The disk only for
            strategies that cut, and last.

    Raises:
        TypeError: a field of another type.
        ValueError: a device twice, the disk for ``AUTO``, or the disk before another device.
    """

    strategy: PlacementStrategy = PlacementStrategy.AUTO
    devices: tuple[Device, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, PlacementStrategy):
            raise TypeError(
                f"strategy must be a PlacementStrategy, got {type(self.strategy).__name__}"
            )
        object.__setattr__(self, "devices", tuple(self.devices))
        for device in self.devices:
            if not isinstance(device, Device):
                raise TypeError(f"devices must hold Device values, got {type(device).__name__}")
        if len(set(self.devices)) != len(self.devices):
            raise ValueError("a device is named twice")
        kinds = [device.type for device in self.devices]
        if DeviceType.DISK in kinds:
            if self.strategy is PlacementStrategy.AUTO:
                raise ValueError("the disk cannot hold a whole model: it cannot run one")
            if kinds.index(DeviceType.DISK) != len(kinds) - 1 or len(kinds) == 1:
                raise ValueError("the disk comes last, behind a device that can run a model")


Placement: TypeAlias = ComponentDevice | AutomaticPlacement
"""Where a model lives."""

PlacementLike: TypeAlias = Placement | Device | DeviceMap | str | Mapping[str, Any] | None
"""What is accepted where a placement is."""


def read_placement(value: PlacementLike) -> Placement | None:
    """Return the placement that a value stands for; None for None.

    Raises:
        TypeError: a value of no such form.
        ValueError: text or a table that says no placement; the text names what is wrong.
    """
    match value:
        case None | ComponentDevice() | AutomaticPlacement():
            return value
        case Device():
            return ComponentDevice.from_single(value)
        case DeviceMap():
            return ComponentDevice.from_multiple(value)
        case str():
            strategies = {str(strategy): strategy for strategy in PlacementStrategy}
            if value in strategies:
                return AutomaticPlacement(strategy=strategies[value])
            return ComponentDevice.from_str(value)
        case Mapping():
            return _from_table(value)
        case _:
            raise TypeError(
                "placement must be text, a table, Device, DeviceMap, ComponentDevice, "
                f"AutomaticPlacement or None, got {type(value).__name__}"
            )


def placement_to_json(placement: Placement | None) -> dict[str, Any] | None:
    """Return a placement as JSON has it, for ``read_placement`` to read again.

    Explicit ones get Haystack's shape; None stays None.
    """
    match placement:
        case None:
            return None
        case ComponentDevice():
            return placement.to_dict()
        case AutomaticPlacement():
            return {
                "strategy": str(placement.strategy),
                "devices": [str(device) for device in placement.devices],
            }


def placement_text(placement: Placement | None) -> str:
    """Return a placement for people: ``cuda:1``, ``encoder: cuda:0, (rest): cpu``, ``balanced``."""
    match placement:
        case None:
            return str(PlacementStrategy.AUTO)
        case AutomaticPlacement(strategy=strategy, devices=()):
            return str(strategy)
        case AutomaticPlacement(strategy=strategy, devices=devices):
            return f"{strategy} of {', '.join(map(str, devices))}"
        case ComponentDevice(multiple=DeviceMap() as device_map):
            return ", ".join(f"{key or '(rest)'}: {device}" for key, device in device_map)
        case ComponentDevice(single=device):
            return str(device)


def _from_table(table: Mapping[str, Any]) -> Placement:
    strategy = table.get("strategy")
    # A part of a model may be called "strategy", too: then its value is a device.
    if isinstance(strategy, str) and not _is_device(strategy):
        unknown = sorted(set(map(str, table)) - {"strategy", "devices"})
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r} beside strategy: devices is the other")
        try:
            known = PlacementStrategy(strategy)
        except ValueError:
            names = ", ".join(map(str, PlacementStrategy))
            raise ValueError(f"unknown strategy {strategy[:40]!r}: use one of {names}") from None
        devices = table.get("devices", ())
        if isinstance(devices, str) or not isinstance(devices, list | tuple):
            raise TypeError(f"devices must be a list of devices, got {type(devices).__name__}")
        return AutomaticPlacement(
            strategy=known,
            devices=tuple(
                device if isinstance(device, Device) else Device.from_str(device)
                for device in devices
            ),
        )
    kind = table.get("type")
    if isinstance(table.get("device_map"), Mapping) or (
        isinstance(kind, str) and not _is_device(kind)
    ):
        try:
            return ComponentDevice.from_dict(dict(table))
        except KeyError as error:
            raise ValueError(f"field {error} is missing") from None
    if not table:
        raise ValueError("a table of parts must name a device for at least one part")
    # Devices may be given as such, too; the map's own reader takes text, and names the part.
    return ComponentDevice.from_multiple(
        DeviceMap.from_dict(
            {
                key: str(value) if isinstance(value, Device) else value
                for key, value in table.items()
            }
        )
    )


def _is_device(text: str) -> bool:
    try:
        Device.from_str(text)
    except ValueError:
        return False
    return True
