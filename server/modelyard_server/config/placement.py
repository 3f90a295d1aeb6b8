"""Where a model lives: the rules for devices and for the three ways to write a placement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from modelyard.devices import ComponentDevice, Device, DeviceMap, DeviceType
from modelyard_server.config.problems import quoted
from modelyard_server.config.rules import Finding, RuleError, kind

__all__ = ["device", "is_haystack_shape", "placement"]

_DISK: Final = "the disk is not supported as a device yet: name another one"


def device(value: object) -> Device:
    """Accept a device that can hold models, by its text; return it in the form that names a place.

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
    if parsed.type is DeviceType.DISK:
        raise RuleError(_DISK)
    if parsed == Device(DeviceType.CPU, 0):
        return Device.cpu()
    return parsed.canonical()


def placement(value: object) -> ComponentDevice:
    """Accept where a model lives: a device string, Haystack's table, or a table of parts."""
    match value:
        case ComponentDevice(single=None, multiple=DeviceMap() as device_map):
            return _device_map(device_map.mapping)
        case ComponentDevice(single=Device() as single):
            return ComponentDevice.from_single(device(single))
        case Mapping() if is_haystack_shape(value):
            return _haystack_shape(value)
        case Mapping():
            return _device_map(value)
        case str():
            return ComponentDevice.from_single(device(value))
        case _:
            raise RuleError(
                f'must be a device such as "cpu" or a table of parts and devices, got {kind(value)}'
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
    try:
        Device.from_str(type_text)
    except ValueError:
        return True
    return False


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
            placed = ComponentDevice.from_single(device(inner))
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
    if findings:
        raise RuleError(findings, usable=placed)
    return placed
