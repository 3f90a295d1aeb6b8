"""Maps checked safetensors files into memory as tensors, without copying them.

The mapping is private: a model that writes to its own weights changes its copy of a page, never the
file. The file itself must not be changed while a model is loaded from it; replacing it by renaming
another over it is harmless, truncating it is not (see docs on model folders).
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Mapping
from types import MappingProxyType

import torch

from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError, StopCheck
from modelyard_server.weights.model_files import FolderLike, open_model_file
from modelyard_server.weights.safetensors_files import Checkpoint, FileHeader

__all__ = ["TORCH_DTYPES", "map_checkpoint"]

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I16": torch.int16,
        "U16": torch.uint16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "U32": torch.uint32,
        "F32": torch.float32,
        "I64": torch.int64,
        "U64": torch.uint64,
        "F64": torch.float64,
    }
)

_POPULATE_STEP_BYTES = 8 << 20
_MADV_POPULATE_READ = 22
"""Linux 5.14: fault the pages in now, and report a failing disk as an error instead of a signal."""

_CANNOT_READ = frozenset({errno.EFAULT, errno.EIO})


def map_checkpoint(
    folder: FolderLike, checkpoint: Checkpoint, *, stop: StopCheck
) -> dict[str, torch.Tensor]:
    """Returns all tensors of a checkpoint by name, each over its own part of the mapped file.

    The mapping lives as long as one of the tensors does.

    Args:
        folder: the model's folder.
        checkpoint: the headers that were read from it.
        stop: asked while the files are read.

    Raises:
        ModelFilesError: a file is not the one whose header was checked, or cannot be read.
        LoadCancelled: stop said so.
    """
    tensors: dict[str, torch.Tensor] = {}
    for header in checkpoint.files:
        tensors |= _map_file(folder, header, stop)
    return tensors


def _map_file(folder: FolderLike, header: FileHeader, stop: StopCheck) -> dict[str, torch.Tensor]:
    with open_model_file(folder, header.name) as file:
        if file.identity != header.identity:
            raise ModelFilesError(
                f"{header.name} changed while it was being loaded", transient=True
            )
        try:
            mapping = mmap.mmap(file.descriptor, file.size_bytes, access=mmap.ACCESS_COPY)
        except OSError:
            raise ModelFilesError(f"{header.name} cannot be mapped", transient=True) from None
    _populate(mapping, header.name, stop)
    tensors = {}
    for tensor in header.tensors:
        dtype = TORCH_DTYPES[tensor.dtype]
        start = header.data_start + tensor.begin
        if tensor.size_bytes == 0:
            value = torch.empty(tensor.shape, dtype=dtype)
        else:
            raw = torch.frombuffer(
                mapping, dtype=torch.uint8, count=tensor.size_bytes, offset=start
            )
            if start % dtype.itemsize:
                # The format does not align tensors behind an odd one; the processor wants it.
                raw = raw.clone()
            value = raw.view(dtype).view(tensor.shape)
        tensors[tensor.name] = value
    return tensors


def _populate(mapping: mmap.mmap, name: str, stop: StopCheck) -> None:
    # In steps, because the call keeps the interpreter's lock and cannot be cancelled.
    for start in range(0, len(mapping), _POPULATE_STEP_BYTES):
        if stop():
            raise LoadCancelled
        try:
            mapping.madvise(
                _MADV_POPULATE_READ, start, min(_POPULATE_STEP_BYTES, len(mapping) - start)
            )
        except OSError as error:
            if error.errno in _CANNOT_READ:
                raise ModelFilesError(f"{name} cannot be read to its end", transient=True) from None
            # An older kernel or another system: the first run faults the pages in.
            return
