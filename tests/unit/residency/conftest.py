"""Benches that are looked at when their test has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from tests.support.residency_bench import Bench


@pytest.fixture
async def benches() -> AsyncIterator[Callable[..., Bench]]:
    """Makes benches, and looks at the end of the test whether anything is left of them."""
    made: list[Bench] = []
    unexpected: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: unexpected.append(context))

    def make(**settings: Any) -> Bench:
        made.append(Bench(**settings))
        return made[-1]

    yield make
    for bench in made:
        await bench.end()
        bench.residency.audit()
        assert all(waiter.done() for waiter in bench.waiters)
        assert bench.residency.waiting_count == 0
        assert bench.residency.lease_count == 0
        assert not bench.engine.loads
        assert not bench.engine.unloads
        assert not bench.residency._actions._transfers.count
        assert not bench.residency._tickets
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert not unexpected
