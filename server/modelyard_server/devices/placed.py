"""One way to load a model: where each part goes, and what that charges to which device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from modelyard_server.runtimes.api import Price
from modelyard_server.runtimes.targets import Target, resident_device, staging_bytes

__all__ = [
    "PlacedAs",
    "charges_of",
    "enumerated",
    "placed_as",
    "placements_of",
    "prefixes_of",
    "shared_of",
    "shares_on",
    "whole",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedAs:
    """One way to load a model.

    Attributes:
        target: which part goes where.
        charges: bytes by position of the device, what a load reserves: tensors where they live,
            and on the home device what loading and what is on the disk need beside them. All zero
            for a model that could not be priced.
        prefixes: by position the shortest list of subtrees that says what is there, "" for the
            whole model. For people.
        shared: what of the charge to the home device is for tensors that models hold together:
            bytes by identity; see Price.shared. Empty for a model in parts.
    """

    target: Target
    charges: Mapping[int, int]
    prefixes: Mapping[int, tuple[str, ...]]
    shared: Mapping[str, int] = field(default_factory=dict, repr=False)

    def own_charges(self, shared_bytes: int) -> dict[int, int]:
        """The charges without so many bytes of shared tensors on the home device."""
        if not shared_bytes:
            return dict(self.charges)
        home = self.target.home
        return {**self.charges, home: max(0, self.charges[home] - shared_bytes)}


def whole(device: int, price: Price | None) -> PlacedAs:
    """The whole model on one device."""
    return PlacedAs(
        target=Target.whole(device),
        charges={device: 0 if price is None else price.peak_bytes},
        prefixes={device: ("",)},
        shared={} if price is None else price.shared,
    )


def placed_as(target: Target, price: Price | None, disk: frozenset[int]) -> PlacedAs:
    """A target with its charges.

    Args:
        target: whose parts do not overlap.
        price: None if it is not known: then nothing is charged.
        disk: positions of the devices that are disks.
    """
    prefixes: dict[int, tuple[str, ...]] = {}
    for prefix, device in target.parts:
        prefixes[device] = (*prefixes.get(device, ()), prefix)
    return PlacedAs(
        target=target,
        charges=charges_of(target, price, disk),
        prefixes=prefixes,
        shared=price.shared if price is not None and target.is_whole else {},
    )


def charges_of(target: Target, price: Price | None, disk: frozenset[int]) -> Mapping[int, int]:
    """Bytes that a load reserves, by position, for each device of the target.

    Args:
        target: which part goes where.
        price: with a structure, if the target is not whole. None: nothing is charged.
        disk: positions of the devices that are disks.
    """
    charges = dict.fromkeys(target.devices, 0)
    if price is None:
        return charges
    if price.structure is None or target.is_whole:
        return charges | {target.home: price.peak_bytes}
    for tensor in price.structure.tensors:
        charges[resident_device(target, tensor, disk)] += tensor.size_bytes
    charges[target.home] += price.peak_bytes - price.resting_bytes
    charges[target.home] += staging_bytes(price.structure, target, disk)
    return charges


def shared_of(ways: Sequence[PlacedAs]) -> Mapping[str, int]:
    """The tensors that a model holds together with others in those of its ways that share.

    They are the same in all of them: a way shares all that the model's price names, or nothing.
    """
    return next((way.shared for way in ways if way.shared), {})


def shares_on(ways: Sequence[PlacedAs]) -> list[int]:
    """For each way the position of the device on which it shares; -1 if it does not."""
    return [way.target.home if way.shared else -1 for way in ways]


def placements_of(ways: Sequence[PlacedAs], shared_bytes: int) -> list[dict[int, int]]:
    """What each way charges for the model alone.

    Args:
        ways: of one model.
        shared_bytes: what is charged apart, for the ways that share.
    """
    return [way.own_charges(shared_bytes if way.shared else 0) for way in ways]


def enumerated(devices: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """The fewest subtrees that do not overlap and say of every tensor where it is.

    Libraries disagree about maps whose keys overlap, and none gets all of them right: a target
    that we hand on has none.

    Args:
        devices: position by name of the tensor, every name of the model, in its order.

    Returns:
        Prefix and position of each subtree, in the order of the model.
    """
    agreed: dict[str, int | None] = {}
    for name, device in devices.items():
        for prefix in prefixes_of(name):
            if agreed.setdefault(prefix, device) != device:
                agreed[prefix] = None
    parts: dict[str, int] = {}
    for name, device in devices.items():
        # A name is a prefix of itself alone, so there is always one that agrees.
        parts[next(prefix for prefix in prefixes_of(name) if agreed[prefix] is not None)] = device
    return tuple(parts.items())


def prefixes_of(name: str) -> Iterator[str]:
    """All module-path prefixes that cover a name, the shortest first: "", "a", "a.b" for "a.b"."""
    yield ""
    end = name.find(".")
    while end >= 0:
        yield name[:end]
        end = name.find(".", end + 1)
    yield name
