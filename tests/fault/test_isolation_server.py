"""Workers that die under a real server, and a store that is damaged under it.

What ran may fail, and says so; everybody else is served again, and nothing stays reserved.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support import faulty_models
from tests.support.attacked_yard import (
    FAR,
    MODELS,
    NEAR,
    PATIENCE_S,
    Attacked,
    X,
    attacked,
    check_text,
    engine_table,
    is_stopped,
    neighbours,
    slow_file,
    stopped_after,
)
from tests.support.faulty_models import closed_gate
from tests.support.odd_modules import EXITING, HANGING
from tests.support.server import eventually, refusal_of

from modelyard import (
    Admin,
    LoadFailed,
    ModelFailed,
    ResidencyState,
)
from modelyard_server.execution.workers.worker_process import WorkerProcess


async def died_running(call: Awaitable[object], base: Path) -> None:
    """A call whose model took its worker along."""
    error = await refusal_of(call)
    assert isinstance(error, ModelFailed), error
    assert error.exception_type == "WorkerDied"
    check_text(str(error), base)


async def died_loading(call: Awaitable[object], base: Path, text: str) -> None:
    """A call whose model could not be loaded, because its worker died."""
    error = await refusal_of(call)
    assert isinstance(error, LoadFailed), error
    assert error.transient
    assert text in str(error), error
    check_text(str(error), base)


# --- Killed at every stage ------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [0, 1])
async def test_the_worker_for_files_is_killed_during_an_import(tmp_path: Path, passes: int) -> None:
    async with attacked(tmp_path) as under:
        ledger, models = await under.ledger(), under.pid(MODELS)
        file = slow_file(under.folder("m"))
        rows = file.stat().st_size // 4
        files = under.pid("files")
        async with neighbours(under) as seen:
            async with stopped_after(files, passes * file.stat().st_size + 2**24):
                creating = asyncio.create_task(
                    died_loading(
                        under.create("m", rows=rows), tmp_path, "priced (killed by SIGKILL)"
                    )
                )
                await eventually("the import is held up", lambda: is_stopped(files))
                os.kill(files, signal.SIGKILL)
                await creating
            await under.has_another("files", files)
            faulty_models.make_weights(under.folder("m"), value=5.0)
            await under.create("m")
            assert await under.value("m") == 5.0
            await under.delete("m")
        seen.check()
        assert under.pid(MODELS) == models
        assert not list((tmp_path / "weights" / "tmp").iterdir())
        await under.returns_to(ledger)


async def test_the_worker_is_killed_while_a_model_is_loaded(tmp_path: Path) -> None:
    gate_path = tmp_path / "gate"
    async with attacked(tmp_path) as under:
        faulty_models.make_weights(under.folder("m"), value=5.0)
        await under.create("m", "StuckInLoad", gate=str(gate_path))
        ledger, worker = await under.ledger(), under.pid(MODELS)
        async with neighbours(under) as seen:
            with closed_gate(gate_path) as gate:
                # Not for a request: its client would try again by itself.
                await under.load("m")
                await eventually("it is being loaded", gate.is_waited_at)
                os.kill(worker, signal.SIGKILL)
                failed = await under.yard.becomes("m", ResidencyState.FAILED, PATIENCE_S)
                assert failed.failure is not None
                assert "loaded (killed by SIGKILL)" in failed.failure.message
                check_text(failed.failure.message, tmp_path)
                assert failed.charges == ()
            await under.has_another(MODELS, worker)
            await under.resident(NEAR, FAR)
            await under.recovers("m", 5.0)
            await under.unload("m")
        seen.check(deaths=1)
        await under.returns_to(ledger)


async def test_the_worker_is_killed_while_a_model_runs(tmp_path: Path) -> None:
    gate_path = tmp_path / "gate"
    async with attacked(tmp_path) as under:
        faulty_models.make_weights(under.folder("m"), value=5.0)
        await under.create("m", "StuckInRun", gate=str(gate_path))
        ledger, worker = await under.ledger(), under.pid(MODELS)
        assert await under.value("m") == 5.0
        async with neighbours(under) as seen:
            with closed_gate(gate_path) as gate:
                running = asyncio.create_task(
                    died_running(under.client.predict("m", X, timeout_s=PATIENCE_S), tmp_path)
                )
                await eventually("it runs", gate.is_waited_at)
                os.kill(worker, signal.SIGKILL)
                await running
            await under.has_another(MODELS, worker)
            await under.resident(NEAR, FAR)
            await under.recovers("m", 5.0)
            await under.unload("m")
        seen.check(deaths=1)
        await under.returns_to(ledger)


async def test_the_worker_is_killed_while_a_model_is_unloaded(tmp_path: Path) -> None:
    async with attacked(tmp_path) as under:
        faulty_models.make_weights(under.folder("m"), value=5.0)
        await under.create("m")
        ledger, worker = await under.ledger(), under.pid(MODELS)
        assert await under.value("m") == 5.0
        os.kill(worker, signal.SIGSTOP)
        unloading = asyncio.create_task(under.unload("m"))
        await under.yard.becomes("m", ResidencyState.UNLOADING)
        os.kill(worker, signal.SIGKILL)
        assert (await unloading).state is ResidencyState.COLD
        await under.has_another(MODELS, worker)
        await under.resident(NEAR, FAR)
        assert await under.ledger() == ledger
        assert await under.value("m") == 5.0
        await under.unload("m")
        await under.returns_to(ledger)


@pytest.mark.parametrize("name", [MODELS, "zygote"])
async def test_a_worker_is_killed_while_nothing_runs(tmp_path: Path, name: str) -> None:
    async with attacked(tmp_path) as under:
        ledger, before = await under.ledger(), dict(under.engine.pids)
        for _ in range(4):  # More often than a culprit would be let.
            worker = under.pid(MODELS)
            os.kill(under.pid(name), signal.SIGKILL)
            await under.has_another(MODELS, worker)
            # Nobody asks for them: they come back by themselves.
            await under.resident(NEAR, FAR)
            assert await under.ledger() == ledger
        assert not set(under.engine.pids.values()) & ({before[MODELS], before[name]})
        await eventually("all are there", lambda: under.engine.pids.keys() == before.keys())


async def lost_count(under: Attacked) -> int:
    """How often somebody was told to come again because a worker had died."""
    stats = await under.yard.admin(Admin.stats)
    return stats.error_counts.get("WORKER_LOST", 0)


async def test_who_asks_while_a_worker_is_ending_waits_for_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_ending, may_end = asyncio.Event(), asyncio.Event()
    finish = WorkerProcess._finish

    async def held_up(worker: WorkerProcess) -> None:
        is_ending.set()
        await may_end.wait()
        await finish(worker)

    async with attacked(tmp_path) as under:
        worker = under.pid(MODELS)
        with monkeypatch.context() as patch:
            patch.setattr(WorkerProcess, "_finish", held_up)
            os.kill(worker, signal.SIGKILL)
            await is_ending.wait()
        asking = [asyncio.create_task(under.value(NEAR)) for _ in range(5)]
        # They have been given to the worker that is there no more.
        await eventually("all are leased", lambda: under.yard.app.residency.lease_count == 5)
        assert await lost_count(under) == 0
        may_end.set()
        assert await asyncio.gather(*asking) == [2.0] * 5
        assert await lost_count(under) == 0
        await under.has_another(MODELS, worker)


async def test_who_stands_behind_a_run_that_ends_its_worker_is_served_by_the_next_one(
    tmp_path: Path,
) -> None:
    gate_path = tmp_path / "gate"
    async with attacked(tmp_path) as under:
        faulty_models.make_weights(under.folder("m"), value=5.0)
        await under.create("m", "StuckInRun", gate=str(gate_path))
        assert await under.value("m") == 5.0
        worker = under.pid(MODELS)
        with closed_gate(gate_path) as gate:
            running = asyncio.create_task(
                died_running(under.client.predict("m", X, timeout_s=PATIENCE_S), tmp_path)
            )
            await eventually("it runs", gate.is_waited_at)
            behind = [asyncio.create_task(under.value(NEAR)) for _ in range(5)]
            await eventually("all are leased", lambda: under.yard.app.residency.lease_count == 6)
            os.kill(worker, signal.SIGKILL)
            await running
        assert await asyncio.gather(*behind) == [2.0] * 5
        assert await lost_count(under) == 0
        await under.recovers("m", 5.0)
        await under.unload("m")


# --- Models that end or block their worker --------------------------------------------------------


DEADLY: dict[str, tuple[str, bool]] = {
    "exit": (EXITING, True),
    "hang": (HANGING, True),
    "segv": ("tests.support.deadly_models:Crashing", False),
}


@pytest.mark.parametrize("kind", DEADLY)
async def test_a_model_that_takes_its_worker_along_is_barred_after_three_times_and_only_it(
    tmp_path: Path, kind: str
) -> None:
    factory, has_flag = DEADLY[kind]
    flag = tmp_path / "flag"
    flag.touch()
    async with attacked(tmp_path, engine=engine_table(run_limit_s=0.5)) as under:
        faulty_models.make_weights(under.folder("m"), value=5.0)
        await under.create("m", factory, **({"flag": str(flag)} if has_flag else {}))
        ledger = await under.ledger()
        for _ in range(3):
            worker = under.pid(MODELS)
            await died_running(under.client.predict("m", X, timeout_s=PATIENCE_S), tmp_path)
            await under.has_another(MODELS, worker)
            await under.resident(NEAR, FAR)
            assert (await under.yard.residency("m")).state is ResidencyState.COLD
            assert await under.ledger() == ledger
        worker = under.pid(MODELS)
        async with neighbours(under) as seen:
            for _ in range(3):
                error = await refusal_of(under.client.predict("m", X, timeout_s=PATIENCE_S))
                assert isinstance(error, LoadFailed), error
                assert not error.transient
                check_text(str(error), tmp_path)
            residency = await under.yard.residency("m")
            assert residency.failure is not None
            assert "brought its worker down 3 times" in residency.failure.message
            assert "load it by hand" in residency.failure.message
        seen.check()
        assert under.pid(MODELS) == worker
        assert await under.ledger() == ledger
        if has_flag:
            # An operator has put it right.
            flag.unlink()

            await under.load("m")
            await under.resident("m")
            assert await under.value("m") == 5.0
            # All is forgotten: it takes three more times.
            flag.touch()
            await died_running(under.client.predict("m", X, timeout_s=PATIENCE_S), tmp_path)
            flag.unlink()
            await under.recovers("m", 5.0)
            await under.unload("m")
            await under.resident(NEAR, FAR)
            await under.returns_to(ledger)


async def test_a_proven_model_that_is_there_each_time_is_not_barred_with_the_culprit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flag, gate_path = tmp_path / "flag", tmp_path / "gate"
    caplog.set_level(logging.ERROR)
    async with attacked(tmp_path) as under:
        for name, value in (("m", 5.0), ("proven", 6.0)):
            faulty_models.make_weights(under.folder(name), value=value)
        await under.create("m", EXITING, flag=str(flag))
        await under.create("proven", "StuckInLoad", gate=str(gate_path))
        ledger = await under.ledger()
        for _ in range(50):
            assert await under.value("proven") == 6.0
        for _ in range(3):
            worker = under.pid(MODELS)
            await under.unload("proven")
            # In every second run it dies, and each time the other is just being loaded.
            await under.recovers("m", 5.0)
            with closed_gate(gate_path) as gate:
                asking = asyncio.create_task(under.recovers("proven", 6.0))
                await eventually("it is being loaded", gate.is_waited_at)
                flag.touch()
                await died_running(under.client.predict("m", X, timeout_s=PATIENCE_S), tmp_path)
                flag.unlink()
            await under.has_another(MODELS, worker)
            await asking
        there = [text for text in caplog.messages if "running or loading" in text]
        assert len(there) == 3
        assert all("m (100%)" in text and "proven (0%)" in text for text in there), there
        error = await refusal_of(under.client.predict("m", X, timeout_s=PATIENCE_S))
        assert isinstance(error, LoadFailed), error
        assert "brought its worker down 3 times" in str(error)
        check_text(str(error), tmp_path)
        model = await under.yard.admin(Admin.get_model, "m")
        assert any("modelyard load m" in warning for warning in model.warnings)
        assert (await under.yard.admin(Admin.get_model, "proven")).warnings == ()
        assert await under.value("proven") == 6.0
        await under.unload("proven")
        await under.resident(NEAR, FAR)
        await under.returns_to(ledger)


@pytest.mark.parametrize("by_hand", [Admin.load, Admin.pin])
async def test_who_loads_or_pins_a_barred_model_by_hand_waits_for_nothing(
    tmp_path: Path, by_hand: Callable[..., object]
) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    async with attacked(tmp_path, backoff_s=(50.0, 60.0)) as under:
        faulty_models.make_weights(under.folder("m"), value=5.0)
        await under.create("m", EXITING, flag=str(flag))
        for _ in range(3):
            worker = under.pid(MODELS)
            await died_running(under.client.predict("m", X, timeout_s=PATIENCE_S), tmp_path)
            await under.has_another(MODELS, worker)
            await under.resident(NEAR, FAR)
        error = await refusal_of(under.client.predict("m", X, timeout_s=PATIENCE_S))
        assert isinstance(error, LoadFailed), error
        assert (await under.yard.residency("m")).state is ResidencyState.FAILED
        flag.unlink()
        await under.yard.admin(by_hand, "m")
        await under.resident("m")
        assert await under.value("m") == 5.0
        assert (await under.yard.admin(Admin.get_model, "m")).warnings == ()
        await under.yard.admin(Admin.unpin, "m")
        await under.unload("m")
        await under.resident(NEAR, FAR)


async def refusal_or_none(call: Awaitable[object]) -> LoadFailed | None:
    try:
        await call
    except LoadFailed as error:
        return error
    return None


async def test_a_model_that_takes_all_memory_is_refused_it_and_nobody_notices(
    tmp_path: Path,
) -> None:
    async with attacked(tmp_path, engine=engine_table(headroom="128MB")) as under:
        faulty_models.make_weights(under.folder("m"))
        await under.create("m", "tests.support.deadly_models:Hoarding")
        ledger, pids = await under.ledger(), dict(under.engine.pids)
        await under.load("m")
        await under.resident("m")
        async with neighbours(under) as seen:
            for _ in range(3):
                error = await refusal_of(under.client.predict("m", X, timeout_s=PATIENCE_S))
                assert isinstance(error, ModelFailed), error
                assert error.exception_type == "RuntimeError"
                check_text(str(error), tmp_path)
        seen.check()
        assert under.engine.pids == pids
        await under.unload("m")
        await under.returns_to(ledger)


async def test_neighbours_are_served_while_workers_die_again_and_again(tmp_path: Path) -> None:
    deaths = 5
    flag = tmp_path / "flag"
    flag.touch()
    async with attacked(tmp_path, engine=engine_table(strikes=100)) as under:
        faulty_models.make_weights(under.folder("m"), value=5.0)
        await under.create("m", EXITING, flag=str(flag))
        ledger = await under.ledger()
        async with neighbours(under) as seen:
            for _ in range(deaths):
                worker = under.pid(MODELS)
                await died_running(under.client.predict("m", X, timeout_s=PATIENCE_S), tmp_path)
                await under.has_another(MODELS, worker)
                await under.resident(NEAR, FAR)
        seen.check(deaths)
        await under.returns_to(ledger)


# --- The store ------------------------------------------------------------------------------------


def writable(pack: Path) -> Path:
    pack.chmod(0o600)
    return pack


def flip(pack: Path) -> None:
    with writable(pack).open("r+b") as file:
        # Of the first number the byte with its exponent.
        file.seek(-4 * faulty_models.ROWS + 3, os.SEEK_END)
        file.write(b"\x7a")


def halve(pack: Path) -> None:
    os.truncate(writable(pack), pack.stat().st_size // 2)


def blank_header(pack: Path) -> None:
    with writable(pack).open("r+b") as file:
        file.write(bytes(64))


@pytest.mark.parametrize("damage", [flip, halve, blank_header, Path.unlink])
async def test_packs_that_are_damaged_while_their_models_are_cold_are_made_anew(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    values = {"seen": 5.0, "new": 6.0}
    async with attacked(tmp_path) as under:
        others = set(under.packs)
        for name, value in values.items():
            faulty_models.make_weights(under.folder(name), value=value)
            await under.create(name)
        # Of one the worker knows the pack already, not only the worker that has imported it.
        assert await under.value("seen") == values["seen"]
        await under.unload("seen")
        ledger, worker = await under.ledger(), under.pid(MODELS)
        async with neighbours(under) as seen:
            for pack in set(under.packs) - others:
                damage(pack)
            for name, value in values.items():
                error = await refusal_or_none(under.client.predict(name, X, timeout_s=PATIENCE_S))
                if error is not None:
                    assert error.transient, error
                    check_text(str(error), tmp_path)
                await under.recovers(name, value)
                await under.unload(name)
        seen.check()
        assert under.pid(MODELS) == worker
        await under.returns_to(ledger)


async def test_a_pack_that_is_cut_while_it_is_mapped_costs_one_worker_and_is_made_anew(
    tmp_path: Path,
) -> None:
    rows = 2**20
    async with attacked(tmp_path) as under:
        others = set(under.packs)
        faulty_models.make_weights(under.folder("m"), value=5.0, rows=rows)
        await under.create("m", rows=rows)
        ledger, worker = await under.ledger(), under.pid(MODELS)
        assert await under.value("m") == 5.0
        (pack,) = set(under.packs) - others
        async with neighbours(under) as seen:
            os.truncate(writable(pack), 0)
            await died_running(under.client.predict("m", X, timeout_s=PATIENCE_S), tmp_path)
            await under.has_another(MODELS, worker)
            await under.recovers("m", 5.0)
            await under.resident(NEAR, FAR)
            await under.unload("m")
        seen.check(deaths=1)
        await under.returns_to(ledger)


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """A small disk of its own, if this machine lets us."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no disks can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def read_only(*folders: Path) -> Iterator[None]:
    """Takes away the right to write below folders, even from root."""
    for folder in folders:
        bind = ["mount", "--bind", str(folder), str(folder)]
        subprocess.run(bind, check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
    try:
        yield
    finally:
        for folder in folders:
            subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_store_that_cannot_be_written_serves_what_it_has(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "64m"):
        async with attacked(tmp_path, store=tmp_path / "disk" / "weights") as under:
            for name, value in (("known", 5.0), ("new", 6.0)):
                faulty_models.make_weights(under.folder(name), value=value)
            await under.create("known")
            ledger = await under.ledger()
            parts = [tmp_path / "disk" / "weights" / name for name in ("tmp", "packs", "models")]
            async with neighbours(under) as seen:
                with read_only(*parts):
                    assert await under.value("known") == 5.0
                    await under.unload("known")
                    error = await refusal_of(under.create("new"))
                    assert isinstance(error, LoadFailed), error
                    assert error.transient
                    assert "the weight store cannot be written: read-only file system" in str(error)
                    check_text(str(error), tmp_path)
                    assert await under.ledger() == ledger
                await under.create("new")
                assert await under.value("new") == 6.0
                await under.unload("new")
            seen.check()
            await under.returns_to(ledger)


async def test_a_disk_that_is_full_refuses_the_import_with_both_numbers(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "16m"):
        async with attacked(tmp_path, store=tmp_path / "disk" / "weights") as under:
            rows = 2**23
            faulty_models.make_weights(under.folder("large"), rows=rows)
            faulty_models.make_weights(under.folder("small"), value=5.0)
            ledger = await under.ledger()
            async with neighbours(under) as seen:
                error = await refusal_of(under.create("large", rows=rows))
                assert isinstance(error, LoadFailed), error
                assert error.transient
                assert "the weight store needs 3" in str(error)
                check_text(str(error), tmp_path)
                await under.create("small")
                assert await under.value("small") == 5.0
                await under.unload("small")
            seen.check()
            await under.returns_to(ledger)


async def test_a_disk_that_becomes_full_during_an_import_leaves_nothing(tmp_path: Path) -> None:
    async with attacked(tmp_path) as under:
        rows = 2**22
        faulty_models.make_weights(under.folder("m"), value=5.0, rows=rows)
        ledger, files, packs = await under.ledger(), under.pid("files"), under.packs
        # No file of this worker may be longer than a megabyte.
        soft, hard = resource.prlimit(files, resource.RLIMIT_FSIZE)
        resource.prlimit(files, resource.RLIMIT_FSIZE, (2**20, hard))
        async with neighbours(under) as seen:
            error = await refusal_of(under.create("m", rows=rows))
            assert isinstance(error, LoadFailed), error
            assert error.transient
            assert "the weight store cannot be written: file too large" in str(error)
            check_text(str(error), tmp_path)
            assert not list((tmp_path / "weights" / "tmp").iterdir())
            assert under.packs == packs
            resource.prlimit(files, resource.RLIMIT_FSIZE, (soft, hard))
            await under.create("m", rows=rows)
            assert await under.value("m") == 5.0
            await under.unload("m")
        seen.check()
        assert under.pid("files") == files
        await under.returns_to(ledger)
