"""Models by id and by key, and what a key means."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import Model, ModelDraft, is_key, is_model_id
from modelyard_server.catalog.records import Owner
from modelyard_server.catalog.route import Route
from modelyard_server.devices.placed import whole
from modelyard_server.errors import Reason, Refusal, Resource
from modelyard_server.residency.values import ModelHandle
from modelyard_server.routing.resolve import resolve
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
        assert resolve(keys, key) is model
    catalog.remove(model)
    assert not keys
    assert catalog.models() == []
    catalog.add(model_of("m", "a/b"))


def route_of(route_id: str, model: str, *keys: str) -> Route:
    time = datetime(2026, 1, 1, tzinfo=UTC)
    return Route(
        id=route_id,
        keys=keys,
        model=model,
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
                if route.model in models:
                    wanted[key] = models[route.model]
        assert dict(catalog.keys) == wanted
        assert all(catalog.keys[key] is model for key, model in wanted.items())


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
            resolve({}, key)
        assert caught.value.reason is Reason.KEY_NOT_FOUND
        assert caught.value.resource == Resource("key", shown)
        assert len(caught.value.text) < 120


@pytest.mark.parametrize("key", ["", "/a", "a..b", "a b", "a\n", "é", "a" * 257, "../etc", ":a"])
def test_what_can_be_no_key_is_refused_as_such(key: str) -> None:
    assert not is_key(key)
    with pytest.raises(Refusal) as caught:
        resolve({}, key)
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
