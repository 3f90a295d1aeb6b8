"""Mode "slab": one allocation on an accelerator, filled through a few staging buffers.

A file is read into a staging buffer while the one before it is on its way to the device. Staging
buffers are pinned where the device's backend can do that. Pinned transfers have been exercised on a
backend of the tests only, which has no memory that is really pinned and copies before it returns.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from modelyard_server.runtimes.api import LoadCancelled, StopCheck
from modelyard_server.weights.mapping import TORCH_DTYPES, open_checked
from modelyard_server.weights.model_files import FolderLike
from modelyard_server.weights.origin import Origin
from modelyard_server.weights.reading.accelerators import pinned_memory, synchronize
from modelyard_server.weights.reading.api import (
    Allocation,
    FilePart,
    Piece,
    Placed,
    Reading,
    check_unchanged,
    empty_tensor,
    layout,
    origin_of,
    read_into,
)
from modelyard_server.weights.reading.copied import Room, copy_room
from modelyard_server.weights.safetensors_files import FileHeader

__all__ = ["SlabReader"]

_ALIGNMENT_BYTES = 256
_BUFFERS = 4
_STOP_CHECK_S = 0.05
_NOTHING: Mapping[str, Room] = MappingProxyType({})


class SlabReader:
    """Reads into one allocation of a device; see Reader.

    The allocation goes back when the last tensor in it has gone, not before.

    Args:
        staging_bytes: of all staging buffers together. They are made by the first read and kept
            until trim. Reads take turns with them.
    """

    def __init__(self, staging_bytes: int) -> None:
        self._buffer_bytes = max(staging_bytes // _BUFFERS, _ALIGNMENT_BYTES)
        self._turn = threading.Lock()
        self._ring: deque[_Staging] = deque()

    def read(
        self,
        packs: FolderLike,
        parts: Sequence[FilePart],
        *,
        position: int,
        torch_device: str,
        stop: StopCheck,
        kept: Mapping[str, Room] = _NOTHING,
    ) -> Reading:
        """See Reader. Tensors that are in `kept`, by identity, are copied from there instead."""
        placed = {
            tensor.name: Placed(base=empty_tensor(tensor, torch_device))
            for part in parts
            for tensor in part.tensors
            if not tensor.size_bytes
        }
        files, size_bytes = layout(parts, alignment=_ALIGNMENT_BYTES)
        if not files:
            return Reading(placed=placed)
        is_read = any(piece.tensor.identity not in kept for _, pieces in files for piece in pieces)
        with self._my_turn(stop) if is_read else contextlib.nullcontext():
            # Not while others have their turn: what waits holds nothing.
            slab = torch.empty(size_bytes, dtype=torch.uint8, device=torch_device)
            origin = self._fill(slab, packs, files, stop, kept)
        allocation = Allocation()
        for _, pieces in files:
            for piece in pieces:
                placed[piece.tensor.name] = Placed(
                    base=_tensor_in(slab, piece), allocation=allocation
                )
        return Reading(placed=placed, origin=origin)

    def trim(self) -> None:
        """Gives the staging buffers back, unless they are in use."""
        if self._turn.acquire(blocking=False):
            try:
                self._ring.clear()
            finally:
                self._turn.release()

    @contextlib.contextmanager
    def _my_turn(self, stop: StopCheck) -> Iterator[None]:
        while not self._turn.acquire(timeout=_STOP_CHECK_S):
            if stop():
                raise LoadCancelled
        try:
            yield
        finally:
            self._turn.release()

    def _fill(
        self,
        slab: torch.Tensor,
        packs: FolderLike,
        files: Sequence[tuple[FileHeader, Sequence[Piece]]],
        stop: StopCheck,
        kept: Mapping[str, Room],
    ) -> Origin:
        writer = _Writer(slab, self._ring, self._buffer_bytes)
        origin = Origin()
        try:
            for header, pieces in files:
                filed = [piece for piece in pieces if piece.tensor.identity not in kept]
                if filed:
                    origin += _read_pieces(writer, packs, header, filed, stop)
                for piece in pieces:
                    room = kept.get(piece.tensor.identity)
                    if room is not None:
                        copy_room(room, slab[piece.begin : piece.end], stop)
                        origin += Origin(copied_bytes=room.size_bytes)
            writer.flush()
        finally:
            # Also after an error: what is on its way goes to memory that is about to be freed.
            synchronize(slab.device)
        return origin


@dataclass(slots=True, eq=False)
class _Staging:
    """A buffer in host memory.

    Attributes:
        memory: its bytes.
        is_pinned: copies out of it go on behind the caller's back.
        event: reached when the last of them has been done.
        view: its bytes, for reading into.
    """

    memory: torch.Tensor
    is_pinned: bool
    event: torch.Event | None = None
    view: memoryview = field(init=False)

    def __post_init__(self) -> None:
        self.view = memoryview(self.memory.numpy().data)

    def wait(self) -> None:
        """Waits until it may be written to."""
        if self.event is not None:
            self.event.synchronize()
            self.event = None

    def send(self, target: torch.Tensor) -> None:
        """Copies its first bytes to a device."""
        target.copy_(self.memory[: target.numel()], non_blocking=self.is_pinned)
        if self.is_pinned:
            self.event = torch.Event(target.device)
            self.event.record(torch.accelerator.current_stream(target.device))


class _Writer:
    """Writes an allocation from its beginning to its end, a staging buffer at a time."""

    def __init__(self, slab: torch.Tensor, ring: deque[_Staging], buffer_bytes: int) -> None:
        self._slab = slab
        self._ring = ring
        self._buffer_bytes = buffer_bytes
        self._current: _Staging | None = None
        self._begin = 0
        self._end = 0

    def room(self, begin: int, size_bytes: int) -> memoryview:
        """Where to put what belongs to a place in the allocation, or the beginning of it.

        Args:
            begin: of the place; not before the end of the last one.
            size_bytes: of it.
        """
        if self._current is None or begin != self._end or begin - self._begin >= self._buffer_bytes:
            self.flush()
            self._current = self._next()
            self._begin = begin
        first = begin - self._begin
        last = min(first + size_bytes, self._buffer_bytes)
        self._end = self._begin + last
        return self._current.view[first:last]

    def flush(self) -> None:
        """Sends what has been written."""
        if self._current is not None:
            self._current.send(self._slab[self._begin : self._end])
            self._current = None

    def _next(self) -> _Staging:
        if len(self._ring) < _BUFFERS:
            memory, is_pinned = _staging_memory(self._buffer_bytes, self._slab.device)
            self._ring.append(_Staging(memory=memory, is_pinned=is_pinned))
        else:
            self._ring.rotate(-1)
        staging = self._ring[-1]
        staging.wait()
        return staging


def _read_pieces(
    writer: _Writer,
    packs: FolderLike,
    header: FileHeader,
    pieces: Sequence[Piece],
    stop: StopCheck,
) -> Origin:
    with open_checked(packs, header) as file:
        origin = origin_of(file.descriptor, header, [piece.tensor for piece in pieces])
        for piece in pieces:
            offset = header.data_start + piece.tensor.begin
            at = piece.begin
            while at < piece.end:
                target = writer.room(at, piece.end - at)
                read_into(file, header.name, target, offset=offset, stop=stop)
                at += len(target)
                offset += len(target)
        check_unchanged(file, header.name)
    return origin


def _staging_memory(size_bytes: int, device: torch.device) -> tuple[torch.Tensor, bool]:
    """Host memory, and whether it is pinned for a device."""
    pinned = pinned_memory(size_bytes, device)
    if pinned is not None:
        return pinned, True
    return torch.empty(size_bytes, dtype=torch.uint8), False


def _tensor_in(slab: torch.Tensor, piece: Piece) -> torch.Tensor:
    part = slab[piece.begin : piece.end]
    # A storage of its own, which ends where the tensor does: so it is counted for what it is, not
    # as all of the allocation. Not every backend can do that; the tensor itself is the same. By
    # capsule, because the other form of the protocol has no number for backends from outside.
    with contextlib.suppress(RuntimeError, ValueError, BufferError):
        part = from_dlpack(to_dlpack(part))
    return part.view(TORCH_DTYPES[piece.tensor.dtype]).view(piece.tensor.shape)
