"""The store's folder: made, checked, swept; and files that get into it whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from modelyard_server.runtimes.api import ModelFilesError

__all__ = [
    "Layout",
    "StoreError",
    "allocated_bytes",
    "check_room",
    "open_layout",
    "store_writes",
    "sync",
    "write_new_file",
]

FORMAT = 1
_FORMAT_FILE = "store.json"
_OURS = frozenset(
    {
        *("packs", "models", "index", "tmp", "servers", "unused.json", "lost+found"),
        *("users.lock", "write.lock", "readers.lock"),
    }
)
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_SLACK_BYTES = 1 << 20
"""Left free beside what an import needs: the file system takes some for itself."""


class StoreError(Exception):
    """The folder cannot be used as a weight store.

    Attributes:
        text: why; names no path.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


@dataclass(frozen=True, slots=True)
class Layout:
    """Where in a store what is."""

    root: Path

    @property
    def packs(self) -> Path:
        """Files of tensors."""
        return self.root / "packs"

    @property
    def models(self) -> Path:
        """One folder a model."""
        return self.root / "models"

    @property
    def index(self) -> Path:
        """One file a source."""
        return self.root / "index"

    @property
    def temporary(self) -> Path:
        """What is being written."""
        return self.root / "tmp"

    @property
    def servers(self) -> Path:
        """One file a running server: which sources it has registered."""
        return self.root / "servers"

    @property
    def unused(self) -> Path:
        """Since when nobody uses what is there."""
        return self.root / "unused.json"

    def new_path(self) -> Path:
        """A name in `temporary` that nothing has."""
        return self.temporary / uuid.uuid4().hex

    def sweep(self) -> None:
        """Removes what imports that died have left. Only for who holds the lock for writing."""
        with os.scandir(self.temporary) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        Path(entry.path).unlink()


def open_layout(root: Path) -> Layout:
    """Makes or checks a store's folder.

    Raises:
        StoreError: it cannot be made or written to, is something else, others may write to it, or
            it is of another format.
    """
    try:
        # umask may take more away, never less.
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = root.stat()
        if status.st_mode & _WRITABLE_BY_OTHERS:
            raise StoreError(
                "the weight store's folder may be written to by others, who could change loaded "
                "models; take their right away (chmod go-w) or name a new folder in it"
            )
        _check_format(root)
        layout = Layout(root)
        folders = (layout.packs, layout.models, layout.index, layout.temporary, layout.servers)
        for folder in folders:
            folder.mkdir(mode=0o700, exist_ok=True)
        # The one way to know that it is writable: permissions do not tell of read-only mounts.
        probe = layout.new_path()
        probe.touch()
        probe.unlink(missing_ok=True)  # Another worker that opens it may sweep just now.
        sync(root)
    except FileExistsError:
        raise StoreError("the weight store's folder is not a folder") from None
    except OSError as error:
        raise StoreError(f"the weight store's folder cannot be used: {_reason(error)}") from None
    return layout


def _check_format(root: Path) -> None:
    path = root / _FORMAT_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        strangers = {
            name
            for name in os.listdir(root)  # noqa: PTH208 - names, not paths
            if name not in _OURS and not name.startswith(f"{_FORMAT_FILE}.")
        }
        if strangers:
            raise StoreError(
                "the weight store's folder holds other files and is no store; give an empty one"
            ) from None
        # Two servers may do so at once; both write the same.
        new = root / f"{_FORMAT_FILE}.{uuid.uuid4().hex}"
        write_new_file(new, json.dumps({"format": FORMAT}).encode())
        new.rename(path)
        return
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    found = value.get("format") if isinstance(value, dict) else None
    if found != FORMAT:
        shown = found if type(found) is int else "unknown"
        raise StoreError(
            f"the weight store has format {shown}; this version reads format {FORMAT}. Give it an "
            "empty folder: models are imported again from their own"
        )


def write_new_file(path: Path, content: bytes, *, mode: int = 0o444) -> None:
    """Writes a file that is not there yet, down to the disk.

    Raises:
        OSError: it is there, or cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def sync(folder: Path) -> None:
    """Brings the names in a folder down to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_room(layout: Layout, needed_bytes: int) -> None:
    """Checks that the store's disk has room for an import.

    Raises:
        ModelFilesError: it has not.
    """
    if not needed_bytes:
        return
    status = os.statvfs(layout.root)
    free = status.f_bavail * status.f_frsize
    if needed_bytes + _SLACK_BYTES > free:
        raise ModelFilesError(
            f"the weight store needs {needed_bytes + _SLACK_BYTES} bytes for this model, and its "
            f"disk has {free} free",
            transient=True,
        )


@contextmanager
def store_writes() -> Iterator[None]:
    """Turns a failure of the store's own disk into an error of the import.

    Raises:
        ModelFilesError: the disk is full or broken; another time it may not be.
    """
    try:
        yield
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    raise ModelFilesError(
        f"the weight store cannot be written: {_reason(error)}", transient=True
    ) from None


def _reason(error: OSError) -> str:
    return os.strerror(error.errno or errno.EIO).lower()


def allocated_bytes(folder: Path) -> int:
    """Bytes of the files in a folder, at any depth."""
    total = 0
    # Somebody may be writing: what is gone when it is looked at counts nothing.
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                total += allocated_bytes(Path(entry.path))
            else:
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_size
    return total
