"""The transport over a real channel: what a client hears, and what it must not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from modelyard_server.errors import Code, Reason, Refusal, Violation
from modelyard_server.services.handler import unary
from modelyard_server.services.status import defect_reply, reply_of
from modelyard_server.transport.aio import AioTransport, PortInUse
from modelyard_server.transport.api import Call, Handler, StatusReply

PATIENCE_S = 60
MOST_BYTES = 64 * 1024
SERVICE = "test.Service"


class Server:
    """A transport on loopback and a channel to it."""

    def __init__(self, transport: AioTransport, port: int, channel: grpc.aio.Channel) -> None:
        self.transport = transport
        self.port = port
        self.channel = channel

    def call(self, method: str, body: bytes = b"", **options: Any) -> Any:
        # Without serializers a channel carries bytes, which its stubs do not say.
        method_of: Any = self.channel.unary_unary(f"/{SERVICE}/{method}")
        return method_of(body, timeout=options.pop("timeout", PATIENCE_S), **options)

    async def error(self, method: str, body: bytes = b"", **options: Any) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.call(method, body, **options)
        return caught.value


@asynccontextmanager
async def serving(**methods: Handler) -> AsyncIterator[Server]:
    transport = AioTransport({SERVICE: methods}, max_message_bytes=MOST_BYTES, defect=defect_reply)
    port = await transport.start("127.0.0.1:0")
    try:
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{port}", options=[("grpc.enable_retries", 0)]
        ) as channel:
            yield Server(transport, port, channel)
    finally:
        await transport.stop(0)


def answering(reply: bytes | StatusReply) -> Handler:
    async def answer(call: Call) -> bytes | StatusReply:
        return reply

    return answer


def raising(make: Callable[[], BaseException]) -> Handler:
    async def fail(call: Call) -> bytes:
        raise make()

    return fail


def trailers_of(error: grpc.aio.AioRpcError) -> dict[str, str | bytes]:
    return {str(key): value for key, value in error.trailing_metadata() or ()}


async def test_a_handler_gets_bytes_metadata_and_the_time_that_is_left() -> None:
    calls: list[Call] = []

    async def echo(call: Call) -> bytes:
        calls.append(call)
        return call.body[::-1]

    async with serving(Echo=echo) as server:
        assert await server.call("Echo", b"abc", metadata=(("x-tag", "t"),), timeout=5) == b"cba"
        assert await server.call("Echo", timeout=None) == b""
    timed, untimed = calls
    assert ("x-tag", "t") in timed.metadata
    assert timed.remaining_s is not None
    # The two sides' clocks, and the wire's three digits, may make it a little more.
    assert 0 < timed.remaining_s <= 5.5
    assert untimed.remaining_s is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: ValueError("secret /root/path"),
        lambda: KeyError("secret"),
        lambda: MemoryError("secret"),
        lambda: ExceptionGroup("secret", [ValueError("secret")]),
        lambda: grpc.RpcError("secret"),
        lambda: TimeoutError("secret"),
    ],
)
async def test_the_text_of_an_exception_is_for_the_log_alone(
    make: Callable[[], BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(Fail=raising(make)) as server:
        error = await server.error("Fail")
    assert error.code() is grpc.StatusCode.INTERNAL
    text = error.details() or ""
    assert "secret" not in text
    assert "secret" not in repr(error.trailing_metadata())
    error_id = text.rpartition("error_id=")[2]
    assert len(error_id) == 12
    (record,) = [r for r in caplog.records if error_id in r.getMessage()]
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert "secret" in str(record.exc_info[1])


async def test_a_defect_carries_error_info_like_every_error() -> None:
    async with serving(Fail=raising(lambda: ValueError("secret"))) as server:
        error = await server.error("Fail")
    details = trailers_of(error).get("grpc-status-details-bin")
    assert isinstance(details, bytes)
    status = status_pb2.Status.FromString(details)
    info = error_details_pb2.ErrorInfo.FromString(status.details[0].value)
    assert (info.reason, info.domain) == ("INTERNAL", "modelyard")
    assert info.metadata["error_id"] in (error.details() or "")


async def test_a_cancelled_task_of_ours_does_not_leave_the_client_waiting() -> None:
    async with serving(Stray=raising(asyncio.CancelledError)) as server:
        error = await asyncio.wait_for(server.error("Stray", timeout=PATIENCE_S), PATIENCE_S / 2)
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "error_id=" in (error.details() or "")


async def test_an_awaited_task_that_was_cancelled_does_not_leave_the_client_waiting() -> None:
    async def stray(call: Call) -> bytes:
        task = asyncio.create_task(asyncio.sleep(3600))
        asyncio.get_running_loop().call_soon(task.cancel)
        await task
        return b""

    async with serving(Stray=stray) as server:
        error = await asyncio.wait_for(server.error("Stray", timeout=PATIENCE_S), PATIENCE_S / 2)
    assert error.code() is grpc.StatusCode.INTERNAL


async def test_a_client_that_leaves_cancels_its_handler() -> None:
    began, ended = asyncio.Event(), asyncio.Event()
    seen: list[BaseException] = []

    async def wait(call: Call) -> bytes:
        began.set()
        try:
            await asyncio.Event().wait()
        except BaseException as error:
            seen.append(error)
            raise
        finally:
            ended.set()
        return b""

    async with serving(Wait=wait) as server:
        call = server.call("Wait")
        async with asyncio.timeout(PATIENCE_S):
            await began.wait()
            call.cancel()
            await ended.wait()
    assert [type(error) for error in seen] == [asyncio.CancelledError]


async def test_a_status_reply_arrives_with_details_and_pushback() -> None:
    refusal = Refusal(Reason.QUEUE_FULL, "too many requests wait already", retry_after_s=0.25)
    async with serving(Refuse=answering(reply_of(refusal))) as server:
        error = await server.error("Refuse")
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == "too many requests wait already; retry_after_ms=250"
    trailers = trailers_of(error)
    assert trailers["grpc-retry-pushback-ms"] == "250"
    details = trailers["grpc-status-details-bin"]
    assert isinstance(details, bytes)
    assert status_pb2.Status.FromString(details).code == Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("reply", "present", "absent"),
    [
        (StatusReply(code=5, text="x"), {}, {"grpc-retry-pushback-ms", "grpc-status-details-bin"}),
        (StatusReply(code=8, text="x", pushback_ms=-1), {"grpc-retry-pushback-ms": "-1"}, set()),
        (StatusReply(code=8, text="x", pushback_ms=0), {"grpc-retry-pushback-ms": "0"}, set()),
    ],
)
async def test_trailers_are_there_when_they_say_something(
    reply: StatusReply, present: dict[str, str], absent: set[str]
) -> None:
    async with serving(Refuse=answering(reply)) as server:
        trailers = trailers_of(await server.error("Refuse"))
    assert trailers.items() >= present.items()
    assert not absent & trailers.keys()


@pytest.mark.parametrize("code", list(Code))
async def test_every_code_arrives(code: Code) -> None:
    async with serving(Refuse=answering(StatusReply(code=code, text="größe\n100 %"))) as server:
        error = await server.error("Refuse")
    assert error.code().value[0] == code
    assert error.details() == "größe\n100 %"


async def test_a_refusal_with_a_thousand_violations_still_arrives_as_itself() -> None:
    violations = tuple(Violation(f"model.keys[{i}]", "must match") for i in range(1000))
    text = "; ".join(f"{v.field}: {v.description}" for v in violations)
    refusal = Refusal(Reason.INVALID_FIELD, text, violations=violations)
    async with serving(Refuse=answering(reply_of(refusal))) as server:
        error = await server.error("Refuse")
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "grpc-status-details-bin" in trailers_of(error)


async def test_bytes_that_are_no_message_are_an_invalid_field() -> None:
    async def never(request: health_pb2.HealthCheckRequest, call: Call) -> Any:
        raise AssertionError("it must not get this far")

    handler = unary(health_pb2.HealthCheckRequest, never)
    async with serving(Parse=handler) as server:
        error = await server.error("Parse", b"\xff\xff\xff")
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no HealthCheckRequest" in (error.details() or "")


async def test_a_message_that_is_too_large_never_reaches_the_handler() -> None:
    sizes: list[int] = []

    async def measure(call: Call) -> bytes:
        sizes.append(len(call.body))
        return b""

    async with serving(Measure=measure) as server:
        assert await server.call("Measure", bytes(MOST_BYTES)) == b""
        error = await server.error("Measure", bytes(MOST_BYTES + 1))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await server.call("Measure", b"again") == b""
    assert sizes == [MOST_BYTES, 5]


async def test_an_answer_may_be_larger_than_a_request() -> None:
    async with serving(Big=answering(bytes(MOST_BYTES * 4))) as server:
        assert len(await server.call("Big")) == MOST_BYTES * 4


async def test_an_unknown_method_is_unimplemented() -> None:
    async with serving(Known=answering(b"")) as server:
        error = await server.error("Unknown")
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_port_in_use_is_said_so() -> None:
    async with serving(Known=answering(b"")) as server:
        second = AioTransport({}, max_message_bytes=MOST_BYTES)
        with pytest.raises(PortInUse, match="the port is in use") as caught:
            await second.start(f"127.0.0.1:{server.port}")
        assert caught.value.address == f"127.0.0.1:{server.port}"
        await second.stop(0)
        assert await server.call("Known") == b""


async def test_health_tells_every_service_and_changes_for_good() -> None:
    async with serving(Known=answering(b"")) as server:
        health = health_pb2_grpc.HealthStub(server.channel)

        async def status(service: str) -> int:
            request = health_pb2.HealthCheckRequest(service=service)
            return int((await health.Check(request, timeout=PATIENCE_S)).status)

        serving_now = health_pb2.HealthCheckResponse.SERVING
        assert [await status(""), await status(SERVICE)] == [serving_now] * 2
        await server.transport.stop_being_healthy()
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        assert [await status(""), await status(SERVICE)] == [not_serving] * 2
        # Calls are still served.
        assert await server.call("Known") == b""


async def test_calls_that_run_are_answered_within_the_grace() -> None:
    began, go_on = asyncio.Event(), asyncio.Event()

    async def wait(call: Call) -> bytes:
        began.set()
        await go_on.wait()
        return b"done"

    async with serving(Wait=wait) as server:
        call = asyncio.ensure_future(server.call("Wait"))
        await asyncio.wait_for(began.wait(), PATIENCE_S)
        stopping = asyncio.create_task(server.transport.stop(PATIENCE_S))
        await asyncio.sleep(0)
        go_on.set()
        assert await asyncio.wait_for(call, PATIENCE_S) == b"done"
        await asyncio.wait_for(stopping, PATIENCE_S)


# --- Who calls ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "identity"),
    [
        ([], ""),
        ([("x-modelyard-identity", "ann"), ("x-modelyard-identity", "bob")], "ann"),
        ([("x-other", "ann")], ""),
        ([("x-modelyard-identity", b"ann")], ""),
        ([("x-modelyard-identity", "a" * 1000)], "a" * 256),
        (None, ""),
    ],
)
def test_an_identity_is_what_the_metadata_says(
    metadata: list[tuple[str, str | bytes]] | None, identity: str
) -> None:
    call = Call(b"", lambda: metadata, None, lambda: "ipv4:10.0.0.1:40000")
    assert call.identity() == identity
    assert call.client() == (f"identity:{identity}" if identity else "ipv4:10.0.0.1")


@pytest.mark.parametrize(
    ("peer", "client"),
    [
        ("ipv4:10.0.0.1:40000", "ipv4:10.0.0.1"),
        ("ipv6:%5B::1%5D:40000", "ipv6:%5B::1%5D"),
        ("ipv6:[::1]:40000", "ipv6:[::1]"),
        ("unix:", "unix:"),
        ("unix:/run/yard", "unix:/run/yard"),
        ("", ""),
    ],
)
def test_a_caller_that_does_not_say_who_it_is_goes_by_its_host(peer: str, client: str) -> None:
    assert Call(b"", lambda: None, None, lambda: peer).client() == client
    # It cannot take another's place by saying that it is it.
    claimed = Call(b"", lambda: [("x-modelyard-identity", client)], None, lambda: "ipv4:1.1.1.1:1")
    assert claimed.client() != client or not client


async def test_a_handler_can_ask_where_a_call_came_from() -> None:
    seen: list[str] = []

    async def handler(call: Call) -> bytes:
        seen.append(call.client())
        return b""

    async with serving(Ask=handler) as server:
        await server.call("Ask")
        await server.call("Ask", metadata=(("x-modelyard-identity", "ann"),))
    assert seen == ["ipv4:127.0.0.1", "identity:ann"]


async def test_a_method_that_acts_does_so_in_the_name_of_who_called() -> None:
    acting: list[str] = []

    @contextmanager
    def act(identity: str) -> Iterator[None]:
        acting.append(identity)
        yield
        acting.append("")

    async def method(request: health_pb2.HealthCheckRequest, call: Call) -> Any:
        assert acting == ["ann"]
        return health_pb2.HealthCheckResponse()

    handler = unary(health_pb2.HealthCheckRequest, method, acting=act)
    async with serving(Act=handler) as server:
        assert await server.call("Act", metadata=(("x-modelyard-identity", "ann"),)) == b""
    assert acting == ["ann", ""]
