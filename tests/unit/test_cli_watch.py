"""`modelyard watch` and `explain`, against a real server on loopback with made-up answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from tests.support.fake_api import FakeServer, Handler, refuse, serving
from typer.testing import CliRunner

from modelyard.v1 import (
    admin_service_pb2,
    event_pb2,
    residency_pb2,
    residency_service_pb2,
)
from modelyard_server.cli.main import app

EVENT = event_pb2.Event(
    revision=5,
    time=Timestamp(seconds=1_700_000_000),
    type=event_pb2.EVENT_TYPE_EVICTED,
    subject="models/m",
    cause="models/n",
    size_bytes=2**20,
    score=0.25,
    waited=Duration(nanos=500_000_000),
    description="\x1b[31mfor\nn",
    identity="ops",
)
RESIDENCY = residency_pb2.Residency(
    name="residencies/m",
    model="models/m",
    state=residency_pb2.RESIDENCY_STATE_RESIDENT,
    charges=[residency_pb2.DeviceCharge(device="devices/cpu", size_bytes=2**20)],
    pinned=True,
)
UNPINNED = residency_pb2.Residency()
UNPINNED.CopyFrom(RESIDENCY)
UNPINNED.pinned = False
FAILED = residency_pb2.Residency(
    name="residencies/f",
    model="models/f",
    state=residency_pb2.RESIDENCY_STATE_FAILED,
    failure=residency_pb2.LoadFailure(message="trunca\x1bted"),
)

# A process that a shell starts in the background ignores SIGINT, and so would its children.
INTERRUPTIBLE = """
import signal
from modelyard_server.cli.main import main

signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as fake:
        yield fake


