"""Model folders that others write: which of their files are taken, and whether they changed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NoReturn, Self

from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError, StopCheck
from modelyard_server.weights.model_files import (
    FolderLike,
    OpenFile,
    open_model_file,
    read_exactly,
)
from modelyard_server.weights.safetensors_files import INDEX_FILE, WEIGHTS_FILE, Checkpoint

__all__ = [
    "BLOCK_BYTES",
    "FileIdentity",
    "Snapshot",
    "SourceWeights",
    "blocks_of",
    "read_companions",
    "settle",
    "take_snapshot",
]

FileIdentity = tuple[int, int, int, int, int]
"""Device, inode, size, times of the last change of content and of inode, in nanoseconds."""

BLOCK_BYTES = 1 << 20
"""Read, hashed and written at a time: it stays in the processor's cache."""

_TICK_NS = 20_000_000
"""Longer than the step in which file systems count time."""

_READ_FILES: Mapping[str, int] = MappingProxyType(
    {
        "config.json": 8 << 20,
        "generation_config.json": 1 << 20,
        "preprocessor_config.json": 1 << 20,
        "special_tokens_map.json": 8 << 20,
        "tokenizer.json": 128 << 20,
        "tokenizer_config.json": 8 << 20,
    }
)
"""Files that runtimes read, with the most bytes that they read of them."""

_OTHER_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "config_sentence_transformers.json",
        "merges.txt",
        "modules.json",
        "processor_config.json",
        "sentence_bert_config.json",
        "sentencepiece.bpe.model",
        "spiece.model",
        "spm.model",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
    }
)
"""Data that belongs to a model, though no runtime of today reads it. Left where it is if it is
large, or no file."""

