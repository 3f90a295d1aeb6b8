"""Runs one leased request: gives it to the engine, waits for it, gives the lease back.

The lease goes back when the work has really ended, not when the caller has gone: a thread that
computes cannot be stopped, and a model that is being used must not be unloaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from modelyard_server.errors import Reason, Refusal
from modelyard_server.execution.engine import Engine, RunOutcome
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
) -> tuple[TensorValue, ...]:
    """Runs a request and returns its outputs. Takes the lease over: it is given back in any case.

    Args:
        engine: what runs it.
        lease: on the model.
        inputs: of the request.
        parameters: of this run.
        timeout_s: how long the caller will wait.

    Raises:
        Refusal: DEADLINE_IN_RUN. The work is counted until it ends.
        TensorError: an input does not fit the model.
        OptionError: a parameter the model does not know.
        ModelFailed: the model raised.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[tuple[TensorValue, ...]] = loop.create_future()

    def on_done(outcome: RunOutcome | None) -> None:
        lease.release()
        if answer.done() or outcome is None:
            return
        if isinstance(outcome, BaseException):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    try:
        work = engine.run(lease.handle.core_id, inputs, parameters, on_done)
    except BaseException:
        lease.release()
        raise
    timer = loop.call_later(max(timeout_s, 0.0), _expire, answer)
    try:
        return await answer
    except (asyncio.CancelledError, Refusal):
        work.abandon()
        raise
    finally:
        timer.cancel()


def _expire(answer: asyncio.Future[tuple[TensorValue, ...]]) -> None:
    if not answer.done():
        answer.set_exception(
            Refusal(Reason.DEADLINE_IN_RUN, "the deadline passed while the model ran")
        )
