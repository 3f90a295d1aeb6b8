"""Running a leased request: the lease goes back when the work has really ended, and once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest
from tests.support.fake_engine import FakeEngine, FakeRun, turns

from modelyard_server.errors import Code, Reason, Refusal
from modelyard_server.execution.dispatch import LeasedRuns, run_leased
from modelyard_server.execution.engine import ModelFailed, RunOutcome, WorkerLost, nobody
from modelyard_server.residency.shell import Lease
from modelyard_server.runtimes.api import OptionError
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue

VALUE = TensorValue(name="x", dtype=DType.UINT8, shape=(1,), data=b"a")


class Handle:
    core_id = 7
    finished_runs = 0


class CountedLease:
    """Counts how often it was given back."""

    def __init__(self) -> None:
        self.handle = Handle()
        self.releases = 0

    def release(self) -> None:
        self.releases += 1


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    unexpected: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, c: unexpected.append(c))
    yield FakeEngine()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert not unexpected


@pytest.fixture
def lease() -> CountedLease:
    return CountedLease()


Running = asyncio.Task[tuple[TensorValue, ...]]


async def begin(
    engine: FakeEngine, lease: CountedLease, timeout_s: float = 60
) -> tuple[Running, FakeRun]:
    task = asyncio.create_task(
        run_leased(engine, cast(Lease, lease), (VALUE,), {"k": 1}, timeout_s)
    )
    await turns(2)
    return task, engine.runs[-1]


async def test_outputs_come_back_and_the_lease_goes(
    engine: FakeEngine, lease: CountedLease
) -> None:
    task, run = await begin(engine, lease)
    assert (run.model, run.inputs, run.parameters) == (7, (VALUE,), {"k": 1})
    assert lease.releases == 0
    run.finish((VALUE, VALUE))
    assert lease.releases == 1
    assert await task == (VALUE, VALUE)
    assert lease.releases == 1
    assert not run.abandoned


@pytest.mark.parametrize(
    "error",
    [TensorError("x", "no"), OptionError("k", "no"), ModelFailed("ValueError", "story")],
    ids=lambda error: type(error).__name__,
)
async def test_the_works_error_is_raised_and_the_lease_goes(
    engine: FakeEngine, lease: CountedLease, error: Exception
) -> None:
    task, run = await begin(engine, lease)
    run.finish(error)
    with pytest.raises(type(error)) as caught:
        await task
    assert caught.value is error
    assert lease.releases == 1


async def test_work_that_ends_in_place_is_answered(lease: CountedLease) -> None:
    class Brief(FakeEngine):
        def run(
            self,
            model: int,
            inputs: Any,
            parameters: Any,
            on_done: Callable[[Any], None],
            client: Callable[[], str] = nobody,
            waited_s: float = 0.0,
        ) -> FakeRun:
            run = super().run(model, inputs, parameters, on_done, client, waited_s)
            run.finish((VALUE,))
            return run

    assert await run_leased(Brief(), cast(Lease, lease), (VALUE,), {}, -1.0) == (VALUE,)
    assert lease.releases == 1


async def test_a_deadline_in_the_run_is_told_and_the_lease_stays_until_the_work_ends(
    engine: FakeEngine, lease: CountedLease
) -> None:
    task, run = await begin(engine, lease, timeout_s=0.001)
    with pytest.raises(Refusal) as caught:
        await task
    assert caught.value.reason is Reason.DEADLINE_IN_RUN
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    assert run.abandoned
    assert lease.releases == 0
    run.finish((VALUE,))
    assert lease.releases == 1


@pytest.mark.parametrize("timeout_s", [0.0, -5.0])
async def test_a_deadline_that_has_passed_is_told_at_once(
    engine: FakeEngine, lease: CountedLease, timeout_s: float
) -> None:
    task, run = await begin(engine, lease, timeout_s)
    with pytest.raises(Refusal):
        await asyncio.wait_for(task, 60)
    assert lease.releases == 0
    run.finish(None)
    assert lease.releases == 1


@pytest.mark.parametrize("outcome", [(VALUE,), ValueError("late"), None], ids=repr)
async def test_a_caller_that_leaves_keeps_the_lease_until_the_work_ends(
    engine: FakeEngine, lease: CountedLease, outcome: RunOutcome | None
) -> None:
    task, run = await begin(engine, lease)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert run.abandoned
    assert lease.releases == 0
    run.finish(outcome)
    assert lease.releases == 1


async def test_a_caller_that_leaves_as_the_work_ends_gives_one_lease_back(
    engine: FakeEngine, lease: CountedLease
) -> None:
    task, run = await begin(engine, lease)
    run.finish((VALUE,))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert lease.releases == 1


async def test_an_engine_that_cannot_begin_keeps_no_lease(
    engine: FakeEngine, lease: CountedLease
) -> None:
    engine.run_error = KeyError("no such model")
    with pytest.raises(KeyError):
        await run_leased(engine, cast(Lease, lease), (VALUE,), {}, 60)
    assert lease.releases == 1


async def test_no_timer_is_left_behind(
    engine: FakeEngine, lease: CountedLease, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []
    call_later = loop.call_later

    def spy(*args: Any, **kwargs: Any) -> asyncio.TimerHandle:
        timers.append(call_later(*args, **kwargs))
        return timers[-1]

    monkeypatch.setattr(loop, "call_later", spy)
    task, run = await begin(engine, lease)
    run.finish(())
    assert await task == ()
    assert [timer.cancelled() for timer in timers] == [True]


@pytest.mark.parametrize("brief", [False, True])
async def test_an_error_leaves_nothing_of_its_request_to_the_garbage_collector(
    lease: CountedLease, brief: bool
) -> None:
    # Inputs may be megabytes, and the collector counts objects, not bytes.
    class Engine(FakeEngine):
        def run(
            self,
            model: int,
            inputs: Any,
            parameters: Any,
            on_done: Callable[[Any], None],
            client: Callable[[], str] = nobody,
            waited_s: float = 0.0,
        ) -> FakeRun:
            run = super().run(model, inputs, parameters, on_done, client, waited_s)
            if brief:
                run.finish(TensorError("x", "no"))
            return run

    engine = Engine()
    gc.disable()
    try:
        task = asyncio.create_task(run_leased(engine, cast(Lease, lease), (VALUE,), {"k": 1}, 60))
        await turns(2)
        run = engine.runs.pop()
        if not brief:
            run.finish(TensorError("x", "no"))
        with contextlib.suppress(TensorError):
            await task
        witness = weakref.ref(run)
        del run, task
        await turns()
        assert witness() is None
    finally:
        gc.enable()


async def test_a_parameter_of_the_servers_own_is_refused_from_a_request(
    engine: FakeEngine, lease: CountedLease
) -> None:
    with pytest.raises(OptionError, match="not known") as caught:
        await run_leased(
            engine, cast(Lease, lease), (VALUE,), {"k": 1, "modelyard.session": {}}, 60
        )
    assert caught.value.option == "modelyard.session"
    assert engine.runs == []
    assert lease.releases == 1


class TestLeasedRuns:
    """Several runs under one lease."""

    async def test_the_lease_stays_between_runs_and_goes_at_the_end(
        self, engine: FakeEngine, lease: CountedLease
    ) -> None:
        runs = LeasedRuns(engine, cast(Lease, lease), "ann")
        for number in range(3):
            task = asyncio.create_task(runs.run((VALUE,), {"modelyard.session": number}, 60))
            await turns(2)
            engine.runs[-1].finish((VALUE,))
            assert await task == (VALUE,)
            assert lease.releases == 0
        runs.end()
        runs.end()
        assert lease.releases == 1
        assert [run.parameters for run in engine.runs] == [
            {"modelyard.session": number} for number in range(3)
        ]
        assert lease.handle.finished_runs == 3

    async def test_a_last_run_is_done_before_the_lease_goes(
        self, engine: FakeEngine, lease: CountedLease
    ) -> None:
        runs = LeasedRuns(engine, cast(Lease, lease))
        runs.end({"last": 1})
        runs.end({"another": 1})
        assert [run.parameters for run in engine.runs] == [{"last": 1}]
        assert lease.releases == 0
        engine.runs[-1].finish(ModelFailed("ValueError", "story"))
        assert lease.releases == 1

    @pytest.mark.parametrize("last", [None, {"last": 1}])
    async def test_what_runs_ends_first_whoever_has_gone(
        self, engine: FakeEngine, lease: CountedLease, last: dict[str, Any] | None
    ) -> None:
        runs = LeasedRuns(engine, cast(Lease, lease))
        task = asyncio.create_task(runs.run((VALUE,), {}, 60))
        await turns(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        runs.end(last)
        (first,) = engine.runs
        assert first.abandoned
        assert lease.releases == 0
        first.finish(None)
        if last is not None:
            assert lease.releases == 0
            assert engine.runs[-1].parameters == last
            engine.runs[-1].finish((VALUE,))
        assert lease.releases == 1

    async def test_a_deadline_is_told_as_of_one_run(
        self, engine: FakeEngine, lease: CountedLease
    ) -> None:
        runs = LeasedRuns(engine, cast(Lease, lease))
        with pytest.raises(Refusal) as caught:
            await runs.run((VALUE,), {}, 0.0)
        assert caught.value.reason is Reason.DEADLINE_IN_RUN
        runs.end()
        engine.runs[-1].finish((VALUE,))
        assert lease.releases == 1

    async def test_once_ended_nothing_runs_any_more(
        self, engine: FakeEngine, lease: CountedLease
    ) -> None:
        runs = LeasedRuns(engine, cast(Lease, lease))
        runs.end()
        assert runs.is_ended
        with pytest.raises(Refusal) as caught:
            await runs.run((VALUE,), {}, 60)
        assert caught.value.reason is Reason.DEADLINE_IN_RUN
        assert engine.runs == []

    async def test_an_error_leaves_nothing_behind(
        self, engine: FakeEngine, lease: CountedLease
    ) -> None:
        runs = LeasedRuns(engine, cast(Lease, lease))
        gc.disable()
        try:
            task = asyncio.create_task(runs.run((VALUE,), {}, 60))
            await turns(2)
            run = engine.runs.pop()
            run.finish(WorkerLost("gone"))
            with contextlib.suppress(WorkerLost):
                await task
            runs.end()
            witness = weakref.ref(run)
            del run, task
            await turns()
            assert witness() is None
        finally:
            gc.enable()
