"""A lane: one worker that runs what is to run there, in order. Every device has one for its models.

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
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

__all__ = ["Lane", "LaneJob"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class LaneJob:
    """A piece of work and what became of it.

    Attributes:
        run: what the lane's thread calls; None afterwards, so that a finished job holds no model.
        on_done: called on the event loop, once, when the work has really ended or was dropped.
        result: what run returned, once done.
        error: what run raised, once done. Its traceback is kept for the log; whoever is done with
            the job drops the job.
        dropped: True if it never ran.
    """

    __slots__ = ("_wanted", "dropped", "error", "on_done", "result", "run")

    def __init__(self, run: Callable[[], Any], on_done: Callable[[LaneJob], None]) -> None:
        self.run: Callable[[], Any] | None = run
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
    """A thread that runs jobs one at a time, in the order they were given.

    Invariants: every submitted job's on_done is called exactly once, on the loop, also when the
        lane
    stops. Submit only from the loop's thread.

    Args:
        name: of the thread, for people who look at stacks.
        loop: where outcomes go.
    """

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._jobs: SimpleQueue[LaneJob | None] = SimpleQueue()
        self._done: deque[LaneJob] = deque()
        self._delivering = False
        self._unfinished = 0
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: LaneJob) -> None:
        """Queues a job behind the others."""
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
        if self._unfinished:
            self.submit(job)
            return
        _run(job)
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
        take = self._jobs.get
        while (job := take()) is not None:
            _run(job)
            self._done.append(job)
            # The loop clears the flag before it takes outcomes, so one that is appended after the
            # flag was seen set is taken all the same.
            if not self._delivering:
                self._delivering = True
                self._loop.call_soon_threadsafe(self._deliver)
            del job  # Or its result would live until the next job comes.

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
    run, job.run = job.run, None
    if not job.wanted or run is None:
        job.dropped = True
        return
    try:
        job.result = run()
    except BaseException as error:  # the lane's edge: it becomes the job's outcome
        job.error = error
