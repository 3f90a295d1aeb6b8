"""Watching and explaining over a real channel, beside requests that come and go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from tests.support.config_text import CPU, device_table, model_table
from tests.support.server import RunningApp, eventually, running_app

from modelyard import Admin
from modelyard.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    event_pb2,
    residency_pb2,
    residency_service_pb2,
    residency_service_pb2_grpc,
)

X = np.ones(3, np.float32)
PATIENCE_S = 60
LONG_S = 300
"""A grace that no test waits for."""

COLD = residency_pb2.RESIDENCY_STATE_COLD
RESIDENT = residency_pb2.RESIDENCY_STATE_RESIDENT

ROOM_FOR_ONE = device_table("cpu", 5000)


def ballast(name: str, size_bytes: int = 4000) -> str:
    return model_table(name, "identity", options={"size_bytes": size_bytes})


class Watcher:
    """A client that keeps what a watch of residencies tells."""

    def __init__(self, yard: RunningApp, epoch: str = "", revision: int = 0) -> None:
        stub: Any = residency_service_pb2_grpc.ResidencyServiceStub(yard.channel)
        request = residency_service_pb2.WatchResidenciesRequest(epoch=epoch, revision=revision)
        self.stream = stub.WatchResidencies(request)
        self.known: dict[str, residency_pb2.Residency] = {}
        self.epoch = ""
        self.revision = 0
        self.snapshots = 0
        self._within_snapshot = False

    async def read(self) -> None:
        """Reads one message."""
        message = await asyncio.wait_for(self.stream.read(), PATIENCE_S)
        assert message is not grpc.aio.EOF
        if message.snapshot and not self._within_snapshot:
            self.snapshots += 1
            self.known = {}
        self._within_snapshot = message.snapshot and not message.snapshot_complete
        for item in message.residencies:
            self.known[item.model.removeprefix("models/")] = item
        for name in message.removed:
            self.known.pop(name.removeprefix("residencies/"), None)
        self.epoch, self.revision = message.epoch, message.revision

    async def until(self, **states: int) -> None:
        """Reads until these models are in these states."""
        async with asyncio.timeout(PATIENCE_S):
            while any(
                name not in self.known or self.known[name].state != state
                for name, state in states.items()
            ):
                await self.read()


def events_of(yard: RunningApp, **request: Any) -> Any:
    stub: Any = admin_service_pb2_grpc.AdminServiceStub(yard.channel)
    return stub.WatchEvents(admin_service_pb2.WatchEventsRequest(**request))


async def read_until(stream: Any, type: int, subject: str) -> list[event_pb2.Event]:
    """The events up to one of a type and subject."""
    events: list[event_pb2.Event] = []
    async with asyncio.timeout(PATIENCE_S):
        while not any(e.type == type and e.subject == subject for e in events):
            events += (await stream.read()).events
    return events


async def explain(yard: RunningApp, model: str) -> residency_service_pb2.ExplainModelResponse:
    stub: Any = residency_service_pb2_grpc.ResidencyServiceStub(yard.channel)
    request = residency_service_pb2.ExplainModelRequest(model=f"models/{model}")
    answer: residency_service_pb2.ExplainModelResponse = await stub.ExplainModel(request)
    return answer


async def reason_of(stream: Any) -> str:
    """Reads to the end, which must be an error, and returns its reason."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(PATIENCE_S):
            while await stream.read() is not grpc.aio.EOF:
                pass
    return reason_in(caught.value)


def reason_in(error: grpc.aio.AioRpcError) -> str:
    trailers = {str(key): value for key, value in error.trailing_metadata() or ()}
    details = trailers["grpc-status-details-bin"]
    assert isinstance(details, bytes)
    status = status_pb2.Status.FromString(details)
    return str(error_details_pb2.ErrorInfo.FromString(status.details[0].value).reason)


def types_about(events: Sequence[event_pb2.Event], subject: str) -> list[str]:
    return [
        event_pb2.EventType.Name(e.type).removeprefix("EVENT_TYPE_")
        for e in events
        if e.subject == subject
    ]


async def test_a_watcher_sees_models_come_and_go(tmp_path: Path) -> None:
    async with running_app(ROOM_FOR_ONE + ballast("a") + ballast("b"), tmp_path) as yard:
        watcher = Watcher(yard)
        await watcher.until(a=COLD, b=COLD)
        await yard.client.predict("a", X)
        await watcher.until(a=RESIDENT)
        await yard.client.predict("b", X)
        await watcher.until(a=COLD, b=RESIDENT)
        charge = watcher.known["b"].charges[0]
        assert (charge.device, charge.size_bytes) == ("devices/cpu", 4000)
        stub: Any = residency_service_pb2_grpc.ResidencyServiceStub(yard.channel)
        await stub.PinModel(residency_service_pb2.PinModelRequest(model="models/b"))
        async with asyncio.timeout(PATIENCE_S):
            while not watcher.known["b"].pinned:
                await watcher.read()
        await yard.admin(Admin.create_model, "c", runtime="identity")
        await watcher.until(c=COLD)
        await yard.admin(Admin.delete_model, "c")
        async with asyncio.timeout(PATIENCE_S):
            while "c" in watcher.known:
                await watcher.read()
        assert watcher.snapshots == 1
        watcher.stream.cancel()


