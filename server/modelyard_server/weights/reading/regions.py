"""Regions of host memory that go back to the system as the tensors over them go.

A tensor over a region keeps the view it was made from, whoever holds the tensor and by whatever
alias. So the end of the view is the moment at which nobody can reach the bytes any more.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar
from weakref import ref

import numpy as np
import torch

from modelyard_server.weights.mapping import TORCH_DTYPES
from modelyard_server.weights.pages import advise
from modelyard_server.weights.safetensors_files import TensorHeader

__all__ = [
    "HOST_ALIGNMENT_BYTES",
    "Range",
    "Region",
    "anonymous_mapping",
    "array_tensor",
    "page_ceiling",
    "tensor_over",
]

HOST_ALIGNMENT_BYTES = 64
"""Of large tensors in host memory: a cache line, and the widest vector of a processor."""

Range = tuple[int, int]
"""First byte, and first byte behind it."""

_Array = np.ndarray[Any, np.dtype[Any]]

_ARRAY_DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        name: np.dtype(kind)
        for name, kind in (
            ("BOOL", np.bool_),
            ("U8", np.uint8),
            ("I8", np.int8),
            ("F8_E4M3", np.uint8),
            ("F8_E5M2", np.uint8),
            ("I16", np.int16),
            ("U16", np.uint16),
            ("F16", np.float16),
            ("BF16", np.uint16),
            ("I32", np.int32),
            ("U32", np.uint32),
            ("F32", np.float32),
            ("I64", np.int64),
            ("U64", np.uint64),
            ("F64", np.float64),
        )
    }
)
"""Types of arrays by the format's names. Integers stand for those that numpy has not."""

_BYTE = np.dtype(np.uint8)
_OTHERWISE_TYPED = frozenset({"BF16", "F8_E4M3", "F8_E5M2"})


class Region:
    """One mapping, whose pages are given back range by range as their views go.

    The mapping itself goes when no view is left and nobody refers to the region. Thread-safe.

    Args:
        mapping: of a file or of anonymous memory.

    Attributes:
        mapping: the same.
        address: of its first byte.
    """

    _viewed: ClassVar[set[Region]] = set()
    """All that have views. They are kept, and with them what waits for the ends of the views."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self.mapping = mapping
        self.address = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
        self._views: dict[Range, _Watch] = {}
        # A view may end in any thread, in the middle of what that thread is doing here.
        self._lock = threading.RLock()

    def view(self, begin: int, end: int) -> memoryview:
        """A view of a range. The same one for everybody who asks while it lives.

        Ranges of two views are the same or do not overlap.
        """
        key = (begin, end)
        with self._lock:
            view: memoryview | None = self._known(key)
            if view is None:
                view = memoryview(self.mapping)[begin:end]
                self._keep(key, view)
            return view

    def arrays(self, ranges: Iterable[Range], tensors: Iterable[TensorHeader]) -> list[_Array]:
        """Views of tensors that lie in the region, as arrays; for array_tensor.

        Of a region either views are taken or arrays.

        Args:
            ranges: where they lie.
            tensors: as many, none of them empty. One that is not aligned is viewed as bytes.
        """
        found = []
        with self._lock:
            for key, tensor in zip(ranges, tensors, strict=True):
                array = self._known(key)
                if array is None:
                    dtype, shape = _ARRAY_DTYPES[tensor.dtype], tensor.shape
                    if key[0] % dtype.itemsize:
                        dtype, shape = _BYTE, (tensor.size_bytes,)
                    array = np.ndarray(shape, dtype, self.mapping, key[0])
                    self._keep(key, array)
                found.append(array)
        return found

    def _known(self, key: Range) -> Any:
        watch = self._views.get(key)
        return None if watch is None else watch()

    def _keep(self, key: Range, view: memoryview | _Array) -> None:
        watch = _Watch(view, _end)
        watch.region = self
        watch.key = key
        self._views[key] = watch
        self._viewed.add(self)

    def ended(self, key: Range) -> None:
        """Called when a view of a range has ended."""
        with self._lock:
            known = self._views.get(key)
            if known is None or known() is not None:
                # Somebody has taken the range again meanwhile.
                return
            del self._views[key]
            if not self._views:
                self._viewed.discard(self)
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


class _Watch(ref[Any]):
    """Waits for the end of a view.

    What weakref.finalize does, at a fraction of the cost: a model has hundreds.
    """

    __slots__ = ("key", "region")

    region: Region
    key: Range


def _end(watch: Any) -> None:
    # Nothing of the module's: its names are gone when the interpreter ends.
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


def array_tensor(array: _Array, tensor: TensorHeader) -> torch.Tensor:
    """The same over one of a region's arrays that is aligned; it takes a third of the time."""
    base = torch.from_numpy(array)
    return base.view(TORCH_DTYPES[tensor.dtype]) if tensor.dtype in _OTHERWISE_TYPED else base
