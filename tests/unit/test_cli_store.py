"""`modelyard store`, against a real server on loopback with made-up answers."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from tests.support.fake_api import FakeServer, serving
from typer.testing import CliRunner, Result

from modelyard.v1 import admin_service_pb2
from modelyard_server.cli.main import app

STORE = admin_service_pb2.StoreFigures(
    stored_bytes=2**30,
    model_count=5,
    unused_bytes=2**20,
    unused_count=2,
    due_time=Timestamp(seconds=1_800_000_000),
    freed_bytes=2**21,
    freed_count=3,
)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as running:
        running.reply(
            "CollectStore",
            admin_service_pb2.CollectStoreResponse(freed_bytes=2**22, freed_count=1, store=STORE),
        )
        yield running


def run(server: FakeServer, *arguments: str) -> Result:
    environment = {"MODELYARD_SERVER": server.address, "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["store", *arguments], env=environment)


def test_the_store_is_looked_at_and_nothing_is_removed(server: FakeServer) -> None:
    result = run(server)
    assert result.exit_code == 0
    assert "1GiB in 5 models" in result.stdout
    assert "1MiB in 2 models" in result.stdout
    assert "2MiB in 3 models" in result.stdout
    assert "2027-01-1" in result.stdout
    assert [request.validate_only for request in server.requests] == [True]
    told = json.loads(run(server, "--json").stdout)
    assert (told["stored_bytes"], told["unused_count"]) == (2**30, 2)


def test_what_came_back_is_told(server: FakeServer) -> None:
    assert run(server, "collect").stdout.startswith("4MiB came back, of 1 models\n")
    dry = run(server, "collect", "--dry-run", "--keep", "1.5")
    assert dry.stdout.startswith("4MiB would come back, of 1 models\n")
    told = json.loads(run(server, "collect", "--json", "--keep", "0").stdout)
    assert (told["freed_bytes"], told["store"]["freed_count"]) == (2**22, 3)
    first, second, third = server.requests
    assert not first.HasField("keep_duration") and not first.validate_only
    assert second.validate_only
    assert second.keep_duration.ToMilliseconds() == 1_500
    assert third.HasField("keep_duration") and not third.keep_duration.ToMilliseconds()


def test_a_store_that_gives_nothing_back_is_a_failure(server: FakeServer) -> None:
    store = admin_service_pb2.StoreFigures(obstacle="an older server")
    server.reply("CollectStore", admin_service_pb2.CollectStoreResponse(store=store))
    result = run(server, "collect")
    assert result.exit_code == 1
    assert "an older server" in result.stdout and "came back" not in result.stdout
    assert run(server).exit_code == 0


def test_a_server_without_a_store_says_so(server: FakeServer) -> None:
    server.reply("CollectStore", admin_service_pb2.CollectStoreResponse())
    for arguments in ([], ["collect"]):
        result = run(server, *arguments)
        assert result.exit_code == 0
        assert "no weight store" in result.stdout


def test_arguments_of_no_use_are_refused(server: FakeServer) -> None:
    assert run(server, "collect", "--keep", "-1").exit_code == 2
    assert server.requests == []
