"""Puts a loaded module onto its devices, in parts, and makes it run across them.

By torch's own forward hooks. A module all of whose tensors are on one device runs there: its inputs
are brought to it when it is called, and what it gives is brought home. Everything else, above all
the code between such modules, runs on the home device. In a chain, where one module's output goes
straight to the next, the output stays where it is and the next fetches it.

Tensors that live on the disk stay in the mapped file. The module that uses them (a unit) brings
them in when it is called: on host memory they are read where they are mapped and their pages given
back afterwards; for an accelerator they are copied to it and dropped afterwards. The same is done
for the tensors of a module that an explicit map has cut through its middle.

What hooks cannot see is code that uses a tensor of a module without calling the module. Of torch's
own classes that do so we know (structures.is_whole); for others such a cut fails when the model is
run, with torch's error about tensors on different devices.

No hook refers to the module it is on: an unloaded model is freed by reference counts alone.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError, StopCheck
from modelyard_server.runtimes.targets import (
    DISK,
    Place,
    Structure,
    resident_device,
    residents_below,
    staging_bytes,
    unit_of,
    visitors,
)
from modelyard_server.weights.mapping import Extent, joined, populate, release
from modelyard_server.weights.model_files import shown
from modelyard_server.weights.storages import Spread
from modelyard_server.weights.structures import is_called, is_whole

__all__ = ["check_disk", "disk_of", "dispatch"]


def disk_of(place: Place) -> frozenset[int]:
    """Positions of a place's devices that are disks."""
    return frozenset(device for device, name in place.torch_devices.items() if name == DISK)


def check_disk(structure: Structure, place: Place) -> tuple[int, ...]:
    """Indices of the structure's tensors that live on the disk.

    Raises:
        ModelFilesError: the file does not hold one of them in the form in which it is used.
    """
    disk = disk_of(place)
    found = []
    for index, part in enumerate(structure.tensors):
        if resident_device(place.target, part, disk) in disk:
            if not part.as_filed:
                raise ModelFilesError(
                    f"{shown(part.names[0])} cannot stay on the disk: the model's file holds it in "
                    "another form"
                )
            found.append(index)
    return tuple(found)


def dispatch(
    module: torch.nn.Module,
    structure: Structure,
    place: Place,
    *,
    extents: Mapping[int, Extent],
    lists_are_chains: bool,
    stop: StopCheck,
) -> Spread:
    """Puts each tensor of a module onto its device and makes its forward work.

    Args:
        module: on host memory, its weights bound to the mapped file; nothing may require gradients.
        structure: of the module.
        place: which part goes where.
        extents: where in the file the tensors lie, by index in the structure. Needed of those that
            live on the disk.
        lists_are_chains: the elements of an nn.ModuleList of blocks are called one after another,
            each with what the last one gave. Always assumed of nn.Sequential.
        stop: asked between tensors.

    Raises:
        ModelFilesError: a tensor that is to stay on the disk is not used as it lies there.
        LoadCancelled: stop said so.
    """
    target, disk = place.target, disk_of(place)
    slots = _slots_of(module)
    _move(slots, structure, place, extents, stop)
    if target.is_whole and place.home != "cpu":
        # All is there already. Some modules keep more than tensors, and move that here.
        module.to(place.home)
    # What lies on the disk is host memory to torch: the library takes that for the model's device
    # and brings inputs there.
    names = {"cpu" if device in disk else place.torch_devices[device] for device in target.devices}
    if len(names) > 1:
        below = residents_below(structure, target, disk)
        chainable = frozenset(structure.blocks if lists_are_chains else ())
        _Movers(module, place, below, chainable).add("", module, stays=False)
    if not target.is_whole:
        _add_visits(module, slots, structure, place, extents)
    return Spread(
        home=target.home,
        home_name=place.home,
        devices=target.devices,
        positions={
            name: resident_device(target, part, disk)
            for part in structure.tensors
            for name in part.names
        },
        staging_bytes=staging_bytes(structure, target, disk),
    )


_Slot = tuple[torch.nn.Module, str]
"""Where a tensor is hung up: module and attribute."""


def _slots_of(module: torch.nn.Module) -> dict[str, _Slot]:
    """Where the tensor of each name is hung up."""
    return {
        f"{path}.{name}" if path else name: (part, name)
        for path, part in module.named_modules(remove_duplicate=False)
        for name in (*part._parameters, *part._buffers)
        if getattr(part, name) is not None
    }


