"""Where a model lives: the rules for devices and for the ways to write a placement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from modelyard.devices import ComponentDevice, Device, DeviceMap, DeviceType
from modelyard.placements import AutomaticPlacement, Placement, PlacementStrategy
from modelyard_server.config.problems import quoted
from modelyard_server.config.rules import Finding, RuleError, kind

__all__ = ["device", "is_haystack_shape", "placement"]

_DISK: Final = (
    "the disk can only be used as a part of device maps: a single device has to be able to run "
    "a model"
)
_STRATEGIES: Final = {str(strategy): strategy for strategy in PlacementStrategy}


def device(value: object) -> Device:
    """Accept a device by its text; return it in the form that names a place.

    ``cuda`` and ``cuda:0`` are one place, and so are ``cpu`` and ``cpu:0``.
    """
    if isinstance(value, Device):
        parsed = value
    elif isinstance(value, str):
        try:
            parsed = Device.from_str(value)
        except ValueError as error:
            raise RuleError(str(error)) from error
    else:
        raise RuleError(f'must be a device such as "cpu" or "cuda:0", got {kind(value)}')
    if parsed == Device(DeviceType.CPU, 0):
        return Device.cpu()
    if parsed.type is DeviceType.DISK:
        if parsed.id:
            raise RuleError(f'there is one disk, not a {quoted(str(parsed))}: write "disk"')
        return Device.disk()
    return parsed.canonical()


def placement(value: object) -> Placement:
    """Accept where a model lives.

    A device or strategy by its name, a table with a strategy, Haystack's table, or a table of
    parts.
    """
    match value:
        case AutomaticPlacement():
            return _automatic({"strategy": str(value.strategy), "devices": value.devices})
        case ComponentDevice(single=None, multiple=DeviceMap() as device_map):
            return _device_map(device_map.mapping)
        case ComponentDevice(single=Device() as single):
            return _single(single)
        case Mapping() if _is_strategy_shape(value):
            return _automatic(value)
        case Mapping() if is_haystack_shape(value):
            return _haystack_shape(value)
        case Mapping():
            return _device_map(value)
        case str() if value in _STRATEGIES:
            return AutomaticPlacement(strategy=_STRATEGIES[value])
        case str():
            return _single(value)
        case _:
            raise RuleError(
                f'must be a device such as "cpu", a strategy such as "balanced", or a table of '
                f"parts and devices, got {kind(value)}"
            )


def is_haystack_shape(value: object) -> bool:
    """Whether a table is ``{type = ..., ...}``; if not, it maps parts of the model to devices."""
    if not isinstance(value, Mapping):
        return False
    if isinstance(value.get("device_map"), Mapping):
        return True
    type_text = value.get("type")
    if not isinstance(type_text, str):
        return False
    # A part of a model may be called "type", too. Then its value is a device.
    return not _is_device(type_text)


def _is_strategy_shape(value: Mapping[object, object]) -> bool:
    """Whether a table is ``{strategy = ..., ...}``, and not a map with a part of that name."""
    strategy = value.get("strategy")
    return isinstance(strategy, str) and not _is_device(strategy)


def _is_device(text: str) -> bool:
    try:
        Device.from_str(text)
    except ValueError:
        return False
    return True


def _single(value: object) -> ComponentDevice:
    single = device(value)
    if single.type is DeviceType.DISK:
        raise RuleError(_DISK)
    return ComponentDevice.from_single(single)


def _automatic(value: Mapping[str, object]) -> AutomaticPlacement:
    findings: list[Finding] = [
        ((str(key),), 'unknown field: a table with a "strategy" has that and "devices"')
        for key in value
        if key not in {"strategy", "devices"}
    ]
    name = value["strategy"]
    strategy = _STRATEGIES.get(str(name))
    if strategy is None:
        names = ", ".join(_STRATEGIES)
        findings.append((("strategy",), f"must be one of {names}, got {quoted(name)}"))
    devices, wrong = _devices(value.get("devices", ()))
    findings += [(("devices", *path), text) for path, text in wrong]
    placed: AutomaticPlacement | None = None
    try:
        placed = AutomaticPlacement(
            strategy=strategy or PlacementStrategy.SEQUENTIAL, devices=devices
        )
    except ValueError as error:
        findings.append((("devices",), str(error)))
    if findings or placed is None:
        raise RuleError(findings, usable=placed)
    return placed


def _devices(value: object) -> tuple[tuple[Device, ...], list[Finding]]:
    """The devices of an array, each once, and what is wrong with the others."""
    if not isinstance(value, list | tuple):
        return (), [((), f"must be an array of devices, got {kind(value)}")]
    findings: list[Finding] = []
    accepted: list[Device] = []
    for index, element in enumerate(value):
        try:
            parsed = device(element)
        except RuleError as error:
            findings.append(((index,), str(error)))
            continue
        if parsed in accepted:
            findings.append(((index,), f"{parsed} is listed twice: remove one"))
        else:
            accepted.append(parsed)
    return tuple(accepted), findings


def _haystack_shape(value: Mapping[object, object]) -> ComponentDevice:
    shapes = {"single": "device", "multiple": "device_map"}
    type_text = value.get("type")
    if not isinstance(type_text, str) or type_text not in shapes:
        given = "it is missing" if type_text is None else f"got {quoted(type_text)}"
        raise RuleError([(("type",), f'must be "single" or "multiple", {given}')])
    content = shapes[type_text]
    findings: list[Finding] = [
        ((str(key),), f'unknown field: a table of type "{type_text}" has "type" and "{content}"')
        for key in value
        if key not in {"type", content}
    ]
    placed: ComponentDevice | None = None
    try:
        if content not in value:
            raise RuleError(f'is missing: a table of type "{type_text}" needs it')
        inner = value[content]
        if type_text == "single":
            placed = _single(inner)
        elif isinstance(inner, Mapping):
            placed = _device_map(inner)
        else:
            raise RuleError(f"must be a table of parts and devices, got {kind(inner)}")
    except RuleError as error:
        findings += [((content, *path), text) for path, text in error.findings]
    if findings or placed is None:
        raise RuleError(findings, usable=placed)
    return placed


def _device_map(value: Mapping[str, object]) -> ComponentDevice:
    if not value:
        raise RuleError("must name a device for at least one part of the model")
    findings: list[Finding] = []
    accepted: dict[str, Device] = {}
    for key, element in value.items():
        if isinstance(element, Mapping):
            findings.append(
                ((key,), 'must be a device; put a dotted part in quotes: "encoder.layer" = "cpu"')
            )
            continue
        try:
            accepted[key] = device(element)
        except RuleError as error:
            findings.append(((key,), str(error)))
    placed = ComponentDevice.from_multiple(DeviceMap(accepted))
    if not findings and all(each.type is DeviceType.DISK for each in accepted.values()):
        findings.append(((), "has all of the model on the disk, where nothing can run"))
    if findings:
        raise RuleError(findings, usable=placed)
    return placed
