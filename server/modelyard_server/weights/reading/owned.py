"""Mode "owned": tensors are copied out of their files into a region of anonymous memory."""

from __future__ import annotations

from collections.abc import Sequence

from modelyard_server.runtimes.api import StopCheck
from modelyard_server.weights.mapping import open_checked
from modelyard_server.weights.model_files import FolderLike
from modelyard_server.weights.origin import NOWHERE
from modelyard_server.weights.reading.api import (
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
from modelyard_server.weights.reading.regions import (
    HOST_ALIGNMENT_BYTES,
    Region,
    anonymous_mapping,
    page_ceiling,
    tensor_over,
)
from modelyard_server.weights.safetensors_files import FileHeader

__all__ = ["OwnedReader", "fill_region"]


class OwnedReader:
    """Reads everything that is wanted at once into one new region; see Reader.

    Whole pages of a tensor go back with it, the region with the last of them.
    """

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
        region = Region(anonymous_mapping(size_bytes)) if size_bytes else None
        return fill_region(region, packs, parts, files, stop)


def fill_region(
    region: Region | None,
    packs: FolderLike,
    parts: Sequence[FilePart],
    files: Sequence[tuple[FileHeader, Sequence[Piece]]],
    stop: StopCheck,
) -> Reading:
    """Reads tensors into their places in a region.

    Args:
        region: large enough for all; None if they are all empty.
        packs: the folder in which the files lie.
        parts: what is wanted.
        files: the places of all that are not empty, see layout.
        stop: asked between steps.

    Raises:
        ModelFilesError: a file has changed or cannot be read.
        LoadCancelled: stop said so.
    """
    placed = {
        tensor.name: Placed(base=empty_tensor(tensor, "cpu"))
        for part in parts
        for tensor in part.tensors
        if not tensor.size_bytes
    }
    if region is None:
        return Reading(placed=placed)
    # All views before the first read: if that fails the region has come to its end.
    views = [[region.view(piece.begin, piece.end) for piece in pieces] for _, pieces in files]
    used = 0
    origin = NOWHERE
    for (header, pieces), targets in zip(files, views, strict=True):
        with open_checked(packs, header) as file:
            origin += origin_of(file.descriptor, header, [piece.tensor for piece in pieces])
            for piece, target in zip(pieces, targets, strict=True):
                offset = header.data_start + piece.tensor.begin
                read_into(file, header.name, target, offset=offset, stop=stop)
                placed[piece.tensor.name] = Placed(base=tensor_over(target, piece.tensor))
                used += piece.tensor.size_bytes
            check_unchanged(file, header.name)
    end = files[-1][1][-1].end
    return Reading(placed=placed, padding_bytes=page_ceiling(end) - used, origin=origin)