def _move(
    slots: Mapping[str, _Slot],
    structure: Structure,
    place: Place,
    extents: Mapping[int, Extent],
    stop: StopCheck,
) -> None:
    on_disk = frozenset(check_disk(structure, place))
    disk = disk_of(place)
    read: list[Extent] = []
    for index, part in enumerate(structure.tensors):
        if stop():
            raise LoadCancelled
        seats = [slots[name] for name in part.names if name in slots]
        if not seats:
            continue
        held: torch.Tensor = getattr(*seats[0])
        if index in on_disk:
            held = _as_filed(held, extents.get(index), part.names[0])
        else:
            device = place.torch_devices[resident_device(place.target, part, disk)]
            moved = _on(held, device)
            if moved is not held and index in extents:
                read.append(extents[index])
            held = moved
        # Tied tensors may have come untied on the way here: they are one tensor again.
        for owner, attribute in seats:
            if getattr(owner, attribute) is not held:
                setattr(owner, attribute, held)
    if on_disk:
        # The mapping stays, for the disk's sake: pages that were only read to be copied need not.
        read += [extents[index] for index in on_disk if index in extents]
        release(joined(read))


def _as_filed(tensor: torch.Tensor, extent: Extent | None, name: str) -> torch.Tensor:
    """The tensor over its extent: itself if it lies there, else one that holds the same."""
    if not tensor.numel() or (extent is not None and tensor.data_ptr() == extent.address):
        return tensor
    if extent is not None and tensor.nbytes == extent.size_bytes:
        # Libraries copy some that they do not change: biases that might have to be padded.
        filed = torch.frombuffer(
            extent.mapping, dtype=tensor.dtype, count=tensor.numel(), offset=extent.start
        )
        flat = tensor.detach().reshape(-1)
        # As bytes: what is no number does not equal itself.
        if torch.equal(flat.view(torch.uint8), filed.view(torch.uint8)):
            return _like(tensor, filed.view(tensor.shape))
    raise ModelFilesError(f"{shown(name)} cannot stay on the disk: it is changed when it is loaded")


