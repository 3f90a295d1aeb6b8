"""Workers that die, at every stage and in every way: nobody else notices, and nothing is left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support import deadly_models
from tests.support.faulty_models import Gate, closed_gate, make_weights
from tests.support.worker_engine import (
    INPUT,
    PATIENCE_S,
    SOURCE,
    Deaths,
    Outcome,
    files_open,
    is_running,
    maps_of_segments,
    odd,
    odd_devices,
    running_processes,
    until,
)

from modelyard_server.execution.engine import ModelFailed, WorkerLost
from modelyard_server.execution.workers.process_engine import ProcessEngine
from modelyard_server.execution.workers.settings import RuntimeSource, WorkerSettings
from modelyard_server.execution.workers.worker_process import WorkerProcess
from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError, ModelSpec
from modelyard_server.runtimes.targets import Target
from modelyard_server.runtimes.tensors import DType, TensorValue

HOME, ELSEWHERE = Target.whole(0), Target.whole(1)

CAUSES = {
    "abort": "killed by SIGABRT",
    "exit": "exited with code 3",
    "kill": "killed by SIGKILL",
    "scribble": "sent what cannot be understood (a frame does not begin like one)",
    "segv": "killed by SIGSEGV",
}

SHORT = WorkerSettings(
    run_limit_s=0.3, load_limit_s=0.3, price_limit_s=0.3, ping_interval_s=0.1, ping_limit_s=20
)


async def assert_alive(engine: ProcessEngine, model: int, target: Target) -> None:
    """Loads, runs and unloads a model."""
    assert (await engine.load(model, odd(), target)).own_bytes == {target.home: 100}
    assert await Outcome(engine, model).get() == (INPUT,)
    assert (await engine.unload(model)).freed == {target.home: 100}


# --- While it runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", sorted(CAUSES))
async def test_a_run_that_ends_its_worker_fails_and_those_behind_it_may_try_again(
    fault: str, tmp_path: Path
) -> None:
    deaths = Deaths()
    gate = str(tmp_path / "gate")
    async with running_processes(odd_devices("", "other"), deaths=deaths) as engine:
        await engine.load(1, odd(at={"run": fault}, gate=gate, gate_at="run"), HOME)
        await engine.load(2, odd(size=7), HOME)
        await engine.load(3, odd(), ELSEWHERE)
        with closed_gate(tmp_path / "gate") as barrier:
            culprit, behind = Outcome(engine, 1), Outcome(engine, 2)
            await until(barrier.is_waited_at)
            before = dict(engine.pids)
        failed, lost = await culprit.get(), await behind.get()
        assert isinstance(failed, ModelFailed)
        assert failed.exception_type == "WorkerDied"
        assert failed.log_text == f"its worker died while it ran ({CAUSES[fault]})"
        assert isinstance(lost, WorkerLost)
        assert lost.text == f"its worker died ({CAUSES[fault]})"
        death = await deaths.one()
        assert (death.worker, set(death.models), death.suspects) == ("models", {1, 2}, (1,))
        assert death.cause == CAUSES[fault]
        # Its models are gone, and what they held is there for others.
        assert isinstance(await Outcome(engine, 2).get(), WorkerLost)
        assert (await engine.unload(1)).freed == {0: 100}
        assert (await engine.unload(2)).freed == {0: 7}
        assert engine.memory(0).measured_bytes == 0
        assert engine.memory(0).peak_measured_bytes == 107
        await assert_alive(engine, 2, HOME)
        # Nobody else was disturbed.
        assert await Outcome(engine, 3).get() == (INPUT,)
        assert engine.memory(1).measured_bytes == 100
        after = engine.pids
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {"models"}


async def let_pass(engine: ProcessEngine, first: Gate, second: Gate) -> None:
    """Opens a gate, and returns when somebody stands before another: blocks the loop meanwhile.

    So this process hears nothing of what its workers say in between.
    """
    await until(first.is_waited_at)
    # What is said to a worker is heard in order: all runs are there.
    await engine.load(8, odd(), HOME)
    await engine.unload(8)
    first.open()
    second.wait_for_one()


async def test_who_wrote_what_cannot_be_understood_is_to_blame_and_not_who_began_meanwhile(
    tmp_path: Path,
) -> None:
    deaths = Deaths()
    gate, next_gate = tmp_path / "gate", tmp_path / "next"
    async with running_processes(odd_devices(""), deaths=deaths) as engine:
        spec = odd(at={"run": "scribble"}, gate=str(gate), gate_at="run")
        await engine.load(1, spec, HOME)
        await engine.load(2, odd(gate=str(next_gate), gate_at="run"), HOME)
        with closed_gate(gate) as first, closed_gate(next_gate) as second:
            culprit, behind = Outcome(engine, 1), Outcome(engine, 2)
            await let_pass(engine, first, second)
            # The culprit is done, and the one behind it runs, when this is read.
            failed, lost = await culprit.get(), await behind.get()
        assert isinstance(failed, ModelFailed)
        assert failed.log_text == f"its worker died while it ran ({CAUSES['scribble']})"
        assert isinstance(lost, WorkerLost)
        assert lost.text == f"its worker died ({CAUSES['scribble']})"
        assert (await deaths.one()).suspects == (1,)


async def test_who_was_done_before_the_next_wrote_what_cannot_be_understood_is_not_to_blame(
    tmp_path: Path,
) -> None:
    deaths = Deaths()
    gate, next_gate = tmp_path / "gate", tmp_path / "next"
    async with running_processes(odd_devices(""), deaths=deaths) as engine:
        await engine.load(1, odd(gate=str(gate), gate_at="run"), HOME)
        await engine.load(2, odd(at={"run": "scribble"}), HOME)
        await engine.load(3, odd(gate=str(next_gate), gate_at="run"), HOME)
        with closed_gate(gate) as first, closed_gate(next_gate) as second:
            before, culprit, behind = (Outcome(engine, model) for model in (1, 2, 3))
            await let_pass(engine, first, second)
            outcome, failed, lost = await before.get(), await culprit.get(), await behind.get()
        # Its answer may have left before that was written, or be lost behind it.
        assert outcome == (INPUT,) or isinstance(outcome, WorkerLost)
        assert isinstance(failed, ModelFailed)
        assert isinstance(lost, WorkerLost)
        assert (await deaths.one()).suspects == (2,)


async def test_nobody_is_to_blame_for_what_was_written_while_nothing_had_begun(
    tmp_path: Path,
) -> None:
    deaths = Deaths()
    gate = tmp_path / "gate"
    async with running_processes(odd_devices("", ""), deaths=deaths) as engine:
        # A run that waits on one lane, and has not begun, though it is the oldest.
        await engine.load(1, odd(gate=str(gate), gate_at="run"), HOME)
        await engine.load(2, odd(), HOME)
        await engine.load(3, odd(at={"run": "scribble"}), ELSEWHERE)
        with closed_gate(gate) as barrier:
            held, waiting = Outcome(engine, 1), Outcome(engine, 2)
            await until(barrier.is_waited_at)
            culprit = Outcome(engine, 3)
            assert isinstance(await culprit.get(), ModelFailed)
            assert isinstance(await waiting.get(), WorkerLost)
            # It ran at that moment, so it cannot be ruled out.
            assert isinstance(await held.get(), ModelFailed)
        assert (await deaths.one()).suspects == (1, 3)


async def test_what_is_asked_of_a_worker_that_is_ending_waits_until_its_end_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deaths = Deaths()
    is_ending, may_end = asyncio.Event(), asyncio.Event()
    finish = WorkerProcess._finish

    async def held_up(worker: WorkerProcess) -> None:
        is_ending.set()
        await may_end.wait()
        await finish(worker)

    async with running_processes(odd_devices(""), deaths=deaths) as engine:
        await engine.load(1, odd(), HOME)
        with monkeypatch.context() as patch:
            patch.setattr(WorkerProcess, "_finish", held_up)
            os.kill(engine.pids["models"], signal.SIGKILL)
            await is_ending.wait()
        late, unloading = Outcome(engine, 1), asyncio.create_task(engine.unload(1))
        try:
            for _ in range(10):
                await asyncio.sleep(0)
            # Whoever were told now could only ask again, of a worker of which nobody knows the end.
            assert not late.outcomes
            assert not deaths.told
        finally:
            may_end.set()
        lost = await late.get()
        assert isinstance(lost, WorkerLost)
        assert lost.text == "its worker died (killed by SIGKILL)"
        assert (await deaths.one()).suspects == ()
        assert (await unloading).freed == {0: 100}
        await assert_alive(engine, 2, HOME)


async def test_models_of_other_groups_answer_while_a_worker_dies_and_comes_back() -> None:
    async with running_processes(odd_devices("", "other")) as engine:
        await engine.load(2, odd(), ELSEWHERE)
        for _ in range(5):
            await engine.load(1, odd(at={"run": "segv"}), HOME)
            culprit = Outcome(engine, 1)
            others = [Outcome(engine, 2) for _ in range(50)]
            assert {await other.get() for other in others} == {(INPUT,)}
            assert isinstance(await culprit.get(), ModelFailed)
            assert (await engine.unload(1)).freed == {0: 100}


@pytest.mark.parametrize("fault", ["hog", "sleep", "spin"])
async def test_a_run_that_hangs_is_ended_by_the_limit_and_is_to_blame_alone(
    fault: str, tmp_path: Path
) -> None:
    deaths = Deaths()
    async with running_processes(odd_devices("", ""), settings=SHORT, deaths=deaths) as engine:
        # One that waits as long, on the other lane, but began later.
        await engine.load(1, odd(at={"run": fault}), HOME)
        await engine.load(2, odd(), HOME)
        culprit, behind = Outcome(engine, 1), Outcome(engine, 2)
        failed = await culprit.get()
        assert isinstance(failed, ModelFailed)
        assert failed.log_text == "its worker died while it ran (ran for longer than 0.3 s)"
        assert isinstance(await behind.get(), WorkerLost)
        assert (await deaths.one()).suspects == (1,)
        await assert_alive(engine, 3, ELSEWHERE)


async def test_a_model_that_keeps_the_interpreter_to_itself_is_found_by_the_pings() -> None:
    settings = WorkerSettings(ping_interval_s=0.1, ping_limit_s=0.5)
    deaths = Deaths()
    async with running_processes(odd_devices(""), settings=settings, deaths=deaths) as engine:
        await engine.load(1, odd(at={"run": "hog"}), HOME)
        failed = await Outcome(engine, 1).get()
        assert isinstance(failed, ModelFailed)
        assert "did not answer for 0.5 s" in failed.log_text
        assert (await deaths.one()).suspects == (1,)
        await assert_alive(engine, 2, HOME)


async def test_slow_runs_within_the_limit_and_a_parent_that_stands_still_end_nobody() -> None:
    async with running_processes(odd_devices(""), settings=SHORT) as engine:
        before = dict(engine.pids)
        await engine.load(1, odd(), HOME)
        # The loop of this process stands still, far beyond the limits.
        subprocess.run(["sleep", "1"], check=True)  # noqa: ASYNC221 - that is the point
        for _ in range(20):
            assert await Outcome(engine, 1).get() == (INPUT,)
        assert engine.pids == before


async def test_memory_without_end_is_refused_and_ends_nobody_else() -> None:
    settings = WorkerSettings(headroom_bytes=2**28)
    devices = odd_devices("", "other")
    async with running_processes(devices, settings=settings, budgets=[2**20] * 2) as engine:
        await engine.load(1, odd(at={"run": "grow"}), HOME)
        await engine.load(2, odd(), ELSEWHERE)
        other = engine.pids["models-other"]
        failed = await Outcome(engine, 1).get()
        assert isinstance(failed, ModelFailed)
        assert failed.exception_type == "MemoryError"
        assert await Outcome(engine, 2).get() == (INPUT,)
        assert engine.pids["models-other"] == other


async def test_a_budget_that_changes_changes_what_the_worker_may_have() -> None:
    settings = WorkerSettings(headroom_bytes=2**28)
    devices = odd_devices("", "other")
    async with running_processes(devices, settings=settings, budgets=[2**20, 2**30]) as engine:

        def limit(worker: str) -> int:
            text = Path(f"/proc/{engine.pids[worker]}/limits").read_text(encoding="ascii")
            (line,) = [line for line in text.splitlines() if line.startswith("Max data size")]
            return int(line.split()[3])

        small, large = limit("models"), limit("models-other")
        assert 2**29 < large - small < 2**30 + 2**26
        engine.set_budget(0, 2**21)
        assert limit("models") == small + 2**20
        engine.set_budget(0, 2**20)
        assert limit("models") == small
        assert limit("models-other") == large
        # The next worker gets it too.
        engine.set_budget(0, 2**30)
        await engine.load(1, odd(at={"run": "exit"}), HOME)
        await Outcome(engine, 1).get()
        await until(lambda: "models" in engine.pids)
        assert limit("models") > small + 2**29


# --- While it is loaded, priced, unloaded ---------------------------------------------------------


@pytest.mark.parametrize("fault", ["exit", "kill", "scribble", "segv", "spin"])
async def test_a_load_that_ends_its_worker_fails_and_those_behind_it_do_not_notice(
    fault: str, tmp_path: Path
) -> None:
    deaths = Deaths()
    cause = CAUSES.get(fault, "ran for longer than 0.3 s")
    settings = SHORT if fault == "spin" else WorkerSettings()
    async with running_processes(odd_devices(""), settings=settings, deaths=deaths) as engine:
        await engine.load(9, odd(), HOME)
        spec = odd(at={"load": fault}, gate=str(tmp_path / "gate"))
        with closed_gate(tmp_path / "gate") as gate:
            culprit = asyncio.create_task(engine.load(1, spec, HOME))
            behind = asyncio.create_task(engine.load(2, odd(size=7), HOME))
            unwanted = asyncio.create_task(engine.load(3, odd(size=7), HOME))
            await until(gate.is_waited_at)
            engine.cancel_load(3)
            # One that has not begun and is no longer wanted does not come back either.
        with pytest.raises(ModelFilesError) as caught:
            await culprit
        assert caught.value.transient
        assert caught.value.text == f"its worker died while it was loaded ({cause})"
        assert (await behind).own_bytes == {0: 7}
        with pytest.raises(LoadCancelled):
            await unwanted
        death = await deaths.one()
        assert (set(death.models), death.suspects) == ({9}, (1,))
        assert await Outcome(engine, 2).get() == (INPUT,)
        assert (await engine.unload(9)).freed == {0: 100}
        assert engine.memory(0).measured_bytes == 7


@pytest.mark.parametrize("fault", ["exit", "segv", "sleep"])
async def test_files_that_end_the_worker_that_reads_them_end_no_models_worker(
    fault: str, tmp_path: Path
) -> None:
    deaths = Deaths()
    cause = CAUSES.get(fault, "ran for longer than 0.3 s")
    async with running_processes(odd_devices(""), settings=SHORT, deaths=deaths) as engine:
        await engine.load(1, odd(), HOME)
        before = dict(engine.pids)
        armed = tmp_path / "armed"
        armed.touch()
        spec = odd(at={"price": fault}, armed=str(armed))
        with pytest.raises(ModelFilesError) as caught:
            await engine.price(spec)
        assert caught.value.transient
        assert caught.value.text == f"its worker died while it was priced ({cause})"
        armed.unlink()
        assert (await engine.price(spec)).resting_bytes == 100
        assert await Outcome(engine, 1).get() == (INPUT,)
        assert engine.pids["models"] == before["models"]
        assert engine.pids["files"] != before["files"]
        assert not deaths.told


async def test_a_look_at_files_that_waits_behind_others_is_not_lost_with_them(
    tmp_path: Path,
) -> None:
    paths = [tmp_path / f"gate-{i}" for i in range(4)]
    async with running_processes(odd_devices("")) as engine:
        with ExitStack() as stack:
            gates = [stack.enter_context(closed_gate(path)) for path in paths]
            # As many as look at files at once, and one that waits behind each of them.
            specs = [odd(at={"price": "exit"}, gate=str(path), gate_at="price") for path in paths]
            culprits = [asyncio.create_task(engine.price(spec)) for spec in specs]
            behind = [asyncio.create_task(engine.price(odd(size=i))) for i in range(4)]
            for gate in gates:
                await until(gate.is_waited_at)
        outcomes = await asyncio.gather(*culprits, return_exceptions=True)
        # The first that goes on takes all along that have begun.
        assert all(isinstance(outcome, ModelFilesError) for outcome in outcomes)
        assert [(await price).resting_bytes for price in behind] == [0, 1, 2, 3]


async def test_an_unload_that_ends_its_worker_gives_everything_back() -> None:
    deaths = Deaths()
    async with running_processes(odd_devices(""), deaths=deaths) as engine:
        await engine.load(1, odd(at={"close": "segv"}), HOME)
        await engine.load(2, odd(size=7), HOME)
        assert (await engine.unload(1)).freed == {0: 100}
        assert (await deaths.one()).models == {2}
        assert (await engine.unload(2)).freed == {0: 7}
        assert engine.memory(0).measured_bytes == 0


async def test_memory_that_was_kept_is_back_with_the_end_of_the_worker() -> None:
    deaths = Deaths()
    async with running_processes(odd_devices(""), deaths=deaths) as engine:
        await engine.load(1, odd(keep=True), HOME)
        assert (await engine.unload(1)).freed == {0: 0}
        assert engine.memory(0).measured_bytes == 100
        assert await engine.recheck(1) == {}
        os.kill(engine.pids["models"], signal.SIGKILL)
        await deaths.one()
        await until(lambda: engine.memory(0).measured_bytes == 0)
        assert await engine.recheck(1) == {0: 100}
        assert await engine.recheck(1) == {}


# --- From outside ---------------------------------------------------------------------------------


async def test_a_worker_that_is_killed_while_idle_accuses_nobody() -> None:
    deaths = Deaths()
    async with running_processes(odd_devices(""), deaths=deaths) as engine:
        await engine.load(1, odd(), HOME)
        os.kill(engine.pids["models"], signal.SIGKILL)
        death = await deaths.one()
        assert (list(death.models), death.suspects) == ([1], ())
        assert death.cause == "killed by SIGKILL"
        assert isinstance(await Outcome(engine, 1).get(), WorkerLost)
        # Loaded again without an unload in between, as after an unload.
        assert (await engine.load(1, odd(), HOME)).own_bytes == {0: 100}
        assert await Outcome(engine, 1).get() == (INPUT,)


async def test_loads_that_come_while_a_worker_comes_back_wait_for_it() -> None:
    async with running_processes(odd_devices("")) as engine:
        os.kill(engine.pids["models"], signal.SIGKILL)
        await until(lambda: "models" not in engine.pids)
        assert (await engine.load(1, odd(), HOME)).own_bytes == {0: 100}


async def test_a_zygote_that_dies_comes_back_with_all_workers() -> None:
    deaths = Deaths()
    async with running_processes(odd_devices(""), deaths=deaths) as engine:
        before = dict(engine.pids)
        await engine.load(1, odd(), HOME)
        os.kill(before["zygote"], signal.SIGKILL)
        assert (await deaths.one()).models == {1}
        await assert_alive(engine, 2, HOME)
        assert (await engine.price(odd())).resting_bytes == 100
        assert not set(engine.pids.values()) & set(before.values())


async def test_a_worker_that_cannot_start_is_tried_again_and_says_so_meanwhile(
    tmp_path: Path,
) -> None:
    broken = tmp_path / "broken"
    source = RuntimeSource(maker=SOURCE.maker, worker_arguments={"broken": str(broken)})
    settings = WorkerSettings(start_tries=2)
    async with running_processes(odd_devices(""), source=source, settings=settings) as engine:
        broken.touch()
        os.kill(engine.pids["models"], signal.SIGKILL)
        await until(lambda: "models" not in engine.pids)
        with pytest.raises(ModelFilesError, match="does not start: exited with code 7") as caught:
            await engine.load(1, odd(), HOME)
        assert caught.value.transient
        broken.unlink()
        await until(lambda: "models" in engine.pids)
        await assert_alive(engine, 1, HOME)


async def test_fifty_deaths_leave_no_file_no_map_and_no_process() -> None:
    deaths = Deaths()
    data = os.urandom(2**20)
    large = TensorValue(name="x", dtype=DType.UINT8, shape=(len(data),), data=data)
    async with running_processes(odd_devices(""), deaths=deaths) as engine:
        pids = set()
        files: Mapping[str, str] = {}
        maps = 0
        for death in range(50):
            await engine.load(1, odd(), HOME)
            await engine.load(2, odd(at={"run": "exit"}), HOME)
            assert await Outcome(engine, 1, large).get() == (large,)
            pids.add(engine.pids["models"])
            culprit = Outcome(engine, 2, large)
            assert isinstance(await culprit.get(), ModelFailed)
            await engine.unload(1)
            await engine.unload(2)
            await until(lambda: "models" in engine.pids)
            if death == 0:
                files, maps = files_open(), maps_of_segments()
        assert len(deaths.told) == 50
        assert len(files_open()) == len(files)
        assert maps_of_segments() == maps
        assert len(pids) == 50
        assert not [pid for pid in pids if is_running(pid)]
        assert asyncio.all_tasks() and len(asyncio.all_tasks()) < 10


# --- The end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["hog", "sleep"])
async def test_a_run_that_hangs_does_not_keep_the_engine_from_stopping(fault: str) -> None:
    async with running_processes(odd_devices("")) as engine:
        await engine.load(1, odd(at={"run": fault}), HOME)
        hanging = Outcome(engine, 1)
        pids = set(engine.pids.values())
        assert await engine.stop(0.2) is False
        assert not [pid for pid in pids if is_running(pid)]
        assert isinstance(await hanging.get(), WorkerLost)


SERVER = """
import asyncio, json, sys
from tests.support.worker_engine import SOURCE, odd, odd_devices
from modelyard_server.execution.workers.process_engine import ProcessEngine
from modelyard_server.runtimes.targets import Target

