"""Reads the small files of a model folder: bounded, without following links, without blocking.

A model folder is written by somebody else. Whatever a name in it turns out to be (a pipe, a device,
a link out of the folder, a gigabyte of brackets) must cost little and end in a `ModelFilesError`.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from modelyard_server.runtimes.api import JsonValue, ModelFilesError, ModelSpec

__all__ = [
    "FolderLike",
    "ModelFolder",
    "OpenFile",
    "check_folder",
    "folder_of",
    "open_model_file",
    "opened_folder",
    "parse_json",
    "read_model_file",
    "shown",
]

MAX_JSON_DEPTH = 32
"""Deepest nesting of a configuration file; composite models need about 6."""

_MAX_SHOWN_CHARS = 64

_TRANSIENT_ERRORS = frozenset(
    {
        errno.EAGAIN,
        errno.EINTR,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
"""What may be gone the next time somebody asks. Everything else needs a person."""


_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """A model's folder by its way from a root.

    Attributes:
        root: a folder of the operator's, who may have put links on the way to it.
        parts: names of the folders from there on; a link among them is not followed, whenever it
            was put there.
    """

    root: Path
    parts: tuple[str, ...]


FolderLike = Path | ModelFolder
"""Where a model's files are; of a bare path the whole way is trusted."""


def folder_of(spec: ModelSpec) -> FolderLike:
    """The folder of a model.

    Raises:
        ModelFilesError: it has none.
    """
    if spec.folder is None:
        raise ModelFilesError("the model has no folder")
    if spec.root is None:
        return spec.folder
    return ModelFolder(root=spec.root, parts=spec.folder.relative_to(spec.root).parts)


def check_folder(folder: FolderLike) -> None:
    """Checks that a model's folder is there and can be opened.

    Raises:
        ModelFilesError: it is not, or it is reached through a symbolic link.
    """
    os.close(_open_folder(folder))


@contextmanager
def opened_folder(folder: FolderLike) -> Iterator[int]:
    """Opens a model's folder; names below the descriptor stay in the folder that was opened.

    Raises:
        ModelFilesError: it is missing, or it is reached through a symbolic link.
    """
    descriptor = _open_folder(folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFile:
    """A regular file that is open for reading.

    Attributes:
        descriptor: owned by the context manager that made it.
        size_bytes: its length when it was opened.
        identity: device, inode, size and time of the last change: tells whether it is still the
            same file with the same content.
    """

    descriptor: int
    size_bytes: int
    identity: tuple[int, int, int, int]


@contextmanager
def open_model_file(folder: FolderLike, name: str) -> Iterator[OpenFile]:
    """Opens a regular file directly inside a model folder.

    Args:
        folder: the model's folder.
        name: name of the file, without any directory.

    Raises:
        ModelFilesError: there is no such file, it is a symbolic link, no regular file, or the
            system refuses it; transient if the system may not refuse it later.
    """
    if "/" in name or "\x00" in name or name in ("", ".", ".."):
        raise ModelFilesError(f"{shown(name)} is not the name of a file in the model's folder")
    # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever. The bytes of a regular
    # file are not affected by it.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    directory = _open_folder(folder)
    try:
        try:
            descriptor = os.open(name, flags, dir_fd=directory)
        except OSError as error:
            _refuse(name, error)
    finally:
        os.close(directory)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ModelFilesError(f"{name} is not a regular file")
        yield OpenFile(
            descriptor=descriptor,
            size_bytes=status.st_size,
            identity=(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns),
        )
    finally:
        os.close(descriptor)


def _open_folder(folder: FolderLike) -> int:
    """Opens a model's folder. The descriptor is the caller's."""
    root, parts = (folder, ()) if isinstance(folder, Path) else (folder.root, folder.parts)
    try:
        descriptor = os.open(root, _FOLDER_FLAGS)
        try:
            for part in parts:
                outer = descriptor
                descriptor = os.open(part, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=outer)
                os.close(outer)
        except OSError:
            os.close(descriptor)
            raise
    except OSError as error:
        if parts and error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise ModelFilesError(
                "the model's folder is none, or is reached through a symbolic link"
            ) from None
        # Without its cause: a folder that is missing is not a file that need not be there.
        raise _refusal("the model's folder", error) from None
    return descriptor


def read_model_file(folder: FolderLike, name: str, *, max_bytes: int) -> bytes | None:
    """Returns the content of a small file, or None if the folder has none of that name.

    Raises:
        ModelFilesError: it is longer than `max_bytes`, or cannot be read.
    """
    try:
        with open_model_file(folder, name) as file:
            if file.size_bytes > max_bytes:
                raise ModelFilesError(
                    f"{name} has {file.size_bytes} bytes; at most {max_bytes} are read"
                )
            return read_exactly(file.descriptor, file.size_bytes, name)
    except ModelFilesError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def read_exactly(descriptor: int, size_bytes: int, name: str) -> bytes:
    """Returns that many bytes from where the descriptor stands.

    Raises:
        ModelFilesError: the file ends before, or cannot be read.
    """
    content = bytearray()
    while len(content) < size_bytes:
        try:
            part = os.read(descriptor, min(size_bytes - len(content), 1 << 20))
        except OSError as error:
            _refuse(name, error)
        if not part:
            raise ModelFilesError(f"{name} became shorter while it was being read", transient=True)
        content += part
    return bytes(content)


def parse_json(name: str, content: bytes, *, max_depth: int = MAX_JSON_DEPTH) -> JsonValue:
    """Returns the value of a JSON file, more strictly than the json module.

    Args:
        name: name of the file, for the error.
        content: its bytes; the caller has bounded their number.
        max_depth: deepest nesting of lists and objects.

    Raises:
        ModelFilesError: no UTF-8, no JSON, an object that says one key twice, or nested too deep.
    """
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=distinct_keys)
    except RecursionError:
        raise ModelFilesError(f"{name} is nested deeper than {max_depth} levels") from None
    except _DuplicateKeyError as error:
        raise ModelFilesError(f"{name} says {shown(error.args[0])} twice") from None
    except ValueError:
        raise ModelFilesError(f"{name} is not JSON") from None
    level: list[JsonValue] = [value]
    depth = 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > max_depth:
            raise ModelFilesError(f"{name} is nested deeper than {max_depth} levels")
        level = [
            child for item in level for child in (item.values() if isinstance(item, dict) else item)
        ]
    return value


def distinct_keys(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    """Makes the dict of an object; json.loads itself lets the last of two equal keys win.

    Raises:
        ValueError: a key appears twice; its argument is the key.
    """
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return made


def shown(name: str) -> str:
    """Returns a name from a file as it may appear in an error: quoted, escaped and short."""
    cut = name if len(name) <= _MAX_SHOWN_CHARS else f"{name[: _MAX_SHOWN_CHARS - 1]}…"
    return ascii(cut) if not cut.isprintable() else repr(cut)


class _DuplicateKeyError(ValueError):
    pass


def _refuse(name: str, error: OSError) -> NoReturn:
    raise _refusal(name, error) from error


def _refusal(name: str, error: OSError) -> ModelFilesError:
    if isinstance(error, FileNotFoundError):
        text = f"{name} is missing"
    elif error.errno == errno.ELOOP:
        text = f"{name} is a symbolic link; put the file itself there"
    else:
        text = f"{name} cannot be read: {os.strerror(error.errno or 0).lower()}"
    return ModelFilesError(text, transient=error.errno in _TRANSIENT_ERRORS)
