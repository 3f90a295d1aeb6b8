"""Watches of the client: order, resumption, Ctrl-C, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from tests.support.fake_api import FakeServer, Handler, refuse, start

import modelyard
from modelyard import errors
from modelyard._connection import Connection, ConnectionSettings
from modelyard._stream import StreamTimes
from modelyard.admin import Admin
from modelyard.events import Event, EventType, Eviction, WatchPosition
from modelyard.resources import ResidencyState
from modelyard.v1 import (
    admin_service_pb2,
    device_pb2,
    event_pb2,
    residency_pb2,
    residency_service_pb2,
)
from modelyard.v1.admin_service_pb2_grpc import AdminServiceStub
from modelyard.watch import EventWatch

EventsResponse = admin_service_pb2.WatchEventsResponse
ResidenciesResponse = residency_service_pb2.WatchResidenciesResponse


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """A watch that was closed has no thread any more."""
    yield
    assert [thread.name for thread in threading.enumerate() if "Watch" in thread.name] == []


def until_cancelled(context: grpc.ServicerContext) -> Iterator[Any]:
    """Say nothing more until the caller has gone."""
    gone = threading.Event()
    if context.add_callback(gone.set):
        gone.wait(30)
    yield from ()


def telling(*messages: Any, then: Handler | None = None) -> Handler:
    """A stream of messages, and then what a handler does; by default nothing, until cancelled."""

    def handler(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield from messages
        if then is None:
            yield from until_cancelled(context)
        else:
            then(request, context)

    return handler


def in_turn(server: FakeServer, *handlers: Handler) -> Handler:
    """The first handler for the first request, and so on; the last for all the rest."""

    def handler(request: Any, context: grpc.ServicerContext) -> Any:
        return handlers[min(len(server.requests), len(handlers)) - 1](request, context)

    return handler


def breaks(request: Any, context: grpc.ServicerContext) -> Any:
    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")


def batch(*revisions: int, epoch: str = "e1", truncated: bool = False) -> EventsResponse:
    return EventsResponse(
        events=[event_pb2.Event(revision=revision) for revision in revisions],
        epoch=epoch,
        revision=revisions[-1] if revisions else 0,
        truncated=truncated,
    )


def residency(model: str, state: int = residency_pb2.RESIDENCY_STATE_COLD) -> Any:
    return residency_pb2.Residency(
        name=f"residencies/{model}",
        model=f"models/{model}",
        state=residency_pb2.ResidencyState.ValueType(state),
    )


def revisions(events: Iterable[Event], count: int) -> list[int]:
    return [event.revision for event in islice(events, count)]


class TestEvents:
    def test_an_event_is_told_whole(self, server: FakeServer, admin: Admin) -> None:
        message = event_pb2.Event(
            revision=5,
            time=Timestamp(seconds=1_700_000_000),
            type=event_pb2.EVENT_TYPE_EVICTED,
            subject="models/m",
            cause="models/n",
            size_bytes=7,
            score=0.5,
            waited=Duration(nanos=500_000_000),
            load_duration=Duration(seconds=2),
            description="for n",
            identity="ops",
        )
        server.answer("WatchEvents", telling(EventsResponse(events=[message], epoch="e")))
        with admin.watch_events() as watch:
            assert next(watch) == Event(
                revision=5,
                happened_at=datetime.fromtimestamp(1_700_000_000, UTC),
                type=EventType.EVICTED,
                subject="models/m",
                cause="models/n",
                size_bytes=7,
                score=0.5,
                waited_s=0.5,
                load_s=2.0,
                description="for n",
                identity="ops",
            )

    @pytest.mark.parametrize("value", event_pb2.EventType.values())
    def test_every_type_has_a_value(self, value: int) -> None:
        name = event_pb2.EventType.Name(event_pb2.EventType.ValueType(value))
        plain = name.removeprefix("EVENT_TYPE_")
        if plain != "UNSPECIFIED":
            assert EventType[plain].value == plain.lower()

    def test_what_is_unset_or_newer_is_tolerated(self, server: FakeServer, admin: Admin) -> None:
        newer: Any = 99
        server.answer(
            "WatchEvents", telling(EventsResponse(events=[event_pb2.Event(type=newer)], epoch="e"))
        )
        with admin.watch_events() as watch:
            event = next(watch)
        assert event.type is EventType.UNKNOWN
        assert (event.happened_at, event.score, event.waited_s, event.load_s) == (None,) * 4

    def test_events_of_many_messages_come_in_order(self, server: FakeServer, admin: Admin) -> None:
        # More messages than are buffered, so that the reader has to wait for its credit.
        messages = [batch(2 * i + 1, 2 * i + 2) for i in range(100)]
        server.answer("WatchEvents", telling(batch(), *messages))
        with admin.watch_events() as watch:
            assert revisions(watch, 200) == list(range(1, 201))

    def test_the_beginning_is_as_asked(self, server: FakeServer, admin: Admin) -> None:
        server.answer("WatchEvents", telling(batch(1)))
        for arguments in (
            {},
            {"include_past": True},
            {"resume": WatchPosition(epoch="e0", revision=0)},
        ):
            with admin.watch_events(**arguments) as watch:
                next(watch)
        assert server.requests == [
            admin_service_pb2.WatchEventsRequest(),
            admin_service_pb2.WatchEventsRequest(include_past=True),
            admin_service_pb2.WatchEventsRequest(epoch="e0"),
        ]

    def test_the_position_is_behind_the_event_given_last(
        self, server: FakeServer, admin: Admin
    ) -> None:
        last = batch(4, 5)
        # The server may have gone through events it does not tell.
        last.revision = 9
        server.answer("WatchEvents", telling(batch(), last))
        with admin.watch_events() as watch:
            positions = [watch.position]
            for _ in range(2):
                next(watch)
                positions.append(watch.position)
        assert positions == [
            None,
            WatchPosition(epoch="e1", revision=4),
            WatchPosition(epoch="e1", revision=9),
        ]

    def test_missing_events_are_told(self, server: FakeServer, admin: Admin) -> None:
        server.answer(
            "WatchEvents",
            telling(
                batch(epoch="e2", truncated=True),
                batch(7, 8, epoch="e2"),
                batch(20, epoch="e2", truncated=True),
            ),
        )
        with admin.watch_events(WatchPosition(epoch="e1", revision=3)) as watch:
            found = [(event.revision, watch.truncated) for event in islice(watch, 3)]
        assert found == [(7, True), (8, False), (20, True)]


class TestResidencies:
    def test_a_snapshot_comes_first_and_then_changes(
        self, server: FakeServer, admin: Admin
    ) -> None:
        server.answer(
            "WatchResidencies",
            telling(
                ResidenciesResponse(residencies=[residency("a")], epoch="e", snapshot=True),
                ResidenciesResponse(
                    residencies=[residency("b")],
                    epoch="e",
                    revision=4,
                    snapshot=True,
                    snapshot_complete=True,
                ),
                ResidenciesResponse(
                    residencies=[residency("a", residency_pb2.RESIDENCY_STATE_LOADING)],
                    removed=["residencies/b"],
                    epoch="e",
                    revision=5,
                ),
            ),
        )
        with admin.watch_residencies() as watch:
            first, second, third = (next(watch) for _ in range(3))
            assert watch.position == WatchPosition(epoch="e", revision=5)
        assert (first.snapshot, first.snapshot_begins, first.snapshot_complete) == (
            True,
            True,
            False,
        )
        assert first.position is None
        assert (second.snapshot, second.snapshot_begins, second.snapshot_complete) == (
            True,
            False,
            True,
        )
        assert second.position == WatchPosition(epoch="e", revision=4)
        assert (third.snapshot, third.snapshot_begins) == (False, False)
        assert third.residencies[0].state is ResidencyState.LOADING
        assert third.removed == ("residencies/b",)
        assert server.requests == [residency_service_pb2.WatchResidenciesRequest()]

    def test_a_break_inside_a_snapshot_begins_it_again(
        self, server: FakeServer, admin: Admin
    ) -> None:
        part = ResidenciesResponse(
            residencies=[residency("a")], epoch="e", revision=4, snapshot=True
        )
        server.answer(
            "WatchResidencies", in_turn(server, telling(part, then=breaks), telling(part))
        )
        with admin.watch_residencies() as watch:
            assert [next(watch).snapshot_begins for _ in range(2)] == [True, True]
        # The rest of a snapshot could not be asked for.
        assert server.requests == [residency_service_pb2.WatchResidenciesRequest()] * 2

    def test_a_complete_snapshot_is_resumed_behind(self, server: FakeServer, admin: Admin) -> None:
        whole = ResidenciesResponse(epoch="e", revision=4, snapshot=True, snapshot_complete=True)
        change = ResidenciesResponse(epoch="e", revision=6)
        server.answer(
            "WatchResidencies", in_turn(server, telling(whole, then=breaks), telling(change))
        )
        with admin.watch_residencies() as watch:
            assert [next(watch).snapshot for _ in range(2)] == [True, False]
        assert server.requests[1] == residency_service_pb2.WatchResidenciesRequest(
            epoch="e", revision=4
        )

    def test_an_answer_out_of_range_is_the_server_s_error_and_the_end(
        self, server: FakeServer, admin: Admin
    ) -> None:
        strange = residency_pb2.Residency(
            failure=residency_pb2.LoadFailure(retry_time=Timestamp(seconds=2**60))
        )
        server.answer("WatchResidencies", telling(ResidenciesResponse(residencies=[strange])))
        watch = admin.watch_residencies()
        with pytest.raises(errors.ServerError, match="cannot be read"):
            next(watch)
        with pytest.raises(StopIteration):
            next(watch)


class TestResumption:
    @pytest.mark.parametrize(
        "end",
        [
            breaks,
            refuse(grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING"),
            # From a server that stops with calls under way.
            lambda request, context: context.abort(grpc.StatusCode.CANCELLED, "stopping"),
            # Not what the contract says, and no reason to miss anything either.
            lambda request, context: None,
        ],
        ids=["broken", "draining", "cancelled", "ended"],
    )
    def test_nothing_is_lost_or_told_twice_when_a_watch_breaks(
        self, server: FakeServer, admin: Admin, end: Handler
    ) -> None:
        def handler(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            begin = request.revision
            yield batch(begin + 1, begin + 2)
            if begin >= 6:
                yield from until_cancelled(context)
            end(request, context)

        server.answer("WatchEvents", handler)
        with admin.watch_events(include_past=True) as watch:
            assert revisions(watch, 8) == list(range(1, 9))
        assert [request.revision for request in server.requests] == [0, 2, 4, 6]
        assert [request.include_past for request in server.requests] == [True] + [False] * 3
        assert [request.epoch for request in server.requests] == [""] + ["e1"] * 3

    def test_a_server_that_comes_back_is_found_again(self) -> None:
        fake = FakeServer()
        fake.answer("WatchEvents", in_turn(fake, telling(batch(1)), telling(batch(2))))
        first = start(fake)
        with Admin(fake.address) as admin, admin.watch_events() as watch:
            assert next(watch).revision == 1
            first.stop(None).wait()
            second = start(fake, int(fake.address.rpartition(":")[2]))
            try:
                assert next(watch).revision == 2
            finally:
                second.stop(None).wait()
        assert fake.requests[1].epoch == "e1"

    @pytest.mark.parametrize(
        ("code", "reason", "error"),
        [
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", errors.QueueFull),
            (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", errors.InvalidRequest),
            (grpc.StatusCode.INTERNAL, "INTERNAL", errors.ServerError),
        ],
    )
    def test_what_does_not_pass_is_raised(
        self, server: FakeServer, admin: Admin, code: Any, reason: str, error: Any
    ) -> None:
        server.answer(
            "WatchEvents",
            in_turn(server, telling(batch(1), then=breaks), telling(then=refuse(code, reason))),
        )
        watch = admin.watch_events()
        assert next(watch).revision == 1
        with pytest.raises(error, match=reason):
            next(watch)
        with pytest.raises(StopIteration):
            next(watch)
        assert len(server.requests) == 2

    def test_a_server_that_was_never_reached_is_not_waited_for(self) -> None:
        with (
            Admin("127.0.0.1:1") as admin,
            admin.watch_residencies() as watch,
            pytest.raises(errors.ServerUnavailable, match=r"127\.0\.0\.1:1 cannot be reached"),
        ):
            next(watch)

    def test_a_server_that_stays_away_is_given_up(self) -> None:
        fake = FakeServer()
        fake.answer("WatchEvents", telling(batch(1)))
        server = start(fake)
        with Admin(fake.address, timeout_s=0.3) as admin, admin.watch_events() as watch:
            assert next(watch).revision == 1
            server.stop(None).wait()
            with pytest.raises(errors.ServerUnavailable):
                next(watch)


@pytest.fixture
def connection(server: FakeServer) -> Iterator[Connection]:
    made = Connection(
        ConnectionSettings(
            target=server.address,
            timeout_s=30,
            max_message_bytes=2**20,
            channel_credentials=None,
            identity=None,
        )
    )
    yield made
    made.close()


class TestTime:
    def test_each_call_has_a_deadline_and_is_resumed_behind_it(
        self, server: FakeServer, connection: Connection
    ) -> None:
        stub = AdminServiceStub(connection.channel)

        def open_call(position: WatchPosition | None, timeout_s: float) -> Any:
            request = admin_service_pb2.WatchEventsRequest()
            if position is not None:
                request.epoch, request.revision = position.epoch, position.revision
            return connection.open_stream(stub.WatchEvents, request, timeout_s)

        # The second call tells nothing: a quiet server has not gone away.
        server.answer(
            "WatchEvents", in_turn(server, telling(batch(1)), telling(), telling(batch(2)))
        )
        times = StreamTimes(give_up_s=0.001, call_s=0.2)
        with EventWatch(connection, open_call, resume=None, timeout_s=None, times=times) as watch:
            assert revisions(watch, 2) == [1, 2]
        assert [request.revision for request in server.requests[:3]] == [0, 1, 1]

    def test_a_watch_ends_when_its_time_is_over(self, server: FakeServer, admin: Admin) -> None:
        server.answer("WatchEvents", telling(batch(1)))
        watch = admin.watch_events(timeout_s=0.3)
        assert next(watch).revision == 1
        with pytest.raises(errors.DeadlineExceeded, match=r"lasted the 0\.3 seconds"):
            next(watch)


class TestEnding:
    def test_closing_cancels_the_call(self, server: FakeServer, admin: Admin) -> None:
        gone = threading.Event()

        def handler(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            assert context.add_callback(gone.set)
            yield batch(1)
            gone.wait(30)

        server.answer("WatchEvents", handler)
        with admin.watch_events() as watch:
            next(watch)
            assert not gone.is_set()
        assert gone.wait(10)
        assert list(watch) == []
        watch.close()

    def test_a_closed_watch_gives_nothing_of_what_it_had(
        self, server: FakeServer, admin: Admin
    ) -> None:
        server.answer("WatchEvents", telling(batch(1, 2, 3), batch(4)))
        watch = admin.watch_events()
        next(watch)
        watch.close()
        assert list(watch) == [] and watch.position == WatchPosition(epoch="e1", revision=1)

    def test_another_thread_can_close_a_watch_that_waits(
        self, server: FakeServer, admin: Admin
    ) -> None:
        server.answer("WatchEvents", telling(batch(1)))
        watch = admin.watch_events()
        first = threading.Event()
        found: list[int] = []

        def follow() -> None:
            for event in watch:
                found.append(event.revision)
                first.set()

        thread = threading.Thread(target=follow)
        thread.start()
        assert first.wait(10)
        watch.close()
        thread.join(10)
        assert not thread.is_alive() and found == [1]

    def test_a_watch_that_nobody_reads_can_be_closed(
        self, server: FakeServer, admin: Admin
    ) -> None:
        # Its reader waits for a credit that nobody gives.
        server.answer("WatchEvents", telling(*(batch(i) for i in range(1, 101))))
        watch = admin.watch_events()
        assert next(watch).revision == 1
        watch.close()

    def test_closing_the_client_ends_its_watches(self, server: FakeServer, admin: Admin) -> None:
        server.answer("WatchEvents", telling(batch(1)))
        watch = admin.watch_events()
        next(watch)
        admin.close()
        with pytest.raises(RuntimeError, match="this client is closed"):
            next(watch)
        with pytest.raises(RuntimeError, match="this client is closed"):
            admin.watch_events()

    @pytest.mark.parametrize(
        ("call", "error", "text"),
        [
            (lambda admin: admin.watch_events("e1"), TypeError, "a WatchPosition or None"),
            (lambda admin: admin.watch_residencies(timeout_s=0), ValueError, "above 0"),
            (
                lambda admin: admin.watch_events(
                    WatchPosition(epoch="e", revision=1), include_past=True
                ),
                ValueError,
                "resume or include_past",
            ),
            (lambda admin: WatchPosition(epoch="", revision=1), ValueError, "epoch is empty"),
            (lambda admin: WatchPosition(epoch="e", revision=-1), ValueError, "0 or more"),
            (lambda admin: WatchPosition(epoch="e", revision=True), TypeError, "an int"),
            (lambda admin: WatchPosition(epoch=1, revision=1), TypeError, "a str"),  # type: ignore[arg-type]  # refused
        ],
    )
    def test_wrong_arguments_are_refused_before_sending(
        self,
        server: FakeServer,
        admin: Admin,
        call: Callable[[Admin], Any],
        error: type[Exception],
        text: str,
    ) -> None:
        with pytest.raises(error, match=text):
            call(admin)
        assert server.requests == []


# A process that a shell starts in the background ignores SIGINT, and so would its children.
FOLLOWER = """
import signal
import sys
from modelyard import Admin

