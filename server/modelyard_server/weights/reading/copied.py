"""The memory of copies: made on the host, filled from tensors on any device, and read from again.

What a copy consists of can go in parts. Pages of anonymous memory go back with the last tensor that
has a byte in them. Memory that is pinned for an accelerator goes back as a whole, like that of the
accelerator itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from modelyard_server.runtimes.api import LoadCancelled, StopCheck
from modelyard_server.weights.origin import Origin
from modelyard_server.weights.pages import advise, write_protect
from modelyard_server.weights.reading.accelerators import is_accelerator, pinned_memory
from modelyard_server.weights.reading.api import (
    FilePart,
    Placed,
    Reading,
    empty_tensor,
    layout,
)
from modelyard_server.weights.reading.regions import (
    HOST_ALIGNMENT_BYTES,
    Region,
    anonymous_mapping,
    page_ceiling,
    tensor_over,
)

__all__ = ["CopyMemory", "Room", "copy_room", "fill_from_copies", "make_rooms"]

_STEP_BYTES = 8 << 20


class CopyMemory:
    """Memory of the copies of some tensors. Not thread-safe; whoever has it sees to that.

    Args:
        size_bytes: of the tensors.
        device: where they are.

    Raises:
        MemoryError: there is no memory.

    Attributes:
        size_bytes: of the memory: a multiple of the size of a page.
        padding_bytes: how much of that is no tensor's.
        is_pinned: transfers between it and the device go on behind the caller's back.
        users: how many of its rooms somebody uses; kept up by others.
    """

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self.size_bytes = page_ceiling(size_bytes)
        self.padding_bytes = self.size_bytes - size_bytes
        self.users = 0
        self._sharers: Counter[int] = Counter()
        chunks = _pinned_chunks(self.size_bytes, device) if is_accelerator(device) else ()
        self.is_pinned = bool(chunks)
        if not chunks:
            chunks = (torch.frombuffer(anonymous_mapping(self.size_bytes), dtype=torch.uint8),)
        self._chunks = chunks

    def enter(self, room: Room) -> None:
        """Says that a room is needed."""
        self._sharers.update({room.first_page, room.last_page})

    def pieces(self, begin: int, end: int) -> Iterator[torch.Tensor]:
        """The bytes of a range as tensors of at most some megabytes, one after another."""
        start = 0
        for chunk in self._chunks:
            first = max(begin, start)
            last = min(end, start + chunk.numel())
            for at in range(first, last, _STEP_BYTES):
                yield chunk[at - start : min(at + _STEP_BYTES, last) - start]
            start += chunk.numel()

    def charged_bytes(self, rooms: Iterable[Room]) -> int:
        """What rooms hold of it if nobody has the others."""
        if self.is_pinned:
            return sum(room.size_bytes for room in rooms) + self.padding_bytes
        pages, last = 0, -1
        for room in sorted(rooms, key=lambda room: room.begin):
            pages += room.last_page - max(room.first_page - 1, last)
            last = room.last_page
        return pages * mmap.PAGESIZE

    def leave(self, room: Room) -> tuple[int, int]:
        """Says that a room is not needed any more.

        Returns:
            The pages that nobody needs any more, as a range of bytes, to be given to give_back.
        """
        first, last = room.first_page, room.last_page
        self._sharers.subtract({first, last})
        begin = first if not self._sharers[first] else first + 1
        end = last + 1 if not self._sharers[last] else last
        return begin * mmap.PAGESIZE, max(begin, end) * mmap.PAGESIZE

    def give_back(self, begin: int, end: int) -> None:
        """Gives pages back to the system. May be called while other threads do other things."""
        if begin < end:
            chunk = self._chunks[0]
            # A system that cannot take them keeps them until the memory goes.
            with contextlib.suppress(OSError):
                advise(chunk.data_ptr() + begin, end - begin, mmap.MADV_DONTNEED)

    def clear(self) -> None:
        """Gives everything back. Nobody may use it any more."""
        self._chunks = ()
        if self.is_pinned:
            # Else torch would keep it for the next one who wants pinned memory.
            torch.accelerator.memory.empty_host_cache()


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The place of a tensor's copy.

    Attributes:
        memory: in which it is.
        begin: its first byte there.
        end: first byte behind it.
    """

    memory: CopyMemory
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin

    @property
    def first_page(self) -> int:
        """Number of the page of its first byte."""
        return self.begin // mmap.PAGESIZE

    @property
    def last_page(self) -> int:
        """Number of the page of its last byte."""
        return (self.end - 1) // mmap.PAGESIZE

    def fill(self, tensor: torch.Tensor) -> None:
        """Copies a tensor to it; if the memory is pinned, synchronize its device afterwards."""
        source = tensor.detach().reshape(-1).view(torch.uint8)
        at = 0
        for piece in self.memory.pieces(self.begin, self.end):
            part = source[at : at + piece.numel()]
            _copy(piece, part, non_blocking=self.memory.is_pinned)
            at += piece.numel()


