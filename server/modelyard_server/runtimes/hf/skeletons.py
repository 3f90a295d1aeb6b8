"""What a model is made of, found out without its weights.

The model's class is built on torch's meta device, where tensors have shapes and no memory. Compared
with the headers of the weights, that tells what a load will cost, to the byte, and refuses a
configuration that claims more than the files hold before anything is allocated.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from modelyard_server.runtimes.api import ModelFilesError, Price
from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.runtimes.hf.architectures import Architecture
from modelyard_server.weights.mapping import TORCH_DTYPES
from modelyard_server.weights.model_config import CONFIG_FILE
from modelyard_server.weights.model_files import shown
from modelyard_server.weights.safetensors_files import Checkpoint, TensorHeader

__all__ = ["Skeleton", "SkeletonCache", "checkpoint_dtype", "price_of"]

_CACHED = 64
_BUFFER_SLACK_BYTES = 64 << 20
"""Buffers are computed, not read, so no file bounds them. Rotary tables take a few MiB at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkeletonTensor:
    """A parameter of the model, tied ones once.

    Attributes:
        names: every name it goes by.
        shape: sizes of its dimensions.
        dtype: what it will be loaded as.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

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
        parameters: the distinct parameters.
        buffer_bytes: bytes of the distinct buffers.
        fuses: the library computes some of the parameters from several of the file's tensors.
    """

    prefix: str
    parameters: tuple[SkeletonTensor, ...]
    buffer_bytes: int
    fuses: bool


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
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    parameters = tuple(
        SkeletonTensor(
            names=tuple(names[key]),
            shape=tuple(tensor.shape),
            dtype=torch.float32
            if any(pattern.search(name) for pattern in in_32_bits for name in names[key])
            else tensor.dtype,
        )
        for key, tensor in tensors.items()
    )
    buffers = {id(buffer): buffer for buffer in model.buffers()}
    return Skeleton(
        prefix=f"{model.base_model_prefix}." if model.base_model_prefix else "",
        parameters=parameters,
        buffer_bytes=sum(buffer.numel() * buffer.itemsize for buffer in buffers.values()),
        fuses=any(
            isinstance(step, WeightConverter) for step in get_model_conversion_mapping(model)
        ),
    )


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


def price_of(skeleton: Skeleton, checkpoint: Checkpoint) -> Price:
    """Compares a skeleton with the weights that are to fill it, and says what that will take.

    Raises:
        ModelFilesError: the configuration describes another model than the weights hold.
    """
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
    filed = {TORCH_DTYPES[tensor.dtype] for tensor in tensors.values()}
    copies = skeleton.fuses
    for parameter in skeleton.parameters:
        found = _find(parameter, skeleton.prefix, tensors)
        if found is None:
            # Under a name that the library translates; it checks when it loads.
            copies = copies or filed != {parameter.dtype}
            continue
        if found.element_count != parameter.element_count:
            raise ModelFilesError(
                f"{shown(found.name)} has shape {list(found.shape)} in the weights and "
                f"{list(parameter.shape)} by {CONFIG_FILE}"
            )
        copies = copies or TORCH_DTYPES[found.dtype] != parameter.dtype
    resting = skeleton.buffer_bytes + sum(
        parameter.element_count * parameter.dtype.itemsize for parameter in skeleton.parameters
    )
    # What is neither converted nor fused is mapped where it lies and never exists twice.
    peak = resting + (checkpoint.size_bytes if copies else 0)
    return Price(resting_bytes=resting, peak_bytes=peak)


def _find(
    parameter: SkeletonTensor, prefix: str, tensors: dict[str, TensorHeader]
) -> TensorHeader | None:
    for name in parameter.names:
        for candidate in (name, prefix + name, name.removeprefix(prefix) if prefix else name):
            if candidate in tensors:
                return tensors[candidate]
    return None
