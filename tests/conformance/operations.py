"""The recorded calls: each does what a case's ``op`` names and returns it in the record's shape.

An operation takes whatever the recorded call could have been given, wrong types included; a value
is handed on as it is, and refusing it is up to the library. An input that the operation itself
cannot make sense of raises ``NotUnderstood``, which no case expects.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

import torch
from tests.conformance.libraries import Library

Operation = Callable[[Library, Any], object]


class NotUnderstood(Exception):
    """An input of a shape that the operation does not know: the harness has to learn it."""


def pair(value: Any) -> tuple[Any, Any]:
    """Both parts of an input that is a list of two."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise NotUnderstood(f"not a list of two: {value!r}")
    return value[0], value[1]


def part(value: Any, name: str) -> Any:
    """A part of an input that is an object."""
    if not isinstance(value, dict) or name not in value:
        raise NotUnderstood(f"no {name!r} in {value!r}")
    return value[name]


def is_serialised(value: Any) -> bool:
    """Whether an object is a component device in its JSON shape and not a device map."""
    keys = {"single": "device", "multiple": "device_map"}
    return isinstance(value, dict) and any(
        value.get("type") == kind and key in value for kind, key in keys.items()
    )


def split_switches(value: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """What is available, and environment variables: those have upper-case names."""
    if not isinstance(value, dict):
        raise NotUnderstood(f"not an object that says what is available: {value!r}")
    switches = {name: str(text) for name, text in value.items() if name.isupper()}
    return {name: there for name, there in value.items() if name not in switches}, switches


def read_torch_device(text: Any) -> Any:
    """A ``torch.device`` written as ``torch.device('cuda:1')``; anything else as it is."""
    if isinstance(text, str) and text.startswith("torch.device("):
        found = re.fullmatch(r"torch\.device\((.+)\)", text)
        if found is None:
            raise NotUnderstood(f"not a torch.device: {text!r}")
        try:
            return torch.device(*ast.literal_eval(f"({found.group(1)},)"))
        except (SyntaxError, ValueError, TypeError, RuntimeError) as error:
            raise NotUnderstood(f"not a torch.device: {text!r}") from error
    return text


def read_described(described: Any) -> tuple[str, Any]:
    """Kind and content of a value that JSON cannot hold, written ``cuda:1 (plain string)``.

    The kinds are ``text``, ``device`` (its text), ``map`` (its dict) and ``other``.
    """
    if not isinstance(described, str):
        return "other", described
    found = re.fullmatch(r"(?s)(.*) \(([^()]*)\)", described)
    if found is None:
        return "text", described
    written, kind = found.group(1), found.group(2).lower().replace(" ", "")
    if "str" in kind:
        return "text", written
    try:
        if "map" in kind:
            return "map", ast.literal_eval(written)
        if "device" in kind:
            factory = re.fullmatch(r"Device\.(cpu|gpu|disk|mps|xpu)\(([0-9]*)\)", written)
            if factory is None:
                return "device", written
            name = "cuda" if factory.group(1) == "gpu" else factory.group(1)
            number = factory.group(2) or ("0" if name == "cuda" else "")
            return "device", f"{name}:{number}" if number else name
        return "other", ast.literal_eval(written)
    except (SyntaxError, ValueError) as error:
        raise NotUnderstood(
            f"neither a string nor a device nor a literal: {described!r}"
        ) from error


def _component(library: Library, value: Any) -> Any:
    """A component device from a device string, a device map or the JSON shape."""
    if is_serialised(value):
        return library.ComponentDevice.from_dict(value)
    if isinstance(value, dict):
        return library.ComponentDevice.from_multiple(library.DeviceMap.from_dict(value))
    return library.ComponentDevice.from_str(value)


def _multiple(library: Library, devices: Any) -> Any:
    return library.ComponentDevice.from_multiple(library.DeviceMap.from_dict(devices))


def _described_device(device: Any) -> object:
    return {"type": device.type.name, "id": device.id, "str": str(device)}


def _content(component: Any) -> object:
    serialised = component.to_dict()
    return serialised.get("device", serialised.get("device_map"))


def device_from_str(library: Library, text: Any) -> object:
    return _described_device(library.Device.from_str(text))


def device_gpu(library: Library, number: Any) -> object:
    # No input stands for no argument.
    device = library.Device.gpu() if number is None else library.Device.gpu(number)
    return _described_device(device)


def device_equal(library: Library, texts: Any) -> object:
    left, right = map(library.Device.from_str, pair(texts))
    return bool(left == right)


def map_len_contains(library: Library, devices: Any) -> object:
    device_map = library.DeviceMap.from_dict(devices)
    return [len(device_map), "layer1" in device_map, "x" in device_map]


def map_get_missing(library: Library, arguments: Any) -> object:
    devices, key = pair(arguments)
    return str(library.DeviceMap.from_dict(devices)[key])


def map_from_dict(library: Library, devices: Any) -> object:
    return library.DeviceMap.from_dict(devices).to_dict()


def map_equal_any_order(library: Library, maps: Any) -> object:
    left, right = map(library.DeviceMap.from_dict, pair(maps))
    return bool(left == right)


def map_first_device(library: Library, devices: Any) -> object:
    first = library.DeviceMap.from_dict(devices).first_device
    return None if first is None else str(first)


def map_from_hf(library: Library, written: Any) -> object:
    if isinstance(written, dict):
        written = {key: read_torch_device(value) for key, value in written.items()}
    return library.DeviceMap.from_hf(written).to_dict()


def map_from_hf_torch_device(library: Library, written: Any) -> object:
    return map_from_hf(library, written)


def single_convert(library: Library, text: Any) -> object:
    component = library.ComponentDevice.from_str(text)
    converted = {
        "torch_str": component.to_torch_str(),
        "spacy": component.to_spacy(),
        "hf": component.to_hf(),
    }
    # The records have no column for to_torch; it has to say the same as its string.
    if component.to_torch() != torch.device(component.to_torch_str()):
        raise RuntimeError(f"to_torch of {text!r} is {component.to_torch()!r}")
    return converted


def multi_to_hf(library: Library, devices: Any) -> object:
    return _multiple(library, devices).to_hf()


def multi_to_torch_str(library: Library, devices: Any) -> object:
    return _multiple(library, devices).to_torch_str()


def multi_to_spacy(library: Library, devices: Any) -> object:
    return _multiple(library, devices).to_spacy()


def first_device(library: Library, value: Any) -> object:
    return _component(library, value).first_device.to_dict()


def _use_union(library: Library, member: Any, *, filled: bool) -> object:
    if not isinstance(member, str) or not hasattr(library.ComponentDevice, member):
        raise NotUnderstood(f"no member of a component device: {member!r}")
    union = library.union(single=filled, multiple=filled)
    if member == "update_hf_kwargs":
        return union.update_hf_kwargs({}, overwrite=True)
    value = getattr(union, member)
    result = value() if callable(value) else value
    return result.to_dict() if hasattr(result, "to_dict") else result


def empty_component(library: Library, member: Any) -> object:
    return _use_union(library, member, filled=False)


def both_component(library: Library, member: Any) -> object:
    return _use_union(library, member, filled=True)


def update_hf_kwargs(library: Library, arguments: Any) -> object:
    component = _component(library, part(arguments, "component"))
    return component.update_hf_kwargs(
        part(arguments, "kwargs"), overwrite=part(arguments, "overwrite")
    )


def component_from_dict(library: Library, data: Any) -> object:
    return library.ComponentDevice.from_dict(data).to_dict()


def resolve_none(library: Library, available: Any) -> object:
    return library.resolve_none(*split_switches(available)).to_torch_str()


def resolve_none_env(library: Library, available: Any) -> object:
    return resolve_none(library, available)


def resolve_invalid(library: Library, described: Any) -> object:
    kind, content = read_described(described)
    match kind:
        case "device":
            content = library.Device.from_str(content)
        case "map":
            content = library.DeviceMap.from_dict(content)
    return _content(library.resolve(content))


def pipeline_kwargs(library: Library, arguments: Any) -> object:
    device = part(arguments, "device")
    component = None if device is None else _component(library, device)
    return library.pipeline_kwargs(component, part(arguments, "kwargs"))


def model_kwargs_device_map(library: Library, arguments: Any) -> object:
    device = part(arguments, "device")
    component = None if device is None else _component(library, device)
    return library.model_kwargs(component, part(arguments, "kwargs"))


def generator_mutates_caller_kwargs(library: Library, kwargs: Any) -> object:
    if not isinstance(kwargs, dict):
        raise NotUnderstood(f"no dict of a caller: {kwargs!r}")
    callers = dict(kwargs)
    library.pipeline_kwargs(None, callers)
    return sorted(callers)


OPERATIONS: dict[str, Operation] = {
    operation.__name__: operation
    for operation in (
        device_from_str,
        device_gpu,
        device_equal,
        map_len_contains,
        map_get_missing,
        map_from_dict,
        map_equal_any_order,
        map_first_device,
        map_from_hf,
        map_from_hf_torch_device,
        single_convert,
        multi_to_hf,
        multi_to_torch_str,
        multi_to_spacy,
        first_device,
        empty_component,
        both_component,
        update_hf_kwargs,
        component_from_dict,
        resolve_none,
        resolve_none_env,
        resolve_invalid,
        pipeline_kwargs,
        model_kwargs_device_map,
        generator_mutates_caller_kwargs,
    )
}
