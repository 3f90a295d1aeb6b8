"""A device that is behind gives a model away, and everybody is answered meanwhile."""

from __future__ import annotations

from collections import deque
from typing import Any

from tests.support.fake_engine import turns
from tests.support.residency_bench import Bench, Waiter

from modelyard_server.residency.shell import Lease
from modelyard_server.residency.values import ModelHandle, State


class _Line:
    """The requests that the first device has: a request of each model comes and two end a second.

    Args:
        bench: whose.
        models: what is asked for.
    """

    def __init__(self, bench: Bench, models: tuple[ModelHandle, ...]) -> None:
        self.bench = bench
        self.models = models
        self.given: deque[Lease] = deque()
        self.waiting: deque[tuple[ModelHandle, Waiter]] = deque()

    async def ask(self, times: int = 1) -> None:
        for _ in range(times):
            for model in self.models:
                if (lease := self.bench.residency.try_lease(model)) is not None:
                    self.given.append(lease)
                else:
                    self.waiting.append((model, await self.bench.wait_for(model)))

    def end_one(self) -> None:
        self.bench.clock.advance(0.5)
        self.given.popleft().release()


async def test_a_device_that_is_behind_gives_a_model_away_and_everybody_is_answered(
    benches: Any,
) -> None:
    bench = benches()
    hot, warm, idle = bench.add("hot", 80, 0), bench.add("warm", 80, 0), bench.add("idle", 80, 1)
    for model in (hot, warm, idle):
        bench.engine.prices[model.name] = 80
        await bench.load_and_release(model)
    anywhere = bench.add("anywhere", 80, 0, 1).ways
    bench.residency.set_ways(hot, anywhere)
    bench.residency.set_ways(warm, anywhere)
    line = _Line(bench, (hot, warm))
    await line.ask(20)
    for _ in range(20):
        line.end_one()
        line.end_one()
        await line.ask()
        if line.waiting:
            break
    given, _ = line.waiting[0]
    kept = hot if given is warm else warm
    assert bench.state(given) is State.DRAINING
    assert bench.state(kept) is State.RESIDENT

    # It serves the requests that it has. Who comes now waits, and the others do not.
    while line.given and bench.state(given) is State.DRAINING:
        assert not bench.engine.unloads
        line.end_one()
        await turns()
    assert all(lease.handle is kept for lease in line.given)
    bench.engine.unloads[given.core_id].finish()
    await turns()
    assert bench.engine.loads[given.core_id].device == 1
    bench.engine.loads[given.core_id].finish(80)
    await turns()
    for model, waiter in line.waiting:
        line.given.append(await waiter)
        assert line.given[-1].handle is model
        assert line.given[-1].device == 1
    assert bench.residency.device_of(kept) == 0
    causes = [event.cause for event in bench.residency.journal.events_after(0)[0]]
    assert "devices/d0" in causes
    while line.given:
        line.end_one()
    await turns()
    assert bench.state(given) is State.RESIDENT
