"""Generate's handler over an engine whose runs end when the test says so."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from tests.support.fake_engine import FakeEngine, turns
from tests.support.server import eventually

from modelyard.v1 import inference_service_pb2 as pb
from modelyard_server.errors import Refusal
from modelyard_server.runtimes.sessions import SESSION, SessionAnswer
from modelyard_server.services.asked import Asked
from modelyard_server.services.generation import GenerationService
from modelyard_server.services.inference import InferenceFigures
from modelyard_server.transport.api import Call, StatusReply


class CountedLease:
    """Counts how often it was given back."""

    def __init__(self) -> None:
        self.handle = SimpleNamespace(core_id=7, finished_runs=0, name="m")
        self.device = 0
        self.releases = 0
        self.is_aside = False

    def set_aside(self) -> None:
        self.is_aside = True

    def release(self) -> None:
        self.releases += 1


class Inference:
    """What the handler needs of the service beside it, for one model that is there."""

    def __init__(self, lease: CountedLease, timeout_s: float) -> None:
        self.model = SimpleNamespace(
            id="m", handle=SimpleNamespace(spec=SimpleNamespace(task="text-generation"))
        )
        self.figures = InferenceFigures()
        self.refusals: list[Refusal] = []
        self._lease = lease
        self._timeout_s = timeout_s

    def meaning_of(self, key: str) -> Any:
        return self.model

    def asked(self, key: str, meant: Any, inputs: Any, *rest: Any) -> Asked:
        return Asked(key, meant, inputs, {})

    def timeout_s(self, call: Call) -> float:
        return self._timeout_s

    def try_lease(self, asked: Any, deadline_ns: int) -> CountedLease:
        return self._lease

    def note_refused(self, facts: Any, refusal: Refusal) -> None:
        self.refusals.append(refusal)


async def test_a_reader_that_does_not_read_holds_no_model_beyond_its_deadline() -> None:
    lease, engine = CountedLease(), FakeEngine()
    inference = Inference(lease, timeout_s=1.0)
    service = GenerationService(
        cast(Any, inference),
        engine=engine,
        device_names=("devices/cpu",),
    )
    request = pb.GenerateRequest(key="k", prompt="the cat").SerializeToString()
    messages = service.generate(Call(request, lambda: (), None))
    first = asyncio.ensure_future(anext(messages))
    await turns()
    engine.runs[0].finish(SessionAnswer(token_ids=(5,), text="sat", token_count=1).values())
    body = await first
    assert isinstance(body, bytes)
    assert pb.GenerateResponse.FromString(body).text == "sat"
    assert lease.is_aside
    # The next message is not asked for, so nothing is asked of the model but to forget it all.
    await eventually("the deadline has passed", lambda: len(engine.runs) > 1)
    (said,) = [run.parameters[SESSION] for run in engine.runs[1:]]
    assert said == {"close": engine.runs[0].parameters[SESSION]["open"]}
    assert lease.releases == 0
    engine.runs[1].finish(SessionAnswer().values())
    assert lease.releases == 1
    # Who comes back to read is told why there is no more.
    assert isinstance(await anext(messages), StatusReply)
    assert [refusal.reason.name for refusal in inference.refusals] == ["DEADLINE_IN_RUN"]
    await messages.aclose()
    assert lease.releases == 1
    assert inference.figures.active_count == 0
