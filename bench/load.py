"""Steady load: requests at fixed times, whether or not earlier ones have been answered.

A request's time counts from when it was due, so that a server that stalls is charged for all that
should have been asked meanwhile.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import grpc
import grpc.aio
import numpy as np

from bench.plan_models import TOLERANCE, Question, difference
from modelyard.v1 import inference_service_pb2 as pb

__all__ = ["Answers", "Load", "connected"]

_PREDICT: Final = "/modelyard.v1.InferenceService/Predict"
_DEADLINE_S: Final = 30.0

_Predict: TypeAlias = grpc.aio.UnaryUnaryMultiCallable[bytes, pb.PredictResponse]


@dataclass(slots=True)
class Answers:
    """What became of requests.

    Attributes:
        seconds: from when each answered one was due to its answer.
        lost: of those that were not answered, what they ended with.
        wrong: of those that were answered wrongly, what was wrong.
    """

    seconds: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Requests."""
        return len(self.seconds) + len(self.lost)

    def add(self, other: Answers) -> None:
        """Adds what became of others."""
        self.seconds += other.seconds
        self.lost += other.lost
        self.wrong += other.wrong

    def percentile_ms(self, percent: float) -> float:
        """A percentile of the times, in milliseconds."""
        return float(np.percentile(self.seconds, percent)) * 1e3


class Load:
    """Asks questions at a pace.

    Args:
        clients: what asks, in turn.
        questions: what is asked, at random; every model as often as any other.
        rate_hz: requests a second.
        seed: of the order of questions.
    """

    def __init__(
        self, clients: Sequence[_Predict], questions: Sequence[Question], rate_hz: float, seed: int
    ) -> None:
        self._clients = clients
        self._questions = questions
        self._of_model: dict[str, list[Question]] = {}
        for question in questions:
            self._of_model.setdefault(question.model, []).append(question)
        self._rate_hz = rate_hz
        self._rng = random.Random(seed)

    async def run(self, count: int, on_answer: Callable[[], None] = lambda: None) -> Answers:
        """Asks `count` questions and returns when all have ended."""
        answers = Answers()
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.TaskGroup() as group:
            for i in range(count):
                due = began + i / self._rate_hz
                await asyncio.sleep(max(0.0, due - loop.time()))
                model = self._rng.choice(tuple(self._of_model))
                question = self._rng.choice(self._of_model[model])
                client = self._clients[i % len(self._clients)]
                group.create_task(self._ask(client, question, due, answers, on_answer))
        return answers

    async def ask_all(self) -> Answers:
        """Asks every question once, one after the other."""
        answers = Answers()
        loop = asyncio.get_running_loop()
        for question in self._questions:
            await self._ask(self._clients[0], question, loop.time(), answers, lambda: None)
        return answers

    async def _ask(
        self,
        client: _Predict,
        question: Question,
        due: float,
        answers: Answers,
        on_answer: Callable[[], None],
    ) -> None:
        try:
            response = await client(question.frame, timeout=_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            answers.lost.append(f"{question.model}: {error.code().name}: {error.details()}")
        else:
            answers.seconds.append(asyncio.get_running_loop().time() - due)
            if (apart := difference(question, response)) > TOLERANCE:
                answers.wrong.append(f"{question.model}: {apart:.3g} from the right answer")
        on_answer()


@asynccontextmanager
async def connected(target: str, count: int) -> AsyncIterator[list[_Predict]]:
    """Clients, each with a connection of its own, that never ask twice: what is lost shows."""
    async with AsyncExitStack() as stack:
        clients = []
        for i in range(count):
            options = [
                ("grpc.enable_retries", 0),
                ("grpc.enable_http_proxy", 0),
                # Channels with the same settings would share one connection.
                ("modelyard.bench_client", i),
            ]
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(target, options=options)
            )
            predict: _Predict = channel.unary_unary(
                _PREDICT, response_deserializer=pb.PredictResponse.FromString
            )
            clients.append(predict)
        yield clients
