"""Maps checked safetensors files into memory as tensors, without copying them.

The mapping is private: a model that writes to its own weights changes its copy of a page, never the
file. The file itself must not be changed while a model is loaded from it; replacing it by renaming
another over it is harmless, truncating it is not. Nobody changes files of the store; of a folder
that is read in place its owner has to see to it.

Tensors that live on the disk are mapped like the others, but their pages are not read ahead. An
Extent says where they lie, so that they can be read before they are used and given back afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError, StopCheck
from modelyard_server.weights.model_files import FolderLike, OpenFile, open_model_file
from modelyard_server.weights.origin import NOWHERE, Origin
from modelyard_server.weights.pages import advise, uncached
from modelyard_server.weights.safetensors_files import (
    ITEM_SIZES,
    Checkpoint,
    FileHeader,
    TensorHeader,
)

__all__ = [
    "TORCH_DTYPES",
    "Extent",
    "MappedCheckpoint",
    "is_aligned",
    "joined",
    "map_checkpoint",
    "map_file",
    "map_opened",
    "mapped_as_filed",
    "open_checked",
    "populate",
    "release",
]

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


@dataclass(slots=True, kw_only=True)
class Extent:
    """A range of bytes of a mapped file. Not to be changed; frozen ones take longer to make.

    Attributes:
        mapping: the mapped file.
        file: its name, for messages.
        start: where in the file the range begins.
        size_bytes: its length.
        address: of its first byte in memory.
    """

    mapping: mmap.mmap
    file: str
    start: int
    size_bytes: int
    address: int

    @property
    def end(self) -> int:
        """Where in the file the first byte behind it is."""
        return self.start + self.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MappedCheckpoint:
    """The tensors of a checkpoint, over its mapped files.

    Attributes:
        tensors: all of them by name.
        extents: where those lie that are in a mapping, by name: all that mapped_as_filed names and
            that are not empty.
        origin: where the pages were that have been read.
    """

    tensors: dict[str, torch.Tensor]
    extents: dict[str, Extent]
    origin: Origin = NOWHERE


def map_checkpoint(
    folder: FolderLike,
    checkpoint: Checkpoint,
    *,
    stop: StopCheck,
    on_disk: frozenset[str] = frozenset(),
) -> MappedCheckpoint:
    """Returns all tensors of a checkpoint, each over its own part of the mapped file.

    A mapping lives as long as one of its tensors or extents does.

    Args:
        folder: the model's folder.
        checkpoint: the headers that were read from it.
        stop: asked while the files are read.
        on_disk: names of tensors that are to stay on the disk: everything else is read now.

    Raises:
        ModelFilesError: a file is not the one whose header was checked, or cannot be read.
        LoadCancelled: stop said so.
    """
    mapped = MappedCheckpoint(tensors={}, extents={})
    origin = NOWHERE
    for header in checkpoint.files:
        origin += _map_file(folder, header, stop, on_disk, mapped)
    return replace(mapped, origin=origin)


def mapped_as_filed(checkpoint: Checkpoint) -> frozenset[str]:
    """Names of the tensors that are used where they lie in the file; of the others copies are."""
    return frozenset(
        tensor.name
        for header in checkpoint.files
        for tensor in header.tensors
        if is_aligned(header, tensor)
    )


@contextlib.contextmanager
def open_checked(folder: FolderLike, header: FileHeader) -> Iterator[OpenFile]:
    """Opens the file whose header was checked.

    Args:
        folder: the folder the header was read in.
        header: of the file.

    Raises:
        ModelFilesError: it is another file now, has changed, or cannot be opened.
    """
    with open_model_file(folder, header.name) as file:
        if file.identity != header.identity:
            raise ModelFilesError(
                f"{header.name} changed while it was being loaded", transient=True
            )
        yield file


def map_file(folder: FolderLike, header: FileHeader) -> mmap.mmap:
    """Maps the file whose header was checked: privately, so that writes never reach the file.

    Raises:
        ModelFilesError: it is another file now, or cannot be mapped.
    """
    with open_checked(folder, header) as file:
        return map_opened(file, header)


def map_opened(file: OpenFile, header: FileHeader) -> mmap.mmap:
    """The same of a file that is open.

    Raises:
        ModelFilesError: it cannot be mapped.
    """
    try:
        return mmap.mmap(file.descriptor, file.size_bytes, access=mmap.ACCESS_COPY)
    except OSError:
        raise ModelFilesError(f"{header.name} cannot be mapped", transient=True) from None


def is_aligned(header: FileHeader, tensor: TensorHeader) -> bool:
    """True if a tensor lies in the mapped file where the processor can use it."""
    return (header.data_start + tensor.begin) % ITEM_SIZES[tensor.dtype] == 0


def joined(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """The same bytes as fewer extents: neighbours in one file become one."""
    merged: list[Extent] = []
    first: Extent | None = None
    end = 0

    def close() -> None:
        if first is not None:
            whole = end == first.end
            merged.append(first if whole else replace(first, size_bytes=end - first.start))

    for extent in sorted(extents, key=lambda extent: (id(extent.mapping), extent.start)):
        if first is not None and first.mapping is extent.mapping and extent.start <= end:
            end = max(end, extent.end)
            continue
        close()
        first, end = extent, extent.end
    close()
    return tuple(merged)


def populate(extents: Iterable[Extent], *, stop: StopCheck = lambda: False) -> None:
    """Reads the pages of extents into memory.

    Raises:
        ModelFilesError: the disk fails. Without this call the process would die of a signal when it
            touches the page.
        LoadCancelled: stop said so.
    """
    for extent in extents:
        first = extent.start - extent.start % mmap.PAGESIZE
        _populate(extent.address - extent.start, extent.file, first, extent.end, stop)


def release(extents: Iterable[Extent]) -> None:
    """Gives the pages of extents back to the system; the next use reads them again.

    Only pages that are wholly inside an extent: others share theirs. What was written to the
    mapping is lost with them.
    """
    for extent in extents:
        first = extent.start + -extent.start % mmap.PAGESIZE
        last = extent.end - extent.end % mmap.PAGESIZE
        if last > first:
            # It is advice: a system that cannot take it keeps the pages until it needs the room.
            with contextlib.suppress(OSError):
                base = extent.address - extent.start
                advise(base + first, last - first, mmap.MADV_DONTNEED)


def _map_file(
    folder: FolderLike,
    header: FileHeader,
    stop: StopCheck,
    on_disk: frozenset[str],
    mapped: MappedCheckpoint,
) -> Origin:
    mapping = map_file(folder, header)
    extents = {}
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    for tensor in header.tensors:
        if tensor.size_bytes:
            start = header.data_start + tensor.begin
            extents[tensor.name] = Extent(
                mapping=mapping,
                file=header.name,
                start=start,
                size_bytes=tensor.size_bytes,
                address=whole.data_ptr() + start,
            )
    wanted = joined(extent for name, extent in extents.items() if name not in on_disk)
    origin = _origin(folder, header, wanted)
    populate(wanted, stop=stop)
    for tensor in header.tensors:
        dtype = TORCH_DTYPES[tensor.dtype]
        extent = extents.get(tensor.name)
        if extent is None:
            value = torch.empty(tensor.shape, dtype=dtype)
        else:
            raw = torch.frombuffer(
                mapping, dtype=torch.uint8, count=extent.size_bytes, offset=extent.start
            )
            if is_aligned(header, tensor):
                mapped.extents[tensor.name] = extent
            else:
                # The format does not align tensors behind an odd one; the processor wants it.
                raw = raw.clone()
            value = raw.view(dtype).view(tensor.shape)
        mapped.tensors[tensor.name] = value
    return origin


def _origin(folder: FolderLike, header: FileHeader, extents: Iterable[Extent]) -> Origin:
    """Where extents of a file are before they are read."""
    file_bytes = missing_bytes = 0
    with open_checked(folder, header) as file:
        for extent in extents:
            file_bytes += extent.size_bytes
            pieces = uncached(file.descriptor, extent.start, extent.size_bytes)
            missing_bytes += sum(size_bytes for _, size_bytes in pieces)
    return Origin(file_bytes=file_bytes, missing_bytes=missing_bytes)


def _populate(base: int, name: str, first: int, end: int, stop: StopCheck) -> None:
    # In steps, because the call cannot be cancelled.
    for start in range(first, end, _POPULATE_STEP_BYTES):
        if stop():
            raise LoadCancelled
        try:
            advise(base + start, min(_POPULATE_STEP_BYTES, end - start), _MADV_POPULATE_READ)
        except OSError as error:
            if error.errno in _CANNOT_READ:
                raise ModelFilesError(f"{name} cannot be read to its end", transient=True) from None
            # An older kernel or another system: the first run faults the pages in.
            return
