"""A model as the server's own store has it: an immutable copy whose tensors have identities."""

from __future__ import annotations

from dataclasses import dataclass

from modelyard_server.weights.model_files import FolderLike
from modelyard_server.weights.safetensors_files import Checkpoint

__all__ = ["StoredModel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """A model's files, for whoever reads them.

    Attributes:
        digest: of all of its content; "" for a folder that is read in place.
        folder: where its configuration, tokenizer and other small files are.
        checkpoint: its tensors. Names of files are those of packs, below `packs`; a pack holds
            tensors of several models, and only this model's are listed.
        packs: the folder in which the checkpoint's files lie; `folder` itself for a folder that is
            read in place.
    """

    digest: str
    folder: FolderLike
    checkpoint: Checkpoint
    packs: FolderLike
