"""Reads and checks the headers of safetensors files, strictly, before anything else touches them.

The format: eight bytes with the length n of the header (unsigned, little-endian), n bytes of JSON
that map a tensor's name to its dtype, shape and place, then the data. The library that reads the
tensors checks most of this as well; what it lets through and we do not are a name said twice, a
header of up to 100 MB (which takes it 1.4 GB of memory) and tensors without a place of their own.

Source: the format section of the safetensors documentation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NoReturn

from modelyard_server.runtimes.api import JsonValue, ModelFilesError
from modelyard_server.weights.model_files import (
    FolderLike,
    distinct_keys,
    open_model_file,
    parse_json,
    read_exactly,
    read_model_file,
    shown,
)

__all__ = [
    "ITEM_SIZES",
    "Checkpoint",
    "FileHeader",
    "TensorHeader",
    "read_checkpoint",
    "read_header",
]

MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 100_000
MAX_SHARDS = 1_024
_MAX_RANK = 16
_MAX_NAME_CHARS = 1_024
_MAX_INDEX_BYTES = 16 << 20
_LENGTH_BYTES = 8

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

ITEM_SIZES: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 1,
        "U8": 1,
        "I8": 1,
        "F8_E4M3": 1,
        "F8_E5M2": 1,
        "I16": 2,
        "U16": 2,
        "F16": 2,
        "BF16": 2,
        "I32": 4,
        "U32": 4,
        "F32": 4,
        "I64": 8,
        "U64": 8,
        "F64": 8,
    }
)
"""Bytes of one element, by the format's name of the type. Complex types and types smaller than a
byte are not served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """Where one tensor lies and what it is.

    Attributes:
        name: its name in the file.
        dtype: the format's name of the element type, a key of ITEM_SIZES.
        shape: sizes of the dimensions, outermost first.
        begin: first byte, counted from the start of the file's data.
        end: first byte behind it.
        identity: the same for exactly the tensors that have the same type, shape and bytes and are
            the n-th such tensor of their model, so that no two of one model have the same. Empty
            for a tensor whose bytes have not been looked at.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    identity: str = ""

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return self.end - self.begin

    @property
    def element_count(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileHeader:
    """The checked header of one file.

    Attributes:
        name: name of the file in the model's folder.
        tensors: its tensors in the order of their data. read_header gives all of them, and they
            fill the data without a gap; a header in a StoredModel has only the model's own.
        data_start: where in the file the data starts.
        identity: what tells the file that was checked from one that took its place.
    """

    name: str
    tensors: tuple[TensorHeader, ...]
    data_start: int
    identity: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The headers of all files of a model, whose tensors have distinct names."""

    files: tuple[FileHeader, ...]
    _by_name: dict[str, TensorHeader] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    @property
    def tensors(self) -> dict[str, TensorHeader]:
        """All tensors by name. Made once and shared: it is not to be changed."""
        by_name = self._by_name
        if by_name is None:
            by_name = {tensor.name: tensor for file in self.files for tensor in file.tensors}
            # What is cached is no part of the value.
            object.__setattr__(self, "_by_name", by_name)
        return by_name

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size_bytes for file in self.files for tensor in file.tensors)


def read_checkpoint(folder: FolderLike) -> Checkpoint:
    """Reads the headers of model.safetensors, or of the shards that its index names.

    Raises:
        ModelFilesError: a file is missing, damaged, of another format or too large to be checked,
            or the index and the shards disagree.
    """
    try:
        return Checkpoint(files=(read_header(folder, WEIGHTS_FILE),))
    except ModelFilesError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        index = read_model_file(folder, INDEX_FILE, max_bytes=_MAX_INDEX_BYTES)
        if index is None:
            raise
    places = _read_index(index)
    shards = sorted(set(places.values()))
    if len(shards) > MAX_SHARDS:
        raise ModelFilesError(
            f"{INDEX_FILE} names {len(shards)} files; at most {MAX_SHARDS} are allowed"
        )
    headers = tuple(read_header(folder, shard) for shard in shards)
    found = {tensor.name: header.name for header in headers for tensor in header.tensors}
    count = sum(len(header.tensors) for header in headers)
    if count > MAX_TENSORS:
        raise ModelFilesError(f"the shards hold {count} tensors; at most {MAX_TENSORS} are allowed")
    for name, shard in places.items():
        if found.get(name) != shard:
            raise ModelFilesError(
                f"{INDEX_FILE} promises {shown(name)} in {shard}; it is not there"
            )
    if count != len(places):
        raise ModelFilesError(
            f"{INDEX_FILE} names {len(places)} tensors, but its files hold {count}"
        )
    return Checkpoint(files=headers)


