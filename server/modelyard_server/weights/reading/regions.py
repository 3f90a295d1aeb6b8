"""Regions of host memory that go back to the system as the tensors over them go.

A tensor over a region keeps the view it was made from, whoever holds the tensor and by whatever
alias. So the end of the view is the moment at which nobody can reach the bytes any more.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from typing import Self
from weakref import ref

import torch

from modelyard_server.weights.mapping import TORCH_DTYPES
from modelyard_server.weights.pages import advise
from modelyard_server.weights.safetensors_files import TensorHeader

__all__ = [
    "HOST_ALIGNMENT_BYTES",
    "Region",
    "anonymous_mapping",
    "page_ceiling",
    "tensor_over",
]

HOST_ALIGNMENT_BYTES = 64
"""Of large tensors in host memory: a cache line, and the widest vector of a processor."""


class Region:
    """One mapping, whose pages are given back range by range as their views go.

    The mapping itself goes when no view is left and nobody refers to the region. Thread-safe.

    Args:
        mapping: of a file or of anonymous memory.

    Attributes:
        mapping: the same.
        address: of its first byte.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        self.mapping = mapping
        self.address = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
        self._views: dict[tuple[int, int], ref[memoryview]] = {}
        # A view may end in any thread, in the middle of what that thread is doing here.
        self._lock = threading.RLock()

    def view(self, begin: int, end: int) -> memoryview:
        """A view of a range. The same one for everybody who asks while it lives.

        Ranges of two views are the same or do not overlap.
        """
        key = (begin, end)
        with self._lock:
            known = self._views.get(key)
            view = known() if known is not None else None
            if view is None:
                view = memoryview(self.mapping)[begin:end]
                self._views[key] = _Watch(view, self, key)
            return view

    def ended(self, key: tuple[int, int]) -> None:
        """Called when a view of a range has ended."""
        with self._lock:
            known = self._views.get(key)
            if known is None or known() is not None:
                # Somebody has taken the range again meanwhile.
                return
            del self._views[key]
            self._give_back(*key)

    def _give_back(self, begin: int, end: int) -> None:
        """Called for a range that nobody uses any more, under the lock."""
        self._drop_pages(begin, end)

    def _drop_pages(self, begin: int, end: int) -> None:
        # Only whole pages: neighbours share the others.
        first, last = page_ceiling(begin), end - end % mmap.PAGESIZE
        if last > first:
            # It is advice: a system that cannot take it keeps them until the region goes.
            with contextlib.suppress(OSError):
                advise(self.address + first, last - first, mmap.MADV_DONTNEED)


class _Watch(ref[memoryview]):
    """Waits for the end of a view, and keeps its region until then.

    What weakref.finalize does, at half the cost: a model has hundreds.
    """

    __slots__ = ("key", "region")

    region: Region
    key: tuple[int, int]

    def __new__(cls, view: memoryview, region: Region, key: tuple[int, int]) -> Self:
        watch = super().__new__(cls, view, _end)
        watch.region = region
        watch.key = key
        _watches[id(watch)] = watch
        return watch

    def __init__(self, view: memoryview, region: Region, key: tuple[int, int]) -> None:
        """All is done in __new__."""


_watches: dict[int, _Watch] = {}


def _end(watch: ref[memoryview], watches: dict[int, _Watch] = _watches) -> None:
    # As an argument, because names of modules are gone when the interpreter ends.
    watches.pop(id(watch))
    assert isinstance(watch, _Watch)
    watch.region.ended(watch.key)


def anonymous_mapping(size_bytes: int) -> mmap.mmap:
    """New private memory, whose pages are made when they are first written.

    Raises:
        MemoryError: the system has none.
    """
    try:
        return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        raise MemoryError from None


def page_ceiling(size_bytes: int) -> int:
    """The next multiple of the size of a page."""
    return size_bytes + -size_bytes % mmap.PAGESIZE


def tensor_over(view: memoryview, tensor: TensorHeader) -> torch.Tensor:
    """A tensor whose storage is a view of memory, and keeps that view."""
    flat = torch.frombuffer(view, dtype=TORCH_DTYPES[tensor.dtype])
    return flat if len(tensor.shape) == 1 else flat.view(tensor.shape)