def _on(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The tensor on a device: itself if it is there, else a copy of the same kind."""
    moved = tensor.detach().to(device)
    return tensor if moved.device == tensor.device else _like(tensor, moved)


def _like(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The value as what the tensor is, a parameter or a buffer."""
    # setattr takes only parameters in the place of one, and torch's recurrent modules listen to it.
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(value, requires_grad=False)
    return value


class _Movers:
    """Adds the hooks that bring inputs to modules and outputs home."""

    def __init__(
        self,
        module: torch.nn.Module,
        place: Place,
        below: Mapping[str, frozenset[int]],
        chainable: frozenset[str],
    ) -> None:
        self._place = place
        self._disk = disk_of(place)
        self._below = below
        self._chainable = chainable
        self._places = Counter(id(part) for _, part in module.named_modules(remove_duplicate=False))
        self._done: set[int] = set()

    def add(self, path: str, module: torch.nn.Module, *, stays: bool) -> None:
        """Adds them to a module and to what is below it.

        Args:
            path: of the module.
            module: itself.
            stays: its output is fetched by whoever takes it.
        """
        if path not in self._below or id(module) in self._done:
            # A module without tensors runs wherever its inputs are.
            return
        self._done.add(id(module))
        # Of a module that is used at several places one may not be in a chain.
        stays = stays and self._places[id(module)] == 1
        home = self._place.home
        runs_on = self._runs_on(path)
        is_sequence = type(module).forward is torch.nn.Sequential.forward
        if is_called(module) and not (runs_on is None and is_sequence):
            module.register_forward_pre_hook(_bring(runs_on or home), with_kwargs=True)
            if not stays:
                module.register_forward_hook(_give(home))
        if is_called(module) and (runs_on is not None or is_whole(module)):
            return
        prefix = f"{path}." if path else ""
        chained = is_sequence or (
            isinstance(module, torch.nn.ModuleList)
            and self._chainable.issuperset(prefix + name for name in module._modules)
        )
        following = None
        for name, child in reversed(module._modules.items()):
            if child is not None:
                # If the next one runs at home, the output may as well go there at once.
                elsewhere = following not in (None, home)
                self.add(prefix + name, child, stays=chained and elsewhere)
                if prefix + name in self._below:
                    following = self._runs_on(prefix + name) or home

    def _runs_on(self, path: str) -> str | None:
        """Torch's name of the one device on which all below a path runs; None if it is cut."""
        home = self._place.target.home
        devices = {home if device in self._disk else device for device in self._below[path]}
        return self._place.torch_devices[devices.pop()] if len(devices) == 1 else None


def _bring(device: str) -> Callable[..., Any]:
    def bring(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        return _moved(args, device), _moved(kwargs, device)

    return bring


def _give(device: str) -> Callable[..., Any]:
    def give(module: torch.nn.Module, args: Any, result: Any) -> Any:
        return _moved(result, device)

    return give


def _moved(value: Any, device: str) -> Any:
    """The value with every tensor in it on a device; itself if nothing had to be moved.

    Goes through tuples, lists, dicts and dataclasses (the library's outputs are those). Whatever
    else there is stays as it is, above all caches: each layer's part of one is on its device.
    """
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        # Part of it must not leave host memory, which it knows itself.
        return value.to(device)  # type: ignore[arg-type]  # the stubs know types only
    if isinstance(value, tuple | list):
        items = [_moved(item, device) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if field.init
        }
        changed = {
            name: new for name, old in fields.items() if (new := _moved(old, device)) is not old
        }
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, dict):
        entries = {key: _moved(item, device) for key, item in value.items()}
        if all(entries[key] is value[key] for key in entries):
            return value
        return entries if type(value) is dict else type(value)(entries)
    return value


def _add_visits(
    module: torch.nn.Module,
    slots: Mapping[str, _Slot],
    structure: Structure,
    place: Place,
    extents: Mapping[int, Extent],
) -> None:
    disk = disk_of(place)
    home = torch.empty(0, device=place.home).device
    units = frozenset(structure.units)
    indices = {id(part): index for index, part in enumerate(structure.tensors)}
    guests: dict[int, _Guest] = {}
    done: set[int] = set()
    on_disk: list[Extent] = []
    for path, parts in visitors(structure, place.target, disk).items():
        unit = module.get_submodule(path)
        if id(unit) in done:
            continue
        done.add(id(unit))
        seats: list[tuple[_Guest, list[tuple[torch.nn.Module | None, str]]]] = []
        pages: list[Extent] = []
        for part in parts:
            index = indices[id(part)]
            if index in extents and resident_device(place.target, part, disk) in disk:
                pages.append(extents[index])
            places = [
                slots[name] for name in part.names if name in slots and unit_of(name, units) == path
            ]
            if places and getattr(*places[0]).device != home:
                guest = guests.setdefault(index, _Guest(getattr(*places[0]), place.home))
                # Not the unit itself: the hook that is on it must not hold it.
                seats.append(
                    (guest, [(None if owner is unit else owner, name) for owner, name in places])
                )
        if not seats and not pages:
            continue
        on_disk += pages
        visit = _Visit(seats, joined(pages), place.home)
        # First of all hooks and last of all: others may want the tensors where they are used.
        unit.register_forward_pre_hook(visit.arrive, with_kwargs=True, prepend=True)
        unit.register_forward_hook(visit.leave, always_call=True)
    if on_disk:
        module.register_forward_hook(_sweep(joined(on_disk)), always_call=True)


def _sweep(pages: tuple[Extent, ...]) -> Callable[..., None]:
    """Gives back all that was read: the system maps neighbours of a page that is touched."""

    def sweep(module: torch.nn.Module, args: Any, result: Any) -> None:
        release(pages)

    return sweep


class _Guest:
    """A tensor that lives elsewhere and is copied to the home device while somebody uses it."""

    def __init__(self, resident: torch.Tensor, home: str) -> None:
        self.resident = resident
        self._home = home
        self._copy: torch.Tensor | None = None
        self._users = 0

    def arrive(self) -> torch.Tensor:
        """Returns the copy; leave must follow."""
        if self._copy is None:
            self._copy = _on(self.resident, self._home)
        self._users += 1
        return self._copy

    def leave(self) -> None:
        """Drops the copy if nobody else uses it."""
        self._users -= 1
        if self._users == 0:
            self._copy = None


class _Visit:
    """The two hooks of a unit whose tensors visit the home device.

    Args:
        seats: tensors that are copied, each with the places they are hung up at; None stands for
            the unit itself.
        pages: of the file that are read beforehand and given back when they are not needed.
        home: torch's name of the home device.
    """

    def __init__(
        self,
        seats: list[tuple[_Guest, list[tuple[torch.nn.Module | None, str]]]],
        pages: tuple[Extent, ...],
        home: str,
    ) -> None:
        self._seats = seats
        self._pages = pages
        self._home = home
        self._depth = 0
        self._seated = 0

    def arrive(self, unit: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        self._depth += 1
        if self._depth > 1:
            return None
        populate(self._pages)
        for guest, slots in self._seats:
            copy = guest.arrive()
            self._seated += 1
            for owner, name in slots:
                setattr(unit if owner is None else owner, name, copy)
        if not self._seats:
            return None
        release(self._pages)
        # An input may be a tensor that somebody took from a module without calling it.
        return _moved(args, self._home), _moved(kwargs, self._home)

    def leave(self, unit: torch.nn.Module, args: Any, result: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        # As many as have come: memory may have run out on the way.
        for guest, slots in self._seats[: self._seated]:
            for owner, name in slots:
                setattr(unit if owner is None else owner, name, guest.resident)
            guest.leave()
        self._seated = 0
        release(self._pages)
