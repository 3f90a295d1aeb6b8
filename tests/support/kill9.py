"""A real server that is killed with SIGKILL again and again while two operators write to it.

One operator registers, changes and removes models; the other applies device plans and changes a
budget. Each has one call under way at most, so a kill leaves one question open for each: whether
its last call was done. What the server has after its next start must be all that it acknowledged,
with or without that one call. Then the call is sent again with its request id, and must be answered
whether or not it was done already.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import sqlite3
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL
from typing import Any, Final

import grpc
import grpc.aio

from modelyard.v1 import device_service_pb2_grpc, model_service_pb2_grpc
from tests.support.kill9_operators import (
    ModelOperator,
    Operator,
    PlanOperator,
    Stubs,
    config_text,
)
from tests.support.server import ServerProcess

__all__ = ["Kill9Report", "kill_again_and_again"]

_SHARE_AT_START: Final = 0.1
"""Of kills that come while the server starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill9Report:
    """What came of it.

    Attributes:
        kills: servers that were killed.
        acknowledged: changes that servers had answered for.
        plans: how many of them were device plans.
        in_flight_kept: calls that a kill interrupted and that were done all the same.
        lost: what was acknowledged and is not there, one text each.
        half_applied: changes that are there in part.
        damaged: what `PRAGMA integrity_check` found in the catalog's file.
        start_s: median time from a server's start to its first answer.
    """

    kills: int
    acknowledged: int
    plans: int
    in_flight_kept: int
    lost: tuple[str, ...]
    half_applied: tuple[str, ...]
    damaged: tuple[str, ...]
    start_s: float

    @property
    def problems(self) -> tuple[str, ...]:
        """All that must not be."""
        return self.lost + self.half_applied + self.damaged


async def kill_again_and_again(
    folder: Path,
    *,
    kills: int,
    seed: int,
    after_kill: Callable[[int, Path], None] = lambda kill, catalog: None,
) -> Kill9Report:
    """Starts a server, checks it, writes to it and kills it, and so on; checks the last one too.

    Ends at the first problem: whatever came later could be its consequence.

    Args:
        folder: where the configuration and the catalog are; exists, and is empty.
        kills: how often.
        seed: of what is written and when it is killed. The clock has a part in that as well.
        after_kill: told the number of each kill, from 0, and the catalog's file: for progress, and
            for tests that damage the file.

    Raises:
        AssertionError: a server died by itself, or refused what it must do.
    """
    yard = _Yard(folder, random.Random(seed))
    done = 0
    while done < kills and not yard.has_problems:
        await yard.live_and_die()
        after_kill(done, yard.catalog)
        done += 1
    if not yard.has_problems:
        await yard.live_and_end()
    return yard.report(done)


