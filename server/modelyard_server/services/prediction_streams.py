"""PredictStream: many requests over one stream, each answered as soon as it is done.

One task reads, one task an item answers it on the way of a Predict call, and one writes. What is
ready when the writer comes to it leaves in one message: nothing waits for company, and under load
there is some.

What bounds it all are the seats. An item takes one when it is begun and has it until its answer is
on its way to the client, and who has no seat free reads no further. So a client that sends faster
than it reads, and one that does not read at all, are held up where they are, by the windows of
their connection. Seats are counted, and the bytes of those who have one as well: a thousand items
of 64 MiB would be no bound.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import cache
from time import monotonic_ns

from google.protobuf.message import DecodeError

from modelyard.v1 import inference_service_pb2 as pb
from modelyard_server.errors import Reason, Refusal, Violation
from modelyard_server.services.handler import defect, invalid
from modelyard_server.services.inference import InferenceService
from modelyard_server.services.request_log import RequestFacts
from modelyard_server.services.status import item_error_of, reply_of
from modelyard_server.services.tensors import (
    StreamItem,
    parse_stream_items,
    serialize_stream_result,
)
from modelyard_server.transport.api import Call, Link, StatusReply

__all__ = ["MOST_IN_FLIGHT", "MOST_ITEMS", "PredictionStreamService"]

MOST_ITEMS = 1024
"""Items of one message."""

MOST_IN_FLIGHT = 1024
"""Items of one stream that are begun and not on their way back."""

_MESSAGE_BYTES = 256 * 1024
"""A message with answers is not filled beyond this; a larger answer has one to itself."""

_BREATH = 32
"""Items that are begun before the event loop has its turn."""

_FRAME_BYTES = 32
"""What is around an answer in its message, at most."""

_NS = 1_000_000_000


class PredictionStreamService:
    """Answers PredictStream.

    Args:
        inference: answers one request.
        most_answer_bytes: largest message that can be sent.
        most_bytes_in_flight: no item of a stream is begun beside others while those in flight,
            requests that run and answers that wait for the reader, have so many bytes.
    """

    def __init__(
        self, inference: InferenceService, *, most_answer_bytes: int, most_bytes_in_flight: int
    ) -> None:
        self._inference = inference
        self._most_answer_bytes = most_answer_bytes - _FRAME_BYTES
        self._most_bytes_in_flight = most_bytes_in_flight

    async def predict_stream(self, call: Call, link: Link) -> StatusReply | None:
        """See InferenceService.PredictStream in proto/modelyard/v1/inference_service.proto."""
        stream = _Stream(
            self._inference,
            link,
            client=cache(call.client),
            most_answer_bytes=self._most_answer_bytes,
            most_bytes_in_flight=self._most_bytes_in_flight,
        )
        refusal = await stream.answer()
        return None if refusal is None else reply_of(refusal)


class _Stream:
    """One call.

    Invariants: an item has a seat from its beginning until its result is on its way; an id is in
    use until its result is about to be written; no more than MOST_IN_FLIGHT seats are taken.
    """

    def __init__(
        self,
        inference: InferenceService,
        link: Link,
        *,
        client: Callable[[], str],
        most_answer_bytes: int,
        most_bytes_in_flight: int,
    ) -> None:
        self._inference = inference
        self._link = link
        self._client = client
        self._most_answer_bytes = most_answer_bytes
        self._most_bytes_in_flight = most_bytes_in_flight
        self._seats = 0
        self._bytes = 0
        self._ids: set[int] = set()
        # Results that wait for the writer: id, or None where it is another item's; parts; bytes.
        self._ready: deque[tuple[int | None, list[bytes], int]] = deque()
        self._has_read_all = False
        self._refusal: Refusal | None = None
        self._has_news = asyncio.Event()  # For the writer.
        self._has_room = asyncio.Event()  # For the reader.

    async def answer(self) -> Refusal | None:
        """Answers until the client has ended its side, or the server stops.

        Returns:
            Why the stream is refused, once what was in order has been answered; None if it is not.
        """
        async with asyncio.TaskGroup() as self._tasks:
            self._tasks.create_task(self._read(), name="reader of a stream")
            await self._write()
        return self._refusal

    # --- In -----------------------------------------------------------------------------------

    async def _read(self) -> None:
        try:
            while (body := await self._link.read()) is not None:
                await self._begin_all(body)
        except Refusal as refusal:
            self._inference.note_refused(RequestFacts(monotonic_ns()), refusal)
            self._refusal = refusal
        finally:
            self._has_read_all = True
            self._has_news.set()

    async def _begin_all(self, body: bytes) -> None:
        """Begins the items of a message, each when there is a seat for it.

        Raises:
            Refusal: INVALID_FIELD; then none of them is begun.
        """
        arrived_ns = monotonic_ns()
        try:
            items = parse_stream_items(body)
        except DecodeError:
            raise invalid(Violation("", "the message is no PredictStreamRequest")) from None
        if not items:
            raise invalid(Violation("items", "at least one is needed"))
        if len(items) > MOST_ITEMS:
            raise invalid(Violation("items", f"there are {len(items)}; {MOST_ITEMS} may be"))
        items.reverse()
        del body
        while items:
            while self._is_full():
                self._has_room.clear()
                await self._has_room.wait()
            self._begin(items.pop(), arrived_ns)
            if len(items) % _BREATH == 0:
                await asyncio.sleep(0)

    def _is_full(self) -> bool:
        if self._seats >= MOST_IN_FLIGHT:
            return True
        return self._seats > 0 and self._bytes >= self._most_bytes_in_flight

    def _begin(self, item: StreamItem, arrived_ns: int) -> None:
        item_id = item.message.id
        self._seats += 1
        self._bytes += item.size_bytes
        facts = RequestFacts(arrived_ns)
        if item_id in self._ids:
            text = f"{item_id} is in flight on this stream already"
            self._refuse(item, None, facts, invalid(Violation("id", text)))
        else:
            self._ids.add(item_id)
            self._tasks.create_task(self._answer(item, facts), name="item of a stream")

    # --- One item -----------------------------------------------------------------------------

    async def _answer(self, item: StreamItem, facts: RequestFacts) -> None:
        inference = self._inference
        inference.figures.active_count += 1
        try:
            timeout_s = inference.allowed_s(_checked_timeout_s(item.message))
            reply = await inference.answer_one(
                item.request, item.contents, timeout_s, self._client, facts
            )
            self._check_size(reply)
        except Refusal as refusal:
            self._refuse(item, item.message.id, facts, refusal)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Not of this item: something that it waited for. It is answered all the same.
            self._refuse(item, item.message.id, facts, defect("an item of a stream"))
        except Exception:
            self._refuse(item, item.message.id, facts, defect("an item of a stream"))
        else:
            inference.note_answered(facts)
            self._put(item, item.message.id, reply)
        finally:
            inference.figures.active_count -= 1

    def _check_size(self, reply: bytes) -> None:
        """Raises Refusal ANSWER_TOO_LARGE if there is no message for it."""
        if len(reply) > self._most_answer_bytes:
            limit = self._most_answer_bytes
            raise Refusal(
                Reason.ANSWER_TOO_LARGE,
                f"the answer is larger than {limit} bytes: ask for fewer rows at a time",
                metadata={"size_bytes": str(len(reply)), "limit_bytes": str(limit)},
            )

    def _refuse(
        self, item: StreamItem, own_id: int | None, facts: RequestFacts, refusal: Refusal
    ) -> None:
        self._inference.note_refused(facts, refusal)
        self._put(item, own_id, item_error_of(refusal))

    # --- Out ----------------------------------------------------------------------------------

    def _put(
        self, item: StreamItem, own_id: int | None, result: bytes | pb.PredictBatchError
    ) -> None:
        """Leaves a result to the writer; its size takes the place of the request's."""
        parts = serialize_stream_result(item.message.id, result)
        size_bytes = len(parts[0]) + len(parts[1])
        self._bytes += size_bytes - item.size_bytes
        self._ready.append((own_id, parts, size_bytes))
        self._has_news.set()

    async def _write(self) -> None:
        while True:
            if self._ready:
                message, count = self._take()
                await self._link.write(message)
                self._seats -= count
                self._bytes -= len(message)
                self._has_room.set()
            elif self._has_read_all and not self._seats:
                return
            else:
                self._has_news.clear()
                await self._has_news.wait()

    def _take(self) -> tuple[bytes, int]:
        """As many results as are ready and fit into a message, and how many those are.

        Their ids are free from here on: the client may have the message, and use them again,
        before we know that it was sent.
        """
        ready = self._ready
        parts: list[bytes] = []
        count = size = 0
        while ready and (not count or size + ready[0][2] <= _MESSAGE_BYTES):
            own_id, own_parts, size_bytes = ready.popleft()
            parts += own_parts
            size += size_bytes
            count += 1
            if own_id is not None:
                self._ids.discard(own_id)
        return b"".join(parts), count


def _checked_timeout_s(item: pb.PredictStreamItem) -> float | None:
    """An item's own deadline in seconds; None if it has none.

    Raises:
        Refusal: INVALID_FIELD: that is no time, or there is no request either.
    """
    if not item.HasField("request"):
        raise invalid(Violation("request", "is needed"))
    if not item.HasField("timeout"):
        return None
    seconds, nanos = item.timeout.seconds, item.timeout.nanos
    if seconds < 0 or not 0 <= nanos < _NS or seconds == nanos == 0:
        raise invalid(Violation("timeout", "must be a duration above 0"))
    return seconds + nanos / _NS
