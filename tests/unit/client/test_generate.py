"""generate of both clients and of the command line, against a server with made-up answers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from tests.support.fake_api import FakeServer, Handler, refuse, serving
from typer.testing import CliRunner

from modelyard import (
    AsyncClient,
    Client,
    FinishReason,
    GenerationPiece,
    KeyNotFound,
    ModelyardError,
    QueueFull,
    Served,
    ServerError,
    WorkerLost,
)
from modelyard.v1 import inference_service_pb2 as pb
from modelyard_server.cli.main import app

SERVED = pb.Served(
    model="models/m", device="devices/cpu", cold=True, load_duration=Duration(seconds=2)
)
PIECES = (
    pb.GenerateResponse(text="Once", token_ids=[1]),
    pb.GenerateResponse(text=" upon\n\x1b[31m", token_ids=[2, 3]),
    pb.GenerateResponse(
        text=" a",
        token_ids=[4],
        finish=pb.FINISH_REASON_STOP,
        served=SERVED,
        prompt_token_count=5,
        token_count=4,
    ),
)

Pieces = list[GenerationPiece]
Ask = Callable[..., Pieces]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as fake:
        fake.answer("Generate", telling(*PIECES))
        yield fake


def telling(*messages: Any, then: Handler | None = None) -> Handler:
    """A stream of messages, and what a handler does then."""

    def handler(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield from messages
        if then is not None:
            then(request, context)

    return handler


@pytest.fixture(params=["blocking", "async"])
def ask(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Ask]:
    """All pieces, by one of the clients; those before an error are in its `pieces`."""
    if request.param == "blocking":

        def read(*arguments: Any, **settings: Any) -> Pieces:
            pieces: Pieces = []
            with client.generate(*arguments, **settings) as generation:
                try:
                    pieces.extend(generation)
                except ModelyardError as error:
                    error.pieces = pieces  # type: ignore[attr-defined]  # for the test
                    raise
                assert generation.last is pieces[-1]
            return pieces

        with Client(server.address) as client:
            yield read
        return

    def run(*arguments: Any, **settings: Any) -> Pieces:
        async def call() -> Pieces:
            pieces: Pieces = []
            async with (
                AsyncClient(server.address) as client,
                client.generate(*arguments, **settings) as generation,
            ):
                try:
                    async for piece in generation:
                        pieces.append(piece)
                except ModelyardError as error:
                    error.pieces = pieces  # type: ignore[attr-defined]  # for the test
                    raise
                assert generation.last is pieces[-1]
            return pieces

        return asyncio.run(call())

    yield run


def test_pieces_come_in_order_and_the_last_one_tells_how_it_was(ask: Ask) -> None:
    pieces = ask("stories", "Tell")
    assert [piece.text for piece in pieces] == ["Once", " upon\n\x1b[31m", " a"]
    assert [piece.token_ids for piece in pieces] == [(1,), (2, 3), (4,)]
    assert pieces[0] == GenerationPiece(text="Once", token_ids=(1,))
    last = pieces[-1]
    assert last.finish is FinishReason.STOP
    assert (last.prompt_token_count, last.token_count) == (5, 4)
    assert last.served == Served(
        model="models/m", device="devices/cpu", cold=True, wait_s=0.0, load_s=2.0, run_s=0.0
    )


def test_what_is_asked_for_is_sent(server: FakeServer, ask: Ask) -> None:
    ask("stories", "Tell")
    assert server.requests[-1] == pb.GenerateRequest(key="stories", prompt="Tell")
    ask(
        "stories",
        "Tell",
        max_new_tokens=7,
        stop=["a", "b"],
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        seed=-1,
        affinity="ann",
        version="2",
    )
    assert server.requests[-1] == pb.GenerateRequest(
        key="stories",
        prompt="Tell",
        max_new_tokens=7,
        stop=["a", "b"],
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        seed=-1,
        affinity="ann",
        version="2",
    )
    ask("stories", "Tell", stop="one", seed=0)
    assert server.requests[-1].stop == ["one"]
    assert server.requests[-1].HasField("seed")


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"key": 7}, TypeError),
        ({"prompt": b"x"}, TypeError),
        ({"max_new_tokens": 1.0}, TypeError),
        ({"max_new_tokens": True}, TypeError),
        ({"max_new_tokens": 0}, ValueError),
        ({"max_new_tokens": 2**31}, ValueError),
        ({"stop": [b"x"]}, TypeError),
        ({"temperature": "hot"}, TypeError),
        ({"top_k": 0}, ValueError),
        ({"top_p": 0}, ValueError),
        ({"top_p": "x"}, TypeError),
        ({"seed": 2**63}, ValueError),
        ({"version": 2}, TypeError),
        ({"timeout_s": 0}, ValueError),
    ],
)
def test_what_cannot_be_sent_is_refused_at_once(
    server: FakeServer, ask: Ask, wrong: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        ask(**({"key": "k", "prompt": "p"} | wrong))
    assert server.requests == []


def test_a_refusal_is_the_error_of_its_reason(server: FakeServer, ask: Ask) -> None:
    server.answer("Generate", refuse(grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND"))
    with pytest.raises(KeyNotFound):
        ask("stories", "Tell")


def test_an_error_may_come_after_some_pieces(server: FakeServer, ask: Ask) -> None:
    lost = refuse(grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
    server.answer("Generate", telling(PIECES[0], then=lost))
    with pytest.raises(WorkerLost) as caught:
        ask("stories", "Tell")
    assert [piece.text for piece in caught.value.pieces] == ["Once"]  # type: ignore[attr-defined]
    # What was begun is not begun again.
    assert len(server.requests) == 1


def test_a_server_that_is_full_is_asked_again(server: FakeServer, ask: Ask) -> None:
    full = refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", pushback_ms=1)

    def second_time(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        if len(server.requests) == 1:
            full(request, context)
        yield from PIECES

    server.answer("Generate", second_time)
    assert len(ask("stories", "Tell")) == 3
    assert len(server.requests) == 2


def test_one_that_stays_full_says_so(server: FakeServer, ask: Ask) -> None:
    server.answer(
        "Generate", refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", pushback_ms=-1)
    )
    with pytest.raises(QueueFull):
        ask("stories", "Tell")


@pytest.mark.parametrize(
    "messages",
    [PIECES[:2], [pb.GenerateResponse(finish=pb.FINISH_REASON_END)]],
    ids=["no end", "not served"],
)
def test_an_answer_that_breaks_the_contract_is_the_servers_error(
    server: FakeServer, ask: Ask, messages: Any
) -> None:
    server.answer("Generate", telling(*messages))
    with pytest.raises(ServerError):
        ask("stories", "Tell")


def test_a_reason_that_is_not_known_ends_it_as_well(server: FakeServer, ask: Ask) -> None:
    message = pb.GenerateResponse(served=SERVED)
    message.finish = 77  # type: ignore[assignment]  # of a newer server
    server.answer("Generate", telling(message))
    (piece,) = ask("stories", "Tell")
    assert piece.finish is FinishReason.UNKNOWN


def test_all_text_can_be_had_at_once(server: FakeServer) -> None:
    with Client(server.address) as client:
        generation = client.generate("stories", "Tell")
        assert generation.text() == "Once upon\n\x1b[31m a"
        assert generation.last.finish is FinishReason.STOP
        assert generation.text() == ""

    async def read() -> str:
        async with AsyncClient(server.address) as client:
            return await client.generate("stories", "Tell").text()

    assert asyncio.run(read()) == "Once upon\n\x1b[31m a"


def test_before_its_end_there_is_no_last_piece(server: FakeServer) -> None:
    with Client(server.address) as client, client.generate("stories", "Tell") as generation:
        next(generation)
        with pytest.raises(RuntimeError, match="to its end"):
            _ = generation.last


class Endless:
    """A handler that tells one piece, and then waits until its caller has gone."""

    def __init__(self) -> None:
        self.gone = threading.Event()

    def __call__(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        # Before the piece: behind it a handler whose caller has gone is not run any more.
        assert context.add_callback(self.gone.set)
        yield PIECES[0]
        self.gone.wait(30)


def test_closing_one_cancels_its_call(server: FakeServer) -> None:
    endless = Endless()
    server.answer("Generate", endless)
    with Client(server.address) as client:
        with client.generate("stories", "Tell") as generation:
            assert next(generation).text == "Once"
        assert endless.gone.wait(10)
        assert list(generation) == []


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_an_asynchronous_one_is_cancelled_by_closing_it_or_its_task(
    server: FakeServer, how: str
) -> None:
    endless = Endless()
    server.answer("Generate", endless)

    async def leave() -> None:
        async with AsyncClient(server.address) as client:
            generation = client.generate("stories", "Tell")
            assert (await anext(generation)).text == "Once"
            if how == "close":
                generation.close()
            else:
                task = asyncio.create_task(generation.__anext__())
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert await asyncio.to_thread(endless.gone.wait, 10)
            assert [piece async for piece in generation] == []

    asyncio.run(leave())


class TestCommand:
    def run(self, server: FakeServer, *arguments: str) -> Any:
        return CliRunner().invoke(app, ["generate", *arguments, "--server", server.address])

    def test_the_text_is_printed_and_touches_no_terminal(self, server: FakeServer) -> None:
        result = self.run(server, "stories", "Tell", "--max-new-tokens", "7", "--stop", "x")
        assert result.exit_code == 0
        assert result.stdout == "Once upon\n\N{REPLACEMENT CHARACTER}[31m a\n"
        (request,) = server.requests
        assert (request.max_new_tokens, list(request.stop)) == (7, ["x"])

    def test_programs_get_a_line_for_each_piece(self, server: FakeServer) -> None:
        result = self.run(server, "stories", "Tell", "--json")
        pieces = [json.loads(line) for line in result.stdout.splitlines()]
        assert [piece["text"] for piece in pieces] == ["Once", " upon\n\x1b[31m", " a"]
        assert pieces[-1]["finish"] == "stop"
        assert pieces[-1]["served"]["model"] == "models/m"

    def test_an_error_is_one_line_behind_what_came(self, server: FakeServer) -> None:
        lost = refuse(grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
        server.answer("Generate", telling(PIECES[0], then=lost))
        result = self.run(server, "stories", "Tell")
        assert result.exit_code == 1
        assert result.stdout == "Once\n"
        assert "WORKER_LOST" in result.stderr
