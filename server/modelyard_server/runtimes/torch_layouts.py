"""What the module of a factory consists of, and whether a model's weights fill it.

A layout is made once a factory and its options: it depends on the code alone. What the weights say
(the type of each tensor, and which of tied names they hold) comes on top, for each model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from modelyard_server.runtimes.api import ModelFilesError
from modelyard_server.runtimes.targets import Structure, TensorPart
from modelyard_server.weights.mapping import mapped_as_filed
from modelyard_server.weights.model_files import shown
from modelyard_server.weights.safetensors_files import Checkpoint
from modelyard_server.weights.structures import blocks_of, tensors_of, units_of

__all__ = ["Layout", "LayoutTensor", "compare", "layout_of", "structure_of"]


_MOST_INPUTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutTensor:
    """A parameter or buffer that a factory makes, or a tensor that only its state dict has.

    Attributes:
        names: every name it goes by in the module; those of the state dict if it has none there.
        saved: its names in the state dict; none if it is computed.
        size_bytes: of its storage as it is built; of storages that several share, the first has
            all.
        is_buffer: it is a buffer.
        is_held: the module has it.
    """

    names: tuple[str, ...]
    saved: tuple[str, ...]
    size_bytes: int
    is_buffer: bool
    is_held: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a factory makes.

    Attributes:
        shapes: shapes of the state dict's tensors.
        tensors: what there is, in the order of the module.
        blocks: where it is not cut; see _blocks.
        units: see Structure.
        built_bytes: bytes that building it takes beside the weights: 0 if it can be built on meta.
        input_names: what its forward cannot do without, by name; at most 64.
    """

    shapes: Mapping[str, tuple[int, ...]]
    tensors: tuple[LayoutTensor, ...]
    blocks: tuple[str, ...]
    units: tuple[str, ...]
    built_bytes: int
    input_names: tuple[str, ...] = ()

    @property
    def aliases(self) -> tuple[tuple[str, ...], ...]:
        """Groups of names of the state dict that are one tensor."""
        return tuple(tensor.saved for tensor in self.tensors if len(tensor.saved) > 1)


def layout_of(module: torch.nn.Module, on_meta: bool) -> Layout:
    """Looks at a module that a factory has made.

    Args:
        module: the module; only names, shapes and sizes are kept.
        on_meta: it was built without memory.
    """
    state = {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if hasattr(tensor, "untyped_storage")
    }
    saved: dict[int, list[str]] = {}
    for name, tensor in state.items():
        saved.setdefault(id(tensor), []).append(name)
    tensors = []
    computed: set[int] = set()
    built: dict[int, int] = {}
    for found in tensors_of(module):
        names = tuple(saved.pop(id(found.tensor), ()))
        size_bytes = 0
        if not found.tensor.is_meta:
            storage = found.tensor.untyped_storage()
            if names:
                built[storage.data_ptr()] = storage.nbytes()
            elif storage.data_ptr() not in computed:
                computed.add(storage.data_ptr())
                size_bytes = storage.nbytes()
        tensors.append(
            LayoutTensor(
                names=found.names, saved=names, size_bytes=size_bytes, is_buffer=found.is_buffer
            )
        )
    for others in saved.values():
        tensors.append(
            LayoutTensor(
                names=tuple(others),
                saved=tuple(others),
                size_bytes=0,
                is_buffer=True,
                is_held=False,
            )
        )
    return Layout(
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        tensors=tuple(tensors),
        blocks=_blocks(module),
        units=units_of(module),
        built_bytes=0 if on_meta else sum(built.values()),
        input_names=_input_names(module),
    )


def _input_names(module: torch.nn.Module) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # Of what is no function of Python.
        return ()
    return tuple(
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.default is parameter.empty
    )[:_MOST_INPUTS]


def _blocks(module: torch.nn.Module) -> tuple[str, ...]:
    """Where a module of unknown code is not cut: its children, which it calls one by one.

    What a child does with its own parts cannot be known. But a Sequential, or a list or dict of
    modules, does nothing with them, so that its elements can be told apart.
    """

    def is_block(part: torch.nn.Module) -> bool:
        is_container = isinstance(part, torch.nn.ModuleList | torch.nn.ModuleDict)
        if type(part).forward is torch.nn.Sequential.forward:
            is_container = True
        return part is not module and not is_container

    def splits(part: torch.nn.Module) -> bool:
        return any(True for _ in part.children())

    return blocks_of(module, is_block=is_block, splits=splits)


def structure_of(
    layout: Layout, checkpoint: Checkpoint
) -> tuple[Structure, tuple[str | None, ...]]:
    """What the module will be made of, and for each tensor its name in the file, if it is there.

    Each is used in the type the file has it in. Names that are tied in the module and that the file
    has several of become several tensors, as they do when the weights are bound.
    """
    headers = checkpoint.tensors
    in_place = mapped_as_filed(checkpoint)
    parts: list[TensorPart] = []
    filed: list[str | None] = []
    for tensor in layout.tensors:
        found = [name for name in tensor.saved if name in headers]
        if not found:
            parts.append(
                TensorPart(
                    names=tensor.names,
                    size_bytes=tensor.size_bytes,
                    is_buffer=tensor.is_buffer,
                    as_filed=False,
                )
            )
            filed.append(None)
        for name in found:
            # The names that the file lacks go with the first that it has.
            names: tuple[str, ...] = (name,)
            if name == found[0]:
                names = tuple(other for other in tensor.names if other not in found[1:])
            parts.append(
                TensorPart(
                    names=names,
                    size_bytes=headers[name].size_bytes,
                    is_buffer=tensor.is_buffer,
                    as_filed=tensor.is_held and name in in_place,
                )
            )
            filed.append(name)
    structure = Structure(tensors=tuple(parts), blocks=layout.blocks, units=layout.units)
    return structure, tuple(filed)


def compare(layout: Layout, checkpoint: Checkpoint) -> None:
    """Checks that weights fill a module: every name, no other name, every shape.

    Raises:
        ModelFilesError: they do not.
    """
    tensors = checkpoint.tensors
    optional = {
        name
        for group in layout.aliases
        if any(other in tensors for other in group)
        for name in group
    }
    for name, shape in layout.shapes.items():
        if name not in tensors:
            if name not in optional:
                raise ModelFilesError(f"the weights lack {shown(name)}, which the factory makes")
        elif tensors[name].shape != shape:
            raise ModelFilesError(
                f"{shown(name)} has shape {list(tensors[name].shape)} in the weights and "
                f"{list(shape)} in the factory's module"
            )
    for name in tensors:
        if name not in layout.shapes:
            raise ModelFilesError(
                f"the weights hold {shown(name)}, which the factory does not make"
            )