_MAX_OTHER_BYTES = 16 << 20
_COMPANIONS = tuple(sorted(_READ_FILES.keys() | _OTHER_FILES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """How a model's folder looked.

    Attributes:
        folder: device, inode and times of the folder itself: it changes with the names in it.
        files: what was taken, and companions that were seen and not taken, by name.
    """

    folder: tuple[int, int, int, int]
    files: tuple[tuple[str, FileIdentity], ...]

    def seen_again(self, directory: int) -> Snapshot | None:
        """Compares it with the folder as it is now: a stat a file.

        Returns:
            Itself if nothing changed, one with the new times of the folder if only names changed
            that do not matter, None if anything else did.
        """
        for name, identity in self.files:
            if _look(directory, name) != identity:
                return None
        folder = _folder_identity(directory)
        if folder == self.folder:
            return self
        known = {name for name, _ in self.files}
        # The two weights files count as well: one that appears takes the other's place.
        for name in (*_COMPANIONS, WEIGHTS_FILE, INDEX_FILE):
            if name not in known and _look(directory, name) is not None:
                if name == INDEX_FILE and WEIGHTS_FILE in known:
                    continue
                return None
        return replace(self, folder=folder)

    @property
    def weights(self) -> dict[str, FileIdentity]:
        """Identities of the weights files, and of the index that named them."""
        return {name: identity for name, identity in self.files if name not in _COMPANIONS}

    @property
    def size_bytes(self) -> int:
        """Bytes of the files that were taken."""
        return sum(
            identity[2]
            for name, identity in self.files
            if name in _READ_FILES or name not in _OTHER_FILES or identity[2] <= _MAX_OTHER_BYTES
        )


def take_snapshot(directory: int, checkpoint: Checkpoint) -> Snapshot:
    """Looks at all files of a model.

    Args:
        directory: the open folder.
        checkpoint: the headers that were read from it.

    Raises:
        ModelFilesError: a weights file is not the one whose header was read.
    """
    # The folder first: names that change from here on are noticed.
    folder = _folder_identity(directory)
    files: list[tuple[str, FileIdentity]] = []
    for header in checkpoint.files:
        identity = _look(directory, header.name)
        if identity is None or identity[:4] != header.identity:
            _changed(header.name)
        files.append((header.name, identity))
    if _look(directory, WEIGHTS_FILE) is None:
        index = _look(directory, INDEX_FILE)
        if index is None:
            _changed(INDEX_FILE)
        files.append((INDEX_FILE, index))
    files += [
        (name, identity) for name in _COMPANIONS if (identity := _look(directory, name)) is not None
    ]
    return Snapshot(folder=folder, files=tuple(files))


def settle(snapshot: Snapshot, stop: StopCheck) -> None:
    """Waits until a change of the files would show in their times.

    A file that is written twice within one step of the file system's clock has the same times both
    times. So what was written this very moment is looked at again only after the step; it takes
    milliseconds, once.

    Raises:
        LoadCancelled: stop said so.
    """
    newest = max(identity[4] for _, identity in snapshot.files)
    while 0 <= time.time_ns() - newest < _TICK_NS:
        if stop():
            raise LoadCancelled
        time.sleep(_TICK_NS / 4e9)


def read_companions(folder: FolderLike, snapshot: Snapshot) -> dict[str, bytes]:
    """Reads the small files that belong to a model, by name.

    Raises:
        ModelFilesError: one that a runtime reads is too large, no regular file, or not the one of
            the snapshot.
    """
    contents = {}
    for name, identity in snapshot.files:
        if name not in _COMPANIONS:
            continue
        try:
            with open_model_file(folder, name) as file:
                _check_same(name, file, identity)
                limit = _READ_FILES.get(name, _MAX_OTHER_BYTES)
                if file.size_bytes > limit:
                    raise ModelFilesError(
                        f"{name} has {file.size_bytes} bytes; at most {limit} are read"
                    )
                contents[name] = read_exactly(file.descriptor, file.size_bytes, name)
                _check_same(name, file, identity)
        except ModelFilesError as error:
            if name in _READ_FILES or error.transient:
                raise
    return contents


class SourceWeights:
    """Reads ranges of a folder's weights files, one open file at a time.

    Every file is compared with the snapshot when it is opened and when it is left. Used by one
    thread, as a context manager; an end without an error has compared all of them.
    """

    def __init__(self, folder: FolderLike, snapshot: Snapshot) -> None:
        self._folder = folder
        self._identities = snapshot.weights
        self._name = ""
        self._stack = ExitStack()
        self._file: OpenFile | None = None
        self._buffer = memoryview(bytearray(BLOCK_BYTES))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._compare()
        finally:
            self._stack.close()

    def blocks(self, name: str, begin: int, end: int, stop: StopCheck) -> Iterator[memoryview]:
        """Gives the bytes of a range in blocks; each is valid until the next.

        Args:
            name: of the file.
            begin: first byte.
            end: first byte behind it.
            stop: asked before every block.

        Raises:
            ModelFilesError: the file changed or cannot be read.
            LoadCancelled: stop said so.
        """
        yield from blocks_of(self._descriptor(name), name, begin, end, stop, self._buffer)

    def _descriptor(self, name: str) -> int:
        if name != self._name or self._file is None:
            self._compare()
            self._stack.close()
            self._file = self._stack.enter_context(open_model_file(self._folder, name))
            self._name = name
            self._compare()
        return self._file.descriptor

    def _compare(self) -> None:
        if self._file is not None:
            _check_same(self._name, self._file, self._identities[self._name])


def blocks_of(
    descriptor: int, name: str, begin: int, end: int, stop: StopCheck, buffer: memoryview
) -> Iterator[memoryview]:
    """Gives the bytes of a range of an open file in blocks; each is valid until the next.

    Args:
        descriptor: of the file.
        name: of the file, for errors.
        begin: first byte.
        end: first byte behind it.
        stop: asked before every block.
        buffer: what they are read into.

    Raises:
        ModelFilesError: the file ends before, or cannot be read.
        LoadCancelled: stop said so.
    """
    while begin < end:
        if stop():
            raise LoadCancelled
        room = buffer[: min(end - begin, len(buffer))]
        try:
            count = os.preadv(descriptor, [room], begin)
        except OSError as error:
            raise ModelFilesError(
                f"{name} cannot be read: {os.strerror(error.errno or 0).lower()}", transient=True
            ) from None
        if not count:
            raise ModelFilesError(f"{name} became shorter while it was being read", transient=True)
        yield room[:count]
        begin += count


def _check_same(name: str, file: OpenFile, identity: FileIdentity) -> None:
    if _identity(os.fstat(file.descriptor)) != identity:
        _changed(name)


def _changed(name: str) -> NoReturn:
    raise ModelFilesError(f"{name} changed while it was being imported", transient=True)


def _look(directory: int, name: str) -> FileIdentity | None:
    try:
        return _identity(os.stat(name, dir_fd=directory, follow_symlinks=False))
    except OSError:
        return None


def _identity(status: os.stat_result) -> FileIdentity:
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def _folder_identity(directory: int) -> tuple[int, int, int, int]:
    status = os.fstat(directory)
    return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
