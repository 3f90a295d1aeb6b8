"""Requests that had not begun when their worker died: the server runs them again by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from tests.support.config_text import CPU
from tests.support.server import RunningApp, running_app

from modelyard import WorkerLost as ClientWorkerLost
from modelyard.v1 import inference_service_pb2 as pb
from modelyard.v1 import tensor_pb2
from modelyard_server.execution.engine import WorkerLost
from modelyard_server.services.inference import MOST_WORKERS

PREDICT = "/modelyard.v1.InferenceService/Predict"
ECHO = '[models.echo]\nruntime = "identity"\n'
REQUEST = pb.PredictRequest(
    key="echo",
    inputs=[
        tensor_pb2.Tensor(
            data_type=tensor_pb2.DATA_TYPE_TEXT,
            shape=[1],
            text=tensor_pb2.TextElements(values=["a"]),
        )
    ],
)


class Losing:
    """Has the first runs end as if their worker had died before they began.

    Attributes:
        runs: how many were asked for.
    """

    def __init__(self, yard: RunningApp, patch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        self._engine = yard.app.engine
        self._run = yard.app.engine.run
        self._patch = patch

    def lose(self, count: int) -> None:
        """Loses so many from now on."""
        self.runs = 0

        def losing(
            model: int, inputs: Any, parameters: Any, on_done: Any, client: Any, waited_s: float
        ) -> Any:
            self.runs += 1
            if self.runs > count:
                return self._run(model, inputs, parameters, on_done, client, waited_s)
            on_done(WorkerLost("its worker died (killed by SIGKILL)"))
            return None

        self._patch.setattr(self._engine, "run", losing)


@pytest.fixture
async def yard(tmp_path: Path) -> AsyncIterator[RunningApp]:
    async with running_app(CPU + ECHO, tmp_path) as running:
        yield running


@pytest.fixture
def losing(yard: RunningApp, monkeypatch: pytest.MonkeyPatch) -> Losing:
    return Losing(yard, monkeypatch)


async def ask(yard: RunningApp) -> pb.PredictResponse:
    """Asks once: this channel does not retry."""
    rpc: Any = yard.channel.unary_unary(PREDICT)
    return pb.PredictResponse.FromString(await rpc(REQUEST.SerializeToString(), timeout=10))


@pytest.mark.parametrize("lost", range(MOST_WORKERS))
async def test_a_request_is_given_to_the_next_workers_without_a_word(
    yard: RunningApp, losing: Losing, lost: int
) -> None:
    losing.lose(lost)
    assert (await ask(yard)).outputs[0].text.values == ["a"]
    assert losing.runs == lost + 1


async def test_a_request_that_begins_in_no_worker_is_given_up_and_its_caller_may_come_again(
    yard: RunningApp, losing: Losing
) -> None:
    losing.lose(MOST_WORKERS)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(yard)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "its worker died (killed by SIGKILL); retry_after_ms=100"
    assert losing.runs == MOST_WORKERS
    # A client does come again, and does not notice.
    losing.lose(MOST_WORKERS)
    assert (await yard.client.predict("echo", ["a"])).only == ["a"]
    assert losing.runs == MOST_WORKERS + 1


@pytest.mark.parametrize("lost", [1, 2, 3])
async def test_items_of_a_batch_are_given_to_the_next_workers_as_requests_are(
    yard: RunningApp, losing: Losing, lost: int
) -> None:
    losing.lose(lost)
    (result,) = await yard.client.predict_batch([("echo", ["a"])])
    if lost < MOST_WORKERS:
        assert not isinstance(result, Exception)
        assert result.only == ["a"]
    else:
        assert isinstance(result, ClientWorkerLost)
    assert losing.runs == min(lost + 1, MOST_WORKERS)
