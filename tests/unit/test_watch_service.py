"""The watch and explain services over a real residency, whose engine the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.support.fake_engine import FakeClock, FakeEngine, turns

from modelyard.v1 import admin_service_pb2, event_pb2, residency_pb2
from modelyard.v1 import residency_service_pb2 as pb
from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import Model, ModelDraft
from modelyard_server.catalog.records import Owner
from modelyard_server.devices.placed import PlacedAs, whole
from modelyard_server.errors import Reason, Refusal
from modelyard_server.residency.journal import EventType, Journal
from modelyard_server.residency.shell import Lease, Residency
from modelyard_server.residency.values import NEVER_NS, ModelHandle, YardSettings
from modelyard_server.runtimes.api import ModelFilesError, ModelSpec, Price
from modelyard_server.services.watch import WatchService
from modelyard_server.transport.api import Call

BUDGET = 250
NOON = datetime(2030, 1, 2, 12, 3, 4, tzinfo=UTC)
CALL = Call(b"", lambda: None, None)
PATIENCE_S = 60

COLD = residency_pb2.RESIDENCY_STATE_COLD
LOADING = residency_pb2.RESIDENCY_STATE_LOADING
RESIDENT = residency_pb2.RESIDENCY_STATE_RESIDENT
FAILED = residency_pb2.RESIDENCY_STATE_FAILED


class Yard:
    """A residency, a catalog, a journal and the service that is tested."""

    def __init__(self, *, capacity: int = 1000, max_watches: int = 64, **journal: Any) -> None:
        self.engine = FakeEngine()
        self.clock = FakeClock()
        self.journal = Journal(capacity=capacity, now=lambda: NOON, **journal)
        names = ("devices/cpu", "devices/x")
        self.residency = Residency(
            settings=YardSettings(budgets=(BUDGET, BUDGET)),
            device_names=names,
            engine=self.engine,
            journal=self.journal,
            now_ns=self.clock,
        )
        self.catalog = Catalog()
        self.service = WatchService(
            journal=self.journal,
            residency=self.residency,
            catalog=self.catalog,
            device_names=names,
            max_watches=max_watches,
        )
        self.streams: list[AsyncGenerator[Any, None]] = []

    def add(self, name: str, size: int = 100) -> ModelHandle:
        """Registers a model, as CreateModel does."""
        self.engine.prices[name] = size

        def replan(price: Price) -> tuple[PlacedAs, ...]:
            return (whole(0, price),)

        ways = replan(Price(resting_bytes=size, peak_bytes=size))
        handle = self.residency.add(
            ModelSpec(name=name, runtime="fake"), ways=ways, replan=replan, priced_bytes=size
        )
        self.catalog.add(
            Model(
                draft=ModelDraft(id=name, runtime="fake", options={}),
                owner=Owner.API,
                ways=ways,
                replan=replan,
                created=NOON,
                etag="1",
                handle=handle,
            )
        )
        self.journal.publish(EventType.MODEL_CREATED, f"models/{name}", cause="operator")
        self.journal.changed(name)
        return handle

    def delete(self, name: str) -> None:
        """Takes a model out, as DeleteModel does."""
        model = self.catalog.get(name)
        self.catalog.remove(model)
        self.journal.publish(EventType.MODEL_DELETED, f"models/{name}", cause="operator")
        self.journal.removed(name)
        self.residency.remove(model.handle)

    async def begin_to_load(self, handle: ModelHandle) -> asyncio.Task[Lease]:
        task = asyncio.create_task(self.residency.lease(handle, NEVER_NS))
        await turns()
        return task

    async def load(self, handle: ModelHandle, seconds: float = 0.5) -> None:
        """Loads a model for a request that is answered."""
        task = await self.begin_to_load(handle)
        self.clock.advance(seconds)
        self.engine.loads[handle.core_id].finish()
        (await task).release()

    async def leave(self) -> None:
        """Lets those leave that were told to."""
        await turns()
        for unload in [*self.engine.unloads.values()]:
            unload.finish()
        await turns()

    def watch(self, epoch: str = "", revision: int = 0) -> AsyncGenerator[Any, None]:
        request = pb.WatchResidenciesRequest(epoch=epoch, revision=revision)
        stream = self.service.watch_residencies(request, CALL)
        self.streams.append(stream)
        return stream

    def events(self, **request: Any) -> AsyncGenerator[Any, None]:
        stream = self.service.watch_events(admin_service_pb2.WatchEventsRequest(**request), CALL)
        self.streams.append(stream)
        return stream

    async def explain(self, name: str) -> pb.ExplainModelResponse:
        return await self.service.explain_model(
            pb.ExplainModelRequest(model=f"models/{name}"), CALL
        )


@pytest.fixture
async def yards() -> AsyncIterator[Callable[..., Yard]]:
    """Makes yards, and looks at the end of the test whether anything is left of them."""
    made: list[Yard] = []

    def make(**settings: Any) -> Yard:
        made.append(Yard(**settings))
        return made[-1]

    yield make
    for yard in made:
        for stream in yard.streams:
            await stream.aclose()
        assert yard.service.watch_count == 0
        assert not yard.journal._waiters
        closing = asyncio.create_task(yard.residency.close(PATIENCE_S))
        while not closing.done():
            await yard.leave()
        await closing
        yard.residency.audit()


async def told(stream: AsyncGenerator[Any, None]) -> Any:
    return await asyncio.wait_for(anext(stream), PATIENCE_S)


@asynccontextmanager
async def silent(stream: AsyncGenerator[Any, None]) -> AsyncIterator[asyncio.Task[Any]]:
    """Asks for the next message, which does not come before the body has begun."""
    task: asyncio.Task[Any] = asyncio.ensure_future(anext(stream))
    await turns()
    assert not task.done(), task.result()
    yield task
    await asyncio.wait_for(task, PATIENCE_S)


def states(message: Any) -> dict[str, int]:
    return {item.model.removeprefix("models/"): item.state for item in message.residencies}


async def reason_of(stream: AsyncGenerator[Any, None]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        await told(stream)
    return caught.value


# --- WatchResidencies: the snapshot ---------------------------------------------------------------


async def test_a_watch_begins_with_a_snapshot(yards: Any) -> None:
    yard = yards()
    yard.add("b")
    await yard.load(yard.add("a"))
    message = await told(yard.watch())
    assert [item.name for item in message.residencies] == ["residencies/a", "residencies/b"]
    assert states(message) == {"a": RESIDENT, "b": COLD}
    assert [(c.device, c.size_bytes) for c in message.residencies[0].charges] == [
        ("devices/cpu", 100)
    ]
    assert message.snapshot
    assert message.snapshot_complete
    assert message.epoch == yard.journal.epoch
    assert message.revision == yard.journal.revision > 0


async def test_a_snapshot_of_nothing_is_complete_too(yards: Any) -> None:
    message = await told(yards().watch())
    assert not message.residencies
    assert (message.snapshot, message.snapshot_complete, message.revision) == (True, True, 0)


async def test_a_large_snapshot_comes_in_pages_of_one_moment(yards: Any) -> None:
    yard = yards()
    handles = [yard.add(f"m{i:03}") for i in range(450)]
    began = yard.journal.revision
    stream = yard.watch()
    pages = [await told(stream)]
    # What happens while a reader takes its time is told afterwards.
    await yard.begin_to_load(handles[300])
    pages += [await told(stream), await told(stream)]
    assert [len(page.residencies) for page in pages] == [200, 200, 50]
    assert [state for page in pages for state in states(page).values()] == [COLD] * 450
    assert all(page.snapshot for page in pages)
    assert [page.snapshot_complete for page in pages] == [False, False, True]
    # From a part of a snapshot nobody can go on: it has to be asked for again.
    assert [page.revision for page in pages] == [0, 0, began]
    changes = await told(stream)
    assert states(changes) == {"m300": LOADING}
    again = await told(yard.watch(yard.journal.epoch, pages[1].revision))
    assert again.snapshot
    yard.engine.loads[handles[300].core_id].finish()


# --- WatchResidencies: changes --------------------------------------------------------------------


async def test_each_change_is_told_with_what_is_so_then(yards: Any) -> None:
    yard = yards()
    a, b = yard.add("a"), yard.add("b", 200)
    stream = yard.watch()
    revision = (await told(stream)).revision
    async with silent(stream) as message:
        task = await yard.begin_to_load(a)
    assert states(message.result()) == {"a": LOADING}
    yard.engine.loads[a.core_id].finish()
    (await task).release()
    message = await told(stream)
    assert states(message) == {"a": RESIDENT}
    task = await yard.begin_to_load(b)
    message = await told(stream)
    assert states(message).keys() == {"a", "b"}
    assert not message.snapshot
    assert not message.snapshot_complete
    assert message.revision == yard.journal.revision > revision
    await yard.leave()
    yard.engine.loads[b.core_id].finish()
    (await task).release()
    assert states(await told(stream)) == {"a": COLD, "b": RESIDENT}


async def test_changes_that_come_faster_than_they_are_read_are_one(yards: Any) -> None:
    yard = yards()
    a = yard.add("a")
    stream = yard.watch()
    await told(stream)
    for _ in range(5):
        await yard.load(a)
        unloading = asyncio.create_task(yard.residency.unload(a))
        await yard.leave()
        await unloading
    message = await told(stream)
    assert states(message) == {"a": COLD}
    assert message.residencies[0].load_count == 5
    assert message.revision == yard.journal.revision
    async with silent(stream) as following:
        yard.residency.set_pinned(a, True)
    assert [item.pinned for item in following.result().residencies] == [True]


async def test_many_changes_come_in_messages_of_a_bounded_size(yards: Any) -> None:
    yard = yards()
    for i in range(450):
        yard.add(f"m{i:03}")
    stream = yard.watch()
    before = [(await told(stream)).revision for _ in range(3)][-1]
    for i in range(450):
        yard.journal.publish(EventType.MODEL_UPDATED, f"models/m{i:03}")
        yard.journal.changed(f"m{i:03}")
    messages = [await told(stream) for _ in range(3)]
    assert [len(message.residencies) for message in messages] == [200, 200, 50]
    # Only the last of them says that everything up to its revision is told.
    assert [m.revision for m in messages] == [before, before, yard.journal.revision]


async def test_a_model_that_is_deleted_is_told_as_removed(yards: Any) -> None:
    yard = yards()
    await yard.load(yard.add("a"))
    yard.add("b")
    stream = yard.watch()
    await told(stream)
    yard.delete("a")
    yard.delete("b")
    message = await told(stream)
    assert not message.residencies
    assert sorted(message.removed) == ["residencies/a", "residencies/b"]
    # Its memory comes back later: it does not come to life by that.
    await yard.leave()
    message = await told(stream)
    assert (list(message.residencies), list(message.removed)) == ([], ["residencies/a"])


async def test_a_name_that_comes_back_is_there_again(yards: Any) -> None:
    yard = yards()
    yard.add("a")
    stream = yard.watch()
    await told(stream)
    yard.delete("a")
    yard.add("a")
    message = await told(stream)
    assert states(message) == {"a": COLD}
    assert not message.removed


async def test_a_failed_model_says_why_and_when_it_is_tried_again(yards: Any) -> None:
    yard = yards()
    a = yard.add("a")
    task = await yard.begin_to_load(a)
    yard.engine.loads[a.core_id].fail(ModelFilesError("no such file"))
    with pytest.raises(Refusal):
        await task
    (item,) = (await told(yard.watch())).residencies
    assert item.state == FAILED
    assert item.failure.message == "no such file"
    assert item.failure.attempt_count == 1
    assert item.failure.retry_time.ToDatetime(UTC) > datetime.now(UTC)


async def test_a_watcher_that_fell_too_far_behind_begins_anew(yards: Any) -> None:
    yard = yards(most_changed=2)
    yard.add("a")
    stream = yard.watch()
    await told(stream)
    for name in "bcd":
        yard.add(name)
    message = await told(stream)
    assert message.snapshot
    assert states(message).keys() == set("abcd")


# --- WatchResidencies: resuming -------------------------------------------------------------------


async def test_who_resumes_is_told_what_changed_since(yards: Any) -> None:
    yard = yards()
    a, _ = yard.add("a"), yard.add("b")
    yard.add("c")
    first = await told(yard.watch())
    await yard.load(a)
    yard.delete("c")
    message = await told(yard.watch(first.epoch, first.revision))
    assert not message.snapshot
    assert states(message) == {"a": RESIDENT}
    assert list(message.removed) == ["residencies/c"]
    assert message.revision == yard.journal.revision


async def test_who_resumes_with_nothing_new_is_told_so_at_once(yards: Any) -> None:
    yard = yards()
    yard.add("a")
    yard.journal.publish(EventType.PLAN_APPLIED, "plan")
    first = await told(yard.watch())
    stream = yard.watch(first.epoch, first.revision)
    message = await told(stream)
    assert not message.residencies
    assert not message.snapshot
    assert message.revision == first.revision
    async with silent(stream) as following:
        yard.add("b")
    assert states(following.result()) == {"b": COLD}


@pytest.mark.parametrize(("epoch", "ahead"), [("another", 0), (None, 1_000)])
async def test_who_resumes_from_what_is_not_known_has_a_snapshot(
    yards: Any, epoch: str | None, ahead: int
) -> None:
    yard = yards()
    yard.add("a")
    revision = yard.journal.revision + ahead
    message = await told(yard.watch(epoch or yard.journal.epoch, revision))
    assert message.snapshot
    assert message.snapshot_complete
    assert message.epoch == yard.journal.epoch


# --- Limits and the end ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["watch", "events"])
@pytest.mark.parametrize(
    ("request_of", "field"),
    [({"epoch": "e", "revision": -1}, "revision"), ({"revision": 3}, "epoch")],
)
async def test_a_place_that_no_message_told_is_an_invalid_field(
    yards: Any, kind: str, request_of: dict[str, Any], field: str
) -> None:
    refusal = await reason_of(getattr(yards(), kind)(**request_of))
    assert refusal.reason is Reason.INVALID_FIELD
    assert [v.field for v in refusal.violations] == [field]


async def test_watches_are_counted_over_both_kinds_and_give_their_place_back(yards: Any) -> None:
    yard = yards(max_watches=2)
    first, second = yard.watch(), yard.events()
    await told(first)
    await told(second)
    for refused in (yard.watch(), yard.events()):
        refusal = await reason_of(refused)
        assert refusal.reason is Reason.QUEUE_FULL
        assert refusal.retry_after_s is not None
    await first.aclose()
    await told(yard.events())


async def test_a_watcher_that_is_cancelled_where_it_waits_gives_its_place_back(yards: Any) -> None:
    yard = yards(max_watches=1)
    stream = yard.watch()
    await told(stream)
    task = asyncio.ensure_future(anext(stream))
    await turns()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert yard.service.watch_count == 0
    await told(yard.watch())


async def test_a_closed_journal_ends_every_watch_with_server_draining(yards: Any) -> None:
    yard = yards()
    streams = [yard.watch(), yard.events()]
    for stream in streams:
        await told(stream)
    waiting = [asyncio.create_task(reason_of(stream)) for stream in streams]
    await turns()
    yard.journal.close()
    for refusal in await asyncio.gather(*waiting):
        assert refusal.reason is Reason.SERVER_DRAINING


# --- WatchEvents ----------------------------------------------------------------------------------


async def test_a_watch_of_events_begins_with_what_happens_next(yards: Any) -> None:
    yard = yards()
    a = yard.add("a")
    stream = yard.events()
    first = await told(stream)
    assert not first.events
    assert (first.epoch, first.revision) == (yard.journal.epoch, yard.journal.revision)
    assert not first.truncated
    async with silent(stream) as message:
        await yard.begin_to_load(a)
    found = [(e.type, e.subject) for e in message.result().events]
    assert found == [
        (event_pb2.EVENT_TYPE_QUEUED, "models/a"),
        (event_pb2.EVENT_TYPE_LOAD_STARTED, "models/a"),
    ]
    assert message.result().revision == message.result().events[-1].revision
    yard.engine.loads[a.core_id].finish()


async def test_every_event_comes_once_and_in_order(yards: Any) -> None:
    yard = yards()
    stream = yard.events(include_past=True)
    seen: list[int] = []
    for count in (1, 2, 450, 3):
        for _ in range(count):
            yard.journal.publish(EventType.PLAN_APPLIED, "plan")
        while len(seen) < yard.journal.revision:
            message = await told(stream)
            assert not message.truncated
            assert 1 <= len(message.events) <= 200
            seen += [event.revision for event in message.events]
            assert message.revision == seen[-1]
    assert seen == list(range(1, 457))


async def test_a_change_without_an_event_tells_a_watcher_of_events_nothing(yards: Any) -> None:
    yard = yards()
    yard.add("a")
    stream = yard.events()
    await told(stream)
    async with silent(stream) as message:
        yard.journal.changed("a")
        await turns()
        assert not message.done()
        yard.journal.publish(EventType.PLAN_APPLIED, "plan")
    assert len(message.result().events) == 1


async def test_an_event_says_who_did_it_and_for_whom(yards: Any) -> None:
    yard = yards()
    a, b = yard.add("a", 200), yard.add("b", 200)
    await yard.load(a)
    stream = yard.events()
    await told(stream)
    with yard.journal.acting("ann"):
        task = await yard.begin_to_load(b)
    message = await told(stream)
    (evicted,) = [e for e in message.events if e.type == event_pb2.EVENT_TYPE_EVICTED]
    assert (evicted.subject, evicted.cause, evicted.identity) == ("models/a", "models/b", "ann")
    assert evicted.HasField("score")
    assert evicted.size_bytes == 200
    assert evicted.time.ToDatetime(UTC) == NOON
    await yard.leave()
    yard.clock.advance(1.5)
    yard.engine.loads[b.core_id].finish()
    (await task).release()
    done = (await told(stream)).events[-1]
    assert done.type == event_pb2.EVENT_TYPE_LOAD_DONE
    assert done.waited.ToTimedelta().total_seconds() == 1.5
    assert done.HasField("load_duration")
    assert not done.HasField("score")


@pytest.mark.parametrize(
    ("request_of", "first_revision", "truncated"),
    [
        ({"epoch": True, "revision": 8}, 9, False),
        ({"epoch": True, "revision": 6}, 7, False),
        ({"epoch": True, "revision": 5}, 7, True),
        ({"epoch": True, "revision": 0}, 7, True),
        ({"epoch": True, "revision": 99}, 7, True),
        ({"epoch": "another", "revision": 8}, 7, True),
        ({"include_past": True}, 7, True),
        ({"epoch": True, "revision": 8, "include_past": True}, 7, True),
    ],
)
async def test_where_a_watch_of_events_begins(
    yards: Any, request_of: dict[str, Any], first_revision: int, truncated: bool
) -> None:
    yard = yards(capacity=4)
    for _ in range(10):
        yard.journal.publish(EventType.PLAN_APPLIED, "plan")
    if request_of.get("epoch") is True:
        request_of = request_of | {"epoch": yard.journal.epoch}
    message = await told(yard.events(**request_of))
    assert [e.revision for e in message.events] == list(range(first_revision, 11))
    assert message.truncated == truncated
    assert message.revision == 10


async def test_another_epoch_is_told_even_if_there_is_nothing_yet(yards: Any) -> None:
    message = await told(yards().events(epoch="another"))
    assert not message.events
    assert message.truncated


async def test_a_slow_reader_misses_the_oldest_and_is_told(yards: Any) -> None:
    yard = yards(capacity=4)
    stream = yard.events()
    assert not (await told(stream)).truncated
    for _ in range(10):
        yard.journal.publish(EventType.PLAN_APPLIED, "plan")
    message = await told(stream)
    assert message.truncated
    assert [e.revision for e in message.events] == [7, 8, 9, 10]
    yard.journal.publish(EventType.PLAN_APPLIED, "plan")
    assert not (await told(stream)).truncated


# --- ExplainModel ---------------------------------------------------------------------------------


async def test_a_resident_model_is_explained(yards: Any) -> None:
    yard = yards()
    a, b = yard.add("a", 200), yard.add("b", 200)
    await yard.load(a)
    for handle in (b, a):
        task = await yard.begin_to_load(handle)
        await yard.leave()
        yard.clock.advance(0.3)
        yard.engine.loads[handle.core_id].finish()
        (await task).release()
    response = await yard.explain("a")
    assert response.residency.state == RESIDENT
    assert not response.truncated
    types = [event_pb2.EventType.Name(e.type).removeprefix("EVENT_TYPE_") for e in response.events]
    assert types == [
        *("MODEL_CREATED", "QUEUED", "LOAD_STARTED", "LOAD_DONE"),
        *("EVICTED", "UNLOADED", "QUEUED"),
        *("EVICTED", "LOAD_STARTED", "LOAD_DONE"),
    ]
    assert [e.subject for e in response.events if e.cause == "models/a"] == ["models/b"]
    load_s = response.events[-1].load_duration.ToTimedelta().total_seconds()
    assert response.summary == (
        f"Resident on devices/cpu since 12:03:04 UTC, loaded in {load_s:.2f} s, 0.30 s "
        "after it was asked for; evicted once for models/b at 12:03:04 UTC. It made models/b leave."
    )
    b_summary = (await yard.explain("b")).summary
    assert b_summary == (
        "Not in memory since 12:03:04 UTC, it left for models/a at 12:03:04 UTC; evicted once for "
        "models/a at 12:03:04 UTC. It made models/a leave."
    )


async def test_a_model_is_explained_wherever_it_stands(yards: Any) -> None:
    yard = yards()
    a = yard.add("a")
    assert (await yard.explain("a")).summary == "Not in memory, never loaded."
    task = await yard.begin_to_load(a)
    assert (await yard.explain("a")).summary == ("Being loaded on devices/cpu since 12:03:04 UTC.")
    yard.engine.loads[a.core_id].fail(ModelFilesError("no such file"))
    with pytest.raises(Refusal):
        await task
    assert (await yard.explain("a")).summary == (
        "Not in memory, its last load failed at 12:03:04 UTC: no such file."
    )
    b = yard.add("b")
    lease = asyncio.create_task(yard.residency.lease(b, NEVER_NS))
    await turns()
    yard.engine.loads[b.core_id].finish()
    held = await lease
    yard.residency.set_pinned(b, True)
    assert (await yard.explain("b")).summary.endswith("; pinned.")
    yard.residency.set_pinned(b, False)
    unloading = asyncio.create_task(yard.residency.unload(b))
    await turns()
    assert (await yard.explain("b")).summary == (
        "Leaving devices/cpu when its requests end because an operator asked for it at "
        "12:03:04 UTC."
    )
    held.release()
    await yard.leave()
    await unloading
    assert (await yard.explain("b")).summary == (
        "Not in memory since 12:03:04 UTC, it left because an operator asked for it at "
        "12:03:04 UTC."
    )


async def test_a_deleted_model_is_explained_as_long_as_the_log_knows_it(yards: Any) -> None:
    yard = yards(capacity=2)
    yard.add("a")
    yard.delete("a")
    response = await yard.explain("a")
    assert not response.HasField("residency")
    assert response.summary == "Not registered any more."
    assert [e.type for e in response.events] == [
        event_pb2.EVENT_TYPE_MODEL_CREATED,
        event_pb2.EVENT_TYPE_MODEL_DELETED,
    ]
    for _ in range(2):
        yard.journal.publish(EventType.PLAN_APPLIED, "plan")
    with pytest.raises(Refusal) as caught:
        await yard.explain("a")
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


async def test_what_the_log_has_dropped_is_said(yards: Any) -> None:
    yard = yards(capacity=3)
    a = yard.add("a", 200)
    b = yard.add("b", 200)
    await yard.load(a)
    task = await yard.begin_to_load(b)
    response = await yard.explain("a")
    assert response.truncated
    assert "evicted at least once for models/b" in response.summary
    await yard.leave()
    yard.engine.loads[b.core_id].finish()
    (await task).release()


@pytest.mark.parametrize("name", ["a", "models/", "models/..", "devices/a"])
async def test_a_name_that_is_no_models_is_an_invalid_field(yards: Any, name: str) -> None:
    with pytest.raises(Refusal) as caught:
        await yards().service.explain_model(pb.ExplainModelRequest(model=name), CALL)
    assert caught.value.reason is Reason.INVALID_FIELD
