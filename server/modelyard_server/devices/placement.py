"""What a placement means on this server: the ways in which a model may be loaded.

A placement that leaves a choice becomes several alternatives, among which the yard chooses at every
load: where there is room, or where making room costs least. One that names parts becomes a single
one, expanded and checked here, because what libraries make of such maps is not to be relied on.

Parts on the disk cost speed: they are read at every run. That is the price of a model larger than
the devices, and the documentation says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, assert_never

from modelyard.devices import ComponentDevice, Device, DeviceMap, DeviceType
from modelyard.placements import AutomaticPlacement, Placement, PlacementStrategy
from modelyard_server.devices.cutting import CannotCut, cut
from modelyard_server.devices.device_map_option import effective_placement
from modelyard_server.devices.device_maps import expand_map, placement_invalid
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.devices.placed import PlacedAs, placed_as, whole
from modelyard_server.errors import Reason, Refusal, Violation
from modelyard_server.runtimes.api import Price
from modelyard_server.runtimes.targets import Target

__all__ = ["PlacedAs", "effective_placement", "expand"]

_PREFERENCE: Final = (DeviceType.GPU, DeviceType.XPU, DeviceType.MPS, DeviceType.CPU)


def expand(
    placement: Placement | None,
    *,
    price: Price | None,
    devices: Sequence[ManagedDevice],
    budgets: Sequence[int],
) -> tuple[PlacedAs, ...]:
    """The ways to load a model, the preferred one first; at least one.

    Args:
        placement: None leaves the choice to the server, as AUTO does. A device without an id means
            any of its kind; in a map of several devices, which gives one way only, it means the
            one with id 0, or else the first of its kind. The home device of a map is that of its
            first key that is no disk. Maps that came over the wire are in the order of their
            sorted keys, because protobuf's maps have none.
        price: of the model; None if its files are broken now. Then nothing is checked against the
            model and nothing is charged, and an automatic cut is the whole model on the first
            device: expand the placement again once the model has a price.
        devices: what the server manages.
        budgets: bytes by position; looked at by automatic cuts only. Whether whole and mapped
            models fit is for the caller to see.

    Raises:
        Refusal: PLACEMENT_INVALID: a device the server does not manage, or a map that does not fit
            the model. MODEL_NEVER_FITS: an automatic cut for which the budgets are too small.
    """
    match placement:
        case None:
            return _on_any(_executing(devices), price)
        case AutomaticPlacement(strategy=PlacementStrategy.AUTO):
            chosen = _chosen(placement, devices)
            return _on_any([i for i in chosen if devices[i].executes], price)
        case AutomaticPlacement():
            return (_cut(placement, price, devices, budgets),)
        case ComponentDevice(multiple=None, single=Device() as device):
            return _on_any(_of_device(device, devices), price)
        case ComponentDevice(multiple=DeviceMap() as device_map):
            return _mapped(device_map, price, devices)
        case ComponentDevice():
            raise AssertionError("a ComponentDevice is a device or a map")
        case _:
            assert_never(placement)


def _on_any(positions: Sequence[int], price: Price | None) -> tuple[PlacedAs, ...]:
    return tuple(whole(position, price) for position in positions)


def _executing(devices: Sequence[ManagedDevice]) -> list[int]:
    """Positions of the devices that can run models, accelerators first."""
    return sorted(
        (i for i, managed in enumerate(devices) if managed.executes),
        key=lambda i: _PREFERENCE.index(devices[i].device.type),
    )


def _chosen(placement: AutomaticPlacement, devices: Sequence[ManagedDevice]) -> list[int]:
    """Positions of the devices to choose among, in order."""
    if not placement.devices:
        return _executing(devices)
    positions = [i for device in placement.devices for i in _of_device(device, devices)]
    return list(dict.fromkeys(positions))


def _of_device(device: Device, devices: Sequence[ManagedDevice]) -> list[int]:
    """Positions that a device names: itself, or any of its kind if it has no id."""
    # There is one host memory and one disk, whatever they are called.
    wanted = device
    if device.id == 0 and device.type in (DeviceType.CPU, DeviceType.DISK):
        wanted = Device(device.type)
    exact = [i for i, managed in enumerate(devices) if managed.device == wanted]
    if exact:
        return exact
    of_kind = [
        i
        for i, managed in enumerate(devices)
        if wanted.id is None and managed.device.type is wanted.type
    ]
    if of_kind:
        return of_kind
    names = ", ".join(str(managed.device) for managed in devices)
    raise placement_invalid(f"the server manages no device {device}; there are: {names}")


def _cut(
    placement: AutomaticPlacement,
    price: Price | None,
    devices: Sequence[ManagedDevice],
    budgets: Sequence[int],
) -> PlacedAs:
    chosen = _chosen(placement, devices)
    positions = [i for i in chosen if devices[i].executes]
    # A model is in one process: that of the first device.
    positions = [i for i in positions if devices[i].worker == devices[positions[0]].worker]
    disk = next((i for i in chosen if not devices[i].executes), None)
    if price is None:
        return whole(positions[0], None)
    try:
        if price.structure is None:
            return whole(_best_for_all(placement.strategy, price, positions, budgets), price)
        target = cut(placement.strategy, price=price, devices=positions, budgets=budgets, disk=disk)
    except CannotCut as error:
        raise _never_fits(error, price, devices, budgets) from None
    return placed_as(target, price, frozenset() if disk is None else frozenset({disk}))


def _best_for_all(
    strategy: PlacementStrategy, price: Price, positions: Sequence[int], budgets: Sequence[int]
) -> int:
    """Position of the device for a model that cannot be cut: one piece, by the same strategies."""
    fitting = [i for i in positions if price.peak_bytes <= budgets[i]]
    if not fitting:
        raise CannotCut({max(positions, key=lambda i: budgets[i]): price.peak_bytes})
    if strategy is PlacementStrategy.SEQUENTIAL:
        return fitting[0]
    return max(fitting, key=lambda i: budgets[i])


def _never_fits(
    error: CannotCut,
    price: Price,
    devices: Sequence[ManagedDevice],
    budgets: Sequence[int],
) -> Refusal:
    over = [i for i, needed in error.needed.items() if needed > budgets[i]]
    if over:
        worst = max(over, key=lambda i: error.needed[i] - budgets[i])
        text = (
            f"the model needs {price.peak_bytes} bytes, and cut over these devices it "
            f"needs {error.needed[worst]} bytes on {devices[worst].name}, whose budget is "
            f"{budgets[worst]} bytes"
        )
    else:
        worst = next(iter(error.needed))
        text = (
            f"the model needs {price.peak_bytes} bytes, and {error.fixed} would have to be on the "
            "disk: the model's files do not hold it in the form in which it is loaded"
        )
    return Refusal(
        Reason.MODEL_NEVER_FITS,
        text,
        metadata={
            "device": devices[worst].name,
            "needed_bytes": str(error.needed[worst]),
            "budget_bytes": str(budgets[worst]),
        },
        violations=tuple(
            Violation(devices[i].name, f"needs {needed} bytes, budget {budgets[i]} bytes")
            for i, needed in error.needed.items()
        ),
    )


def _mapped(
    device_map: DeviceMap, price: Price | None, devices: Sequence[ManagedDevice]
) -> tuple[PlacedAs, ...]:
    if not device_map:
        raise placement_invalid("the map names no device")
    keys = {key: _one_device(device, devices) for key, device in device_map}
    disk = frozenset(i for i, managed in enumerate(devices) if not managed.executes)
    home = next((position for position in keys.values() if position not in disk), None)
    if home is None:
        raise placement_invalid("the map has all of the model on the disk, where nothing can run")
    if price is None:
        target = Target(home=home, parts=tuple(keys.items()))
    elif price.structure is not None:
        target = expand_map(
            keys,
            price.structure,
            home=home,
            disk=disk,
            device_names=[str(managed.device) for managed in devices],
        )
    elif set(keys) == {""}:
        target = Target.whole(home)
    else:
        raise placement_invalid(
            "the model's runtime cannot split it over several devices: it knows no parts, so name "
            'a device, or map "" alone'
        )
    if len(set(device_map.values())) == 1:
        # As good as a single device, so that one without an id is any of its kind.
        return _on_any(_of_device(next(iter(device_map.values())), devices), price)
    if target.is_whole:
        return (whole(home, price),)
    workers = sorted({devices[i].worker for i in target.devices if devices[i].executes})
    if len(workers) > 1:
        raise placement_invalid(
            f"the map has parts in the worker processes {' and '.join(workers)}; a model must be "
            "in one: give its devices the same worker"
        )
    return (placed_as(target, price, disk),)


def _one_device(device: Device, devices: Sequence[ManagedDevice]) -> int:
    canonical = device.canonical()
    return next(
        (i for i, managed in enumerate(devices) if managed.device == canonical),
        _of_device(device, devices)[0],
    )
