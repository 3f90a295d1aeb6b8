"""Routes that are made, changed and removed while their keys are asked for, over a real channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import field_mask_pb2
from tests.support import faulty_models
from tests.support.config_text import ALLOWED, CPU, ROOTS, model_table
from tests.support.server import RunningApp, eventually, refusal_of, running_app

from modelyard import (
    Admin,
    AlreadyExists,
    Client,
    ConfigOwned,
    EtagMismatch,
    EventType,
    InvalidRequest,
    KeyChange,
    KeyNotFound,
    LoadFailed,
    ModelInUse,
    ModelNotFound,
    ModelOwner,
    Prediction,
    ResidencyState,
    ResolvedStep,
    RouteNotFound,
)
from modelyard.v1 import route_pb2, route_service_pb2, route_service_pb2_grpc
from modelyard_server.catalog.route import MOST_KEYS

X = np.ones(3, np.float32)
RESIDENT = ResidencyState.RESIDENT


def adder(name: str, factory: str = "Adding", **settings: object) -> str:
    options: dict[str, object] = {"factory": faulty_models.factory(factory)}
    if "gate" in settings:
        options["factory_options"] = {"gate": str(settings.pop("gate"))}
    return model_table(name, "torch", options=options, **settings)


def routes_table(route: str, keys: list[str], model: str) -> str:
    return f'\n[[routes]]\nid = "{route}"\nkeys = {keys!r}\nmodel = "{model}"\n'


def config_of(base: Path) -> str:
    """Models a (adds 1), b (adds 2) and own (adds 3, of the key acme/own)."""
    for value, name in enumerate(("a", "b", "own"), start=1):
        faulty_models.make_weights(base / "store" / name, value=float(value))
    config = CPU + ROOTS + ALLOWED + adder("a") + adder("b")
    return config + adder("own", keys=["acme/own"])


@pytest.fixture
async def yard(tmp_path: Path) -> AsyncIterator[RunningApp]:
    async with running_app(config_of(tmp_path), tmp_path) as made:
        yield made


async def told(yard: RunningApp, key: str) -> tuple[str, float]:
    """Which model answered for a key, as it says and as its answer shows."""
    prediction = await yard.client.predict(key, X)
    return prediction.served.model, float(np.asarray(prediction.only)[0]) - 1


A, B = ("models/a", 1.0), ("models/b", 2.0)

# --- What keys mean -------------------------------------------------------------------------------


async def test_every_key_of_a_route_means_its_model(yard: RunningApp) -> None:
    route = await yard.admin(Admin.create_route, "r", ["k1", "acme/k2"], model="a")
    assert (route.name, route.keys, route.model) == ("routes/r", ("k1", "acme/k2"), "models/a")
    assert route.owner is ModelOwner.API
    assert route.created_at == route.updated_at is not None
    assert not route.warnings
    assert [await told(yard, key) for key in ("k1", "acme/k2", "a")] == [A, A, A]
    # The name of a route is no key.
    assert isinstance(await refusal_of(yard.client.predict("r", X)), KeyNotFound)
    assert await yard.admin(Admin.get_route, "r") == route
    assert await yard.admin(Admin.list_routes) == (route,)


async def test_a_batch_of_routed_keys_keeps_its_order_and_an_unknown_one_fails_alone(
    yard: RunningApp,
) -> None:
    await yard.admin(Admin.create_route, "r", ["k1", "k2"], model="a")
    await yard.admin(Admin.create_route, "s", ["k3"], model="b")
    results = await yard.client.predict_batch(
        [(key, X) for key in ("k1", "zz", "k3", "k2", "acme/own")]
    )
    assert [
        result.served.model if isinstance(result, Prediction) else result.reason
        for result in results
    ] == ["models/a", "KEY_NOT_FOUND", "models/b", "models/a", "models/own"]


async def test_resolving_says_what_a_request_would_do_and_does_nothing(yard: RunningApp) -> None:
    await yard.admin(Admin.create_route, "r", ["k1"], model="a")
    resolution = await yard.client.resolve("k1")
    assert (resolution.key, resolution.route) == ("k1", "routes/r")
    assert resolution.steps == (ResolvedStep(model="models/a", resident=False, device=None),)
    assert "routes/r gives this key the model 'a'" in resolution.explanation
    assert (await yard.residency("a")).load_count == 0
    await yard.client.predict("k1", X)
    resolution = await yard.admin(Admin.resolve, "k1")
    assert resolution.steps == (
        ResolvedStep(model="models/a", resident=True, device="devices/cpu"),
    )
    assert "resident on devices/cpu" in resolution.explanation
    for key, words in (("own", "the id of"), ("acme/own", "one of the keys of")):
        resolution = await yard.client.resolve(key)
        assert resolution.route is None
        assert words in resolution.explanation
    assert isinstance(await refusal_of(yard.client.resolve("zz")), KeyNotFound)
    assert isinstance(await refusal_of(yard.client.resolve("..")), InvalidRequest)
    with pytest.raises(TypeError, match="must be a str"):
        await yard.client.resolve(1)  # type: ignore[arg-type]

    def by_the_blocking_client() -> str | None:
        with Client(yard.target) as client:
            return client.resolve("k1").route

    assert await asyncio.to_thread(by_the_blocking_client) == "routes/r"
    assert yard.app.residency.lease_count == 0


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (["k1"], "key 'k1' exists already, and means models/a by routes/r"),
        (["new", "acme/own"], "key 'acme/own' exists already, and means models/own"),
        (["b"], "key 'b' exists already, and means models/b"),
    ],
)
async def test_a_key_that_is_taken_is_refused_by_whom(
    yard: RunningApp, keys: list[str], text: str
) -> None:
    await yard.admin(Admin.create_route, "r", ["k1"], model="a")
    error = await refusal_of(yard.admin(Admin.create_route, "s", keys, model="a"))
    assert isinstance(error, AlreadyExists)
    assert text in str(error)
    assert await told(yard, "k1") == A
    assert isinstance(await refusal_of(yard.client.predict("new", X)), KeyNotFound)


async def test_a_routes_key_is_taken_for_models_too(yard: RunningApp) -> None:
    await yard.admin(Admin.create_route, "r", ["k1", "k2"], model="a")
    given: dict[str, Any] = {"runtime": "identity"}
    for name, keys in (("k1", []), ("new", ["k2"])):
        error = await refusal_of(yard.admin(Admin.create_model, name, keys=keys, **given))
        assert isinstance(error, AlreadyExists)
        assert "by routes/r" in str(error)
    await yard.admin(Admin.create_model, "new", **given)
    assert isinstance(
        await refusal_of(yard.admin(Admin.update_model, "new", keys=["k1"])), AlreadyExists
    )
    # Also for the very model that the route leads to.
    await yard.admin(Admin.create_route, "s", ["k3"], model="new")
    assert isinstance(
        await refusal_of(yard.admin(Admin.update_model, "new", keys=["k3"])), AlreadyExists
    )


async def test_what_cannot_be_a_route_is_refused_with_everything_at_once(yard: RunningApp) -> None:
    stub = route_service_pb2_grpc.RouteServiceStub(yard.channel)
    request = route_service_pb2.CreateRouteRequest(
        route_id="Up", route=route_pb2.Route(keys=["ok", "no way", ".."])
    )
    with pytest.raises(Exception, match="INVALID_ARGUMENT") as caught:
        await stub.CreateRoute(request)
    for field in ("route_id", "route.keys[1]", "route.keys[2]", "route.target"):
        assert field in str(caught.value)
    many = [f"k{i}" for i in range(MOST_KEYS + 1)]
    for keys, text in (([], "at least one"), (many, f"{MOST_KEYS} may be")):
        error = await refusal_of(yard.admin(Admin.create_route, "r", keys, model="a"))
        assert isinstance(error, InvalidRequest)
        assert text in str(error)
    error = await refusal_of(yard.admin(Admin.create_route, "r", ["k"], model="none"))
    assert isinstance(error, ModelNotFound)
    with pytest.raises(TypeError, match="keys must be a list of str, got a str"):
        await yard.admin(Admin.create_route, "r", "abc", model="a")
    assert await yard.admin(Admin.list_routes) == ()
    for call in (
        yard.admin(Admin.get_route, "r"),
        yard.admin(Admin.update_route, "r", model="a"),
        yard.admin(Admin.delete_route, "r"),
    ):
        assert isinstance(await refusal_of(call), RouteNotFound)


async def test_a_key_that_is_given_twice_counts_once_and_warns(yard: RunningApp) -> None:
    route = await yard.admin(Admin.create_route, "r", ["k1", "k1", "k2"], model="a")
    assert route.keys == ("k1", "k2")
    assert route.warnings == ("key k1 is given more than once for models/a: it counts once",)
    assert not (await yard.admin(Admin.get_route, "r")).warnings


async def test_a_model_that_routes_lead_to_is_not_deleted(yard: RunningApp) -> None:
    await yard.admin(Admin.create_model, "m", runtime="identity")
    await yard.admin(Admin.create_route, "r", ["k1"], model="m")
    error = await refusal_of(yard.admin(Admin.delete_model, "m"))
    assert isinstance(error, ModelInUse)
    assert "routes/r" in str(error)
    assert (await yard.client.predict("k1", X)).served.model == "models/m"
    await yard.admin(Admin.update_route, "r", model="a")
    await yard.admin(Admin.delete_model, "m")
    assert await told(yard, "k1") == A


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "must name at least one field"),
        (
            {"update_mask": {"paths": ["etag"]}},
            "'etag' cannot be changed; keys, prefixes, model, split, sequence, ensemble, shadow, "
            "fallback, versions, versions.current, versions.canary can",
        ),
        ({"update_mask": {"paths": ["keys"]}, "add_keys": ["x"]}, "replaces them all"),
        ({"add_keys": ["x"], "remove_keys": ["x"]}, "'x' is to be added and removed"),
        ({"remove_keys": ["zz"]}, "'zz' is no key of routes/r"),
        ({"remove_keys": ["k1", "k2"]}, "at least one is needed"),
        ({"update_mask": {"paths": ["model"]}}, "a model is needed"),
        ({"add_keys": ["no way"]}, "must match"),
    ],
)
async def test_an_update_that_says_nothing_of_use_is_refused(
    yard: RunningApp, change: dict[str, Any], text: str
) -> None:
    await yard.admin(Admin.create_route, "r", ["k1", "k2"], model="a")
    stub = route_service_pb2_grpc.RouteServiceStub(yard.channel)
    if "update_mask" in change:
        change = change | {"update_mask": field_mask_pb2.FieldMask(**change["update_mask"])}
    request = route_service_pb2.UpdateRouteRequest(route=route_pb2.Route(name="routes/r"), **change)
    with pytest.raises(Exception, match="INVALID_ARGUMENT") as caught:
        await stub.UpdateRoute(request)
    assert text in str(caught.value)
    assert await told(yard, "k2") == A


# --- What is changed ------------------------------------------------------------------------------


async def test_keys_are_pointed_added_and_taken_away_in_one_step(yard: RunningApp) -> None:
    created = await yard.admin(Admin.create_route, "r", ["k1", "k2"], model="a")
    await yard.client.predict("k1", X)
    updated = await yard.admin(
        Admin.update_route, "r", model="b", add_keys=["k3", "k2"], remove_keys=["k1"]
    )
    assert updated.changes == (
        KeyChange(key="k2", before="models/a", after="models/b"),
        KeyChange(key="k3", before=None, after="models/b"),
        KeyChange(key="k1", before="models/a", after=None),
    )
    assert (updated.route.keys, updated.route.model) == (("k2", "k3"), "models/b")
    assert updated.route.etag != created.etag
    assert updated.route.created_at == created.created_at
    assert [await told(yard, key) for key in ("k2", "k3", "a")] == [B, B, A]
    assert isinstance(await refusal_of(yard.client.predict("k1", X)), KeyNotFound)
    replaced = await yard.admin(Admin.update_route, "r", keys=["k9", "k3"])
    assert replaced.route.keys == ("k9", "k3")
    assert replaced.changes == (
        KeyChange(key="k9", before=None, after="models/b"),
        KeyChange(key="k2", before="models/b", after=None),
    )
    await yard.admin(Admin.delete_route, "r")
    assert await yard.admin(Admin.list_routes) == ()
    for key in ("k9", "k3"):
        assert isinstance(await refusal_of(yard.client.predict(key, X)), KeyNotFound)
    # They are free again.
    await yard.admin(Admin.create_model, "k9", runtime="identity")


async def test_keys_are_pointed_to_a_model_that_is_there_already(yard: RunningApp) -> None:
    await yard.admin(Admin.create_route, "r", ["k1"], model="a")
    await yard.client.predict("k1", X)
    assert (await yard.residency("b")).load_count == 0
    await yard.admin(Admin.update_route, "r", model="b")
    assert (await yard.residency("b")).state is RESIDENT
    prediction = await yard.client.predict("k1", X)
    assert (prediction.served.model, prediction.served.cold) == ("models/b", False)


async def test_nothing_is_loaded_for_keys_whose_model_is_not_there(yard: RunningApp) -> None:
    await yard.admin(Admin.create_route, "r", ["k1"], model="a")
    await yard.admin(Admin.update_route, "r", model="b")
    assert (await yard.residency("b")).load_count == 0


async def test_a_model_that_cannot_be_loaded_leaves_the_keys_as_they_were(
    yard: RunningApp, tmp_path: Path
) -> None:
    await yard.admin(Admin.create_route, "r", ["k1"], model="a")
    before = await yard.admin(Admin.get_route, "r")
    await yard.client.predict("k1", X)
    (tmp_path / "store" / "b" / "model.safetensors").unlink()
    error = await refusal_of(yard.admin(Admin.update_route, "r", model="b", add_keys=["k2"]))
    assert isinstance(error, LoadFailed)
    assert "models/b, for routes/r" in str(error)
    assert await yard.admin(Admin.get_route, "r") == before
    assert await told(yard, "k1") == A
    assert isinstance(await refusal_of(yard.client.predict("k2", X)), KeyNotFound)
    # To somebody who insists on it: from a model that is not there it needs no load.
    await yard.admin(Admin.unload, "a")
    await yard.admin(Admin.update_route, "r", model="b")
    assert isinstance(await refusal_of(yard.client.predict("k1", X)), LoadFailed)


async def test_requests_flow_while_keys_are_pointed_to_and_fro(yard: RunningApp) -> None:
    await yard.admin(Admin.create_route, "r", ["k1", "k2"], model="a")
    over = asyncio.Event()
    answers: list[tuple[str, float]] = []

    async def ask(key: str) -> None:
        while not over.is_set():
            answers.append(await told(yard, key))
            for result in await yard.client.predict_batch([(key, X)] * 5):
                assert isinstance(result, Prediction), result
                answers.append((result.served.model, float(np.asarray(result.only)[0]) - 1))

    def more_than(count: int) -> bool:
        return len(answers) > count

    async with asyncio.TaskGroup() as tasks:
        for key in ("k1", "k2", "k1"):
            tasks.create_task(ask(key))
        for model in ("b", "a") * 10:
            await yard.admin(Admin.update_route, "r", model=model)
            enough = len(answers) + 10
            await eventually("some are answered", partial(more_than, enough))
        over.set()
    # Whoever says that it answered has answered.
    assert set(answers) == {A, B}


async def test_a_batch_says_who_answered_if_keys_are_pointed_elsewhere_meanwhile(
    tmp_path: Path,
) -> None:
    """Items of one call that have not begun take the key's new meaning, and say so."""
    config = config_of(tmp_path)
    faulty_models.make_weights(tmp_path / "store" / "slow", value=7.0)
    config += adder("slow", "StuckInLoad", gate=tmp_path / "gate")
    async with running_app(config, tmp_path) as yard:
        await yard.admin(Admin.create_route, "r", ["k1"], model="slow")
        with faulty_models.closed_gate(tmp_path / "gate") as gate:
            batch = asyncio.create_task(yard.client.predict_batch([("k1", X)] * 300))
            await eventually("it waits for the load", gate.is_waited_at)
            await yard.admin(Admin.update_route, "r", model="a")
            gate.open()
            results = await batch
        seen = set()
        for result in results:
            assert isinstance(result, Prediction), result
            seen.add((result.served.model, float(np.asarray(result.only)[0]) - 1))
        assert seen <= {A, ("models/slow", 7.0)}
        assert ("models/slow", 7.0) in seen


