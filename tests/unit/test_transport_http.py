"""The HTTP transport around handlers of the tests: what a caller hears, and what it must not."""

from __future__ import annotations

import asyncio
import base64
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from google.rpc import error_details_pb2, status_pb2
from tests.support.http_calls import Answer, frame, frames_of, post, trailers_of

from modelyard.v1 import inference_service_pb2
from modelyard_server.errors import Reason, Refusal, Violation
from modelyard_server.services.handler import draining, unary
from modelyard_server.services.http_methods import details_of, unreadable
from modelyard_server.services.status import defect_reply, reply_of
from modelyard_server.transport.aio import PortInUse
from modelyard_server.transport.api import Call, CannotListen, Handler, StatusReply, Streaming
from modelyard_server.transport.connect import ConnectFront, HttpMethod
from modelyard_server.transport.http import HttpTransport

MOST_BYTES = 64 * 1024
PAGE = "http://localhost:3000"
PATIENCE_S = 60
PREDICT = "/test.Service/Predict"
WATCH = "/test.Service/Watch"
PROTO = "application/proto"
WEB = "application/grpc-web+proto"

Request = inference_service_pb2.PredictRequest
Response = inference_service_pb2.PredictResponse


@asynccontextmanager
async def serving(
    *, body_s: float = 30, **handlers: Handler | Streaming
) -> AsyncIterator[HttpTransport]:
    transport = HttpTransport(
        ConnectFront(
            [
                HttpMethod(
                    service="test.Service",
                    name=name,
                    handler=handler,
                    request_type=Request,
                    response_type=Response,
                )
                for name, handler in handlers.items()
            ],
            max_message_bytes=MOST_BYTES,
            origins=[PAGE],
            details=details_of,
            unreadable=unreadable,
            defect=defect_reply,
            draining=reply_of(draining()),
            body_s=body_s,
        )
    )
    await transport.start("127.0.0.1:0")
    try:
        yield transport
    finally:
        async with asyncio.timeout(PATIENCE_S):
            await transport.stop(0)


async def ask(transport: HttpTransport, *arguments: Any, **options: Any) -> Answer:
    return await asyncio.to_thread(post, transport.port, *arguments, **options)


def answering(reply: bytes | StatusReply) -> Handler:
    async def answer(call: Call) -> bytes | StatusReply:
        return reply

    return answer


async def echo(request: inference_service_pb2.PredictRequest, call: Call) -> Response:
    response = Response()
    response.served.model = request.key
    return response


class Recorded:
    """A handler that keeps the calls it got, and answers nothing in particular."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    async def __call__(self, call: Call) -> bytes:
        self.calls.append(call)
        return b""


class Hanging:
    """A handler that says when it was called and how it ended, and answers when it may."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.ended = asyncio.Event()
        self.was_cancelled = False

    async def __call__(self, call: Call) -> bytes:
        self.began.set()
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        finally:
            self.ended.set()
        return b""


async def test_a_handler_gets_bytes_as_they_came_and_gives_bytes() -> None:
    message = Request(key="a").SerializeToString() + b"\xfa\x01\x00"  # And a field of the future.
    recorded = Recorded()
    async with serving(Predict=recorded) as transport:
        answer = await ask(transport, PREDICT, message, PROTO, x_modelyard_identity="me")
    (call,) = recorded.calls
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["content-type"] == PROTO
    assert call.body == message
    assert call.remaining_s is None
    assert call.identity() == "me"
    assert call.client() == "identity:me"
    assert call.read_peer().startswith("ipv4:127.0.0.1:")


async def test_nobody_is_believed_who_says_where_a_request_came_from() -> None:
    recorded = Recorded()
    async with serving(Predict=recorded) as transport:
        await ask(transport, PREDICT, "{}", x_forwarded_for="6.6.6.6", forwarded="for=6.6.6.6")
    assert recorded.calls[0].client() == "ipv4:127.0.0.1"


@pytest.mark.parametrize(
    ("header", "value"), [("connect_timeout_ms", "5000"), ("grpc_timeout", "5S")]
)
async def test_a_deadline_reaches_the_handler(header: str, value: str) -> None:
    recorded = Recorded()
    async with serving(Predict=recorded) as transport:
        of_web = header == "grpc_timeout"
        body = frame(b"") if of_web else b""
        await ask(transport, PREDICT, body, WEB if of_web else PROTO, **{header: value})
    remaining_s = recorded.calls[0].remaining_s
    assert remaining_s is not None
    # A little before the protocol's own, which would not say what was waited for.
    assert 0 < remaining_s <= 4.95


