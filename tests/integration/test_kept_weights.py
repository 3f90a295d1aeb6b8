"""Copies of weights in both engines: the same contract, in threads and in worker processes.

What happens to copies when workers die is in tests/fault.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support import tiny_models, worker_models
from tests.support.faulty_models import closed_gate
from tests.support.worker_engine import (
    INPUT,
    Outcome,
    odd,
    odd_devices,
    running_processes,
    running_threads,
    until,
)

from modelyard_server.execution.engine import Engine, Unloaded
from modelyard_server.execution.workers.settings import RuntimeSource
from modelyard_server.runtimes.api import LoadSource, ModelSpec
from modelyard_server.runtimes.targets import Target
from modelyard_server.runtimes.tensors import DType, TensorValue

HOME, ELSEWHERE = Target.whole(0), Target.whole(1)
ENCODER = {"a": 60, "b": 20}
NOT_KEPT = Unloaded(freed={0: 100})


@pytest.fixture(params=["threads", "processes"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    running = running_threads if request.param == "threads" else running_processes
    async with running(odd_devices("", "", disk=True)) as made:
        yield made
    assert not worker_models.COPIES


def copies(engine: Engine) -> tuple[int, int]:
    return engine.copies.measured_bytes, engine.copies.peak_measured_bytes


async def unload_and_keep(engine: Engine, model: int) -> int | None:
    unloaded = await engine.unload(model, keep=True)
    assert unloaded.freed == {0: 100}
    assert engine.memory(0).measured_bytes == 0
    return unloaded.kept_bytes


async def test_what_is_kept_is_loaded_from_again_until_it_is_dropped(engine: Engine) -> None:
    loaded = await engine.load(1, odd(copy=30, source="page cache"), HOME)
    assert (loaded.own_bytes, loaded.source) == ({0: 100}, LoadSource.PAGE_CACHE)
    unloaded = await engine.unload(1, keep=True)
    assert (unloaded.freed, unloaded.kept_bytes) == ({0: 100}, 30)
    assert unloaded.keep_s >= 0
    assert (engine.memory(0).measured_bytes, copies(engine)) == (0, (30, 30))
    # Loads come from it as often as there are any, and unloads leave it where it is.
    for _ in range(2):
        loaded = await engine.load(1, odd(copy=30, source="page cache"), HOME)
        assert (loaded.own_bytes, loaded.source) == ({0: 100}, LoadSource.COPY)
        assert await Outcome(engine, 1).get() == (INPUT,)
        assert copies(engine) == (30, 30)
        assert await engine.unload(1) == NOT_KEPT
    assert await engine.drop_copy(1) is True
    assert copies(engine) == (0, 30)
    assert await engine.drop_copy(1) is True
    loaded = await engine.load(1, odd(copy=30), HOME)
    assert loaded.source is LoadSource.STORAGE


async def test_a_copy_is_dropped_whether_its_model_is_loaded_or_not(engine: Engine) -> None:
    await engine.load(1, odd(copy=30), HOME)
    await unload_and_keep(engine, 1)
    await engine.load(1, odd(copy=30), HOME)
    assert await engine.drop_copy(1) is True
    assert await Outcome(engine, 1).get() == (INPUT,)
    assert await unload_and_keep(engine, 1) == 30
    assert copies(engine) == (30, 30)
    assert await engine.drop_copy(1) is True


async def test_what_copies_share_is_measured_once(engine: Engine) -> None:
    for model in (1, 2):
        loaded = await engine.load(model, odd(f"m{model}", shared=ENCODER, copy=model), HOME)
        assert loaded.own_bytes == {0: 20}
        assert await unload_and_keep(engine, model) == model
    assert copies(engine) == (83, 83)
    assert await engine.drop_copy(1) is True
    assert copies(engine) == (82, 83)
    assert await engine.drop_copy(2) is True
    assert copies(engine) == (0, 83)


async def test_what_cannot_be_kept_is_dropped_all_the_same(engine: Engine) -> None:
    await engine.load(1, odd(), HOME)
    assert await engine.unload(1, keep=True) == NOT_KEPT
    assert await engine.drop_copy(1) is True
    assert await engine.drop_copy(99) is True
    assert copies(engine) == (0, 0)


@pytest.mark.parametrize("what", ["memory", "value", "files", "exit", "stop"])
async def test_a_model_that_fails_to_be_kept_is_dropped_all_the_same(
    engine: Engine, what: str
) -> None:
    await engine.load(1, odd(at={"keep": f"raise {what}"}, copy=30), HOME)
    await engine.load(2, odd("other"), HOME)
    assert await engine.unload(1, keep=True) == NOT_KEPT
    assert engine.memory(0).measured_bytes == 100
    assert await engine.drop_copy(1) is True
    assert copies(engine) == (0, 0)
    # Nobody was disturbed, and it can be tried again.
    assert await Outcome(engine, 2).get() == (INPUT,)
    await engine.unload(2)
    assert (await engine.load(1, odd(copy=30), HOME)).source is LoadSource.STORAGE
    assert await unload_and_keep(engine, 1) == 30


async def test_a_second_copy_is_the_callers_error_and_touches_nothing(
    engine: Engine, tmp_path: Path
) -> None:
    in_use = tmp_path / "in use"
    in_use.touch()
    spec = odd(copy=30, in_use=str(in_use))
    await engine.load(1, spec, HOME)
    await unload_and_keep(engine, 1)
    await engine.load(1, spec, HOME)
    with pytest.raises(ValueError, match="a copy of model 1 already"):
        await engine.unload(1, keep=True)
    # Also while somebody reads from one that is being dropped.
    assert await engine.drop_copy(1) is False
    with pytest.raises(ValueError, match="a copy of model 1 already"):
        await engine.unload(1, keep=True)
    assert await Outcome(engine, 1).get() == (INPUT,)
    assert engine.memory(0).measured_bytes == 100
    assert copies(engine) == (30, 30)
    assert await engine.unload(1) == NOT_KEPT
    in_use.unlink()
    assert await engine.drop_copy(1) is True
    assert copies(engine) == (0, 30)


async def test_a_copy_that_is_read_from_counts_until_it_is_asked_for_again(
    engine: Engine, tmp_path: Path
) -> None:
    in_use = tmp_path / "in use"
    in_use.touch()
    spec = odd(copy=30, in_use=str(in_use))
    await engine.load(1, spec, HOME)
    await unload_and_keep(engine, 1)
    drop = asyncio.create_task(engine.drop_copy(1))
    # No load begins to read from it, and none waits for it.
    loaded = await engine.load(2, odd("other"), HOME)
    assert loaded.source is LoadSource.STORAGE
    assert await drop is False
    assert (await engine.load(1, spec, HOME)).source is LoadSource.STORAGE
    assert copies(engine) == (30, 30)
    drop = asyncio.create_task(engine.drop_copy(1))
    again = asyncio.create_task(engine.drop_copy(1))
    in_use.unlink()
    assert (await drop, await again) == (True, True)
    assert copies(engine) == (0, 30)


async def test_while_a_copy_is_made_others_load_run_and_are_dropped(
    engine: Engine, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    await engine.load(3, odd("kept", copy=7), HOME)
    await unload_and_keep(engine, 3)
    await engine.load(1, odd(copy=30, gate=str(gate), gate_at="keep"), HOME)
    await engine.load(2, odd("other"), HOME)
    with closed_gate(gate) as barrier:
        unload = asyncio.create_task(engine.unload(1, keep=True))
        await until(barrier.is_waited_at)
        assert await engine.drop_copy(1) is False
        assert await Outcome(engine, 2).get() == (INPUT,)
        await engine.load(4, odd("new"), ELSEWHERE)
        assert await engine.drop_copy(3) is True
        assert (engine.memory(0).measured_bytes, copies(engine)) == (200, (0, 7))
        # Of the same device is whoever is unloaded; a load of it waits.
        load = asyncio.create_task(engine.load(5, odd("next"), HOME))
        assert not unload.done()
    assert (await unload).kept_bytes == 30
    assert (await load).own_bytes == {0: 100}
    assert copies(engine) == (30, 30)


async def test_a_copy_that_fails_to_let_go_is_back_all_the_same(engine: Engine) -> None:
    await engine.load(1, odd(copy=30, at={"drop": "raise value"}), HOME)
    await unload_and_keep(engine, 1)
    assert await engine.drop_copy(1) is True
    assert copies(engine) == (0, 30)


async def test_a_stop_lets_go_of_copies(engine: Engine, tmp_path: Path) -> None:
    for model in (1, 2):
        await engine.load(model, odd(f"m{model}", copy=30), HOME)
        await unload_and_keep(engine, model)
    assert await engine.stop(30) is True
    assert copies(engine)[0] == 0
    assert await engine.drop_copy(1) is True


async def test_a_thousand_steps_leave_no_thread_and_no_file_behind(engine: Engine) -> None:
    processes = [os.getpid(), *engine.pids.values()]

    def left() -> list[tuple[int, int]]:
        return [
            (len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")))  # noqa: PTH208 - names only
            for pid in processes
        ]

    async def cycle() -> None:
        for source in (LoadSource.STORAGE, LoadSource.COPY):
            assert (await engine.load(1, odd(copy=30), HOME)).source is source
            unloaded = await engine.unload(1, keep=source is LoadSource.STORAGE)
            assert unloaded.kept_bytes == (30 if source is LoadSource.STORAGE else None)
        assert await engine.drop_copy(1) is True

    await cycle()
    before = left()
    for _ in range(200):
        await cycle()
    assert left() == before
    assert (engine.memory(0).peak_measured_bytes, copies(engine)) == (100, (0, 30))


# --- With the libraries ---------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["map", "arena"])
async def test_a_real_model_that_comes_back_from_its_copy_answers_bit_by_bit_as_before(
    tmp_path: Path, read: str
) -> None:
    folders = [
        tiny_models.make_tiny_bert(tmp_path / f"bert{seed}", seed=seed, num_labels=3)
        for seed in (1, 2)
    ]
    specs = [
        ModelSpec(
            name=folder.name, runtime="transformers", task="text-classification", folder=folder
        )
        for folder in folders
    ]
    source = RuntimeSource(
        maker="modelyard_server.runtimes.serving:make_serving_runtimes",
        worker_arguments={
            "store_folder": str(tmp_path / "store"),
            "read": read,
            "write_protected": True,
        },
    )
    text = ("the cat sat", "a dog ran in the house")
    given = TensorValue(name="text", dtype=DType.TEXT, shape=(2,), data=text)
    async with running_processes(
        odd_devices(""), source=source, runtimes=["transformers"], budgets=[2**30]
    ) as engine:
        engine.set_copies_budget(2**28)
        shared: dict[str, int] = {}
        kept_bytes = 0
        answers = []
        for model, spec in enumerate(specs):
            price = await engine.price(spec)
            shared |= price.shared
            loaded = await engine.load(model, spec, HOME)
            # What they share may be there before the second one is.
            assert model or loaded.source is not LoadSource.COPY
            answers.append(await Outcome(engine, model, given).get())
            assert isinstance(answers[-1], tuple)
            unloaded = await engine.unload(model, keep=True)
            assert unloaded.kept_bytes is not None
            kept_bytes += unloaded.kept_bytes
            assert unloaded.keep_s > 0
            assert sum(unloaded.freed.values()) == price.resting_bytes
        assert shared
        assert engine.copies.measured_bytes == kept_bytes + sum(shared.values())
        for model, spec in enumerate(specs):
            loaded = await engine.load(model, spec, HOME)
            assert loaded.source is LoadSource.COPY
            assert await Outcome(engine, model, given).get() == answers[model]
        # Copies go while the models that came from them stay and answer.
        for model in range(len(specs)):
            assert await engine.drop_copy(model) is True
        assert engine.copies.measured_bytes == 0
        for model in range(len(specs)):
            assert await Outcome(engine, model, given).get() == answers[model]
            await engine.unload(model)
        assert engine.memory(0).measured_bytes == 0
        assert (await engine.load(0, specs[0], HOME)).source is not LoadSource.COPY
        assert await Outcome(engine, 0, given).get() == answers[0]
