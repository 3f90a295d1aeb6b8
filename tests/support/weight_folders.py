"""Model folders for a weight store, and an inspection of a store that does not use the store."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from modelyard_server.weights.model_files import ModelFolder
from modelyard_server.weights.safetensors_files import ITEM_SIZES
from modelyard_server.weights.stored import StoredModel

__all__ = ["Tensor", "damage_of", "data_bytes", "numbers", "read_back", "write_model"]


class Tensor(NamedTuple):
    """A tensor as the format has it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def numbers(seed: int, shape: tuple[int, ...] = (4,), dtype: str = "F32") -> Tensor:
    """A tensor of bytes that depend on the seed."""
    size = math.prod(shape) * ITEM_SIZES[dtype]
    return Tensor(dtype, shape, hashlib.shake_256(f"{seed}".encode()).digest(size))


def file_of(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file with the tensors in the order given."""
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.data)
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + b"".join(t.data for t in tensors.values())


def write_model(folder: Path, *shards: Mapping[str, Tensor], **files: str) -> Path:
    """Writes a model folder.

    Args:
        folder: made if it is missing.
        shards: its weights files; one is model.safetensors, several are named by an index.
        files: contents of JSON files, by their names without .json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        (folder / "model.safetensors").write_bytes(file_of(shards[0]))
    else:
        places: dict[str, str] = {}
        for number, shard in enumerate(shards):
            name = f"model-{number}.safetensors"
            (folder / name).write_bytes(file_of(shard))
            places |= dict.fromkeys(shard, name)
        index = json.dumps({"weight_map": places})
        (folder / "model.safetensors.index.json").write_text(index)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content)
    return folder


def read_back(stored: StoredModel) -> dict[str, Tensor]:
    """The tensors of a stored model, by plain reads of the packs."""
    assert not isinstance(stored.packs, ModelFolder)
    tensors = {}
    for header in stored.checkpoint.files:
        content = (stored.packs / header.name).read_bytes()
        for tensor in header.tensors:
            start = header.data_start + tensor.begin
            data = content[start : start + tensor.size_bytes]
            tensors[tensor.name] = Tensor(tensor.dtype, tensor.shape, data)
    return tensors


def data_bytes(store: Path) -> int:
    """Bytes of all tensors in a store."""
    return sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for pack in (store / "packs").iterdir()
        for entry in _header(pack.read_bytes()).values()
    )


def damage_of(store: Path) -> list[str]:
    """What of a store's packs and models is not whole, by reading every byte of it."""
    damage = []
    packs: dict[str, dict[str, Any]] = {}
    for path in sorted(_entries(store / "packs")):
        try:
            packs[path.name] = _checked_pack(path)
        except (ValueError, KeyError, struct.error) as error:
            damage.append(f"pack: {error!r}")
    for folder in sorted(_entries(store / "models")):
        try:
            _check_model(folder, packs)
        except (OSError, ValueError, KeyError) as error:
            damage.append(f"model: {error!r}")
    return damage


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.exists() else []


def _header(content: bytes) -> dict[str, Any]:
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    assert isinstance(header, dict)
    return header


def _checked_pack(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = _header(content)
    if path.stem != hashlib.sha256(content[: 8 + length]).hexdigest():
        raise ValueError("its name is not that of its header")
    for identity, entry in header.items():
        begin, end = entry["data_offsets"]
        data = content[8 + length + begin : 8 + length + end]
        kind = f"{entry['dtype']} {' '.join(map(str, entry['shape']))}\n".encode()
        if hashlib.sha256(kind + data).hexdigest() != identity.partition(".")[0]:
            raise ValueError("a tensor is not what it is called")
    return header


def _check_model(folder: Path, packs: dict[str, dict[str, Any]]) -> None:
    manifest = json.loads((folder / "weights.json").read_bytes())
    for tensor in manifest["tensors"].values():
        entry = packs[manifest["packs"][tensor["pack"]]][tensor["identity"]]
        if entry["data_offsets"] != [tensor["begin"], tensor["end"]]:
            raise ValueError("a tensor lies elsewhere")
    for name, companion in manifest["companions"].items():
        content = (folder / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != companion["digest"]:
            raise ValueError(f"{name} is damaged")
