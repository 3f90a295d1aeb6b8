"""Where a model lives: device types, devices, device maps and their union.

The vocabulary and its meaning are Haystack's (recorded call by call in
``tests/conformance/seed_cases.json``); the strictness is modelyard's. Three rules hold everywhere:

* A value is checked when it is made, so a value that exists is valid. No converter checks again.
* Values are immutable and hashable; equal values have equal hashes.
* Text is read by one grammar, ``type[:id]``: a type is one of the five lower-case names, an id is
  ASCII digits, 0 to 127. Leading zeros are dropped (``cuda:00`` is ``cuda:0``). Nothing else is
  read, neither spaces nor signs nor underscores, although Python's ``int()`` would.

A missing id and id 0 are different values (``cuda`` is not ``cuda:0``), because frameworks treat
them differently; ``Device.canonical`` gives the form in which both are one place.

A wrong Python type raises ``TypeError``, a wrong value of the right type ``ValueError``, a missing
key of serialised data ``KeyError``. Two functions answer ``ValueError`` for a wrong type as well,
because Haystack does: ``DeviceType.from_str`` and ``resolve_device``.

torch is imported by ``ComponentDevice.to_torch`` and by the default availability probe, never by
importing this module. All values here may be shared between threads.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeAlias, assert_never, cast

if TYPE_CHECKING:
    import torch

__all__ = [
    "MAX_DEVICE_ID",
    "AvailabilityProbe",
    "ComponentDevice",
    "Device",
    "DeviceLike",
    "DeviceMap",
    "DeviceType",
    "resolve_device",
]

MAX_DEVICE_ID: Final = 127
"""Largest device id. torch keeps the index in a signed byte: ``cuda:256`` would be GPU 0."""

_QUOTE_LIMIT: Final = 60
_DISABLING_TEXTS: Final = frozenset({"false", "0", "no"})


class DeviceType(Enum):
    """The kinds of device a model, or a part of one, can be placed on."""

    CPU = "cpu"
    GPU = "cuda"
    DISK = "disk"
    MPS = "mps"
    XPU = "xpu"

    def __str__(self) -> str:
        """Return the name used in device strings, for example ``cuda``."""
        return str(self.value)

    @staticmethod
    def from_str(string: str) -> DeviceType:
        """Return the type with exactly this name.

        Args:
            string: ``cpu``, ``cuda``, ``disk``, ``mps`` or ``xpu``, in lower case.

        Raises:
            ValueError: anything else, values that are no strings included.
        """
        if isinstance(string, str):
            for member in DeviceType:
                if member.value == string:
                    return member
        known = ", ".join(str(member) for member in DeviceType)
        raise ValueError(f"Unknown device type string {_quoted(string)}: use one of {known}")


# Positional arguments, unlike our other values: Haystack code writes Device(type, id) and
# DeviceMap({...}), and shall run unchanged.
@dataclass(frozen=True, slots=True, repr=False)
class Device:
    """One device: a type and, where a machine has several of it, an id.

    Args:
        type: kind of device.
        id: 0 to ``MAX_DEVICE_ID``, or None to leave the choice to the framework.

    Raises:
        TypeError: ``type`` is no ``DeviceType``, or ``id`` is neither an int nor None. A bool is
            no id.
        ValueError: ``id`` is out of range.
    """

    type: DeviceType
    id: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.type, DeviceType):
            raise TypeError(
                f"Device type must be a DeviceType, got {_quoted(self.type)}: "
                "use Device.from_str for text"
            )
        if self.id is None:
            return
        # Exactly int: a bool would print as "cuda:True".
        if type(self.id) is not int:
            raise TypeError(f"Device id must be an int or None, got {_quoted(self.id)}")
        if self.id < 0:
            raise ValueError(f"Device id must be >= 0, got {_quoted(self.id)}")
        if self.id > MAX_DEVICE_ID:
            raise ValueError(f"Device id must be <= {MAX_DEVICE_ID}, got {_quoted(self.id)}")

    def __str__(self) -> str:
        """Return ``type`` or ``type:id``, the text that ``from_str`` reads."""
        return str(self.type) if self.id is None else f"{self.type}:{self.id}"

    def __repr__(self) -> str:
        return f"Device.from_str({str(self)!r})"

    @staticmethod
    def cpu() -> Device:
        """Return the CPU, without an id."""
        return Device(DeviceType.CPU)

    @staticmethod
    def gpu(id: int = 0) -> Device:
        """Return a CUDA or ROCm GPU; ``id`` is its ordinal. Raises as ``Device`` does."""
        return Device(DeviceType.GPU, id)

    @staticmethod
    def disk() -> Device:
        """Return the disk, without an id. It can be a part of a device map only."""
        return Device(DeviceType.DISK)

    @staticmethod
    def mps() -> Device:
        """Return Apple's Metal device, without an id."""
        return Device(DeviceType.MPS)

    @staticmethod
    def xpu() -> Device:
        """Return Intel's XPU, without an id."""
        return Device(DeviceType.XPU)

    @staticmethod
    def from_str(string: str) -> Device:
        """Read ``type`` or ``type:id``.

        Args:
            string: for example ``cpu``, ``cuda:1`` or ``mps``; see the module for the grammar.

        Raises:
            TypeError: ``string`` is no str.
            ValueError: unknown type, or an id that is not ASCII digits within range.
        """
        if not isinstance(string, str):
            raise TypeError(f"Device must be given as a string, got {_quoted(string)}")
        type_text, separator, id_text = string.partition(":")
        if separator and ":" in id_text:
            raise ValueError(
                f"Device string {_quoted(string)} has more than one ':': write 'type' or 'type:id'"
            )
        device_type = DeviceType.from_str(type_text)
        return Device(device_type, _parse_id(id_text) if separator else None)

    @staticmethod
    def from_torch(device: torch.device) -> Device:
        """Return what a ``torch.device`` names.

        Args:
            device: of a type that this module knows. Its index, None included, becomes the id.

        Raises:
            TypeError: no ``torch.device``.
            ValueError: a type such as ``meta``, or an index that torch wrapped to under 0.
        """
        if not _is_torch_device(device):
            raise TypeError(f"Device must be given as a torch.device, got {_quoted(device)}")
        # index is annotated as int, but is None for torch.device("cuda").
        return Device(DeviceType.from_str(device.type), device.index)

    def canonical(self) -> Device:
        """Return the device as placement names it: accelerators without an id get id 0.

        ``cuda`` and ``cuda:0`` are different values but the same place when a framework has not
        been told otherwise. Devices of type cpu and disk are returned unchanged.
        """
        match self.type:
            case DeviceType.GPU | DeviceType.MPS | DeviceType.XPU:
                return Device(self.type, 0) if self.id is None else self
            case DeviceType.CPU | DeviceType.DISK:
                return self
            case _:
                assert_never(self.type)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class DeviceMap:
    """Devices for the parts of one model, by module-path prefix; the key ``""`` is the whole model.

    Reads like a mapping, except that iteration gives ``(key, device)`` pairs, as in Haystack. The
    order of the entries is kept and shows in ``first_device`` and ``to_dict``, but takes no part
    in equality or hash. The map holds a copy: later changes to the argument do not show. An empty
    map is valid and falsy. Whether the keys fit a model is checked when that model is registered.

    Args:
        mapping: a device for each key; none by default.

    Raises:
        TypeError: no mapping, a key that is no str, or a value that is no ``Device``.
    """

    mapping: Mapping[str, Device] = field(default_factory=dict)
    """Read-only view of the entries."""

    def __post_init__(self) -> None:
        entries = dict(_checked_items(self.mapping, "DeviceMap"))
        for key, device in entries.items():
            if not isinstance(device, Device):
                raise TypeError(
                    f"Device map value for key {_quoted(key)} must be a Device, "
                    f"got {_quoted(device)}: use DeviceMap.from_dict for text"
                )
        object.__setattr__(self, "mapping", MappingProxyType(entries))

    def __getitem__(self, key: str) -> Device:
        """Return the device of exactly this key. Raises ``KeyError`` if there is none."""
        return self.mapping[key]

    def __contains__(self, key: object) -> bool:
        return key in self.mapping

    def __iter__(self) -> Iterator[tuple[str, Device]]:
        """Iterate over ``(key, device)`` pairs in the order given."""
        return iter(self.mapping.items())

    def __len__(self) -> int:
        return len(self.mapping)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DeviceMap):
            return NotImplemented
        return self.mapping == other.mapping

    def __hash__(self) -> int:
        # A set, because equality ignores the order of the entries.
        return hash(frozenset(self.mapping.items()))

    def __repr__(self) -> str:
        return f"DeviceMap.from_dict({self.to_dict()!r})"

    def __reduce__(self) -> tuple[type[DeviceMap], tuple[dict[str, Device]]]:
        # The read-only view cannot be pickled or copied; its contents can.
        return DeviceMap, (dict(self.mapping),)

    def get(self, key: str) -> Device | None:
        """Return the device of exactly this key, or None."""
        return self.mapping.get(key)

    def keys(self) -> KeysView[str]:
        """Return the keys in the order given."""
        return self.mapping.keys()

    def values(self) -> ValuesView[Device]:
        """Return the devices in the order given, repeats included."""
        return self.mapping.values()

    def items(self) -> ItemsView[str, Device]:
        """Return the ``(key, device)`` pairs in the order given."""
        return self.mapping.items()

    @property
    def first_device(self) -> Device | None:
        """Device of the first entry, which may be the disk; None if the map is empty."""
        return next(iter(self.mapping.values()), None)

    def to_dict(self) -> dict[str, str]:
        """Return ``{key: device string}`` in the order given."""
        return {key: str(device) for key, device in self}

    @staticmethod
    def from_dict(data: Mapping[str, str]) -> DeviceMap:
        """Read what ``to_dict`` wrote.

        Args:
            data: a device string for each key.

        Raises:
            TypeError: no mapping, or a key or value that is no str.
            ValueError: a value that is no device string. Both texts name the key.
        """
        devices: dict[str, Device] = {}
        for key, text in _checked_items(data, "Device map"):
            if not isinstance(text, str):
                raise TypeError(
                    f"Device map value for key {_quoted(key)} must be a string, got {_quoted(text)}"
                )
            devices[key] = _named(key, Device.from_str, text)
        return DeviceMap(devices)

    def to_hf(self) -> dict[str, int | str]:
        """Return the map as Hugging Face takes it: cuda devices are ordinals, others strings.

        Raises:
            ValueError: a cuda device without an id. The text names the key.
        """
        return {key: _to_hf_entry(key, device) for key, device in self}

    @staticmethod
    def from_hf(hf_device_map: Mapping[str, object]) -> DeviceMap:
        """Read a Hugging Face device map, for example a loaded model's ``hf_device_map``.

        Args:
            hf_device_map: for each key a GPU ordinal, a device string or a ``torch.device``.

        Raises:
            TypeError: no mapping (such as the word ``auto``), a key that is no str, or a value of
                another type, bool included.
            ValueError: a value of these types that names no device, such as -1, ``auto`` or
                ``meta``. Both texts name the key.
        """
        return DeviceMap(
            {
                key: _from_hf_entry(key, value)
                for key, value in _checked_items(hf_device_map, "Hugging Face device map")
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentDevice:
    """What a component runs on: either one device or a device map, never both or neither.

    Build one with ``from_single``, ``from_multiple``, ``from_str``, ``from_dict`` or
    ``resolve_device``.

    Args:
        single: the one device; not the disk, which cannot execute anything.
        multiple: the map; it may be empty and it may name the disk.

    Raises:
        TypeError: a field of another type.
        ValueError: both or neither given, or ``single`` is the disk.
    """

    single: Device | None = None
    multiple: DeviceMap | None = None

    def __post_init__(self) -> None:
        if self.single is not None and not isinstance(self.single, Device):
            raise TypeError(f"Single device must be a Device, got {_quoted(self.single)}")
        if self.multiple is not None and not isinstance(self.multiple, DeviceMap):
            raise TypeError(f"Multiple devices must be a DeviceMap, got {_quoted(self.multiple)}")
        if (self.single is None) == (self.multiple is None):
            raise ValueError(
                "The component device can neither be empty nor contain both a single device "
                "and a device map: give exactly one of them"
            )
        if self.single is not None and self.single.type is DeviceType.DISK:
            raise ValueError(
                "The disk device can only be used as a part of device maps: "
                "a single device has to be able to run a model"
            )

    @staticmethod
    def from_single(device: Device) -> ComponentDevice:
        """Return the union that holds one device.

        Raises:
            TypeError: ``device`` is no ``Device``.
            ValueError: ``device`` is the disk.
        """
        if not isinstance(device, Device):
            raise TypeError(f"Single device must be a Device, got {_quoted(device)}")
        return ComponentDevice(single=device)

    @staticmethod
    def from_multiple(device_map: DeviceMap) -> ComponentDevice:
        """Return the union that holds a device map. Raises ``TypeError`` if it is no DeviceMap."""
        if not isinstance(device_map, DeviceMap):
            raise TypeError(f"Multiple devices must be a DeviceMap, got {_quoted(device_map)}")
        return ComponentDevice(multiple=device_map)

    @staticmethod
    def from_str(device_str: str) -> ComponentDevice:
        """Return the union that holds the one device a string names.

        Raises:
            TypeError: ``device_str`` is no str.
            ValueError: it names no device, or the disk.
        """
        return ComponentDevice(single=Device.from_str(device_str))

    @staticmethod
    def from_torch(device: torch.device) -> ComponentDevice:
        """Return the union that holds what a ``torch.device`` names.

        Raises:
            TypeError: no ``torch.device``.
            ValueError: as ``Device.from_torch``.
        """
        return ComponentDevice(single=Device.from_torch(device))

    @property
    def has_multiple_devices(self) -> bool:
        """Whether this is a device map, even an empty one or one with a single entry."""
        return self.multiple is not None

    @property
    def first_device(self) -> ComponentDevice:
        """The device that inputs go to: the single one, or the first of the map that is no disk.

        Raises:
            ValueError: the map has no such device.
        """
        match self._content:
            case Device():
                return self
            case DeviceMap() as device_map:
                for device in device_map.values():
                    if device.type is not DeviceType.DISK:
                        return ComponentDevice(single=device)
                raise ValueError(
                    "No usable device found in the device map; disk devices cannot be used "
                    "to run a model. Add an entry with another device"
                )
            case content:
                assert_never(content)

    def to_torch(self) -> torch.device:
        """Return the single device as a ``torch.device``.

        Raises:
            ImportError: torch is not installed.
            ValueError: this is a device map.
        """
        device = self._single_for("PyTorch")
        try:
            import torch
        except ImportError as error:
            raise ImportError(
                "to_torch needs PyTorch: install the package 'torch', or use to_torch_str"
            ) from error
        return torch.device(str(device))

    def to_torch_str(self) -> str:
        """Return the single device as torch spells it. Raises ``ValueError`` for a device map."""
        return str(self._single_for("PyTorch"))

    def to_spacy(self) -> int:
        """Return the single device as spaCy's GPU ordinal; -1 for every type but cuda.

        Raises:
            ValueError: this is a device map, or a cuda device without an id.
        """
        device = self._single_for("spaCy")
        if device.type is not DeviceType.GPU:
            return -1
        if device.id is None:
            raise ValueError(
                "spaCy takes a GPU by its number and 'cuda' has none: write the id, "
                "for example 'cuda:0'"
            )
        return device.id

    def to_hf(self) -> str | dict[str, int | str]:
        """Return what Hugging Face takes: a string for a single device, a dict for a map.

        A single cuda device is a string (``cuda:1``), in a map it is an ordinal (``1``).

        Raises:
            ValueError: a cuda device without an id in a map.
        """
        match self._content:
            case Device() as device:
                return str(device)
            case DeviceMap() as device_map:
                return device_map.to_hf()
            case content:
                assert_never(content)

    def update_hf_kwargs(self, hf_kwargs: Mapping[str, Any], *, overwrite: bool) -> dict[str, Any]:
        """Return a copy of keyword arguments for Hugging Face that also says where to run.

        The key is ``device`` for a single device and ``device_map`` for a map. One of the two
        being present counts as the caller's choice, even with the value None.

        Args:
            hf_kwargs: the caller's arguments; not changed.
            overwrite: False keeps the caller's choice. True replaces it and removes the other of
                the two keys, because Hugging Face refuses both together.

        Raises:
            ValueError: as ``to_hf``, when this device is what gets written.
        """
        kwargs = dict(hf_kwargs)
        if not overwrite and ("device" in kwargs or "device_map" in kwargs):
            return kwargs
        own, sibling = (
            ("device_map", "device") if self.has_multiple_devices else ("device", "device_map")
        )
        kwargs.pop(sibling, None)
        kwargs[own] = self.to_hf()
        return kwargs

    def to_dict(self) -> dict[str, str | dict[str, str]]:
        """Return Haystack's JSON shape.

        ``{"type": "single", "device": "cuda:1"}`` or
        ``{"type": "multiple", "device_map": {"encoder": "cuda:0", "lm_head": "cpu"}}``.
        """
        match self._content:
            case Device() as device:
                return {"type": "single", "device": str(device)}
            case DeviceMap() as device_map:
                return {"type": "multiple", "device_map": device_map.to_dict()}
            case content:
                assert_never(content)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ComponentDevice:
        """Read what ``to_dict`` wrote. Other keys than those of the shape are ignored.

        Raises:
            KeyError: ``type``, or the key that belongs to it, is missing.
            TypeError: no mapping, or a device or device map of the wrong type.
            ValueError: unknown ``type``, text that names no device, or a single disk.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"Component device data must be a mapping, got {_quoted(data)}")
        match data["type"]:
            case "single":
                return ComponentDevice.from_str(data["device"])
            case "multiple":
                return ComponentDevice(multiple=DeviceMap.from_dict(data["device_map"]))
            case unknown:
                raise ValueError(
                    f"Unknown component device type {_quoted(unknown)} in serialized data: "
                    "use 'single' or 'multiple'"
                )

    @staticmethod
    def resolve_device(
        device: DeviceLike = None,
        *,
        probe: AvailabilityProbe | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> ComponentDevice:
        """Same as the function ``resolve_device`` of this module."""
        return resolve_device(device, probe=probe, environ=environ)

    @property
    def _content(self) -> Device | DeviceMap:
        if self.single is not None:
            return self.single
        # __post_init__ let exactly one of the two through.
        return cast(DeviceMap, self.multiple)

    def _single_for(self, target: str) -> Device:
        match self._content:
            case Device() as device:
                return device
            case DeviceMap():
                raise ValueError(
                    f"Only single devices can be converted to {target} format: "
                    "this is a device map; first_device is its first usable device"
                )
            case content:
                assert_never(content)


DeviceLike: TypeAlias = ComponentDevice | Device | DeviceMap | str | None
"""What stands for a device in calls: a value, a device string, or None for automatic choice."""

AvailabilityProbe: TypeAlias = Callable[[DeviceType], bool]
"""Answers whether this machine has a device of a type; asked for GPU, XPU and MPS only."""


def resolve_device(
    value: DeviceLike = None,
    *,
    probe: AvailabilityProbe | None = None,
    environ: Mapping[str, str] | None = None,
) -> ComponentDevice:
    """Turn whatever a caller gave as a device into a ``ComponentDevice``.

    None takes the first type that is available, in this order: ``cuda:0``, ``xpu``, ``mps``,
    ``cpu``. A named device is not checked for being there.

    Args:
        value: a ``ComponentDevice`` is returned as it is; a ``Device``, ``DeviceMap`` or device
            string is wrapped.
        probe: asked what is available when ``value`` is None. By default torch is asked, if it is
            installed; without it only the cpu is available.
        environ: where ``MODELYARD_MPS_ENABLED`` and ``MODELYARD_XPU_ENABLED`` are read; by default
            the process environment. ``false``, ``0`` or ``no``, in any case, turns the type off
            for automatic choice.

    Raises:
        ValueError: text that names no device, the disk as single device, or any other type.
    """
    match value:
        case None:
            chosen = _default_device(
                _torch_reports if probe is None else probe,
                os.environ if environ is None else environ,
            )
            return ComponentDevice(single=chosen)
        case ComponentDevice():
            return value
        case Device():
            return ComponentDevice(single=value)
        case DeviceMap():
            return ComponentDevice(multiple=value)
        case str():
            return ComponentDevice.from_str(value)
        case _:
            # Callers without a type checker get here.
            raise ValueError(
                f"Invalid component device type {type(value).__name__!r}. Must either be None "
                "or ComponentDevice, or a Device, a DeviceMap or a device string such as 'cuda:0'"
            )


def _default_device(probe: AvailabilityProbe, environ: Mapping[str, str]) -> Device:
    if probe(DeviceType.GPU):
        return Device.gpu()
    # The switch comes first: a type that is turned off may be so because asking for it does harm.
    if _enabled("MODELYARD_XPU_ENABLED", environ) and probe(DeviceType.XPU):
        return Device.xpu()
    if _enabled("MODELYARD_MPS_ENABLED", environ) and probe(DeviceType.MPS):
        return Device.mps()
    return Device.cpu()


def _enabled(variable: str, environ: Mapping[str, str]) -> bool:
    return environ.get(variable, "").lower() not in _DISABLING_TEXTS


def _torch_reports(device_type: DeviceType) -> bool:
    """Whether torch is installed and sees a device of this type."""
    try:
        import torch
    except ImportError:
        return False
    match device_type:
        case DeviceType.GPU:
            return torch.cuda.is_available()
        case DeviceType.XPU:
            # Older releases have no torch.xpu.
            xpu = getattr(torch, "xpu", None)
            return xpu is not None and bool(xpu.is_available())
        case DeviceType.MPS:
            return torch.backends.mps.is_available()
        case DeviceType.CPU:
            return True
        case DeviceType.DISK:
            return False
        case _:
            assert_never(device_type)


def _parse_id(text: str) -> int:
    # Not str.isdigit, which lets other scripts' digits through.
    if re.fullmatch("[0-9]+", text):
        significant = text.lstrip("0") or "0"
        # By length first: int() refuses thousands of digits with a text of its own.
        if len(significant) > len(str(MAX_DEVICE_ID)) or int(significant) > MAX_DEVICE_ID:
            raise ValueError(f"Device id must be <= {MAX_DEVICE_ID}, got {_shortened(significant)}")
        return int(significant)
    if re.fullmatch("-0*[1-9][0-9]*", text):
        raise ValueError(f"Device id must be >= 0, got {_shortened(text)}")
    # Quotes only where they show something, such as a space: Haystack writes none.
    shown = _shortened(text) if re.fullmatch("[!-~]+", text) else _quoted(text)
    raise ValueError(
        f"Device id must be an integer, got {shown}: "
        f"write ASCII digits only, 0 to {MAX_DEVICE_ID}, for example 'cuda:0'"
    )


def _to_hf_entry(key: str, device: Device) -> int | str:
    if device.type is not DeviceType.GPU:
        return str(device)
    if device.id is None:
        raise ValueError(
            f"Hugging Face device maps take GPUs by number and 'cuda' for key {_quoted(key)} "
            "has none: write the id, for example 'cuda:0'"
        )
    return device.id


def _from_hf_entry(key: str, value: object) -> Device:
    # Exactly int: True is an int to Python, and no GPU.
    if type(value) is int:
        return _named(key, Device.gpu, value)
    if isinstance(value, str):
        return _named(key, Device.from_str, value)
    if _is_torch_device(value):
        return _named(key, Device.from_torch, value)
    raise TypeError(
        f"Couldn't convert HuggingFace device map - unexpected device {_shortened(str(value))!r} "
        f"for {_quoted(key)}: use a GPU number, a device string or a torch.device"
    )


def _is_torch_device(value: object) -> bool:
    # A torch.device can only come from a torch that is imported already.
    torch_device = getattr(sys.modules.get("torch"), "device", None)
    return torch_device is not None and isinstance(value, torch_device)


def _named(key: str, read: Callable[[Any], Device], value: object) -> Device:
    """Read a device, adding the map's key to the text of a refusal."""
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"{error} (device map key {_quoted(key)})") from error


def _checked_items(mapping: object, what: str) -> Iterator[tuple[str, Any]]:
    """Yield the items of a mapping, refusing anything else and keys that are no str."""
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{what} must be made from a mapping, got {_quoted(mapping)}")
    for key, value in mapping.items():
        if not isinstance(key, str):
            raise TypeError(f"{what} keys must be strings, got {_quoted(key)}")
        yield key, value


def _quoted(value: object) -> str:
    return _shortened(repr(value))


def _shortened(text: str) -> str:
    """Bound what an error repeats: texts end up in logs and in size-limited gRPC trailers."""
    return text if len(text) <= _QUOTE_LIMIT else f"{text[:_QUOTE_LIMIT]}..."
