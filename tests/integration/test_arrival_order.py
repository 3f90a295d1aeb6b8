"""Strict order of arrival over a real channel: hits wait behind loads, and nobody for ever."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest
from tests.support import faulty_models
from tests.support.config_text import ALLOWED, CPU, ROOTS, device_table, model_table
from tests.support.faulty_models import closed_gate
from tests.support.server import eventually, running_app

from modelyard import Admin, BatchItem, Prediction

X = np.ones(3, np.float32)
FIFO = '[yard]\norder = "fifo"\n'


def torch_model(
    base: Path, name: str, factory: str, value: float, *, device: str = "cpu", **more: object
) -> str:
    faulty_models.make_weights(base / "store" / name, value=value)
    options: dict[str, object] = {"factory": faulty_models.factory(factory)}
    if more:
        options["factory_options"] = more
    return model_table(name, "torch", device=device, options=options)


@pytest.mark.parametrize("order", ["fifo", "urgency"])
async def test_a_hit_behind_a_load_waits_where_order_is_strict(tmp_path: Path, order: str) -> None:
    gate_path = tmp_path / "gate"
    config = (
        f'[engine]\nkind = "thread"\n[yard]\norder = "{order}"\n'
        + CPU
        + device_table("cuda:0", "64MB", logical=True)
        + ROOTS
        + ALLOWED
        + torch_model(tmp_path, "hot", "Adding", 1.0, device="cuda:0")
        + torch_model(tmp_path, "slow", "StuckInLoad", 2.0, gate=gate_path)
    )
    async with running_app(config, tmp_path) as yard:

        async def is_waiting(count: int) -> bool:
            return (await yard.admin(Admin.stats)).waiting_request_count == count

        await yard.client.predict("hot", X)
        with closed_gate(gate_path) as gate:
            first = asyncio.create_task(yard.client.predict("slow", X))
            await eventually("the load has begun", gate.is_waited_at)
            second = asyncio.create_task(yard.client.predict("hot", X))
            if order == "fifo":
                await eventually("both wait", lambda: is_waiting(2))
                assert not second.done()
            else:
                await second
                assert await is_waiting(1)
        np.testing.assert_array_equal((await first).only, X + 2)
        np.testing.assert_array_equal((await second).only, X + 1)


@pytest.mark.parametrize("engine", ["thread", "process"])
async def test_calls_and_batches_at_once_are_all_answered(tmp_path: Path, engine: str) -> None:
    names = ("one", "two", "three")
    config = f'[engine]\nkind = "{engine}"\n' + FIFO + CPU + ROOTS + ALLOWED
    for value, name in enumerate(names, start=1):
        config += torch_model(tmp_path, name, "Adding", float(value))
    chance = random.Random(7)
    asked = [chance.randrange(3) for _ in range(40)]
    async with running_app(config, tmp_path) as yard:
        items = [BatchItem(key=names[which], inputs=X) for which in asked]
        single = [yard.client.predict(names[which], X) for which in asked]
        batches = [yard.client.predict_batch(items) for _ in range(3)]
        answers, found = await asyncio.gather(asyncio.gather(*single), asyncio.gather(*batches))
        for which, answer in zip(asked, answers, strict=True):
            np.testing.assert_array_equal(answer.only, X + which + 1)
        for results in found:
            for which, result in zip(asked, results, strict=True):
                assert isinstance(result, Prediction)
                np.testing.assert_array_equal(result.only, X + which + 1)
        assert (await yard.admin(Admin.stats)).waiting_request_count == 0
