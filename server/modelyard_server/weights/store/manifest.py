"""weights.json: which tensors a model has, and where in the packs they are."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from modelyard_server.runtimes.api import JsonValue, ModelFilesError
from modelyard_server.weights.model_files import read_model_file
from modelyard_server.weights.safetensors_files import Checkpoint, FileHeader, TensorHeader
from modelyard_server.weights.store.contents import Companion, ModelContents, TensorContent
from modelyard_server.weights.store.packs import Pack
from modelyard_server.weights.stored import StoredModel

__all__ = ["MANIFEST_FILE", "Manifest", "manifest_bytes", "read_manifest", "stored_model"]

MANIFEST_FILE = "weights.json"
_MAX_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A model of the store.

    Attributes:
        contents: what it is made of.
        places: pack, first byte and first byte behind it, by name of the tensor.
    """

    contents: ModelContents
    places: Mapping[str, tuple[str, int, int]]

    @property
    def packs(self) -> frozenset[str]:
        """Names of the packs that it needs."""
        return frozenset(pack for pack, _, _ in self.places.values())


def manifest_bytes(manifest: Manifest) -> bytes:
    """The file's content."""
    packs = sorted(manifest.packs)
    numbers = {name: number for number, name in enumerate(packs)}
    tensors = {}
    for tensor in manifest.contents.tensors:
        pack, begin, end = manifest.places[tensor.name]
        tensors[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "identity": tensor.identity,
            "pack": numbers[pack],
            "begin": begin,
            "end": end,
        }
    companions = {
        name: {"size": companion.size_bytes, "digest": companion.digest}
        for name, companion in manifest.contents.companions.items()
    }
    value = {"packs": packs, "companions": companions, "tensors": tensors}
    return json.dumps(value, separators=(",", ":")).encode()


def read_manifest(models: Path, digest: str) -> Manifest | None:
    """Reads a model's weights.json; None unless it is there and of that digest."""
    try:
        content = read_model_file(models / digest, MANIFEST_FILE, max_bytes=_MAX_BYTES)
        manifest = None if content is None else _parse(json.loads(content))
    except (ModelFilesError, ValueError, LookupError, TypeError, AttributeError):
        return None
    if manifest is None or manifest.contents.digest() != digest:
        return None
    return manifest


def _parse(value: JsonValue) -> Manifest:
    packs = [sys.intern(name) for name in value["packs"]]
    tensors = []
    places = {}
    for name, entry in value["tensors"].items():
        tensors.append(
            TensorContent(
                name=sys.intern(name),
                dtype=sys.intern(entry["dtype"]),
                shape=tuple(entry["shape"]),
                identity=sys.intern(entry["identity"]),
                size_bytes=entry["end"] - entry["begin"],
            )
        )
        places[name] = (packs[entry["pack"]], entry["begin"], entry["end"])
    companions = {
        name: Companion(size_bytes=entry["size"], digest=entry["digest"])
        for name, entry in value["companions"].items()
    }
    contents = ModelContents(tensors=tuple(tensors), companions=companions)
    return Manifest(contents=contents, places=places)


def stored_model(
    models: Path,
    packs: Path,
    digest: str,
    manifest: Manifest,
    find_pack: Callable[[str], Pack | None],
) -> StoredModel | None:
    """Makes the value that readers get; None if a file is missing or not what it should be."""
    folder = models / digest
    try:
        for name, companion in manifest.contents.companions.items():
            if (folder / name).lstat().st_size != companion.size_bytes:
                return None
    except OSError:
        return None
    by_pack: dict[str, list[TensorHeader]] = {name: [] for name in sorted(manifest.packs)}
    for tensor in manifest.contents.tensors:
        pack, begin, end = manifest.places[tensor.name]
        by_pack[pack].append(
            TensorHeader(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                begin=begin,
                end=end,
                identity=tensor.identity,
            )
        )
    headers = []
    for name, tensors in by_pack.items():
        found = find_pack(name)
        if found is None or not all(_agrees(found, tensor) for tensor in tensors):
            return None
        tensors.sort(key=lambda tensor: (tensor.begin, tensor.end, tensor.name))
        headers.append(
            FileHeader(
                name=found.header.name,
                tensors=tuple(tensors),
                data_start=found.header.data_start,
                identity=found.header.identity,
            )
        )
    return StoredModel(
        digest=digest, folder=folder, checkpoint=Checkpoint(files=tuple(headers)), packs=packs
    )


def _agrees(pack: Pack, tensor: TensorHeader) -> bool:
    there = pack.tensors.get(tensor.identity)
    return there is not None and (there.dtype, there.shape, there.begin, there.end) == (
        tensor.dtype,
        tensor.shape,
        tensor.begin,
        tensor.end,
    )