@pytest.mark.parametrize("value", ["", "soon", "-1", "1_000", "99999999999"])
async def test_a_deadline_that_is_none_is_told(value: str) -> None:
    async with serving(Predict=answering(b"")) as transport:
        answer = await ask(transport, PREDICT, "{}", connect_timeout_ms=value)
    if value:
        assert answer.status == 400
        assert "nvalid timeout header" in answer.json["message"]
    else:
        assert answer.status == 200


async def test_a_handler_without_an_end_is_cut_off_at_the_deadline() -> None:
    hanging = Hanging()
    async with serving(Predict=hanging) as transport:
        answer = await ask(transport, PREDICT, "{}", connect_timeout_ms="100")
    assert (answer.status, answer.json["code"]) == (504, "deadline_exceeded")
    assert hanging.was_cancelled


REFUSAL = Refusal(
    Reason.QUEUE_FULL,
    "1024 requests wait for it",
    metadata={"waiting": "1024"},
    retry_after_s=1.5,
)


async def test_an_error_is_whole_in_connects_json() -> None:
    reply = reply_of(REFUSAL)
    async with serving(Predict=answering(reply)) as transport:
        answer = await ask(transport, PREDICT, b"", PROTO)
    assert answer.status == 429
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["retry-after"] == "2"
    assert answer.headers["trailer-grpc-retry-pushback-ms"] == "1500"
    error = answer.json
    assert (error["code"], error["message"]) == ("resource_exhausted", reply.text)
    status = status_pb2.Status.FromString(reply.details)
    for told, packed in zip(error["details"], status.details, strict=True):
        assert "type.googleapis.com/" + told["type"] == packed.type_url
        assert base64.b64decode(told["value"] + "==") == packed.value
        assert "=" not in told["value"]
    shown = {told["type"]: told["debug"] for told in error["details"]}
    assert shown["google.rpc.ErrorInfo"] == {
        "reason": "QUEUE_FULL",
        "domain": "modelyard",
        "metadata": {"waiting": "1024", "retry_after_ms": "1500"},
    }
    assert shown["google.rpc.RetryInfo"] == {"retryDelay": "1.500s"}


async def test_an_error_is_whole_in_grpc_web() -> None:
    reply = reply_of(REFUSAL)
    async with serving(Predict=answering(reply)) as transport:
        answer = await ask(transport, PREDICT, frame(b""), WEB)
    assert answer.status == 200
    ((flags, content),) = frames_of(answer.body)
    assert flags == 0x80
    trailers = trailers_of(content)
    assert trailers["grpc-status"] == "8"
    assert trailers["grpc-retry-pushback-ms"] == "1500"
    details = base64.b64decode(trailers["grpc-status-details-bin"] + "==")
    told = status_pb2.Status.FromString(details)
    assert told == status_pb2.Status.FromString(reply.details)


async def test_a_refusal_that_must_not_be_repeated_promises_nothing() -> None:
    reply = reply_of(Refusal(Reason.DEADLINE_UNREACHABLE, "too late", retry_after_s=3))
    assert reply.pushback_ms == -1
    async with serving(Predict=answering(reply)) as transport:
        answer = await ask(transport, PREDICT, "{}")
    assert "retry-after" not in answer.headers
    assert answer.headers["trailer-grpc-retry-pushback-ms"] == "-1"


async def test_defects_are_hidden_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(call: Call) -> bytes:
        raise ArithmeticError("a secret")

    async def lost(call: Call) -> bytes:
        raise asyncio.CancelledError("of a task that this one waited for")

    async with serving(Predict=broken, Lost=lost) as transport:
        with caplog.at_level(logging.ERROR):
            answers = [
                await ask(transport, PREDICT, "{}"),
                await ask(transport, "/test.Service/Lost", "{}"),
            ]
    for answer in answers:
        assert (answer.status, answer.json["code"]) == (500, "internal")
        assert "secret" not in answer.body.decode()
        error_id = answer.json["details"][0]["debug"]["metadata"]["error_id"]
        assert error_id in caplog.text
    assert "a secret" in caplog.text


