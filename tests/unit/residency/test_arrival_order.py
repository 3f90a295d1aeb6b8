"""The line of strict order: one request at a time, and nobody in it who has left."""

from __future__ import annotations

import asyncio
import random

import pytest
from tests.support.fake_engine import FakeClock, turns

from modelyard_server.errors import Reason, Refusal
from modelyard_server.residency.arrival_order import ArrivalOrder
from modelyard_server.residency.values import NEVER_NS


class Line:
    """A line, and requests that keep their turn until the test ends it."""

    def __init__(self, most_waiting: int = 1000) -> None:
        self.clock = FakeClock()
        self.order = ArrivalOrder(most_waiting=most_waiting, now_ns=self.clock)
        self.served: list[int] = []
        self.ends: dict[int, asyncio.Event] = {}

    def request(self, number: int, deadline_ns: int = NEVER_NS) -> asyncio.Task[None]:
        self.ends[number] = asyncio.Event()
        return asyncio.create_task(self._request(number, deadline_ns))

    async def _request(self, number: int, deadline_ns: int) -> None:
        async with self.order.turn(deadline_ns):
            self.served.append(number)
            await self.ends[number].wait()


async def test_turns_come_in_order_of_arrival_one_at_a_time() -> None:
    line = Line()
    tasks = [line.request(i) for i in range(4)]
    await turns()
    for i in range(4):
        assert line.served == list(range(i + 1))
        assert line.order.waiting_count == 3 - i
        assert not line.order.is_empty
        line.ends[i].set()
        await turns()
    await asyncio.gather(*tasks)
    assert line.order.is_empty


async def test_who_comes_between_two_turns_is_behind_who_waits() -> None:
    line = Line()
    tasks = [line.request(0), line.request(1)]
    await turns()
    line.ends[0].set()
    await tasks[0]
    # The turn is 1's, whether or not it has seen that yet.
    assert not line.order.is_empty
    tasks.append(line.request(2))
    await turns()
    assert line.served == [0, 1]
    for i in (1, 2):
        line.ends[i].set()
    await asyncio.gather(*tasks)
    assert line.served == [0, 1, 2]


async def test_who_leaves_the_line_is_passed_over() -> None:
    line = Line()
    tasks = [line.request(i) for i in range(3)]
    await turns()
    tasks[1].cancel()
    await turns()
    assert line.order.waiting_count == 1
    line.ends[0].set()
    await turns()
    assert line.served == [0, 2]
    line.ends[2].set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert line.order.is_empty


async def test_a_turn_that_came_with_the_cancel_is_handed_on() -> None:
    line = Line()
    tasks = [line.request(i) for i in range(3)]
    await turns()
    line.ends[0].set()
    # After the first has handed on, before the second has seen it.
    asyncio.get_running_loop().call_soon(tasks[1].cancel)
    await turns()
    assert line.served == [0, 2]
    line.ends[2].set()
    await asyncio.gather(tasks[0], tasks[2])
    assert tasks[1].cancelled()
    assert line.order.is_empty


async def test_who_runs_out_of_time_leaves_the_line_at_once() -> None:
    line = Line()
    line.clock.advance(10)
    tasks = [line.request(0), line.request(1, deadline_ns=9 * 10**9), line.request(2)]
    with pytest.raises(Refusal) as caught:
        await tasks[1]
    assert caught.value.reason is Reason.DEADLINE_IN_QUEUE
    assert line.order.waiting_count == 1
    for i in (0, 2):
        line.ends[i].set()
    await asyncio.gather(tasks[0], tasks[2])
    assert line.served == [0, 2]


async def test_a_turn_that_came_in_time_ends_no_wait() -> None:
    line = Line()
    first, second = line.request(0), line.request(1, deadline_ns=3600 * 10**9)
    await turns()
    line.ends[0].set()
    await first
    await turns()
    line.ends[1].set()
    await second
    assert line.served == [0, 1]


async def test_a_failure_of_who_has_the_turn_hands_it_on() -> None:
    line = Line()

    async def fail() -> None:
        async with line.order.turn(NEVER_NS):
            await turns()
            raise ValueError("of its own")

    failing, behind = asyncio.create_task(fail()), line.request(1)
    with pytest.raises(ValueError, match="of its own"):
        await failing
    await turns()
    assert line.served == [1]
    line.ends[1].set()
    await behind


async def test_a_full_line_takes_nobody_more() -> None:
    line = Line(most_waiting=1)
    tasks = [line.request(i) for i in range(2)]
    await turns()
    with pytest.raises(Refusal) as caught:
        await line.request(2)
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.retry_after_s
    for i in range(2):
        line.ends[i].set()
    await asyncio.gather(*tasks)


async def test_a_closed_line_refuses_who_waits_and_who_would_have_to() -> None:
    line = Line()
    tasks = [line.request(i) for i in range(3)]
    await turns()
    line.order.close()
    tasks.append(line.request(3))
    for task in tasks[1:]:
        with pytest.raises(Refusal) as caught:
            await task
        assert caught.value.reason is Reason.SERVER_DRAINING
    line.ends[0].set()
    await tasks[0]
    assert line.order.is_empty


@pytest.mark.parametrize("seed", range(20))
async def test_with_cancels_at_random_everybody_else_has_a_turn_in_order(seed: int) -> None:
    chance = random.Random(seed)
    line = Line()
    tasks = {i: line.request(i) for i in range(60)}
    for end in line.ends.values():
        end.set()
    gone = chance.sample(sorted(tasks), 20)
    for i in gone:
        await turns(chance.randrange(3))
        tasks[i].cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert line.served == sorted(line.served)
    assert set(line.served) >= set(tasks) - set(gone)
    assert line.order.is_empty
    assert line.order.waiting_count == 0
