"""A real server with worker processes and a store that is attacked, and neighbours that watch.

attacked        the server: two logical devices, a neighbour on each, all in worker processes
Neighbours      clients of them, whose every answer is compared while something happens
Ledger          what the devices hold, to be compared afterwards
stopped_after   holds a process up once it has read so many bytes
slow_file       weights that take a while to be read
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modelyard import (
    Admin,
    AsyncClient,
    LoadFailed,
    ModelFailed,
    ModelyardError,
    Residency,
    ResidencyState,
    WorkerLost,
)
from modelyard_server.execution.workers.process_engine import ProcessEngine
from tests.support import deadly_models, faulty_models, odd_modules
from tests.support.config_text import ROOTS, device_table, model_table, toml
from tests.support.server import RunningApp, eventually, running_app

__all__ = [
    "BUDGET",
    "FAR",
    "MODELS",
    "NEAR",
    "PATIENCE_S",
    "Attacked",
    "Ledger",
    "Neighbours",
    "X",
    "attacked",
    "check_text",
    "engine_table",
    "is_stopped",
    "neighbours",
    "peak_growth",
    "slow_file",
    "stopped_after",
    "torch_options",
]

X = np.ones(3, np.float32)
BUDGET = 300_000_000
"""Of each of the two devices."""
NEAR, FAR = "near", "far"
"""Neighbours of whatever is attacked: on its device cuda:0, and on another."""
PATIENCE_S = 60
MODELS = "models-near"
"""The worker of what is attacked and of NEAR; FAR is in another."""
_VALUES = {NEAR: 2.0, FAR: 3.0}

ALLOWED = (*faulty_models.FACTORIES, *deadly_models.FACTORIES, *odd_modules.FACTORIES)


def engine_table(**settings: object) -> str:
    """Models run in worker processes."""
    lines = [f"{key} = {toml(value)}" for key, value in ({"kind": "process"} | settings).items()]
    return "\n".join(["", "[engine]", *lines, ""])


def torch_options(factory: str, **factory_options: object) -> dict[str, object]:
    """Options of a model of runtime "torch"; a factory of faulty_models unless it says where."""
    name = factory if ":" in factory else faulty_models.factory(factory)
    return {"factory": name} | ({"factory_options": factory_options} if factory_options else {})


def check_text(text: str, base: Path) -> None:
    """What a client is told is short and says nothing of the inside."""
    assert len(text.encode()) <= 512, text
    for inside in (str(base), "/tmp", "/work", "Traceback", ".py", "site-packages", "0x"):
        assert inside not in text, text


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What each device holds."""

    held: tuple[tuple[int, int, int, int], ...]
    """Of each: reserved, resident, draining, quarantined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attacked:
    """A server under attack.

    Attributes:
        yard: it.
        base: its folder; models are below its "store", which is a root, not the store of weights.
    """

    yard: RunningApp
    base: Path

    @property
    def client(self) -> AsyncClient:
        """A client."""
        return self.yard.client

    @property
    def engine(self) -> ProcessEngine:
        """Its engine."""
        engine = self.yard.app.engine
        assert isinstance(engine, ProcessEngine)
        return engine

    @property
    def packs(self) -> list[Path]:
        """The packs in its store."""
        return sorted((self.base / "weights" / "packs").glob("*.safetensors"))

    def pid(self, worker: str) -> int:
        """Number of a worker that is there."""
        return self.engine.pids[worker]

    def folder(self, name: str) -> Path:
        """The folder of a model."""
        return self.base / "store" / name

    async def create(self, name: str, factory: str = "Adding", **factory_options: object) -> None:
        """Registers a model of runtime "torch" on the device of NEAR."""
        await self.yard.admin(
            Admin.create_model,
            name,
            runtime="torch",
            root="store",
            folder=name,
            options=torch_options(factory, **factory_options),
            placement="cuda:0",
        )

    async def create_text(self, name: str, task: str = "text-classification") -> None:
        """Registers a model of runtime "transformers" on the device of NEAR."""
        await self.yard.admin(
            Admin.create_model,
            name,
            runtime="transformers",
            root="store",
            folder=name,
            task=task,
            placement="cuda:0",
        )

    async def delete(self, name: str) -> None:
        """Removes a model."""
        await self.yard.admin(Admin.delete_model, name)

    async def load(self, name: str) -> Residency:
        """Asks for a model by hand."""
        return await self.yard.admin(Admin.load, name)

    async def unload(self, name: str) -> Residency:
        """Takes a model out of memory."""
        return await self.yard.admin(Admin.unload, name)

    async def resident(self, *names: str) -> None:
        """Waits until models are in memory."""
        for name in names:
            await self.yard.becomes(name, ResidencyState.RESIDENT, PATIENCE_S)

    async def value(self, name: str) -> float:
        """What a model adds."""
        answer = np.asarray((await self.client.predict(name, X, timeout_s=PATIENCE_S)).only)
        assert np.all(answer == answer[0])
        return float(answer[0] - X[0])

    async def has_another(self, worker: str, than: int) -> int:
        """Waits for a worker's successor."""

        def pid() -> int:
            now = self.engine.pids.get(worker, than)
            return 0 if now == than else now

        return int(await eventually(f"there is another worker {worker}", pid, PATIENCE_S))

    async def has_warm_zygote(self) -> None:
        """Waits until the zygote has imported what was asked of it.

        It forks nobody before: so there is another worker of files once it has.
        """
        old = self.pid("files")
        os.kill(old, signal.SIGKILL)
        await self.has_another("files", old)

    async def recovers(self, name: str, value: float) -> None:
        """Waits until a model answers, and right."""

        async def does() -> bool:
            try:
                return await self.value(name) == value
            except (LoadFailed, WorkerLost):
                return False

        await eventually(f"{name} answers with {value}", does, PATIENCE_S)

    async def ledger(self) -> Ledger:
        """What the devices hold once it is quiet, after an audit."""
        await self.yard.at_rest()
        residency = self.yard.app.residency
        residency.audit()
        uses = [residency.device_use(i) for i in range(len(self.yard.app.devices))]
        return Ledger(held=tuple((u.reserved, u.resident, u.draining, u.quarantined) for u in uses))

    async def returns_to(self, ledger: Ledger) -> None:
        """Waits until the devices hold what they held, and nothing else."""

        async def does() -> bool:
            return await self.ledger() == ledger

        await eventually(f"the ledger is {ledger}", does, PATIENCE_S)


