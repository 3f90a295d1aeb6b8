"""The durable store of the catalog: what an acknowledged change is kept by.

One SQLite file, one connection, one thread that writes. What this rests on:

* Acknowledged is durable. The write-ahead log is synced at every commit (WAL with
  ``synchronous=FULL``). A killed process cannot tell FULL from OFF, because the page cache outlives
  it; a power cut can, so the settings are asked back when the file is opened.
* A change is one transaction. No reader, no crash and no full disk shows half of one.
* The file has one owner. The connection holds SQLite's exclusive lock until it is closed or the
  process dies; nobody else can even read meanwhile. In return there is no shared-memory file, and
  nothing can be changed behind the server's back.
* A failed write has changed nothing. When the sync of a commit fails, the log may hold the whole
  change, and whoever reads the log afresh would find it. Therefore the connection, which knows that
  the change does not count, is never reopened; instead the log is emptied through it before
  anything else is written. Only if the process dies while the disk still refuses that can a change
  that was reported as failed be there after the restart, whole as always.
* Opening reads. A file that is no catalog, is damaged, is newer or is in use is left as it is, and
  a full disk does not keep the server from starting. (If the last writer of such a file died, then
  SQLite takes the log beside it into the file, which changes nothing of what the file means.)
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from modelyard_server.catalog import schema
from modelyard_server.catalog.records import Change, RequestRecord, Stored

__all__ = [
    "CatalogStore",
    "StorageFailed",
    "StoreDamaged",
    "StoreError",
    "StoreInUse",
    "StoreTooNew",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PATIENCE_S = 0.2
"""How long a lock is waited for. Of two that make a file at the same time, one shall win."""

_FULL = 2
"""How SQLite answers PRAGMA synchronous."""


class StoreError(Exception):
    """The store cannot do what it was asked.

    Attributes:
        text: what is wrong with which file.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class StoreInUse(StoreError):
    """Another process has the file open."""


class StoreDamaged(StoreError):
    """The file is no SQLite database, no catalog of modelyard, or not whole."""


class StoreTooNew(StoreError):
    """The file was written by a newer version of modelyard."""


class StorageFailed(StoreError):
    """The disk is full, failing or read-only. Nothing was changed, and a retry may succeed."""


class CatalogStore:
    """The stored catalog. Make one with `open`, and close it.

    `read` may be called from any thread; the coroutines from any event loop, and from several.
    """

    def __init__(
        self, connection: sqlite3.Connection, name: str, now: Callable[[], datetime]
    ) -> None:
        self._connection = connection
        self._name = name
        self._now = now
        # Held while the connection is used: a reader must not see half a transaction.
        self._lock = threading.Lock()
        # True after a failure until the log is known to hold nothing but what counts.
        self._doubtful = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="catalog-store")
        self._end: Future[None] | None = None

    @staticmethod
    def open(
        path: Path | None, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> CatalogStore:
        """Opens the file, makes it (readable by its owner alone) if there is none, and migrates it.

        Args:
            path: of the file, in a folder that exists. None keeps everything in memory.
            now: the time in UTC, for stamping plans.

        Raises:
            StoreInUse: another process has it open.
            StoreDamaged: it is no database, another program's database, or damaged.
            StoreTooNew: a newer version of modelyard wrote it.
            StorageFailed: it cannot be made, read or written.
        """
        name = "the catalog in memory" if path is None else str(path)
        target = ":memory:"
        if path is not None:
            _make_file(path)
            target = f"{path.absolute().as_uri()}?mode=rw"
        connection = None
        try:
            connection = sqlite3.connect(
                target,
                timeout=_PATIENCE_S,
                isolation_level=None,
                check_same_thread=False,
                uri=True,
            )
            _prepare(connection, name, in_file=path is not None)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, sqlite3.Error):
                raise _translated(error, name) from error
            raise
        return CatalogStore(connection, name, now)

    def read(self) -> Stored:
        """All that is stored, but for the remembered requests.

        Waits for a write that runs, so it is for starting up rather than for the event loop of a
        server at work.

        Raises:
            StoreDamaged, StorageFailed: it cannot be read.
        """
        if self._end is not None:
            raise self._closed()
        with self._lock:
            try:
                return schema.read_stored(self._connection)
            except sqlite3.Error as error:
                raise _translated(error, self._name) from error
            except (TypeError, ValueError) as error:
                raise StoreDamaged(f"{self._name} is damaged: {error}") from error

    async def write(self, change: Change) -> int:
        """Makes a change durable, all of it or nothing, and returns the plan's revision after it.

        Changes are made in the order of the calls. A change that was asked for is made even if the
        caller is cancelled; the cancellation is raised once it is known how the change ended.

        Raises:
            ValueError: the change contradicts what is stored: a key would mean two things, a
                placement is for a model that is not there, or a request was recorded before.
                Nothing was changed.
            TypeError: options or a placement that is no JSON. Nothing was changed.
            StorageFailed: nothing was changed.
            StoreDamaged: the file is not whole. Nothing was changed.
        """
        return await self._in_thread(lambda: self._write(change))

    async def request(self, request_id: str) -> RequestRecord | None:
        """The remembered answer to a request; None if there is none, or none any more.

        Raises:
            StoreDamaged, StorageFailed: it cannot be read.
        """
        return await self._in_thread(lambda: self._request(request_id))

    async def close(self) -> None:
        """Waits for the writes that were asked for, empties the log into the file, and closes it.

        May be called again; every call returns when the file is closed.
        """
        if self._end is None:
            self._end = self._thread.submit(self._close)
        try:
            await _outcome(self._end)
        finally:
            # The thread has nothing left to do, so this does not wait.
            self._thread.shutdown()

    async def _in_thread(self, function: Callable[[], T]) -> T:
        if self._end is not None:
            raise self._closed()
        return await _outcome(self._thread.submit(function))

    def _closed(self) -> RuntimeError:
        return RuntimeError(f"{self._name} is closed")

    def _write(self, change: Change) -> int:
        with self._lock:
            try:
                self._settle()
                return self._transact(change)
            except sqlite3.Error as error:
                raise _translated(error, self._name) from error

    def _transact(self, change: Change) -> int:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            revision = schema.apply_change(connection, change, self._now())
            connection.execute("COMMIT")
        except BaseException as error:
            # A contradiction is found before anything is written; all else may come from the disk.
            self._doubtful = not isinstance(error, ValueError | TypeError)
            # What cannot be undone now is undone before the next write.
            with suppress(sqlite3.Error):
                self._roll_back()
                self._settle()
            raise
        return revision

    def _settle(self) -> None:
        if not self._doubtful:
            return
        self._roll_back()
        _empty_log(self._connection)
        self._doubtful = False

    def _roll_back(self) -> None:
        if self._connection.in_transaction:  # SQLite ends some failed transactions by itself.
            self._connection.execute("ROLLBACK")

    def _request(self, request_id: str) -> RequestRecord | None:
        with self._lock:
            try:
                return schema.read_request(self._connection, request_id)
            except sqlite3.Error as error:
                raise _translated(error, self._name) from error

    def _close(self) -> None:
        with self._lock, closing(self._connection):
            try:
                self._roll_back()
                _empty_log(self._connection)
            except sqlite3.Error as error:
                # Nothing is lost: the next start reads the log.
                logger.warning("the log beside %s could not be emptied: %s", self._name, error)


