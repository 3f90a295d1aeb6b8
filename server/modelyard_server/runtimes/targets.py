"""Where a model is to be loaded, and what of it can be where: plain data that crosses the seams.

A Target says on which device each part of a model lives. Devices are positions in the yard's list;
a runtime learns their torch names from Place, because positions are what is charged and names are
what tensors go to (two logical devices are both "cpu" to torch).

A Structure says what a model is made of, so that a placement can be checked and priced without its
weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

__all__ = [
    "DISK",
    "Place",
    "Structure",
    "Target",
    "TensorPart",
    "covers",
    "owner_of",
    "resident_device",
    "residents_below",
    "staging_bytes",
    "unit_of",
    "visitors",
]

DISK = "disk"
"""What Place.torch_devices calls the disk."""


def covers(prefix: str, name: str) -> bool:
    """True if a module-path prefix covers a name: "" covers all, others whole components only.

    "encoder.layer.1" covers "encoder.layer.1" and "encoder.layer.1.weight", not
    "encoder.layer.10.weight".
    """
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def owner_of(name: str, prefixes: Iterable[str]) -> str | None:
    """The longest of the prefixes that covers a name, or None."""
    return max((prefix for prefix in prefixes if covers(prefix, name)), key=len, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """On which device each part of a model is to live.

    Attributes:
        home: position of the device that takes the inputs, gives the outputs, runs what is on the
            disk, and whose lane runs the model. Never a disk.
        parts: module-path prefix to position, fully enumerated: every tensor of the model is
            covered, the longest prefix on whole components wins. ("", i) alone is the whole model.
    """

    home: int
    parts: tuple[tuple[str, int], ...]

    @staticmethod
    def whole(device: int) -> Target:
        """The whole model on one device."""
        return Target(home=device, parts=(("", device),))

    @property
    def is_whole(self) -> bool:
        """True if the model is on its home alone."""
        return all(device == self.home for _, device in self.parts)

    @property
    def devices(self) -> tuple[int, ...]:
        """Positions of all devices it is on, home first."""
        return tuple(dict.fromkeys((self.home, *(device for _, device in self.parts))))

    def device_of(self, name: str) -> int:
        """Position of the device on which a tensor, named by its path in the model, lives.

        Raises:
            KeyError: no part covers it.
        """
        by_prefix = dict(self.parts)
        for path in (name, *_paths_above(name)):
            if path in by_prefix:
                return by_prefix[path]
        raise KeyError(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A target in the words of torch, for a runtime.

    Attributes:
        target: which part goes where.
        torch_devices: torch's name of each of the target's devices, by position: "cpu", "cuda:1",
            or DISK. Several positions may have one name.
    """

    target: Target
    torch_devices: Mapping[int, str]

    @property
    def home(self) -> str:
        """Torch's name of the home device."""
        return self.torch_devices[self.target.home]

    @staticmethod
    def on(torch_device: str) -> Place:
        """The whole model on one device, at position 0; for callers without a yard."""
        return Place(target=Target.whole(0), torch_devices={0: torch_device})


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPart:
    """A parameter or buffer of a model, tied ones once.

    Attributes:
        names: every path it goes by in the model; at least one.
        size_bytes: of its storage once loaded.
        is_buffer: it is a buffer, not a parameter.
        as_filed: the model's file holds it in exactly this form, so that it can stay on the disk.
    """

    names: tuple[str, ...]
    size_bytes: int
    is_buffer: bool = False
    as_filed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What a model is made of.

    Attributes:
        tensors: its distinct parameters and buffers, in the order of the model.
        blocks: paths of modules that run on one device as a whole, because they mix what comes from
            their parts (residual connections); in the order of the model. Automatic cuts fall
            between them, never inside.
        units: paths of the modules whose tensors are brought in together when they live on the
            disk; each tensor is below one of them or is its own.
    """

    tensors: tuple[TensorPart, ...]
    blocks: tuple[str, ...] = ()
    units: tuple[str, ...] = field(default=())

    @property
    def size_bytes(self) -> int:
        """Bytes of all of it."""
        return sum(tensor.size_bytes for tensor in self.tensors)


def resident_device(target: Target, part: TensorPart, disk: frozenset[int]) -> int:
    """Position of the device that holds a tensor while nothing runs, and is charged for it.

    A tensor that goes by several names lives where the first of them is mapped to. Buffers that the
    file does not hold have nothing on the disk to be read back from, so they live on the home
    device when they are mapped there. A parameter of which that is true cannot be placed so: the
    answer is then the disk, and whoever checks placements refuses it (`as_filed` is False).

    Args:
        target: which part goes where.
        part: one of the structure's tensors.
        disk: positions of the devices that are disks.

    Raises:
        KeyError: the target does not cover its first name.
    """
    device = target.device_of(part.names[0])
    if device in disk and part.is_buffer and not part.as_filed:
        return target.home
    return device


def unit_of(name: str, units: frozenset[str]) -> str:
    """The unit to which a tensor belongs: the nearest above it, or itself if there is none."""
    return next((path for path in _paths_above(name) if path in units), name)


def residents_below(
    structure: Structure, target: Target, disk: frozenset[int]
) -> dict[str, frozenset[int]]:
    """Positions of the devices on which the tensors below each path are.

    Paths are those of all modules with tensors below them, "" for the root, and of the tensors.
    """
    below: dict[str, set[int]] = {}
    for part in structure.tensors:
        device = resident_device(target, part, disk)
        for name in part.names:
            for path in (name, *_paths_above(name)):
                below.setdefault(path, set()).add(device)
    return {path: frozenset(devices) for path, devices in below.items()}


def visitors(
    structure: Structure, target: Target, disk: frozenset[int]
) -> dict[str, tuple[TensorPart, ...]]:
    """What has to be brought to the home device while a unit runs, by path of the unit.

    A module all of whose tensors live on one device, no disk, runs there. Everything else runs at
    home: what is on the disk, and modules that hold tensors themselves but whose parts are spread
    over several devices. What such a unit uses and home does not hold visits home for that time.
    Units without visitors are left out; a tensor that is below no unit is one of its own.
    """
    units = frozenset(structure.units)
    below = residents_below(structure, target, disk)
    found: dict[str, dict[int, TensorPart]] = {}
    for index, part in enumerate(structure.tensors):
        if resident_device(target, part, disk) == target.home:
            continue
        for name in part.names:
            unit = unit_of(name, units)
            if len(below[unit]) > 1 or below[unit] & disk:
                found.setdefault(unit, {})[index] = part
    return {unit: tuple(parts.values()) for unit, parts in found.items()}


def staging_bytes(structure: Structure, target: Target, disk: frozenset[int]) -> int:
    """Bytes that the home device keeps free for tensors that live elsewhere and are used at home.

    The most that visits at one time: a unit's own visitors and those of the units around it, which
    run while it does. 0 if nothing is on the disk and no module is cut through the middle. Charged
    to the home device beside what it holds, whatever kind of device it is: pages of a mapped file
    take memory while they are used.
    """
    found = visitors(structure, target, disk)
    most = 0
    for unit in found:
        together: dict[int, int] = {}
        for path in (unit, *_paths_above(unit)):
            for part in found.get(path, ()):
                together[id(part)] = part.size_bytes
        most = max(most, sum(together.values()))
    return most


def _paths_above(name: str) -> Iterator[str]:
    """Paths of the modules that a tensor or module is below, nearest first, the root "" last."""
    while name:
        name = name.rpartition(".")[0]
        yield name
