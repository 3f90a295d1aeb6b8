"""One stream of predictions at its seams: what goes together, what waits, and what is never more.

The link and the models are the test's: it says what comes, when a message has left, and when an
item is answered.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from tests.support.server import eventually

from modelyard.v1 import error_reason_pb2, tensor_pb2
from modelyard.v1 import inference_service_pb2 as pb
from modelyard_server.errors import Reason, Refusal
from modelyard_server.services.inference import InferenceFigures
from modelyard_server.services.prediction_streams import PredictionStreamService
from modelyard_server.services.request_log import RequestFacts
from modelyard_server.transport.api import Call, StatusReply

KIB = 1024
MOST = 1024


class Models:
    """Answers items when it is told to; stands for InferenceService.

    Attributes:
        open: futures of the items that were begun and are not answered, by key.
        begun: keys, in the order in which they were begun.
    """

    def __init__(self) -> None:
        self.figures = InferenceFigures()
        self.open: dict[str, asyncio.Future[bytes]] = {}
        self.begun: list[str] = []
        self.timeouts: list[float] = []
        self.answered: list[RequestFacts] = []
        self.refused: list[Reason] = []

    def allowed_s(self, wanted_s: float | None) -> float:
        return 30.0 if wanted_s is None else min(wanted_s, 300.0)

    async def answer_one(
        self,
        request: pb.PredictRequest,
        contents: Mapping[int, bytes],
        timeout_s: float,
        client: Callable[[], str],
        facts: RequestFacts,
    ) -> bytes:
        key = request.key
        self.begun.append(key)
        self.timeouts.append(timeout_s)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.open[key] = future
        try:
            return await future
        finally:
            del self.open[key]

    def note_answered(self, facts: RequestFacts) -> None:
        self.answered.append(facts)

    def note_refused(self, facts: RequestFacts, refusal: Refusal) -> None:
        self.refused.append(refusal.reason)

    def answer(self, *keys: str, size: int = 0) -> None:
        for key in keys:
            served = pb.Served(model=key.ljust(size, "."))
            self.open[key].set_result(pb.PredictResponse(served=served).SerializeToString())

    async def begins(self, count: int) -> None:
        await eventually(f"{count} items are begun", lambda: len(self.begun) >= count)


class Wire:
    """Both directions of a call.

    Attributes:
        reads: messages that were asked for so far.
        is_stuck: writes do not end.
    """

    def __init__(self) -> None:
        self.reads = 0
        self.is_stuck = False
        self._in: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._out: deque[pb.PredictStreamResponse] = deque()
        self._written = asyncio.Event()
        self._moves = asyncio.Event()
        self.writes = 0

    # The side of the server

    async def read(self) -> bytes | None:
        self.reads += 1
        return await self._in.get()

    async def write(self, message: bytes) -> None:
        self.writes += 1
        while self.is_stuck:
            self._moves.clear()
            await self._moves.wait()
        self._out.append(pb.PredictStreamResponse.FromString(message))
        self._written.set()

    # The side of the client

    def send(self, *items: tuple[int, str] | pb.PredictStreamItem) -> None:
        request = pb.PredictStreamRequest(
            items=[
                each if isinstance(each, pb.PredictStreamItem) else item(*each) for each in items
            ]
        )
        self._in.put_nowait(request.SerializeToString())

    def send_bytes(self, body: bytes) -> None:
        self._in.put_nowait(body)

    def end(self) -> None:
        self._in.put_nowait(None)

    def unstick(self) -> None:
        self.is_stuck = False
        self._moves.set()

    async def pairs(self) -> list[tuple[int, str]]:
        """The next message: of each item the model that answered it, or the reason."""
        while not self._out:
            self._written.clear()
            await asyncio.wait_for(self._written.wait(), 10)
        results = self._out.popleft().results
        assert results
        return [(result.id, told_of(result)) for result in results]

    async def message(self) -> dict[int, str]:
        """The same, by id; each once."""
        pairs = await self.pairs()
        told = dict(pairs)
        assert len(told) == len(pairs)
        return told


def item(item_id: int, key: str, size: int = 0) -> pb.PredictStreamItem:
    found = pb.PredictStreamItem(id=item_id, request=pb.PredictRequest(key=key))
    if size:
        found.request.inputs.add(data_type=tensor_pb2.DATA_TYPE_UINT8, shape=[size]).raw = bytes(
            size
        )
    return found


def told_of(result: pb.PredictStreamResult) -> str:
    if result.WhichOneof("result") == "response":
        return result.response.served.model.rstrip(".")
    name: str = error_reason_pb2.ErrorReason.Name(result.error.reason)
    return name.removeprefix("ERROR_REASON_")


class Stream:
    """A stream that is being answered."""

    def __init__(self, models: Models, wire: Wire, task: asyncio.Task[StatusReply | None]) -> None:
        self.models = models
        self.wire = wire
        self.task = task

    async def ended(self) -> StatusReply | None:
        return await asyncio.wait_for(self.task, 60)


@asynccontextmanager
async def streaming(
    *, most_answer_bytes: int = 1 << 20, most_bytes_in_flight: int = 1 << 30
) -> AsyncIterator[Stream]:
    before = asyncio.all_tasks()
    models, wire = Models(), Wire()
    inference: Any = models
    service = PredictionStreamService(
        inference, most_answer_bytes=most_answer_bytes, most_bytes_in_flight=most_bytes_in_flight
    )
    call = Call(b"", lambda: None, None)
    task = asyncio.create_task(service.predict_stream(call, wire))
    yield Stream(models, wire, task)
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    assert asyncio.all_tasks() <= before
    assert models.figures.active_count == 0
    assert not models.open


# --- What goes together


async def test_results_that_are_ready_together_leave_in_one_message() -> None:
    async with streaming() as stream:
        stream.wire.send(*((i, f"k{i}") for i in range(10)))
        await stream.models.begins(10)
        stream.models.answer("k3", "k1", "k7")
        assert await stream.wire.message() == {3: "k3", 1: "k1", 7: "k7"}
        stream.models.answer("k0")
        assert await stream.wire.message() == {0: "k0"}


async def test_what_is_ready_while_a_message_is_on_its_way_leaves_in_the_next() -> None:
    async with streaming() as stream:
        stream.wire.is_stuck = True
        stream.wire.send(*((i, f"k{i}") for i in range(5)))
        await stream.models.begins(5)
        stream.models.answer("k0")
        await eventually("it is being written", lambda: stream.wire.writes == 1)
        for key in ("k1", "k2", "k3"):
            stream.models.answer(key)
            await asyncio.sleep(0)
        stream.wire.unstick()
        assert await stream.wire.message() == {0: "k0"}
        assert await stream.wire.message() == {1: "k1", 2: "k2", 3: "k3"}


async def test_a_message_is_not_filled_beyond_its_bytes_but_takes_one_result_of_any_size() -> None:
    async with streaming(most_answer_bytes=1 << 20) as stream:
        stream.wire.send(*((i, f"k{i}") for i in range(6)))
        await stream.models.begins(6)
        stream.models.answer("k0", "k1", "k2", size=100 * KIB)
        stream.models.answer("k3", size=600 * KIB)
        stream.models.answer("k4", "k5")
        assert await stream.wire.message() == {0: "k0", 1: "k1"}
        assert await stream.wire.message() == {2: "k2"}
        assert await stream.wire.message() == {3: "k3"}
        assert await stream.wire.message() == {4: "k4", 5: "k5"}


# --- What is never more


async def test_no_more_than_1024_items_are_begun_and_nothing_is_read_beyond_them() -> None:
    async with streaming() as stream:
        models, wire = stream.models, stream.wire
        for first in range(0, 3000, 1000):
            wire.send(*((i, f"k{i}") for i in range(first, first + 1000)))
        await models.begins(MOST)
        await _settled()
        assert (len(models.begun), wire.reads) == (MOST, 2)
        # One is answered, and its place goes to the next.
        models.answer("k5")
        assert await wire.message() == {5: "k5"}
        await models.begins(MOST + 1)
        await _settled()
        assert (len(models.begun), wire.reads) == (MOST + 1, 2)
        assert models.begun == [f"k{i}" for i in range(MOST + 1)]


async def test_results_that_wait_for_the_reader_are_in_flight() -> None:
    async with streaming() as stream:
        models, wire = stream.models, stream.wire
        wire.is_stuck = True
        for first in range(0, 2000, 1000):
            wire.send(*((i, f"k{i}") for i in range(first, first + 1000)))
        await models.begins(MOST)
        models.answer(*list(models.open))
        await _settled()
        # All are done, none is read: nothing else is begun.
        assert (len(models.begun), len(models.open), wire.writes) == (MOST, 0, 1)
        wire.unstick()
        told: dict[int, str] = {}
        while len(told) < MOST:
            told |= await wire.message()
        await models.begins(2000)
        models.answer(*list(models.open))
        wire.end()
        while len(told) < 2000:
            told |= await wire.message()
        assert told == {i: f"k{i}" for i in range(2000)}
        assert await stream.ended() is None


async def test_large_items_are_held_up_by_their_bytes() -> None:
    async with streaming(most_bytes_in_flight=100 * KIB) as stream:
        models, wire = stream.models, stream.wire
        wire.send(*(item(i, f"k{i}", 40 * KIB) for i in range(9)))
        await models.begins(3)
        await _settled()
        assert len(models.begun) == 3
        wire.is_stuck = True
        # A large answer counts instead of its request.
        models.answer("k0", "k1", "k2", size=90 * KIB)
        await _settled()
        assert len(models.begun) == 3
        wire.unstick()
        await models.begins(6)
        assert len(models.begun) == 6


async def test_one_item_is_begun_however_large_it_is() -> None:
    async with streaming(most_bytes_in_flight=1) as stream:
        stream.wire.send(item(1, "k1", 300 * KIB), item(2, "k2"))
        await stream.models.begins(1)
        stream.models.answer("k1")
        assert await stream.wire.message() == {1: "k1"}
        await stream.models.begins(2)


# --- Ids


async def test_an_id_in_flight_is_refused_for_that_item_alone() -> None:
    async with streaming() as stream:
        models, wire = stream.models, stream.wire
        wire.send((7, "first"))
        wire.send((7, "second"), (8, "other"))
        assert await wire.message() == {7: "INVALID_FIELD"}
        await models.begins(2)
        assert models.begun == ["first", "other"]
        models.answer("first", "other")
        assert await wire.message() == {7: "first", 8: "other"}
        # Once answered it may be used again, whatever became of the second.
        wire.send((7, "third"))
        await models.begins(3)
        models.answer("third")
        assert await wire.message() == {7: "third"}
        assert models.refused == [Reason.INVALID_FIELD]


async def test_an_id_is_in_flight_until_its_answer_is_on_its_way() -> None:
    async with streaming() as stream:
        models, wire = stream.models, stream.wire
        wire.is_stuck = True
        wire.send((1, "a"), (2, "b"))
        await models.begins(2)
        models.answer("a")
        await eventually("it is being written", lambda: wire.writes == 1)
        models.answer("b")
        await _settled()
        # The first may be with the client by now, the second is not.
        wire.send((2, "never"), (1, "again"))
        await models.begins(3)
        assert models.begun[-1] == "again"
        wire.unstick()
        assert await wire.pairs() == [(1, "a")]
        assert await wire.pairs() == [(2, "b"), (2, "INVALID_FIELD")]


async def test_any_number_of_64_bits_is_an_id() -> None:
    async with streaming() as stream:
        ids = (0, -1, 2**63 - 1, -(2**63))
        stream.wire.send(*((number, f"k{number}") for number in ids))
        await stream.models.begins(4)
        stream.models.answer(*list(stream.models.open))
        assert await stream.wire.message() == {number: f"k{number}" for number in ids}


# --- One item


async def test_an_items_own_time_is_what_it_may_take() -> None:
    async with streaming() as stream:
        stream.wire.send((1, "default"))
        for i, (seconds, nanos) in enumerate([(2, 500_000_000), (10_000, 0)], start=2):
            one = item(i, f"k{i}")
            one.timeout.seconds, one.timeout.nanos = seconds, nanos
            stream.wire.send(one)
        for i, (seconds, nanos) in enumerate([(0, 0), (-1, 0), (1, -1), (0, 10**9)], start=10):
            one = item(i, "never")
            one.timeout.seconds, one.timeout.nanos = seconds, nanos
            stream.wire.send(one)
        await stream.models.begins(3)
        told: dict[int, str] = {}
        while len(told) < 4:
            told |= await stream.wire.message()
        assert told == dict.fromkeys(range(10, 14), "INVALID_FIELD")
        assert stream.models.timeouts == [30.0, 2.5, 300.0]
        assert stream.models.begun == ["default", "k2", "k3"]


async def test_an_item_without_a_request_is_refused() -> None:
    async with streaming() as stream:
        stream.wire.send(pb.PredictStreamItem(id=3))
        assert await stream.wire.message() == {3: "INVALID_FIELD"}


async def test_an_answer_that_fits_into_no_message_is_refused() -> None:
    async with streaming(most_answer_bytes=10 * KIB) as stream:
        stream.wire.send((1, "a"), (2, "b"))
        await stream.models.begins(2)
        stream.models.answer("a", size=10 * KIB)
        stream.models.answer("b", size=9 * KIB)
        assert await stream.wire.message() == {1: "ANSWER_TOO_LARGE", 2: "b"}
        assert stream.models.refused == [Reason.ANSWER_TOO_LARGE]
        assert len(stream.models.answered) == 1


async def test_failures_and_defects_are_the_items_own() -> None:
    async with streaming() as stream:
        stream.wire.send((1, "a"), (2, "b"), (3, "c"), (4, "d"))
        await stream.models.begins(4)
        stream.models.open["a"].set_exception(Refusal(Reason.QUEUE_FULL, "full", retry_after_s=1))
        stream.models.open["b"].set_exception(ZeroDivisionError("secret"))
        # Something that it waits for, not the item.
        stream.models.open["c"].cancel()
        stream.models.answer("d")
        told = {1: "QUEUE_FULL", 2: "INTERNAL", 3: "INTERNAL", 4: "d"}
        assert await stream.wire.message() == told


# --- The end


async def test_a_client_that_has_ended_its_side_is_answered_the_rest() -> None:
    async with streaming() as stream:
        stream.wire.send((1, "a"), (2, "b"))
        stream.wire.end()
        await stream.models.begins(2)
        stream.models.answer("b")
        assert await stream.wire.message() == {2: "b"}
        await _settled()
        assert not stream.task.done()
        stream.models.answer("a")
        assert await stream.wire.message() == {1: "a"}
        assert await stream.ended() is None


async def test_a_stream_without_items_ends_well() -> None:
    async with streaming() as stream:
        stream.wire.end()
        assert await stream.ended() is None
        assert stream.wire.writes == 0


async def test_what_is_no_message_ends_the_stream_after_what_was_in_order() -> None:
    many = pb.PredictStreamRequest(items=[item(i, "k") for i in range(MOST + 1)])
    for body, text in (
        (b"", "items: at least one is needed"),
        (many.SerializeToString(), "items: there are 1025; 1024 may be"),
        (b"\x0a\xff", "the message is no PredictStreamRequest"),
        (b"\x0a\xff" + bytes(40 * KIB), "the message is no PredictStreamRequest"),
    ):
        async with streaming() as stream:
            stream.wire.send((1, "a"))
            await stream.models.begins(1)
            stream.wire.send_bytes(body)
            refused = stream.models.refused
            await eventually("it is refused", refused.copy)
            assert not stream.task.done()
            stream.models.answer("a")
            assert await stream.wire.message() == {1: "a"}
            end = await stream.ended()
            assert end is not None
            assert (end.code, end.text) == (3, text)
            assert stream.models.begun == ["a"]


async def test_a_client_that_leaves_takes_its_items_along() -> None:
    async with streaming() as stream:
        stream.wire.send(*((i, f"k{i}") for i in range(100)))
        await stream.models.begins(100)
        stream.task.cancel()
        await asyncio.wait({stream.task})
        assert stream.task.cancelled()
        assert not stream.models.open


async def _settled() -> None:
    """Lets everything happen that happens without anybody else."""
    for _ in range(200):
        await asyncio.sleep(0)