async def test_updating_a_model_keeps_the_keys_that_routes_give_it(yard: RunningApp) -> None:
    given: dict[str, Any] = {"runtime": "torch", "root": "store", "folder": "a"}
    options = {"factory": faulty_models.factory("Adding")}
    await yard.admin(Admin.create_model, "m", options=options, **given)
    await yard.admin(Admin.create_route, "r", ["k1"], model="m")
    assert await told(yard, "k1") == ("models/m", 1.0)
    await yard.admin(Admin.update_model, "m", root="store", folder="b")
    assert await told(yard, "k1") == ("models/m", 2.0)
    await yard.admin(Admin.update_model, "m", keys=["other"])
    assert await told(yard, "k1") == ("models/m", 2.0)


async def test_etags_and_request_ids_are_heeded(yard: RunningApp) -> None:
    created = await yard.admin(Admin.create_route, "r", ["k1"], model="a", request_id="first")
    again = await yard.admin(Admin.create_route, "r", ["k1"], model="a", request_id="first")
    assert again == created
    error = await refusal_of(
        yard.admin(Admin.create_route, "s", ["k2"], model="a", request_id="first")
    )
    assert isinstance(error, InvalidRequest)
    updated = await yard.admin(
        Admin.update_route, "r", model="b", etag=created.etag, request_id="second"
    )
    assert (
        await yard.admin(Admin.update_route, "r", model="b", etag=created.etag, request_id="second")
        == updated
    )
    for call in (
        yard.admin(Admin.update_route, "r", model="a", etag=created.etag),
        yard.admin(Admin.delete_route, "r", etag=created.etag),
    ):
        assert isinstance(await refusal_of(call), EtagMismatch)
    assert await told(yard, "k1") == B
    await yard.admin(Admin.delete_route, "r", etag=updated.route.etag)


