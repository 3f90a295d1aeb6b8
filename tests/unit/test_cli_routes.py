"""`modelyard routes`, against a real server on loopback with made-up answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
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


def test_a_split_is_given_by_weights_and_shown_by_shares(server: FakeServer) -> None:
    split = route_pb2.Route(name="routes/s", prefixes=["", "acme/"])
    for name, target, weight in (("m", "models/m", 90), ("r", "routes/r", 10)):
        split.split.branches.add(name=name, target=target, weight=weight)
    split.split.salt = "x"
    server.reply("CreateRoute", route_service_pb2.CreateRouteResponse(route=split))
    arguments = ["create", "s", "--prefix", "", "--prefix", "acme/", "--split", "m=90,routes/r=10"]
    table = lines(run(server, *arguments))
    (request,) = server.requests
    assert list(request.route.prefixes) == ["", "acme/"]
    assert list(request.route.split.branches) == list(split.split.branches)
    for line in ("prefixes *, acme/*", "kind split", "salt x", "m m 90 %", "r routes/r 10 %"):
        assert line.split() in table, table
    told = json.loads(run(server, *arguments, "--json").stdout)
    assert told["target"]["split"]["branches"][1] == {
        "name": "r",
        "target": "routes/r",
        "weight": 10,
    }
    assert (told["model"], told["prefixes"]) == (None, ["", "acme/"])
    server.reply("ListRoutes", route_service_pb2.ListRoutesResponse(routes=[split]))
    assert ["s", "*,", "acme/*", "split:", "m,", "routes/r", "unknown"] in lines(
        run(server, "list")
    )


def test_versions_are_given_changed_promoted_and_their_trial_ended(server: FakeServer) -> None:
    versions = route_pb2.Route(name="routes/v", keys=["k"])
    for name in ("v1", "v2"):
        versions.versions.versions.add(name=name, target=f"models/{name}")
    versions.versions.current = "v1"
    versions.versions.aliases["next"] = "v2"
    versions.versions.canary.version, versions.versions.canary.percent = "next", 5
    for rpc in ("CreateRoute", "UpdateRoute", "PromoteCanary", "AbortCanary"):
        server.reply(rpc, getattr(route_service_pb2, f"{rpc}Response")(route=versions))
    table = lines(run(server, "create", "v", "k", "--versions", "v1=a,v2=b", "--current", "v2"))
    assert ["v1", "v1", "current"] in table and ["v2", "v2", "next,", "canary", "5", "%"] in table
    given = server.requests[0].route.versions
    assert [(each.name, each.target) for each in given.versions] == [
        ("v1", "models/a"),
        ("v2", "models/b"),
    ]
    assert given.current == "v2"
    run(server, "create", "v", "k", "--versions", "v1=a,v2=b")
    assert server.requests[1].route.versions.current == "v1"
    run(server, "update", "v", "--current", "v2", "--canary", "v1=2.5")
    update = server.requests[2]
    assert list(update.update_mask.paths) == ["versions.current", "versions.canary"]
    assert (update.route.versions.current, update.route.versions.canary.percent) == ("v2", 2.5)
    assert lines(run(server, "promote", "v", "--etag", '"1"'))
    assert lines(run(server, "abort", "routes/v"))
    assert [(each.name, each.etag) for each in server.requests[3:]] == [
        ("routes/v", '"1"'),
        ("routes/v", ""),
    ]


TARGETS: dict[str, dict[str, Any]] = {
    "model": {"model": "models/m"},
    "split": {"split": {"branches": [{"name": "a", "target": "models/m", "weight": 1}]}},
    "sequence": {
        "sequence": {
            "steps": [
                {"target": "models/m", "name": "x", "rename": {"": "text"}},
                {"transform": {"name": "top_k", "parameters": {"k": 3, "deep": [{"a": None}]}}},
            ]
        }
    },
    "ensemble": {
        "ensemble": {
            "members": [{"name": "a", "target": "models/m", "weight": 0.5}],
            "combine": "vote",
        }
    },
    "shadow": {"shadow": {"target": "routes/r", "shadow": "models/m", "sample": 0.5}},
    "fallback": {"fallback": {"targets": ["models/m", "routes/r"], "prefer_warm": True}},
    "versions": {
        "versions": {
            "versions": [{"name": "v1", "target": "models/m"}],
            "current": "v1",
            "aliases": {"stable": "v1"},
            "canary": {"version": "v1", "percent": 5},
        }
    },
}


@pytest.mark.parametrize("kind", TARGETS)
def test_every_kind_is_read_from_a_file_sent_and_shown(
    server: FakeServer, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "target.JSON"
    path.write_text(json.dumps(TARGETS[kind]))

    def echo(request: Any, context: Any) -> Any:
        return route_service_pb2.CreateRouteResponse(route=request.route)

    server.answer("CreateRoute", echo)
    result = run(server, "create", "r", "k", "--file", str(path), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["target"] == TARGETS[kind]
    assert server.requests[0].route.WhichOneof("target") == kind
    table = lines(run(server, "create", "r", "k", "--file", str(path)))
    assert ["model", "m"] in table or ["kind", kind] in table
    server.reply(
        "ListRoutes", route_service_pb2.ListRoutesResponse(routes=[server.requests[0].route])
    )
    (row,) = lines(run(server, "list"))[2:]
    assert "m" in [word.rstrip(",") for word in row]


def test_a_file_that_holds_no_target_is_refused_with_all_that_is_wrong(
    server: FakeServer, tmp_path: Path
) -> None:
    path = tmp_path / "target.toml"
    path.write_text('[split]\nbranches = [{name = 1, weight = "x"}]\n')
    result = run(server, "create", "r", "k", "--file", str(path))
    assert result.exit_code == 2
    for text in ("branches[0].target: is missing", "branches[0].name: must", "[0].weight: must"):
        assert text in result.stderr
    for content in (b"[split", b"\xff", b"{}"):
        path.write_bytes(content)
        assert run(server, "create", "r", "k", "--file", str(path)).exit_code == 2
    assert run(server, "create", "r", "k", "--file", str(tmp_path / "no.toml")).exit_code == 2
    assert not server.requests


@pytest.mark.parametrize(
    "arguments",
    [
        ["create", "r", "k"],
        ["create", "r", "--split", "a=1,b=1"],
        ["create", "r", "k", "--split", "a=1", "--model", "m"],
        ["create", "r", "k", "--split", "a"],
        ["create", "r", "k", "--split", "a=x,b=1"],
        ["create", "r", "k", "--split", "a=1,a=2"],
        ["create", "r", "k", "--versions", "v1"],
        ["create", "r", "k", "--model", "m", "--current", "v1"],
        ["update", "r", "--canary", "v1"],
        ["update", "r", "--canary", "v1=1,v2=2"],
        ["update", "r", "--canary", "v1=x"],
        ["update", "r", "--prefix", "a", "--no-prefixes"],
        ["update", "r", "--model", "m", "--current", "v1"],
    ],
)
def test_options_that_do_not_go_together_are_refused_here(
    server: FakeServer, arguments: list[str]
) -> None:
    assert run(server, *arguments).exit_code == 2
    assert not server.requests


def test_prefixes_are_replaced_and_taken_away(server: FakeServer) -> None:
    for arguments in (["--prefix", "a", "--prefix", ""], ["--no-prefixes"]):
        assert run(server, "update", "r", *arguments).exit_code == 0
    first, second = server.requests
    assert list(first.update_mask.paths) == list(second.update_mask.paths) == ["prefixes"]
    assert (list(first.route.prefixes), list(second.route.prefixes)) == (["a", ""], [])


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
    assert told["steps"] == [
        {
            "model": "models/m",
            "resident": True,
            "device": "devices/cuda-1",
            "branch": "",
            "transform": None,
            "conditional": False,
            "version": None,
        }
    ]
    server.answer("ResolveRoute", refuse(grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND"))
    assert run(server, "resolve", "zz").exit_code == 1


def test_a_key_of_a_route_is_resolved_by_affinity_and_version(server: FakeServer) -> None:
    steps = [
        route_pb2.ResolvedStep(model="models/m", branch="b/x", conditional=True, version="v2"),
        route_pb2.ResolvedStep(transform="top_k", branch="b/1"),
    ]
    server.reply("ResolveRoute", route_service_pb2.ResolveRouteResponse(steps=steps))
    table = lines(run(server, "resolve", "k", "--affinity", "user 7", "--version", "v2"))
    assert ["1", "m", "b/x", "v2", "perhaps"] in table
    assert ["2", "(top_k)", "b/1"] in table
    (request,) = server.requests
    assert (request.key, request.affinity, request.version) == ("k", "user 7", "v2")
