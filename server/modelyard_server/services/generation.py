"""modelyard.v1.InferenceService.Generate: text as it comes.

A generation holds one lease, and goes on by runs of a few tokens (runtimes/sessions.py). The next
run is asked for when the message before is on its way, so a reader that does not read stops its
generation and nothing piles up here; its deadline ends it.

What it has begun in a model is ended in any case: by itself, or by a last run that closes the
session, before the lease goes back.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from time import monotonic_ns
from typing import Any, Final, assert_never

from google.protobuf.message import DecodeError

from modelyard.v1 import inference_service_pb2 as pb
from modelyard_server.catalog.model import Model
from modelyard_server.errors import QuotaViolation, Reason, Refusal, Violation
from modelyard_server.execution.dispatch import LeasedRuns
from modelyard_server.execution.engine import Engine, ModelFailed, WorkerLost
from modelyard_server.residency.shell import Lease
from modelyard_server.routing.resolve import Absent, Run
from modelyard_server.runtimes.api import OptionError
from modelyard_server.runtimes.sessions import (
    MOST_AT_ONCE,
    MOST_STOPS,
    Closing,
    Going,
    Opening,
    SessionAnswer,
    SessionState,
)
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue
from modelyard_server.services.asked import Asked, AskedRoute
from modelyard_server.services.handler import invalid
from modelyard_server.services.inference import MOST_WORKERS, InferenceService, served_of
from modelyard_server.services.request_log import RequestFacts
from modelyard_server.services.status import reply_of
from modelyard_server.transport.api import Call, StatusReply

__all__ = ["GenerationService"]

_TASK: Final = "text-generation"
_MOST_STOP_BYTES: Final = 256
_MOST_TEMPERATURE: Final = 10.0
_NS: Final = 1_000_000_000
_RELOAD_S: Final = 0.1
"""When a model of a worker that died may be there again."""
_FULL_RETRY_S: Final = 0.5


@dataclass(slots=True)
class _Wanted:
    """A request, read and checked in itself.

    Attributes:
        asked: what its key means.
        opening: what the session is to do; its id is another one for each lease.
    """

    asked: Asked
    opening: Opening


class GenerationService:
    """Answers Generate.

    Args:
        inference: counts requests, waits for models, and knows deadlines.
        engine: runs them.
        device_names: resource names of the devices, by position.
    """

    def __init__(
        self,
        inference: InferenceService,
        *,
        engine: Engine,
        device_names: tuple[str, ...],
    ) -> None:
        self._inference = inference
        self._engine = engine
        self._device_names = device_names

    async def generate(self, call: Call) -> AsyncGenerator[bytes | StatusReply, None]:
        """See InferenceService.Generate in proto/modelyard/v1/inference_service.proto."""
        figures = self._inference.figures
        figures.active_count += 1
        facts = RequestFacts(monotonic_ns())
        try:
            async with aclosing(self._generate(call, facts)) as messages:
                async for message in messages:
                    if message.finish:
                        self._inference.note_answered(facts)
                    yield message.SerializeToString()
            return
        except Refusal as refusal:
            self._inference.note_refused(facts, refusal)
            end = reply_of(refusal)
        finally:
            figures.active_count -= 1
        yield end

    async def _generate(
        self, call: Call, facts: RequestFacts
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        wanted = self._read(call.body, facts)
        timeout_s = self._inference.timeout_s(call)
        facts.arrived_ns = monotonic_ns()
        client = call.client()
        has_sent = False
        for attempt in range(1, MOST_WORKERS + 1):
            lease = await self._lease(wanted, facts, timeout_s)
            try:
                messages = self._of_lease(wanted, lease, facts, timeout_s, client)
                async with aclosing(messages):
                    async for message in messages:
                        has_sent = True
                        yield message
                return
            except WorkerLost as error:
                # What was sent cannot be taken back, and another text might begin otherwise.
                if has_sent or attempt == MOST_WORKERS:
                    raise Refusal(Reason.WORKER_LOST, error.text, retry_after_s=_RELOAD_S) from None

    # --- The steps of one request -------------------------------------------------------------

    def _read(self, body: bytes, facts: RequestFacts) -> _Wanted:
        request = pb.GenerateRequest()
        try:
            request.ParseFromString(body)
        except DecodeError:
            raise invalid(Violation("", "the message is no GenerateRequest")) from None
        facts.key = request.key
        meant = self._inference.meaning_of(request.key)
        if violations := [*_violations(request)]:
            raise invalid(*violations)
        prompt = TensorValue(name="prompt", dtype=DType.TEXT, shape=(1,), data=(request.prompt,))
        asked = self._inference.asked(
            request.key, meant, (prompt,), {}, request.affinity, request.version, facts
        )
        if isinstance(asked, AskedRoute):
            asked = self._chosen(asked, facts)
        _check_task(asked.model)
        return _Wanted(
            asked,
            Opening(
                id=_new_id(),
                max_new_tokens=request.max_new_tokens or None,
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p or 1.0,
                seed=request.seed if request.HasField("seed") else secrets.randbits(63),
                stops=tuple(request.stop),
            ),
        )

    def _chosen(self, asked: AskedRoute, facts: RequestFacts) -> Asked:
        """The request for the one model that a route leads this one to.

        Raises:
            Refusal: it leads to more than one, or to none that is there.
        """
        plan = self._inference.plan(asked)
        if isinstance(plan, Absent):
            raise plan.refusal
        if not isinstance(plan, Run):
            text = "means more than one model for a request: text is generated by one"
            raise invalid(Violation("key", text))
        facts.model, facts.branch, facts.version = plan.model.id, plan.branch, plan.version
        # A model's id is a key of its own.
        return Asked(plan.model.id, plan.model, asked.inputs, {})

    async def _lease(self, wanted: _Wanted, facts: RequestFacts, timeout_s: float) -> Lease:
        """Waits for the model, which is another one if the key has got another meaning."""
        deadline_ns = facts.arrived_ns + int(timeout_s * _NS)
        lease = self._inference.try_lease(wanted.asked, deadline_ns)
        _check_task(wanted.asked.model, lease)
        if lease is None:
            facts.cold = True
            lease = await self._inference.wait(wanted.asked, deadline_ns)
            facts.load_s = lease.load_s
        # It lasts, and others have their turn between its runs.
        lease.set_aside()
        facts.leased_ns = monotonic_ns()
        facts.device = self._device_names[lease.device]
        facts.model = lease.handle.name
        return lease

    async def _of_lease(
        self,
        wanted: _Wanted,
        lease: Lease,
        facts: RequestFacts,
        timeout_s: float,
        client: str,
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The messages of a generation that has its model. Takes the lease over.

        Raises:
            WorkerLost: the model is gone.
            Refusal: whatever else goes wrong.
        """
        opening = replace(wanted.opening, id=_new_id())
        waited_s = (facts.leased_ns - facts.arrived_ns) / _NS
        runs = LeasedRuns(self._engine, lease, client)
        closing: Mapping[str, Any] | None = Closing(id=opening.id).parameters()
        # Also while the message before waits for its reader.
        timer = asyncio.get_running_loop().call_later(
            max(0.0, timeout_s - waited_s), runs.end, closing
        )
        message = pb.GenerateResponse()
        most = 1
        try:
            answer = await self._run(
                runs, wanted.asked, opening, facts, timeout_s, waited_s, wanted.asked.inputs
            )
            while True:
                message.token_ids.extend(answer.token_ids)
                message.text += answer.text
                if answer.finish:
                    closing = None
                    break
                if message.text:
                    yield message
                    message = pb.GenerateResponse()
                # Few at first, so that the first words are there early.
                most = min(2 * most, MOST_AT_ONCE)
                going = Going(id=opening.id, most=most)
                answer = await self._run(runs, wanted.asked, going, facts, timeout_s)
        except (_NothingBegun, WorkerLost) as error:
            closing = None
            raise error.refusal if isinstance(error, _NothingBegun) else error from None
        finally:
            timer.cancel()
            runs.end(closing)
        facts.ended_ns = monotonic_ns()
        message.finish = pb.FinishReason.ValueType(answer.finish)
        message.prompt_token_count = answer.prompt_token_count
        message.token_count = answer.token_count
        message.served.CopyFrom(served_of(facts))
        yield message

    async def _run(
        self,
        runs: LeasedRuns,
        asked: Asked,
        command: Opening | Going,
        facts: RequestFacts,
        timeout_s: float,
        waited_s: float = 0.0,
        inputs: tuple[TensorValue, ...] = (),
    ) -> SessionAnswer:
        left_s = timeout_s - (monotonic_ns() - facts.arrived_ns) / _NS
        if left_s <= 0:
            raise Refusal(Reason.DEADLINE_IN_RUN, "the deadline passed while the model ran")
        try:
            outputs = await runs.run(inputs, command.parameters(), left_s, waited_s)
        except OptionError as error:
            raise _NothingBegun(invalid(Violation(error.option, error.text))) from None
        except TensorError as error:
            raise _NothingBegun(invalid(Violation("prompt", error.text))) from None
        except ModelFailed as error:
            raise self._inference.failure_of(asked.model, error) from None
        answer = SessionAnswer.of(outputs)
        match answer.state:
            case SessionState.OK:
                return answer
            case SessionState.FULL:
                raise _NothingBegun(_full(facts.model))
            case SessionState.GONE:
                raise WorkerLost("the model does not know this generation any more")
            case _:
                assert_never(answer.state)