async def test_a_watcher_that_comes_back_goes_on_where_it_was(tmp_path: Path) -> None:
    async with running_app(CPU + ballast("a") + ballast("b"), tmp_path) as yard:
        await yard.client.predict("b", X)
        first = Watcher(yard)
        await first.until(a=COLD, b=RESIDENT)
        first.stream.cancel()
        await yard.client.predict("a", X)
        second = Watcher(yard, first.epoch, first.revision)
        await second.until(a=RESIDENT)
        assert second.snapshots == 0
        # Of what changed at the revision itself it may hear again; of nothing before.
        assert second.known.keys() <= {"a", "b"}
        second.stream.cancel()
        # Of another run nothing is known: it begins anew.
        third = Watcher(yard, "another run", first.revision)
        await third.until(a=RESIDENT, b=RESIDENT)
        assert third.snapshots == 1
        third.stream.cancel()


async def test_events_tell_what_was_done_for_whom_and_by_whom(tmp_path: Path) -> None:
    async with running_app(ROOM_FOR_ONE + ballast("a") + ballast("b"), tmp_path) as yard:
        await yard.client.predict("a", X)
        stream = events_of(yard)
        assert not (await stream.read()).events
        await yard.client.predict("b", X)
        events = await read_until(stream, event_pb2.EVENT_TYPE_LOAD_DONE, "models/b")
        assert types_about(events, "models/a") == ["EVICTED", "UNLOADED"]
        assert types_about(events, "models/b") == ["QUEUED", "LOAD_STARTED", "LOAD_DONE"]
        (evicted,) = [e for e in events if e.type == event_pb2.EVENT_TYPE_EVICTED]
        assert (evicted.cause, evicted.identity) == ("models/b", "")
        assert evicted.HasField("score")
        done = events[-1]
        assert done.HasField("load_duration")
        assert done.HasField("waited")
        revisions = [e.revision for e in events]
        assert revisions == list(range(revisions[0], revisions[0] + len(revisions)))

        stub: Any = residency_service_pb2_grpc.ResidencyServiceStub(yard.channel)
        await stub.UnloadModel(
            residency_service_pb2.UnloadModelRequest(model="models/b"),
            metadata=(("x-modelyard-identity", "ann"),),
            timeout=PATIENCE_S,
        )
        events = await read_until(stream, event_pb2.EVENT_TYPE_UNLOADED, "models/b")
        (evicted,) = [e for e in events if e.type == event_pb2.EVENT_TYPE_EVICTED]
        assert (evicted.cause, evicted.identity) == ("operator", "ann")
        stream.cancel()

        past = events_of(yard, include_past=True)
        begin = (await past.read()).events
        assert [e.revision for e in begin] == list(range(1, revisions[0] + len(revisions) + 2))
        past.cancel()


async def test_a_model_is_explained_by_what_happened_to_it_and_for_it(tmp_path: Path) -> None:
    async with running_app(ROOM_FOR_ONE + ballast("a") + ballast("b"), tmp_path) as yard:
        for model in ("a", "b", "a"):
            await yard.client.predict(model, X)
        answer = await explain(yard, "a")
        assert answer.residency.state == RESIDENT
        assert not answer.truncated
        assert answer.summary.startswith("Resident on devices/cpu since ")
        assert "evicted once for models/b at " in answer.summary
        assert [e.subject for e in answer.events if e.cause == "models/a"] == ["models/b"]
        revisions = [e.revision for e in answer.events]
        assert revisions == sorted(revisions)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await explain(yard, "none")
        assert reason_in(caught.value) == "MODEL_NOT_FOUND"


async def test_requests_are_answered_beside_watchers_that_do_not_read(tmp_path: Path) -> None:
    async with running_app(ROOM_FOR_ONE + ballast("a") + ballast("b"), tmp_path) as yard:
        streams = [events_of(yard, include_past=True) for _ in range(20)]
        watchers = [Watcher(yard) for _ in range(20)]
        for i in range(100):
            answer = await yard.client.predict("ab"[i % 2], X)
            assert answer is not None
        # And they find what is so now when they read again.
        await watchers[0].until(b=RESIDENT, a=COLD)
        for watcher in watchers:
            watcher.stream.cancel()
        for stream in streams:
            stream.cancel()


async def test_too_many_watches_are_refused_until_one_leaves(tmp_path: Path) -> None:
    async with running_app(CPU + ballast("a"), tmp_path) as yard:
        watchers = [Watcher(yard) for _ in range(64)]
        for watcher in watchers:
            await watcher.read()
        assert await reason_of(Watcher(yard).stream) == "QUEUE_FULL"
        watchers[0].stream.cancel()

        async def there_is_room() -> bool:
            watcher = Watcher(yard)
            try:
                await watcher.read()
            except grpc.aio.AioRpcError:
                return False
            watcher.stream.cancel()
            return True

        await eventually("a watch may begin", there_is_room)
        for watcher in watchers:
            watcher.stream.cancel()


async def test_watches_end_at_once_when_the_server_stops(tmp_path: Path) -> None:
    async with running_app(CPU + ballast("a"), tmp_path) as yard:
        watcher, stream = Watcher(yard), events_of(yard)
        await watcher.read()
        await stream.read()
        began = time.monotonic()
        await asyncio.wait_for(yard.app.transport.stop(LONG_S), LONG_S)
        assert time.monotonic() - began < LONG_S / 2
        assert await reason_of(watcher.stream) == "SERVER_DRAINING"
        assert await reason_of(stream) == "SERVER_DRAINING"