def _read_index(content: bytes) -> dict[str, str]:
    value = parse_json(INDEX_FILE, content, max_depth=4)
    places = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(places, dict) or not places:
        raise ModelFilesError(f"{INDEX_FILE} has no weight_map")
    if len(places) > MAX_TENSORS:
        raise ModelFilesError(
            f"{INDEX_FILE} names {len(places)} tensors; at most {MAX_TENSORS} are allowed"
        )
    for shard in places.values():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise ModelFilesError(f"{INDEX_FILE} names a file that does not end in .safetensors")
    return places


def read_header(folder: FolderLike, name: str) -> FileHeader:
    """Reads and checks the header of one file; its data is not read.

    Args:
        folder: the model's folder.
        name: name of the file in it.

    Raises:
        ModelFilesError: it is no complete, gapless safetensors file within the limits.
    """
    with open_model_file(folder, name) as file:
        if file.size_bytes < _LENGTH_BYTES + 2:
            _damaged(name, f"has {file.size_bytes} bytes, too few for a safetensors file")
        length = int.from_bytes(read_exactly(file.descriptor, _LENGTH_BYTES, name), "little")
        available = file.size_bytes - _LENGTH_BYTES
        if length > available:
            # The first bytes of every other format read as an absurd length: say so.
            _damaged(
                name, f"is cut off or no safetensors file: it promises a header of {length} bytes"
            )
        if length > MAX_HEADER_BYTES:
            _damaged(name, f"has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
        content = read_exactly(file.descriptor, length, name)
        tensors = _read_tensors(name, content)
        data_bytes = tensors[-1].end
        if data_bytes != available - length:
            _damaged(
                name,
                f"is damaged: its tensors take {data_bytes} bytes, but {available - length} follow "
                "the header",
            )
        return FileHeader(
            name=name,
            tensors=tensors,
            data_start=_LENGTH_BYTES + length,
            identity=file.identity,
        )


def _read_tensors(name: str, content: bytes) -> tuple[TensorHeader, ...]:
    if not content.startswith(b"{"):
        _damaged(name, "is no safetensors file: its header is not a JSON object")
    # Counting bytes is a thousand times cheaper than parsing them, and bounds what parsing makes.
    limit = 12 * MAX_TENSORS
    if content.count(b"{") > MAX_TENSORS + 2 or content.count(b"[") > 2 * MAX_TENSORS:
        _damaged(name, f"names more than {MAX_TENSORS} tensors")
    if content.count(b'"') > limit or content.count(b",") > limit:
        _damaged(name, f"has a header with more than {limit} values")
    try:
        entries = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=distinct_keys,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except (ValueError, RecursionError):
        raise ModelFilesError(
            f"{name} is damaged: its header is not JSON, or says a name twice"
        ) from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _damaged(name, "is damaged: its __metadata__ does not map text to text")
    if not entries:
        _damaged(name, "holds no tensors")
    if len(entries) > MAX_TENSORS:
        _damaged(name, f"names more than {MAX_TENSORS} tensors")
    tensors = sorted(
        (_read_tensor(name, tensor, entry) for tensor, entry in entries.items()),
        key=lambda tensor: (tensor.begin, tensor.end),
    )
    expected = 0
    for tensor in tensors:
        if tensor.begin != expected:
            _damaged(
                name,
                f"is damaged: {shown(tensor.name)} starts at byte {tensor.begin} of the data, not "
                f"where the tensor before it ends ({expected})",
            )
        expected = tensor.end
    return tuple(tensors)


def _read_tensor(file: str, name: str, entry: JsonValue) -> TensorHeader:
    quoted = shown(name)
    if not name or len(name) > _MAX_NAME_CHARS or "\x00" in name:
        _damaged(file, f"has a tensor with an unusable name: {quoted}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _damaged(file, f"is damaged: {quoted} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    item_size = ITEM_SIZES.get(dtype) if isinstance(dtype, str) else None
    if item_size is None:
        _damaged(file, f"holds {quoted} in a type that is not served")
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        _damaged(file, f"is damaged: {quoted} has no valid shape")
    if not _are_sizes(offsets) or len(offsets) != 2:
        _damaged(file, f"is damaged: {quoted} has no valid place")
    begin, end = offsets
    # The sizes are below 2^63 and Python's integers do not wrap: this product is exact.
    if end - begin != math.prod(shape) * item_size:
        _damaged(
            file, f"is damaged: {quoted} is {end - begin} bytes long, which its shape contradicts"
        )
    return TensorHeader(name=name, dtype=dtype, shape=tuple(shape), begin=begin, end=end)


def _are_sizes(value: JsonValue) -> bool:
    # `type is int`: True is an int to isinstance.
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _no_number(text: str) -> NoReturn:
    raise ValueError(text)


def _damaged(name: str, text: str) -> NoReturn:
    raise ModelFilesError(f"{name} {text}")
