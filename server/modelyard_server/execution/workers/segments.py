"""Segments: pieces of memory in which large tensors cross between two processes.

The side that sends makes a segment, passes its file once, and writes to it again when the other
side has said that it is done with what was there. The other side copies what it wants out of it,
and looks at the copy only: whoever made the segment could still write to it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass

from modelyard_server.execution.workers.framing import MalformedMessage
from modelyard_server.execution.workers.memory_files import SealedFile, is_sealed

__all__ = ["Segment", "SegmentPool", "SegmentTable"]

_SMALLEST_BYTES = 2**18
_MAX_SEGMENTS = 64
_MAX_BYTES = 2**30
"""Of all segments of one side. What does not fit goes through the socket, more slowly."""

_MAX_FREE_BYTES = 2**26
"""Kept for the next large tensors."""


@dataclass(slots=True, eq=False)
class Segment:
    """A segment of the side that sends.

    Attributes:
        number: what both sides call it.
        size_bytes: of it.
        file: to be passed to the other side.
        map: to be written to.
        is_announced: the other side has it, or will before anything else that is sent.
    """

    number: int
    size_bytes: int
    file: SealedFile
    map: mmap.mmap
    is_announced: bool = False


class SegmentPool:
    """The segments of the side that sends. Not thread-safe.

    Invariants: a segment is free or taken; no more than _MAX_SEGMENTS and _MAX_BYTES are there.

    Args:
        on_dropped: called with the number of an announced segment that is there no more.
    """

    def __init__(self, on_dropped: Callable[[int], None]) -> None:
        self._on_dropped = on_dropped
        self._taken: dict[int, Segment] = {}
        self._free: list[Segment] = []
        self._size_bytes = 0
        self._next = 1

    @property
    def count(self) -> int:
        """Segments there are."""
        return len(self._taken) + len(self._free)

    def take(self, size_bytes: int) -> Segment | None:
        """A segment of at least this size, or None: then there is no room for it."""
        segment = min(
            (free for free in self._free if free.size_bytes >= size_bytes),
            key=lambda free: free.size_bytes,
            default=None,
        )
        if segment is None:
            segment = self._make(size_bytes)
            if segment is None:
                return None
        else:
            self._free.remove(segment)
        self._taken[segment.number] = segment
        return segment

    def give_back(self, number: int) -> None:
        """The other side is done with what lies in a segment.

        Raises:
            MalformedMessage: nothing does.
        """
        segment = self._taken.pop(number, None)
        if segment is None:
            raise MalformedMessage(f"done with segment {number}, which was not in use")
        self._free.append(segment)
        while sum(free.size_bytes for free in self._free) > _MAX_FREE_BYTES:
            self._drop(self._free.pop(0))

    def close(self) -> None:
        """Gives all of it back. Idempotent."""
        for segment in (*self._free, *self._taken.values()):
            segment.map.close()
            segment.file.close()
        self._free.clear()
        self._taken.clear()

    def _make(self, size_bytes: int) -> Segment | None:
        rounded = max(_SMALLEST_BYTES, 1 << (size_bytes - 1).bit_length())
        while self._free and self._size_bytes + rounded > _MAX_BYTES:
            self._drop(self._free.pop(0))
        if self.count >= _MAX_SEGMENTS or self._size_bytes + rounded > _MAX_BYTES:
            return None
        try:
            file = SealedFile.make("modelyard-tensors", rounded)
        except OSError:  # No memory or no descriptor: the socket needs less of both.
            return None
        try:
            mapped = mmap.mmap(file.fileno(), rounded)
        except OSError:
            file.close()
            return None
        segment = Segment(self._next, rounded, file, mapped)
        self._next += 1
        self._size_bytes += rounded
        return segment

    def _drop(self, segment: Segment) -> None:
        segment.map.close()
        segment.file.close()
        self._size_bytes -= segment.size_bytes
        if segment.is_announced:
            self._on_dropped(segment.number)


class SegmentTable:
    """The other side's segments, as the side that receives knows them. Not thread-safe."""

    def __init__(self) -> None:
        self._maps: dict[int, mmap.mmap] = {}
        self._size_bytes = 0

    @property
    def count(self) -> int:
        """Segments there are."""
        return len(self._maps)

    def add(self, number: int, size_bytes: int, descriptor: int) -> None:
        """Takes a segment that is announced.

        Args:
            number: what it will be called.
            size_bytes: of it.
            descriptor: of its file; closed here in any case.

        Raises:
            MalformedMessage: it is none, or one too many.
        """
        try:
            if number in self._maps:
                raise MalformedMessage(f"segment {number} is announced twice")
            if len(self._maps) >= _MAX_SEGMENTS or self._size_bytes + size_bytes > _MAX_BYTES:
                raise MalformedMessage("more segments than there may be")
            if size_bytes <= 0 or not is_sealed(descriptor, size_bytes):
                raise MalformedMessage(f"segment {number} is not sealed at {size_bytes} bytes")
            try:
                mapped = mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
            except OSError as error:
                raise MalformedMessage(f"segment {number} cannot be mapped: {error}") from None
        finally:
            os.close(descriptor)
        self._maps[number] = mapped
        self._size_bytes += size_bytes

    def read(self, number: int, begin: int, size_bytes: int) -> bytes:
        """Copies bytes out of a segment.

        Raises:
            MalformedMessage: there is no such segment, or they are not all in it.
        """
        mapped = self._maps.get(number)
        if mapped is None:
            raise MalformedMessage(f"segment {number} was not announced")
        if begin < 0 or size_bytes < 0 or begin > len(mapped) - size_bytes:
            raise MalformedMessage(f"{size_bytes} bytes at {begin} are not in segment {number}")
        return mapped[begin : begin + size_bytes]

    def forget(self, number: int) -> None:
        """The other side has dropped a segment.

        Raises:
            MalformedMessage: there is no such segment.
        """
        mapped = self._maps.pop(number, None)
        if mapped is None:
            raise MalformedMessage(f"segment {number} is dropped, but was not announced")
        self._size_bytes -= len(mapped)
        mapped.close()

    def close(self) -> None:
        """Unmaps all of them. Idempotent."""
        for mapped in self._maps.values():
            mapped.close()
        self._maps.clear()