signal.signal(signal.SIGINT, signal.default_int_handler)

with Admin(sys.argv[1]) as admin:
    try:
        with admin.watch_events() as watch:
            for event in watch:
                print(event.revision, flush=True)
    except KeyboardInterrupt:
        print("interrupted", list(watch), flush=True)
"""


@pytest.fixture
def sigint_interrupts() -> Iterator[None]:
    """Ctrl-C as in a terminal, also where the tests themselves run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class TestInterruption:
    @pytest.mark.usefixtures("sigint_interrupts")
    def test_ctrl_c_is_raised_by_the_wait_and_closes_the_watch(
        self, server: FakeServer, admin: Admin
    ) -> None:
        server.answer("WatchEvents", telling(batch(1)))
        waiting = threading.Event()
        watch = admin.watch_events()
        next(watch)

        def interrupt() -> None:
            waiting.wait(10)
            # A signal of its own: it comes in the main thread, wherever that stands.
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            # It may already come on the way into the wait, which has to be as good.
            waiting.set()
            next(watch)
        thread.join()
        watch.close()
        assert list(watch) == []

    def test_ctrl_c_is_never_lost_wherever_it_arrives(self, server: FakeServer) -> None:
        """Interrupt real processes that receive without pause, each at another moment."""

        def handler(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            revision = request.revision
            while context.is_active():
                revision += 1
                yield batch(revision)

        server.answer("WatchEvents", handler)
        environment = {**os.environ, "PYTHONPATH": str(Path(modelyard.__file__).parents[1])}
        for events in range(1, 9):
            with subprocess.Popen(
                [sys.executable, "-c", FOLLOWER, server.address],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            ) as process:
                assert process.stdout is not None
                # One that hangs is to fail the test, not to hold it up.
                watchdog = threading.Timer(60, process.kill)
                watchdog.start()
                for _ in range(events * 7):
                    assert process.stdout.readline().strip().isdigit()
                process.send_signal(signal.SIGINT)
                *_, last = process.stdout
                assert process.wait() == 0
                watchdog.cancel()
                # The signal may have cut a line of the follower's own in two.
                assert last.endswith("interrupted []\n")


class TestExplain:
    def test_an_explanation_is_told_whole(self, server: FakeServer, admin: Admin) -> None:
        server.reply(
            "ExplainModel",
            residency_service_pb2.ExplainModelResponse(
                residency=residency("m"),
                events=[event_pb2.Event(revision=1), event_pb2.Event(revision=2)],
                summary="It was evicted for n.",
                truncated=True,
            ),
        )
        explanation = admin.explain("m")
        assert explanation.residency is not None
        assert explanation.residency.model == "models/m"
        assert [event.revision for event in explanation.events] == [1, 2]
        assert (explanation.summary, explanation.truncated) == ("It was evicted for n.", True)
        assert server.requests[0].model == "models/m"

    def test_an_eviction_is_told_with_what_it_cost(self, server: FakeServer, admin: Admin) -> None:
        event = event_pb2.Event(
            revision=3,
            type=event_pb2.EVENT_TYPE_EVICTED,
            rule="gdsf",
            expected_load_duration=Duration(seconds=2),
            idle_duration=Duration(seconds=5),
            resident_duration=Duration(seconds=9),
        )
        done = event_pb2.Event(
            type=event_pb2.EVENT_TYPE_LOAD_DONE,
            waited_request_count=2,
            waited_sum=Duration(seconds=4),
        )
        paid = residency_service_pb2.Eviction(
            event=event,
            waited_request_count=2,
            longest_wait=Duration(seconds=3),
            waited_sum=Duration(seconds=4),
            reload_duration=Duration(seconds=1),
            reload_time=Timestamp(seconds=1_700_000_000),
            failed_load_count=1,
        )
        unpaid = residency_service_pb2.Eviction(event=event)
        server.reply(
            "ExplainModel",
            residency_service_pb2.ExplainModelResponse(
                events=[event, done], evictions=[paid, unpaid]
            ),
        )
        explanation = admin.explain("m")
        left, loaded = explanation.events
        assert (left.rule, left.expected_load_s) == ("gdsf", 2.0)
        assert (left.idle_s, left.resident_s) == (5.0, 9.0)
        assert (loaded.waited_request_count, loaded.waited_sum_s) == (2, 4.0)
        assert (loaded.rule, loaded.expected_load_s, loaded.idle_s) == ("", None, None)
        assert explanation.evictions == (
            Eviction(
                event=left,
                waited_request_count=2,
                longest_wait_s=3.0,
                waited_sum_s=4.0,
                reload_s=1.0,
                reloaded_at=datetime.fromtimestamp(1_700_000_000, UTC),
                failed_load_count=1,
            ),
            Eviction(
                event=left,
                waited_request_count=0,
                longest_wait_s=None,
                waited_sum_s=None,
                reload_s=None,
                reloaded_at=None,
                failed_load_count=0,
            ),
        )

    def test_a_deleted_model_has_no_residency(self, server: FakeServer, admin: Admin) -> None:
        server.reply("ExplainModel", residency_service_pb2.ExplainModelResponse(summary="Deleted."))
        assert admin.explain("m").residency is None

    def test_a_model_nobody_knows_is_not_found(self, server: FakeServer, admin: Admin) -> None:
        server.answer("ExplainModel", refuse(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"))
        with pytest.raises(errors.ModelNotFound):
            admin.explain("m")


def test_device_kinds_are_no_concern_of_a_watch(server: FakeServer, admin: Admin) -> None:
    charge = residency_pb2.DeviceCharge(device="devices/npu-0", size_bytes=1)
    strange = residency_pb2.Residency(charges=[charge])
    server.answer("WatchResidencies", telling(ResidenciesResponse(residencies=[strange])))
    assert device_pb2.DeviceType.DESCRIPTOR.values_by_name.get("DEVICE_TYPE_NPU") is None
    with admin.watch_residencies() as watch:
        assert next(watch).residencies[0].charges[0].device == "devices/npu-0"
