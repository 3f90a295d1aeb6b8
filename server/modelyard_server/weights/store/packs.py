"""Packs: safetensors files whose tensors are named by their identities.

A pack's own name is the digest of its header. The header names every tensor by the digest of its
bytes, so the name stands for all of the pack, and nothing has to be read twice to find it.

A pack is never written again, and the time of its last change is set to one that says so. One that
has another time was touched by somebody: its bytes are compared with their digests before they are
believed.

The format leaves no gaps between tensors. So those come first whose sizes can be divided by a page,
then by half a page, and so on: every tensor starts at a multiple of the largest power of two that
divides its own size, at most a page, and so at least at a multiple of its elements' size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from modelyard_server.runtimes.api import ModelFilesError, StopCheck
from modelyard_server.weights.model_files import open_model_file, read_exactly
from modelyard_server.weights.safetensors_files import (
    MAX_HEADER_BYTES,
    FileHeader,
    TensorHeader,
    read_header,
)
from modelyard_server.weights.store.contents import TensorContent, begin_tensor, content_of
from modelyard_server.weights.store.layout import store_writes
from modelyard_server.weights.store.sources import BLOCK_BYTES, SourceWeights, blocks_of

__all__ = [
    "Pack",
    "PackPlan",
    "Place",
    "Shelf",
    "damaged_tensors",
    "pack_names",
    "plan_packs",
    "write_pack",
]

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
_SEAL_NS = 10**18
"""The time that a pack has which nobody touched; whole seconds, for every file system to keep."""
_PAGE_BYTES = 4096
_LENGTH_BYTES = 8
_HEADER_BUDGET_BYTES = MAX_HEADER_BYTES - 2 * _PAGE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tensor lies in a model's own files.

    Attributes:
        file: name of the file.
        begin: its first byte in it.
    """

    file: str
    begin: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """A pack that is to be written.

    Attributes:
        header: all bytes before the data.
        tensors: in the order of the data.
        size_bytes: of the whole file.
    """

    header: bytes
    tensors: tuple[TensorContent, ...]
    size_bytes: int

    @property
    def name(self) -> str:
        """Name of the file."""
        return _name_of(self.header)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """A pack that is there.

    Attributes:
        header: its header.
        tensors: its tensors by identity.
    """

    header: FileHeader
    tensors: Mapping[str, TensorHeader]


def plan_packs(tensors: Iterable[TensorContent], places: Mapping[str, Place]) -> list[PackPlan]:
    """Lays tensors out; in one pack, unless its header became longer than anybody reads.

    Args:
        tensors: what is to be written; of distinct identities.
        places: where they lie in the source, by name: they are read in about that order.
    """

    def order(tensor: TensorContent) -> tuple[int, str, int]:
        place = places[tensor.name]
        return (-_alignment(tensor.size_bytes), place.file, place.begin)

    plans: list[PackPlan] = []
    part: list[TensorContent] = []
    entries: list[str] = []
    length, offset = 0, 0
    for tensor in sorted(tensors, key=order):
        entry = _entry(tensor, offset)
        if part and length + len(entry) > _HEADER_BUDGET_BYTES:
            plans.append(_plan(part, entries, offset))
            part, entries, length, offset = [], [], 0, 0
            entry = _entry(tensor, 0)
        part.append(tensor)
        entries.append(entry)
        length += len(entry) + 1
        offset += tensor.size_bytes
    if part:
        plans.append(_plan(part, entries, offset))
    return plans


def _alignment(size_bytes: int) -> int:
    return min(size_bytes & -size_bytes, _PAGE_BYTES) if size_bytes else _PAGE_BYTES


def _entry(tensor: TensorContent, offset: int) -> str:
    value = {
        "dtype": tensor.dtype,
        "shape": tensor.shape,
        "data_offsets": [offset, offset + tensor.size_bytes],
    }
    return f'"{tensor.identity}":{json.dumps(value, separators=(",", ":"))}'


def _plan(tensors: list[TensorContent], entries: list[str], data_bytes: int) -> PackPlan:
    text = f"{{{','.join(entries)}}}".encode()
    # Spaces behind the header are the format's own way of moving the data, here to a page.
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _PAGE_BYTES)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return PackPlan(header=header, tensors=tuple(tensors), size_bytes=len(header) + data_bytes)


def _name_of(header: bytes) -> str:
    return hashlib.sha256(header).hexdigest() + SUFFIX


