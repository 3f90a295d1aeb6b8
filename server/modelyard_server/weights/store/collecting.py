"""Gives back what nobody uses any more.

A store is a cache: `take` brings back from a model's own folder what is not there. So to remove too
much costs time, and nothing else, as long as nobody is reading it. What is used is

    what a running server has registered   every server says so in a file of its own in servers/,
                                           which it has locked as long as it lives; the index tells
                                           which model each of these folders was
    what is being read                     a load holds the model by its byte of readers.lock

and, for a while after it was last seen to be used, what was: an update that is taken back finds its
model still there. unused.json remembers since when, beyond the end of a server.

Everybody who has the store open and neither says what he uses nor leases it (see locks) keeps all
of it. What is mapped stays mapped when its file is removed, and its bytes are the disk's again with
the last mapping.

Models are removed before the packs that only they need, each in one step, and by one process at a
time, which is alone in writing. So whoever dies in the middle leaves packs that no model needs,
and the next one finds them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from modelyard_server.runtimes.api import LoadCancelled, StopCheck
from modelyard_server.weights.model_files import FolderLike
from modelyard_server.weights.store.index import Index
from modelyard_server.weights.store.layout import (
    Layout,
    StoreError,
    allocated_bytes,
    open_layout,
    store_writes,
)
from modelyard_server.weights.store.locks import StoreLocks, try_lock
from modelyard_server.weights.store.manifest import MANIFEST_FILE
from modelyard_server.weights.store.packs import pack_names

__all__ = ["Collected", "Collector", "running_servers"]

_UNKNOWN = "somebody has the store open and does not say what is used of it: an older server?"
_STARTING = "a server that shares the store has not said yet what it uses"


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What a collection has done, or would do.

    A model here is one by content: every version of a registered model's files is one of its own.

    Attributes:
        freed_bytes: of the files that were removed.
        freed_count: models that were.
        stored_bytes: what the store holds now.
        model_count: models in it now.
        unused_bytes: of stored_bytes, what nobody uses and is kept for a while.
        unused_count: models that are.
        due_at_s: when the first of these will have been kept for long enough, in seconds since the
            epoch; None without any.
        obstacle: why nothing can be removed now; empty if it can.
    """

    freed_bytes: int = 0
    freed_count: int = 0
    stored_bytes: int = 0
    model_count: int = 0
    unused_bytes: int = 0
    unused_count: int = 0
    due_at_s: float | None = None
    obstacle: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """What lies in a store, and since when nobody uses it, by model."""

    digests: frozenset[str]
    unused: Mapping[str, float]
    now_s: float
    obstacle: str

    def due(self, keep_s: float) -> frozenset[str]:
        """Models that have been kept for long enough."""
        return frozenset(
            digest for digest, since_s in self.unused.items() if self.now_s - since_s >= keep_s
        )


