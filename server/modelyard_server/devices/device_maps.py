"""What a device map means for a model: every tensor gets one device, or the map is refused.

Keys are module-path prefixes on whole dotted components, the longest one that covers a tensor
wins, and "" is the rest. A map is checked against the model's real tensors, because what is wrong
with it must show when the model is registered and not when it first runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from modelyard_server.devices.placed import enumerated, prefixes_of
from modelyard_server.errors import Reason, Refusal, Violation
from modelyard_server.runtimes.targets import (
    Structure,
    Target,
    resident_device,
)

__all__ = ["expand_map", "placement_invalid"]

_NAMED: Final = 5
"""Most parameters or keys that one text names."""
_LONGEST_TYPO: Final = 128


def expand_map(
    keys: Mapping[str, int],
    structure: Structure,
    *,
    home: int,
    disk: frozenset[int],
    device_names: Sequence[str],
) -> Target:
    """The target that a map is for a model.

    Buffers that no key covers are no reason to refuse a map, because other libraries' maps are
    often written without them: they go with the first tensor of the closest module around them.

    Args:
        keys: position by prefix.
        structure: what the model is made of.
        home: position of the home device.
        disk: positions of the devices that are disks.
        device_names: of all devices, by position; for texts.

    Raises:
        Refusal: PLACEMENT_INVALID. Parameters that no key covers, keys that cover nothing, a tied
            parameter on two devices, or a parameter on the disk that cannot stay there.
    """
    names = [name for tensor in structure.tensors for name in tensor.names]
    texts = [*_unmatched(keys, names), *_uncovered(keys, structure)]
    if texts:
        raise placement_invalid(*texts)
    devices: dict[str, int] = {}
    for tensor in structure.tensors:
        found = {name: _key_of(name, keys) for name in tensor.names}
        mapped = {name: keys[key] for name, key in found.items() if key is not None}
        if len(set(mapped.values())) > 1:
            (first, one), (second, other) = _two_devices(mapped)
            raise placement_invalid(
                f"{first} and {second} are one tied parameter, and the map places them on "
                f"{device_names[one]} and {device_names[other]}"
            )
        if mapped:
            devices |= dict.fromkeys(tensor.names, next(iter(mapped.values())))
    firsts: dict[str, int] = {}
    for name, device in devices.items():
        for path in prefixes_of(name):
            firsts.setdefault(path, device)
    for tensor in structure.tensors:
        if tensor.names[0] not in devices:
            device = _beside(tensor.names[0], firsts, home)
            devices |= dict.fromkeys(tensor.names, device)
    # In the order of the model, which the buffers have left.
    target = Target(home=home, parts=enumerated({name: devices[name] for name in names}))
    for tensor in structure.tensors:
        if not tensor.as_filed and resident_device(target, tensor, disk) in disk:
            raise placement_invalid(
                f"{tensor.names[0]} cannot be on the disk: the model's files do not hold it in "
                "the form in which it is loaded"
            )
    return target


def placement_invalid(*texts: str) -> Refusal:
    """The refusal of a placement, with one violation for each text."""
    return Refusal(
        Reason.PLACEMENT_INVALID,
        "; ".join(texts),
        violations=tuple(Violation("placement", text) for text in texts),
    )


def _unmatched(keys: Mapping[str, int], names: Sequence[str]) -> Iterable[str]:
    """What to say of keys that cover no tensor."""
    paths = dict.fromkeys(path for name in names for path in prefixes_of(name))
    wrong = [key for key in keys if key not in paths]
    for key in wrong[:_NAMED]:
        near = difflib.get_close_matches(key[:_LONGEST_TYPO], paths, n=1)
        advice = f"; did you mean {near[0]!r}?" if near else ""
        yield f"key {_quoted(key)} matches nothing in the model{advice}"
    if len(wrong) > _NAMED:
        yield f"{len(wrong) - _NAMED} more keys match nothing"


def _uncovered(keys: Mapping[str, int], structure: Structure) -> Iterable[str]:
    """What to say of parameters that no key covers."""
    missing = [
        tensor.names[0]
        for tensor in structure.tensors
        if not tensor.is_buffer and all(_key_of(name, keys) is None for name in tensor.names)
    ]
    if missing:
        total = sum(not tensor.is_buffer for tensor in structure.tensors)
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        yield (
            f"no key covers {len(missing)} of {total} parameters: "
            f'{", ".join(missing[:_NAMED])}{more}; the key "" covers the rest'
        )


def _two_devices(mapped: Mapping[str, int]) -> tuple[tuple[str, int], tuple[str, int]]:
    first = next(iter(mapped.items()))
    return first, next(item for item in mapped.items() if item[1] != first[1])


def _beside(name: str, firsts: Mapping[str, int], home: int) -> int:
    """Device of the first placed tensor of the closest module around a tensor.

    Args:
        name: of the tensor.
        firsts: by module path, the device of the first tensor below it.
        home: where to go if nothing is placed.
    """
    around = reversed(tuple(prefixes_of(name)))
    return next((firsts[path] for path in around if path in firsts), home)


def _key_of(name: str, keys: Mapping[str, int]) -> str | None:
    """The longest key that covers a name. Looks keys up: maps come from clients and can be long."""
    return next((path for path in reversed(tuple(prefixes_of(name))) if path in keys), None)


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_TYPO else f"{text[:_LONGEST_TYPO]}...")
