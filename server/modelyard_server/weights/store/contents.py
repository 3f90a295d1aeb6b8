"""What a model is made of, by content alone: not by file, place or order."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelyard_server.runtimes.api import StopCheck
from modelyard_server.weights.safetensors_files import Checkpoint, TensorHeader
from modelyard_server.weights.store.sources import SourceWeights

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = [
    "Companion",
    "ModelContents",
    "TensorContent",
    "begin_tensor",
    "content_of",
    "digest_tensors",
    "name_apart",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorContent:
    """A tensor of a model.

    Attributes:
        name: in the model.
        dtype: the format's name of the element type.
        shape: sizes of the dimensions, outermost first.
        identity: see TensorHeader.
        size_bytes: of its elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    identity: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Companion:
    """A small file of a model.

    Attributes:
        size_bytes: its length.
        digest: SHA-256 of its bytes.
    """

    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelContents:
    """All of a model.

    Attributes:
        tensors: ordered by name.
        companions: by name of the file.
    """

    tensors: tuple[TensorContent, ...]
    companions: Mapping[str, Companion]

    def digest(self) -> str:
        """The same for equal models, however their weights were cut into files."""
        value = [
            [[t.name, t.dtype, t.shape, t.identity] for t in self.tensors],
            [[name, self.companions[name].digest] for name in sorted(self.companions)],
        ]
        return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()


def begin_tensor(dtype: str, shape: tuple[int, ...]) -> _Hash:
    """Starts the digest of a tensor; its bytes are to follow."""
    return hashlib.sha256(f"{dtype} {' '.join(map(str, shape))}\n".encode())


def content_of(identity: str) -> str:
    """The digest of type, shape and bytes that an identity starts with."""
    return identity.partition(".")[0]


def digest_tensors(
    source: SourceWeights, checkpoint: Checkpoint, stop: StopCheck
) -> dict[str, str]:
    """Reads every byte of a model's weights.

    Returns:
        The digest of type, shape and bytes, by name of the tensor.

    Raises:
        ModelFilesError: a file changed or cannot be read.
        LoadCancelled: stop said so.
    """
    digests = {}
    for header in checkpoint.files:
        for tensor in header.tensors:
            digest = begin_tensor(tensor.dtype, tensor.shape)
            start = header.data_start
            for block in source.blocks(header.name, start + tensor.begin, start + tensor.end, stop):
                digest.update(block)
            digests[tensor.name] = digest.hexdigest()
    return digests


def name_apart(
    tensors: Iterable[TensorHeader], digests: Mapping[str, str]
) -> tuple[TensorContent, ...]:
    """Gives the tensors of one model their identities, no two the same.

    The order of the names decides which of several equal tensors is the first, so that it does not
    depend on how the model was saved.
    """
    seen: dict[str, int] = {}
    named = []
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        digest = digests[tensor.name]
        count = seen[digest] = seen.get(digest, 0) + 1
        named.append(
            TensorContent(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                identity=sys.intern(digest if count == 1 else f"{digest}.{count}"),
                size_bytes=tensor.size_bytes,
            )
        )
    return tuple(named)
