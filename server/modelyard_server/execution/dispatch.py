"""Runs one leased request: gives it to the engine, waits for it, gives the lease back.

The lease goes back when the work has really ended, not when the caller has gone: a thread that
computes cannot be stopped, and a model that is being used must not be unloaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from modelyard_server.errors import Reason, Refusal
from modelyard_server.execution.engine import Engine, RunOutcome, Work, nobody
from modelyard_server.residency.shell import Lease
from modelyard_server.runtimes.api import JsonValue
from modelyard_server.runtimes.tensors import TensorValue

__all__ = ["run_leased"]


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
        OptionError: a parameter the model does not know.
        ModelFailed: the model raised, or ended its worker.
        WorkerLost: its worker died before the work began.
    """
    pending = _Pending(lease)
    try:
        work = engine.run(
            lease.handle.core_id, inputs, parameters, pending.settle, client, waited_s
        )
    except BaseException:
        lease.release()
        raise
    if not pending.settled:
        await _wait(pending, work, timeout_s)
    if isinstance(pending.outcome, BaseException):
        try:
            raise pending.outcome
        finally:
            # Or the error's traceback would hold this frame, and this frame the error: the inputs
            # would stay until the garbage collector comes by.
            del pending, work
    assert pending.outcome is not None  # Only abandoned work has none, and only _wait abandons.
    return pending.outcome


class _Pending:
    """A request that was given to the engine, and what became of it."""

    __slots__ = ("_lease", "outcome", "settled", "waiter")

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self.outcome: RunOutcome | None = None
        self.settled = False
        self.waiter: asyncio.Future[None] | None = None

    def settle(self, outcome: RunOutcome | None) -> None:
        if isinstance(outcome, tuple):
            self._lease.handle.finished_runs += 1  # Speaks for the model when a worker dies.
        self._lease.release()
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
        waiter.set_exception(
            Refusal(Reason.DEADLINE_IN_RUN, "the deadline passed while the model ran")
        )