NO_MESSAGES: list[tuple[bytes | str, str]] = [
    ("", "the body is empty"),
    ("{", "line 1 column 2"),
    ("[]", "no JSON object but list"),
    ("null", "no JSON object but NoneType"),
    ('{"kee": "a"}', 'no field named "kee"'),
    ('{"key": 3}', "Failed to parse key field"),
    ('{"key": "a", "key": "b"}', "field 'key' is there twice"),
    ('{"inputs": [{"dataType": "FLOAT"}]}', "FLOAT"),
    ('{"inputs": [{"raw": "", "text": {}}]}', "oneof"),
    ('{"inputs": [{"shape": [1.5]}]}', "shape"),
    ('{"key": "\\ud800"}', "the message is no PredictRequest"),
    (b'{"key": "\xff"}', "the message is no PredictRequest"),
    (
        '{"parameters": ' + '{"a": ' * 200 + "1" + "}" * 201,
        "the message is no PredictRequest",
    ),
    ("[" * 30_000, "nested too deeply"),
]
"""Bodies, and what is said of them."""


class TestJson:
    @pytest.fixture
    async def transport(self) -> AsyncIterator[HttpTransport]:
        async with serving(Predict=unary(Request, echo)) as transport:
            yield transport

    async def test_both_spellings_of_fields_are_read(self, transport: HttpTransport) -> None:
        for spelling in ("dataType", "data_type"):
            body = {"key": "é", "inputs": [{spelling: "DATA_TYPE_TEXT", "shape": ["1", 2]}]}
            answer = await ask(transport, PREDICT, body, "application/json; charset=utf-8")
            assert (answer.status, answer.json) == (200, {"served": {"model": "é"}})

    async def test_json_that_is_no_message_is_told_why(self, transport: HttpTransport) -> None:
        for body, words in NO_MESSAGES:
            answer = await ask(transport, PREDICT, body)
            assert (answer.status, answer.json["code"]) == (400, "invalid_argument"), body
            assert words.lower() in answer.json["message"].lower()
            kinds = {told["type"]: told["debug"] for told in answer.json["details"]}
            assert kinds["google.rpc.ErrorInfo"]["reason"] == "INVALID_FIELD"
            assert len(kinds["google.rpc.BadRequest"]["fieldViolations"]) == 1

    async def test_bytes_that_are_no_message_are_refused_as_grpc_refuses_them(
        self, transport: HttpTransport
    ) -> None:
        for body, kind in ((b"\xff", PROTO), (frame(b"\xff"), WEB)):
            answer = await ask(transport, PREDICT, body, kind)
            assert b"the message is no PredictRequest" in answer.body.replace(b"%20", b" ")

    async def test_large_messages_are_read_and_written_elsewhere(
        self, transport: HttpTransport
    ) -> None:
        body = {"key": "k" * 40_000}
        assert (await ask(transport, PREDICT, body)).json == {"served": {"model": body["key"]}}


class TestLimits:
    @pytest.mark.parametrize("kind", ["application/json", PROTO, WEB])
    async def test_a_request_above_the_limit_is_refused(self, kind: str) -> None:
        recorded = Recorded()
        async with serving(Predict=recorded) as transport:
            body = b"x" * (MOST_BYTES + 1)
            answer = await ask(transport, PREDICT, frame(body) if kind == WEB else body, kind)
        assert not recorded.calls
        if kind == WEB:
            assert trailers_of(frames_of(answer.body)[-1][1])["grpc-status"] == "8"
        else:
            assert answer.json["code"] == "resource_exhausted"

    async def test_a_compressed_request_is_refused(self) -> None:
        recorded = Recorded()
        async with serving(Predict=recorded) as transport:
            answer = await ask(transport, PREDICT, b"x", PROTO, content_encoding="gzip")
        assert not recorded.calls
        assert answer.json["code"] == "unimplemented"

    async def test_a_body_that_does_not_come_ends_its_request(self) -> None:
        recorded = Recorded()
        async with serving(Predict=recorded, body_s=0.1) as transport:
            reader, writer = await asyncio.open_connection("127.0.0.1", transport.port)
            head = f"POST {PREDICT} HTTP/1.1\r\nhost: a\r\ncontent-type: {PROTO}\r\n"
            writer.write(f"{head}content-length: 10\r\n\r\nhalf".encode())
            async with asyncio.timeout(PATIENCE_S):
                told = await reader.read()
            writer.close()
        assert told.startswith(b"HTTP/1.1 499")
        assert not recorded.calls