def ending(*messages: Any) -> Handler:
    """Some messages, and then a refusal, so that the command ends by itself."""

    def handler(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield from messages
        refuse(grpc.StatusCode.INTERNAL, "INTERNAL", text="over")(request, context)

    return handler


def lasting(*messages: Any) -> Handler:
    """Some messages, and then nothing more until the caller has gone."""

    def handler(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        gone = threading.Event()
        yield from messages
        if context.add_callback(gone.set):
            gone.wait(30)

    return handler


def run(server: FakeServer, *arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments, "--server", server.address])


class TestResidencies:
    @pytest.fixture(autouse=True)
    def changes(self, server: FakeServer) -> None:
        response = residency_service_pb2.WatchResidenciesResponse
        server.answer(
            "WatchResidencies",
            ending(
                response(
                    residencies=[FAILED, RESIDENCY],
                    epoch="e",
                    snapshot=True,
                    snapshot_complete=True,
                ),
                response(residencies=[RESIDENCY], epoch="e"),
                response(residencies=[UNPINNED], removed=["residencies/f"], epoch="e"),
            ),
        )

    def test_each_change_that_shows_is_a_line(self, server: FakeServer) -> None:
        result = run(server, "watch")
        # Not the change between: what it changed is not on the line.
        begin, failed, resident, unpinned, removed = result.stdout.splitlines()
        assert begin == "-- as it is now --"
        assert failed.split(maxsplit=1)[1] == "f failed, trunca\N{REPLACEMENT CHARACTER}ted"
        assert resident.split(maxsplit=1)[1] == "m resident cpu 1MiB pinned"
        assert unpinned.split(maxsplit=1)[1] == "m resident cpu 1MiB"
        assert removed.split(maxsplit=1)[1] == "f removed"
        assert result.exit_code == 1 and result.stderr == "error: INTERNAL: over\n"

    def test_with_json_each_line_is_an_object(self, server: FakeServer) -> None:
        found = [json.loads(line) for line in run(server, "watch", "--json").stdout.splitlines()]
        assert [(line["kind"], line["model"]) for line in found] == [
            ("snapshot", "models/f"),
            ("snapshot", "models/m"),
            ("change", "models/m"),
            ("change", "models/m"),
            ("removed", "models/f"),
        ]
        assert found[1]["residency"]["charges"][0]["size_bytes"] == 2**20
        assert found[4]["residency"] is None


class TestEvents:
    @pytest.fixture(autouse=True)
    def events(self, server: FakeServer) -> None:
        server.answer(
            "WatchEvents",
            ending(
                admin_service_pb2.WatchEventsResponse(
                    events=[EVENT], epoch="e", revision=5, truncated=True
                ),
                admin_service_pb2.WatchEventsResponse(
                    events=[event_pb2.Event(type=event_pb2.EVENT_TYPE_PLAN_APPLIED)], epoch="e"
                ),
            ),
        )

    def test_each_event_is_a_line(self, server: FakeServer) -> None:
        missing, evicted, applied = run(server, "watch", "--events").stdout.splitlines()
        assert missing == "-- events are missing here --"
        assert evicted.split(maxsplit=1)[1] == (
            "evicted m 1MiB for n, waited 500.0ms, score 0.25, "
            "\N{REPLACEMENT CHARACTER}[31mfor n, by ops"
        )
        assert applied == "plan_applied"
        assert not server.requests[0].include_past

    def test_with_json_each_line_is_an_object(self, server: FakeServer) -> None:
        result = run(server, "watch", "--events", "--past", "--json")
        first, second = (json.loads(line) for line in result.stdout.splitlines())
        assert (first["truncated"], first["epoch"], second["truncated"]) == (True, "e", False)
        assert (first["event"]["revision"], first["event"]["type"]) == (5, "evicted")
        assert first["event"]["description"] == "\x1b[31mfor\nn"
        assert "\x1b" not in result.stdout
        assert server.requests[0].include_past

    def test_the_past_is_of_events(self, server: FakeServer) -> None:
        result = run(server, "watch", "--past")
        assert result.exit_code == 2 and "--past goes with --events" in result.stderr
        assert server.requests == []


class TestEnding:
    def test_no_server_is_exit_code_3(self) -> None:
        result = CliRunner().invoke(app, ["watch", "--server", "127.0.0.1:1"])
        assert result.exit_code == 3 and "cannot be reached" in result.stderr

    @pytest.mark.parametrize("arguments", [[], ["--events"]])
    def test_ctrl_c_ends_it_with_130_and_says_nothing(
        self, server: FakeServer, arguments: list[str]
    ) -> None:
        server.answer(
            "WatchResidencies",
            lasting(residency_service_pb2.WatchResidenciesResponse(residencies=[RESIDENCY])),
        )
        server.answer("WatchEvents", lasting(admin_service_pb2.WatchEventsResponse(events=[EVENT])))
        command = [
            *(sys.executable, "-c", INTERRUPTIBLE),
            *("watch", "--server", server.address, *arguments),
        ]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            assert "m" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
            assert process.stderr.read() == ""

    def test_a_reader_that_has_enough_ends_it(self, server: FakeServer) -> None:
        def endless(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            while context.is_active():
                yield admin_service_pb2.WatchEventsResponse(events=[EVENT], epoch="e")

        server.answer("WatchEvents", endless)
        with subprocess.Popen(
            [
                *(sys.executable, "-c", "from modelyard_server.cli.main import main; main()"),
                *("watch", "--events", "--server", server.address),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            assert "evicted" in process.stdout.readline()
            process.stdout.close()
            assert process.wait(20) == 1
            assert "Traceback" not in process.stderr.read()


class TestExplain:
    @pytest.fixture(autouse=True)
    def explanation(self, server: FakeServer) -> None:
        server.reply(
            "ExplainModel",
            residency_service_pb2.ExplainModelResponse(
                residency=RESIDENCY,
                events=[EVENT],
                summary="It is here\x1b because it is pinned.",
                truncated=True,
            ),
        )

    def test_the_reason_comes_before_the_history(self, server: FakeServer) -> None:
        result = run(server, "explain", "m")
        assert result.exit_code == 0 and "\x1b" not in result.output
        lines = [line for line in result.stdout.splitlines() if line.strip()]
        assert lines[0] == "It is here\N{REPLACEMENT CHARACTER} because it is pinned."
        assert "older events have been dropped" in lines
        assert lines[-1].split()[1:6] == ["evicted", "m", "n", "1MiB", "waited"]
        assert server.requests[0].model == "models/m"

    def test_json(self, server: FakeServer) -> None:
        answer = json.loads(run(server, "explain", "m", "--json").stdout)
        assert answer["residency"]["state"] == "resident" and answer["truncated"]
        assert answer["events"][0]["happened_at"] == "2023-11-14T22:13:20+00:00"

    def test_each_eviction_is_told_with_its_reason_and_its_price(self, server: FakeServer) -> None:
        left = event_pb2.Event(
            type=event_pb2.EVENT_TYPE_EVICTED,
            subject="models/m",
            cause="models/\x1bn",
            score=0.25,
            rule="gdsf",
            expected_load_duration=Duration(seconds=2),
            idle_duration=Duration(seconds=12),
            resident_duration=Duration(seconds=20),
        )
        paid = residency_service_pb2.Eviction(
            event=left,
            waited_request_count=3,
            longest_wait=Duration(seconds=4),
            waited_sum=Duration(seconds=7),
            reload_duration=Duration(seconds=3),
        )
        answer = residency_service_pb2.ExplainModelResponse(summary="S.", evictions=[paid])
        server.reply("ExplainModel", answer)
        why, cost = run(server, "explain", "m").stdout.splitlines()[1:]
        assert why == (
            "evicted because \N{REPLACEMENT CHARACTER}n needed the room; chosen by the rule gdsf, "
            "score 0.25; not asked for since 12.00s; loaded 20.00s before"
        )
        assert cost == (
            "  cost 3.00s: loaded again; 3 requests waited for it, the first 4.00s, all together "
            "7.00s; a load was expected to take 2.00s"
        )
        told = json.loads(run(server, "explain", "m", "--json").stdout)["evictions"]
        assert [(each["reload_s"], each["event"]["expected_load_s"]) for each in told] == [(3, 2)]

    @pytest.mark.parametrize(
        ("type", "cause", "rule", "words"),
        [
            ("EVICTED", "devices/cuda-1", "lru", "because cuda:1 held more than its budget"),
            ("DRAINED", "devices/cuda-1", "", "because cuda:1 was drained"),
            ("EVICTED", "operator", "", "by a call of an operator"),
            ("LOST", "", "", "with the process that held it, which died"),
        ],
    )
    def test_every_cause_is_said_in_words(
        self, server: FakeServer, type: str, cause: str, rule: str, words: str
    ) -> None:
        event = event_pb2.Event(
            type=event_pb2.EventType.Value(f"EVENT_TYPE_{type}"), cause=cause, rule=rule
        )
        eviction = residency_service_pb2.Eviction(event=event)
        answer = residency_service_pb2.ExplainModelResponse(summary="S.", evictions=[eviction])
        server.reply("ExplainModel", answer)
        why, cost = run(server, "explain", "m").stdout.splitlines()[1:]
        assert why.startswith(f"{type.lower()} {words}")
        assert cost == "  cost nothing so far: not loaded again"

    @pytest.mark.parametrize(
        ("eviction", "words"),
        [
            ({"reload_duration": Duration(seconds=3)}, "cost 3.00s: loaded again; nobody waited"),
            (
                {
                    "reload_duration": Duration(seconds=3),
                    "waited_request_count": 1,
                    "longest_wait": Duration(seconds=4),
                    "waited_sum": Duration(seconds=4),
                },
                "cost 3.00s: loaded again; 1 request waited 4.00s for it",
            ),
            (
                {
                    "reload_duration": Duration(seconds=3),
                    "reload_time": Timestamp(seconds=1_700_000_000),
                    "failed_load_count": 2,
                },
                "nobody waited for it; 2 loads failed or stopped",
            ),
            ({"failed_load_count": 1}, "not loaded again so far; a load failed or stopped"),
        ],
    )
    def test_every_cost_is_said_in_words(
        self, server: FakeServer, eviction: dict[str, Any], words: str
    ) -> None:
        answer = residency_service_pb2.ExplainModelResponse(
            summary="S.", evictions=[residency_service_pb2.Eviction(event=EVENT, **eviction)]
        )
        server.reply("ExplainModel", answer)
        assert words in run(server, "explain", "m").stdout.splitlines()[2]

    def test_people_are_told_of_the_last_evictions_and_programs_of_all(
        self, server: FakeServer
    ) -> None:
        many = [
            residency_service_pb2.Eviction(
                event=event_pb2.Event(type=event_pb2.EVENT_TYPE_EVICTED, cause=f"models/n{i}")
            )
            for i in range(13)
        ]
        answer = residency_service_pb2.ExplainModelResponse(summary="S.", evictions=many)
        server.reply("ExplainModel", answer)
        _, note, first, *_ = run(server, "explain", "m").stdout.splitlines()
        assert note == "it had to leave 3 times before that; --json tells of all"
        assert first == "evicted because n3 needed the room"
        told = json.loads(run(server, "explain", "m", "--json").stdout)["evictions"]
        assert len(told) == 13

    def test_a_model_that_is_gone_has_only_a_history(self, server: FakeServer) -> None:
        server.reply("ExplainModel", residency_service_pb2.ExplainModelResponse(summary="Deleted."))
        assert run(server, "explain", "m").stdout == "Deleted.\n"