async def main():
    engine = ProcessEngine(devices=odd_devices(""), source=SOURCE)
    await engine.start(["odd"])
    await engine.load(1, odd(at={"run": sys.argv[1]}), Target.whole(0))
    engine.run(1, (), {}, print)
    await engine.price(odd())
    print(json.dumps(list(engine.pids.values())), flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.mark.parametrize("fault", ["hog", "sleep"])
async def test_a_server_that_is_killed_leaves_no_process_behind(fault: str) -> None:
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, fault, stdout=subprocess.PIPE
    )
    try:
        assert server.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            pids = json.loads(await server.stdout.readline())
        assert len(pids) == 3
        assert all(is_running(pid) for pid in pids)
    finally:
        server.kill()
        await server.wait()
    await until(lambda: not [pid for pid in pids if is_running(pid)])


# --- With torch -----------------------------------------------------------------------------------


async def test_a_module_that_crashes_or_hoards_ends_at_most_its_worker(tmp_path: Path) -> None:
    source = RuntimeSource(
        maker=SOURCE.maker,
        arguments={"torch": True},
        allowed_factories=deadly_models.FACTORIES,
    )
    settings = WorkerSettings(headroom_bytes=2**29)
    folder = make_weights(tmp_path / "model")
    x = TensorValue(name="x", dtype=DType.FLOAT32, shape=(1,), data=b"\0\0\0\0")

    def spec(name: str) -> ModelSpec:
        factory = f"tests.support.deadly_models:{name}"
        options = {"factory": factory}
        return ModelSpec(name=name, runtime="torch", folder=folder, options=options)

    async with running_processes(
        odd_devices(""), source=source, settings=settings, budgets=[2**22], runtimes=["torch"]
    ) as engine:
        assert (await engine.price(spec("Hoarding"))).resting_bytes == 4096
        await engine.load(1, spec("Hoarding"), HOME)
        await engine.load(2, spec("Crashing"), HOME)
        worker = engine.pids["models"]
        hoarding = await Outcome(engine, 1, x).get()
        assert isinstance(hoarding, ModelFailed)
        assert hoarding.exception_type == "RuntimeError"
        assert "can't allocate memory" in hoarding.log_text
        assert engine.pids["models"] == worker
        crashing = await Outcome(engine, 2, x).get()
        assert isinstance(crashing, ModelFailed)
        assert crashing.exception_type == "WorkerDied"
        assert (await engine.unload(1)).freed == {0: 4096}
        assert (await engine.unload(2)).freed == {0: 4096}
        assert (await engine.load(1, spec("Hoarding"), HOME)).own_bytes == {0: 4096}