class TestWhoMayCall:
    @pytest.mark.parametrize("origin", ["http://evil.test", "null", "http://localhost:3001"])
    async def test_scripts_of_other_pages_may_not(self, origin: str) -> None:
        recorded = Recorded()
        async with serving(Predict=recorded) as transport:
            for method in ("POST", "OPTIONS"):
                answer = await ask(transport, PREDICT, "{}", method=method, origin=origin)
                assert (answer.status, answer.json["code"]) == (403, "permission_denied")
                assert not [name for name in answer.headers if name.startswith("access-control")]
        assert not recorded.calls

    async def test_scripts_of_listed_pages_may(self) -> None:
        async with serving(Predict=answering(reply_of(REFUSAL))) as transport:
            asked = await ask(
                transport,
                PREDICT,
                "",
                method="OPTIONS",
                origin=PAGE,
                access_control_request_method="POST",
            )
            answer = await ask(transport, PREDICT, "{}", origin=PAGE)
        assert asked.status == 204
        assert asked.headers["access-control-allow-origin"] == PAGE
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert "x-grpc-web" in asked.headers["access-control-allow-headers"]
        assert answer.status == 429
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "grpc-status" in answer.headers["access-control-expose-headers"]

    @pytest.mark.parametrize(
        "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
    )
    async def test_what_pages_send_without_asking_is_not_read(self, kind: str) -> None:
        recorded = Recorded()
        async with serving(Predict=recorded) as transport:
            assert (await ask(transport, PREDICT, "{}", kind)).status == 415
        assert not recorded.calls

    async def test_there_is_no_get(self) -> None:
        recorded = Recorded()
        async with serving(Predict=recorded) as transport:
            query = f"{PREDICT}?connect=v1&encoding=json&message=%7B%7D"
            answer = await ask(transport, query, "", method="GET")
        assert (answer.status, answer.headers["allow"]) == (405, "POST")
        assert not recorded.calls

    @pytest.mark.parametrize(
        ("path", "kind", "status"),
        [
            ("/test.Service/Other", "application/json", 404),
            ("/", "application/json", 404),
            (PREDICT, "application/grpc", 415),
            (PREDICT, "application/grpc+proto", 415),
            (PREDICT, "application/grpc-web-text", 415),
        ],
    )
    async def test_what_is_not_served_is_told(self, path: str, kind: str, status: int) -> None:
        async with serving(Predict=answering(b"")) as transport:
            answer = await ask(transport, path, "{}", kind)
        assert (answer.status, answer.json["code"]) == (status, "unimplemented")


class Ticking:
    """A stream of messages that are asked for one by one, and an end that is awaited."""

    def __init__(self, count: int, end: StatusReply | None = None) -> None:
        self._count = count
        self._end = end
        self.waits = asyncio.Event()
        self.may_end = asyncio.Event()
        self.closed = asyncio.Event()

    async def __call__(self, call: Call) -> AsyncGenerator[bytes | StatusReply, None]:
        try:
            for index in range(self._count):
                response = Response()
                response.served.model = str(index)
                yield response.SerializeToString()
            self.waits.set()
            await self.may_end.wait()
            if self._end is not None:
                yield self._end
        finally:
            self.closed.set()