async def test_only_validating_changes_nothing(yard: RunningApp) -> None:
    made = await yard.admin(Admin.create_route, "r", ["k1"], model="a", validate_only=True)
    assert made.keys == ("k1",)
    assert await yard.admin(Admin.list_routes) == ()
    before = await yard.admin(Admin.create_route, "r", ["k1"], model="a")
    await yard.client.predict("k1", X)
    updated = await yard.admin(Admin.update_route, "r", model="b", validate_only=True)
    assert [change.after for change in updated.changes] == ["models/b"]
    assert await yard.admin(Admin.get_route, "r") == before
    assert (await yard.residency("b")).load_count == 0
    assert await told(yard, "k1") == A


async def test_changes_are_told_as_events(yard: RunningApp) -> None:
    await yard.admin(Admin.create_route, "r", ["k1"], model="a")
    await yard.admin(Admin.update_route, "r", model="b")
    await yard.admin(Admin.delete_route, "r")

    def events(admin: Admin) -> list[tuple[EventType, str, str]]:
        with admin.watch_events(include_past=True) as watch:
            return [(e.type, e.subject, e.description) for e in islice(watch, 3)]

    told_events = await yard.admin(events)
    assert [kind for kind, _, _ in told_events] == [
        EventType.ROUTE_CREATED,
        EventType.ROUTE_UPDATED,
        EventType.ROUTE_DELETED,
    ]
    assert {subject for _, subject, _ in told_events} == {"routes/r"}
    assert told_events[1][2] == "k1 (1 key) means models/b"


