"""The index: which model a folder was when it was last looked at. A memory aid, no more.

An entry that is missing, torn or wrong costs reading a model once again. So entries are renamed
into place but not brought down to the disk one by one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modelyard_server.weights.model_files import FolderLike
from modelyard_server.weights.store.layout import Layout
from modelyard_server.weights.store.sources import Snapshot

__all__ = ["Index", "Sighting"]

_SUFFIX = ".json"
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A source, and which model it was.

    Attributes:
        snapshot: how its folder looked.
        digest: of the model.
    """

    snapshot: Snapshot
    digest: str


class Index:
    """Entries by source."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def read(self, source: FolderLike) -> Sighting | None:
        """What is known of a source."""
        return self.read_named(self.name(source))

    def read_named(self, name: str) -> Sighting | None:
        """What is known of a source, by the name of its entry."""
        return _read(self._layout.index / name)

    def write(self, source: FolderLike, sighting: Sighting) -> None:
        """Remembers a source, if the disk allows. Only for who holds the lock for writing."""
        value = {
            "digest": sighting.digest,
            "folder": sighting.snapshot.folder,
            "files": dict(sighting.snapshot.files),
        }
        new = self._layout.new_path()
        try:
            new.write_text(json.dumps(value, separators=(",", ":")))
            new.replace(self._layout.index / self.name(source))
        except OSError:
            # The model itself is in the store; it is only read again by the next server.
            with contextlib.suppress(OSError):
                new.unlink()

    def entries(self) -> Iterator[tuple[Path, Sighting | None]]:
        """All entries and the files they are in; None for one that cannot be read."""
        for path in sorted(self._layout.index.iterdir()):
            yield path, _read(path)

    @staticmethod
    def name(source: FolderLike) -> str:
        """Name of a source's entry."""
        root, parts = (source, ()) if isinstance(source, Path) else (source.root, source.parts)
        text = json.dumps([os.fspath(root.absolute()), *parts])
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return f"{digest}{_SUFFIX}"


def _read(path: Path) -> Sighting | None:
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        value = json.loads(path.read_bytes())
        device, inode, modified, changed = value["folder"]
        if not _DIGEST.fullmatch(value["digest"]):
            return None
        return Sighting(
            snapshot=Snapshot(
                folder=(device, inode, modified, changed),
                files=tuple((name, tuple(item)) for name, item in value["files"].items()),
            ),
            digest=value["digest"],
        )
    return None
