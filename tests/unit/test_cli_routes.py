"""`modelyard routes`, against a real server on loopback with made-up answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from tests.support.fake_api import FakeServer, refuse, serving
from typer.testing import CliRunner

from modelyard.v1 import route_pb2, route_service_pb2
from modelyard_server.cli.main import app

ROUTE = route_pb2.Route(
    name="routes/r",
    keys=[f"k{i}" for i in range(8)],
    model=route_pb2.ModelTarget(model="models/m"),
    etag='"1"',
    owner=route_pb2.ROUTE_OWNER_API,
    warnings=["\x1b[31mit is red"],
)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as fake:
        newer = route_pb2.Route(name="routes/new", keys=["x"])  # Of a kind that we do not know.
        fake.reply("ListRoutes", route_service_pb2.ListRoutesResponse(routes=[ROUTE, newer]))
        for rpc in ("GetRoute", "CreateRoute", "UpdateRoute"):
            fake.reply(rpc, getattr(route_service_pb2, f"{rpc}Response")(route=ROUTE))
        fake.reply("DeleteRoute", route_service_pb2.DeleteRouteResponse())
        yield fake


def run(server: FakeServer, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["routes", *arguments, "--server", server.address])


def lines(result: Any) -> list[list[str]]:
    """The words of each line of a table that went well."""
    assert result.exit_code == 0, result.output
    return [line.split() for line in result.stdout.splitlines() if line.strip()]


@pytest.mark.parametrize("arguments", [[], ["list"]])
def test_routes_are_listed_with_or_without_the_word(
    server: FakeServer, arguments: list[str]
) -> None:
    result = run(server, *arguments)
    table = lines(result)
    shown = ["k0,", "k1,", "k2,", "k3,", "k4,", "k5", "and", "2", "more", "m", "api"]
    assert any(line[:12] == ["r", *shown] for line in table), table
    assert ["new", "x", "unknown"] in table
    assert "\x1b" not in result.output


def test_a_route_is_shown_whole(server: FakeServer) -> None:
    table = lines(run(server, "show", "r"))
    assert ["keys", *(f"k{i}," for i in range(7)), "k7"] in table
    assert ["model", "m"] in table
    assert server.requests[0].name == "routes/r"
    told = json.loads(run(server, "show", "routes/r", "--json").stdout)
    assert (told["model"], told["owner"]) == ("models/m", "api")
    server.answer("GetRoute", refuse(grpc.StatusCode.NOT_FOUND, "ROUTE_NOT_FOUND"))
    result = run(server, "show", "x")
    assert result.exit_code == 1 and result.stderr.startswith("error: ROUTE_NOT_FOUND")


def test_keys_are_given_a_model(server: FakeServer) -> None:
    run(server, "add", "r", "k1", "acme/k2", "--model", "m", "--dry-run")
    (request,) = server.requests
    assert (request.route_id, list(request.route.keys)) == ("r", ["k1", "acme/k2"])
    assert request.route.model.model == "models/m"
    assert request.validate_only
    assert run(server, "add", "r", "--model", "m").exit_code == 2
    assert run(server, "add", "r", "k1").exit_code == 2


def test_a_change_says_what_became_of_the_keys(server: FakeServer) -> None:
    changes = [
        route_pb2.KeyChange(key="k1", previous_model="models/m", model="models/n"),
        route_pb2.KeyChange(key="k2", model="models/n"),
        route_pb2.KeyChange(key="k3", previous_model="models/m"),
    ]
    response = route_service_pb2.UpdateRouteResponse(route=ROUTE, changes=changes)
    server.reply("UpdateRoute", response)
    arguments = ["--model", "n", "--add-key", "k2", "--rm-key", "k3", "--etag", '"1"']
    result = run(server, "update", "r", *arguments)
    table = lines(result)
    for line in ("k1: m -> n", "k2: nothing -> n", "k3: m -> nothing"):
        assert line.split() in table
    (request,) = server.requests
    assert list(request.update_mask.paths) == ["model"]
    assert (list(request.add_keys), list(request.remove_keys)) == (["k2"], ["k3"])
    assert (request.route.name, request.route.etag) == ("routes/r", '"1"')
    told = json.loads(run(server, "update", "r", "--key", "k1", "--json").stdout)
    assert told["changes"][2] == {"key": "k3", "before": "models/m", "after": None}
    assert list(server.requests[1].route.keys) == ["k1"]


def test_a_change_of_nothing_or_of_both_ways_is_refused_here(server: FakeServer) -> None:
    assert run(server, "update", "r").exit_code == 2
    assert run(server, "update", "r", "--key", "a", "--add-key", "b").exit_code == 2
    assert not server.requests


def test_a_route_is_removed(server: FakeServer) -> None:
    assert run(server, "rm", "r", "--etag", '"1"').stdout == "removed r\n"
    (request,) = server.requests
    assert (request.name, request.etag) == ("routes/r", '"1"')
    assert json.loads(run(server, "rm", "r", "--json").stdout) == {"removed": "routes/r"}


def test_a_key_is_resolved(server: FakeServer) -> None:
    server.reply(
        "ResolveRoute",
        route_service_pb2.ResolveRouteResponse(
            route="routes/r",
            steps=[
                route_pb2.ResolvedStep(model="models/m", resident=True, device="devices/cuda-1")
            ],
            explanation="because",
        ),
    )
    result = run(server, "resolve", "k1")
    assert ["1", "m", "resident", "cuda:1"] in lines(result)
    assert "k1: because" in result.stdout
    told = json.loads(run(server, "resolve", "k1", "--json").stdout)
    assert told["steps"] == [{"model": "models/m", "resident": True, "device": "devices/cuda-1"}]
    server.answer("ResolveRoute", refuse(grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND"))
    assert run(server, "resolve", "zz").exit_code == 1
