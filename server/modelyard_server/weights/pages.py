"""What the system is told about pages of memory, without the interpreter's lock.

The methods of mmap.mmap keep the lock, and reading pages from a disk takes as long as the disk
takes. Whoever calls these keeps the mapping alive.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable, Iterable, Iterator

__all__ = [
    "advise",
    "are_cached",
    "joined_ranges",
    "seem_cached",
    "uncached",
    "write_protect",
]

_SAMPLED_BYTES = 4 << 20
"""Of so many, one page is looked at."""

_PIECE_BYTES = 2 << 20
"""What is looked at, and read, at once of a file that is in memory in part."""

_SYS_CACHESTAT = 451
"""Linux 6.5; the same number on every architecture."""


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("size", ctypes.c_uint64))


class _CacheStat(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    for function in (libc.madvise, libc.mprotect):
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


@functools.cache
def _cachestat() -> Callable[..., int]:
    # A library of its own: whoever else calls syscall has arguments of other types.
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    function.argtypes = [
        *(ctypes.c_long, ctypes.c_uint),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint),
    ]
    return function


def advise(address: int, size_bytes: int, advice: int) -> None:
    """Calls madvise.

    Args:
        address: of the first byte, which begins a page.
        size_bytes: length of the range.
        advice: one of mmap's MADV constants, or another number of the system's.

    Raises:
        OSError: the system refuses.
    """
    if _libc().madvise(address, size_bytes, advice):
        _fail()


def are_cached(descriptor: int, start: int, size_bytes: int) -> bool:
    """True if the system holds all pages of a range of a file in memory, whoever has read them.

    Asking takes microseconds where mincore takes one lookup a page. False as well where the system
    cannot be asked.

    Args:
        descriptor: of the open file.
        start: first byte.
        size_bytes: length of the range.
    """
    first = start - start % mmap.PAGESIZE
    last = start + size_bytes
    found = _CacheStat()
    asked = _Range(first, last - first)
    if _cachestat()(_SYS_CACHESTAT, descriptor, ctypes.byref(asked), ctypes.byref(found), 0):
        return False
    return bool(found.cached >= -(-(last - first) // mmap.PAGESIZE))


def seem_cached(descriptor: int, start: int, size_bytes: int) -> bool:
    """The same of a long range by a look here and there, which takes a tenth of the time.

    The system gives pages up by many, the oldest files first: a file that is not in memory as a
    whole seldom looks as if it were. What is missed is read when it is first used.
    """
    if size_bytes <= _SAMPLED_BYTES:
        return are_cached(descriptor, start, size_bytes)
    last = start + size_bytes - 1
    call, found, asked = _cachestat(), _CacheStat(), _Range(0, mmap.PAGESIZE)
    pointers = ctypes.byref(asked), ctypes.byref(found)
    for at in (*range(start, last, _SAMPLED_BYTES), last):
        asked.offset = at - at % mmap.PAGESIZE
        if call(_SYS_CACHESTAT, descriptor, *pointers, 0) or not found.cached:
            return False
    return True


def uncached(descriptor: int, start: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """The pieces of a range of a file that the system has not in memory, or not all of.

    A long range that seems to be there by a look here and there has none.

    Args:
        descriptor: of the open file.
        start: first byte.
        size_bytes: length of the range.

    Yields:
        First byte and length of each piece.
    """
    if seem_cached(descriptor, start, size_bytes):
        return
    for begin in range(start, start + size_bytes, _PIECE_BYTES):
        piece_bytes = min(_PIECE_BYTES, start + size_bytes - begin)
        if not are_cached(descriptor, begin, piece_bytes):
            yield begin, piece_bytes


def joined_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same ranges of bytes, from first to behind the last, in order; those that touch as one.

    Ranges without bytes are left out.
    """
    merged: list[tuple[int, int]] = []
    first = last = 0
    for begin, end in sorted(ranges):
        if begin > last:
            if first < last:
                merged.append((first, last))
            first, last = begin, end
        elif end > last:
            last = end
    if first < last:
        merged.append((first, last))
    return merged


def write_protect(address: int, size_bytes: int) -> None:
    """Makes a write to a range of memory end the process by a signal.

    Python and torch go on to believe that they may write. A mapping that they know to be read-only
    would be no different in effect, but torch warns of it, and a warning can only be silenced for
    all threads at once.

    Args:
        address: of the first byte, which begins a page.
        size_bytes: length of the range.

    Raises:
        OSError: the system refuses.
    """
    if _libc().mprotect(address, size_bytes, mmap.PROT_READ):
        _fail()


def _fail() -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))
