"""The engine of threads, with a runtime whose models do what the test says."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.support.toy_engine import (
    INPUT,
    PATIENCE_S,
    Answer,
    BriefToy,
    Toy,
    ToyRuntime,
    Weights,
    running_engine,
    spec_of,
    toy_devices,
)

from modelyard_server.execution.engine import ModelFailed
from modelyard_server.execution.thread_engine import ThreadEngine
from modelyard_server.runtimes.api import (
    LoadCancelled,
    ModelFilesError,
    ModelSpec,
    OptionError,
    StopCheck,
)
from modelyard_server.runtimes.targets import Place, Target
from modelyard_server.runtimes.tensors import TensorError


@pytest.fixture
def runtime() -> ToyRuntime:
    return ToyRuntime()


@pytest.fixture
async def engine(runtime: ToyRuntime) -> AsyncIterator[ThreadEngine]:
    async with running_engine(runtime, toy_devices("cpu", "cpu")) as made:
        yield made


# --- Loading and unloading ------------------------------------------------------------------------


async def test_what_is_loaded_is_measured_and_what_is_unloaded_is_back(
    engine: ThreadEngine, runtime: ToyRuntime
) -> None:
    assert runtime.warm_ups == 1
    assert (await engine.price(spec_of(size=70))).peak_bytes == 70
    assert (await engine.load(1, spec_of("a", 100), Target.whole(0))).own_bytes == {0: 100}
    assert (await engine.load(2, spec_of("b", 30), Target.whole(0))).own_bytes == {0: 30}
    assert (await engine.load(3, spec_of("c", 5), Target.whole(1))).own_bytes == {1: 5}
    assert engine.memory(0).measured_bytes == 130
    assert engine.memory(1).measured_bytes == 5
    assert (await engine.unload(1)).freed == {0: 100}
    assert engine.memory(0).measured_bytes == 30
    assert engine.memory(0).peak_measured_bytes == 130
    assert (await engine.load(1, spec_of("a", 20), Target.whole(1))).own_bytes == {1: 20}
    assert engine.memory(0).peak_measured_bytes == 130
    assert engine.memory(1).peak_measured_bytes == 25
    assert runtime.places == [
        Place(target=Target.whole(device), torch_devices={device: "cpu"}) for device in (0, 0, 1, 1)
    ]


async def test_an_unload_leaves_no_reference_behind(
    engine: ThreadEngine, runtime: ToyRuntime
) -> None:
    gc.disable()
    try:
        await engine.load(1, spec_of(), Target.whole(0))
        answer = Answer(engine, 1)
        assert await answer.get() == (INPUT,)
        assert (await engine.unload(1)).freed == {0: 100}
        assert runtime.witnesses[0]() is None
        assert runtime.loaded[0]() is None
    finally:
        gc.enable()


async def test_a_cycle_through_the_model_is_collected(
    engine: ThreadEngine, runtime: ToyRuntime
) -> None:
    def tie(weights: Weights, stop: StopCheck) -> None:
        weights.__dict__["me"] = weights

    runtime.on_load = tie
    await engine.load(1, spec_of(), Target.whole(0))
    assert (await engine.unload(1)).freed == {0: 100}
    assert engine.memory(0).measured_bytes == 0


async def test_a_model_that_is_kept_alive_is_no_memory_back_until_it_dies(
    engine: ThreadEngine, runtime: ToyRuntime
) -> None:
    await engine.load(1, spec_of(), Target.whole(0))
    kept = runtime.witnesses[0]()
    assert (await engine.unload(1)).freed == {0: 0}
    assert engine.memory(0).measured_bytes == 100
    assert await engine.recheck(1) == {}
    assert await engine.recheck(1) == {}
    del kept
    assert await engine.recheck(1) == {0: 100}
    assert engine.memory(0).measured_bytes == 0
    assert await engine.recheck(1) == {}
    assert await engine.recheck(99) == {}


async def test_each_leak_of_a_model_comes_back_by_itself(
    engine: ThreadEngine, runtime: ToyRuntime
) -> None:
    kept: list[Weights | None] = []
    for size in (100, 30):
        await engine.load(1, spec_of(size=size), Target.whole(0))
        kept.append(runtime.witnesses[-1]())
        assert (await engine.unload(1)).freed == {0: 0}
    kept[0] = None
    assert await engine.recheck(1) == {0: 100}
    assert engine.memory(0).measured_bytes == 30
    kept[1] = None
    assert await engine.recheck(1) == {0: 30}


@pytest.mark.parametrize(
    "error", [ModelFilesError("cut short"), RuntimeError("boom"), LoadCancelled()]
)
async def test_a_load_that_fails_holds_nothing(
    engine: ThreadEngine, runtime: ToyRuntime, error: Exception
) -> None:
    def fail(weights: Weights, stop: StopCheck) -> None:
        raise error

    runtime.on_load = fail
    gc.disable()
    try:
        with pytest.raises(type(error)) as caught:
            await engine.load(1, spec_of(), Target.whole(0))
        assert caught.value is error
        assert runtime.witnesses[0]() is None
        assert engine.memory(0).measured_bytes == 0
        assert engine.memory(0).peak_measured_bytes == 0
    finally:
        gc.enable()
    runtime.on_load = lambda weights, stop: None
    assert (await engine.load(1, spec_of(), Target.whole(0))).own_bytes == {0: 100}


async def test_a_failed_load_holds_nothing_through_the_cause_of_its_error(
    engine: ThreadEngine, runtime: ToyRuntime
) -> None:
    def fail(weights: Weights, stop: StopCheck) -> None:
        try:
            _fail_holding(weights)
        except OSError as cause:
            raise ModelFilesError("cannot be read", transient=True) from cause

    runtime.on_load = fail
    gc.disable()
    try:
        with pytest.raises(ModelFilesError):
            await engine.load(1, spec_of(), Target.whole(0))
        for _ in range(3):
            await asyncio.sleep(0)
        assert runtime.witnesses[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [StopIteration("boom"), SystemExit("boom"), KeyboardInterrupt()])
async def test_a_loader_that_raises_what_it_must_not_fails_its_load_and_nothing_else(
    engine: ThreadEngine, runtime: ToyRuntime, error: BaseException
) -> None:
    def fail(weights: Weights, stop: StopCheck) -> None:
        raise error

    runtime.on_load = fail
    task = asyncio.create_task(_outcome_of(engine.load(1, spec_of(), Target.whole(0))))
    done, _ = await asyncio.wait({task}, timeout=60)
    assert done, "the load never ends"
    outcome = task.result()
    assert isinstance(outcome, Exception), f"{outcome!r} would end the server"
    runtime.on_load = lambda weights, stop: None
    assert (await engine.load(2, spec_of(), Target.whole(0))).own_bytes == {0: 100}


async def _outcome_of(work: Any) -> Any:
    try:
        return await work
    except BaseException as error:
        return error


async def test_cancel_load_stops_a_load_that_asks(
    engine: ThreadEngine, runtime: ToyRuntime
) -> None:
    began = threading.Event()
    go_on = threading.Event()

    def ask(weights: Weights, stop: StopCheck) -> None:
        began.set()
        go_on.wait(PATIENCE_S)
        if stop():
            raise LoadCancelled

    runtime.on_load = ask
    load = asyncio.create_task(engine.load(1, spec_of(), Target.whole(0)))
    await asyncio.to_thread(began.wait, PATIENCE_S)
    engine.cancel_load(99)
    engine.cancel_load(1)
    go_on.set()
    with pytest.raises(LoadCancelled):
        await load
    engine.cancel_load(1)
    runtime.on_load = lambda weights, stop: None
    assert (await engine.load(1, spec_of(), Target.whole(0))).own_bytes == {0: 100}


async def test_cancel_load_reaches_a_load_that_waits_for_the_loader(
    engine: ThreadEngine, runtime: ToyRuntime
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def ask(weights: Weights, stop: StopCheck) -> None:
        if weights.size_bytes == 1:
            began.set()
            go_on.wait(PATIENCE_S)
        if stop():
            raise LoadCancelled

    runtime.on_load = ask
    first = asyncio.create_task(engine.load(1, spec_of(size=1), Target.whole(0)))
    second = asyncio.create_task(engine.load(2, spec_of(size=2), Target.whole(0)))
    await asyncio.to_thread(began.wait, PATIENCE_S)
    engine.cancel_load(2)
    go_on.set()
    assert (await first).own_bytes == {0: 1}
    with pytest.raises(LoadCancelled):
        await second


async def test_hits_run_while_a_load_is_stuck_on_the_same_device(
    engine: ThreadEngine, runtime: ToyRuntime
) -> None:
    await engine.load(1, spec_of("hot"), Target.whole(0))
    began, go_on = threading.Event(), threading.Event()

    def stick(weights: Weights, stop: StopCheck) -> None:
        began.set()
        go_on.wait(PATIENCE_S)

    runtime.on_load = stick
    load = asyncio.create_task(engine.load(2, spec_of("stuck"), Target.whole(0)))
    try:
        await asyncio.to_thread(began.wait, PATIENCE_S)
        for _ in range(3):
            assert await Answer(engine, 1).get() == (INPUT,)
        assert (await engine.price(spec_of())).peak_bytes == 100
        runtime.on_load = lambda weights, stop: None
        assert (await engine.load(3, spec_of("elsewhere"), Target.whole(1))).own_bytes == {1: 100}
        assert not load.done()
    finally:
        go_on.set()
    assert (await load).own_bytes == {0: 100}


async def test_an_unload_whose_close_raises_ends(engine: ThreadEngine, runtime: ToyRuntime) -> None:
    class Stubborn(Toy):
        def close(self) -> None:
            super().close()
            raise RuntimeError("its library's mistake")

    runtime.kind = Stubborn
    await engine.load(1, spec_of(), Target.whole(0))
    assert (await engine.unload(1)).freed == {0: 100}


# --- Running --------------------------------------------------------------------------------------


async def test_models_of_a_device_run_on_its_lane_and_brief_ones_in_place(
    engine: ThreadEngine, runtime: ToyRuntime
) -> None:
    where: list[str] = []
    runtime.on_run = lambda toy: where.append(threading.current_thread().name)
    await engine.load(1, spec_of(), Target.whole(0))
    await engine.load(2, spec_of(), Target.whole(1))
    await Answer(engine, 1).get()
    await Answer(engine, 2).get()
    runtime.kind = BriefToy
    await engine.load(3, spec_of(), Target.whole(0))
    brief = Answer(engine, 3)
    assert brief.outcomes == [(INPUT,)]
    assert where == ["lane-toy0", "lane-toy1", threading.main_thread().name]
    assert all(name.startswith("load-toy") for name in runtime.threads)


@pytest.mark.parametrize("error", [TensorError("x", "too long"), OptionError("top_k", "unknown")])
async def test_what_is_wrong_with_a_request_comes_back_as_it_is(
    engine: ThreadEngine, runtime: ToyRuntime, error: Exception
) -> None:
    def fail(toy: Toy) -> None:
        raise error

    runtime.on_run = fail
    await engine.load(1, spec_of(), Target.whole(0))
    outcome = await Answer(engine, 1).get()
    assert outcome is error
    assert error.__traceback__ is None


@pytest.mark.parametrize(
    "error", [ValueError("secret"), SystemExit("secret"), StopIteration("secret"), MemoryError()]
)
async def test_what_a_model_raises_becomes_model_failed_with_the_story_for_the_log(
    engine: ThreadEngine, runtime: ToyRuntime, error: BaseException
) -> None:
    def fail(toy: Toy) -> None:
        raise error

    runtime.on_run = fail
    await engine.load(1, spec_of(), Target.whole(0))
    outcome = await Answer(engine, 1).get()
    assert isinstance(outcome, ModelFailed)
    assert outcome.exception_type == type(error).__name__
    assert str(outcome) == type(error).__name__
    assert "Traceback" in outcome.log_text
    assert "in fail" in outcome.log_text
    # The lane lives.
    runtime.on_run = lambda toy: None
    await engine.load(2, spec_of(), Target.whole(0))
    assert await Answer(engine, 2).get() == (INPUT,)


def _plain(toy: Toy) -> None:
    raise ValueError("boom")


# An argument and no closure: a frame that is cleared still has its function, and that its cells.
def _fail_holding(weights: Weights) -> None:
    kept = weights
    raise OSError(f"page {id(kept)}")


def _with_cause(toy: Toy) -> None:
    try:
        _fail_holding(toy.parts[0])
    except OSError as cause:
        raise ValueError("boom") from cause


def _tensor_error_from_none(toy: Toy) -> None:
    try:
        _fail_holding(toy.parts[0])
    except OSError:
        raise TensorError("x", "does not fit") from None


@pytest.mark.parametrize("behaviour", [_plain, _with_cause, _tensor_error_from_none])
async def test_an_error_that_somebody_keeps_keeps_no_model(
    engine: ThreadEngine, runtime: ToyRuntime, behaviour: Callable[[Toy], None]
) -> None:
    runtime.on_run = behaviour
    gc.disable()
    try:
        await engine.load(1, spec_of(), Target.whole(0))
        answer = Answer(engine, 1)
        outcome = await answer.get()
        assert isinstance(outcome, Exception)
        assert runtime.loaded[0]() is not None
        # Whoever is to be answered holds the error still; the model's memory must not wait for it.
        assert (await engine.unload(1)).freed == {0: 100}
        assert runtime.witnesses[0]() is None
        assert runtime.loaded[0]() is None
    finally:
        gc.enable()


async def test_abandoned_work_that_has_not_begun_is_answered_with_none(
    engine: ThreadEngine, runtime: ToyRuntime
) -> None:
    gate, runs = threading.Event(), []

    def wait(toy: Toy) -> None:
        runs.append(1)
        gate.wait(PATIENCE_S)

    runtime.on_run = wait
    await engine.load(1, spec_of(), Target.whole(0))
    first, second = Answer(engine, 1), Answer(engine, 1)
    second.work.abandon()
    gate.set()
    assert await first.get() == (INPUT,)
    assert await second.get() is None
    assert len(runs) == 1


async def test_files_that_hang_hold_up_nobody_elses_price(engine: ThreadEngine) -> None:
    gate = threading.Event()
    stuck = asyncio.create_task(engine.price(spec_of("stuck", gate=gate)))
    await asyncio.sleep(0)
    try:
        # More than there are pricers: none of them may wait behind the one that hangs.
        async with asyncio.timeout(PATIENCE_S / 2):
            for size in range(10):
                assert (await engine.price(spec_of(size=size))).peak_bytes == size
        assert not stuck.done()
    finally:
        gate.set()
    assert (await stuck).peak_bytes == 100


async def test_an_unknown_runtime_names_those_there_are(engine: ThreadEngine) -> None:
    with pytest.raises(OptionError, match="'onnx' is unknown; there are: toy") as caught:
        engine.check(ModelSpec(name="m", runtime="onnx"))
    assert caught.value.option == "runtime"
    with pytest.raises(OptionError):
        await engine.price(ModelSpec(name="m", runtime="onnx"))


async def test_what_a_runtime_says_of_files_and_options_comes_through(engine: ThreadEngine) -> None:
    with pytest.raises(OptionError, match="there is none"):
        engine.check(ModelSpec(name="m", runtime="toy", task="x"))
    with pytest.raises(ModelFilesError, match="cut short"):
        await engine.price(spec_of(broken=True))


async def test_stop_drops_every_model_and_stops_the_loads_that_run(runtime: ToyRuntime) -> None:
    engine = ThreadEngine(devices=toy_devices("cpu"), runtimes={"toy": runtime})
    await engine.start(["toy"])
    await engine.load(1, spec_of(), Target.whole(0))
    began = threading.Event()

    def ask(weights: Weights, stop: StopCheck) -> None:
        began.set()
        while not stop():
            threading.Event().wait(0.001)
        raise LoadCancelled

    runtime.on_load = ask
    load = asyncio.create_task(engine.load(2, spec_of(), Target.whole(0)))
    await asyncio.to_thread(began.wait, PATIENCE_S)
    await asyncio.wait_for(engine.stop(PATIENCE_S), PATIENCE_S)
    with pytest.raises(LoadCancelled):
        await load
    gc.collect()
    assert [witness() for witness in runtime.witnesses] == [None, None]
