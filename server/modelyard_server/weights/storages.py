"""Counts the memory a module holds, by device, and watches whether it comes back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from weakref import ref

import torch

from modelyard_server.runtimes.api import Witness

__all__ = ["Spread", "named_tensors", "unique_storage_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """On which device each tensor of a loaded module lives.

    By name, because torch's word for the device is not enough: two logical devices are both its
    "cpu", and so is what lies on the disk.

    Attributes:
        home: position of the device that takes the inputs and gives the outputs.
        home_name: torch's name of it.
        devices: positions of all devices it is on.
        positions: position by name of the tensor, all of its names. What a module makes for itself
            while it runs has none and lives at home.
        staging_bytes: what the home device keeps free for tensors that are used there and live
            elsewhere.
    """

    home: int
    home_name: str
    devices: tuple[int, ...]
    positions: Mapping[str, int]
    staging_bytes: int = 0

    def measured_bytes(
        self, module: torch.nn.Module, *, aside: Collection[int] = ()
    ) -> dict[int, int]:
        """Bytes of the unique storages behind a module's tensors, by position.

        Every device of the spread has a number. See unique_storage_bytes for what counts.

        Args:
            module: the module.
            aside: addresses of tensors that somebody else counts.
        """
        held: dict[int, list[torch.Tensor]] = {device: [] for device in self.devices}
        for name, tensor in named_tensors(module):
            if not aside or tensor.is_meta or tensor.data_ptr() not in aside:
                held[self.positions.get(name, self.home)].append(tensor)
        sizes = {device: _storage_bytes(tensors) for device, tensors in held.items()}
        sizes[self.home] += self.staging_bytes
        return sizes

    def witnesses(self, module: torch.nn.Module) -> tuple[Witness, ...]:
        """Weak references to a module and to its parameters and buffers, tied ones once.

        Once all are dead nothing in this process can reach the weights any more.
        """
        found = [Witness(device=self.home, reference=ref(module))]
        seen: set[int] = set()
        for name, tensor in named_tensors(module):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                device = self.positions.get(name, self.home)
                found.append(Witness(device=device, reference=ref(tensor)))
        return tuple(found)


def named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields a module's parameters and buffers by each of their names, in the order of the model.

    Modules that are used at several places are gone through at each of them.
    """
    for path, part in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        # Not by named_parameters, which takes ten times as long.
        for name, tensor in chain(part._parameters.items(), part._buffers.items()):
            if tensor is not None:
                yield prefix + name, tensor


def unique_storage_bytes(module: torch.nn.Module) -> int:
    """Returns the bytes of all storages behind a module's parameters and buffers, each once.

    Tied parameters and views of one tensor share a storage and count once; a view counts its whole
    storage, because that is what it keeps alive. Mapped files count like any other memory: to be
    fast they must be resident. Tensors on the meta device have no storage and count zero.

    Args:
        module: any module; devices and dtypes may be mixed.
    """
    return _storage_bytes([tensor for _, tensor in named_tensors(module)])


def _storage_bytes(tensors: list[torch.Tensor]) -> int:
    sizes: dict[tuple[torch.device, int], int] = {}
    for tensor in tensors:
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            if storage.nbytes():
                sizes[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
