"""Requests of several clients share a run, over real channels, and nobody notices but in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from tests.support import faulty_models, tiny_models
from tests.support.config_text import ALLOWED, CPU, ROOTS, model_table
from tests.support.server import RunningApp, eventually, refusal_of, running_app

from modelyard import AsyncClient, DeadlineExceeded
from modelyard_server.execution.lane import LaneFigures
from modelyard_server.execution.thread_engine import ThreadEngine

TEXTS = [f"the {size} {animal} sat" for size in ("big", "small") for animal in ("dog", "cat")]
TOLERANCE = 1e-5


class HeldYard:
    """A server whose only lane is busy until it is let go."""

    def __init__(self, yard: RunningApp, gate: faulty_models.Gate, clients: list[AsyncClient]):
        self.yard = yard
        self.gate = gate
        self.clients = clients

    @property
    def figures(self) -> LaneFigures:
        engine = self.yard.app.engine
        assert isinstance(engine, ThreadEngine)
        return engine.figures

    async def let_go(self, waiting: int) -> None:
        """Once so many requests are with the server, beside the one that holds it up."""

        async def all_there() -> bool:
            stats = await self.yard.admin(lambda admin: admin.stats())
            return stats.active_request_count == waiting + 1

        await eventually("all wait", all_there)
        self.gate.open()


@asynccontextmanager
async def held_yard(base: Path) -> AsyncIterator[HeldYard]:
    """A yard with an embedder, which has run already, and two clients of it."""
    tiny_models.make_tiny_bert(base / "store" / "embedder", seed=1)
    faulty_models.make_weights(base / "store" / "stuck")
    config = CPU + ROOTS + ALLOWED
    config += model_table("embedder", "transformers", task="feature-extraction")
    config += model_table(
        "stuck",
        "torch",
        options={
            "factory": faulty_models.factory("StuckInRun"),
            "factory_options": {"gate": str(base / "gate")},
        },
    )
    async with AsyncExitStack() as stack:
        yard = await stack.enter_async_context(running_app(config, base))
        clients = [
            await stack.enter_async_context(AsyncClient(yard.target, identity=name))
            for name in ("ann", "bob")
        ]
        await clients[0].predict("embedder", TEXTS)
        gate = stack.enter_context(faulty_models.closed_gate(base / "gate"))
        stuck = asyncio.create_task(yard.client.predict("stuck", np.zeros(3, np.float32)))
        await eventually("the lane is busy", gate.is_waited_at)
        yield HeldYard(yard, gate, clients)
        await stuck


async def test_requests_of_two_clients_share_a_run_and_are_answered_as_if_alone(
    tmp_path: Path,
) -> None:
    async with held_yard(tmp_path) as held:
        before = held.figures
        asked = [
            asyncio.create_task(held.clients[i % 2].predict("embedder", [text]))
            for i, text in enumerate(TEXTS)
        ]
        await held.let_go(len(TEXTS))
        answers = [(await task).only for task in asked]
        after = held.figures
        assert after.batch_count - before.batch_count == 1
        assert after.request_count - before.request_count == len(TEXTS)
        for text, answer in zip(TEXTS, answers, strict=True):
            alone = (await held.clients[0].predict("embedder", [text])).only
            np.testing.assert_allclose(np.asarray(answer), np.asarray(alone), atol=TOLERANCE)
        # They are not all the same.
        assert np.abs(np.asarray(answers[0]) - np.asarray(answers[1])).max() > 0.01


async def test_a_bad_request_among_good_ones_is_refused_alone(tmp_path: Path) -> None:
    async with held_yard(tmp_path) as held:
        before = held.figures
        good = [asyncio.create_task(held.clients[0].predict("embedder", [text])) for text in TEXTS]
        bad = asyncio.create_task(
            refusal_of(held.clients[1].predict("embedder", np.zeros(3, np.float32)))
        )
        await held.let_go(len(TEXTS) + 1)
        for task in good:
            assert np.asarray((await task).only).shape == (1, 32)
        assert (await bad).reason == "INVALID_TENSOR"
        assert held.figures.batch_count - before.batch_count == 1


async def test_callers_that_leave_or_run_out_of_time_while_they_wait_cost_the_others_nothing(
    tmp_path: Path,
) -> None:
    async with held_yard(tmp_path) as held:
        before = held.figures
        stays = asyncio.create_task(held.clients[0].predict("embedder", TEXTS[:1]))
        leaves = asyncio.create_task(held.clients[1].predict("embedder", TEXTS[1:2]))
        late = asyncio.create_task(held.clients[1].predict("embedder", TEXTS[2:3], timeout_s=0.2))
        with pytest.raises(DeadlineExceeded):
            await late
        leaves.cancel()
        await asyncio.wait({leaves})
        await held.let_go(1)
        await stays
        after = held.figures
        assert after.batch_count - before.batch_count == 1
        assert after.request_count - before.request_count == 1