class _NothingBegun(Exception):
    """There is no session that would have to be closed.

    Attributes:
        refusal: what the caller is told.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


def _new_id() -> str:
    # Only who has it can touch the session, and it never leaves the server.
    return secrets.token_hex(16)


def _violations(request: pb.GenerateRequest) -> list[Violation]:
    """Everything that is wrong with a request in itself."""
    found: list[Violation] = []

    def check(field: str, holds: bool, text: str) -> None:
        if not holds:
            found.append(Violation(field, text))

    check("prompt", bool(request.prompt), "must not be empty")
    check("max_new_tokens", request.max_new_tokens >= 0, "must not be negative")
    check("stop", len(request.stop) <= MOST_STOPS, f"must be at most {MOST_STOPS} texts")
    for index, stop in enumerate(request.stop[: MOST_STOPS + 1]):
        check(
            f"stop[{index}]",
            1 <= len(stop.encode()) <= _MOST_STOP_BYTES,
            f"must have 1 to {_MOST_STOP_BYTES} bytes",
        )
    # Not written as what it must not be: of what is no number, nothing is true.
    check(
        "temperature",
        0.0 <= request.temperature <= _MOST_TEMPERATURE,
        f"must be a number from 0 to {_MOST_TEMPERATURE:g}",
    )
    check("top_k", request.top_k >= 0, "must not be negative")
    check("top_p", 0.0 <= request.top_p <= 1.0, "must be a number from 0 to 1")
    return found


def _check_task(model: Model, lease: Lease | None = None) -> None:
    """Gives the lease back and raises if a model does not generate."""
    task = model.handle.spec.task
    if task == _TASK:
        return
    if lease is not None:
        lease.release()
    shown = f"of the task {task!r}" if task else "without a task"
    text = f"means a model {shown}; Generate takes those of the task {_TASK!r}"
    raise invalid(Violation("key", text))


def _full(model: str) -> Refusal:
    text = "as many generations go on as its memory is meant for"
    return Refusal(
        Reason.QUEUE_FULL,
        f"the model {model!r} is busy: {text}",
        quota=(QuotaViolation(f"models/{model}", text),),
        retry_after_s=_FULL_RETRY_S,
    )
