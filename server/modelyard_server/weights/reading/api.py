"""What a way of reading is: it brings tensors of a stored model into memory, and nothing more.

A reader keeps no tensors. What it returns is held by whoever asked, and when the last tensor over a
piece of memory is gone the memory goes back by itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import torch

from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError, StopCheck
from modelyard_server.weights.mapping import TORCH_DTYPES, Extent
from modelyard_server.weights.model_files import FolderLike, OpenFile
from modelyard_server.weights.origin import NOWHERE, Origin
from modelyard_server.weights.pages import joined_ranges, uncached
from modelyard_server.weights.safetensors_files import FileHeader, TensorHeader

__all__ = [
    "Allocation",
    "FilePart",
    "Mapped",
    "Piece",
    "Placed",
    "ReadMode",
    "Reader",
    "Reading",
    "check_unchanged",
    "empty_tensor",
    "layout",
    "origin_of",
    "read_into",
]

_STEP_BYTES = 8 << 20


class ReadMode(StrEnum):
    """How tensors are brought into memory."""

    MAP = "map"
    """Host memory: the files are mapped, nothing is copied."""
    OWNED = "owned"
    """Host memory: read into a new region; for files that somebody else may change."""
    ARENA = "arena"
    """Host memory: read into a recycled region, whose pages need not be made again."""
    SLAB = "slab"
    """Any device: read through staging buffers into one allocation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePart:
    """What is wanted of one file.

    Attributes:
        header: of the file.
        tensors: those of its tensors that are wanted, in the order of their data.
    """

    header: FileHeader
    tensors: Sequence[TensorHeader]


@dataclass(slots=True, weakref_slot=True, eq=False)
class Allocation:
    """Memory of a device that goes back as a whole.

    Attributes:
        pooled: identities of the tensors in it that were given to a pool.
        held_count: how many of those somebody holds.
    """

    pooled: list[str] = field(default_factory=list)
    held_count: int = 0


class Mapped(Protocol):
    """A mapped file."""

    def extent(self, tensor: TensorHeader) -> Extent:
        """Where one of its tensors lies."""


@dataclass(slots=True, kw_only=True)
class Placed:
    """A tensor that has been read. Not to be changed; frozen ones take longer to make.

    Attributes:
        base: the tensor. As long as it or an alias of it lives its bytes stay.
        file: the mapped file that it lies in; None if it does not.
        header: of the tensor in that file.
        allocation: what its bytes are a part of, if they cannot go back alone.
    """

    base: torch.Tensor
    file: Mapped | None = None
    header: TensorHeader | None = None
    allocation: Allocation | None = None

    @property
    def extent(self) -> Extent | None:
        """Where it lies in a mapped file; None if it does not."""
        if self.file is None or self.header is None:
            return None
        return self.file.extent(self.header)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a reader has read.

    Attributes:
        placed: the tensors by name: all that were wanted.
        padding_bytes: what was allocated for them beyond their own bytes.
        origin: where they came from.
    """

    placed: dict[str, Placed]
    padding_bytes: int = 0
    origin: Origin = NOWHERE

    def joined_with(self, other: Reading) -> Reading:
        """Both together; they have no name in common."""
        return Reading(
            placed=self.placed | other.placed,
            padding_bytes=self.padding_bytes + other.padding_bytes,
            origin=self.origin + other.origin,
        )


class Reader(Protocol):
    """A way of reading. Thread-safe."""

    def read(
        self,
        packs: FolderLike,
        parts: Sequence[FilePart],
        *,
        position: int,
        torch_device: str,
        stop: StopCheck,
    ) -> Reading:
        """Reads tensors.

        Args:
            packs: the folder in which the files lie.
            parts: what is wanted; no name twice.
            position: of the device whose memory it is to be.
            torch_device: torch's name of that device.
            stop: asked between steps of some megabytes.

        Raises:
            ModelFilesError: a file is not the one whose header was checked, or cannot be read.
            MemoryError: there is no memory.
            torch.OutOfMemoryError: the device has none.
            LoadCancelled: stop said so.

        After an error nothing is held, but by the frames in the error's traceback.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The place of a tensor in new memory.

    Attributes:
        tensor: its header.
        begin: its first byte.
    """

    tensor: TensorHeader
    begin: int

    @property
    def end(self) -> int:
        """First byte behind it."""
        return self.begin + self.tensor.size_bytes


def layout(
    parts: Sequence[FilePart], *, alignment: int
) -> tuple[list[tuple[FileHeader, list[Piece]]], int]:
    """Gives every tensor that is not empty a place, without a gap between them.

    Tensors go in the order of the largest power of two that divides their size, so that each begins
    at a multiple of it. A matrix with even a few factors of two in its shape is aligned as well as
    anybody asks for, and every tensor to its elements. So new memory holds the tensors' own bytes
    and no others, and what is charged for a model is what it takes. Among equals the order is that
    of the files.

    Args:
        parts: what is wanted.
        alignment: a power of two; more than that nobody asks for.

    Returns:
        The pieces in the order of their places, as long as they are from one file together, and the
        bytes of all.
    """
    sized = [
        (-min(tensor.size_bytes & -tensor.size_bytes, alignment), part.header, tensor)
        for part in parts
        for tensor in part.tensors
        if tensor.size_bytes
    ]
    sized.sort(key=lambda item: item[0])
    end = 0
    files: list[tuple[FileHeader, list[Piece]]] = []
    for _, header, tensor in sized:
        if not files or files[-1][0] is not header:
            files.append((header, []))
        files[-1][1].append(Piece(tensor=tensor, begin=end))
        end += tensor.size_bytes
    return files, end


def empty_tensor(tensor: TensorHeader, torch_device: str) -> torch.Tensor:
    """A tensor without elements, of which nothing is to be read."""
    return torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype], device=torch_device)


def origin_of(descriptor: int, header: FileHeader, tensors: Sequence[TensorHeader]) -> Origin:
    """Where tensors of a file are before they are read. Reads nothing.

    Args:
        descriptor: of the open file.
        header: of it.
        tensors: of the file.
    """
    file_bytes = missing_bytes = 0
    for begin, end in joined_ranges([(tensor.begin, tensor.end) for tensor in tensors]):
        file_bytes += end - begin
        for _, size_bytes in uncached(descriptor, header.data_start + begin, end - begin):
            missing_bytes += size_bytes
    return Origin(file_bytes=file_bytes, missing_bytes=missing_bytes)


def read_into(
    file: OpenFile, name: str, target: memoryview, *, offset: int, stop: StopCheck
) -> None:
    """Fills memory from a file, without the interpreter's lock.

    Args:
        file: open for reading.
        name: of the file, for messages.
        target: bytes to be filled.
        offset: where in the file they begin.
        stop: asked before every step.

    Raises:
        ModelFilesError: the disk fails, or the file ends before.
        LoadCancelled: stop said so.
    """
    at = 0
    while at < len(target):
        if stop():
            raise LoadCancelled
        try:
            count = os.preadv(file.descriptor, [target[at : at + _STEP_BYTES]], offset + at)
        except OSError:
            raise ModelFilesError(f"{name} cannot be read to its end", transient=True) from None
        if not count:
            raise ModelFilesError(f"{name} became shorter while it was being read", transient=True)
        at += count


def check_unchanged(file: OpenFile, name: str) -> None:
    """Checks that nobody wrote to a file while it was being read.

    Raises:
        ModelFilesError: somebody did.
    """
    status = os.fstat(file.descriptor)
    now = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if now != file.identity:
        raise ModelFilesError(f"{name} changed while it was being loaded", transient=True)
