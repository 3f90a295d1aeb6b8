"""Gives back what a server's store holds for nobody: by itself, and when it is told to.

What is registered is said to all who share the store as soon as it changes. The store is looked
through after that, and every ten minutes for what changes without a word: the files of a model.
That is done in threads; a collection waits for imports, which may take minutes, and between two
that nobody asked for there are ten seconds.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError
from modelyard_server.weights.model_files import FolderLike
from modelyard_server.weights.store import Collected, Collector

__all__ = ["StoreFigures", "StoreKeeper"]

logger = logging.getLogger(__name__)

_INTERVAL_S = 600.0
_REST_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFigures:
    """What a store holds and what has been given back of it.

    Attributes:
        last: what the last collection found.
        freed_bytes: given back since the server started, by this server.
        freed_count: models that were, by content.
    """

    last: Collected = field(default_factory=Collected)
    freed_bytes: int = 0
    freed_count: int = 0


class StoreKeeper:
    """Looks after the store of a server. On the event loop's thread only.

    Args:
        folder: of the store.
        keep_s: seconds that a model stays after it was last seen to be used.
        folders: says which models' folders the server uses.

    Attributes:
        figures: of what has been done.
    """

    def __init__(
        self, folder: Path, *, keep_s: float, folders: Callable[[], Iterable[FolderLike]]
    ) -> None:
        self._folder = folder
        self._keep_s = keep_s
        self._folders = folders
        self._collector: Collector | None = None
        self._stopping = threading.Event()
        self._is_unsaid = asyncio.Event()
        self._is_said = asyncio.Event()
        self._tasks: set[asyncio.Task[Collected]] = set()
        self._own: tuple[asyncio.Task[None], ...] = ()
        self.figures = StoreFigures()

    async def open(self) -> None:
        """Opens the store: nobody removes anything of it before `start`.

        Raises:
            StoreError: it cannot be used.
        """
        self._collector = await asyncio.to_thread(Collector.open, self._folder)

    def start(self) -> None:
        """Begins to look after it: what the server uses is known now."""
        self._is_unsaid.set()
        loop = asyncio.get_running_loop()
        self._own = (
            loop.create_task(self._say(), name="say what is used of the store"),
            loop.create_task(self._tidy(), name="tidy the store"),
        )

    async def stop(self) -> None:
        """Ends it; a collection ends behind the model that it is at."""
        self._stopping.set()
        for task in self._own:
            task.cancel()
        await asyncio.gather(*self._own, *self._tasks, return_exceptions=True)
        collector, self._collector = self._collector, None
        if collector is not None:
            await asyncio.to_thread(collector.close)

    def note_change(self) -> None:
        """Is told that `folders` says something else than before."""
        self._is_unsaid.set()

    async def collect(
        self, *, keep_s: float | None = None, validate_only: bool = False
    ) -> Collected:
        """Gives back what nobody uses. Goes on to its end whatever becomes of the caller.

        Args:
            keep_s: seconds that a model stays after it was last seen to be used; None: as it is
                configured.
            validate_only: say what would be given back, and do nothing. Waits for no import.

        Raises:
            ModelFilesError: the store's disk is broken, or the server stops or has not begun.
        """
        keep_s = self._keep_s if keep_s is None else keep_s
        work = self._collect(keep_s, validate_only=validate_only)
        task = asyncio.get_running_loop().create_task(work, name="collect the store")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _collect(self, keep_s: float, *, validate_only: bool) -> Collected:
        collector = self._collector
        if collector is None or self._stopping.is_set():
            raise ModelFilesError("the weight store is not open", transient=True)
        await self._publish(collector)
        if validate_only:
            return await asyncio.to_thread(collector.preview, keep_s=keep_s)
        stop = self._stopping.is_set
        try:
            found = await asyncio.to_thread(collector.collect, keep_s=keep_s, stop=stop)
        except LoadCancelled:
            raise ModelFilesError("the server is stopping", transient=True) from None
        self._note(found)
        return found

    def _note(self, found: Collected) -> None:
        if found.obstacle and found.obstacle != self.figures.last.obstacle:
            logger.warning("the weight store gives nothing back: %s", found.obstacle)
        if found.freed_bytes:
            logger.info(
                "the weight store gave back %d bytes (%d models that nobody uses); it holds %d",
                found.freed_bytes,
                found.freed_count,
                found.stored_bytes,
            )
        self.figures = StoreFigures(
            last=found,
            freed_bytes=self.figures.freed_bytes + found.freed_bytes,
            freed_count=self.figures.freed_count + found.freed_count,
        )

    async def _say(self) -> None:
        collector = self._collector
        assert collector is not None
        while True:
            await self._is_unsaid.wait()
            self._is_unsaid.clear()
            await self._publish(collector)
            self._is_said.set()

    async def _publish(self, collector: Collector) -> None:
        try:
            await asyncio.to_thread(collector.publish, list(self._folders()))
        except ModelFilesError as error:
            # On a full disk what it said before still counts, and to collect makes room.
            logger.error("what is used of the weight store cannot be said: %s", error.text)

    async def _tidy(self) -> None:
        while True:
            self._is_said.clear()
            wait_s = _INTERVAL_S
            try:
                found = await self.collect()
                if found.due_at_s is not None:
                    wait_s = min(wait_s, max(0.0, found.due_at_s - time.time()))
            except ModelFilesError as error:
                logger.warning("the weight store gives nothing back: %s", error.text)
            except Exception:
                logger.exception("defect: the weight store cannot be tidied")
            await asyncio.sleep(_REST_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._is_said.wait()
