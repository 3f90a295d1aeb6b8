"""The system's page cache: files are put into it, thrown out of it, and found to be out of it."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

__all__ = ["cold_read_s", "drop", "resident_share", "warm"]

_BLOCK_BYTES: Final = 8 << 20
_DROP_TRIES: Final = 20
_DROP_PAUSE_S: Final = 0.05


def resident_share(path: Path) -> float:
    """How much of a file is in the page cache, from 0 to 1.

    Raises:
        OSError: the system does not tell.
    """
    with _opened(path) as descriptor:
        size_bytes = os.fstat(descriptor).st_size
        if not size_bytes:
            return 0.0
        pages = -(-size_bytes // mmap.PAGESIZE)
        vector = (ctypes.c_ubyte * pages)()
        # Copy on write, because only of writable memory does ctypes tell the address.
        with mmap.mmap(descriptor, size_bytes, access=mmap.ACCESS_COPY) as mapping:
            first = ctypes.c_char.from_buffer(mapping)
            try:
                failed = _mincore(ctypes.addressof(first), size_bytes, vector)
            finally:
                del first
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return sum(page & 1 for page in vector) / pages


def drop(paths: Iterable[Path]) -> None:
    """Throws files out of the page cache, and sees that they are out.

    Raises:
        RuntimeError: some of a file stays, as of one that a process has mapped and touched.
    """
    for path in paths:
        tries = 0
        while share := _dropped(path):
            tries += 1
            if tries == _DROP_TRIES:
                raise RuntimeError(f"{share:.1%} of {path.name} stays in the page cache")
            time.sleep(_DROP_PAUSE_S)


def warm(paths: Iterable[Path]) -> None:
    """Reads files, so that they are in the page cache."""
    for path in paths:
        _read(path, bytearray(_BLOCK_BYTES))


def cold_read_s(paths: Iterable[Path]) -> float:
    """Seconds that reading files from end to end takes when none of them is in the page cache.

    One reader with large blocks into memory that is there: the most that the disk gives.
    """
    paths = list(paths)
    buffer = bytearray(_BLOCK_BYTES)
    drop(paths)
    began = time.perf_counter()
    for path in paths:
        _read(path, buffer)
    return time.perf_counter() - began


def _dropped(path: Path) -> float:
    """Throws a file out; returns how much of it stays."""
    with _opened(path) as descriptor:
        # What is not written yet cannot be dropped.
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return resident_share(path)


def _read(path: Path, buffer: bytearray) -> None:
    with _opened(path) as descriptor:
        offset = 0
        while count := os.preadv(descriptor, [buffer], offset):
            offset += count


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _mincore(address: int, size_bytes: int, vector: ctypes.Array[ctypes.c_ubyte]) -> int:
    function = ctypes.CDLL(None, use_errno=True).mincore
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return int(function(address, size_bytes, vector))
