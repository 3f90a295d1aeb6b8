"""Keeps one worker there: when it goes, the next one is started."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from modelyard_server.execution.workers.settings import WorkerSettings
from modelyard_server.execution.workers.worker_process import WorkerGone, WorkerProcess
from modelyard_server.execution.workers.zygote_client import ZygoteLost

__all__ = ["Keeper", "NoWorker"]

logger = logging.getLogger(__name__)

_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 30.0


class NoWorker(Exception):
    """There is no worker, and none to be expected soon.

    Attributes:
        text: why, for people.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class Keeper:
    """Keeps one worker there. For the loop's thread only.

    A worker that goes is replaced at once, when its process is over. One that does not even become
    ready is tried again after a wait that grows, and once that has failed several times, whoever
    asks for a worker is told so instead of waiting.

    Args:
        name: of its workers, for people.
        start: forks a worker; raises ZygoteLost. Told whether that has failed several times in a
            row.
        settings: limits.
    """

    def __init__(
        self,
        *,
        name: str,
        start: Callable[[bool], Awaitable[WorkerProcess]],
        settings: WorkerSettings,
    ) -> None:
        self.name = name
        self._start = start
        self._settings = settings
        self._worker: WorkerProcess | None = None
        self._changed = asyncio.Event()
        self._failures = 0
        self._failed_forks = 0
        self._failure = ""
        self._is_stopping = False
        self._task: asyncio.Task[None] | None = None

    @property
    def worker(self) -> WorkerProcess | None:
        """The worker that is there; None while there is none."""
        worker = self._worker
        return None if worker is None or worker.is_gone else worker

    def begin(self) -> None:
        """Begins to keep one."""
        self._task = asyncio.get_running_loop().create_task(self._keep(), name=f"keep {self.name}")

    async def ready(self) -> WorkerProcess:
        """The worker, once there is one.

        Raises:
            NoWorker: there is none, and waiting does not help.
        """
        while (worker := self.worker) is None:
            if self._is_stopping:
                raise NoWorker("the server stops")
            if self._failures >= self._settings.start_tries:
                raise NoWorker(f"worker {self.name} does not start: {self._failure}")
            await self._changed.wait()
        return worker

    async def stop(self, timeout_s: float) -> bool:
        """Stops it, and keeps none any more.

        Returns:
            False if it, or something in it, had to be killed.
        """
        self._is_stopping = True
        self._tell()
        worker = self._worker
        ended = True
        if worker is not None:
            ended = await worker.stop(timeout_s)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._worker is not None and self._worker is not worker:
            ended = await self._worker.stop(timeout_s) and ended
        return ended

    async def _keep(self) -> None:
        while not self._is_stopping:
            worker = await self._try()
            if worker is None:
                wait_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (self._failures - 1))
                await asyncio.sleep(wait_s)
                continue
            self._failures = 0
            self._worker = worker
            self._tell()
            # Not before its process is over: until then it holds what the next one may need.
            await asyncio.shield(worker.exited)

    async def _try(self) -> WorkerProcess | None:
        worker: WorkerProcess | None = None
        try:
            async with asyncio.timeout(self._settings.start_limit_s):
                worker = await self._start(self._failed_forks >= self._settings.start_tries)
                self._failed_forks = 0
                await asyncio.shield(worker.ready)
        except (TimeoutError, WorkerGone, ZygoteLost) as error:
            self._failures += 1
            limit_s = self._settings.start_limit_s
            text = str(error) or f"it is not ready after {limit_s:g} s"
            logger.error("worker %s does not start (%d): %s", self.name, self._failures, text)
            self._failure = text
            if worker is None:
                self._failed_forks += 1
            else:
                worker.kill(text)
                await asyncio.shield(worker.exited)
            self._tell()
            return None
        except asyncio.CancelledError:
            if worker is not None:
                worker.kill("the server stops")
                await asyncio.shield(worker.exited)
            raise
        return worker

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
