"""Counts the memory a module holds, and watches whether it comes back."""

from __future__ import annotations

from itertools import chain
from typing import Any
from weakref import ReferenceType, ref

import torch

__all__ = ["unique_storage_bytes", "witnesses"]


def unique_storage_bytes(module: torch.nn.Module) -> int:
    """Returns the bytes of all storages behind a module's parameters and buffers, each once.

    Tied parameters and views of one tensor share a storage and count once; a view counts its whole
    storage, because that is what it keeps alive. Mapped files count like any other memory: to be
    fast they must be resident. Tensors on the meta device have no storage and count zero.

    Args:
        module: any module; devices and dtypes may be mixed.
    """
    sizes: dict[tuple[torch.device, int], int] = {}
    for tensor in _tensors(module):
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            if storage.nbytes():
                sizes[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def witnesses(module: torch.nn.Module) -> tuple[ReferenceType[Any], ...]:
    """Returns weak references to a module and to its parameters and buffers.

    Once all are dead nothing in this process can reach the weights any more.
    """
    return (ref(module), *(ref(tensor) for tensor in _tensors(module)))


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return list(chain(module.parameters(), module.buffers()))
