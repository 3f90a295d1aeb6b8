"""Streams of both clients, against a server whose answers each test chooses."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from tests.support.fake_api import FakeServer, refuse
from tests.support.server import eventually

from modelyard import (
    AsyncClient,
    BatchItem,
    Client,
    InvalidRequest,
    KeyNotFound,
    ModelyardError,
    Prediction,
    QueueFull,
    ServerDraining,
    ServerError,
    StreamBroken,
    to_tensor,
)
from modelyard.v1 import error_reason_pb2
from modelyard.v1 import inference_service_pb2 as pb

PATIENCE_S = 60


class Script:
    """The server's side of one stream; answers what it is told to, when it is told to.

    Ends it, as a server does, when the client has ended its side and all is answered.

    Attributes:
        messages: of the client, as they come.
    """

    def __init__(self, server: FakeServer) -> None:
        self.messages: list[pb.PredictStreamRequest] = []
        self.metadata: dict[str, Any] = {}
        self.client_ended = threading.Event()
        self._to_send: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answered = 0
        server.answer("PredictStream", self._handle)

    def _handle(self, requests: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        self.metadata = dict(context.invocation_metadata())
        threading.Thread(target=self._read, args=(requests,), daemon=True).start()
        if not context.add_callback(lambda: self._to_send.put(None)):
            return  # It is over already.
        while (told := self._to_send.get()) is not None:
            if callable(told):
                told(None, context)
            yield told

    def _read(self, requests: Any) -> None:
        try:
            for message in requests:
                self.messages.append(message)
        except grpc.RpcError:
            return
        except Exception:  # What the library raises when the call is over.
            return
        self.client_ended.set()
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self.client_ended.is_set() and self._answered >= len(self.items):
            self.end()

    @property
    def items(self) -> list[pb.PredictStreamItem]:
        return [item for message in self.messages for item in message.items]

    def answer(self, *results: pb.PredictStreamResult) -> None:
        self._to_send.put(pb.PredictStreamResponse(results=results))
        self._answered += len(results)
        self._end_if_done()

    def end(self, how: Callable[..., Any] | None = None) -> None:
        """Ends the stream: well, or with a refusal."""
        self._to_send.put(how)


def outputs(item: pb.PredictStreamItem, text: str = "") -> pb.PredictStreamResult:
    served = pb.Served(model=f"models/{item.request.key}")
    values = item.request.inputs[0].text.values
    tensor = to_tensor([text or value for value in values], "y")
    return pb.PredictStreamResult(
        id=item.id, response=pb.PredictResponse(outputs=[tensor], served=served)
    )


def failure(
    item: pb.PredictStreamItem, reason: int, code: grpc.StatusCode, **more: Any
) -> pb.PredictStreamResult:
    error = pb.PredictBatchError(code=code.value[0], message="the text", **more)
    error.reason = reason  # type: ignore[assignment]  # an enum's value
    return pb.PredictStreamResult(id=item.id, error=error)


class Both:
    """A stream of one of the clients, asked in one way.

    Attributes:
        predict: begins to ask; gives what can be awaited for the answer.
    """

    def __init__(self, client: Client | AsyncClient, **settings: Any) -> None:
        self.client = client
        self.stream: Any = client.stream(**settings)

    async def predict(self, *arguments: Any, **settings: Any) -> asyncio.Future[Prediction]:
        if isinstance(self.client, AsyncClient):
            asking: asyncio.Future[Prediction] = asyncio.ensure_future(
                self.stream.predict(*arguments, **settings)
            )
            return asking
        future: Future[Prediction] = await asyncio.to_thread(
            self.stream.predict, *arguments, **settings
        )
        return asyncio.wrap_future(future)

    async def map(self, items: Any, **settings: Any) -> list[Prediction | ModelyardError]:
        if isinstance(self.client, AsyncClient):
            return [each async for each in self.stream.map(items, **settings)]
        return await asyncio.to_thread(lambda: list(self.stream.map(items, **settings)))

    async def close(self) -> None:
        await _done(self.stream.close)

    async def cancel(self) -> None:
        await _done(self.stream.cancel)


async def _done(close: Callable[[], Any]) -> None:
    if asyncio.iscoroutinefunction(close):
        await asyncio.wait_for(close(), PATIENCE_S)
    else:
        await asyncio.wait_for(asyncio.to_thread(close), PATIENCE_S)


@pytest.fixture
def script(server: FakeServer) -> Script:
    return Script(server)


Open = Callable[..., Both]


@pytest.fixture(params=["blocking", "asyncio"])
async def opened(request: pytest.FixtureRequest, server: FakeServer) -> AsyncIterator[Open]:
    """Opens a stream of one of the clients."""
    client: Any = (Client if request.param == "blocking" else AsyncClient)(server.address)
    streams: list[Both] = []

    def open_one(**settings: Any) -> Both:
        streams.append(Both(client, **settings))
        return streams[-1]

    yield open_one
    for each in streams:
        await each.cancel()
    await _done(client.close)


async def arrived(script: Script, count: int) -> list[pb.PredictStreamItem]:
    await eventually(f"{count} items have come", lambda: len(script.items) >= count)
    assert len(script.items) == count
    return script.items


async def asked(both: Both, script: Script, *texts: str) -> list[asyncio.Future[Prediction]]:
    """Asks for texts, each in a message of its own."""
    futures = []
    for text in texts:
        futures.append(await both.predict("k", text))
        await arrived(script, len(futures))
    return futures


async def error_of(awaitable: Awaitable[object]) -> BaseException:
    try:
        answer = await asyncio.wait_for(awaitable, PATIENCE_S)
    except Exception as error:
        return error
    raise AssertionError(f"it was answered: {answer!r}")


# --- Items and answers


async def test_items_say_what_predict_says(script: Script, opened: Open) -> None:
    both = opened()
    array = np.ones((2, 3), np.float32)
    await both.predict("a", {"x": array, "t": "z"}, parameters={"top_k": 3}, timeout_s=1.25)
    await arrived(script, 1)
    await both.predict("b", "text", affinity="user 7", version="v2")
    first, second = await arrived(script, 2)
    assert first.request.key == "a"
    assert list(first.request.inputs) == [to_tensor(array, "x"), to_tensor("z", "t")]
    assert first.request.parameters["top_k"] == 3
    assert first.timeout == Duration(seconds=1, nanos=250_000_000)
    assert (second.request.affinity, second.request.version) == ("user 7", "v2")
    assert second.timeout == Duration(seconds=30)  # The client's own.
    assert first.id != second.id


async def test_answers_find_their_items_in_any_order(script: Script, opened: Open) -> None:
    both = opened()
    futures = await asked(both, script, "a", "b", "c")
    a, b, c = script.items
    script.answer(outputs(c), outputs(a))
    assert (await futures[2]).only == ["c"]
    assert (await futures[0]).only == ["a"]
    assert both.stream.in_flight_count == 1
    script.answer(outputs(b))
    prediction = await futures[1]
    assert prediction.only == ["b"] and prediction.served.model == "models/k"


async def test_an_item_fails_for_itself_with_the_error_of_predict(
    script: Script, opened: Open
) -> None:
    both = opened()
    futures = await asked(both, script, "a", "b", "c")
    a, b, c = script.items
    code = grpc.StatusCode
    script.answer(
        failure(a, error_reason_pb2.ERROR_REASON_KEY_NOT_FOUND, code.NOT_FOUND),
        failure(
            b,
            error_reason_pb2.ERROR_REASON_QUEUE_FULL,
            code.RESOURCE_EXHAUSTED,
            retry_delay=Duration(nanos=250_000_000),
        ),
        outputs(c),
    )
    assert type(await error_of(futures[0])) is KeyNotFound
    full = await error_of(futures[1])
    assert isinstance(full, QueueFull) and full.retry_after_s == 0.25
    assert (await futures[2]).only == ["c"]


async def test_arguments_that_cannot_be_sent_touch_nothing(script: Script, opened: Open) -> None:
    both = opened()
    assert isinstance(await error_of(await_of(both, 7, "x")), TypeError)
    assert isinstance(await error_of(await_of(both, "k", {})), ValueError)
    assert isinstance(await error_of(await_of(both, "k", "x", timeout_s=-1)), ValueError)
    assert isinstance(await error_of(await_of(both, "k", "x", affinity=1)), TypeError)
    assert both.stream.in_flight_count == 0
    (future,) = await asked(both, script, "fine")
    script.answer(outputs(script.items[0]))
    assert (await future).only == ["fine"]


async def await_of(both: Both, *arguments: Any, **settings: Any) -> Prediction:
    return await (await both.predict(*arguments, **settings))


async def test_an_item_that_is_too_large_is_refused_alone(server: FakeServer) -> None:
    script = Script(server)
    with Client(server.address, max_message_bytes=10_000) as client, client.stream() as stream:
        with pytest.raises(ValueError, match="max_message_bytes is 10000"):
            stream.predict("k", "x" * 10_000)
        future = stream.predict("k", "small")
        await arrived(script, 1)
        script.answer(outputs(script.items[0]))
        assert (await asyncio.wrap_future(future)).only == ["small"]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"max_in_flight": 0}, ValueError),
        ({"max_in_flight": 1025}, ValueError),
        ({"max_in_flight": 2.0}, TypeError),
        ({"max_in_flight": True}, TypeError),
        ({"linger_s": -1}, ValueError),
        ({"linger_s": float("inf")}, ValueError),
        ({"linger_s": "1"}, TypeError),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], error: type[Exception]) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(error, match=next(iter(settings))):
        client.stream(**settings)


# --- Together


async def test_what_waits_goes_in_one_message(script: Script, server: FakeServer) -> None:
    async with AsyncClient(server.address) as client, client.stream() as stream:
        futures = [asyncio.ensure_future(stream.predict("k", f"t{i}")) for i in range(50)]
        await arrived(script, 50)
        assert len(script.messages) == 1
        script.answer(*map(outputs, script.items))
        assert [(await each).only for each in futures] == [[f"t{i}"] for i in range(50)]


async def test_a_message_is_not_filled_beyond_its_bytes(script: Script, opened: Open) -> None:
    both = opened(linger_s=0.2)
    futures = [await both.predict("k", f"{i}" + "x" * 100_000) for i in range(5)]
    await arrived(script, 5)
    assert all(len(message.items) <= 2 for message in script.messages)
    script.answer(*map(outputs, script.items))
    assert [str((await each).only)[2] for each in futures] == ["0", "1", "2", "3", "4"]


async def test_items_linger_for_company_until_there_is_no_room(
    script: Script, opened: Open
) -> None:
    # For ever, as far as this test goes: it is the third that sends them.
    both = opened(linger_s=300, max_in_flight=3)
    futures = [await both.predict("k", text) for text in "abc"]
    await arrived(script, 3)
    assert len(script.messages) == 1
    script.answer(*map(outputs, script.items))
    assert [(await each).only for each in futures] == [["a"], ["b"], ["c"]]


async def test_closing_ends_the_lingering(script: Script, opened: Open) -> None:
    both = opened(linger_s=300)
    future = await both.predict("k", "a")
    closing = asyncio.create_task(both.close())
    await arrived(script, 1)
    script.answer(outputs(script.items[0]))
    await closing
    assert (await future).only == ["a"]


# --- Bounds


async def test_no_more_are_asked_than_may_be_in_flight(script: Script, opened: Open) -> None:
    both = opened(max_in_flight=2)
    futures = await asked(both, script, "a", "b")
    more = asyncio.create_task(await_of(both, "k", "c"))
    await asyncio.sleep(0.05)
    assert len(script.items) == both.stream.in_flight_count == 2
    script.answer(outputs(script.items[1]))
    await arrived(script, 3)
    script.answer(outputs(script.items[0]), outputs(script.items[2]))
    assert [(await each).only for each in (*futures, more)] == [["a"], ["b"], ["c"]]


async def test_a_caller_that_is_cancelled_keeps_its_place_until_the_answer(
    script: Script, server: FakeServer
) -> None:
    async with AsyncClient(server.address) as client, client.stream(max_in_flight=1) as stream:
        first = asyncio.ensure_future(stream.predict("k", "a"))
        await arrived(script, 1)
        second = asyncio.ensure_future(stream.predict("k", "b"))
        third = asyncio.ensure_future(stream.predict("k", "c"))
        await asyncio.sleep(0)
        first.cancel()
        second.cancel()  # Which waits for a place and has none.
        await asyncio.wait({first, second})
        assert stream.in_flight_count == 1
        script.answer(outputs(script.items[0]))
        await arrived(script, 2)
        script.answer(outputs(script.items[1]))
        assert (await third).only == ["c"]


# --- map


async def test_map_yields_in_order_whatever_comes_first(script: Script, opened: Open) -> None:
    both = opened(max_in_flight=4)
    items: list[Any] = [("k", f"t{i}") for i in range(10)]
    items[5] = BatchItem(key="other", inputs="t5", affinity="u", version="v")

    async def answer_backwards() -> None:
        done = 0
        while done < 10:
            await asyncio.sleep(0.001)
            new = script.items[done:]
            done += len(new)
            for each in reversed(new):
                if each.request.inputs[0].text.values == ["t3"]:
                    reason = error_reason_pb2.ERROR_REASON_KEY_NOT_FOUND
                    script.answer(failure(each, reason, grpc.StatusCode.NOT_FOUND))
                else:
                    script.answer(outputs(each))

    answering = asyncio.create_task(answer_backwards())
    found = await asyncio.wait_for(both.map(items, timeout_s=2), PATIENCE_S)
    await answering
    told = [each.only if isinstance(each, Prediction) else type(each) for each in found]
    assert told == [KeyNotFound if i == 3 else [f"t{i}"] for i in range(10)]
    assert {each.timeout.seconds for each in script.items} == {2}
    fifth = script.items[5].request
    assert (fifth.key, fifth.affinity, fifth.version) == ("other", "u", "v")


async def test_map_takes_no_more_than_there_is_room_for(script: Script, opened: Open) -> None:
    taken = 0

    def endless() -> Iterator[tuple[str, str]]:
        nonlocal taken
        while True:
            taken += 1
            yield "k", "t"

    both = opened(max_in_flight=3)
    asking = asyncio.create_task(both.map(endless()))
    await arrived(script, 3)
    await asyncio.sleep(0.05)
    # One more may be in hand, that waits for a place.
    assert 3 <= taken <= 4
    script.answer()  # Once something has come gRPC repeats nothing.
    script.end(refuse(grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING"))
    assert isinstance(await error_of(asking), ServerDraining)
    assert taken <= 5


async def test_map_takes_asynchronous_iterators(script: Script, server: FakeServer) -> None:
    async def two() -> AsyncIterator[tuple[str, str]]:
        yield "k", "a"
        yield "k", "b"

    async with AsyncClient(server.address) as client, client.stream() as stream:
        found = asyncio.ensure_future(_listed(stream.map(two())))
        await arrived(script, 2)
        script.answer(*map(outputs, script.items))
        assert [each.only for each in await found if isinstance(each, Prediction)] == [["a"], ["b"]]


async def _listed(
    found: AsyncIterator[Prediction | ModelyardError],
) -> list[Prediction | ModelyardError]:
    return [each async for each in found]


async def test_map_says_what_is_no_item(script: Script, opened: Open) -> None:
    both = opened()
    assert isinstance(await error_of(both.map(["k"])), TypeError)
    assert both.stream.in_flight_count == 0


# --- The end


async def test_a_stream_that_breaks_fails_what_is_not_answered(
    script: Script, server: FakeServer, opened: Open
) -> None:
    both = opened(max_in_flight=3)
    futures = await asked(both, script, "a", "b", "c")
    waiting = asyncio.create_task(await_of(both, "k", "waits for a place"))
    script.answer(outputs(script.items[1]))
    assert (await futures[1]).only == ["b"]
    await arrived(script, 4)
    script.end(lambda _, context: context.abort(grpc.StatusCode.UNAVAILABLE, "gone"))
    errors = [await error_of(each) for each in (futures[0], futures[2], waiting)]
    assert [type(each) for each in errors] == [StreamBroken] * 3
    assert len({id(each) for each in errors}) == 3
    assert "may be asked again, on another stream" in str(errors[0])
    assert both.stream.in_flight_count == 0
    # It is not opened again behind anybody's back.
    assert type(await error_of(await_of(both, "k", "more"))) is StreamBroken
    # But another one can be.
    Script(server)
    other = opened()
    await other.predict("k", "again")


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING", ServerDraining),
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", InvalidRequest),
        (grpc.StatusCode.INTERNAL, "INTERNAL", StreamBroken),
    ],
)
async def test_what_the_server_refuses_a_stream_for_is_told(
    script: Script,
    opened: Open,
    code: grpc.StatusCode,
    reason: str,
    kind: type[ModelyardError],
) -> None:
    both = opened()
    (future,) = await asked(both, script, "a")
    script.answer()
    script.end(refuse(code, reason))
    error = await error_of(future)
    assert type(error) is kind
    assert error.code is code
    assert "the stream ended before it had answered this item" in str(error)


async def test_a_server_that_ends_a_stream_early_has_broken_it(
    script: Script, opened: Open
) -> None:
    both = opened()
    (future,) = await asked(both, script, "a")
    script.end()
    assert type(await error_of(future)) is StreamBroken


async def test_an_answer_to_nothing_breaks_the_contract(script: Script, opened: Open) -> None:
    both = opened()
    (future,) = await asked(both, script, "a")
    script.answer(pb.PredictStreamResult(id=script.items[0].id + 1))
    assert type(await error_of(future)) is ServerError


async def test_an_answer_that_cannot_be_read_is_one_items(script: Script, opened: Open) -> None:
    both = opened()
    bad, good = await asked(both, script, "a", "b")
    script.answer(pb.PredictStreamResult(id=script.items[0].id), outputs(script.items[1]))
    assert type(await error_of(bad)) is ServerError
    assert (await good).only == ["b"]


async def test_closing_waits_for_what_is_missing(script: Script, opened: Open) -> None:
    both = opened()
    futures = await asked(both, script, "a", "b")
    closing = asyncio.create_task(both.close())
    # The client has ended its side, and waits.
    await asyncio.to_thread(script.client_ended.wait, PATIENCE_S)
    assert not closing.done()
    assert isinstance(await error_of(await_of(both, "k", "more")), RuntimeError)
    script.answer(*map(outputs, script.items))
    await closing
    assert [(await each).only for each in futures] == [["a"], ["b"]]
    await both.close()


async def test_a_stream_that_asked_nothing_calls_nobody(server: FakeServer, opened: Open) -> None:
    both = opened()
    await both.close()
    await both.close()
    assert not server.requests
    assert isinstance(await error_of(await_of(both, "k", "x")), RuntimeError)


async def test_cancelling_drops_what_is_missing(script: Script, opened: Open) -> None:
    both = opened()
    futures = await asked(both, script, "a", "b")
    await both.cancel()
    assert [type(await error_of(each)) for each in futures] == [StreamBroken] * 2
    assert isinstance(await error_of(await_of(both, "k", "x")), RuntimeError)


@pytest.mark.parametrize("steps", range(6))
async def test_a_stream_can_be_cancelled_while_it_begins(
    script: Script, server: FakeServer, steps: int
) -> None:
    async with AsyncClient(server.address) as client:
        stream = client.stream()
        asking = asyncio.ensure_future(stream.predict("k", "a"))
        for _ in range(steps):
            await asyncio.sleep(0)
        await asyncio.wait_for(stream.cancel(), PATIENCE_S)
        assert isinstance(await error_of(asking), (StreamBroken, RuntimeError))


async def test_an_exception_in_the_block_does_not_wait(script: Script, server: FakeServer) -> None:
    async with AsyncClient(server.address) as client:
        with pytest.raises(ZeroDivisionError):
            async with client.stream() as stream:
                future = await stream.submit("k", "never answered")
                raise ZeroDivisionError
        assert type(await error_of(future)) is StreamBroken

    def blocking() -> None:
        with Client(server.address) as client, client.stream() as stream:
            stream.predict("k", "never answered")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await asyncio.to_thread(blocking)


async def test_closing_the_client_ends_its_streams(
    script: Script, server: FakeServer, opened: Open
) -> None:
    both = opened()
    (future,) = await asked(both, script, "a")
    await _done(both.client.close)
    assert type(await error_of(future)) is StreamBroken
    assert isinstance(await error_of(await_of(both, "k", "x")), (StreamBroken, RuntimeError))


async def test_a_server_that_vanishes_without_a_word_is_noticed(
    script: Script, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelyard._stream_items._OVERDUE_S", 0.01)
    monkeypatch.setattr("modelyard.streams._LOOK_S", 0.01)
    both = opened()
    # As long as one of them may still be answered the server is not given up.
    patient = await both.predict("k", "a", timeout_s=1000)
    hasty = await both.predict("k", "b", timeout_s=0.01)
    await arrived(script, 2)
    await asyncio.sleep(0.1)
    assert not patient.done() and not hasty.done()
    script.answer(*map(outputs, script.items))
    await patient, await hasty
    alone = await both.predict("k", "c", timeout_s=0.01)
    assert type(await error_of(alone)) is StreamBroken


async def test_nobody_listens_is_an_error_that_says_so() -> None:
    async with AsyncClient("127.0.0.1:1", timeout_s=5) as client, client.stream() as stream:
        error = await error_of(stream.predict("k", "x"))
        assert type(error) is StreamBroken
        assert "127.0.0.1:1" in str(error)


async def test_the_identity_goes_with_the_stream(server: FakeServer) -> None:
    script = Script(server)
    async with AsyncClient(server.address, identity="team a") as client:
        stream = client.stream()
        await stream.submit("k", "x")
        await arrived(script, 1)
        assert script.metadata["x-modelyard-identity"] == "team a"
        await stream.cancel()


def test_threads_share_a_stream(server: FakeServer) -> None:
    script = Script(server)
    over = threading.Event()

    def answer_all() -> None:
        done = 0
        while not over.wait(0.001):
            new = script.items[done:]
            done += len(new)
            if new:
                script.answer(*map(outputs, new))

    answering = threading.Thread(target=answer_all)
    answering.start()
    with Client(server.address) as client:
        stream = client.stream(max_in_flight=8)
        found: dict[str, Any] = {}

        def ask(name: str) -> None:
            for i in range(50):
                found[f"{name}{i}"] = stream.predict("k", f"{name}{i}").result(PATIENCE_S).only

        threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stream.close()
    over.set()
    answering.join()
    assert found == {f"{name}{i}": [f"{name}{i}"] for name in "abcd" for i in range(50)}
    names = {thread.name for thread in threading.enumerate()}
    assert not {name for name in names if name.startswith("modelyard-stream")}
