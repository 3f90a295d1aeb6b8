"""One device's lane: the one worker that runs what is to run there, in order.

A lane is a thread, because what it runs is C++ code that gives up the interpreter's lock. Work goes
in from the event loop and its outcome comes back there. Both ways are batched: the thread takes
what is there without asking the loop, and however much it finishes before the loop looks, the loop
is woken once. On a busy server that is the difference between two system calls a request and two
for dozens.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

__all__ = ["Lane", "LaneJob"]


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
        prepare: called once in the thread before the first job.
    """

    def __init__(
        self,
        name: str,
        loop: asyncio.AbstractEventLoop,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._loop = loop
        self._prepare = prepare
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

    async def stop(self) -> None:
        """Ends the thread once what was submitted has run, and delivers the last outcomes."""
        self._jobs.put(None)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)
        self._deliver()

    def _work(self) -> None:
        if self._prepare is not None:
            self._prepare()
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
            job.on_done(job)


def _run(job: LaneJob) -> None:
    run, job.run = job.run, None
    if not job.wanted or run is None:
        job.dropped = True
        return
    try:
        job.result = run()
    except BaseException as error:  # the lane's edge: it becomes the job's outcome
        job.error = error
