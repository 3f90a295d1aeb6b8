"""What a model is made of, found out without its weights.

The model's class is built on torch's meta device, where tensors have shapes and no memory. Compared
with the headers of the weights, that tells what a load will cost, to the byte, and refuses a
configuration that claims more than the files hold before anything is allocated.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from modelyard_server.runtimes.api import ModelFilesError, Price
from modelyard_server.runtimes.filling import shared_of
from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.runtimes.hf.architectures import Architecture
from modelyard_server.runtimes.hf.renaming import Renaming
from modelyard_server.runtimes.targets import Structure, TensorPart
from modelyard_server.weights.mapping import TORCH_DTYPES, mapped_as_filed
from modelyard_server.weights.model_config import CONFIG_FILE
from modelyard_server.weights.model_files import shown
from modelyard_server.weights.safetensors_files import Checkpoint, TensorHeader
from modelyard_server.weights.stored import StoredModel
from modelyard_server.weights.structures import blocks_of, tensors_of, units_of

__all__ = ["Pricing", "Skeleton", "SkeletonCache", "checkpoint_dtype", "price_of"]

_CACHED = 64
_BUFFER_SLACK_BYTES = 64 << 20
"""Buffers are computed, not read, so no file bounds them. Rotary tables take a few MiB at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkeletonTensor:
    """A parameter or buffer of the model, tied ones once.

    Attributes:
        names: every name it goes by.
        shape: sizes of its dimensions.
        dtype: what it will be loaded as.
        is_buffer: it is a buffer.
        is_filed: weights hold it. Parameters, and buffers that are saved.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_buffer: bool
    is_filed: bool

    @property
    def element_count(self) -> int:
        """Number of its elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """Parameters and buffers of a model.

    Attributes:
        prefix: what the names of its body start with in a model with a head, for instance "bert.".
        tensors: the distinct parameters and buffers, in the order of the model.
        structure: of a model whose weights hold every parameter as it is used, and no buffers.
        renaming: what the library makes of the names in the file.
    """

    prefix: str
    tensors: tuple[SkeletonTensor, ...]
    structure: Structure
    renaming: Renaming

    @property
    def parameters(self) -> tuple[SkeletonTensor, ...]:
        """The distinct parameters."""
        return tuple(tensor for tensor in self.tensors if not tensor.is_buffer)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the distinct buffers."""
        sizes = zip(self.tensors, self.structure.tensors, strict=True)
        return sum(part.size_bytes for tensor, part in sizes if tensor.is_buffer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pricing:
    """A price, and where the weights hold what it is for.

    Attributes:
        price: of the model.
        structure: the price's.
        filed: for each tensor of the structure that is used as the weights hold it, its
            name there; None for the others.
        sources: by name in the model, the name in the file of each tensor that is only renamed.
        doubled: of each tied tensor that the file holds several times, the names there. Whether
            the model ties them depends on whether they are the same.
    """

    price: Price
    structure: Structure
    filed: tuple[str | None, ...]
    sources: Mapping[str, str]
    doubled: tuple[tuple[str, ...], ...]


class SkeletonCache:
    """Builds skeletons, and remembers the last few by what they were built from.

    Thread-safe. What is kept are names and numbers: no tensors.
    """

    def __init__(self, construction_lock: threading.Lock) -> None:
        self._construction_lock = construction_lock
        self._lock = threading.Lock()
        self._skeletons: OrderedDict[tuple[str, str, torch.dtype], Skeleton] = OrderedDict()

    def get(self, architecture: Architecture, dtype: torch.dtype, digest: str) -> Skeleton:
        """Returns the skeleton of a model.

        Args:
            architecture: its class and configuration.
            dtype: the floating type it will be loaded as.
            digest: of the file the configuration came from.

        Raises:
            ModelFilesError: the class cannot be built from this configuration.
        """
        key = (digest, architecture.model_class.__name__, dtype)
        with self._lock:
            if key in self._skeletons:
                self._skeletons.move_to_end(key)
                return self._skeletons[key]
        try:
            with self._construction_lock:
                skeleton = _build(architecture, dtype)
        except Exception as error:
            forget_frames(error)
            # Whatever a model's constructor thinks of sizes it cannot use.
            raise ModelFilesError(
                f"{CONFIG_FILE}: no {architecture.model_class.__name__} can be built from it "
                f"({type(error).__name__})"
            ) from error
        with self._lock:
            self._skeletons[key] = skeleton
            while len(self._skeletons) > _CACHED:
                self._skeletons.popitem(last=False)
        return skeleton


def _build(architecture: Architecture, dtype: torch.dtype) -> Skeleton:
    with torch.device("meta"):
        model: Any = architecture.model_class._from_config(
            architecture.config, dtype=dtype, **architecture.arguments
        )
    # The library keeps some parameters of some models in 32 bits, by patterns of their names.
    in_32_bits = [re.compile(pattern) for pattern in model._get_dtype_plan(dtype)]
    saved = frozenset(model.state_dict())
    tensors = []
    for found in tensors_of(model):
        own_dtype = found.tensor.dtype
        if not found.is_buffer and any(
            pattern.search(name) for pattern in in_32_bits for name in found.names
        ):
            own_dtype = torch.float32
        tensors.append(
            SkeletonTensor(
                names=found.names,
                shape=tuple(found.tensor.shape),
                dtype=own_dtype,
                is_buffer=found.is_buffer,
                is_filed=not found.is_buffer or not saved.isdisjoint(found.names),
            )
        )
    structure = Structure(
        tensors=tuple(
            TensorPart(
                names=tensor.names,
                size_bytes=tensor.element_count * tensor.dtype.itemsize,
                is_buffer=tensor.is_buffer,
                as_filed=not tensor.is_buffer,
            )
            for tensor in tensors
        ),
        blocks=_blocks(model),
        units=units_of(model),
    )
    return Skeleton(
        prefix=f"{model.base_model_prefix}." if model.base_model_prefix else "",
        tensors=tuple(tensors),
        structure=structure,
        renaming=Renaming(model),
    )


def _blocks(model: Any) -> tuple[str, ...]:
    """Where the library's models are not cut.

    The classes that the model says must not be split; of a model that says none, the elements of
    its lists of layers. Outside of them, modules with tensors of their own.
    """
    classes = frozenset(model._no_split_modules or ())
    unsplit = {id(part) for part in model.modules() if type(part).__name__ in classes}
    if not unsplit:
        unsplit = {
            id(layer)
            for part in model.modules()
            if isinstance(part, torch.nn.ModuleList)
            for layer in part
        }

    def is_block(part: torch.nn.Module) -> bool:
        return id(part) in unsplit

    def splits(part: torch.nn.Module) -> bool:
        return any(is_block(below) for below in part.modules() if below is not part)

    return blocks_of(model, is_block=is_block, splits=splits)


def checkpoint_dtype(asked: str | None, checkpoint: Checkpoint) -> torch.dtype:
    """Returns the floating type a model is loaded as: its configuration's, or that of its weights.

    Args:
        asked: the type that config.json names, or None.
        checkpoint: headers of the weights.
    """
    if asked is not None:
        found: torch.dtype = getattr(torch, asked)
        return found
    for name in sorted(checkpoint.tensors):
        dtype = TORCH_DTYPES[checkpoint.tensors[name].dtype]
        if dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
    return torch.float32


def price_of(skeleton: Skeleton, stored: StoredModel) -> Pricing:
    """Compares a skeleton with the weights that are to fill it, and says what that will take.

    Raises:
        ModelFilesError: the configuration describes another model than the weights hold.
    """
    checkpoint = stored.checkpoint
    claimed = sum(parameter.element_count for parameter in skeleton.parameters)
    tensors = checkpoint.tensors
    held = sum(tensor.element_count for tensor in tensors.values())
    if claimed > held:
        raise ModelFilesError(
            f"{CONFIG_FILE} describes a model of {claimed} parameters, but the weights hold {held}"
        )
    if skeleton.buffer_bytes > _BUFFER_SLACK_BYTES + checkpoint.size_bytes:
        raise ModelFilesError(
            f"{CONFIG_FILE} describes a model with {skeleton.buffer_bytes} bytes of buffers, more "
            "than its weights have"
        )
    filed_types = {TORCH_DTYPES[tensor.dtype] for tensor in tensors.values()}
    copies = skeleton.renaming.computes
    for parameter in skeleton.parameters:
        found = _find(parameter, skeleton.prefix, tensors)
        if found is None:
            # Under a name that the library translates; it checks when it loads.
            copies = copies or filed_types != {parameter.dtype}
            continue
        if found.element_count != parameter.element_count:
            raise ModelFilesError(
                f"{shown(found.name)} has shape {list(found.shape)} in the weights and "
                f"{list(parameter.shape)} by {CONFIG_FILE}"
            )
        copies = copies or TORCH_DTYPES[found.dtype] != parameter.dtype
    sources = skeleton.renaming.sources(frozenset(tensors))
    filed = _filed(skeleton, checkpoint, sources)
    structure = _structure(skeleton.structure, filed)
    resting = structure.size_bytes
    # What is neither converted nor fused is mapped where it lies and never exists twice.
    peak = resting + (checkpoint.size_bytes if copies else 0)
    price = Price(
        resting_bytes=resting,
        peak_bytes=peak,
        structure=structure,
        shared=shared_of(structure, filed, stored),
    )
    named = ({sources[name] for name in t.names if name in sources} for t in skeleton.tensors)
    return Pricing(
        price=price,
        structure=structure,
        filed=filed,
        sources=sources,
        doubled=tuple(tuple(sorted(names)) for names in named if len(names) > 1),
    )


def _filed(
    skeleton: Skeleton, checkpoint: Checkpoint, sources: Mapping[str, str]
) -> tuple[str | None, ...]:
    """For each tensor of a skeleton its name in the file, if it is used as it lies there."""
    in_place = mapped_as_filed(checkpoint)
    tensors = checkpoint.tensors
    filed: list[str | None] = []
    for tensor in skeleton.tensors:
        # Of a tied tensor that is filed twice only the library knows which it takes.
        names = {sources[name] for name in tensor.names if name in sources}
        found = tensors[names.pop()] if tensor.is_filed and len(names) == 1 else None
        stays = (
            found is not None
            and TORCH_DTYPES[found.dtype] == tensor.dtype
            and found.shape == tensor.shape
            and found.name in in_place
        )
        filed.append(found.name if found is not None and stays else None)
    return tuple(filed)


def _structure(usual: Structure, filed: tuple[str | None, ...]) -> Structure:
    parts = zip(usual.tensors, filed, strict=True)
    if all(part.as_filed == (name is not None) for part, name in parts):
        # Nearly always, and a thousand models of one architecture then share one structure.
        return usual
    parts = zip(usual.tensors, filed, strict=True)
    tensors = tuple(replace(part, as_filed=name is not None) for part, name in parts)
    return replace(usual, tensors=tensors)


def _find(
    tensor: SkeletonTensor, prefix: str, tensors: dict[str, TensorHeader]
) -> TensorHeader | None:
    for name in tensor.names:
        for candidate in (name, prefix + name, name.removeprefix(prefix) if prefix else name):
            if candidate in tensors:
                return tensors[candidate]
    return None