@dataclass(slots=True)
class Neighbours:
    """What the clients of the neighbours saw.

    Attributes:
        counts: answers of each.
        errors: what was refused, of each.
    """

    counts: dict[str, int] = field(default_factory=lambda: {NEAR: 0, FAR: 0})
    errors: dict[str, list[str]] = field(default_factory=lambda: {NEAR: [], FAR: []})

    def check(self, deaths: int = 0) -> None:
        """Nobody was refused, or was wrongly answered.

        Args:
            deaths: how often the worker of NEAR has died. Once a death NEAR may be told that it was
                running in that very moment; whatever waited is answered.
        """
        assert self.errors[FAR] == []
        assert len(self.errors[NEAR]) <= deaths
        assert set(self.errors[NEAR]) <= {"MODEL_FAILED WorkerDied"}

    async def ask(self, client: AsyncClient, name: str, is_over: Callable[[], bool]) -> None:
        """Asks until it is over."""
        while not is_over():
            try:
                answer = np.asarray((await client.predict(name, X, timeout_s=PATIENCE_S)).only)
            except ModelFailed as error:
                self.errors[name].append(f"{error.reason} {error.exception_type}")
            except ModelyardError as error:
                self.errors[name].append(f"{error.reason} {error}")
            else:
                if not np.array_equal(answer, X + _VALUES[name]):
                    self.errors[name].append(f"wrong: {answer}")
                self.counts[name] += 1
            # Requests that never pause would leave nothing of two processors to what is tested.
            await asyncio.sleep(0.002)


