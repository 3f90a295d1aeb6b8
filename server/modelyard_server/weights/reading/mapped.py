"""Mode "map": tensors lie in the mapped file, and everybody's in the same mapping of it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from weakref import WeakValueDictionary

import torch

from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError, StopCheck
from modelyard_server.weights.mapping import (
    TORCH_DTYPES,
    Extent,
    is_aligned,
    map_opened,
    open_checked,
    populate,
)
from modelyard_server.weights.model_files import FolderLike, OpenFile
from modelyard_server.weights.origin import NOWHERE, Origin
from modelyard_server.weights.pages import joined_ranges, uncached, write_protect
from modelyard_server.weights.reading.api import FilePart, Placed, Reading, empty_tensor
from modelyard_server.weights.reading.regions import Range, Region, array_tensor
from modelyard_server.weights.safetensors_files import FileHeader, TensorHeader

__all__ = ["MappedReader"]


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
        origin = NOWHERE
        for part in parts:
            header = part.header
            shared = [tensor for tensor in part.tensors if tensor.identity]
            own = [tensor for tensor in part.tensors if not tensor.identity]
            with open_checked(packs, header) as file:
                if shared:
                    origin += _place(self._shared(file, header), file, shared, placed, stop)
                if own:
                    origin += _place(_MappedFile(file, header), file, own, placed, stop)
        return Reading(placed=placed, origin=origin)

    def _shared(self, file: OpenFile, header: FileHeader) -> _MappedFile:
        with self._lock:
            region = self._regions.get(header.identity)
        if region is None:
            made = _MappedFile(file, header, write_protected=self._write_protected)
            with self._lock:
                region = self._regions.setdefault(header.identity, made)
        return region


class _MappedFile(Region):
    def __init__(
        self, file: OpenFile, header: FileHeader, *, write_protected: bool = False
    ) -> None:
        super().__init__(map_opened(file, header))
        self.header = header
        self._populated: set[Range] = set()
        if write_protected:
            try:
                write_protect(self.address, len(self.mapping))
            except OSError:
                raise ModelFilesError(f"{header.name} cannot be mapped", transient=True) from None

    def extent(self, tensor: TensorHeader) -> Extent:
        """See Mapped."""
        return self._extent(self.header.data_start + tensor.begin, tensor.size_bytes)

    def populate(self, file: OpenFile, ranges: Iterable[Range], stop: StopCheck) -> Origin:
        """Reads the pages of ranges of which the caller has views, unless somebody has.

        Pages that the system has in memory are left to the first use: making them known to the
        page tables takes longer than everything else about such a load, and nothing can fail then.

        Returns:
            Where the pages were.
        """
        if stop():
            raise LoadCancelled
        missing = [key for key in ranges if key not in self._populated]
        wanted = joined_ranges(missing)
        pieces = [
            self._extent(*piece)
            for begin, end in wanted
            for piece in uncached(file.descriptor, begin, end - begin)
        ]
        populate(pieces, stop=stop)
        with self._lock:
            self._populated.update(missing)
        return Origin(
            file_bytes=sum(end - begin for begin, end in wanted),
            missing_bytes=sum(piece.size_bytes for piece in pieces),
        )

    def _extent(self, start: int, size_bytes: int) -> Extent:
        return Extent(
            mapping=self.mapping,
            file=self.header.name,
            start=start,
            size_bytes=size_bytes,
            address=self.address + start,
        )

    def _give_back(self, begin: int, end: int) -> None:
        self._populated.discard((begin, end))
        super()._give_back(begin, end)


def _place(
    region: _MappedFile,
    file: OpenFile,
    tensors: Sequence[TensorHeader],
    placed: dict[str, Placed],
    stop: StopCheck,
) -> Origin:
    filled = [tensor for tensor in tensors if tensor.begin < tensor.end]
    # Before the pages are read: a range that somebody lets go of meanwhile is not given back then.
    start = region.header.data_start
    ranges = [(start + tensor.begin, start + tensor.end) for tensor in filled]
    arrays = region.arrays(ranges, filled)
    origin = region.populate(file, ranges, stop)
    for tensor, array in zip(filled, arrays, strict=True):
        if is_aligned(region.header, tensor):
            base = array_tensor(array, tensor)
            placed[tensor.name] = Placed(base=base, file=region, header=tensor)
        else:
            # The format does not align tensors behind an odd one; the processor wants it.
            copied = torch.from_numpy(array).clone()
            base = copied.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)
            placed[tensor.name] = Placed(base=base)
    for tensor in tensors:
        if not tensor.size_bytes:
            placed[tensor.name] = Placed(base=empty_tensor(tensor, "cpu"))
    return origin
