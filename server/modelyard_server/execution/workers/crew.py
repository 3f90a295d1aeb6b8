"""The workers of an engine: the zygote, one worker for files, and one for each group of devices."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from modelyard_server.execution.engine import EngineDevice
from modelyard_server.execution.figures import LaneFigures
from modelyard_server.execution.workers.board import Board
from modelyard_server.execution.workers.keeper import Keeper
from modelyard_server.execution.workers.measured import WorkersMemory
from modelyard_server.execution.workers.records import encode_device
from modelyard_server.execution.workers.settings import RuntimeSource, WorkerSettings
from modelyard_server.execution.workers.worker_process import WorkerEnd, WorkerProcess
from modelyard_server.execution.workers.zygote_client import ZygoteClient, ZygoteLost
from modelyard_server.runtimes.targets import DISK

__all__ = ["Crew", "Group"]

logger = logging.getLogger(__name__)

_FILES = "files"


@dataclass(frozen=True, slots=True)
class Group:
    """Devices that share a worker.

    Attributes:
        keeper: of the worker.
        devices: their positions; the disks are of every group.
    """

    keeper: Keeper
    devices: frozenset[int]


class Crew:
    """Has all workers there, watches over them and limits them. For the loop's thread only.

    Args:
        devices: by their position in the yard.
        source: of the runtimes.
        settings: limits of the workers.
        budgets: bytes of each device, by position; None: workers may have any amount of memory.
        on_end: called when a worker of models that took calls has gone without being asked to,
            before its calls end.

    Attributes:
        files: keeps the worker that prices.
        groups: of devices, by name.
        memory: what is measured on the devices.

    Raises:
        ValueError: there are not as many budgets as devices.
    """

    def __init__(
        self,
        *,
        devices: Sequence[EngineDevice],
        source: RuntimeSource,
        settings: WorkerSettings,
        budgets: Sequence[int] | None,
        on_end: Callable[[WorkerProcess, WorkerEnd], None],
    ) -> None:
        self._devices = tuple(devices)
        self._source = source
        self._settings = settings
        self._budgets = None if budgets is None else list(budgets)
        if self._budgets is not None and len(self._budgets) != len(self._devices):
            raise ValueError("there must be as many budgets as devices")
        self._copies_budget = 0
        self._on_end = on_end
        self._warm: set[str] = set()
        self._zygote: ZygoteClient | None = None
        self._retired: list[ZygoteClient] = []
        self._zygote_lock = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None
        self.memory = WorkersMemory(len(self._devices))
        self._workers: list[WorkerProcess] = []
        self._gone_figures = LaneFigures()
        self.files = self._keeper(_FILES, frozenset())
        self.groups = {
            name: Group(self._keeper(f"models-{name}" if name else "models", positions), positions)
            for name, positions in _grouped(self._devices).items()
        }

    @property
    def pids(self) -> Mapping[str, int]:
        """Numbers of the processes there are, by what they are called."""
        pids = {
            keeper.name: keeper.worker.pid
            for keeper in self._keepers()
            if keeper.worker is not None
        }
        if self._zygote is not None and self._zygote.is_alive:
            pids["zygote"] = self._zygote.pid
        return pids

    @property
    def figures(self) -> LaneFigures:
        """What the lanes of all workers have run, those included that have gone."""
        self._count_gone()
        sums = LaneFigures()
        sums.add(self._gone_figures)
        for worker in self._workers:
            sums.add(worker.figures)
        return sums

    def _count_gone(self) -> None:
        for worker in [worker for worker in self._workers if worker.exited.done()]:
            self._gone_figures.add(worker.figures)
            self._workers.remove(worker)

    async def start(self, runtimes: Iterable[str]) -> None:
        """Starts all of them.

        Args:
            runtimes: to be warmed up.

        Raises:
            NoWorker: one does not start. Nothing is left then.
        """
        self._warm = set(runtimes)
        for keeper in self._keepers():
            keeper.begin()
        self._watching = asyncio.get_running_loop().create_task(self._watch(), name="watch workers")
        try:
            for keeper in self._keepers():
                await keeper.ready()
        except BaseException:
            await self.stop(0)
            raise

    async def stop(self, timeout_s: float) -> bool:
        """Stops all of them; none is left afterwards.

        Returns:
            False if one had to be killed.
        """
        ended = await asyncio.gather(*(keeper.stop(timeout_s) for keeper in self._keepers()))
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        zygote, self._zygote = self._zygote, None
        for left in self._retired:
            await left.stop(0)
        self._retired.clear()
        if zygote is not None:
            ended.append(await zygote.stop(max(timeout_s, 1.0)))
        return all(ended)

    def warm_up(self, runtime: str) -> None:
        """Has the workers to come begin with a runtime warm that is used after all."""
        if runtime not in self._warm:
            self._warm.add(runtime)
            if self._zygote is not None:
                self._zygote.warm_up([runtime])

    def set_budget(self, device: int, budget_bytes: int) -> None:
        """Lets the worker of a device have as much memory as its budget now says."""
        if self._budgets is None:
            return
        self._budgets[device] = budget_bytes
        for group in self.groups.values():
            if device in group.devices and (worker := group.keeper.worker) is not None:
                self._limit_memory(worker, group.devices)

    def set_copies_budget(self, budget_bytes: int) -> None:
        """Lets each worker of models have as much memory as all copies together may hold."""
        self._copies_budget = budget_bytes
        for group in self.groups.values():
            if (worker := group.keeper.worker) is not None:
                self._limit_memory(worker, group.devices)

    def _limit_memory(self, worker: WorkerProcess, devices: Collection[int]) -> None:
        if self._budgets is not None:
            # A disk's budget counts as well: what of it is used is mapped. And any one worker may
            # have all of the copies; the one for files has neither models nor copies.
            budgets = sum(self._budgets[device] for device in devices)
            copies = self._copies_budget if devices else 0
            worker.limit_memory(budgets + copies + self._settings.headroom_bytes)

    def _keepers(self) -> list[Keeper]:
        return [self.files, *(group.keeper for group in self.groups.values())]

    def _keeper(self, name: str, positions: frozenset[int]) -> Keeper:
        start = partial(self._start_worker, name, positions)
        return Keeper(name=name, start=start, settings=self._settings)

    async def _start_worker(
        self, name: str, positions: frozenset[int], zygote_fails: bool
    ) -> WorkerProcess:
        zygote = await self._living_zygote(replace=zygote_fails)
        order = {
            "name": name,
            "runtimes": sorted(self._warm),
            "batches": [self._settings.batches.most_rows, self._settings.batches.most_bytes],
            "devices": [
                encode_device(device) if position in positions else None
                for position, device in enumerate(self._devices)
            ],
        }
        try:
            board = Board()
            here, there = socket.socketpair()
        except OSError as error:
            raise ZygoteLost(f"no files for a worker: {error.strerror}") from None
        try:
            with there:
                forked = await zygote.fork(order, there.fileno(), board.file.fileno())
        except BaseException:
            here.close()
            board.close()
            raise
        worker = WorkerProcess(
            name=name,
            forked=forked,
            end=here,
            board=board,
            devices=len(self._devices),
            settings=self._settings,
            on_end=self._ended,
        )

        def on_ready(ready: asyncio.Future[None]) -> None:
            if ready.exception() is None:
                self._on_ready(worker, positions)

        worker.ready.add_done_callback(on_ready)
        return worker

    async def _living_zygote(self, *, replace: bool) -> ZygoteClient:
        async with self._zygote_lock:
            zygote = self._zygote
            if zygote is not None and (replace or not zygote.is_alive):
                # It takes the workers that it has forked along, so it stays as long as they do.
                self._zygote = None
                self._retired.append(zygote)
            for retired in [old for old in self._retired if not old.children]:
                self._retired.remove(retired)
                await retired.stop(0)
            if self._zygote is None:
                limit_s = self._settings.start_limit_s
                started = await ZygoteClient.start(self._source, self._warm, limit_s=limit_s)
                self._zygote = started
            return self._zygote

    def _on_ready(self, worker: WorkerProcess, positions: frozenset[int]) -> None:
        self._limit_memory(worker, positions)
        self.memory.add(worker)
        self._count_gone()
        self._workers.append(worker)
        logger.debug("worker %s is there: process %d", worker.name, worker.pid)

    def _ended(self, worker: WorkerProcess, end: WorkerEnd) -> None:
        logger.error("worker %s (process %d) has ended: %s", worker.name, worker.pid, end.cause)
        if worker.name != _FILES and worker.was_ready:
            self._on_end(worker, end)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        tick_s = self._settings.tick_s
        before = loop.time()
        while True:
            await asyncio.sleep(tick_s)
            now = loop.time()
            # What is more than that is this process's own standstill, or the machine's.
            elapsed_s = min(now - before, 2 * tick_s)
            before = now
            for keeper in self._keepers():
                if (worker := keeper.worker) is not None:
                    worker.watch(elapsed_s)


def _grouped(devices: Sequence[EngineDevice]) -> dict[str, frozenset[int]]:
    """Positions of the devices of each group."""
    disks = {position for position, device in enumerate(devices) if device.torch_device == DISK}
    groups: dict[str, set[int]] = {}
    for position, device in enumerate(devices):
        if position not in disks:
            groups.setdefault(device.group, set(disks)).add(position)
    return {name: frozenset(positions) for name, positions in groups.items()}