# --- Pages, the file, restarts --------------------------------------------------------------------


async def test_routes_are_listed_in_pages(yard: RunningApp) -> None:
    for i in range(5):
        await yard.admin(Admin.create_route, f"r{i}", [f"k{i}"], model="a")
    stub = route_service_pb2_grpc.RouteServiceStub(yard.channel)
    names, token = [], ""
    while True:
        response = await stub.ListRoutes(
            route_service_pb2.ListRoutesRequest(page_size=2, page_token=token)
        )
        assert len(response.routes) <= 2
        names += [route.name for route in response.routes]
        token = response.next_page_token
        if not token:
            break
    assert names == [f"routes/r{i}" for i in range(5)]


async def test_routes_of_the_file_belong_to_it(tmp_path: Path) -> None:
    config = config_of(tmp_path) + routes_table("r", ["k1", "k1", "k2"], "a")
    async with running_app(config, tmp_path) as yard:
        (route,) = await yard.admin(Admin.list_routes)
        assert (route.keys, route.owner) == (("k1", "k2"), ModelOwner.CONFIG)
        assert await told(yard, "k2") == A
        for call in (
            yard.admin(Admin.update_route, "r", model="b"),
            yard.admin(Admin.delete_route, "r"),
        ):
            error = await refusal_of(call)
            assert isinstance(error, ConfigOwned)
            assert "change it there" in str(error)


