"""Streams over a real channel: how they end, and that they keep nothing and nobody."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.server import eventually

from modelyard_server.errors import Reason, Refusal, Violation
from modelyard_server.services.handler import draining, invalid, server_stream
from modelyard_server.services.status import defect_reply, reply_of
from modelyard_server.transport.aio import AioTransport
from modelyard_server.transport.api import (
    Call,
    Duplex,
    Handler,
    Link,
    StatusReply,
    StreamHandler,
    Streaming,
)

PATIENCE_S = 60
LONG_S = 300
"""A grace that no test waits for."""
SERVICE = "test.Service"
MIB = 1024 * 1024

Replies = AsyncGenerator[bytes | StatusReply, None]


class Server:
    """A transport on loopback and a channel to it."""

    def __init__(self, transport: AioTransport, port: int, channel: grpc.aio.Channel) -> None:
        self.transport = transport
        self.port = port
        self.channel = channel

    def stream(self, method: str, body: bytes = b"", **options: Any) -> Any:
        # Without serializers a channel carries bytes, which its stubs do not say.
        method_of: Any = self.channel.unary_stream(f"/{SERVICE}/{method}")
        return method_of(body, timeout=options.pop("timeout", PATIENCE_S), **options)

    def duplex(self, method: str, **options: Any) -> Any:
        method_of: Any = self.channel.stream_stream(f"/{SERVICE}/{method}")
        return method_of(timeout=options.pop("timeout", PATIENCE_S), **options)

    def call(self, method: str, body: bytes = b"") -> Any:
        method_of: Any = self.channel.unary_unary(f"/{SERVICE}/{method}")
        return method_of(body, timeout=PATIENCE_S)

    async def all_of(self, stream: Any) -> tuple[list[bytes], grpc.aio.AioRpcError | None]:
        """What a stream tells, and what it ends with."""
        told: list[bytes] = []
        try:
            while (message := await stream.read()) is not grpc.aio.EOF:
                told.append(message)
        except grpc.aio.AioRpcError as error:
            return told, error
        return told, None


@asynccontextmanager
async def serving(**methods: Handler | Streaming | Duplex) -> AsyncIterator[Server]:
    tasks_before = asyncio.all_tasks()
    transport = AioTransport(
        {SERVICE: methods},
        max_message_bytes=MIB,
        defect=defect_reply,
        draining=reply_of(draining()),
    )
    port = await transport.start("127.0.0.1:0")
    try:
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{port}", options=[("grpc.enable_retries", 0)]
        ) as channel:
            yield Server(transport, port, channel)
    finally:
        await transport.stop(0)

    def leftovers() -> set[asyncio.Task[Any]]:
        return {task for task in asyncio.all_tasks() - tasks_before if not task.done()}

    await eventually("no task of a call is left", lambda: not leftovers())
    assert not transport._carrier._streams
    assert not transport._carrier._links
    assert not transport._carrier.finite_tasks


class Watch:
    """A handler that tells what it is given, and how it was ended."""

    def __init__(self, *begin: bytes) -> None:
        self.replies: asyncio.Queue[bytes | StatusReply] = asyncio.Queue()
        self.began = asyncio.Event()
        self.ended = asyncio.Event()
        self.how: BaseException | None = None
        for reply in begin:
            self.replies.put_nowait(reply)

    async def __call__(self, call: Call) -> Replies:
        self.began.set()
        try:
            while True:
                yield await self.replies.get()
        except BaseException as error:
            self.how = error
            raise
        finally:
            self.ended.set()


class Flood:
    """A handler that never waits: it tells as fast as the reader reads.

    Attributes:
        made: messages it has made.
        how: it was ended, once it is.
    """

    def __init__(self, size: int = MIB, *, most: int | None = None) -> None:
        self.made = 0
        self.how: type[BaseException] | None = None
        self._size = size
        self._most = most

    async def __call__(self, call: Call) -> Replies:
        try:
            while self._most is None or self.made < self._most:
                self.made += 1
                yield bytes(self._size)
            await asyncio.Event().wait()
        except BaseException as error:
            self.how = type(error)
            raise

    async def is_stuck(self) -> None:
        """Waits until it has begun and makes no more, because its reader does not read."""
        last = 0

        async def same() -> bool:
            nonlocal last
            before, last = last, self.made
            await asyncio.sleep(0.2)
            return 0 < before == self.made

        await eventually("the flood is stuck", same)


class Relay:
    """A connection between a client and the server that can be cut."""

    def __init__(self) -> None:
        self.target = ""
        self.writers: set[asyncio.StreamWriter] = set()

    def break_off(self) -> None:
        """Resets both sides."""
        for writer in self.writers:
            writer.transport.abort()


@asynccontextmanager
async def relay_to(port: int) -> AsyncIterator[Relay]:
    relay = Relay()
    async with asyncio.TaskGroup() as tasks:

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
            writer.close()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
            relay.writers |= {writer, there_writer}
            tasks.create_task(pump(reader, there_writer))
            tasks.create_task(pump(there_reader, writer))

        listener = await asyncio.start_server(accept, "127.0.0.1", 0)
        relay.target = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        yield relay
        listener.close()
        relay.break_off()


def telling(*replies: bytes | StatusReply | BaseException) -> Streaming:
    async def tell(call: Call) -> Replies:
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply
            yield reply

    return Streaming(tell)


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the server logged of calls that went wrong; the client's library logs here as well."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING
        and (record.name.startswith("modelyard") or "servicer method" in record.getMessage())
    ]


def info_of(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    trailers = {str(key): value for key, value in error.trailing_metadata() or ()}
    details = trailers["grpc-status-details-bin"]
    assert isinstance(details, bytes)
    status = status_pb2.Status.FromString(details)
    return error_details_pb2.ErrorInfo.FromString(status.details[0].value)


# --- How a stream ends by itself ------------------------------------------------------------------


@pytest.mark.parametrize("replies", [(), (b"",), (b"a", b"b", b"c")])
async def test_messages_arrive_in_order_and_the_end_is_ok(replies: tuple[bytes, ...]) -> None:
    async with serving(Tell=telling(*replies)) as server:
        stream = server.stream("Tell")
        assert await server.all_of(stream) == ([*replies], None)
        assert await stream.code() is grpc.StatusCode.OK


async def test_a_handler_gets_the_body_metadata_and_the_time_that_is_left() -> None:
    calls: list[Call] = []

    async def tell(call: Call) -> Replies:
        calls.append(call)
        yield call.body[::-1]

    async with serving(Tell=Streaming(tell)) as server:
        stream = server.stream("Tell", b"abc", metadata=(("x-tag", "t"),), timeout=5)
        assert await server.all_of(stream) == ([b"cba"], None)
        assert (await server.all_of(server.stream("Tell", timeout=None)))[1] is None
    timed, untimed = calls
    assert ("x-tag", "t") in timed.metadata
    assert timed.remaining_s is not None
    assert 0 < timed.remaining_s < 6
    assert untimed.remaining_s is None


async def test_a_status_reply_ends_the_stream_with_its_details() -> None:
    refusal = Refusal(Reason.QUEUE_FULL, "too many", retry_after_s=0.25)
    async with serving(Tell=telling(b"a", reply_of(refusal), b"never")) as server:
        told, error = await server.all_of(server.stream("Tell"))
    assert told == [b"a"]
    assert error is not None
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert info_of(error).reason == "QUEUE_FULL"
    assert ("grpc-retry-pushback-ms", "250") in tuple(error.trailing_metadata() or ())


@pytest.mark.parametrize("before", [(), (b"a",)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: ValueError("secret /root/path"),
        lambda: TimeoutError("secret"),
        lambda: ExceptionGroup("secret", [ValueError("secret")]),
        lambda: grpc.RpcError("secret"),
    ],
)
async def test_the_text_of_an_exception_is_for_the_log_alone(
    make: Callable[[], BaseException], before: tuple[bytes, ...], caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(Fail=telling(*before, make())) as server:
        told, error = await server.all_of(server.stream("Fail"))
    assert told == [*before]
    assert error is not None
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in repr(error)
    error_id = info_of(error).metadata["error_id"]
    (record,) = [r for r in caplog.records if error_id in r.getMessage()]
    assert record.exc_info is not None
    assert "secret" in str(record.exc_info[1])


async def test_a_cancelled_task_of_ours_does_not_leave_the_client_waiting() -> None:
    async with serving(Stray=telling(asyncio.CancelledError())) as server:
        stream = server.stream("Stray")
        _, error = await asyncio.wait_for(server.all_of(stream), PATIENCE_S / 2)
    assert error is not None
    assert error.code() is grpc.StatusCode.INTERNAL


async def test_a_message_that_is_too_large_ends_its_stream_and_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = Watch(b"a")
    large = telling(bytes(65 * MIB))
    async with serving(Large=large, Watch=Streaming(watch)) as server:
        stream = server.stream("Watch")
        assert await stream.read() == b"a"
        told, error = await server.all_of(server.stream("Large"))
        assert told == []
        assert error is not None
        watch.replies.put_nowait(b"b")
        assert await stream.read() == b"b"


# --- How others end it ----------------------------------------------------------------------------


async def test_a_client_that_leaves_closes_a_handler_that_waits() -> None:
    watch = Watch(b"a")
    async with serving(Watch=Streaming(watch)) as server:
        stream = server.stream("Watch")
        assert await stream.read() == b"a"
        stream.cancel()
        await asyncio.wait_for(watch.ended.wait(), PATIENCE_S)
    assert type(watch.how) is asyncio.CancelledError


@pytest.mark.parametrize("size", [1, MIB])
async def test_a_connection_that_breaks_closes_its_handler(
    size: int, caplog: pytest.LogCaptureFixture
) -> None:
    flood = Flood(size, most=1 if size == 1 else None)
    async with (
        serving(Flood=Streaming(flood)) as server,
        relay_to(server.port) as relay,
        grpc.aio.insecure_channel(relay.target) as channel,
    ):
        method_of: Any = channel.unary_stream(f"/{SERVICE}/Flood")
        stream = method_of(b"", timeout=PATIENCE_S)
        assert len(await stream.read()) == size
        relay.break_off()
        await eventually("the handler is closed", lambda: flood.how)
        stream.cancel()
    assert not complaints(caplog)


async def test_a_client_that_leaves_closes_a_handler_whose_message_is_on_its_way(
    caplog: pytest.LogCaptureFixture,
) -> None:
    flood = Flood()
    async with serving(Flood=Streaming(flood)) as server:
        stream = server.stream("Flood")
        await flood.is_stuck()
        stream.cancel()
        await eventually("the handler is closed", lambda: flood.how)
    # Closed, because it did not run when the client left.
    assert flood.how is GeneratorExit
    assert not complaints(caplog)


async def test_a_deadline_that_passes_ends_the_stream_on_both_sides() -> None:
    watch = Watch(b"a")
    async with serving(Watch=Streaming(watch)) as server:
        told, error = await server.all_of(server.stream("Watch", timeout=0.3))
        assert told == [b"a"]
        assert error is not None
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(watch.ended.wait(), PATIENCE_S)
    assert type(watch.how) is asyncio.CancelledError


# --- A reader that does not read ------------------------------------------------------------------


async def test_a_reader_that_does_not_read_stops_its_handler() -> None:
    flood = Flood()
    async with serving(Flood=Streaming(flood)) as server:
        stream = server.stream("Flood")
        # It goes on until the windows of this connection are full, and no further.
        await flood.is_stuck()
        assert flood.made < 64
        # The negative control: a reader that reads moves it.
        for _ in range(100):
            assert len(await stream.read()) == MIB
        assert flood.made >= 100
        stream.cancel()


# --- The server stops -----------------------------------------------------------------------------


async def test_streams_end_at_once_with_server_draining_when_the_server_stops() -> None:
    watches = [Watch(b"a") for _ in range(3)]
    methods = {f"Watch{i}": Streaming(watch) for i, watch in enumerate(watches)}
    async with serving(**methods) as server:
        streams = [server.stream(name) for name in methods]
        assert [await stream.read() for stream in streams] == [b"a"] * 3
        began = time.monotonic()
        await asyncio.wait_for(server.transport.stop(LONG_S), LONG_S)
        assert time.monotonic() - began < LONG_S / 2
        for stream in streams:
            told, error = await server.all_of(stream)
            assert told == []
            assert error is not None
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert info_of(error).reason == "SERVER_DRAINING"
    assert all(watch.ended.is_set() for watch in watches)


async def test_a_reader_that_does_not_read_does_not_use_up_the_grace(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    flood = Flood()
    async with serving(Flood=Streaming(flood)) as server:
        stream = server.stream("Flood", timeout=None)
        await flood.is_stuck()
        began = time.monotonic()
        await asyncio.wait_for(server.transport.stop(LONG_S), LONG_S)
        assert time.monotonic() - began < LONG_S / 2
        assert flood.how is GeneratorExit
        stream.cancel()
    assert not complaints(caplog)
    assert "Traceback" not in capfd.readouterr().err


async def test_a_reader_that_reads_on_is_told_that_the_server_stops() -> None:
    flood = Flood()
    async with serving(Flood=Streaming(flood)) as server:
        stream = server.stream("Flood", timeout=None)
        await flood.is_stuck()
        stopping = asyncio.create_task(server.transport.stop(LONG_S))
        await eventually("the handler is closed", lambda: flood.how)
        told, error = await server.all_of(stream)
        assert 1 <= len(told) <= flood.made
        assert error is not None
        assert info_of(error).reason == "SERVER_DRAINING"
        await asyncio.wait_for(stopping, PATIENCE_S)


async def test_calls_that_run_keep_their_grace_beside_a_reader_that_does_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("modelyard_server.transport.aio._LINGER_S", 0.01)
    began, go_on = asyncio.Event(), asyncio.Event()

    async def wait(call: Call) -> bytes:
        began.set()
        await go_on.wait()
        return b"done"

    flood = Flood()
    async with serving(Wait=wait, Flood=Streaming(flood)) as server:
        stream = server.stream("Flood", timeout=None)
        await flood.is_stuck()
        call = asyncio.ensure_future(server.call("Wait"))
        await asyncio.wait_for(began.wait(), PATIENCE_S)
        stopping = asyncio.create_task(server.transport.stop(LONG_S))
        # Longer than whoever does not read is given.
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(stopping), 0.2)
        assert not call.done()
        go_on.set()
        assert await asyncio.wait_for(call, PATIENCE_S) == b"done"
        await asyncio.wait_for(stopping, PATIENCE_S)
        stream.cancel()


async def test_a_watcher_of_the_health_service_does_not_use_up_the_grace() -> None:
    async with serving(Tell=telling()) as server:
        health = health_pb2_grpc.HealthStub(server.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=""))
        serving_now = health_pb2.HealthCheckResponse.SERVING
        assert (await watch.read()).status == serving_now
        began = time.monotonic()
        await asyncio.wait_for(server.transport.stop(LONG_S), LONG_S)
        assert time.monotonic() - began < LONG_S / 2
        watch.cancel()


@pytest.mark.parametrize("time", range(10))
async def test_a_server_that_stops_while_the_first_message_is_on_its_way_says_so(
    time: int,
) -> None:
    flood = Flood(1)
    async with serving(Flood=Streaming(flood)) as server:
        stream = server.stream("Flood")
        await eventually("the handler has begun", lambda: flood.made)
        stopping = asyncio.create_task(server.transport.stop(LONG_S))
        _, error = await server.all_of(stream)
        assert error is not None
        assert info_of(error).reason == "SERVER_DRAINING"
        await asyncio.wait_for(stopping, PATIENCE_S)


async def test_a_handler_that_takes_its_time_to_clean_up_is_waited_for() -> None:
    cleaned = asyncio.Event()

    async def tell(call: Call) -> Replies:
        try:
            yield b"a"
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    async with serving(Tell=Streaming(tell)) as server:
        stream = server.stream("Tell")
        assert await stream.read() == b"a"
        await server.transport.stop(LONG_S)
        _, error = await server.all_of(stream)
        assert error is not None
        assert info_of(error).reason == "SERVER_DRAINING"
    assert cleaned.is_set()


async def test_a_stream_that_comes_to_its_end_is_waited_for_as_calls_are() -> None:
    watch = Watch(b"a")
    may_end = asyncio.Event()

    async def tell(call: Call) -> Replies:
        yield b"a"
        await may_end.wait()
        yield b"b"

    async with serving(Tell=Streaming(tell, is_finite=True), Watch=Streaming(watch)) as server:
        stream, endless = server.stream("Tell"), server.stream("Watch")
        assert await stream.read() == await endless.read() == b"a"
        stopping = asyncio.create_task(server.transport.stop(LONG_S))
        _, error = await server.all_of(endless)
        assert error is not None
        assert not stopping.done()
        may_end.set()
        assert await server.all_of(stream) == ([b"b"], None)
        await asyncio.wait_for(stopping, PATIENCE_S)


# --- server_stream --------------------------------------------------------------------------------


def stream_of(
    *replies: health_pb2.HealthCheckResponse | Refusal, closed: list[str] | None = None
) -> StreamHandler:
    async def method(
        request: health_pb2.HealthCheckRequest, call: Call
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        try:
            for reply in replies:
                if isinstance(reply, Refusal):
                    raise reply
                yield reply
        finally:
            if closed is not None:
                closed.append(request.service)

    return server_stream(health_pb2.HealthCheckRequest, method)


async def test_a_method_that_refuses_ends_its_stream_with_the_refusal() -> None:
    message = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
    refusal = invalid(Violation("service", "no"))
    async with serving(Tell=Streaming(stream_of(message, refusal))) as server:
        told, error = await server.all_of(server.stream("Tell"))
    assert told == [message.SerializeToString()]
    assert error is not None
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_bytes_that_are_no_message_are_an_invalid_field() -> None:
    async with serving(Tell=Streaming(stream_of())) as server:
        told, error = await server.all_of(server.stream("Tell", b"\xff\xff"))
    assert told == []
    assert error is not None
    assert error.details() == "the message is no HealthCheckRequest"


async def test_closing_the_handler_closes_the_method_at_once() -> None:
    closed: list[str] = []
    message = health_pb2.HealthCheckResponse()
    handler = stream_of(message, message, closed=closed)
    request = health_pb2.HealthCheckRequest(service="s")
    replies = handler(Call(request.SerializeToString(), lambda: None, None))
    await anext(replies)
    assert closed == []
    await replies.aclose()
    assert closed == ["s"]


# --- Both ways ------------------------------------------------------------------------------------


class Echo:
    """A duplex handler that answers each message when it is let, and says how it was ended.

    Attributes:
        lets: answers may go.
        read: messages it has read.
        how: it was ended.
    """

    def __init__(self, *, end: StatusReply | None = None) -> None:
        self.lets = asyncio.Event()
        self.lets.set()
        self.read: list[bytes] = []
        self.how: type[BaseException] | str | None = None
        self.calls: list[Call] = []
        self._end = end

    async def __call__(self, call: Call, link: Link) -> StatusReply | None:
        self.calls.append(call)
        try:
            while (message := await link.read()) is not None:
                self.read.append(message)
                await self.lets.wait()
                await link.write(message[::-1])
        except BaseException as error:
            self.how = type(error)
            raise
        self.how = "returned"
        return self._end


async def test_messages_go_both_ways_until_the_client_ends_its_side() -> None:
    echo = Echo()
    async with serving(Echo=Duplex(echo)) as server:
        stream = server.duplex("Echo", metadata=(("x-tag", "t"),))
        for message in (b"abc", b"", b"xyz"):
            await stream.write(message)
            assert await stream.read() == message[::-1]
        await stream.done_writing()
        assert await server.all_of(stream) == ([], None)
        assert await stream.code() is grpc.StatusCode.OK
        # Nothing at all is a stream as well.
        stream = server.duplex("Echo")
        await stream.done_writing()
        assert await server.all_of(stream) == ([], None)
    assert ("x-tag", "t") in echo.calls[0].metadata
    assert echo.calls[0].body == b""
    assert echo.how == "returned"


async def test_what_a_duplex_handler_returns_is_how_it_ends() -> None:
    echo = Echo(end=reply_of(invalid(Violation("", "no"))))
    async with serving(Echo=Duplex(echo)) as server:
        stream = server.duplex("Echo")
        await stream.write(b"ab")
        await stream.done_writing()
        told, error = await server.all_of(stream)
    assert told == [b"ba"]
    assert error is not None
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "no")


@pytest.mark.parametrize("make", [lambda: ValueError("secret"), asyncio.CancelledError])
async def test_a_defect_of_a_duplex_handler_is_for_the_log_alone(
    make: Callable[[], BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(call: Call, link: Link) -> None:
        raise make()

    async with serving(Fail=Duplex(fail)) as server:
        told, error = await server.all_of(server.duplex("Fail"))
    assert told == []
    assert error is not None
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in repr(error)
    assert info_of(error).metadata["error_id"] in "".join(complaints(caplog))


@pytest.mark.parametrize("waits_for", ["message", "answer"])
async def test_a_client_that_leaves_cancels_its_duplex_handler(
    waits_for: str, caplog: pytest.LogCaptureFixture
) -> None:
    echo = Echo()
    async with serving(Echo=Duplex(echo)) as server:
        stream = server.duplex("Echo")
        await stream.write(b"a")
        assert await stream.read() == b"a"
        if waits_for == "answer":
            echo.lets.clear()
            await stream.write(b"b")
            await eventually("it has come", lambda: len(echo.read) == 2)
        stream.cancel()
        await eventually("the handler is over", lambda: echo.how)
        # A message that will not come looks like the end of a client's side for a moment.
        assert echo.how is asyncio.CancelledError or waits_for == "message"
    assert not complaints(caplog)


async def test_a_deadline_ends_a_duplex_stream_on_both_sides() -> None:
    echo = Echo()
    echo.lets.clear()
    async with serving(Echo=Duplex(echo)) as server:
        stream = server.duplex("Echo", timeout=0.3)
        await stream.write(b"a")
        _, error = await server.all_of(stream)
        assert error is not None
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually("the handler is over", lambda: echo.how)
    assert echo.how is asyncio.CancelledError


class DuplexFlood:
    """A duplex handler that writes as fast as its reader reads, and reads nothing."""

    def __init__(self) -> None:
        self.made = 0
        self.how: type[BaseException] | None = None

    async def __call__(self, call: Call, link: Link) -> None:
        try:
            while True:
                self.made += 1
                await link.write(bytes(MIB))
        except BaseException as error:
            self.how = type(error)
            raise


async def _is_stuck(made: Callable[[], int]) -> None:
    """Waits until a number has begun to grow and grows no more."""
    last = 0

    async def same() -> bool:
        nonlocal last
        before, last = last, made()
        await asyncio.sleep(0.2)
        return 0 < before == made()

    await eventually("it is stuck", same)


async def test_each_side_of_a_duplex_stream_stops_the_other() -> None:
    flood = DuplexFlood()
    async with serving(Flood=Duplex(flood)) as server:
        stream = server.duplex("Flood")
        await _is_stuck(lambda: flood.made)
        assert flood.made < 64
        sent = 0

        async def send() -> None:
            nonlocal sent
            with suppress(asyncio.CancelledError):
                while sent < 100:
                    await stream.write(bytes(MIB // 2))
                    sent += 1

        sending = asyncio.create_task(send())
        await _is_stuck(lambda: sent)
        # The handler reads nothing, so only what buffers hold has left.
        assert sent < 64
        stream.cancel()
        await asyncio.wait({sending})


async def test_duplex_streams_answer_what_they_have_when_the_server_stops() -> None:
    busy, idle, ended = Echo(), Echo(), Echo()
    methods = {"Busy": busy, "Idle": idle, "Ended": ended}
    async with serving(**{name: Duplex(echo) for name, echo in methods.items()}) as server:
        streams = {name: server.duplex(name) for name in methods}
        for name, stream in streams.items():
            await stream.write(b"ab")
            if name != "Idle":
                methods[name].lets.clear()
                if name == "Ended":
                    await stream.done_writing()
            else:
                assert await stream.read() == b"ba"
        await eventually("all has come", lambda: all(each.read for each in methods.values()))
        stopping = asyncio.create_task(server.transport.stop(LONG_S))
        # Who has nothing to answer ends at once.
        told, error = await server.all_of(streams["Idle"])
        assert error is not None
        assert (told, info_of(error).reason) == ([], "SERVER_DRAINING")
        assert busy.how is None and not stopping.done()
        busy.lets.set()
        told, error = await server.all_of(streams["Busy"])
        assert error is not None
        assert (told, info_of(error).reason) == ([b"ba"], "SERVER_DRAINING")
        ended.lets.set()
        # Whether its client had ended its side first is not known before it is read.
        told, error = await server.all_of(streams["Ended"])
        assert told == [b"ba"]
        assert error is None or info_of(error).reason == "SERVER_DRAINING"
        await asyncio.wait_for(stopping, PATIENCE_S)


async def test_a_server_that_stops_ends_a_duplex_stream_well_whose_client_is_done() -> None:
    is_over, go_on = asyncio.Event(), asyncio.Event()

    async def answer_late(call: Call, link: Link) -> None:
        while await link.read() is not None:
            pass
        is_over.set()
        await go_on.wait()
        await link.write(b"late")

    async with serving(Late=Duplex(answer_late)) as server:
        stream = server.duplex("Late")
        await stream.done_writing()
        await asyncio.wait_for(is_over.wait(), PATIENCE_S)
        stopping = asyncio.create_task(server.transport.stop(LONG_S))
        await asyncio.sleep(0)
        go_on.set()
        assert await server.all_of(stream) == ([b"late"], None)
        await asyncio.wait_for(stopping, PATIENCE_S)


async def test_a_duplex_reader_that_does_not_read_is_cut_off_when_the_server_stops(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("modelyard_server.transport.aio._LINGER_S", 0.01)
    flood = DuplexFlood()
    async with serving(Flood=Duplex(flood)) as server:
        stream = server.duplex("Flood", timeout=None)
        await _is_stuck(lambda: flood.made)
        await asyncio.wait_for(server.transport.stop(LONG_S), PATIENCE_S)
        assert flood.how is asyncio.CancelledError
        stream.cancel()
    assert not complaints(caplog)


async def test_a_duplex_stream_that_begins_while_the_server_stops_is_refused() -> None:
    began, go_on = asyncio.Event(), asyncio.Event()

    async def wait(call: Call) -> bytes:
        began.set()
        await go_on.wait()
        return b"done"

    echo = Echo()
    async with serving(Wait=wait, Echo=Duplex(echo)) as server:
        call = asyncio.ensure_future(server.call("Wait"))
        await asyncio.wait_for(began.wait(), PATIENCE_S)
        server.transport._carrier.end_streams(0)
        _, error = await server.all_of(server.duplex("Echo"))
        assert error is not None
        assert info_of(error).reason == "SERVER_DRAINING"
        assert not echo.calls
        go_on.set()
        assert await call == b"done"
