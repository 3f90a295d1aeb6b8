"""Engines whose models are those of worker_models, and what to do with them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelyard_server.execution.engine import Engine, EngineDevice, RunOutcome, Work, WorkerDeath
from modelyard_server.execution.thread_engine import ThreadEngine
from modelyard_server.execution.workers.process_engine import ProcessEngine
from modelyard_server.execution.workers.settings import RuntimeSource, WorkerSettings
from modelyard_server.runtimes.api import ModelSpec
from modelyard_server.runtimes.targets import DISK
from modelyard_server.runtimes.tensors import DType, TensorValue
from tests.support.worker_models import MAKER

__all__ = [
    "INPUT",
    "PATIENCE_S",
    "SOURCE",
    "Deaths",
    "Outcome",
    "files_open",
    "is_running",
    "maps_of_segments",
    "odd",
    "odd_devices",
    "running_processes",
    "running_threads",
    "until",
]

PATIENCE_S = 60
INPUT = TensorValue(name="x", dtype=DType.UINT8, shape=(3,), data=b"abc")
SOURCE = RuntimeSource(maker=MAKER)


def odd(name: str = "m", **options: Any) -> ModelSpec:
    """A model of runtime "odd"."""
    return ModelSpec(name=name, runtime="odd", options=options)


def odd_devices(*groups: str, disk: bool = False) -> list[EngineDevice]:
    """Host devices of these groups, and a disk."""
    devices = [
        EngineDevice(name=f"odd{i}", torch_device="cpu", threads=1, group=group)
        for i, group in enumerate(groups)
    ]
    if disk:
        devices.append(EngineDevice(name="disk", torch_device=DISK, threads=1))
    return devices


async def until(condition: Callable[[], bool]) -> None:
    """Waits until something is true."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - processes set no events
            await asyncio.sleep(0.002)


def files_open() -> dict[str, str]:
    """What this process has open, by descriptor."""
    files = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            files[link.name] = str(link.readlink())
        except FileNotFoundError:  # The directory itself.
            continue
    return files


def maps_of_segments() -> int:
    """How many pieces of memory this process has mapped for its workers."""
    return Path("/proc/self/maps").read_text(encoding="utf-8").count("memfd:modelyard")


def is_running(pid: int) -> bool:
    """True if a process runs. Orphans that are dead may wait a while for whoever buries them."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


@dataclass
class Deaths:
    """What an engine has told of its workers' ends."""

    told: list[WorkerDeath] = field(default_factory=list)

    def __call__(self, death: WorkerDeath) -> None:
        self.told.append(death)

    async def one(self) -> WorkerDeath:
        """The only one, once it is there."""
        await until(lambda: bool(self.told))
        (death,) = self.told
        self.told.clear()
        return death


@asynccontextmanager
async def running_processes(
    devices: Sequence[EngineDevice],
    *,
    settings: WorkerSettings | None = None,
    source: RuntimeSource = SOURCE,
    budgets: Sequence[int] | None = None,
    deaths: Deaths | None = None,
    runtimes: Sequence[str] = ("odd",),
) -> AsyncIterator[ProcessEngine]:
    """An engine of processes; afterwards nothing of it is left."""
    unexpected: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: unexpected.append(context))
    files, maps = files_open(), maps_of_segments()
    engine = ProcessEngine(devices=devices, source=source, settings=settings, budgets=budgets)
    engine.on_lost = deaths
    await engine.start(runtimes)
    pids = set(engine.pids.values())
    try:
        yield engine
    finally:
        pids |= set(engine.pids.values())
        async with asyncio.timeout(PATIENCE_S):
            await engine.stop(PATIENCE_S / 3)
    assert not engine.pids
    assert not [pid for pid in pids if is_running(pid)]
    left = {name: file for name, file in files_open().items() if name not in files}
    assert not left
    assert maps_of_segments() == maps
    assert not unexpected


@asynccontextmanager
async def running_threads(devices: Sequence[EngineDevice]) -> AsyncIterator[ThreadEngine]:
    """An engine of threads with the same models."""
    before = set(threading.enumerate())
    engine = ThreadEngine(devices=devices, runtimes=SOURCE.make())
    await engine.start(["odd"])
    try:
        yield engine
    finally:
        async with asyncio.timeout(PATIENCE_S):
            await engine.stop(PATIENCE_S / 3)
    assert not [thread for thread in set(threading.enumerate()) - before if "odd" in thread.name]


class Outcome:
    """What becomes of a run."""

    def __init__(self, engine: Engine, model: int, *inputs: TensorValue, client: str = "") -> None:
        self.outcomes: list[RunOutcome | None] = []
        self._done = asyncio.Event()
        self.work: Work = engine.run(model, inputs or (INPUT,), {}, self._on_done, lambda: client)

    def _on_done(self, outcome: RunOutcome | None) -> None:
        self.outcomes.append(outcome)
        self._done.set()

    async def get(self) -> RunOutcome | None:
        """It, once it is there."""
        async with asyncio.timeout(PATIENCE_S):
            await self._done.wait()
        (outcome,) = self.outcomes
        return outcome