class Collector:
    """A server's part in a store: says what it uses, and removes what nobody does. Thread-safe.

    Made by `open`.
    """

    def __init__(self, layout: Layout, now_s: Callable[[], float]) -> None:
        self._layout = layout
        self._locks = StoreLocks(layout, leasing=True)
        self._index = Index(layout)
        self._now_s = now_s
        self._turn = threading.Lock()
        self._path, self._own = _own_file(layout)
        self._said = b""
        # By model: identity of its manifest, and the packs that it needs.
        self._needs: dict[str, tuple[tuple[int, int], frozenset[str]]] = {}
        # Who died may have left packs that no model needs.
        self._packs_are_needed = False

    @classmethod
    def open(cls, folder: Path, *, now_s: Callable[[], float] = time.time) -> Self:
        """Opens a store. Until `publish` says what this server uses, nobody removes anything.

        Args:
            folder: of the store.
            now_s: a clock that goes on while no server runs, in seconds.

        Raises:
            StoreError: the folder cannot be used.
        """
        layout = open_layout(folder.absolute())
        try:
            return cls(layout, now_s)
        except OSError as error:
            raise StoreError(
                f"the weight store cannot be used: {os.strerror(error.errno or 0).lower()}"
            ) from None

    def close(self) -> None:
        """Takes back what this server said it uses."""
        with self._turn:
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(self._own)
            self._locks.close()

    def publish(self, folders: Iterable[FolderLike]) -> None:
        """Says which models' folders this server uses, in place of what it said before.

        Raises:
            ModelFilesError: the store's disk is full: it still says what it said before; or broken.
        """
        content = json.dumps(sorted({Index.name(folder) for folder in folders})).encode()
        with self._turn, store_writes():
            if content == self._said:
                return
            # Only this needs room on the disk. Until the end it is no JSON, of which nobody takes
            # a part for the whole.
            try:
                _write(self._own, bytes(max(0, len(content) - len(self._said))), len(self._said))
            except OSError:
                os.ftruncate(self._own, len(self._said))
                raise
            _write(self._own, b"?" + content[1:], 0)
            os.ftruncate(self._own, len(content))
            _write(self._own, content[:1], 0)
            self._said = content

    def collect(self, *, keep_s: float, stop: StopCheck) -> Collected:
        """Removes what nobody uses and has been kept for a while.

        Waits for imports, which take as long as copying.

        Args:
            keep_s: seconds that a model stays after it was last seen to be used.
            stop: asked while waiting, and between models.

        Raises:
            ModelFilesError: the store's disk is broken.
            LoadCancelled: stop said so. What was not removed stays.
        """
        with store_writes(), self._locks.alone(stop) as alone, self._turn:
            look = self._look(sole=True)
            obstacle = look.obstacle or ("" if alone else _UNKNOWN)
            if obstacle:
                return self._told(look, keep_s, obstacle)
            self._remember(look.unused)
            freed_bytes, freed_count = self._remove(look, look.due(keep_s), stop)
            return self._told(self._look(sole=True), keep_s, "", freed_bytes, freed_count)

    def preview(self, *, keep_s: float) -> Collected:
        """Says what `collect` would remove now, as far as nobody is reading it. Waits for nobody.

        Raises:
            ModelFilesError: the store's disk is broken.
        """
        with self._turn, store_writes():
            look = self._look(sole=False)
            due = look.due(keep_s)
            told = self._told(look, keep_s, look.obstacle)
            return replace(told, freed_bytes=self._size_of(look, due), freed_count=len(due))

    def _look(self, *, sole: bool) -> _Look:
        """Args: sole: nobody else writes to the store."""
        names, obstacle = self._registered(sole=sole)
        sightings = map(self._index.read_named, names)
        used = {sighting.digest for sighting in sightings if sighting is not None}
        digests = self._digests()
        before, now_s = self._remembered(), self._now_s()
        # A clock that was set back must not make them stay for longer than if it had not.
        unused = {
            digest: since_s if (since_s := before.get(digest, now_s)) <= now_s else now_s
            for digest in digests - used
        }
        return _Look(digests=digests, unused=unused, now_s=now_s, obstacle=obstacle)

    def _digests(self) -> frozenset[str]:
        with os.scandir(self._layout.models) as entries:
            return frozenset(e.name for e in entries if e.is_dir(follow_symlinks=False))

    def _registered(self, *, sole: bool) -> tuple[set[str], str]:
        """Names of the index entries of what running servers use, and whether one did not say."""
        names: set[str] = set()
        obstacle = ""
        for content in running_servers(self._layout, sole=sole):
            try:
                names.update(json.loads(content))
            except (ValueError, TypeError):
                obstacle = _STARTING
        return names, obstacle

    def _remembered(self) -> dict[str, float]:
        try:
            value = json.loads(self._layout.unused.read_bytes())
            return {str(digest): float(since_s) for digest, since_s in value.items()}
        except (FileNotFoundError, ValueError, TypeError, AttributeError, OverflowError):
            return {}

    def _remember(self, unused: Mapping[str, float]) -> None:
        if unused == self._remembered():
            return
        new = self._layout.new_path()
        # A full disk is no reason not to give back what is due; what is new is seen again.
        with contextlib.suppress(OSError):
            new.write_text(json.dumps(unused))
            new.replace(self._layout.unused)

    def _remove(self, look: _Look, due: Collection[str], stop: StopCheck) -> tuple[int, int]:
        """Returns bytes and number of the models that were removed."""
        freed_bytes, freed_count = 0, 0
        for digest in sorted(due):
            if stop():
                raise LoadCancelled
            size_bytes = allocated_bytes(self._layout.models / digest)
            if self._set_aside(digest):
                freed_bytes += size_bytes
                freed_count += 1
        if not self._packs_are_needed:
            freed_bytes += self._remove_packs()
            for path, sighting in self._index.entries():
                if sighting is None or not (self._layout.models / sighting.digest).exists():
                    path.unlink(missing_ok=True)
        self._layout.sweep()
        return freed_bytes, freed_count

    def _set_aside(self, digest: str) -> bool:
        """Removes a model in one step, unless somebody is reading it; a sweep does the rest."""
        with self._locks.trying_to_remove(digest) as alone:
            if alone:
                self._packs_are_needed = False
                (self._layout.models / digest).rename(self._layout.new_path())
        return alone

    def _remove_packs(self) -> int:
        needed: set[str] = set()
        for digest in self._digests():
            packs = self._packs_of(digest)
            if packs is not None:
                needed |= packs
            elif not self._set_aside(digest):
                # Damaged, and somebody is reading what is left of it.
                return 0
        freed_bytes = 0
        for name in set(pack_names(self._layout.packs)) - needed:
            path = self._layout.packs / name
            freed_bytes += path.lstat().st_size
            path.unlink()
        self._packs_are_needed = True
        return freed_bytes

    def _packs_of(self, digest: str) -> frozenset[str] | None:
        """The packs that a model needs; None if it is damaged."""
        path = self._layout.models / digest / MANIFEST_FILE
        try:
            status = path.stat()
            identity = (status.st_ino, status.st_mtime_ns)
            known = self._needs.get(digest)
            if known is None or known[0] != identity:
                known = (identity, frozenset(map(str, json.loads(path.read_bytes())["packs"])))
                self._needs[digest] = known
            return known[1]
        except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError):
            return None

    def _size_of(self, look: _Look, some: Collection[str]) -> int:
        """Bytes that come back when some models are removed."""
        if not some:
            return 0
        needed: set[str] = set()
        for digest in look.digests.difference(some):
            needed |= self._packs_of(digest) or frozenset()
        alone = {pack for digest in some for pack in self._packs_of(digest) or ()} - needed
        size_bytes = sum(allocated_bytes(self._layout.models / digest) for digest in some)
        for name in alone:
            with contextlib.suppress(FileNotFoundError):
                size_bytes += (self._layout.packs / name).lstat().st_size
        return size_bytes

    def _told(
        self,
        look: _Look,
        keep_s: float,
        obstacle: str,
        freed_bytes: int = 0,
        freed_count: int = 0,
    ) -> Collected:
        for digest in self._needs.keys() - look.digests:
            del self._needs[digest]
        return Collected(
            freed_bytes=freed_bytes,
            freed_count=freed_count,
            stored_bytes=allocated_bytes(self._layout.root),
            model_count=len(look.digests),
            unused_bytes=self._size_of(look, look.unused),
            unused_count=len(look.unused),
            due_at_s=min(look.unused.values()) + keep_s if look.unused else None,
            obstacle=obstacle,
        )


def running_servers(layout: Layout, *, sole: bool) -> Iterator[bytes]:
    """What the servers say that run and share a store.

    Args:
        layout: of the store.
        sole: nobody else writes to it, so what dead servers said can be removed.
    """
    for path in list(layout.servers.iterdir()):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        with os.fdopen(descriptor, "rb") as file:
            if not try_lock(descriptor, fcntl.LOCK_EX):
                yield file.read()
            elif sole:
                path.unlink(missing_ok=True)


def _write(descriptor: int, content: bytes, begin: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], begin + done)


def _own_file(layout: Layout) -> tuple[Path, int]:
    """A file of this server's own, locked."""
    while True:
        path = layout.servers / uuid.uuid4().hex
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        # Who looks at it in this very moment takes it for a dead server's, and may remove it.
        if try_lock(descriptor, fcntl.LOCK_EX) and path.exists():
            return path, descriptor
        os.close(descriptor)
