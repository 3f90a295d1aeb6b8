"""PredictBatch: many requests of any keys in one call, grouped by model.

A group asks for its model once, and its items run back to back, so that a batch costs one load per
model whatever the order of its items. Not all of a group are given to the engine at once: a lane
serves everybody, and another caller's request stands behind a bounded number of this call's.

Every item has a lease of its own, as a request has, and the group has that of its next item before
this one's is given back: a model that is idle for a moment between two items would be taken for one
that may leave. But a group does not keep its model when others starve. The core gives no more
leases then, the items that have not begun find it gone, and the first of them asks for it again,
for all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from time import monotonic_ns

from google.protobuf.message import DecodeError

from modelyard.v1 import inference_service_pb2 as pb
from modelyard_server.errors import Reason, Refusal, Violation
from modelyard_server.residency.shell import Lease
from modelyard_server.services.asked import Asked, AskedRoute
from modelyard_server.services.handler import defect, invalid
from modelyard_server.services.inference import MOST_WORKERS, InferenceService, served_of
from modelyard_server.services.request_log import RequestFacts
from modelyard_server.services.status import item_error_of, reply_of
from modelyard_server.services.tensors import (
    item_spans,
    parse_request,
    serialize_batch,
    serialize_response,
)
from modelyard_server.transport.api import Call, StatusReply

__all__ = ["MOST_ITEMS", "BatchService"]

MOST_ITEMS = 1024
"""Items of one call."""

_MOST_AT_ONCE = 128
"""Items of one model that are with the engine at once: some of them run while others gather."""

_BREATH = 32
"""Items that are read before the event loop has its turn."""

_ERROR_BYTES = 2048
"""Kept free in the message for each item that may fail; see item_error_of."""

_FRAME_BYTES = 16
"""What is around an answer in the message."""

_ITEM_MARGIN_S = 0.003
"""What an item that is unfinished at the deadline may take to be told so."""

_MOST_MARGIN = 0.1
"""Of the time that the caller will wait."""

_NS = 1_000_000_000

_Parsed = tuple[pb.PredictRequest, dict[int, bytes]]


class BatchService:
    """Answers PredictBatch.

    Args:
        inference: answers one request.
        most_answer_bytes: largest message that can be sent.
    """

    def __init__(self, inference: InferenceService, *, most_answer_bytes: int) -> None:
        self._inference = inference
        self._most_answer_bytes = most_answer_bytes - MOST_ITEMS * _ERROR_BYTES

    async def predict_batch(self, call: Call) -> bytes | StatusReply:
        """See InferenceService.PredictBatch in proto/modelyard/v1/inference_service.proto."""
        arrived_ns = monotonic_ns()
        try:
            parsed = await _parsed_items(call.body)
        except Refusal as refusal:
            self._inference.note_refused(RequestFacts(arrived_ns), refusal)
            return reply_of(refusal)
        batch = _Batch(
            self._inference,
            arrived_ns=arrived_ns,
            timeout_s=self._timeout_s(call, len(parsed)),
            most_answer_bytes=self._most_answer_bytes,
            client=cache(call.client),
        )
        return serialize_batch(await batch.answer(parsed))

    def _timeout_s(self, call: Call, count: int) -> float:
        """How long the items may take: as for one request, less what telling so many takes."""
        timeout_s = self._inference.timeout_s(call)
        if call.remaining_s is None:
            return timeout_s
        return timeout_s - min(timeout_s * _MOST_MARGIN, count * _ITEM_MARGIN_S)


async def _parsed_items(body: bytes) -> list[_Parsed]:
    """The items of a PredictBatchRequest, all of them before the first is begun.

    Raises:
        Refusal: INVALID_FIELD, because there is none, or it has none or too many.
    """
    try:
        spans = item_spans(body)
        if not spans:
            raise invalid(Violation("items", "at least one is needed"))
        if len(spans) > MOST_ITEMS:
            raise invalid(Violation("items", f"there are {len(spans)}; {MOST_ITEMS} may be"))
        parsed: list[_Parsed] = []
        for begin, end in spans:
            parsed.append(parse_request(body[begin:end]))
            if len(parsed) % _BREATH == 0:
                await asyncio.sleep(0)
    except DecodeError:
        raise invalid(Violation("", "the message is no PredictBatchRequest")) from None
    return parsed


@dataclass(frozen=True, slots=True)
class _Item:
    position: int
    asked: Asked
    facts: RequestFacts


@dataclass(frozen=True, slots=True)
class _RoutedItem:
    position: int
    asked: AskedRoute
    facts: RequestFacts


@dataclass(slots=True)
class _Group:
    """Items of one model.

    Attributes:
        left: those that have not begun, in the order of the request.
        pending: how many have no lease yet.
        turn: held by the one that asks for the model.
        cold: the model was not there for some of them, and they waited for it.
        load_s: how long it was being loaded then.
        spare: the lease of the next item.
        refusal: why it does not come: for those that are left.
    """

    left: deque[_Item] = field(default_factory=deque)
    pending: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    cold: bool = False
    load_s: float | None = None
    spare: Lease | None = None
    refusal: Refusal | None = None

    def take_spare(self) -> Lease | None:
        """The lease of the next item, if there is one, to be given back by whoever takes it."""
        spare, self.spare = self.spare, None
        return spare

    def drop_spare(self) -> None:
        """Gives the lease of the next item back: there is no next item."""
        if (spare := self.take_spare()) is not None:
            spare.release()


class _Batch:
    """One call."""

    def __init__(
        self,
        inference: InferenceService,
        *,
        arrived_ns: int,
        timeout_s: float,
        most_answer_bytes: int,
        client: Callable[[], str],
    ) -> None:
        self._inference = inference
        self._client = client
        self._arrived_ns = arrived_ns
        self._timeout_s = timeout_s
        self._deadline_ns = arrived_ns + int(timeout_s * _NS)
        self._most_answer_bytes = most_answer_bytes
        self._answer_bytes = 0
        self._results: list[bytes | pb.PredictBatchError] = []

    async def answer(self, parsed: list[_Parsed]) -> Sequence[bytes | pb.PredictBatchError]:
        """The results of all items, in their order. Takes the list over, and empties it."""
        self._results = [pb.PredictBatchError()] * len(parsed)
        figures = self._inference.figures
        figures.active_count += len(parsed)
        count = len(parsed)
        groups: dict[str, _Group] = {}
        routed: deque[_RoutedItem] = deque()
        try:
            await self._put_into(groups, routed, parsed)
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(len(routed), _MOST_AT_ONCE)):
                    tasks.create_task(self._work_routed(routed), name="items of routes")
                for model, group in groups.items():
                    # The first of a group asks for the model; so many can follow it at once.
                    for _ in range(min(len(group.left), _MOST_AT_ONCE)):
                        tasks.create_task(self._work(group), name=f"items of {model}")
        finally:
            figures.active_count -= count
            for group in groups.values():
                group.drop_spare()
        return self._results

    async def _put_into(
        self, groups: dict[str, _Group], routed: deque[_RoutedItem], parsed: list[_Parsed]
    ) -> None:
        """Puts the items that can be asked for into groups, by model, and refuses the others.

        What a route says more of than one model is each item's own matter: those are in `routed`.
        """
        parsed.reverse()
        for position in range(len(parsed)):
            request, contents = parsed.pop()
            facts = RequestFacts(self._arrived_ns)
            try:
                asked = self._inference.read(request, contents, facts)
            except Refusal as refusal:
                self._refuse(position, facts, refusal)
            except Exception:
                self._refuse(position, facts, defect("an item of a batch"))
            else:
                if isinstance(asked, AskedRoute):
                    routed.append(_RoutedItem(position, asked, facts))
                else:
                    group = groups.setdefault(asked.model.id, _Group())
                    group.left.append(_Item(position, asked, facts))
                    group.pending += 1
            if position % _BREATH == _BREATH - 1:
                await asyncio.sleep(0)

    async def _work(self, group: _Group) -> None:
        """Answers one item of a group after the other, until none is left."""
        while group.left:
            await self._answer_item(group, group.left.popleft())
            # Models that answer at once would otherwise keep everybody else waiting.
            await asyncio.sleep(0)

    async def _work_routed(self, left: deque[_RoutedItem]) -> None:
        """Answers one item of a route after the other, until none is left."""
        while left:
            item = left.popleft()
            try:
                outputs = await self._inference.answer(
                    item.asked, item.facts, self._timeout_s, self._client
                )
                reply = serialize_response(outputs, served_of(item.facts))
                self._add_size(len(reply))
            except Refusal as refusal:
                self._refuse(item.position, item.facts, refusal)
            except Exception:
                self._refuse(item.position, item.facts, defect("an item of a batch"))
            else:
                self._results[item.position] = reply
                self._inference.note_answered(item.facts)
            await asyncio.sleep(0)

    async def _answer_item(
        self, group: _Group, item: _Item, *, workers: int = MOST_WORKERS
    ) -> None:
        facts = item.facts
        try:
            lease = await self._lease(group, item)
            outputs = await self._inference.run(
                item.asked, lease, facts, self._timeout_s, self._client
            )
            reply = serialize_response(outputs, served_of(facts))
            self._add_size(len(reply))
        except Refusal as refusal:
            if refusal.reason is Reason.WORKER_LOST and workers > 1:
                # It had not begun, and something else is to blame; see inference.
                group.drop_spare()  # It is of the model that is gone.
                group.pending += 1
                await self._answer_item(group, item, workers=workers - 1)
            else:
                self._refuse(item.position, facts, refusal)
        except Exception:
            self._refuse(item.position, facts, defect("an item of a batch"))
        else:
            self._results[item.position] = reply
            self._inference.note_answered(facts)

    async def _lease(self, group: _Group, item: _Item) -> Lease:
        """A lease for an item. One of a group waits for the model, and the others for that one."""
        asked, facts = item.asked, item.facts
        async with group.turn:
            group.pending -= 1
            try:
                if group.refusal is not None:
                    facts.cold = True
                    raise replace(group.refusal)
                if monotonic_ns() >= self._deadline_ns:
                    text = "the deadline passed before its turn came"
                    raise Refusal(Reason.DEADLINE_IN_RUN, text)
                lease = group.take_spare() or self._inference.try_lease(asked, self._deadline_ns)
                if lease is None:
                    facts.cold = True
                    lease = await self._wait(group, asked)
                    group.cold, group.load_s = True, lease.load_s
                if group.pending:
                    group.spare = self._inference.lease_again(asked, lease)
            finally:
                if not group.pending:
                    group.drop_spare()
        facts.cold, facts.load_s = group.cold, group.load_s
        return lease

    async def _wait(self, group: _Group, asked: Asked) -> Lease:
        self._inference.check(asked)
        try:
            return await self._inference.wait(asked, self._deadline_ns)
        except Refusal as refusal:
            group.refusal = refusal
            raise

    def _refuse(self, position: int, facts: RequestFacts, refusal: Refusal) -> None:
        self._inference.note_refused(facts, refusal)
        self._results[position] = item_error_of(refusal)

    def _add_size(self, size_bytes: int) -> None:
        """Counts an answer. Raises Refusal ANSWER_TOO_LARGE if there is no room for it."""
        size_bytes += _FRAME_BYTES
        if self._answer_bytes + size_bytes > self._most_answer_bytes:
            limit = self._most_answer_bytes
            raise Refusal(
                Reason.ANSWER_TOO_LARGE,
                f"the answers of this call are larger than {limit} bytes together: ask for fewer "
                "items at a time",
                metadata={"size_bytes": str(size_bytes), "limit_bytes": str(limit)},
            )
        self._answer_bytes += size_bytes