def write_pack(
    plan: PackPlan,
    target: Path,
    source: SourceWeights,
    places: Mapping[str, Place],
    stop: StopCheck,
) -> None:
    """Writes a pack from a model's files, down to the disk.

    The bytes are looked at a second time: other models will trust their name.

    Raises:
        ModelFilesError: the source changed or cannot be read, or the store's disk is full or
            broken. The target may be there in part.
        LoadCancelled: stop said so.
    """
    with store_writes():
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        with os.fdopen(descriptor, "wb", buffering=1 << 20) as file:
            file.write(plan.header)
            for tensor in plan.tensors:
                digest = begin_tensor(tensor.dtype, tensor.shape)
                place = places[tensor.name]
                end = place.begin + tensor.size_bytes
                for block in source.blocks(place.file, place.begin, end, stop):
                    digest.update(block)
                    file.write(block)
                if digest.hexdigest() != content_of(tensor.identity):
                    raise ModelFilesError(
                        f"{place.file} changed while it was being imported", transient=True
                    )
            file.flush()
            os.utime(descriptor, ns=(_SEAL_NS, _SEAL_NS))
            os.fsync(descriptor)


class Shelf:
    """The packs of a store and the tensors in them. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = os.fspath(folder)
        self._lock = threading.Lock()
        self._packs: dict[str, Pack] = {}
        self._places: dict[str, str] = {}

    def pack(self, name: str) -> Pack | None:
        """Returns a pack if it is there and whole.

        One that is known costs a stat. One that was touched is read, once.
        """
        try:
            # Every load asks, and joining paths takes longer than the answer.
            status = os.lstat(f"{self._path}/{name}")
        except OSError:
            self.forget(name)
            return None
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        with self._lock:
            known = self._packs.get(name)
            if known is not None and known.header.identity == identity:
                return known
        pack = _whole_pack(self._folder, name)
        self.forget(name)
        if pack is not None:
            with self._lock:
                self._packs[name] = pack
                self._places.update(dict.fromkeys(pack.tensors, name))
        return pack

    def refresh(self) -> None:
        """Looks at all packs: other servers add some, and disks lose some."""
        names = set(pack_names(self._folder))
        with self._lock:
            gone = self._packs.keys() - names
        for name in gone:
            self.forget(name)
        for name in names:
            self.pack(name)

    def find(self, identity: str) -> str | None:
        """Name of a pack that has the tensor."""
        with self._lock:
            return self._places.get(identity)

    def forget(self, name: str) -> None:
        """Drops what is known of a pack."""
        with self._lock:
            pack = self._packs.pop(name, None)
            for identity in () if pack is None else pack.tensors:
                if self._places.get(identity) == name:
                    del self._places[identity]


def pack_names(folder: Path) -> Iterator[str]:
    """Names of the files that are called like packs."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIX):
                yield entry.name


def _whole_pack(folder: Path, name: str) -> Pack | None:
    pack = _read_pack(folder, name)
    if pack is None or _is_sealed(pack):
        return pack
    tensors = tuple(replace(tensor, identity=tensor.name) for tensor in pack.header.tensors)
    header = replace(pack.header, tensors=tensors)
    if any(damaged_tensors(folder, header, lambda: False)):
        logger.error("pack %s of the weight store is damaged", name)
        return None
    # Where it cannot be sealed it is read again by the next server.
    with contextlib.suppress(OSError):
        os.utime(folder / name, ns=(_SEAL_NS, _SEAL_NS), follow_symlinks=False)
    return _read_pack(folder, name)


def _is_sealed(pack: Pack) -> bool:
    return pack.header.identity[3] == _SEAL_NS


def _read_pack(folder: Path, name: str) -> Pack | None:
    try:
        header = read_header(folder, name)
        with open_model_file(folder, name) as file:
            if file.identity != header.identity:
                return None
            content = read_exactly(file.descriptor, header.data_start, name)
    except ModelFilesError:
        return None
    if _name_of(content) != name:
        return None
    # Names of tensors are kept by every model that has them: once is enough.
    tensors = tuple(
        replace(tensor, name=sys.intern(tensor.name), dtype=sys.intern(tensor.dtype))
        for tensor in header.tensors
    )
    return Pack(
        header=replace(header, name=sys.intern(name), tensors=tensors),
        tensors={tensor.name: tensor for tensor in tensors},
    )


def damaged_tensors(folder: Path, header: FileHeader, stop: StopCheck) -> Iterator[str]:
    """Reads a model's tensors in a pack and gives the names of those that are not what they were.

    Args:
        folder: of the packs.
        header: the model's part of the pack.
        stop: asked while it is read.

    Raises:
        LoadCancelled: stop said so.
    """
    pack = _read_pack(folder, header.name)
    buffer = memoryview(bytearray(BLOCK_BYTES))
    try:
        with open_model_file(folder, header.name) as file:
            for tensor in header.tensors:
                begin = header.data_start + tensor.begin
                digest = begin_tensor(tensor.dtype, tensor.shape)
                with contextlib.suppress(ModelFilesError):
                    for block in blocks_of(
                        file.descriptor,
                        header.name,
                        begin,
                        begin + tensor.size_bytes,
                        stop,
                        buffer,
                    ):
                        digest.update(block)
                if pack is None or digest.hexdigest() != content_of(tensor.identity):
                    yield tensor.name
    except ModelFilesError:
        yield from (tensor.name for tensor in header.tensors)
