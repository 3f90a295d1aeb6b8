"""Files in memory that two processes map: without a name, of a size that nobody can change.

A mapped file that shrinks kills whoever reads it. So the size is sealed by whoever makes it, and
whoever gets it looks for the seals before he maps it.
"""

from __future__ import annotations

import fcntl
import os

__all__ = ["SealedFile", "is_sealed"]

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SealedFile:
    """A file in memory. Close it; maps of it stay.

    Args:
        descriptor: of the file; taken over.
    """

    __slots__ = ("_descriptor",)

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @staticmethod
    def make(name: str, size_bytes: int) -> SealedFile:
        """Makes one whose pages are all there: writing to it cannot fail later.

        Args:
            name: for people who look at a process's files.
            size_bytes: of it; positive.

        Raises:
            OSError: there is no memory for it, or no descriptor left.
        """
        file = SealedFile(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        try:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
            fcntl.fcntl(file.fileno(), fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            file.close()
            raise
        return file

    def fileno(self) -> int:
        """Its descriptor.

        Raises:
            ValueError: it is closed.
        """
        if self._descriptor < 0:
            raise ValueError("the file is closed")
        return self._descriptor

    def close(self) -> None:
        """Closes the descriptor. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def is_sealed(descriptor: int, size_bytes: int) -> bool:
    """True if a file has exactly this size and will keep it."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:  # It is no file in memory.
        return False
    needed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    return seals & needed == needed and os.fstat(descriptor).st_size == size_bytes