async def test_routes_outlive_the_server(tmp_path: Path) -> None:
    config = '[catalog]\nfile = "catalog.db"\n' + config_of(tmp_path)
    of_file = routes_table("filed", ["f1"], "a")
    async with running_app(config + of_file, tmp_path) as yard:
        await yard.admin(Admin.create_route, "r", ["k1", "k2"], model="a")
        await yard.admin(Admin.create_model, "m", runtime="identity")
        await yard.admin(Admin.create_route, "s", ["k3"], model="m")
        updated = await yard.admin(Admin.update_route, "r", model="b", remove_keys=["k1"])
        await yard.admin(Admin.create_route, "gone", ["k4"], model="a")
        await yard.admin(Admin.delete_route, "gone")
        filed = await yard.admin(Admin.get_route, "filed")
    async with running_app(config + of_file, tmp_path) as yard:
        assert await yard.admin(Admin.get_route, "r") == updated.route
        assert await yard.admin(Admin.get_route, "filed") == filed
        assert [route.id for route in await yard.admin(Admin.list_routes)] == ["filed", "r", "s"]
        assert [await told(yard, key) for key in ("f1", "k2")] == [A, B]
        assert (await yard.client.predict("k3", X)).served.model == "models/m"
        for key in ("k1", "k4"):
            assert isinstance(await refusal_of(yard.client.predict(key, X)), KeyNotFound)
    # The file says something else now: it was the last to speak.
    async with running_app(config + routes_table("filed", ["f2"], "b"), tmp_path) as yard:
        changed = await yard.admin(Admin.get_route, "filed")
        assert (changed.keys, changed.created_at) == (("f2",), filed.created_at)
        assert changed.etag != filed.etag
        assert await told(yard, "f2") == B
        assert isinstance(await refusal_of(yard.client.predict("f1", X)), KeyNotFound)
    async with running_app(config, tmp_path) as yard:
        assert [route.id for route in await yard.admin(Admin.list_routes)] == ["r", "s"]


