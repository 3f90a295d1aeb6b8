"""ModelInfer and ModelStreamInfer: the way of a Predict call, in other words.

A request is read, its name looked up, its byte strings made texts where the model takes those, and
from there on it goes the way of any request: leases, waits, batches and turns are the same ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import cache
from time import monotonic_ns
from typing import Any, Final, TypeVar

from modelyard_server.errors import Reason, Refusal, Violation
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue
from modelyard_server.services.handler import defect, invalid
from modelyard_server.services.inference import InferenceService
from modelyard_server.services.oip.contents import as_text, raw_of, to_typed
from modelyard_server.services.oip.datatypes import datatype_of
from modelyard_server.services.oip.meanings import Meaning, Meanings
from modelyard_server.services.oip.messages import message
from modelyard_server.services.oip.requests import InferRequest, parse, read_request
from modelyard_server.services.request_log import RequestFacts
from modelyard_server.services.status import reply_of
from modelyard_server.transport.api import Call, Link, StatusReply

__all__ = ["MOST_IN_FLIGHT", "InferService"]

MOST_IN_FLIGHT: Final = 256
"""Requests of a stream that are begun, or answered and not yet on their way."""

T = TypeVar("T")

_STRICT: Final = ("triton_grpc_error", "true")
_LARGE_BYTES: Final = 256 * 1024
"""A request of so many bytes may have so many elements that reading them takes milliseconds."""

_LARGE_COUNT: Final = 32_768
"""The same of the elements of an answer."""

_NS_PER_US: Final = 1_000
_MOST_SHOWN: Final = 16


class InferService:
    """Answers ModelInfer and ModelStreamInfer.

    Args:
        inference: answers one request.
        meanings: what names stand for.
        most_answer_bytes: largest message that can be sent.
        most_bytes_in_flight: no request of a stream is begun beside others while those in flight
            have so many bytes.
    """

    def __init__(
        self,
        *,
        inference: InferenceService,
        meanings: Meanings,
        most_answer_bytes: int,
        most_bytes_in_flight: int,
    ) -> None:
        self._inference = inference
        self._meanings = meanings
        self._most_answer_bytes = most_answer_bytes
        self._most_bytes_in_flight = most_bytes_in_flight

    async def model_infer(self, call: Call) -> bytes | StatusReply:
        """See GRPCInferenceService.ModelInfer in proto/inference/grpc_service.proto."""
        inference = self._inference
        facts = RequestFacts(monotonic_ns())
        inference.figures.active_count += 1
        try:
            request = parse(call.body)
            response = await self._answer(
                request, len(call.body), facts, inference.timeout_s(call), call.client
            )
            reply = self._serialized(response)
        except Refusal as refusal:
            inference.note_refused(facts, refusal)
            return reply_of(refusal)
        else:
            inference.note_answered(facts)
            return reply
        finally:
            inference.figures.active_count -= 1

    async def model_stream_infer(self, call: Call, link: Link) -> StatusReply | None:
        """See GRPCInferenceService.ModelStreamInfer."""
        room = _Room(most=MOST_IN_FLIGHT, most_bytes=self._most_bytes_in_flight)
        stream = _Stream(self, call, link, room)
        refusal = await stream.answer()
        return None if refusal is None else reply_of(refusal)

    async def answer_streamed(
        self, body: bytes, timeout_s: float, client: Callable[[], str], *, strict: bool
    ) -> bytes:
        """What became of one request of a stream: a ModelStreamInferResponse, serialized.

        Args:
            body: the request.
            timeout_s: from now on.
            client: says whose it is.
            strict: raise what it is refused with.
        """
        inference = self._inference
        facts = RequestFacts(monotonic_ns())
        reply = message("ModelStreamInferResponse")()
        inference.figures.active_count += 1
        try:
            request = parse(body)
            # Also if it is refused: these are what its sender knows it by.
            reply.infer_response.id = request.id
            reply.infer_response.model_name = request.model_name
            answer = await self._answer(request, len(body), facts, timeout_s, client)
            answer.parameters["triton_final_response"].bool_param = True
            serialized = self._serialized(type(reply)(infer_response=answer))
        except Refusal as refusal:
            inference.note_refused(facts, refusal)
            return _refused(reply, refusal, strict=strict)
        except Exception:
            broken = defect("a request of a stream")
            inference.note_refused(facts, broken)
            return _refused(reply, broken, strict=strict)
        else:
            inference.note_answered(facts)
            return serialized
        finally:
            inference.figures.active_count -= 1

    def allowed_s(self, call: Call) -> float:
        """How long a request may take that comes with a call."""
        return self._inference.timeout_s(call)

    async def _answer(
        self,
        request: Any,
        size_bytes: int,
        facts: RequestFacts,
        timeout_s: float,
        client: Callable[[], str],
    ) -> Any:
        """The ModelInferResponse to a ModelInferRequest of so many bytes.

        Raises:
            Refusal: as Predict.
        """
        facts.key = request.model_name
        meaning = self._meanings.of(request.model_name, request.model_version)
        is_large = size_bytes >= _LARGE_BYTES and _is_by_element(request)
        wanted, inputs = await _aside(is_large, lambda: _read(request, meaning))
        asked = self._inference.asked(
            meaning.name,
            meaning.meant,
            inputs,
            wanted.parameters,
            wanted.affinity,
            meaning.version,
            facts,
        )
        if wanted.timeout_s is not None:
            timeout_s = min(timeout_s, wanted.timeout_s)
        facts.arrived_ns = monotonic_ns()
        outputs = await self._inference.answer(asked, facts, timeout_s, client)
        outputs = _chosen(outputs, wanted.outputs)
        is_large = wanted.is_typed or any(not isinstance(each.data, bytes) for each in outputs)
        is_large = is_large and sum(len(each.data) for each in outputs) >= _LARGE_COUNT
        return await _aside(
            is_large,
            lambda: _response(request, meaning, outputs, facts, is_typed=wanted.is_typed),
        )

    def _serialized(self, response: Any) -> bytes:
        """Raises Refusal ANSWER_TOO_LARGE if there is no message for it."""
        size, limit = response.ByteSize(), self._most_answer_bytes
        if size > limit:
            raise Refusal(
                Reason.ANSWER_TOO_LARGE,
                f"the answer is larger than {limit} bytes: ask for fewer rows at a time",
                metadata={"size_bytes": str(size), "limit_bytes": str(limit)},
            )
        serialized: bytes = response.SerializeToString()
        return serialized


# --- Streams --------------------------------------------------------------------------------------


class _Ended(Exception):
    """A request was refused whose refusal ends the stream."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class _Room:
    """So many requests of a stream, and so many bytes of them; one has room whatever its size."""

    def __init__(self, *, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._count = 0
        self._bytes = 0
        self._has_news = asyncio.Event()

    async def take(self, size_bytes: int) -> None:
        """Waits until there is room for one more."""
        while self._count >= self._most or (self._count and self._bytes >= self._most_bytes):
            self._has_news.clear()
            await self._has_news.wait()
        self._count += 1
        self._bytes += size_bytes

    def resize(self, before_bytes: int, after_bytes: int) -> None:
        """One has another size: it was a request and is an answer."""
        self._bytes += after_bytes - before_bytes
        self._has_news.set()

    def give_back(self, size_bytes: int) -> None:
        """One is on its way."""
        self._count -= 1
        self._bytes -= size_bytes
        self._has_news.set()


class _Stream:
    """One call of ModelStreamInfer.

    A request takes room when it is begun and has it until its answer is on its way to the client;
    who has no room reads no further. So a client that does not read is held up where it is.
    """

    def __init__(self, service: InferService, call: Call, link: Link, room: _Room) -> None:
        self._service = service
        self._call = call
        self._link = link
        self._client = cache(call.client)
        self._is_strict = _STRICT in call.metadata
        now = asyncio.get_running_loop().time()
        self._end = None if call.remaining_s is None else now + call.remaining_s
        self._room = room
        self._answers: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._refusal: Refusal | None = None

    async def answer(self) -> Refusal | None:
        """Answers until the client has ended its side, or the server stops.

        Returns:
            What ends the stream, once what was answered before is on its way; None if nothing does.
        """
        # This task writes: when it is cancelled because its client has gone, so is all the rest.
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read(), name="reader of an inference stream")
            while (answer := await self._answers.get()) is not None:
                await self._link.write(answer)
                self._room.give_back(len(answer))
        return self._refusal

    async def _read(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                while (body := await self._link.read()) is not None:
                    await self._room.take(len(body))
                    tasks.create_task(self._answer(body), name="request of an inference stream")
        except* _Ended as group:
            ended = group.exceptions[0]
            assert isinstance(ended, _Ended)  # The group has no groups: requests have no tasks.
            self._refusal = ended.refusal
        finally:
            self._answers.put_nowait(None)

    async def _answer(self, body: bytes) -> None:
        size_bytes = len(body)
        answer = await self._service.answer_streamed(
            body, self._allowed_s(), self._client, strict=self._is_strict
        )
        self._room.resize(size_bytes, len(answer))
        self._answers.put_nowait(answer)

    def _allowed_s(self) -> float:
        call = self._call
        left_s = None
        if self._end is not None:
            left_s = max(0.0, self._end - asyncio.get_running_loop().time())
        return self._service.allowed_s(Call(b"", call.read_metadata, left_s, call.read_peer))


def _refused(reply: Any, refusal: Refusal, *, strict: bool) -> bytes:
    if strict:
        raise _Ended(refusal)
    reply.error_message = reply_of(refusal).text
    serialized: bytes = reply.SerializeToString()
    return serialized


# --- Large requests -------------------------------------------------------------------------------


async def _aside(is_large: bool, work: Callable[[], T]) -> T:
    """Does something here, or on a thread if it may take long: others' requests go on meanwhile."""
    return await asyncio.to_thread(work) if is_large else work()


def _is_by_element(request: Any) -> bool:
    """True if elements of a request are read one by one, and not as they lie."""
    return not request.raw_input_contents or any(
        tensor.datatype == "BYTES" for tensor in request.inputs
    )


# --- Inputs and outputs ---------------------------------------------------------------------------


def _read(request: Any, meaning: Meaning) -> tuple[InferRequest, tuple[TensorValue, ...]]:
    """What a request asks, and its inputs as the model takes them. Raises Refusal."""
    wanted = read_request(request)
    _check_outputs(wanted.outputs, meaning)
    return wanted, _fitting(wanted.inputs, meaning)


def _fitting(inputs: tuple[TensorValue, ...], meaning: Meaning) -> tuple[TensorValue, ...]:
    """The inputs as the model takes them: byte strings are texts for one that takes texts.

    Raises:
        Refusal: INVALID_TENSOR: they are no UTF-8.
    """
    if not meaning.signature.takes_text:
        return inputs
    values = []
    for i, value in enumerate(inputs):
        try:
            values.append(as_text(value) if value.dtype is DType.BYTES else value)
        except TensorError as error:
            raise Refusal(
                Reason.INVALID_TENSOR,
                f"inputs[{i}]: {error.text}",
                violations=(Violation(f"inputs[{i}]", error.text),),
            ) from None
    return tuple(values)


def _check_outputs(names: Sequence[str], meaning: Meaning) -> None:
    """Raises Refusal INVALID_FIELD if an output is wanted that the model is known not to have."""
    if names and meaning.signature.is_exact:
        _check_names(names, [kind.name for kind in meaning.signature.outputs])


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    violations = []
    for i, name in enumerate(names):
        if name not in known:
            text = f"is no output; the model gives {', '.join(known[:_MOST_SHOWN])}"
            violations.append(Violation(f"outputs[{i}].name", text))
    if violations:
        raise invalid(*violations)


def _chosen(outputs: tuple[TensorValue, ...], names: Sequence[str]) -> tuple[TensorValue, ...]:
    """The outputs that are wanted, in the order in which they are.

    Raises:
        Refusal: INVALID_FIELD: there is none of such a name.
    """
    if not names:
        return outputs
    by_name = {value.name: value for value in outputs}
    _check_names(names, list(by_name))
    return tuple(by_name[name] for name in names)


def _response(
    request: Any,
    meaning: Meaning,
    outputs: Sequence[TensorValue],
    facts: RequestFacts,
    *,
    is_typed: bool,
) -> Any:
    """A ModelInferResponse."""
    response = message("ModelInferResponse")(
        model_name=request.model_name,
        model_version=facts.version or meaning.versions[0],
        id=request.id,
    )
    parameters = response.parameters
    parameters["modelyard_model"].string_param = facts.model
    parameters["modelyard_device"].string_param = facts.device
    parameters["modelyard_cold"].bool_param = facts.cold
    wait_us = (facts.leased_ns - facts.arrived_ns) // _NS_PER_US
    parameters["modelyard_wait_us"].int64_param = wait_us
    parameters["modelyard_run_us"].int64_param = (facts.ended_ns - facts.leased_ns) // _NS_PER_US
    # All of them one way: clients go by the position of a raw content.
    is_typed = is_typed and all(datatype_of(value.dtype).field for value in outputs)
    for value in outputs:
        output = response.outputs.add(
            name=value.name, datatype=datatype_of(value.dtype).name, shape=value.shape
        )
        if is_typed:
            to_typed(value, output.contents)
        else:
            response.raw_output_contents.append(raw_of(value))
    return response
