"""Mode "arena": like "owned", but into regions that are kept and used again.

Making the pages of a new region takes several times as long as copying the file into them. An arena
keeps regions whose tensors are gone, up to a number of bytes, and the next model finds the pages
made.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet, ref

from modelyard_server.runtimes.api import StopCheck
from modelyard_server.weights.model_files import FolderLike
from modelyard_server.weights.reading.api import FilePart, Reading, layout
from modelyard_server.weights.reading.mailbox import Mailbox
from modelyard_server.weights.reading.owned import fill_region
from modelyard_server.weights.reading.regions import (
    HOST_ALIGNMENT_BYTES,
    Region,
    anonymous_mapping,
    page_ceiling,
)

__all__ = ["ArenaReader"]

_SMALLEST_CLASS_BYTES = 1 << 20


class ArenaReader:
    """Reads into recycled slabs; see Reader.

    The sizes of slabs are powers of two, so that models of about one size use one another's. Only
    address space is rounded up: a slab has pages as far as it has been written, and what a smaller
    model than the last one does not need of them goes back when that model takes the slab.

    A slab from which a part of the tensors has gone gives their whole pages back (see settle), and
    is not used again.

    Args:
        arena_bytes: most that slabs without tensors keep, of all positions together. The ones that
            have been idle for longest go first.
    """

    def __init__(self, arena_bytes: int) -> None:
        self._arena_bytes = arena_bytes
        self._mailbox: Mailbox[_Slab] = Mailbox(self._put_back)
        self._idle: list[_Slab] = []
        self._used: WeakSet[_Slab] = WeakSet()

    def read(
        self,
        packs: FolderLike,
        parts: Sequence[FilePart],
        *,
        position: int,
        torch_device: str,
        stop: StopCheck,
    ) -> Reading:
        """See Reader."""
        files, size_bytes = layout(parts, alignment=HOST_ALIGNMENT_BYTES)
        slab = self._take(position, size_bytes) if size_bytes else None
        return fill_region(slab, packs, parts, files, stop)

    def idle_bytes(self, position: int) -> int:
        """Bytes that slabs without tensors keep for a position."""
        with self._mailbox.locked():
            return sum(slab.page_bytes for slab in self._idle if slab.position == position)

    def settle(self) -> None:
        """Gives back what has gone from slabs that still hold other tensors.

        Not done when it goes: tensors of a model go one after another, and as long as it is not
        the last one they would tear up a slab that is about to be free as a whole.
        """
        with self._mailbox.locked():
            used = list(self._used)
        for slab in used:
            slab.settle()

    def trim(self) -> None:
        """Gives back everything that is idle."""
        with self._mailbox.locked():
            dropped, self._idle = self._idle, []
        dropped.clear()
        self.settle()

    def _take(self, position: int, size_bytes: int) -> _Slab:
        class_bytes = max(_SMALLEST_CLASS_BYTES, 1 << (size_bytes - 1).bit_length())
        with self._mailbox.locked():
            fitting = (
                slab
                for slab in reversed(self._idle)
                if slab.position == position and slab.class_bytes == class_bytes
            )
            slab = next(fitting, None)
            if slab is not None:
                self._idle.remove(slab)
        if slab is None:
            slab = _Slab(self, position, class_bytes)
        slab.resize(size_bytes)
        with self._mailbox.locked():
            self._used.add(slab)
        return slab

    def _returned(self, slab: _Slab) -> None:
        self._mailbox.post(slab)

    def _put_back(self, slab: _Slab) -> None:
        self._used.discard(slab)
        if slab.is_torn or slab.page_bytes > self._arena_bytes:
            return
        self._idle.append(slab)
        kept = sum(slab.page_bytes for slab in self._idle)
        while kept > self._arena_bytes:
            kept -= self._idle.pop(0).page_bytes


class _Slab(Region):
    """Anonymous memory that goes back to its arena when its last view has gone.

    Attributes:
        position: of the device for which it is kept.
        class_bytes: its address space.
        page_bytes: how far it has been written since its pages were given back.
        is_torn: not all of these pages are there.
    """

    def __init__(self, arena: ArenaReader, position: int, class_bytes: int) -> None:
        super().__init__(anonymous_mapping(class_bytes))
        self.position = position
        self.class_bytes = class_bytes
        self.page_bytes = 0
        self.is_torn = False
        self._arena = ref(arena)
        self._gone: list[tuple[int, int]] = []

    def resize(self, size_bytes: int) -> None:
        """Makes an idle slab ready for so many bytes."""
        page_bytes = page_ceiling(size_bytes)
        if page_bytes < self.page_bytes:
            self._drop_pages(page_bytes, self.page_bytes)
        self.page_bytes = page_bytes

    def settle(self) -> None:
        """Gives the pages of views back that have gone, if there are others."""
        with self._lock:
            if not self._views or not self._gone:
                return
            self.is_torn = True
            for begin, end in _joined(self._gone):
                self._drop_pages(begin, end)
            self._gone.clear()

    def _give_back(self, begin: int, end: int) -> None:
        self._gone.append((begin, end))
        if not self._views:
            self._gone.clear()
            arena = self._arena()
            if arena is not None:
                arena._returned(self)


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same ranges; those that touch as one."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if merged and merged[-1][1] == begin:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return merged