@dataclass(slots=True)
class _Yard:
    """The server's folder through all its lives."""

    folder: Path
    rng: random.Random
    models: ModelOperator = field(init=False)
    plans: PlanOperator = field(init=False)
    lost: list[str] = field(default_factory=list)
    half: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    starts_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.models = ModelOperator(random.Random(self.rng.random()))
        self.plans = PlanOperator(random.Random(self.rng.random()))
        self._config.write_text(config_text())

    @property
    def catalog(self) -> Path:
        return self.folder / "catalog.db"

    @property
    def _config(self) -> Path:
        return self.folder / "yard.toml"

    @property
    def has_problems(self) -> bool:
        return bool(self.lost or self.half or self.damaged)

    async def live_and_die(self) -> None:
        """One life, from the start to the kill."""
        server = ServerProcess(self._config)
        try:
            if self.rng.random() < _SHARE_AT_START:
                # The time of a kill is what is random here; nothing is waited for.
                await asyncio.sleep(self.rng.uniform(0.0, 1.0))
                await _kill(server)
            else:
                await self._serve(server, self._write_until_killed)
        finally:
            server.reap()
        self._check_file()

    async def live_and_end(self) -> None:
        """The last life: checked, and its open calls made again."""
        server = ServerProcess(self._config)
        try:
            await self._serve(server, self._write_once)
        finally:
            server.reap()
        self._check_file()

    def report(self, kills: int) -> Kill9Report:
        operators = (self.models, self.plans)
        return Kill9Report(
            kills=kills,
            acknowledged=sum(operator.acknowledged for operator in operators),
            plans=self.plans.plans,
            in_flight_kept=sum(operator.in_flight_kept for operator in operators),
            lost=tuple(self.lost),
            half_applied=tuple(self.half),
            damaged=tuple(self.damaged),
            start_s=statistics.median(self.starts_s),
        )

    async def _serve(
        self, server: ServerProcess, use: Callable[[ServerProcess, Stubs], Any]
    ) -> None:
        began = time.monotonic()
        await server.serves()
        # No retries: what a call ends with is what the server did.
        options = [("grpc.enable_retries", 0), ("grpc.enable_http_proxy", 0)]
        async with grpc.aio.insecure_channel(server.target, options=options) as channel:
            stubs = Stubs(
                models=model_service_pb2_grpc.ModelServiceStub(channel),
                devices=device_service_pb2_grpc.DeviceServiceStub(channel),
            )
            for operator in (self.models, self.plans):
                await operator.check(stubs, self.lost, self.half)
            self.starts_s.append(time.monotonic() - began)
            if self.has_problems:
                await _kill(server)
            else:
                await use(server, stubs)

    async def _write_until_killed(self, server: ServerProcess, stubs: Stubs) -> None:
        enough = sum(operator.acknowledged for operator in (self.models, self.plans))
        enough += self.rng.randrange(20)
        reached = asyncio.Event()
        killed = asyncio.Event()

        async def write(operator: Operator[Any]) -> None:
            while True:
                try:
                    await operator.write(stubs)
                except grpc.aio.AioRpcError as error:
                    broken = error.code() is grpc.StatusCode.UNAVAILABLE
                    text = f"{operator.name}: {error.code()}: {error.details()}"
                    assert killed.is_set() and broken, f"{text}\n{server.stderr[-2000:]}"
                    return
                if self.models.acknowledged + self.plans.acknowledged >= enough:
                    reached.set()

        async with asyncio.TaskGroup() as group:
            for operator in (self.models, self.plans):
                group.create_task(write(operator), name=f"write {operator.name}")
            await reached.wait()
            # Some way into whatever is done next: the time is what is random here.
            await asyncio.sleep(self.rng.uniform(0.0, 0.02))
            killed.set()
            await _kill(server)

    async def _write_once(self, server: ServerProcess, stubs: Stubs) -> None:
        for operator in (self.models, self.plans):
            await operator.write(stubs)
            await operator.check(stubs, self.lost, self.half)
        await _kill(server)

    def _check_file(self) -> None:
        """Looks into a copy: to open the file is to recover it, and that is the server's part."""
        if not self.catalog.exists():
            return  # Killed before it had made one.
        copy = self.folder / "copy"
        copy.mkdir(exist_ok=True)
        for old in copy.iterdir():
            old.unlink()
        for suffix in ("", "-wal"):
            source = self.catalog.with_name(self.catalog.name + suffix)
            if source.exists():
                shutil.copy(source, copy / source.name)
        if found := _damage(copy / self.catalog.name):
            self.damaged.append(found)


def _damage(path: Path) -> str:
    """What SQLite finds wrong with a file; empty if nothing."""
    try:
        with closing(sqlite3.connect(path)) as connection:
            (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
            if found == "ok" and connection.execute("PRAGMA foreign_key_check").fetchall():
                return "rows that belong to no model"
    except sqlite3.DatabaseError as error:
        return str(error)
    return "" if found == "ok" else str(found)


async def _kill(server: ServerProcess) -> None:
    server.send(SIGKILL)
    code = await server.exit_code()
    assert code == -SIGKILL, f"the server ended by itself, with {code}:\n{server.stderr[-4000:]}"
