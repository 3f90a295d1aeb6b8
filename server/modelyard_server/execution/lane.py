"""A lane: one worker that runs what is to run there, in turn. Every device has one for its models.

What may run together does; see batcher.py. All else runs by itself, in the order it came.

A lane is a thread, because what it runs is C++ code that gives up the interpreter's lock. Work goes
in from the event loop and its outcome comes back there. Both ways are batched: the thread takes
what is there without asking the loop, and however much it finishes before the loop looks, the loop
is woken once. On a busy server that is the difference between two system calls a request and two
for dozens.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from time import monotonic, thread_time
from typing import Any, Final, Protocol, TypeVar

from modelyard_server.execution.batcher import BatchLimits, Ended, Line, Taken
from modelyard_server.execution.figures import LaneFigures
from modelyard_server.runtimes.api import Prepared

__all__ = ["Lane", "LaneFigures", "LaneJob", "Seat", "Together"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


_ALONE: Final = BatchLimits(most_rows=1)


class Together(Protocol):
    """Runs jobs of one kind together. In the lane's thread only. Its methods are not to raise.

    Attributes:
        split_count: how often its last run_batch found that a batch, or a part of one, had failed
            and was to be run again in parts.
    """

    split_count: int

    def prepare(self) -> Prepared | BaseException | None:
        """Makes one job ready.

        Returns:
            None if it runs alone; an error, not raised, if that is what the job comes to.
        """

    def run_batch(self, requests: Sequence[Prepared]) -> Sequence[Any | BaseException]:
        """Runs several that prepare has returned: of each what it came to, in order.

        Errors among them are not to hold the frames that they were raised in.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where in the line a job belongs.

    Attributes:
        group: of the jobs that may run together.
        client: whose it is; empty if that is not known. Clients of a group take turns.
        together: makes this job ready, and runs others of its group with it.
        since: when its request began to wait, by time.monotonic.
    """

    group: Hashable
    client: str
    together: Together
    since: float


class LaneJob:
    """A piece of work and what became of it.

    Args:
        run: what the lane's thread calls if it runs alone.
        on_done: see below.
        seat: where it belongs; None to run alone, in the order in which it came.

    Attributes:
        run: what the lane's thread calls; None afterwards, so that a finished job holds no model.
        seat: where it belongs; None afterwards.
        is_brief: it was submitted as one that takes less than a thread would.
        prepared: what is known of it once the lane has looked at it; None afterwards.
        on_done: called on the event loop, once, when the work has really ended or was dropped.
        result: what run returned, once done.
        error: what run raised, once done. Its traceback is kept for the log; whoever is done with
            the job drops the job.
        dropped: True if it never ran.
    """

    __slots__ = (
        "_wanted",
        "dropped",
        "error",
        "is_brief",
        "is_looked_at",
        "on_done",
        "prepared",
        "result",
        "run",
        "seat",
    )

    def __init__(
        self,
        run: Callable[[], Any],
        on_done: Callable[[LaneJob], None],
        seat: Seat | None = None,
    ) -> None:
        self.run: Callable[[], Any] | None = run
        self.seat = seat
        self.prepared: Prepared | None = None
        self.is_looked_at = False
        self.is_brief = False
        self.on_done = on_done
        self.result: Any = None
        self.error: BaseException | None = None
        self.dropped = False
        self._wanted = True

    def abandon(self) -> None:
        """Says that nobody wants the outcome: work that has not begun will not."""
        self._wanted = False

    @property
    def wanted(self) -> bool:
        """False once abandoned."""
        return self._wanted


class Lane:
    """A thread that runs jobs, one or one batch at a time.

    Invariants: every submitted job's on_done is called exactly once, on the loop, also when the
    lane stops. Jobs without a seat run in the order in which they were given. Submit only from the
    loop's thread.

    Args:
        name: of the thread, for people who look at stacks.
        loop: where outcomes go.
        limits: of batches; None for none: every job runs alone.
        on_ran: is told the figures whenever they have changed, where they have; must not raise.

    Attributes:
        figures: what it has run. Written by its thread, and by the loop's while that is idle.
    """

    def __init__(
        self,
        name: str,
        loop: asyncio.AbstractEventLoop,
        limits: BatchLimits | None = None,
        on_ran: Callable[[LaneFigures], None] | None = None,
    ) -> None:
        self._loop = loop
        self._limits = limits or _ALONE
        self._on_ran = on_ran
        self.figures = LaneFigures()
        self._jobs: SimpleQueue[LaneJob | None] = SimpleQueue()
        self._done: deque[LaneJob] = deque()
        self._delivering = False
        self._unfinished = 0
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: LaneJob) -> None:
        """Puts a job at the end of the line."""
        self._unfinished += 1
        self._jobs.put(job)

    @property
    def unfinished(self) -> int:
        """Jobs that run or wait."""
        return self._unfinished

    def submit_brief(self, job: LaneJob) -> None:
        """Runs a job that takes less than a thread would, at once if the lane is idle.

        Its on_done has been called when this returns; unless others are before it, behind whom it
        waits its turn.
        """
        job.is_brief = True
        if self._unfinished:
            self.submit(job)
            return
        _run(job)
        self._note_unshared()
        job.on_done(job)

    async def call(self, function: Callable[[], T]) -> T:
        """Runs a function in the lane and returns its result, or raises what it raised.

        Exceptions that would end more than the call (SystemExit, KeyboardInterrupt) or that a
        coroutine cannot raise (StopIteration) come out as RuntimeError.
        """
        answer: asyncio.Future[T] = self._loop.create_future()

        def on_done(job: LaneJob) -> None:
            if answer.done():
                return
            if job.error is None:
                answer.set_result(job.result)
            elif isinstance(job.error, Exception) and not isinstance(job.error, StopIteration):
                answer.set_exception(job.error)
            else:
                error = RuntimeError(f"raised {type(job.error).__name__}")
                error.__cause__ = job.error
                answer.set_exception(error)

        self.submit(LaneJob(function, on_done))
        return await answer

    async def stop(self, timeout_s: float) -> bool:
        """Ends the thread once what was submitted has run, and delivers the last outcomes.

        Args:
            timeout_s: how long to wait for that.

        Returns:
            False if it still runs. It is left behind; only the end of the process ends it.
        """
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join, timeout_s)
        self._deliver()
        return not self._thread.is_alive()

    def _work(self) -> None:
        line: Line[LaneJob] = Line(self._limits)
        is_stopping = False
        while True:
            # Nothing of the last jobs may live in here while it waits for the next one.
            is_stopping = self._let_in(line, waits=not (line or is_stopping)) or is_stopping
            if not line:
                if is_stopping:
                    return
                continue
            self._run_next(line)

    def _let_in(self, line: Line[LaneJob], *, waits: bool) -> bool:
        """Lets those into the line that have come. Returns True if there are none to come."""
        jobs = self._jobs
        is_last = False
        for _ in range(max(jobs.qsize(), 1 if waits else 0)):
            job = jobs.get()
            if job is None:
                is_last = True
            elif job.seat is None:
                line.add(job, job, "", monotonic())
            else:
                line.add(job, job.seat.group, job.seat.client, job.seat.since)
        return is_last

    def _run_next(self, line: Line[LaneJob]) -> None:
        taken = line.take(_look)
        if taken.ended:
            self._tell(taken.ended)
        if taken.prepared:
            # Of this thread: what others compute meanwhile is not the batch's fault.
            began = thread_time()
            split_count = _run_together(taken)
            if not split_count:
                line.note_run(taken, thread_time() - began)
            self.figures.note_batch(taken.prepared, split_count)
            self._tell_figures()
        else:
            for job in taken.batch:
                # What has no seat may be anything that is to be done in this thread.
                is_request = job.seat is not None or job.is_brief
                _run(job)
                if is_request and not job.dropped:
                    self._note_unshared()
                del job
        if taken.batch:
            self._tell(taken.batch)
        del taken  # An error that was raised in a job remembers this frame.

    def _note_unshared(self) -> None:
        self.figures.unshared_count += 1
        self._tell_figures()

    def _tell_figures(self) -> None:
        if self._on_ran is not None:
            self._on_ran(self.figures)

    def _tell(self, jobs: Sequence[LaneJob]) -> None:
        self._done.extend(jobs)
        # The loop clears the flag before it takes outcomes, so one that is appended after the
        # flag was seen set is taken all the same.
        if not self._delivering:
            self._delivering = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._delivering = False
        done = self._done
        while done:
            job = done.popleft()
            self._unfinished -= 1
            try:
                job.on_done(job)
            except Exception:  # one outcome's receiver must not cost the others theirs
                logger.exception("the receiver of an outcome failed")


def _run(job: LaneJob) -> None:
    run = job.run
    _let_go(job)
    if not job.wanted or run is None:
        job.dropped = True
        return
    try:
        job.result = run()
    except BaseException as error:  # the lane's edge: it becomes the job's outcome
        job.error = error


def _look(job: LaneJob) -> Prepared | Ended | None:
    """Prepares a job that comes up. It is over if nobody wants it, or if it cannot be prepared."""
    if not job.wanted:
        job.dropped = True
        _let_go(job)
        return Ended.ENDED
    if job.seat is None:
        return None
    if not job.is_looked_at:
        job.is_looked_at = True
        prepared = job.seat.together.prepare()
        if isinstance(prepared, BaseException):
            job.error = prepared
            _let_go(job)
            return Ended.ENDED
        job.prepared = prepared
    return job.prepared


def _run_together(taken: Taken[LaneJob]) -> int:
    """Runs a batch. Returns how often it, or a part of it, was run again in parts."""
    seat = taken.batch[0].seat
    assert seat is not None  # Only those with a seat are prepared.
    for job in taken.batch:
        _let_go(job)
    try:
        outcomes = seat.together.run_batch(taken.prepared)
    except BaseException as error:  # the lane's edge: whoever's mistake it is, the lane lives
        outcomes = [error.with_traceback(None)] * len(taken.batch)
    for job, outcome in zip(taken.batch, outcomes, strict=True):
        if isinstance(outcome, BaseException):
            job.error = outcome
        else:
            job.result = outcome
    return seat.together.split_count


def _let_go(job: LaneJob) -> None:
    """Whoever holds a job that is over holds no model by it."""
    job.run = None
    job.seat = None
    job.prepared = None