def torch_beside_odd(base: Path) -> tuple[RuntimeSource, ModelSpec]:
    """Runtimes of which the engine may be started with some, and a model of torch's."""
    source = RuntimeSource(
        maker=SOURCE.maker,
        arguments={"torch": True},
        allowed_factories=deadly_models.FACTORIES,
    )
    factory = "tests.support.deadly_models:Crashing"
    folder = make_weights(base / "model")
    return source, ModelSpec(name="m", runtime="torch", folder=folder, options={"factory": factory})


async def test_an_identity_model_in_host_memory_brings_no_torch_to_its_worker() -> None:
    spec = ModelSpec(name="m", runtime="identity", options={"size_bytes": 5_000_000})
    source = RuntimeSource()
    async with running_processes(odd_devices(""), source=source, runtimes=["identity"]) as engine:
        assert (await engine.price(spec)).peak_bytes == 5_000_000
        assert (await engine.load(1, spec, HOME)).own_bytes == {0: 5_000_000}
        assert not any(has_torch(engine, name) for name in ("models", "files", "zygote"))
        assert (await engine.unload(1)).freed == {0: 5_000_000}


def has_torch(engine: ProcessEngine, name: str) -> bool:
    """A process of an engine has loaded torch's library."""
    pid = engine.pids.get(name)
    return pid is not None and "libtorch" in Path(f"/proc/{pid}/maps").read_text("utf-8")


async def test_a_runtime_that_is_used_after_all_is_warm_in_the_workers_to_come(
    tmp_path: Path,
) -> None:
    source, spec = torch_beside_odd(tmp_path)

    async with running_processes(odd_devices(""), source=source, runtimes=["odd"]) as engine:
        assert not has_torch(engine, "zygote")
        assert (await engine.load(1, spec, HOME)).own_bytes == {0: 4096}
        await until(lambda: has_torch(engine, "zygote"))
        worker = engine.pids["models"]
        os.kill(worker, signal.SIGKILL)
        await until(lambda: engine.pids.get("models", worker) != worker)
        assert has_torch(engine, "models")
        assert not has_torch(engine, "files")
        assert (await engine.load(1, spec, HOME)).own_bytes == {0: 4096}
