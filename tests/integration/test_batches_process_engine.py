"""Requests share runs in worker processes, as they do in threads, and so does the blame."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from tests.support.faulty_models import Gate, closed_gate
from tests.support.worker_engine import (
    INPUT,
    PATIENCE_S,
    Deaths,
    Outcome,
    odd,
    odd_devices,
    running_processes,
    running_threads,
    until,
)

from modelyard_server.execution.batcher import BatchLimits
from modelyard_server.execution.engine import Engine, ModelFailed, RunOutcome, WorkerLost
from modelyard_server.execution.figures import LaneFigures
from modelyard_server.execution.workers.settings import WorkerSettings
from modelyard_server.runtimes.targets import Target

HOME = Target.whole(0)


@pytest.fixture(params=["threads", "processes"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    running: Callable[[Any], AbstractAsyncContextManager[Engine]] = (
        running_threads if request.param == "threads" else running_processes
    )
    async with running(odd_devices("")) as made:
        yield made


async def company_of(outcome: Outcome) -> int:
    """How many shared its run."""
    outputs = await outcome.get()
    assert isinstance(outputs, tuple)
    answer, count = outputs
    assert answer == INPUT
    assert isinstance(count.data, bytes)
    return count.data[0]


class HeldUp:
    """A lane that a run of model 9 keeps busy: what is asked meanwhile gathers."""

    def __init__(self, engine: Engine, gate: Gate) -> None:
        self._engine = engine
        self._gate = gate

    async def let_go(self) -> None:
        """Once everything that was asked has arrived."""
        # What is said to a worker is heard in order, and loads have another thread.
        await self._engine.load(8, odd(), HOME)
        await self._engine.unload(8)
        self._gate.open()


async def held_up(engine: Engine, gate: Gate, path: Path) -> HeldUp:
    await engine.load(9, odd(gate=str(path), gate_at="run"), HOME)
    Outcome(engine, 9)
    await until(gate.is_waited_at)
    return HeldUp(engine, gate)


async def test_requests_that_wait_share_a_run(engine: Engine, tmp_path: Path) -> None:
    await engine.load(1, odd(batch=True), HOME)
    await engine.load(2, odd(batch=True), HOME)
    assert await company_of(Outcome(engine, 1)) == 1
    with closed_gate(tmp_path / "gate") as gate:
        lane = await held_up(engine, gate, tmp_path / "gate")
        first = [Outcome(engine, 1) for _ in range(5)]
        second = [Outcome(engine, 2) for _ in range(2)]
        await lane.let_go()
        assert [await company_of(outcome) for outcome in first] == [5] * 5
        assert [await company_of(outcome) for outcome in second] == [2] * 2


async def test_requests_that_are_abandoned_while_they_wait_are_left_out(
    engine: Engine, tmp_path: Path
) -> None:
    await engine.load(1, odd(batch=True), HOME)
    with closed_gate(tmp_path / "gate") as gate:
        lane = await held_up(engine, gate, tmp_path / "gate")
        asked = [Outcome(engine, 1) for _ in range(4)]
        asked[0].work.abandon()
        asked[2].work.abandon()
        await lane.let_go()
        assert [await asked[i].get() for i in (0, 2)] == [None, None]
        assert [await company_of(asked[i]) for i in (1, 3)] == [2, 2]


async def test_clients_take_turns_where_not_all_fit(engine: Engine, tmp_path: Path) -> None:
    await engine.load(1, odd(batch=True), HOME)
    ended: list[str] = []
    over = asyncio.Event()

    def ask(client: str) -> None:
        def on_done(outcome: RunOutcome | None) -> None:
            ended.append(client)
            if len(ended) == 31:
                over.set()

        engine.run(1, (INPUT,), {}, on_done, lambda: client)

    with closed_gate(tmp_path / "gate") as gate:
        lane = await held_up(engine, gate, tmp_path / "gate")
        for _ in range(30):
            ask("many")
        ask("one")
        await lane.let_go()
        await asyncio.wait_for(over.wait(), PATIENCE_S)
    # It came last, and was in the first batch of 16.
    assert ended.index("one") < 16


async def test_who_has_waited_for_his_model_does_not_stand_in_line_again(
    engine: Engine, tmp_path: Path
) -> None:
    await engine.load(1, odd(batch=True), HOME)
    await engine.load(2, odd(batch=True), HOME)
    ended: list[int] = []
    over = asyncio.Event()

    def ask(model: int, waited_s: float) -> None:
        def on_done(outcome: RunOutcome | None) -> None:
            ended.append(model)
            if len(ended) == 6:
                over.set()

        engine.run(model, (INPUT,), {}, on_done, waited_s=waited_s)

    with closed_gate(tmp_path / "gate") as gate:
        lane = await held_up(engine, gate, tmp_path / "gate")
        for _ in range(3):
            ask(1, 0.0)
        for _ in range(3):
            ask(2, 3600.0)
        await lane.let_go()
        await asyncio.wait_for(over.wait(), PATIENCE_S)
    assert ended == [2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("stage", ["prepare", "run"])
@pytest.mark.parametrize(("raised", "told"), [("tensor", "TensorError"), ("value", "ModelFailed")])
async def test_an_error_is_told_to_each_by_itself(
    engine: Engine, tmp_path: Path, stage: str, raised: str, told: str
) -> None:
    await engine.load(1, odd(batch=True, at={stage: f"raise {raised}"}), HOME)
    with closed_gate(tmp_path / "gate") as gate:
        lane = await held_up(engine, gate, tmp_path / "gate")
        asked = [Outcome(engine, 1) for _ in range(3)]
        await lane.let_go()
        outcomes = [await outcome.get() for outcome in asked]
    assert [type(outcome).__name__ for outcome in outcomes] == [told] * 3
    assert len({id(outcome) for outcome in outcomes}) == 3


async def test_limit_one_turns_batching_off_in_workers(tmp_path: Path) -> None:
    settings = WorkerSettings(batches=BatchLimits(most_rows=1))
    async with running_processes(odd_devices(""), settings=settings) as engine:
        await engine.load(1, odd(batch=True), HOME)
        with closed_gate(tmp_path / "gate") as gate:
            lane = await held_up(engine, gate, tmp_path / "gate")
            asked = [Outcome(engine, 1) for _ in range(3)]
            await lane.let_go()
            assert [await company_of(outcome) for outcome in asked] == [1, 1, 1]


@pytest.mark.parametrize(
    ("fault", "cause"), [("kill", "killed by SIGKILL"), ("sleep", "ran for longer than 1 s")]
)
async def test_all_that_share_a_run_that_ends_its_worker_may_be_to_blame_and_nobody_else(
    tmp_path: Path, fault: str, cause: str
) -> None:
    deaths = Deaths()
    settings = WorkerSettings(run_limit_s=1.0, ping_limit_s=20)
    async with running_processes(odd_devices(""), settings=settings, deaths=deaths) as engine:
        await engine.load(1, odd(batch=True, at={"run": fault}), HOME)
        await engine.load(2, odd(batch=True), HOME)
        with closed_gate(tmp_path / "gate") as gate:
            lane = await held_up(engine, gate, tmp_path / "gate")
            asked = [Outcome(engine, 1) for _ in range(4)]
            behind = Outcome(engine, 2)
            await lane.let_go()
            outcomes = [await outcome.get() for outcome in asked]
            assert isinstance(await behind.get(), WorkerLost)
        death = await deaths.one()
        assert death.suspects == (1,)
        assert cause in death.cause
        for model in (1, 2, 9):
            await engine.unload(model)
    for outcome in outcomes:
        assert isinstance(outcome, ModelFailed)
        assert cause in outcome.log_text


async def test_what_a_worker_has_run_is_told_after_its_end() -> None:
    deaths = Deaths()
    async with running_processes(odd_devices(""), deaths=deaths) as engine:
        await engine.load(1, odd(batch=True), HOME)
        for _ in range(2):
            assert await company_of(Outcome(engine, 1)) == 1
        ran = LaneFigures(
            batch_count=2,
            request_count=2,
            row_count=2,
            largest_request_count=1,
            largest_row_count=1,
            alone_count=2,
            cell_count=2,
        )
        assert engine.figures == ran
        os.kill(engine.pids["models"], signal.SIGKILL)
        await deaths.one()
        assert engine.figures == ran
        await engine.unload(1)
        await engine.load(1, odd(batch=True), HOME)
        assert await company_of(Outcome(engine, 1)) == 1
        assert (engine.figures.batch_count, engine.figures.largest_row_count) == (3, 1)
