"""Mode "map": tensors lie in the mapped file, and everybody's in the same mapping of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from weakref import WeakValueDictionary

import torch

from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError, StopCheck
from modelyard_server.weights.mapping import (
    TORCH_DTYPES,
    Extent,
    is_aligned,
    joined,
    map_file,
    open_checked,
    populate,
)
from modelyard_server.weights.model_files import FolderLike
from modelyard_server.weights.pages import are_cached, seem_cached, write_protect
from modelyard_server.weights.reading.api import FilePart, Placed, Reading, empty_tensor
from modelyard_server.weights.reading.regions import Region, tensor_over
from modelyard_server.weights.safetensors_files import FileHeader, TensorHeader

__all__ = ["MappedReader"]

_PIECE_BYTES = 2 << 20
"""What is read at once of a file that is in memory in part."""


class MappedReader:
    """Maps files; see Reader.

    Tensors with an identity lie in one mapping of their file, whoever asks, so that their pages are
    in memory and in the page tables once. A tensor without identity belongs to one model, and lies
    in a mapping of its own: what the model writes to it no other one sees.

    Args:
        write_protected: a write to a tensor with an identity ends the process, instead of changing
            it for everybody.
    """

    def __init__(self, *, write_protected: bool = False) -> None:
        self._write_protected = write_protected
        self._regions: WeakValueDictionary[tuple[int, int, int, int], _MappedFile] = (
            WeakValueDictionary()
        )
        self._lock = threading.Lock()

    def read(
        self,
        packs: FolderLike,
        parts: Sequence[FilePart],
        *,
        position: int,
        torch_device: str,
        stop: StopCheck,
    ) -> Reading:
        """See Reader. A misaligned tensor is copied out of the file."""
        placed: dict[str, Placed] = {}
        for part in parts:
            shared = [tensor for tensor in part.tensors if tensor.identity]
            own = [tensor for tensor in part.tensors if not tensor.identity]
            if shared:
                _place(self._shared(packs, part.header), shared, placed, stop)
            if own:
                _place(_MappedFile(packs, part.header), own, placed, stop)
        return Reading(placed=placed)

    def _shared(self, packs: FolderLike, header: FileHeader) -> _MappedFile:
        with self._lock:
            region = self._regions.get(header.identity)
        if region is None:
            made = _MappedFile(packs, header, write_protected=self._write_protected)
            with self._lock:
                region = self._regions.setdefault(header.identity, made)
        return region


class _MappedFile(Region):
    def __init__(
        self, packs: FolderLike, header: FileHeader, *, write_protected: bool = False
    ) -> None:
        super().__init__(map_file(packs, header))
        self.header = header
        self._packs = packs
        self._populated: set[tuple[int, int]] = set()
        if write_protected:
            try:
                write_protect(self.address, len(self.mapping))
            except OSError:
                raise ModelFilesError(f"{header.name} cannot be mapped", transient=True) from None

    def extent(self, tensor: TensorHeader) -> Extent:
        start = self.header.data_start + tensor.begin
        return Extent(
            mapping=self.mapping,
            file=self.header.name,
            start=start,
            size_bytes=tensor.size_bytes,
            address=self.address + start,
        )

    def populate(self, extents: Sequence[Extent], stop: StopCheck) -> None:
        """Reads the pages of extents of which the caller has views, unless somebody has.

        Pages that the system has in memory are left to the first use: making them known to the
        page tables takes longer than everything else about such a load, and nothing can fail then.
        """
        missing = [
            extent for extent in extents if (extent.start, extent.end) not in self._populated
        ]
        wanted = joined(missing)
        if stop():
            raise LoadCancelled
        if wanted:
            with open_checked(self._packs, self.header) as file:
                wanted = tuple(
                    piece for extent in wanted for piece in _uncached(extent, file.descriptor)
                )
        populate(wanted, stop=stop)
        with self._lock:
            self._populated.update((extent.start, extent.end) for extent in missing)

    def _give_back(self, begin: int, end: int) -> None:
        self._populated.discard((begin, end))
        super()._give_back(begin, end)


def _uncached(extent: Extent, descriptor: int) -> Iterator[Extent]:
    """The pieces of an extent that the system has not in memory, or not all of."""
    if seem_cached(descriptor, extent.start, extent.size_bytes):
        return
    for begin in range(0, extent.size_bytes, _PIECE_BYTES):
        size_bytes = min(_PIECE_BYTES, extent.size_bytes - begin)
        if not are_cached(descriptor, extent.start + begin, size_bytes):
            yield replace(
                extent,
                start=extent.start + begin,
                size_bytes=size_bytes,
                address=extent.address + begin,
            )


def _place(
    region: _MappedFile,
    tensors: Sequence[TensorHeader],
    placed: dict[str, Placed],
    stop: StopCheck,
) -> None:
    filled = [(tensor, region.extent(tensor)) for tensor in tensors if tensor.size_bytes]
    # Before the pages are read: a range that somebody lets go of meanwhile is not given back then.
    views = [region.view(extent.start, extent.end) for _, extent in filled]
    region.populate([extent for _, extent in filled], stop)
    for (tensor, extent), view in zip(filled, views, strict=True):
        if is_aligned(region.header, tensor):
            placed[tensor.name] = Placed(base=tensor_over(view, tensor), extent=extent)
        else:
            # The format does not align tensors behind an odd one; the processor wants it.
            copied = torch.frombuffer(view, dtype=torch.uint8).clone()
            base = copied.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)
            placed[tensor.name] = Placed(base=base)
    for tensor in tensors:
        if not tensor.size_bytes:
            placed[tensor.name] = Placed(base=empty_tensor(tensor, "cpu"))
