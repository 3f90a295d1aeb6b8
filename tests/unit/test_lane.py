"""A device's lane: one worker, in order, and an outcome for every job."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest

from modelyard_server.execution.lane import Lane, LaneJob

PATIENCE_S = 60


@pytest.fixture
async def lane() -> AsyncIterator[Lane]:
    unexpected: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: unexpected.append(context))
    made = Lane("test-lane", loop)
    yield made
    await made.stop(PATIENCE_S)
    assert not any(thread.name == "test-lane" for thread in threading.enumerate())
    assert not unexpected


class Outcomes:
    """What came back, in order, and who waits for how many."""

    def __init__(self) -> None:
        self.jobs: list[LaneJob] = []
        self.threads: list[int] = []
        self._changed = asyncio.Event()

    def add(self, job: LaneJob) -> None:
        self.jobs.append(job)
        self.threads.append(threading.get_ident())
        self._changed.set()

    async def reach(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.jobs) < count:
                self._changed.clear()
                await self._changed.wait()


async def test_jobs_run_one_at_a_time_in_order_on_one_other_thread(lane: Lane) -> None:
    outcomes, ran = Outcomes(), []
    running = threading.Lock()

    def work(number: int) -> int:
        assert running.acquire(blocking=False), "two jobs at once"
        ran.append((number, threading.get_ident()))
        running.release()
        return number

    for number in range(50):
        lane.submit(LaneJob(partial(work, number), outcomes.add))
    await outcomes.reach(50)
    assert [number for number, _ in ran] == list(range(50))
    assert [job.result for job in outcomes.jobs] == list(range(50))
    assert {thread for _, thread in ran} != {threading.get_ident()}
    assert len({thread for _, thread in ran}) == 1
    assert set(outcomes.threads) == {threading.get_ident()}
    assert not any(job.dropped or job.error for job in outcomes.jobs)


async def test_a_brief_job_runs_in_place_while_the_lane_is_idle(lane: Lane) -> None:
    outcomes = Outcomes()
    job = LaneJob(threading.get_ident, outcomes.add)
    lane.submit_brief(job)
    assert outcomes.jobs == [job]
    assert job.result == threading.get_ident()


async def test_a_brief_job_waits_its_turn_behind_others(lane: Lane) -> None:
    outcomes, gate = Outcomes(), threading.Event()
    first = LaneJob(lambda: gate.wait(PATIENCE_S), outcomes.add)
    brief = LaneJob(threading.get_ident, outcomes.add)
    lane.submit(first)
    lane.submit_brief(brief)
    assert not outcomes.jobs
    gate.set()
    await outcomes.reach(2)
    assert outcomes.jobs == [first, brief]
    assert brief.result != threading.get_ident()
    # Idle again.
    again = LaneJob(threading.get_ident, outcomes.add)
    lane.submit_brief(again)
    assert again.result == threading.get_ident()


async def test_a_brief_job_waits_while_an_outcome_before_it_is_undelivered(lane: Lane) -> None:
    outcomes, ran = Outcomes(), threading.Event()
    first = LaneJob(ran.set, outcomes.add)
    lane.submit(first)
    ran.wait(PATIENCE_S)  # It has run; the loop has not come to its outcome yet.
    brief = LaneJob(lambda: None, outcomes.add)
    lane.submit_brief(brief)
    await outcomes.reach(2)
    assert outcomes.jobs == [first, brief]


async def test_a_job_abandoned_before_it_runs_never_runs(lane: Lane) -> None:
    outcomes, gate, ran = Outcomes(), threading.Event(), []
    lane.submit(LaneJob(lambda: gate.wait(PATIENCE_S), outcomes.add))
    job = LaneJob(lambda: ran.append(1), outcomes.add)
    lane.submit(job)
    job.abandon()
    assert not job.wanted
    gate.set()
    await outcomes.reach(2)
    assert outcomes.jobs[1] is job
    assert job.dropped
    assert (job.result, job.error, ran) == (None, None, [])
    brief = LaneJob(lambda: ran.append(2), outcomes.add)
    brief.abandon()
    lane.submit_brief(brief)
    assert brief.dropped
    assert not ran


async def test_a_job_abandoned_while_it_runs_ends_as_always(lane: Lane) -> None:
    outcomes, began, gate = Outcomes(), threading.Event(), threading.Event()

    def work() -> str:
        began.set()
        gate.wait(PATIENCE_S)
        return "done"

    job = LaneJob(work, outcomes.add)
    lane.submit(job)
    began.wait(PATIENCE_S)
    job.abandon()
    gate.set()
    await outcomes.reach(1)
    assert not job.dropped
    assert job.result == "done"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("v"),
        SystemExit(3),
        KeyboardInterrupt(),
        StopIteration(),
        asyncio.CancelledError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_whatever_a_job_raises_is_its_outcome_and_the_lane_lives(
    lane: Lane, error: BaseException
) -> None:
    outcomes = Outcomes()

    def work() -> None:
        raise error

    lane.submit(LaneJob(work, outcomes.add))
    await outcomes.reach(1)
    lane.submit_brief(LaneJob(work, outcomes.add))
    lane.submit(LaneJob(lambda: "alive", outcomes.add))
    await outcomes.reach(3)
    assert outcomes.jobs[0].error is error
    assert outcomes.jobs[1].error is error
    assert outcomes.jobs[2].result == "alive"


async def test_stop_runs_what_was_submitted_and_delivers_every_outcome_once() -> None:
    lane = Lane("test-lane", asyncio.get_running_loop())
    outcomes, gate = Outcomes(), threading.Event()
    jobs = [LaneJob(lambda: gate.wait(PATIENCE_S), outcomes.add)]
    jobs += [LaneJob(lambda: None, outcomes.add) for _ in range(20)]
    jobs[3].abandon()
    for job in jobs:
        lane.submit(job)
    stopping = asyncio.create_task(lane.stop(PATIENCE_S))
    await asyncio.sleep(0)
    assert not stopping.done()
    gate.set()
    await asyncio.wait_for(stopping, PATIENCE_S)
    await asyncio.sleep(0)
    assert outcomes.jobs == jobs
    assert [job.dropped for job in jobs] == [i == 3 for i in range(21)]


async def test_an_on_done_that_raises_costs_no_other_job_its_outcome() -> None:
    lane = Lane("test-lane", asyncio.get_running_loop())
    asyncio.get_running_loop().set_exception_handler(lambda _, context: None)
    outcomes, ran = Outcomes(), threading.Event()

    def fail(job: LaneJob) -> None:
        raise RuntimeError("its owner's mistake")

    lane.submit(LaneJob(lambda: None, fail))
    lane.submit(LaneJob(lambda: None, outcomes.add))
    lane.submit(LaneJob(ran.set, outcomes.add))
    ran.wait(PATIENCE_S)  # All three have run before the loop delivers the first.
    for _ in range(10):
        await asyncio.sleep(0)
    delivered = len(outcomes.jobs)
    await lane.stop(PATIENCE_S)
    assert delivered == 2


async def test_a_job_may_submit_the_next_from_its_on_done(lane: Lane) -> None:
    outcomes = Outcomes()

    def again(job: LaneJob) -> None:
        outcomes.add(job)
        if len(outcomes.jobs) < 5:
            lane.submit(LaneJob(lambda: None, again))

    lane.submit(LaneJob(lambda: None, again))
    await outcomes.reach(5)


async def test_nothing_keeps_the_jobs_model_or_result_alive_afterwards(lane: Lane) -> None:
    class Model:
        def run(self) -> Model:
            return self

    delivered = asyncio.Event()
    model = Model()
    witness = weakref.ref(model)
    gc.disable()
    try:
        lane.submit(LaneJob(model.run, lambda job: delivered.set()))
        lane.submit(LaneJob(partial(id, model), lambda job: None))
        del model
        async with asyncio.timeout(PATIENCE_S):
            await delivered.wait()
            done = asyncio.Event()
            lane.submit(LaneJob(lambda: None, lambda job: done.set()))
            await done.wait()
        # The thread waits for its next job now and must hold nothing of the last ones.
        for _ in range(5):
            await asyncio.sleep(0)
        assert witness() is None
    finally:
        gc.enable()


async def test_a_finished_job_holds_no_model_even_if_somebody_holds_the_job(lane: Lane) -> None:
    class Model:
        def run(self) -> int:
            return 1

    model = Model()
    witness = weakref.ref(model)
    outcomes = Outcomes()
    job = LaneJob(model.run, outcomes.add)
    del model
    lane.submit(job)
    await outcomes.reach(1)
    for _ in range(5):
        await asyncio.sleep(0)
    assert job.result == 1
    assert job.run is None
    assert witness() is None
