"""Plain data of the engine seam as values of JSON, and back."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelyard_server.execution.engine import DeviceMemory, EngineDevice, Loaded, Unloaded
from modelyard_server.execution.workers.measurements import decode_estimate, encode_estimate
from modelyard_server.runtimes.api import JsonValue, LoadSource, ModelSpec, Price
from modelyard_server.runtimes.targets import Structure, Target, TensorPart

__all__ = [
    "decode_bytes",
    "decode_device",
    "decode_loaded",
    "decode_memory",
    "decode_price",
    "decode_spec",
    "decode_target",
    "decode_unloaded",
    "encode_bytes",
    "encode_device",
    "encode_loaded",
    "encode_memory",
    "encode_price",
    "encode_spec",
    "encode_target",
    "encode_unloaded",
    "plain",
]

Json = Any


def plain(value: JsonValue) -> Json:
    """A value of an option or parameter, in the types that JSON writes.

    Raises:
        TypeError: it is no value of JSON.
    """
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} is no value of JSON")


def encode_spec(spec: ModelSpec) -> Json:
    """A spec. Raises TypeError if an option is no value of JSON."""
    return {
        "name": spec.name,
        "runtime": spec.runtime,
        "task": spec.task,
        "folder": None if spec.folder is None else os.fspath(spec.folder),
        "root": None if spec.root is None else os.fspath(spec.root),
        "options": plain(spec.options),
    }


def decode_spec(encoded: Json) -> ModelSpec:
    """The spec."""
    folder, root = encoded["folder"], encoded["root"]
    return ModelSpec(
        name=encoded["name"],
        runtime=encoded["runtime"],
        task=encoded["task"],
        folder=None if folder is None else Path(folder),
        root=None if root is None else Path(root),
        options=encoded["options"],
    )


def encode_target(target: Target) -> Json:
    """A target."""
    return [target.home, [list(part) for part in target.parts]]


def decode_target(encoded: Json) -> Target:
    """The target."""
    home, parts = encoded
    return Target(home=home, parts=tuple([(prefix, device) for prefix, device in parts]))


def encode_device(device: EngineDevice) -> Json:
    """A device."""
    return {
        "name": device.name,
        "torch_device": device.torch_device,
        "threads": device.threads,
        "transfer_bytes_per_s": device.transfer_bytes_per_s,
        "group": device.group,
    }


def decode_device(encoded: Json) -> EngineDevice:
    """The device."""
    return EngineDevice(**encoded)


def encode_price(price: Price) -> Json:
    """A price."""
    structure = price.structure
    return {
        "resting_bytes": price.resting_bytes,
        "peak_bytes": price.peak_bytes,
        "structure": None if structure is None else _encode_structure(structure),
        "shared": dict(price.shared),
        "activation_bytes": price.activation_bytes,
        "runs": encode_estimate(price.runs),
        "input_names": list(price.input_names),
    }


def decode_price(encoded: Json) -> Price:
    """The price. Raises ValueError if it is none; other errors of malformed data come as they are.

    Sizes are checked: the yard reserves what stands here.
    """
    structure = encoded["structure"]
    shared = {_text(name): _size(size) for name, size in encoded["shared"].items()}
    return Price(
        resting_bytes=_size(encoded["resting_bytes"]),
        peak_bytes=_size(encoded["peak_bytes"]),
        structure=None if structure is None else _decode_structure(structure),
        shared=shared,
        activation_bytes=_size(encoded["activation_bytes"]),
        runs=decode_estimate(encoded["runs"]),
        input_names=tuple([_text(name) for name in encoded["input_names"]]),
    )


def _encode_structure(structure: Structure) -> Json:
    return {
        "tensors": [
            [list(part.names), part.size_bytes, part.is_buffer, part.as_filed]
            for part in structure.tensors
        ],
        "blocks": list(structure.blocks),
        "units": list(structure.units),
    }


def _decode_structure(encoded: Json) -> Structure:
    return Structure(
        tensors=tuple([_decode_part(part) for part in encoded["tensors"]]),
        blocks=tuple(map(_text, encoded["blocks"])),
        units=tuple(map(_text, encoded["units"])),
    )


def _decode_part(encoded: Json) -> TensorPart:
    names, size_bytes, is_buffer, as_filed = encoded
    if not names or not isinstance(names, list):
        raise ValueError("a tensor without a name")
    return TensorPart(
        names=tuple(map(_text, names)),
        size_bytes=_size(size_bytes),
        is_buffer=bool(is_buffer),
        as_filed=bool(as_filed),
    )


def encode_bytes(sizes: Mapping[int, int]) -> Json:
    """Bytes by position of the device."""
    return [[device, size_bytes] for device, size_bytes in sizes.items()]


def decode_bytes(encoded: Json, devices: int) -> dict[int, int]:
    """The bytes. Raises ValueError for positions not below `devices` and for what is no size."""
    sizes = {_position(device, devices): _size(size_bytes) for device, size_bytes in encoded}
    if len(sizes) != len(encoded):
        raise ValueError("a device is named twice")
    return sizes


def encode_loaded(loaded: Loaded) -> Json:
    """What became of a load."""
    return {"own_bytes": encode_bytes(loaded.own_bytes), "source": loaded.source.value}


def decode_loaded(encoded: Json, devices: int) -> Loaded:
    """What became of a load. Raises ValueError as decode_bytes does, and for unknown sources."""
    return Loaded(
        own_bytes=decode_bytes(encoded["own_bytes"], devices), source=LoadSource(encoded["source"])
    )


def encode_unloaded(unloaded: Unloaded) -> Json:
    """What became of an unload."""
    return {
        "freed": encode_bytes(unloaded.freed),
        "kept_bytes": unloaded.kept_bytes,
        "keep_s": unloaded.keep_s,
        "refused_bytes": unloaded.refused_bytes,
    }


def decode_unloaded(encoded: Json, devices: int) -> Unloaded:
    """What became of an unload. Raises ValueError as decode_bytes does, and for no seconds."""
    kept_bytes, refused_bytes = encoded["kept_bytes"], encoded["refused_bytes"]
    return Unloaded(
        freed=decode_bytes(encoded["freed"], devices),
        kept_bytes=None if kept_bytes is None else _size(kept_bytes),
        keep_s=_seconds(encoded["keep_s"]),
        refused_bytes=None if refused_bytes is None else _size(refused_bytes),
    )


def encode_memory(memory: Mapping[int, DeviceMemory]) -> Json:
    """What is measured, by position of the device."""
    return [
        [device, read.measured_bytes, read.peak_measured_bytes] for device, read in memory.items()
    ]


def decode_memory(encoded: Json, devices: int) -> dict[int, DeviceMemory]:
    """What is measured. Raises ValueError as decode_bytes does."""
    return {
        _position(device, devices): DeviceMemory(
            measured_bytes=_size(measured), peak_measured_bytes=_size(peak)
        )
        for device, measured, peak in encoded
    }


def _size(value: Json) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{json.dumps(value)[:40]} is no number of bytes")
    return value


def _seconds(value: Json) -> float:
    if type(value) not in (int, float) or value < 0 or not math.isfinite(value):
        raise ValueError(f"{json.dumps(value)[:40]} is no time")
    return float(value)


def _position(value: Json, devices: int) -> int:
    if type(value) is not int or not 0 <= value < devices:
        raise ValueError(f"{json.dumps(value)[:40]} is no device")
    return value


def _text(value: Json) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{json.dumps(value)[:40]} is no name")
    return value
