"""Models by id and by key, and what a key means."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import Model, ModelDraft, is_key, is_model_id
from modelyard_server.catalog.records import Owner
from modelyard_server.catalog.route import Route, RouteDraft, RouteTarget
from modelyard_server.devices.placed import whole
from modelyard_server.errors import Reason, Refusal, Resource
from modelyard_server.residency.values import ModelHandle
from modelyard_server.routing.key_table import KeyChange
from modelyard_server.routing.resolve import resolve
from modelyard_server.routing.targets import (
    Fallback,
    Link,
    One,
    Target,
    links_of,
    single_model,
)
from modelyard_server.runtimes.api import ModelSpec, Price


def model_of(model_id: str, *keys: str) -> Model:
    spec = ModelSpec(name=model_id, runtime="fake")
    ways = (whole(0, Price(resting_bytes=1, peak_bytes=1)),)
    return Model(
        draft=ModelDraft(id=model_id, keys=keys, runtime="fake", options={}),
        owner=Owner.API,
        ways=ways,
        replan=lambda price: ways,
        handle=ModelHandle(
            name=model_id,
            core_id=1,
            spec=spec,
            ways=ways,
            replan=lambda price: ways,
            priced_bytes=1,
        ),
        created=datetime(2026, 1, 1, tzinfo=UTC),
        etag='"1"',
    )


def test_a_model_goes_by_its_id_and_its_keys_until_it_is_removed() -> None:
    catalog = Catalog()
    keys = catalog.keys
    model = model_of("m", "a/b", "m:v2")
    catalog.add(model)
    assert catalog.get("m") is model
    assert dict(keys) == {"m": model, "a/b": model, "m:v2": model}
    for key in keys:
        assert resolve(keys, catalog, key) is model
    catalog.remove(model)
    assert not keys
    assert catalog.models() == []
    catalog.add(model_of("m", "a/b"))


def route_of(
    route_id: str,
    model: str,
    *keys: str,
    target: Target | None = None,
    prefixes: tuple[str, ...] = (),
) -> Route:
    time = datetime(2026, 1, 1, tzinfo=UTC)
    return Route(
        id=route_id,
        keys=keys,
        target=target or One(model),
        prefixes=prefixes,
        owner=Owner.API,
        created=time,
        updated=time,
        etag='"1"',
    )


def test_routes_are_added_together_or_not_at_all() -> None:
    catalog = Catalog()
    model = model_of("m", "own")
    catalog.add(model)
    good = route_of("r", "m", "k1", "k2")
    for bad, text in (
        (route_of("s", "m", "k3", "k2"), "routes.s: key 'k2' .* means models/m by routes/r"),
        (route_of("r", "m", "k3"), "routes.r: route 'r' exists already"),
        (route_of("s", "m", "own"), "routes.s: key 'own' exists already, and means models/m"),
    ):
        with pytest.raises(Refusal, match=text):
            catalog.add_routes(good, bad)
        assert catalog.routes() == []
        assert dict(catalog.keys) == {"m": model, "own": model}
    catalog.add_routes(good, route_of("s", "later", "k3"))
    assert dict(catalog.keys) == dict.fromkeys(("m", "own", "k1", "k2"), model)
    later = model_of("later")
    catalog.add(later)
    assert catalog.keys["k3"] is later
    catalog.remove(later)
    assert "k3" not in catalog.keys
    assert catalog.route_of("k3") == route_of("s", "later", "k3")


MODELS = ("a", "b", "c")
KEYS = tuple("pqrs")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["route", "drop route", "model", "drop model"]),
            st.sampled_from(MODELS),
            st.sampled_from(["r1", "r2"]),
            st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True),
        ),
        max_size=20,
    )
)
def test_whatever_is_changed_a_key_means_what_models_and_routes_say(
    steps: list[tuple[str, str, str, list[str]]],
) -> None:
    catalog = Catalog()
    models: dict[str, Model] = {}
    routes: dict[str, Route] = {}
    for what, model_id, route_id, keys in steps:
        try:
            match what:
                case "route" if route_id in routes:
                    new = route_of(route_id, model_id, *keys)
                    catalog.replace_route(routes[route_id], new)
                    routes[route_id] = new
                case "route":
                    catalog.add_routes(route_of(route_id, model_id, *keys))
                    routes[route_id] = route_of(route_id, model_id, *keys)
                case "drop route" if route_id in routes:
                    catalog.remove_route(routes.pop(route_id))
                case "model" if model_id in models:
                    model = model_of(model_id, *keys)
                    catalog.replace(models[model_id], model)
                    models[model_id] = model
                case "model":
                    model = model_of(model_id, *keys)
                    catalog.add(model)
                    models[model_id] = model
                case "drop model" if model_id in models:
                    catalog.remove(models.pop(model_id))
        except Refusal as refusal:
            assert refusal.reason is Reason.ALREADY_EXISTS
        wanted = {key: model for model in models.values() for key in (model.id, *model.draft.keys)}
        for route in routes.values():
            for key in route.keys:
                assert key not in wanted
                assert catalog.route_of(key) == route
                meant = single_model(route.target)
                if meant is not None and meant in models:
                    wanted[key] = models[meant]
        assert dict(catalog.keys) == wanted
        assert all(catalog.keys[key] is model for key, model in wanted.items())


TARGETS: tuple[Target, ...] = (
    One("a"),
    One("b"),
    Fallback((Link("models", "a"), Link("models", "b"))),
    Fallback((Link("models", "a"), Link("routes", "r2"))),
)
NAMES = st.text("pq", max_size=3)


def meaning(
    models: Mapping[str, Model], routes: Mapping[str, Route], key: str
) -> Model | Route | None:
    """What a key means, by looking at everything."""
    own = [model for model in models.values() if key in (model.id, *model.draft.keys)]
    exact = [route for route in routes.values() if key in route.keys]
    by_prefix = [
        (len(prefix), route)
        for route in routes.values()
        for prefix in route.prefixes
        if key.startswith(prefix)
    ]
    assert len(own) + len(exact) <= 1
    if own:
        return own[0]
    if exact:
        model_id = single_model(exact[0].target)
        return exact[0] if model_id is None else models.get(model_id, exact[0])
    return max(by_prefix, key=lambda found: found[0])[1] if by_prefix else None


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["route", "routes", "drop route", "model", "drop model"]),
            st.sampled_from(["r1", "r2", "r3"]),
            st.sampled_from(TARGETS),
            st.lists(NAMES.filter(bool), max_size=3, unique=True),
            st.lists(NAMES, max_size=3, unique=True),
        ),
        max_size=15,
    )
)
def test_every_key_means_what_a_look_at_everything_says(
    steps: list[tuple[str, str, Target, list[str], list[str]]],
) -> None:
    catalog = Catalog()
    models: dict[str, Model] = {}
    routes: dict[str, Route] = {}
    every = ["a", "b", *("".join(each) for n in range(5) for each in product("pq", repeat=n))]
    for what, route_id, target, keys, prefixes in steps:
        new = route_of(route_id, "", *keys, target=target, prefixes=tuple(prefixes))
        old = routes.get(route_id)
        model_id = links(target)[0].id
        before = {key: meaning(models, routes, key) for key in every}
        told: tuple[KeyChange[RouteTarget], ...] = ()
        try:
            match what:
                case "route" if old is not None:
                    catalog.check_route_free(new.id, new.keys, new.prefixes, but_for=old)
                    told = catalog.changed_by(old, new)
                    catalog.replace_route(old, new)
                    routes[route_id] = new
                case "route":
                    catalog.add_routes(new)
                    routes[route_id] = new
                case "routes":
                    both = [new, route_of(f"{route_id}x", "a", *keys[1:], prefixes=("pqpq",))]
                    catalog.add_routes(*both)
                    routes.update((route.id, route) for route in both)
                case "drop route" if old is not None:
                    catalog.remove_route(routes.pop(route_id))
                case "model" if model_id in models:
                    changed = model_of(model_id, *keys)
                    catalog.replace(models[model_id], changed)
                    models[model_id] = changed
                case "model":
                    model = model_of(model_id, *keys)
                    catalog.add(model)
                    models[model_id] = model
                case "drop model" if model_id in models:
                    catalog.remove(models.pop(model_id))
        except Refusal as refusal:
            assert refusal.reason is Reason.ALREADY_EXISTS
            assert {key: meaning(models, routes, key) for key in every} == before
        for key in every:
            found = catalog.keys.get(key) or catalog.routed(key)
            wanted = meaning(models, routes, key)
            assert found == wanted
            assert key not in catalog.keys or catalog.routed(key) is None
        for route in routes.values():
            assert catalog.get_route(route.id) == route
            assert catalog.target_of(route.id) == route.target
        for link in {link for target in TARGETS for link in links(target)}:
            leading = {route.id for route in routes.values() if link in links(route.target)}
            assert set(catalog.leading_to(link)) == leading
        for change in told:
            key = str(change.key)
            now = meaning(models, routes, key)
            for meant, found in ((change.before, before[key]), (change.after, now)):
                assert (meant and meant.name) == name_of(found)
            assert name_of(before[key]) != name_of(now)


def name_of(found: Model | Route | None) -> str | None:
    if found is None:
        return None
    return found.meaning.name if isinstance(found, Route) else f"models/{found.id}"


def links(target: Target) -> list[Link]:
    return [link for _, link in links_of(target)]


def test_a_key_of_its_own_wins_over_prefixes_and_the_longest_prefix_over_others() -> None:
    catalog = Catalog()
    model = model_of("m", "acme/own")
    catalog.add(model)
    default = route_of("default", "m", prefixes=("",))
    acme = route_of("acme", "gone", "acme/exact", prefixes=("acme/", "acme/x/"))
    catalog.add_routes(default, acme)
    assert catalog.routed("acme/own") is None
    assert catalog.keys["acme/own"] is model
    # Its model is not there, which is for whoever asks to say, and no reason to look further.
    assert catalog.routed("acme/exact") is acme
    assert catalog.routed("acme/x/1") is acme
    assert catalog.routed("acme/") is acme
    assert catalog.routed("acme") is default
    assert catalog.routed("m") is None
    with pytest.raises(Refusal, match="prefix 'acme/' exists already, and means models/gone by"):
        catalog.add_routes(route_of("other", "m", prefixes=("acme/",)))
    catalog.remove_route(default)
    assert catalog.routed("acme") is None


def test_what_a_key_would_lose_or_get_by_a_prefix_is_told() -> None:
    catalog = Catalog()
    catalog.add(model_of("m"))
    fallback = Fallback((Link("models", "m"), Link("models", "m")))
    default = route_of("default", "", prefixes=("",), target=fallback)
    old = route_of("r", "m", "a", "b")
    catalog.add_routes(default, old)
    new = route_of("r", "m", "b", "c")
    assert catalog.changed_by(old, new) == (
        KeyChange("c", default.meaning, new.meaning),
        KeyChange("a", old.meaning, default.meaning),
    )
    assert [(meant.name, str(meant)) for meant in (default.meaning, new.meaning)] == [
        ("routes/default", "routes/default"),
        ("models/m", "models/m by routes/r"),
    ]


def test_a_route_of_a_model_has_the_digest_that_it_had_before_there_were_other_kinds() -> None:
    """Or every such route of a file would count as changed by an upgrade."""
    draft = RouteDraft(id="r", keys=("b", "a", "b"), target=One("m"))
    assert draft.digest() == hashlib.sha256(b'["r", ["b", "a"], "m"]').hexdigest()
    others = [
        RouteDraft(id="r", keys=("b", "a"), target=One("m"), prefixes=("p",)),
        RouteDraft(id="r", keys=("b", "a"), target=Fallback((Link("models", "m"),))),
        RouteDraft(id="r", keys=("b", "a"), target=Fallback((Link("models", "m"),), True)),
        RouteDraft(id="r", keys=("b", "a"), target=Fallback((Link("routes", "m"),))),
    ]
    assert len({each.digest() for each in (draft, *others)}) == 5


def test_the_view_of_the_keys_cannot_be_written() -> None:
    with pytest.raises(TypeError):
        Catalog().keys["a"] = model_of("m")  # type: ignore[index]  # the point of the test


def test_models_are_in_the_order_of_their_ids() -> None:
    catalog = Catalog()
    for model_id in ("b", "a.2", "c", "a.10"):
        catalog.add(model_of(model_id))
    assert [model.id for model in catalog.models()] == ["a.10", "a.2", "b", "c"]


@pytest.mark.parametrize(
    ("model_id", "keys", "resource"),
    [
        ("m", (), Resource("model", "models/m")),
        ("n", ("k",), Resource("key", "k")),
        ("k", (), Resource("key", "k")),
        ("n", ("m",), Resource("key", "m")),
        ("n", ("free", "k"), Resource("key", "k")),
    ],
)
def test_what_is_taken_is_refused_and_changes_nothing(
    model_id: str, keys: tuple[str, ...], resource: Resource
) -> None:
    catalog = Catalog()
    catalog.add(model_of("m", "k"))
    with pytest.raises(Refusal) as caught:
        catalog.add(model_of(model_id, *keys))
    assert caught.value.reason is Reason.ALREADY_EXISTS
    assert caught.value.resource == resource
    assert sorted(catalog.keys) == ["k", "m"]
    assert len(catalog.models()) == 1


def test_a_models_own_id_may_be_among_its_keys() -> None:
    catalog = Catalog()
    model = model_of("m", "m")
    catalog.add(model)
    assert list(catalog.keys) == ["m"]
    catalog.remove(model)
    assert not catalog.keys


def test_a_model_that_takes_anothers_place_takes_its_keys_and_frees_the_rest() -> None:
    catalog = Catalog()
    old, other, new = model_of("m", "k", "l"), model_of("n", "taken"), model_of("m", "l", "z")
    catalog.add(old)
    catalog.add(other)
    catalog.replace(old, new)
    assert dict(catalog.keys) == {"m": new, "l": new, "z": new, "n": other, "taken": other}
    assert catalog.models() == [new, other]


@pytest.mark.parametrize("key", ["taken", "n"])
def test_a_model_whose_keys_are_taken_takes_nobodys_place(key: str) -> None:
    catalog = Catalog()
    old, other = model_of("m", "k"), model_of("n", "taken")
    catalog.add(old)
    catalog.add(other)
    with pytest.raises(Refusal) as caught:
        catalog.replace(old, model_of("m", "k", key))
    assert caught.value.reason is Reason.ALREADY_EXISTS
    assert dict(catalog.keys) == {"m": old, "k": old, "n": other, "taken": other}


def test_an_unknown_model_is_not_found() -> None:
    with pytest.raises(Refusal) as caught:
        Catalog().get("m")
    assert caught.value.reason is Reason.MODEL_NOT_FOUND
    assert caught.value.resource == Resource("model", "models/m")


def test_an_unknown_key_is_not_found_and_a_long_one_is_shortened() -> None:
    for key, shown in (("k", "k"), ("k" * 256, "k" * 61 + "...")):
        with pytest.raises(Refusal) as caught:
            resolve({}, Catalog(), key)
        assert caught.value.reason is Reason.KEY_NOT_FOUND
        assert caught.value.resource == Resource("key", shown)
        assert len(caught.value.text) < 120


@pytest.mark.parametrize("key", ["", "/a", "a..b", "a b", "a\n", "é", "a" * 257, "../etc", ":a"])
def test_what_can_be_no_key_is_refused_as_such(key: str) -> None:
    assert not is_key(key)
    with pytest.raises(Refusal) as caught:
        resolve({}, Catalog(), key)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert [v.field for v in caught.value.violations] == ["key"]
    assert key[:40] not in caught.value.text or len(key) < 3


@pytest.mark.parametrize("model_id", ["", "A", "a/b", "a:b", "a..b", "-a", "a" * 129, "a\n", "é"])
def test_what_is_no_model_id(model_id: str) -> None:
    assert not is_model_id(model_id)


@pytest.mark.parametrize("model_id", ["a", "0", "a.b-c_d", "a" * 128, "a."])
def test_what_is_a_model_id(model_id: str) -> None:
    assert is_model_id(model_id)
    assert is_key(model_id)


@given(text=st.text())
def test_every_model_id_is_a_key_and_no_path(text: str) -> None:
    if is_model_id(text):
        assert is_key(text)
        assert "/" not in text
    if is_key(text):
        assert text.isascii()
        assert text.isprintable()
        assert not text.startswith("/")
        assert ".." not in text
