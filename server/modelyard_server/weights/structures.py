"""What a module consists of: its tensors with all their names, and where it can be cut.

Works on torch's meta device as well: only names, shapes and classes are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from modelyard_server.weights.storages import named_tensors

__all__ = ["NamedTensor", "blocks_of", "is_called", "is_whole", "tensors_of", "units_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTensor:
    """A parameter or buffer with all its names, in the order of the model; at least one."""

    names: tuple[str, ...]
    tensor: torch.Tensor
    is_buffer: bool


def tensors_of(module: torch.nn.Module) -> tuple[NamedTensor, ...]:
    """The distinct parameters and buffers of a module, in the order of the model.

    Tied ones are one tensor: the same object under several names.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in named_tensors(module):
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    parameters = {id(parameter) for parameter in module.parameters()}
    return tuple(
        NamedTensor(names=tuple(names[key]), tensor=tensor, is_buffer=key not in parameters)
        for key, tensor in tensors.items()
    )


def is_whole(module: torch.nn.Module) -> bool:
    """True if a module uses tensors of its parts without calling them.

    torch's attention and encoder layer do; what moves tensors when a module is called would come
    too late for their parts.
    """
    return isinstance(module, torch.nn.MultiheadAttention | torch.nn.TransformerEncoderLayer)


def is_called(module: torch.nn.Module) -> bool:
    """False if a module only holds others, or tensors, and has nothing to be called: lists, dicts.

    What is done when a module is called is never done for it.
    """
    return type(module).forward is not torch.nn.Module.forward or "forward" in vars(module)


def units_of(module: torch.nn.Module) -> tuple[str, ...]:
    """Paths of the modules whose tensors are used together, in the order of the model.

    A module with tensors of its own, or one that is_whole. A unit may lie below another: each
    tensor belongs to the nearest. What is in a list of tensors is the own of whoever has the list.
    """

    def takes(part: torch.nn.Module) -> bool:
        return is_called(part) and _has_tensors(part)

    return _outermost(module, stops=is_whole, takes=takes)


def blocks_of(
    module: torch.nn.Module,
    *,
    is_block: Callable[[torch.nn.Module], bool],
    splits: Callable[[torch.nn.Module], bool],
) -> tuple[str, ...]:
    """Paths of the modules that are not to be cut, in the order of the model; none below another.

    Going down from the root: a module that the caller calls a block is one, and so is a module with
    tensors of its own, because its own code works on them: unless it must be split because a block
    of the caller's lies below it. Modules without tensors are left out.

    Args:
        module: the model.
        is_block: says of a module that it is a block.
        splits: says of a module that has tensors of its own that it is gone into nevertheless.
    """

    def stops(part: torch.nn.Module) -> bool:
        return is_block(part) or is_whole(part) or (_has_tensors(part) and not splits(part))

    return _outermost(module, stops=stops, takes=lambda part: False)


def _outermost(
    module: torch.nn.Module,
    *,
    stops: Callable[[torch.nn.Module], bool],
    takes: Callable[[torch.nn.Module], bool],
) -> tuple[str, ...]:
    found: list[str] = []
    pending = [("", module)]
    while pending:
        path, part = pending.pop()
        if stops(part):
            if next(named_tensors(part), None) is not None:
                found.append(path)
            continue
        if takes(part):
            found.append(path)
        prefix = f"{path}." if path else ""
        # All places of a part that is used at several: each name of a tensor is below a unit.
        pending += [
            (prefix + name, child)
            for name, child in reversed(part._modules.items())
            if child is not None
        ]
    return tuple(found)


def _has_tensors(module: torch.nn.Module) -> bool:
    tensors = (*module._parameters.values(), *module._buffers.values())
    if any(tensor is not None for tensor in tensors):
        return True
    held = (part for part in module.children() if not is_called(part))
    return any(_has_tensors(part) for part in held)