@asynccontextmanager
async def neighbours(under: Attacked) -> AsyncIterator[Neighbours]:
    """Asks both neighbours all the time, and checks that they go on answering to the end."""
    seen, over = Neighbours(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for name in (NEAR, FAR):
            group.create_task(seen.ask(under.client, name, over.is_set))
        try:
            yield seen
            before = dict(seen.counts)
            await eventually(
                "both neighbours go on",
                lambda: all(seen.counts[name] > before[name] + 2 for name in before),
                PATIENCE_S,
            )
        finally:
            over.set()


@asynccontextmanager
async def attacked(
    base: Path,
    *,
    engine: str = "",
    budget: int = BUDGET,
    store: Path | None = None,
    backoff_s: tuple[float, float] = (0.05, 0.2),
) -> AsyncIterator[Attacked]:
    """Runs a server whose neighbours are resident, and checks that they are at the end.

    Args:
        base: its folder.
        engine: table of the engine; default: see engine_table.
        budget: of the device that is attacked.
        store: folder of its weights, default "weights" below base.
        backoff_s: how long a model rests after its first failed load, and at most.
    """
    for name, value in _VALUES.items():
        faulty_models.make_weights(base / "store" / name, value=value)
    config = "[yard]\nbackoff_initial_s = {}\nbackoff_max_s = {}\n".format(*backoff_s) + ROOTS
    config += f"\n[runtimes.torch]\nallowed_factories = {toml(ALLOWED)}\n"
    config += f"\n[weights]\nstore = {toml(store or base / 'weights')}\n"
    config += engine or engine_table()
    config += device_table("cuda:0", budget, logical=True, worker=NEAR)
    config += device_table("cuda:1", BUDGET, logical=True, worker=FAR)
    for name, device in ((NEAR, "cuda:0"), (FAR, "cuda:1")):
        config += model_table(name, "torch", options=torch_options("Adding"), device=device)
    async with running_app(config, base) as running:
        under = Attacked(yard=running, base=base)
        for name, value in _VALUES.items():
            assert await under.value(name) == value
        yield under
        for name, value in _VALUES.items():
            assert await under.value(name) == value
        await under.ledger()


@asynccontextmanager
async def stopped_after(pid: int, size_bytes: int) -> AsyncIterator[Callable[[], int]]:
    """Holds a process up once it has read more than so many bytes, until the body is left.

    Gives a function that says how many bytes it has read since then was begun.
    """
    before = _read_bytes(pid)
    stopping = asyncio.create_task(_stop_after(pid, before + size_bytes))
    try:
        yield lambda: _read_bytes(pid) - before
    finally:
        stopping.cancel()
        await asyncio.wait({stopping})
        if not stopping.cancelled():
            stopping.exception()  # It may have gone before it had read that much.
        with contextlib.suppress(ProcessLookupError):  # Somebody may have killed it.
            os.kill(pid, signal.SIGCONT)


async def _stop_after(pid: int, size_bytes: int) -> None:
    while _read_bytes(pid) < size_bytes:  # noqa: ASYNC110 - processes set no events
        await asyncio.sleep(0.0005)
    os.kill(pid, signal.SIGSTOP)


def is_stopped(pid: int) -> bool:
    """True if a process stands still."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    return stat.rpartition(")")[2].split()[0] == "T"


def _read_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError("the system does not count what is read")


def _memory_of(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"the system does not say {name}")


def _forget_peak(pid: int) -> int:
    """Has the system measure the peak anew; what is resident now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
    return _memory_of(pid, "VmRSS")


def _library_pages(pid: int) -> int:
    """Bytes of shared libraries that are resident in a process."""
    total, is_library = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):  # The head of a mapping: addresses, rights, and the file's path.
            is_library = ".so" in Path(rest.rpartition(" ")[2]).name
        elif is_library and name == "Rss:":
            total += int(rest.split()[0]) * 1024
    return total


async def peak_growth(pids: list[int], doing: Callable[[], Awaitable[Any]]) -> int:
    """By how many bytes at most the resident memory of any of these processes rose meanwhile.

    Pages of libraries do not count: a machine that had taken them away gives them back whenever
    they are used, and that is nobody's growth. Those of any other file do. They are looked at again
    and again, since the machine may take them away once more before the end.
    """
    before = [(_forget_peak(pid), _library_pages(pid)) for pid in pids]
    most = [pages for _, pages in before]

    def look() -> None:
        most[:] = [max(_library_pages(pid), seen) for pid, seen in zip(pids, most, strict=True)]

    async def watch() -> None:
        while True:
            await asyncio.sleep(0.1)
            await asyncio.to_thread(look)

    watching = asyncio.create_task(watch())
    try:
        await doing()
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    look()
    return max(
        _memory_of(pid, "VmHWM") - held - (seen - pages)
        for pid, (held, pages), seen in zip(pids, before, most, strict=True)
    )


def slow_file(folder: Path, rows: int = 2**25) -> Path:
    """Writes weights that take a while to be read, 128 MiB unless told otherwise.

    None of them are on the disk: they are zeros, `weight` FLOAT32 [rows].
    """
    folder.mkdir(parents=True)
    size = 4 * rows
    entry = {"dtype": "F32", "shape": [rows], "data_offsets": [0, size]}
    header = json.dumps({"weight": entry}).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(file, 8 + len(header) + size)
    return file
