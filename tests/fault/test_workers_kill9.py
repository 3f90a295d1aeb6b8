"""A real server with worker processes is killed: none of them stays, and the store is whole."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.support import faulty_models
from tests.support.attacked_yard import (
    NEAR,
    PATIENCE_S,
    X,
    is_stopped,
    slow_file,
    stopped_after,
    torch_options,
)
from tests.support.config_text import ROOTS, device_table, model_table, toml
from tests.support.faulty_models import closed_gate
from tests.support.server import eventually, server_process
from tests.support.weight_folders import damage_of
from tests.support.worker_engine import is_running

from modelyard import Admin, AsyncClient, ModelyardError


def children_of(pid: int) -> list[int]:
    """All processes below one."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(encoding="utf-8")
            except (FileNotFoundError, ProcessLookupError):
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(entry.name))
    found, left = [], [pid]
    while left:
        below = parents.get(left.pop(), [])
        found += below
        left += below
    return found


async def outcome(call: Awaitable[object]) -> ModelyardError | None:
    """What a call was refused for, if it was."""
    try:
        await call
    except ModelyardError as error:
        return error
    return None


def create(admin: Admin, rows: int) -> None:
    """Registers the model in folder "slow"."""
    options = torch_options("Adding", rows=rows)
    admin.create_model("slow", runtime="torch", root="store", folder="slow", options=options)


@pytest.mark.parametrize("stage", ["run", "load", "import"])
async def test_a_server_that_is_killed_leaves_no_process_and_a_store_that_works(
    tmp_path: Path, stage: str
) -> None:
    gate_path = tmp_path / "gate"
    stuck = "StuckInLoad" if stage == "load" else "StuckInRun"
    store = tmp_path / "weights"
    config = ROOTS + device_table("cuda:0", "1GB", logical=True)
    config += f"\n[weights]\nstore = {toml(store)}\n"
    config += f"\n[runtimes.torch]\nallowed_factories = {toml(faulty_models.FACTORIES)}\n"
    config += model_table(NEAR, "torch", options=torch_options("Adding"))
    options = torch_options(stuck, gate=str(gate_path))
    config += model_table("m", "torch", options=options)
    for name in (NEAR, "m"):
        faulty_models.make_weights(tmp_path / "store" / name, value=5.0)
    size = slow_file(tmp_path / "store" / "slow").stat().st_size
    rows = size // 4
    pids: list[int] = []
    async with server_process(config, tmp_path) as server, AsyncClient(server.target) as client:
        await client.predict(NEAR, X)
        pids = children_of(server.pid)
        assert len(pids) == 3
        with closed_gate(gate_path) as gate:
            call: asyncio.Task[object] | None = None
            if stage in ("run", "load"):
                call = asyncio.create_task(outcome(client.predict("m", X, timeout_s=PATIENCE_S)))
                await eventually("it is there", gate.is_waited_at, PATIENCE_S)
            elif stage == "import":
                async with AsyncExitStack() as held:
                    for pid in pids:  # Whichever of them it is that reads.
                        await held.enter_async_context(stopped_after(pid, size // 4))
                    with Admin(server.target) as admin:
                        call = asyncio.create_task(outcome(asyncio.to_thread(create, admin, rows)))
                        await eventually(
                            "it is held up", lambda: any(map(is_stopped, pids)), PATIENCE_S
                        )
                        server.send(signal.SIGKILL)
                        await call
            server.send(signal.SIGKILL)
            assert await server.exit_code() == -signal.SIGKILL
            await eventually(
                "no process is left", lambda: not [p for p in pids if is_running(p)], PATIENCE_S
            )
            if call is not None:
                await call
    assert damage_of(store) == []
    async with server_process(config, tmp_path) as server, AsyncClient(server.target) as client:
        for name in (NEAR, "m"):
            answer: Any = (await client.predict(name, X, timeout_s=PATIENCE_S)).only
            assert list(answer) == [6.0] * 3
        assert list((store / "packs").iterdir())