class TestStreams:
    @pytest.mark.parametrize("kind", ["application/connect+json", "application/connect+proto", WEB])
    async def test_messages_come_in_order_and_then_the_end(self, kind: str) -> None:
        ticking = Ticking(3)
        ticking.may_end.set()
        async with serving(Watch=Streaming(ticking)) as transport:
            body = frame(b"{}" if "json" in kind else b"")
            answer = await ask(transport, WATCH, body, kind)
        *messages, (flags, end) = frames_of(answer.body)
        if "json" in kind:
            told = [content.decode() for _, content in messages]
            assert told == [f'{{"served": {{"model": "{index}"}}}}' for index in range(3)]
        else:
            told = [Response.FromString(content).served.model for _, content in messages]
            assert told == ["0", "1", "2"]
        assert (flags, end) == ((0x80, b"grpc-status: 0\r\n") if kind == WEB else (0x02, b"{}"))

    async def test_a_stream_ends_with_its_error(self) -> None:
        ticking = Ticking(1, reply_of(Refusal(Reason.INVALID_FIELD, "wrong")))
        ticking.may_end.set()
        async with serving(Watch=Streaming(ticking)) as transport:
            answer = await ask(transport, WATCH, frame(b""), WEB)
        _, (_, content) = frames_of(answer.body)
        assert trailers_of(content)["grpc-status"] == "3"
        assert trailers_of(content)["grpc-message"] == "wrong"

    async def test_a_stream_that_breaks_tells_nothing_but_an_id(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def broken(call: Call) -> AsyncGenerator[bytes | StatusReply, None]:
            yield b""
            raise ArithmeticError("a secret")

        async with serving(Watch=Streaming(broken)) as transport:
            answer = await ask(transport, WATCH, frame(b""), WEB)
        assert b"error_id" in answer.body
        assert b"secret" not in answer.body
        assert "a secret" in caplog.text

    async def test_a_handler_is_closed_when_its_caller_has_gone(self) -> None:
        ticking = Ticking(1)
        async with serving(Watch=Streaming(ticking)) as transport:
            _, writer = await asyncio.open_connection("127.0.0.1", transport.port)
            head = f"POST {WATCH} HTTP/1.1\r\nhost: a\r\ncontent-type: {WEB}\r\n"
            writer.write(f"{head}content-length: 5\r\n\r\n".encode() + frame(b""))
            async with asyncio.timeout(PATIENCE_S):
                await ticking.waits.wait()
                writer.close()
                await ticking.closed.wait()

    async def test_a_stop_ends_streams_as_draining(self) -> None:
        ticking = Ticking(1)
        async with serving(Watch=Streaming(ticking)) as transport:
            asked = asyncio.create_task(ask(transport, WATCH, frame(b""), WEB))
            async with asyncio.timeout(PATIENCE_S):
                await ticking.waits.wait()
                await transport.stop(PATIENCE_S)
                answer = await asked
        assert ticking.closed.is_set()
        trailers = trailers_of(frames_of(answer.body)[-1][1])
        assert trailers["grpc-status"] == "14"
        details = base64.b64decode(trailers["grpc-status-details-bin"] + "==")
        info = error_details_pb2.ErrorInfo()
        assert status_pb2.Status.FromString(details).details[0].Unpack(info)
        assert info.reason == "SERVER_DRAINING"


class TestStopping:
    async def test_calls_that_run_are_answered(self) -> None:
        hanging = Hanging()
        async with serving(Predict=hanging) as transport:
            asked = asyncio.create_task(ask(transport, PREDICT, "{}"))
            async with asyncio.timeout(PATIENCE_S):
                await hanging.began.wait()
                stopping = asyncio.create_task(transport.stop(PATIENCE_S))
                await asyncio.sleep(0)
                hanging.may_answer.set()
                answer = await asked
                await stopping
            assert answer.status == 200
            with pytest.raises(ConnectionRefusedError):
                await ask(transport, PREDICT, "{}")

    async def test_what_outlasts_the_grace_is_cut_off(self) -> None:
        hanging = Hanging()
        async with serving(Predict=hanging) as transport:
            asked = asyncio.create_task(ask(transport, PREDICT, "{}"))
            async with asyncio.timeout(PATIENCE_S):
                await hanging.began.wait()
                await transport.stop(0)
                await asyncio.wait({asked})
        assert hanging.was_cancelled
        if asked.exception() is None:
            assert asked.result().status == 499

    async def test_a_connection_that_says_nothing_does_not_keep_it(self) -> None:
        async with serving(Predict=answering(b"")) as transport:
            _, writer = await asyncio.open_connection("127.0.0.1", transport.port)
            async with asyncio.timeout(PATIENCE_S):
                await transport.stop(0)
                await transport.stop(0)
            writer.close()

    async def test_health_is_told_until_it_stops(self) -> None:
        async with serving(Predict=answering(b"")) as transport:
            well = await ask(transport, "/healthz", "", method="GET")
            transport.stop_being_healthy()
            ill = await ask(transport, "/healthz", "", method="GET")
            answer = await ask(transport, PREDICT, "{}")
        assert (well.status, ill.status, answer.status) == (200, 503, 200)

    async def test_a_port_in_use_is_told(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            async with serving(Predict=answering(b"")):
                front: Any = None
                other = HttpTransport(front)
                with pytest.raises(PortInUse, match=address):
                    await other.start(address)
                await other.stop(0)

    async def test_an_address_that_is_not_this_machines_is_told(self) -> None:
        front: Any = None
        with pytest.raises(CannotListen, match=r"cannot listen on 192\.0\.2\.1:0: "):
            await HttpTransport(front).start("192.0.2.1:0")


async def test_a_callers_leaving_reaches_the_handler() -> None:
    hanging = Hanging()
    async with serving(Predict=hanging) as transport:
        _, writer = await asyncio.open_connection("127.0.0.1", transport.port)
        head = f"POST {PREDICT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: 2\r\n\r\n{{}}".encode())
        async with asyncio.timeout(PATIENCE_S):
            await hanging.began.wait()
            writer.close()
            await hanging.ended.wait()
    assert hanging.was_cancelled


def test_violations_are_shown() -> None:
    reply = reply_of(
        Refusal(Reason.INVALID_FIELD, "wrong", violations=(Violation("key", "is missing"),))
    )
    shown = [detail.shown for detail in details_of(reply)]
    assert shown[1] == {"fieldViolations": [{"field": "key", "description": "is missing"}]}
