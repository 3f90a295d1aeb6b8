"""Requests that cannot be answered in time are told so at once, with when they could be."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
from tests.support import faulty_models
from tests.support.config_text import ALLOWED, CPU, ROOTS, model_table
from tests.support.server import RunningApp, eventually, refusal_of, running_app

from modelyard import Admin, DeadlineUnreachable

X = np.ones(3, np.float32)
RUN_S = 0.1
BEHIND = 30
"""Requests that stand in line, each of RUN_S or more."""


def slow_config(folder: Path) -> str:
    """A model whose runs take RUN_S, and one that waits at a gate, each run by itself."""
    config = CPU + ROOTS + ALLOWED + "\n[engine]\nmax_batch_rows = 1\n"
    for name, factory, options in (
        ("slow", "Slow", {"seconds": RUN_S}),
        ("stuck", "StuckInRun", {"gate": folder / "gate"}),
    ):
        faulty_models.make_weights(folder / "store" / name)
        config += model_table(
            name,
            "torch",
            options={"factory": faulty_models.factory(factory), "factory_options": options},
        )
    return config


async def has_begun(yard: RunningApp, count: int) -> None:
    async def is_so() -> bool:
        return (await yard.admin(Admin.stats)).active_request_count >= count

    await eventually(f"{count} requests are there", is_so)


async def test_a_hit_behind_a_long_line_is_refused_at_once_with_when_it_could(
    tmp_path: Path,
) -> None:
    async with running_app(slow_config(tmp_path), tmp_path) as yard:
        for _ in range(8):  # What a run takes is known after a few.
            await yard.client.predict("slow", X)
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            first = asyncio.create_task(yard.client.predict("stuck", X))
            await eventually("it runs", gate.is_waited_at)
            line = [asyncio.create_task(yard.client.predict("slow", X)) for _ in range(BEHIND)]
            await has_begun(yard, BEHIND + 1)
            refusal = await refusal_of(yard.client.predict("slow", X, timeout_s=RUN_S * 10))
            assert isinstance(refusal, DeadlineUnreachable)
            assert refusal.ready_in_s is not None
            assert refusal.deadline_in_s is not None
            assert refusal.ready_in_s >= BEHIND * RUN_S
            assert refusal.deadline_in_s <= RUN_S * 10
            assert refusal.retry_after_s is not None
            assert refusal.retry_after_s > 0
            assert gate.is_waited_at(), "nobody was asked to hurry for it"
            # An item of a batch is told the same.
            (item,) = await yard.client.predict_batch([("slow", X)], timeout_s=RUN_S * 10)
            assert isinstance(item, DeadlineUnreachable)
            assert item.retry_after_s is not None
        for answer in await asyncio.gather(first, *line):
            np.testing.assert_array_equal(answer.only, X + 1)
        # The line is gone, and with it the reason.
        answer = await yard.client.predict("slow", X)
        np.testing.assert_array_equal(answer.only, X + 1)
