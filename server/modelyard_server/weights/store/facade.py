"""WeightStore: takes model folders in, and gives their copies out."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from modelyard_server.runtimes.api import ModelFilesError, StopCheck
from modelyard_server.weights.model_files import FolderLike, opened_folder
from modelyard_server.weights.safetensors_files import Checkpoint, FileHeader, read_checkpoint
from modelyard_server.weights.store.collecting import running_servers
from modelyard_server.weights.store.flights import SingleFlight
from modelyard_server.weights.store.imports import Known, Source, read_source, write_model
from modelyard_server.weights.store.index import Index, Sighting
from modelyard_server.weights.store.layout import (
    Layout,
    allocated_bytes,
    open_layout,
    store_writes,
)
from modelyard_server.weights.store.locks import StoreLocks
from modelyard_server.weights.store.manifest import MANIFEST_FILE, read_manifest, stored_model
from modelyard_server.weights.store.packs import Shelf, damaged_tensors, pack_names
from modelyard_server.weights.store.recent import Recent
from modelyard_server.weights.stored import StoredModel

__all__ = ["StoreUsage", "WeightStore", "in_place"]

_MAX_REMEMBERED = 4_096


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreUsage:
    """What a store holds.

    Attributes:
        model_count: models in it.
        pack_count: files of tensors.
        stored_bytes: of all of its files.
        source_bytes: of the files that its models were taken from, each folder's by itself.
    """

    model_count: int
    pack_count: int
    stored_bytes: int
    source_bytes: int


def _never() -> bool:
    return False


def in_place(folder: FolderLike) -> StoredModel:
    """A model that is read where it lies: no digest, and its tensors have no identities.

    Raises:
        ModelFilesError: its weights are missing or damaged.
    """
    return StoredModel(digest="", folder=folder, checkpoint=read_checkpoint(folder), packs=folder)


class WeightStore:
    """A folder of immutable models that this server owns. Thread-safe; see the package.

    Made by `open`.
    """

    def __init__(self, layout: Layout, locks: StoreLocks) -> None:
        self._layout = layout
        self._models_path = os.fspath(layout.models)
        self._locks = locks
        self._shelf = Shelf(layout.packs)
        self._index = Index(layout)
        self._flights: SingleFlight[FolderLike, StoredModel | None] = SingleFlight()
        self._known: Recent[FolderLike, Known] = Recent(_MAX_REMEMBERED)
        self._models: Recent[str, StoredModel] = Recent(_MAX_REMEMBERED)
        self._headers: Recent[FileHeader, FileHeader] = Recent(_MAX_REMEMBERED)

    @classmethod
    def open(cls, folder: Path, *, leasing: bool = False) -> Self:
        """Opens a store, or makes one in a folder that is missing or empty.

        What servers that died have left half written is removed. Several servers may have the same
        store open.

        Args:
            folder: of the store.
            leasing: what is read of it is read inside of `leased`; else nobody may remove anything
                as long as it is open.

        Raises:
            StoreError: the folder cannot be used.
        """
        layout = open_layout(folder.absolute())
        locks = StoreLocks(layout, leasing=leasing)
        with locks.trying_to_write() as alone:
            if alone:
                layout.sweep()
        return cls(layout, locks)

    def close(self) -> None:
        """Gives the store up; what was taken stays readable until somebody collects it."""
        self._locks.close()

    def take(self, folder: FolderLike, *, stop: StopCheck = _never) -> StoredModel:
        """Gives the store's copy of a model; makes it if there is none or the files changed.

        A model that was taken before, and whose files did not change, costs a stat a file, of its
        own and of the store's.

        Args:
            folder: the model's folder.
            stop: asked between blocks of about a megabyte, and while waiting for other imports.

        Raises:
            ModelFilesError: the files are damaged, too large, unreadable or changed meanwhile, or
                the store's disk is full or broken. Nothing is left in the store then.
            LoadCancelled: stop said so. Nothing is left in the store then.
        """
        while True:
            known = self._known.get(folder)
            if known is not None:
                with opened_folder(folder) as directory:
                    snapshot = known.snapshot.seen_again(directory)
                # Packs are looked at as well: one that was damaged since would never be readable.
                if snapshot is not None and self._is_there(known.stored):
                    if snapshot is not known.snapshot:
                        self._known.put(folder, replace(known, snapshot=snapshot))
                    return known.stored
            taken = self._flights.run(folder, lambda: self._bring(folder, stop), stop=stop)
            if taken is not None:
                return taken

    @contextmanager
    def leased(self, folder: FolderLike, *, stop: StopCheck = _never) -> Iterator[StoredModel]:
        """Takes a model and holds its files: until the end of the block nobody removes them.

        What has been mapped by then stays mapped.

        Args, Raises: as `take`.
        """
        while True:
            stored = self.take(folder, stop=stop)
            with store_writes():
                held = ExitStack()
                held.enter_context(self._locks.reading(stored.digest, stop))
            with held:
                # Else it was removed before it was held.
                if self._is_there(stored):
                    yield stored
                    return

    def usage(self) -> StoreUsage:
        """Says what the store holds. Looks at all of its files."""
        models = set(self._digests())
        sightings = (sighting for _, sighting in self._index.entries())
        return StoreUsage(
            model_count=len(models),
            pack_count=sum(1 for _ in pack_names(self._layout.packs)),
            stored_bytes=allocated_bytes(self._layout.root),
            source_bytes=sum(
                sighting.snapshot.size_bytes
                for sighting in sightings
                if sighting is not None and sighting.digest in models
            ),
        )

    def collect(self, keep: Collection[str]) -> int:
        """Removes all models but some, and the packs that none of those needs; see Collector, too.

        A pack of which one tensor is needed stays as a whole. What is loaded stays loaded, but what
        is removed cannot be loaded from what `take` gave before: it is to be taken again.

        Args:
            keep: digests of the models that stay.

        Returns:
            Bytes of the files that were removed; 0 if another server has the store open.

        Raises:
            ModelFilesError: the store's disk is broken.
        """
        with self._locks.alone() as alone:
            if not alone or any(True for _ in running_servers(self._layout, sole=False)):
                return 0
            with store_writes():
                before = allocated_bytes(self._layout.root)
                self._remove_others(keep)
                return before - allocated_bytes(self._layout.root)

    def verify(self, stored: StoredModel, *, stop: StopCheck = _never) -> tuple[str, ...]:
        """Reads a model of the store again and compares it with its digests.

        A file that is damaged is removed, so that whoever takes a model that needs it imports it
        anew.

        Args:
            stored: what `take` gave.
            stop: asked between blocks.

        Returns:
            Names of the tensors and files that are not what they were; empty if all are.

        Raises:
            ModelFilesError: a damaged file cannot be removed.
            LoadCancelled: stop said so.
        """
        damaged: list[str] = []
        if not self._is_there(stored):
            # Another server has removed it, or put another file in a damaged one's place.
            self._forget(stored.digest)
        for header in stored.checkpoint.files:
            names = list(damaged_tensors(self._layout.packs, header, stop))
            if names:
                damaged += names
                with self._locks.writing(stop), store_writes():
                    self._remove_pack(header.name)
        files = self._damaged_files(stored.digest)
        if files:
            damaged += files
            with self._locks.writing(stop), store_writes():
                self._remove_model(stored.digest)
                self._layout.sweep()
        return tuple(damaged)

    def _bring(self, folder: FolderLike, stop: StopCheck) -> StoredModel | None:
        with opened_folder(folder) as directory:
            earlier = self._earlier(folder)
            if earlier is not None:
                snapshot = earlier.snapshot.seen_again(directory)
                if snapshot is not None:
                    return self._remember(folder, replace(earlier, snapshot=snapshot))
            source = read_source(folder, directory, earlier, stop)
            stored = self._keep(source, stop)
        return self._remember(folder, Known(snapshot=source.snapshot, stored=stored))

    def _remember(self, folder: FolderLike, known: Known) -> StoredModel | None:
        self._known.put(folder, known)
        if self._is_there(known.stored):
            return known.stored
        # Somebody removed it since it was read, and may have done so before it was remembered.
        self._known.drop(lambda key, _: key == folder)
        return None

    def _earlier(self, folder: FolderLike) -> Known | None:
        known = self._known.get(folder)
        if known is not None:
            return known
        sighting = self._index.read(folder)
        stored = None if sighting is None else self._load(sighting.digest)
        if sighting is None or stored is None:
            return None
        return Known(snapshot=sighting.snapshot, stored=stored)

    def _keep(self, source: Source, stop: StopCheck) -> StoredModel:
        digest = source.contents.digest()
        with self._locks.writing(stop):
            # Nobody else writes: what lies there is left over.
            self._layout.sweep()
            stored = self._load(digest)
            if stored is None:
                replaced = write_model(self._layout, self._shelf, source, digest, stop)
                for name in replaced:
                    self._forget_models_of(name)
                stored = self._load(digest)
            if stored is None:
                raise ModelFilesError("the weight store cannot read what it wrote", transient=True)
            self._index.write(source.folder, Sighting(snapshot=source.snapshot, digest=digest))
        return stored

    def _load(self, digest: str) -> StoredModel | None:
        """The model, if it is there and whole: headers are compared, bytes are not."""
        remembered = self._models.get(digest)
        if remembered is not None and self._is_there(remembered):
            return remembered
        manifest = read_manifest(self._layout.models, digest)
        if manifest is None:
            return None
        stored = stored_model(
            self._layout.models, self._layout.packs, digest, manifest, self._shelf.pack
        )
        if stored is None:
            return None
        # Fine-tunes have the same tensors of the same packs: those headers are held once.
        headers = tuple(self._headers.setdefault(h, h) for h in stored.checkpoint.files)
        stored = replace(stored, checkpoint=Checkpoint(files=headers))
        self._models.put(digest, stored)
        return stored

    def _is_there(self, stored: StoredModel) -> bool:
        if not self._has_manifest(stored.digest):
            return False
        for header in stored.checkpoint.files:
            pack = self._shelf.pack(header.name)
            if pack is None or pack.header.identity != header.identity:
                return False
        return True

    def _has_manifest(self, digest: str) -> bool:
        # Every load asks, and joining paths takes longer than the answer.
        try:
            status = os.stat(f"{self._models_path}/{digest}/{MANIFEST_FILE}")  # noqa: PTH116
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode)

    def _damaged_files(self, digest: str) -> list[str]:
        manifest = read_manifest(self._layout.models, digest)
        if manifest is None:
            return [MANIFEST_FILE]
        damaged = []
        for name, companion in manifest.contents.companions.items():
            try:
                content = (self._layout.models / digest / name).read_bytes()
            except OSError:
                content = b""
            if hashlib.sha256(content).hexdigest() != companion.digest:
                damaged.append(name)
        return damaged

    def _remove_others(self, keep: Collection[str]) -> None:
        # Models first: a pack is not removed while anything says that it is there.
        needed: set[str] = set()
        for digest in self._digests():
            manifest = read_manifest(self._layout.models, digest) if digest in keep else None
            if manifest is None:
                self._remove_model(digest)
            else:
                needed |= manifest.packs
        for name in set(pack_names(self._layout.packs)) - needed:
            self._remove_pack(name)
        left = set(self._digests())
        for path, sighting in self._index.entries():
            if sighting is None or sighting.digest not in left:
                path.unlink(missing_ok=True)
        self._layout.sweep()

    def _digests(self) -> list[str]:
        return os.listdir(self._layout.models)  # noqa: PTH208 - names, not paths

    def _remove_model(self, digest: str) -> None:
        path = self._layout.models / digest
        if path.exists():
            # In one step; the sweep does the rest.
            path.rename(self._layout.new_path())
        self._forget(digest)

    def _forget(self, digest: str) -> None:
        self._models.drop(lambda key, _: key == digest)
        self._known.drop(lambda _, known: known.stored.digest == digest)

    def _remove_pack(self, name: str) -> None:
        (self._layout.packs / name).unlink(missing_ok=True)
        self._shelf.forget(name)
        self._forget_models_of(name)

    def _forget_models_of(self, pack: str) -> None:
        def needs(stored: StoredModel) -> bool:
            return any(header.name == pack for header in stored.checkpoint.files)

        self._models.drop(lambda _, stored: needs(stored))
        self._known.drop(lambda _, known: needs(known.stored))
        self._headers.drop(lambda header, _: header.name == pack)
