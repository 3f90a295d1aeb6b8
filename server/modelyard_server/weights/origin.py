"""How much of what was loaded came from where."""

from __future__ import annotations

from dataclasses import dataclass

from modelyard_server.runtimes.api import LoadSource

__all__ = ["NOWHERE", "Origin"]

_NEARLY_ALL = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Bytes by where they were before they were loaded.

    Attributes:
        file_bytes: in files.
        missing_bytes: a part of these, which the system did not have in memory, or may not have had
            where it cannot be asked.
        copied_bytes: in copies that were kept.
    """

    file_bytes: int = 0
    missing_bytes: int = 0
    copied_bytes: int = 0

    @property
    def source(self) -> LoadSource:
        """What to call it.

        By where most of it was: a few pages that had to be read are not what a load from storage is
        about, nor is a tensor or two that another model's copy has what a load from a copy is
        about. What was in memory already costs no more than what the page cache has, and is called
        the same.
        """
        if self.copied_bytes > self.file_bytes * _NEARLY_ALL:
            return LoadSource.COPY
        if self.missing_bytes * _NEARLY_ALL > self.file_bytes:
            return LoadSource.STORAGE
        return LoadSource.PAGE_CACHE

    def __add__(self, other: Origin) -> Origin:
        """Both together."""
        return Origin(
            file_bytes=self.file_bytes + other.file_bytes,
            missing_bytes=self.missing_bytes + other.missing_bytes,
            copied_bytes=self.copied_bytes + other.copied_bytes,
        )


NOWHERE = Origin()
"""Of what was not loaded."""
