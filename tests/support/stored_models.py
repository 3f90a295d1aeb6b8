"""Stored models made by hand: packs with identities, without a store."""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from modelyard_server.weights.safetensors_files import Checkpoint, FileHeader, read_header
from modelyard_server.weights.stored import StoredModel

__all__ = ["identity_of", "model_over", "resident_pages", "stored_model", "write_pack"]


def identity_of(tensor: torch.Tensor) -> str:
    """What stands for a tensor's type, shape and bytes in these tests."""
    content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + content).hexdigest()


def write_pack(
    folder: Path, name: str, tensors: Mapping[str, torch.Tensor], *, identified: bool = True
) -> FileHeader:
    """Writes a file and returns its header, whose tensors have identities unless told not to."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / name)
    header = read_header(folder, name)
    if not identified:
        return header
    return replace(
        header,
        tensors=tuple(
            replace(tensor, identity=identity_of(tensors[tensor.name])) for tensor in header.tensors
        ),
    )


def model_over(folder: Path, *headers: FileHeader) -> StoredModel:
    """A model whose tensors are all those of some packs."""
    return StoredModel(
        digest="of a test", folder=folder, checkpoint=Checkpoint(files=headers), packs=folder
    )


def stored_model(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, identified: bool = True
) -> StoredModel:
    """A model that is alone in a pack, pack.safetensors."""
    return model_over(
        folder, write_pack(folder, "pack.safetensors", tensors, identified=identified)
    )


def resident_pages(address: int, count: int) -> int:
    """How many of so many pages from an address on are in this process's page tables.

    Mapped files and anonymous memory alike; what is not mapped has none.
    """
    with Path("/proc/self/pagemap").open("rb", buffering=0) as table:
        table.seek(address // mmap.PAGESIZE * 8)
        entries = struct.unpack(f"={count}Q", table.read(8 * count))
    return sum(entry >> 63 for entry in entries)
