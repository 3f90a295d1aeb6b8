"""Runs leased requests: gives them to the engine, waits for them, gives the lease back.

The lease goes back when the work has really ended, not when the caller has gone: a thread that
computes cannot be stopped, and a model that is being used must not be unloaded.

One request is one run, or several under one lease (LeasedRuns). Here is also where the parameters
end that only the server may give: whatever a request came by, it comes through run_leased.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from modelyard_server.errors import Reason, Refusal
from modelyard_server.execution.engine import Engine, RunOutcome, Work, nobody
from modelyard_server.residency.shell import Lease
from modelyard_server.runtimes.api import JsonValue, OptionError
from modelyard_server.runtimes.sessions import is_reserved
from modelyard_server.runtimes.tensors import TensorValue

__all__ = ["LeasedRuns", "run_leased"]


async def run_leased(
    engine: Engine,
    lease: Lease,
    inputs: Sequence[TensorValue],
    parameters: Mapping[str, JsonValue],
    timeout_s: float,
    client: Callable[[], str] = nobody,
    waited_s: float = 0.0,
) -> tuple[TensorValue, ...]:
    """Runs a request and returns its outputs. Takes the lease over: it is given back in any case.

    Args:
        engine: what runs it.
        lease: on the model.
        inputs: of the request.
        parameters: of this run.
        timeout_s: how long the caller will wait.
        client: says whose request it is; see Engine.run.
        waited_s: for how long it has waited already; see Engine.run.

    Raises:
        Refusal: DEADLINE_IN_RUN. The work is counted until it ends.
        TensorError: an input does not fit the model.
        OptionError: a parameter the model does not know, or that no client may give.
        ModelFailed: the model raised, or ended its worker.
        WorkerLost: its worker died before the work began.
    """
    if parameters and (reserved := is_reserved(parameters)) is not None:
        lease.release()
        raise OptionError(reserved[:64], "is not known here")
    pending = _Pending(lease, lease.release)
    try:
        work = engine.run(
            lease.handle.core_id, inputs, parameters, pending.settle, client, waited_s
        )
    except BaseException:
        lease.release()
        raise
    if not pending.settled:
        await _wait(pending, work, timeout_s)
    try:
        return _outputs_of(pending)
    finally:
        del pending, work  # See _outputs_of.


class LeasedRuns:
    """Several runs under one lease, one at a time. On the event loop's thread only.

    Takes the lease over. It is given back once `end` was called and what runs has ended.

    Args:
        engine: what runs them.
        lease: on the model.
        client: whose they are; see Engine.run. A text, since the last run may be asked for when
            the call has gone that could have said it.
    """

    def __init__(self, engine: Engine, lease: Lease, client: str = "") -> None:
        self._engine = engine
        self._lease = lease
        self._client = client
        self._running: _Pending | None = None
        self._is_ended = False
        self._last: Mapping[str, JsonValue] | None = None

    @property
    def is_ended(self) -> bool:
        """Whether `end` was called."""
        return self._is_ended

    async def run(
        self,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, JsonValue],
        timeout_s: float,
        waited_s: float = 0.0,
    ) -> tuple[TensorValue, ...]:
        """Does one run and returns its outputs.

        Args:
            inputs: of the run; may be none.
            parameters: of the run, the server's own among them.
            timeout_s: how long the caller will wait.
            waited_s: see run_leased.

        Raises:
            Refusal: DEADLINE_IN_RUN, also if this has been ended.
            Exception: as run_leased.
        """
        assert self._running is None  # One at a time.
        if self._is_ended:
            raise _late()
        pending = _Pending(self._lease, self._settled)
        self._running = pending
        try:
            work = self._start(inputs, parameters, pending, waited_s)
        except BaseException:
            self._running = None
            raise
        if not pending.settled:
            await _wait(pending, work, timeout_s)
        try:
            return _outputs_of(pending)
        finally:
            del pending, work  # See _outputs_of.

    def end(self, last: Mapping[str, JsonValue] | None = None) -> None:
        """Gives the lease back as soon as nothing runs. A second call does nothing.

        Args:
            last: parameters of a run that is to be done before that, whose outcome nobody waits
                for; None for none.
        """
        if self._is_ended:
            return
        self._is_ended = True
        self._last = last
        if self._running is None:
            self._finish()

    def _settled(self) -> None:
        self._running = None
        if self._is_ended:
            self._finish()

    def _finish(self) -> None:
        last, self._last = self._last, None
        if last is None:
            self._lease.release()
            return
        try:
            self._start((), last, _Pending(self._lease, self._settled), 0.0)
        except BaseException:
            self._lease.release()
            raise

    def _start(
        self,
        inputs: Sequence[TensorValue],
        parameters: Mapping[str, JsonValue],
        pending: _Pending,
        waited_s: float,
    ) -> Work:
        model = self._lease.handle.core_id
        return self._engine.run(
            model, inputs, parameters, pending.settle, lambda: self._client, waited_s
        )


def _outputs_of(pending: _Pending) -> tuple[TensorValue, ...]:
    """What became of work that is settled.

    An error's traceback holds the frames that it is raised through. If these held the error, or
    the work it came from, the inputs would stay until the garbage collector comes by.
    """
    outcome = pending.outcome
    if isinstance(outcome, BaseException):
        try:
            raise outcome
        finally:
            del pending, outcome
    assert outcome is not None  # Only abandoned work has none, and only _wait abandons.
    return outcome


class _Pending:
    """A request that was given to the engine, and what became of it."""

    __slots__ = ("_lease", "_on_settled", "outcome", "settled", "waiter")

    def __init__(self, lease: Lease, on_settled: Callable[[], None]) -> None:
        self._lease = lease
        self._on_settled = on_settled
        self.outcome: RunOutcome | None = None
        self.settled = False
        self.waiter: asyncio.Future[None] | None = None

    def settle(self, outcome: RunOutcome | None) -> None:
        if isinstance(outcome, tuple):
            self._lease.handle.finished_runs += 1  # Speaks for the model when a worker dies.
        self._on_settled()
        self.outcome = outcome
        self.settled = True
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


async def _wait(pending: _Pending, work: Work, timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    pending.waiter = waiter = loop.create_future()
    timer = loop.call_later(max(timeout_s, 0.0), _expire, waiter)
    try:
        await waiter
    except (asyncio.CancelledError, Refusal):
        work.abandon()
        raise
    finally:
        timer.cancel()


def _expire(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(_late())


def _late() -> Refusal:
    return Refusal(Reason.DEADLINE_IN_RUN, "the deadline passed while the model ran")
