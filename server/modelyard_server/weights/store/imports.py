"""An import: reads a model's folder, then writes what the store does not have yet."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from modelyard_server.runtimes.api import ModelFilesError, StopCheck
from modelyard_server.weights.model_files import FolderLike
from modelyard_server.weights.safetensors_files import Checkpoint, read_checkpoint
from modelyard_server.weights.store.contents import (
    Companion,
    ModelContents,
    TensorContent,
    digest_tensors,
    name_apart,
)
from modelyard_server.weights.store.layout import (
    Layout,
    check_room,
    store_writes,
    sync,
    write_new_file,
)
from modelyard_server.weights.store.manifest import MANIFEST_FILE, Manifest, manifest_bytes
from modelyard_server.weights.store.packs import PackPlan, Place, Shelf, plan_packs, write_pack
from modelyard_server.weights.store.sources import (
    Snapshot,
    SourceWeights,
    read_companions,
    settle,
    take_snapshot,
)
from modelyard_server.weights.stored import StoredModel

__all__ = ["Known", "Source", "read_source", "write_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A source whose model is in the store.

    Attributes:
        snapshot: how its folder looked.
        stored: the model that it was.
    """

    snapshot: Snapshot
    stored: StoredModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model's folder, read and digested.

    Attributes:
        folder: where it is.
        directory: the same, open.
        snapshot: how it looked when reading began.
        companions: contents of its small files by name.
        contents: what the model is made of.
        places: where its tensors lie, by name.
    """

    folder: FolderLike
    directory: int
    snapshot: Snapshot
    companions: Mapping[str, bytes]
    contents: ModelContents
    places: Mapping[str, Place]

    def check_unchanged(self) -> None:
        """Compares the folder with what it was.

        Raises:
            ModelFilesError: it changed.
        """
        if self.snapshot.seen_again(self.directory) is None:
            raise ModelFilesError(
                "the model's files changed while they were being imported", transient=True
            )


def read_source(
    folder: FolderLike, directory: int, earlier: Known | None, stop: StopCheck
) -> Source:
    """Reads all of a model.

    Args:
        folder: where it is.
        directory: the same, open.
        earlier: what it was before; weights that did not change since are not read again.
        stop: asked between blocks.

    Raises:
        ModelFilesError: the files are damaged, too large, unreadable, or changed meanwhile.
        LoadCancelled: stop said so.
    """
    checkpoint = read_checkpoint(folder)
    snapshot = take_snapshot(directory, checkpoint)
    settle(snapshot, stop)
    companions = read_companions(folder, snapshot)
    tensors = _known_tensors(snapshot, checkpoint, earlier)
    if tensors is None:
        with SourceWeights(folder, snapshot) as weights:
            digests = digest_tensors(weights, checkpoint, stop)
        tensors = name_apart(checkpoint.tensors.values(), digests)
    source = Source(
        folder=folder,
        directory=directory,
        snapshot=snapshot,
        companions=companions,
        contents=ModelContents(
            tensors=tensors,
            companions={
                name: Companion(size_bytes=len(content), digest=hashlib.sha256(content).hexdigest())
                for name, content in companions.items()
            },
        ),
        places={
            tensor.name: Place(file=header.name, begin=header.data_start + tensor.begin)
            for header in checkpoint.files
            for tensor in header.tensors
        },
    )
    source.check_unchanged()
    return source


def _known_tensors(
    snapshot: Snapshot, checkpoint: Checkpoint, earlier: Known | None
) -> tuple[TensorContent, ...] | None:
    if earlier is None or earlier.snapshot.weights != snapshot.weights:
        return None
    then = earlier.stored.checkpoint.tensors
    now = checkpoint.tensors
    if then.keys() != now.keys():
        return None
    tensors = []
    for name in sorted(now):
        old, new = then[name], now[name]
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            return None
        tensors.append(
            TensorContent(
                name=name,
                dtype=new.dtype,
                shape=new.shape,
                identity=old.identity,
                size_bytes=new.size_bytes,
            )
        )
    return tuple(tensors)


def write_model(
    layout: Layout, shelf: Shelf, source: Source, digest: str, stop: StopCheck
) -> tuple[str, ...]:
    """Writes a model that the store does not have: new tensors first, then the model.

    Only for who holds the lock for writing. On an error nothing is left behind.

    Returns:
        Names of packs that were there and damaged: others have taken their place.

    Raises:
        ModelFilesError: the source changed, or the store's disk is full or broken.
        LoadCancelled: stop said so.
    """
    shelf.refresh()
    plans = plan_packs(
        (t for t in source.contents.tensors if shelf.find(t.identity) is None), source.places
    )
    small = sum(len(content) for content in source.companions.values())
    # What a model's own small files take beside their content is little; a page for each.
    small += 4096 * (len(source.companions) + 2) + 512 * len(source.contents.tensors)
    with store_writes():
        check_room(layout, sum(plan.size_bytes for plan in plans) + small)
    with ExitStack() as cleaned, ExitStack() as undo:
        cleaned.callback(layout.sweep)
        replaced = _write_packs(layout, plans, source, stop, undo)
        with store_writes():
            _write_folder(layout, shelf, source, digest, plans, undo)
        undo.pop_all()
    return replaced


def _write_packs(
    layout: Layout, plans: list[PackPlan], source: Source, stop: StopCheck, undo: ExitStack
) -> tuple[str, ...]:
    written: list[tuple[Path, Path]] = []
    with SourceWeights(source.folder, source.snapshot) as weights:
        for plan in plans:
            path = layout.new_path()
            write_pack(plan, path, weights, source.places, stop)
            written.append((path, layout.packs / plan.name))
    source.check_unchanged()
    with store_writes():
        # A pack of that name that is there is damaged, or its tensors would not be missed.
        replaced = tuple(target.name for _, target in written if target.exists())
        for path, target in written:
            path.replace(target)
            undo.callback(_remove, target)
        if written:
            sync(layout.packs)
    return replaced


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _set_aside(path: Path, aside: Path) -> None:
    with contextlib.suppress(OSError):
        path.rename(aside)


def _write_folder(
    layout: Layout,
    shelf: Shelf,
    source: Source,
    digest: str,
    plans: list[PackPlan],
    undo: ExitStack,
) -> None:
    for plan in plans:
        shelf.pack(plan.name)
    places = {}
    for tensor in source.contents.tensors:
        name = shelf.find(tensor.identity)
        pack = None if name is None else shelf.pack(name)
        if pack is None:
            raise ModelFilesError("the weight store cannot read what it wrote", transient=True)
        header = pack.tensors[tensor.identity]
        places[tensor.name] = (pack.header.name, header.begin, header.end)
    manifest = Manifest(contents=source.contents, places=places)
    new = layout.new_path()
    new.mkdir(mode=0o700)
    for name, content in source.companions.items():
        write_new_file(new / name, content)
    write_new_file(new / MANIFEST_FILE, manifest_bytes(manifest))
    sync(new)
    target = layout.models / digest
    if target.exists():
        # Damaged: a folder cannot be renamed over one that is not empty.
        target.rename(layout.new_path())
    new.rename(target)
    undo.callback(_set_aside, target, layout.new_path())
    sync(layout.models)
