"""How a server does and what its evictions cost, over a real socket and by the command line."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import tiny_models
from tests.support.config_text import CPU, ROOTS, device_table, model_table
from tests.support.server import RunningApp, running_app
from typer.testing import CliRunner

from modelyard import Admin, Event, EventType, Explanation, ServerStats
from modelyard_server.cli.main import app

X = np.ones(3, np.float32)
ROOM_FOR_ONE = device_table("cpu", 5000)
PROCESSES = '\n[engine]\nkind = "process"\n'


def ballast(name: str) -> str:
    return model_table(name, "identity", options={"size_bytes": 4000})


async def command(yard: RunningApp, *arguments: str) -> str:
    """What a command prints that goes well."""
    result: Any = await asyncio.to_thread(
        CliRunner().invoke, app, [*arguments, "--server", yard.target]
    )
    assert result.exit_code == 0, result.output
    told: str = result.stdout
    return told


async def explain(yard: RunningApp, model: str) -> Explanation:
    return await yard.admin(Admin.explain, model)


def last(events: tuple[Event, ...], type: EventType, subject: str) -> Event:
    return [event for event in events if (event.type, event.subject) == (type, subject)][-1]


@pytest.mark.parametrize("engine", ["", PROCESSES])
async def test_an_eviction_is_explained_by_who_needed_the_room_and_what_it_cost(
    tmp_path: Path, engine: str
) -> None:
    config = ROOM_FOR_ONE + ballast("a") + ballast("b") + engine
    async with running_app(config, tmp_path) as yard:
        for model in ("a", "b"):
            await yard.client.predict(model, X)
        (unpaid,) = (await explain(yard, "a")).evictions
        assert (unpaid.event.cause, unpaid.event.rule) == ("models/b", "lru")
        assert (unpaid.reload_s, unpaid.waited_request_count) == (None, 0)
        assert "cost nothing so far: not loaded again" in await command(yard, "explain", "a")

        await yard.client.predict("a", X)
        story = await explain(yard, "a")
        (paid,) = story.evictions
        assert paid.event == unpaid.event == last(story.events, EventType.EVICTED, "models/a")
        assert paid.event.score is not None
        # What a load of it had taken until then is what the next one was expected to take.
        first, second = [each for each in story.events if each.type is EventType.LOAD_DONE]
        assert first.load_s is not None and paid.event.expected_load_s is not None
        assert paid.event.expected_load_s == pytest.approx(first.load_s, abs=2e-6)
        assert paid.event.idle_s is not None and paid.event.resident_s is not None
        assert 0 <= paid.event.resident_s <= paid.event.idle_s
        assert (paid.reload_s, paid.reloaded_at) == (second.load_s, second.happened_at)
        assert paid.waited_request_count == second.waited_request_count == 1
        assert paid.longest_wait_s == paid.waited_sum_s == second.waited_s
        assert paid.failed_load_count == 0

        told = (await command(yard, "explain", "a")).splitlines()
        (why,) = [line for line in told if "because b needed the room" in line]
        assert "chosen by the rule lru, score" in why
        (cost,) = [line for line in told if "loaded again" in line]
        assert "1 request waited" in cost and "a load was expected to take" in cost
        as_json = json.loads(await command(yard, "explain", "a", "--json"))
        assert as_json["evictions"][0]["reload_s"] == paid.reload_s

        stats: ServerStats = await yard.admin(Admin.stats)
        assert stats.departures is not None and stats.regret is not None
        assert stats.departures.counts == {"MODEL": 2} and stats.departures.age_count == 2
        assert stats.eviction_count == 2
        assert 0 <= stats.recent_load_s <= stats.load_s
        # LRU has room for one, too: it loads whenever this server does.
        assert stats.regret.lru_load_s > 0
        assert stats.regret.lru_load_s == pytest.approx(stats.load_s, abs=2e-6)
        assert stats.regret.regret_s == pytest.approx(0, abs=2e-6)
        # They take microseconds, and share no run.
        assert stats.batches is not None
        assert (stats.batches.unshared_count, stats.batches.batch_count) == (3, 0)
        assert json.loads(await command(yard, "stats", "--json"))["stats"]["regret"] == {
            "lru_load_s": stats.regret.lru_load_s,
            "regret_s": stats.regret.regret_s,
        }
        assert "under LRU" in await command(yard, "stats")


@pytest.mark.parametrize("engine", ["", PROCESSES])
async def test_batches_are_counted_wherever_models_run(tmp_path: Path, engine: str) -> None:
    tiny_models.make_tiny_bert(tmp_path / "store" / "embedder", seed=1)
    config = CPU + ROOTS + model_table("embedder", "transformers", task="feature-extraction")
    async with running_app(config + engine, tmp_path) as yard:
        await yard.client.predict("embedder", ["the cat"])
        stats = await yard.admin(Admin.stats)
        assert stats.batches is not None
        assert (stats.batches.batch_count, stats.batches.alone_count) == (1, 1)
        assert (stats.batches.row_count, stats.batches.padding_ratio) == (1, 0.0)
        texts = [[f"the {'big ' * count}dog"] for count in range(6)]
        await asyncio.gather(*(yard.client.predict("embedder", text) for text in texts))
        stats = await yard.admin(Admin.stats)
        assert stats.batches is not None
        assert (stats.batches.request_count, stats.batches.row_count) == (7, 7)
        assert stats.batches.alone_count <= stats.batches.batch_count <= 7
        assert stats.batches.largest_request_count == stats.batches.largest_row_count
        assert (stats.batches.unshared_count, stats.batches.split_count) == (0, 0)
