"""Workers that die with copies of weights, and while copies are made and dropped."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from tests.support.faulty_models import closed_gate
from tests.support.worker_engine import (
    INPUT,
    Deaths,
    Outcome,
    odd,
    odd_devices,
    running_processes,
    until,
)

from modelyard_server.execution.engine import Unloaded
from modelyard_server.execution.workers.process_engine import ProcessEngine
from modelyard_server.execution.workers.settings import WorkerSettings
from modelyard_server.runtimes.api import LoadSource, ModelFilesError
from modelyard_server.runtimes.targets import Target

HOME, ELSEWHERE = Target.whole(0), Target.whole(1)
NOT_KEPT = Unloaded(freed={0: 100})
SHORT = WorkerSettings(load_limit_s=0.3, ping_interval_s=0.1, ping_limit_s=20)


def kill(engine: ProcessEngine, worker: str = "models") -> None:
    os.kill(engine.pids[worker], signal.SIGKILL)


async def keep(engine: ProcessEngine, model: int, target: Target = HOME) -> None:
    """Loads a model and unloads it so that its copy is there."""
    loaded = await engine.load(model, odd(f"m{model}", copy=30), target)
    assert loaded.source is LoadSource.STORAGE
    unloaded = await engine.unload(model, keep=True)
    assert (unloaded.freed, unloaded.kept_bytes) == ({target.home: 100}, 30)


def copies(engine: ProcessEngine) -> tuple[int, int]:
    return engine.copies.measured_bytes, engine.copies.peak_measured_bytes


async def test_a_workers_death_takes_its_copies_along_and_no_others() -> None:
    deaths = Deaths()
    async with running_processes(odd_devices("", "other"), deaths=deaths) as engine:
        for model in (1, 2, 3):
            await keep(engine, model)
        await keep(engine, 4, ELSEWHERE)
        await engine.load(5, odd(), HOME)
        assert await engine.drop_copy(3) is True
        assert copies(engine) == (90, 120)
        kill(engine)
        death = await deaths.one()
        assert (set(death.copies), set(death.models), death.suspects) == ({1, 2}, {5}, ())
        assert [await engine.drop_copy(model) for model in (1, 2, 3)] == [True] * 3
        assert copies(engine) == (30, 120)
        assert await engine.unload(5) == NOT_KEPT
        # The next worker begins without any, and can have the same ones.
        await keep(engine, 1)
        assert copies(engine) == (60, 120)
        kill(engine, "models-other")
        assert (await deaths.one()).copies == {4}
        assert copies(engine) == (30, 120)
        assert await engine.drop_copy(1) is True
        kill(engine)
        assert (await deaths.one()).copies == frozenset()


async def test_a_copy_whose_worker_has_just_been_killed_is_back_and_may_be_made_again() -> None:
    deaths = Deaths()
    async with running_processes(odd_devices("", ""), deaths=deaths) as engine:
        await keep(engine, 1)
        kill(engine)
        # Before anybody has told of the death, and after.
        assert await engine.drop_copy(1) is True
        assert copies(engine) == (0, 30)
        await deaths.one()
        assert await engine.drop_copy(1) is True
        # And without a drop in between.
        await keep(engine, 1)
        kill(engine)
        await until(lambda: "models" not in engine.pids)
        await keep(engine, 1)
        assert (await deaths.one()).copies == {1}
        assert copies(engine) == (30, 30)
        assert (await engine.load(1, odd("m1", copy=30), HOME)).source is LoadSource.COPY


async def test_a_worker_that_is_killed_while_it_keeps_gives_everything_back(
    tmp_path: Path,
) -> None:
    deaths = Deaths()
    async with running_processes(odd_devices(""), deaths=deaths) as engine:
        await keep(engine, 2)
        await engine.load(1, odd(copy=30, gate=str(tmp_path / "gate"), gate_at="keep"), HOME)
        with closed_gate(tmp_path / "gate") as gate:
            unload = asyncio.create_task(engine.unload(1, keep=True))
            await until(gate.is_waited_at)
            kill(engine)
            assert await unload == NOT_KEPT
        death = await deaths.one()
        assert (set(death.copies), set(death.models), death.suspects) == ({2}, set(), (1,))
        assert (engine.memory(0).measured_bytes, copies(engine)) == (0, (0, 30))
        assert await engine.drop_copy(1) is True
        await keep(engine, 1)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("exit", "exited with code 3"),
        ("segv", "killed by SIGSEGV"),
        ("scribble", "sent what cannot be understood (a frame does not begin like one)"),
        ("sleep", "ran for longer than 0.3 s"),
    ],
)
async def test_a_model_that_ends_its_worker_while_it_is_kept_is_to_blame(
    fault: str, cause: str
) -> None:
    deaths = Deaths()
    settings = SHORT if fault == "sleep" else WorkerSettings()
    async with running_processes(odd_devices("", ""), settings=settings, deaths=deaths) as engine:
        await engine.load(1, odd(copy=30, at={"keep": fault}), HOME)
        await engine.load(2, odd(), ELSEWHERE)
        assert await engine.unload(1, keep=True) == NOT_KEPT
        death = await deaths.one()
        assert (death.cause, death.suspects, set(death.models)) == (cause, (1,), {2})
        assert death.copies == frozenset()
        await engine.unload(2)
        await keep(engine, 1)


async def test_slow_keeping_behind_a_slow_load_is_not_to_blame_for_its_wait(tmp_path: Path) -> None:
    """What counts is how long it runs: the time in line is not its own."""
    async with running_processes(odd_devices("", ""), settings=SHORT) as engine:
        before = dict(engine.pids)
        await engine.load(1, odd(copy=30), HOME)
        spec = odd("slow", gate=str(tmp_path / "gate"), gate_at="close")
        await engine.load(2, spec, HOME)
        with closed_gate(tmp_path / "gate") as gate:
            slow = asyncio.create_task(engine.unload(2))
            await until(gate.is_waited_at)
            waiting = asyncio.create_task(engine.unload(1, keep=True))
            # As long as the watch needs to look at it often, on another device meanwhile.
            for model in range(10, 40):
                await engine.load(model, odd(), ELSEWHERE)
                await asyncio.sleep(0.02)
            assert not waiting.done()
        assert (await slow).freed == {0: 100}
        assert (await waiting).kept_bytes == 30
        assert engine.pids == before


async def test_a_worker_that_is_killed_while_it_drops_a_copy_has_dropped_it(
    tmp_path: Path,
) -> None:
    deaths = Deaths()
    spec = odd(copy=30, gate=str(tmp_path / "gate"), gate_at="drop")
    async with running_processes(odd_devices(""), deaths=deaths) as engine:
        await engine.load(1, spec, HOME)
        await engine.unload(1, keep=True)
        with closed_gate(tmp_path / "gate") as gate:
            drop = asyncio.create_task(engine.drop_copy(1))
            await until(gate.is_waited_at)
            assert copies(engine) == (30, 30)
            kill(engine)
            assert await drop is True
        assert (await deaths.one()).copies == {1}
        assert copies(engine) == (0, 30)
        await keep(engine, 1)


async def test_a_copy_that_somebody_still_read_from_goes_with_the_worker(tmp_path: Path) -> None:
    deaths = Deaths()
    in_use = tmp_path / "in use"
    in_use.touch()
    async with running_processes(odd_devices(""), deaths=deaths) as engine:
        await engine.load(1, odd(copy=30, in_use=str(in_use)), HOME)
        await engine.unload(1, keep=True)
        assert await engine.drop_copy(1) is False
        kill(engine)
        assert (await deaths.one()).copies == {1}
        assert await engine.drop_copy(1) is True
        assert copies(engine) == (0, 30)


async def test_a_worker_that_lies_about_a_copy_is_ended() -> None:
    deaths = Deaths()
    async with running_processes(odd_devices(""), deaths=deaths) as engine:
        await engine.load(1, odd(copy=-5), HOME)
        assert await engine.unload(1, keep=True) == NOT_KEPT
        assert "is no number of bytes" in (await deaths.one()).cause
        assert await engine.drop_copy(1) is True
        assert copies(engine)[0] == 0
        with pytest.raises(ModelFilesError, match="did not say what it holds") as caught:
            await engine.load(1, odd(source="the moon"), HOME)
        assert caught.value.transient
        assert "the moon" in (await deaths.one()).cause
        await engine.load(2, odd(), HOME)
        assert await Outcome(engine, 2).get() == (INPUT,)


def data_limit(engine: ProcessEngine, worker: str) -> str:
    text = Path(f"/proc/{engine.pids[worker]}/limits").read_text(encoding="ascii")
    (line,) = [line for line in text.splitlines() if line.startswith("Max data size")]
    return line.split()[3]


async def test_copies_count_in_what_a_worker_of_models_may_have() -> None:
    settings = WorkerSettings(headroom_bytes=2**28)
    devices = odd_devices("", "other")
    async with running_processes(devices, settings=settings, budgets=[2**20] * 2) as engine:

        def limit(worker: str) -> int:
            return int(data_limit(engine, worker))

        before = {worker: limit(worker) for worker in ("models", "models-other", "files")}
        engine.set_copies_budget(2**30)
        assert limit("models") == before["models"] + 2**30
        assert limit("models-other") == before["models-other"] + 2**30
        assert limit("files") == before["files"]
        # Budgets and those that come later know it too.
        engine.set_budget(0, 2**21)
        assert limit("models") == before["models"] + 2**20 + 2**30
        for worker in ("models", "files"):
            kill(engine, worker)
            await until(lambda worker=worker: worker not in engine.pids)  # type: ignore[misc]
        await engine.load(1, odd(), HOME)
        assert limit("models") > before["models"] + 2**29
        await engine.price(odd())
        assert limit("files") < before["files"] + 2**29
        engine.set_copies_budget(0)
        assert limit("models-other") == before["models-other"]


async def test_without_budgets_copies_limit_nothing() -> None:
    async with running_processes(odd_devices("")) as engine:
        before = data_limit(engine, "models")
        engine.set_copies_budget(2**20)
        assert data_limit(engine, "models") == before