def make_rooms(sizes: Sequence[int], device: torch.device) -> tuple[CopyMemory, tuple[Room, ...]]:
    """Makes memory for the copies of some tensors, with a place for each.

    They lie next to one another without a gap, those that fill whole pages first.

    Args:
        sizes: bytes of each tensor, none of them 0.
        device: where the tensors are.

    Returns:
        The memory, and the places in the order of `sizes`.

    Raises:
        MemoryError: there is no memory.
    """
    memory = CopyMemory(sum(sizes), device)
    places: dict[int, Room] = {}
    end = 0
    for at in sorted(range(len(sizes)), key=lambda at: -min(sizes[at] & -sizes[at], mmap.PAGESIZE)):
        places[at] = Room(memory=memory, begin=end, end=end + sizes[at])
        memory.enter(places[at])
        end += sizes[at]
    return memory, tuple(places[at] for at in range(len(sizes)))


def copy_room(room: Room, target: torch.Tensor, stop: StopCheck) -> None:
    """Copies out of a room; if its memory is pinned, synchronize the target's device afterwards.

    Args:
        room: what to copy.
        target: as many bytes, on any device.
        stop: asked before every step.

    Raises:
        LoadCancelled: stop said so.
    """
    at = 0
    for piece in room.memory.pieces(room.begin, room.end):
        if stop():
            raise LoadCancelled
        part = target[at : at + piece.numel()]
        _copy(part, piece, non_blocking=room.memory.is_pinned)
        at += piece.numel()


def fill_from_copies(
    parts: Sequence[FilePart],
    kept: Mapping[str, Room],
    *,
    write_protected: bool,
    stop: StopCheck,
) -> Reading:
    """Copies tensors out of copies into a new region of host memory, which is their own.

    Args:
        parts: what is wanted.
        kept: the places of all that are not empty, by identity.
        write_protected: a write to one of the tensors ends the process.
        stop: asked between steps.

    Raises:
        MemoryError: there is no memory, or it cannot be protected.
        LoadCancelled: stop said so.
    """
    files, size_bytes = layout(parts, alignment=HOST_ALIGNMENT_BYTES)
    placed = {
        tensor.name: Placed(base=empty_tensor(tensor, "cpu"))
        for part in parts
        for tensor in part.tensors
        if not tensor.size_bytes
    }
    if not files:
        return Reading(placed=placed)
    region = Region(anonymous_mapping(size_bytes))
    for _, pieces in files:
        for piece in pieces:
            view = region.view(piece.begin, piece.end)
            target = torch.frombuffer(view, dtype=torch.uint8)
            copy_room(kept[piece.tensor.identity], target, stop)
            placed[piece.tensor.name] = Placed(base=tensor_over(view, piece.tensor))
    if write_protected:
        try:
            write_protect(region.address, len(region.mapping))
        except OSError:
            raise MemoryError from None
    return Reading(
        placed=placed,
        padding_bytes=page_ceiling(size_bytes) - size_bytes,
        origin=Origin(copied_bytes=size_bytes),
    )


def _copy(target: torch.Tensor, source: torch.Tensor, *, non_blocking: bool) -> None:
    """Copies bytes."""
    if target.is_cpu and source.is_cpu:
        # Not by torch: its threads take several times as long to fill new pages together when the
        # processors have other things to do. The interpreter's lock is given up here as well.
        ctypes.memmove(target.data_ptr(), source.data_ptr(), target.numel())
    else:
        target.copy_(source, non_blocking=non_blocking)


def _pinned_chunks(size_bytes: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Pinned memory of so many bytes, or nothing if there is none.

    In pieces whose sizes are powers of two: torch rounds up to these.
    """
    chunks: list[torch.Tensor] = []
    for bit in reversed(range(size_bytes.bit_length())):
        if size_bytes >> bit & 1:
            chunk = pinned_memory(1 << bit, device)
            if chunk is None:
                return ()
            chunks.append(chunk)
    return tuple(chunks)