async def _outcome(work: Future[T]) -> T:
    """What became of the work, also if the caller is cancelled: then it is raised afterwards."""
    future = asyncio.wrap_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from future.exception()
    return future.result()


def _make_file(path: Path) -> None:
    """Makes an empty file, if there is none, and sees that it can be written.

    The file is not opened if it exists: to close it again would take away the locks that this
    process may hold on it. Its entry in the folder is made durable by SQLite, which syncs the
    folder when it first syncs the log.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        # Otherwise SQLite would open it for reading only, and fail at the first write.
        if not os.access(path, os.W_OK):
            raise StorageFailed(f"{path} may not be written") from None
    except FileNotFoundError:
        raise StorageFailed(f"{path} cannot be made: its folder does not exist") from None
    except OSError as error:
        raise StorageFailed(f"{path} cannot be made: {error.strerror}") from None


def _prepare(connection: sqlite3.Connection, name: str, *, in_file: bool) -> None:
    """Locks the file, checks it, sets the connection up, migrates. Checks before it writes."""
    # Before anything is read: then the lock is never given back, and no shared memory is made.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    version = schema.version_of(connection)
    if version is None:
        raise StoreDamaged(f"{name} is another program's database, not a catalog of modelyard")
    newest = len(schema.MIGRATIONS)
    if version > newest:
        raise StoreTooNew(
            f"{name} has version {version}, and this modelyard knows versions up to {newest}: "
            "it was written by a newer one"
        )
    (first, *_) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if first != "ok":
        # What SQLite found may be told in several lines, and an error is one.
        raise StoreDamaged(f"{name} is damaged: {' '.join(first.split())}")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA fullfsync = ON")  # macOS syncs only to the drive's cache otherwise.
    connection.execute("PRAGMA foreign_keys = ON")
    # A transaction writes when it commits and not before: what is refused never touched the disk.
    connection.execute("PRAGMA cache_spill = OFF")
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    (synchronous,) = connection.execute("PRAGMA synchronous").fetchone()
    if in_file and (mode, synchronous) != ("wal", _FULL):
        raise StorageFailed(
            f"{name} cannot be kept safe: journal {mode}, synchronous {synchronous}"
        )
    before, after = schema.migrate(connection, schema.MIGRATIONS)
    if 0 < before < after:
        logger.info("%s went from version %d to version %d", name, before, after)


def _empty_log(connection: sqlite3.Connection) -> None:
    """Takes what counts from the log into the file, syncs that, and cuts the log to nothing."""
    (busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:  # Never, as nobody else can have the file open; but all that follows rests on it.
        raise sqlite3.OperationalError("the log is in use")


def _translated(error: sqlite3.Error, name: str) -> Exception:
    """What an error of SQLite means here. One that says we misused it stays as it is."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return error
    match code & 0xFF:  # The rest is detail.
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return StoreInUse(f"{name} is in use by another process")
        case sqlite3.SQLITE_NOTADB:
            return StoreDamaged(f"{name} is no SQLite database")
        case (
            sqlite3.SQLITE_FULL
            | sqlite3.SQLITE_IOERR
            | sqlite3.SQLITE_READONLY
            | sqlite3.SQLITE_CANTOPEN
            | sqlite3.SQLITE_PERM
        ):
            return StorageFailed(f"{name} cannot be used: {error} ({error.sqlite_errorname})")
        case _:
            return StoreDamaged(f"{name} is damaged: {error} ({error.sqlite_errorname})")