async def test_a_route_whose_model_has_left_the_file_waits_for_it(tmp_path: Path) -> None:
    store = '[catalog]\nfile = "catalog.db"\n'
    config = config_of(tmp_path)
    async with running_app(store + config, tmp_path) as yard:
        await yard.admin(Admin.create_route, "r", ["k1"], model="own")
    without = config[: config.index("[models.own]")]
    async with running_app(store + without, tmp_path) as yard:
        (route,) = await yard.admin(Admin.list_routes)
        assert route.warnings == ("there is no model 'own': its keys mean nothing",)
        assert isinstance(await refusal_of(yard.client.predict("k1", X)), KeyNotFound)
        error = await refusal_of(yard.client.resolve("k1"))
        assert "routes/r gives it 'own', which there is not" in str(error)
        # Its keys stay its own, and come to life with the model.
        error = await refusal_of(yard.admin(Admin.create_route, "s", ["k1"], model="a"))
        assert isinstance(error, AlreadyExists)
        await yard.admin(Admin.create_model, "own", runtime="identity")
        assert (await yard.client.predict("k1", X)).served.model == "models/own"
    async with running_app(store + without, tmp_path) as yard:
        await yard.admin(Admin.update_route, "r", model="a")
        assert await told(yard, "k1") == A


async def test_a_route_of_the_file_and_one_of_the_api_cannot_have_one_name(tmp_path: Path) -> None:
    config = '[catalog]\nfile = "catalog.db"\n' + config_of(tmp_path)
    async with running_app(config, tmp_path) as yard:
        await yard.admin(Admin.create_route, "r", ["k1"], model="a")
    for table, text in (
        (routes_table("r", ["k2"], "a"), "routes.r: the catalog holds a route of this name"),
        (routes_table("s", ["k1"], "a"), "routes.r: key 'k1' exists already"),
    ):
        with pytest.raises(Exception, match=text):
            async with running_app(config + table, tmp_path):
                raise AssertionError("it serves")
