"""Routes of all kinds: registered, changed, refused and kept, over a real channel."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from tests.support.config_text import device_table, model_table
from tests.support.server import (
    RunningApp,
    ServerProcess,
    refusal_of,
    running_app,
    server_process,
)

from modelyard import (
    Admin,
    AlreadyExists,
    Branch,
    Canary,
    Combine,
    ConfigOwned,
    EnsembleTarget,
    EtagMismatch,
    FallbackTarget,
    InvalidRequest,
    KeyChange,
    KeyNotFound,
    Member,
    ModelInUse,
    ModelNeverFits,
    ModelNotFound,
    ModelTarget,
    ResidencyState,
    RouteNotFound,
    RouteTarget,
    SequenceStep,
    SequenceTarget,
    ShadowTarget,
    SplitTarget,
    Transform,
    VersionsTarget,
)
from modelyard.v1 import route_pb2, route_service_pb2, route_service_pb2_grpc

T = TypeVar("T")

MODELS = ("a", "b", "c")
CONFIG = '\n[engine]\nkind = "thread"\n' + device_table("cuda:0", 1000, logical=True)
CONFIG += "".join(
    model_table(name, "identity", device="cuda:0", options={"size_bytes": 400}) for name in MODELS
)
STORED = '[catalog]\nfile = "catalog.db"\n'

SPLIT = SplitTarget.by_weight({"a": 90, "b": 10})
VERSIONS = VersionsTarget(
    versions=VersionsTarget.of({"v1": "a", "v2": "b", "v3": "c"}, current="v1").versions,
    current="stable",
    aliases={"stable": "v1", "next": "v2"},
    canary=Canary(version="next", percent=5),
)
KINDS: dict[str, RouteTarget] = {
    "model": ModelTarget(model="a"),
    "split": SplitTarget(branches=SPLIT.branches, warm_tolerance=0.25, salt="ä"),
    "sequence": SequenceTarget(
        steps=[
            SequenceStep(target="routes/model", name="first"),
            SequenceStep(target="b", rename={"": "text"}),
        ]
    ),
    "ensemble": EnsembleTarget(
        members=[
            Member(name="x", target="routes/model", weight=0.5),
            Member(name="y", target="b"),
        ],
        combine=Combine.VOTE,
    ),
    "shadow": ShadowTarget(target="routes/split", shadow="c", sample=0.5),
    "fallback": FallbackTarget(targets=["a", "routes/split"], prefer_warm=True),
    "versions": VERSIONS,
}


@pytest.fixture
async def yard(tmp_path: Path) -> AsyncIterator[RunningApp]:
    async with running_app(CONFIG, tmp_path) as made:
        yield made


def stub_of(yard: RunningApp) -> Any:
    return route_service_pb2_grpc.RouteServiceStub(yard.channel)


async def create_all(yard: RunningApp) -> None:
    for kind, target in KINDS.items():
        await yard.admin(
            Admin.create_route, kind, [f"k/{kind}"], target=target, prefixes=[f"{kind}/"]
        )


# --- What is registered ---------------------------------------------------------------------------


async def test_every_kind_is_registered_and_told_as_it_was_given(yard: RunningApp) -> None:
    await create_all(yard)
    routes = {route.id: route for route in await yard.admin(Admin.list_routes)}
    assert {name: route.target for name, route in routes.items()} == KINDS
    for name, route in routes.items():
        assert (route.keys, route.prefixes) == ((f"k/{name}",), (f"{name}/",))
        assert route.model == ("models/a" if name == "model" else None)
        assert not route.warnings
        assert await yard.admin(Admin.get_route, name) == route


async def test_every_kind_becomes_every_other_in_one_step(yard: RunningApp) -> None:
    await create_all(yard)
    await yard.admin(Admin.create_route, "r", ["k1", "k2"], model="c")
    before = "models/c"
    for name in [*KINDS, *reversed(KINDS)]:
        updated = await yard.admin(Admin.update_route, "r", target=KINDS[name])
        assert updated.route.target == KINDS[name]
        after = "models/a" if name == "model" else "routes/r"
        changes = [KeyChange(key=key, before=before, after=after) for key in ("k1", "k2")]
        assert updated.changes == (tuple(changes) if before != after else ())
        before = after


async def test_prefixes_mean_what_no_key_does(yard: RunningApp) -> None:
    await yard.admin(Admin.create_route, "default", model="a", prefixes=[""])
    acme = await yard.admin(
        Admin.create_route, "acme", ["acme/own"], model="b", prefixes=["acme/", "acme/", "acme/x"]
    )
    assert acme.prefixes == ("acme/", "acme/x")
    assert any('prefix "acme/" is given more than once' in text for text in acme.warnings)

    async def meant(key: str) -> tuple[str | None, str]:
        resolution = await yard.client.resolve(key)
        return resolution.route, resolution.steps[0].model

    assert await meant("acme/1") == ("routes/acme", "models/b")
    assert await meant("acm") == ("routes/default", "models/a")
    assert await meant("c") == (None, "models/c")
    assert 'the prefix "acme/x" of it' in (await yard.client.resolve("acme/xyz")).explanation
    assert isinstance(await refusal_of(yard.client.resolve("no way")), InvalidRequest)
    updated = await yard.admin(Admin.update_route, "acme", prefixes=["other/"], remove_keys=[])
    assert updated.route.prefixes == ("other/",)
    assert updated.route.keys == ("acme/own",)
    assert await meant("acme/1") == ("routes/default", "models/a")
    # What is taken away from a route may have a meaning all the same.
    updated = await yard.admin(Admin.update_route, "acme", remove_keys=["acme/own"])
    assert updated.changes == (KeyChange(key="acme/own", before="models/b", after="models/a"),)
    await yard.admin(Admin.delete_route, "default")
    assert isinstance(await refusal_of(yard.client.resolve("acm")), KeyNotFound)


async def test_what_a_request_would_be_refused_for_is_refused_when_it_is_resolved(
    yard: RunningApp,
) -> None:
    await yard.admin(Admin.create_route, "r", ["k"], model="a", prefixes=["p/"])
    await yard.admin(Admin.create_route, "v", ["v1"], target=VERSIONS)
    for key in ("a", "k", "p/x"):
        for ask in (
            yard.client.predict(key, "text", version="v1"),
            yard.client.resolve(key, version="v1"),
        ):
            error = await refusal_of(ask)
            assert isinstance(error, InvalidRequest)
            assert f"the key {key!r} means a model, not versions" in str(error)
    assert isinstance(await refusal_of(yard.client.resolve("v1", version="gone")), InvalidRequest)
    resolution = await yard.client.resolve("v1", version="next")
    assert [(step.model, step.version) for step in resolution.steps] == [("models/b", "v2")]


async def test_only_validating_any_kind_changes_nothing(yard: RunningApp) -> None:
    await create_all(yard)
    before = await yard.admin(Admin.list_routes)
    for target in KINDS.values():
        made = await yard.admin(Admin.create_route, "r", ["k"], target=target, validate_only=True)
        assert made.target == target
        updated = await yard.admin(Admin.update_route, "fallback", target=SPLIT, validate_only=True)
        assert updated.route.target == SPLIT
    assert await yard.admin(Admin.list_routes) == before


# --- What is refused ------------------------------------------------------------------------------


def branches(*names: str, weight: int = 1) -> list[Branch]:
    return [Branch(name=name, target="a", weight=weight) for name in names]


def steps(*targets: str) -> SequenceTarget:
    return SequenceTarget(steps=[SequenceStep(target=target) for target in targets])


def members(*targets: str) -> EnsembleTarget:
    return EnsembleTarget(
        members=[Member(name=f"m{i}", target=target) for i, target in enumerate(targets)],
        combine=Combine.MEAN,
    )


def versions(**changes: Any) -> VersionsTarget:
    given = {"versions": VERSIONS.versions, "current": "v1"} | changes
    return VersionsTarget(**given)


BAD: list[tuple[RouteTarget, set[str]]] = [
    (SplitTarget(branches=branches("x")), {"split.branches"}),
    (SplitTarget(branches=branches("x", "y", weight=0)), {"split.branches"}),
    (
        SplitTarget(
            branches=[*branches("x", weight=-1), *branches("x", "Y")],
            warm_tolerance=2,
            salt="a\0",
        ),
        {
            "split.branches[0].weight",
            "split.branches[1].name",
            "split.branches[2].name",
            "split.warm_tolerance",
            "split.salt",
        },
    ),
    (FallbackTarget(targets=["a"]), {"fallback.targets"}),
    (
        FallbackTarget(targets=["a", "x/y", "routes/"]),
        {"fallback.targets[1]", "fallback.targets[2]"},
    ),
    (ShadowTarget(target="a", shadow="routes/r", sample=0), {"shadow.shadow", "shadow.sample"}),
    (SequenceTarget(steps=[]), {"sequence.steps"}),
    (
        SequenceTarget(steps=[SequenceStep(transform=Transform(name="pooling"))]),
        {"sequence.steps"},
    ),
    (
        EnsembleTarget(members=[Member(name="m", target="a", weight=-1)] * 2, combine=Combine.ALL),
        {
            "ensemble.members[0].weight",
            "ensemble.members[1].weight",
            "ensemble.members[1].name",
        },
    ),
    (members("a", "routes/split"), {"ensemble.members[1].target"}),
    (members("a", "routes/sequence"), {"ensemble.members[1].target"}),
    (
        versions(
            current="gone",
            aliases={"v1": "v1", "x": "y"},
            canary=Canary(version="z", percent=101),
        ),
        {
            "versions.current",
            "versions.aliases.v1",
            "versions.aliases.x",
            "versions.canary.version",
            "versions.canary.percent",
        },
    ),
]


async def test_what_no_target_can_be_is_refused_with_everything_at_once(yard: RunningApp) -> None:
    await create_all(yard)
    before = await yard.admin(Admin.list_routes)
    for target, fields in BAD:
        for call in (
            yard.admin(Admin.create_route, "r", ["k"], target=target),
            yard.admin(Admin.update_route, "fallback", target=target, keys=["no way"]),
        ):
            error = await refusal_of(call)
            assert isinstance(error, InvalidRequest), target
            told = {each.field.removeprefix("route.") for each in error.violations} - {"keys[0]"}
            # As many as trailers hold, and then how many more there are.
            assert told == fields or ("" in told and told - {""} < fields), target
    error = await refusal_of(
        yard.admin(
            Admin.create_route,
            "R",
            ["no way"],
            target=members("a", "routes/split"),
            prefixes=[".."],
        )
    )
    assert isinstance(error, InvalidRequest)
    assert [each.field for each in error.violations] == [
        "route_id",
        "route.keys[0]",
        "route.prefixes[0]",
        "route.ensemble.members[1].target",
    ]
    assert await yard.admin(Admin.list_routes) == before


async def test_what_is_not_there_is_told_by_its_name(yard: RunningApp) -> None:
    error = await refusal_of(
        yard.admin(Admin.create_route, "r", ["k"], target=steps("a", "x", "routes/y"))
    )
    assert isinstance(error, ModelNotFound)
    assert [each.field for each in error.violations] == [
        "route.sequence.steps[1].target",
        "route.sequence.steps[2].target",
    ]
    error = await refusal_of(
        yard.admin(Admin.create_route, "r", ["k"], target=steps("a", "routes/y"))
    )
    assert isinstance(error, RouteNotFound)
    assert await yard.admin(Admin.list_routes) == ()


async def test_messages_that_no_client_of_ours_sends_are_refused(yard: RunningApp) -> None:
    stub = stub_of(yard)
    unknown = route_pb2.Route(keys=["k"])
    unknown.ensemble.combine = 99  # type: ignore[assignment]  # a number of another version
    bare = route_pb2.Route(keys=["k"])
    bare.fallback.targets.extend(["a", ""])
    empty = route_pb2.Route(keys=["k"])
    empty.sequence.steps.add()
    nan = route_pb2.Route(keys=["k"])
    step = nan.sequence.steps.add(target="models/a")
    step = nan.sequence.steps.add()
    step.transform.name = "top_k"
    step.transform.parameters["k"] = float("nan")
    for route, text in (
        (route_pb2.Route(keys=["k"]), "route.target: is missing"),
        (unknown, "route.ensemble.combine: must be one of mean, vote, concat, all"),
        (bare, "route.fallback.targets[0]: must be"),
        (empty, "route.sequence.steps[0]: must have either a target or a transform"),
        (nan, "route.sequence.steps[1].transform.parameters.k: must hold finite numbers"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            await stub.CreateRoute(route_service_pb2.CreateRouteRequest(route_id="r", route=route))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert text in (caught.value.details() or "")
    assert await yard.admin(Admin.list_routes) == ()


async def test_routes_never_lead_in_a_circle_nor_too_deep(yard: RunningApp) -> None:
    await yard.admin(Admin.create_route, "r1", ["k1"], model="a")
    for i in range(2, 9):
        target = FallbackTarget(targets=["a", f"routes/r{i - 1}"])
        await yard.admin(Admin.create_route, f"r{i}", [f"k{i}"], target=target)
    before = await yard.admin(Admin.list_routes)
    error = await refusal_of(
        yard.admin(Admin.update_route, "r1", target=FallbackTarget(targets=["a", "routes/r3"]))
    )
    assert isinstance(error, InvalidRequest)
    assert "leads in a circle: routes/r1 -> routes/r3 -> routes/r2 -> routes/r1" in str(error)
    for call in (
        yard.admin(Admin.create_route, "r9", ["k9"], target=steps("routes/r8")),
        yard.admin(Admin.create_route, "self", ["k9"], target=steps("routes/self")),
    ):
        error = await refusal_of(call)
        assert isinstance(error, InvalidRequest)
    await yard.admin(Admin.create_route, "more", ["k0"], target=steps("a"))
    error = await refusal_of(yard.admin(Admin.update_route, "r1", target=steps("routes/more")))
    assert "leads through 9 routes; 8 may be" in str(error)
    await yard.admin(Admin.delete_route, "more")
    assert await yard.admin(Admin.list_routes) == before


async def test_what_others_lead_to_stays_and_keeps_what_they_need(yard: RunningApp) -> None:
    await create_all(yard)
    before = await yard.admin(Admin.list_routes)
    error = await refusal_of(yard.admin(Admin.delete_route, "split"))
    assert isinstance(error, InvalidRequest)
    assert "routes/split is what routes/fallback, routes/shadow lead to" in str(error)
    # It is a member of an ensemble, which takes no choice.
    error = await refusal_of(yard.admin(Admin.update_route, "model", target=SPLIT))
    assert isinstance(error, InvalidRequest)
    assert "ensemble.members[0].target of routes/ensemble" in str(error)
    assert await yard.admin(Admin.list_routes) == before
    options = {"size_bytes": 10}
    await yard.admin(Admin.create_model, "m", runtime="identity", options=options)
    leading: dict[str, RouteTarget] = {
        "split": SplitTarget.by_weight({"a": 1, "m": 0}),
        "sequence": steps("m"),
        "ensemble": members("a", "m"),
        "shadow": ShadowTarget(target="a", shadow="m", sample=1),
        "fallback": FallbackTarget(targets=["a", "m"]),
        "versions": VersionsTarget.of({"v1": "a", "v2": "m"}, current="v1"),
    }
    for kind, target in leading.items():
        await yard.admin(Admin.create_route, "to-m", ["to-m"], target=target)
        error = await refusal_of(yard.admin(Admin.delete_model, "m"))
        assert isinstance(error, ModelInUse), kind
        assert "routes/to-m" in str(error)
        await yard.admin(Admin.delete_route, "to-m")
    await yard.admin(Admin.delete_model, "m")


async def test_an_ensemble_that_never_fits_is_refused(yard: RunningApp) -> None:
    """Two of 400 bytes fit into 1000, three do not; whatever is pinned or drained today."""
    await yard.admin(Admin.pin, "c")
    await yard.admin(Admin.drain_device, "cuda:0")
    await yard.admin(Admin.create_route, "pair", ["k1"], target=members("a", "b"))
    error = await refusal_of(
        yard.admin(Admin.create_route, "all", ["k2"], target=members("a", "b", "c"))
    )
    assert isinstance(error, ModelNeverFits)
    assert "models/a, models/b, models/c, the members of routes/all, do not fit" in str(error)
    await yard.admin(Admin.create_route, "member", ["k3"], model="a")
    # The same model twice is held once.
    await yard.admin(Admin.create_route, "three", ["k4"], target=members("a", "routes/member", "b"))
    before = await yard.admin(Admin.list_routes)
    error = await refusal_of(yard.admin(Admin.update_route, "member", model="c"))
    assert isinstance(error, ModelNeverFits)
    assert "the members of routes/three" in str(error)
    assert await yard.admin(Admin.list_routes) == before


async def test_prefixes_that_are_taken_are_refused_by_whom(yard: RunningApp) -> None:
    await yard.admin(Admin.create_route, "r", ["k1"], model="a", prefixes=["p/", ""])
    for target in (ModelTarget(model="b"), SPLIT):
        error = await refusal_of(
            yard.admin(Admin.create_route, "s", ["k2"], target=target, prefixes=["x", "p/"])
        )
        assert isinstance(error, AlreadyExists)
        assert "prefix 'p/' exists already, and means models/a by routes/r" in str(error)
    await yard.admin(Admin.create_route, "s", ["k2"], target=SPLIT)
    error = await refusal_of(yard.admin(Admin.update_route, "s", prefixes=[""]))
    assert isinstance(error, AlreadyExists)
    error = await refusal_of(yard.admin(Admin.create_route, "t", ["k2"], model="a"))
    assert "key 'k2' exists already, and means routes/s" in str(error)
    error = await refusal_of(yard.admin(Admin.create_model, "k2", runtime="identity"))
    assert isinstance(error, AlreadyExists)


# --- Masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        (["split.branches"], "'split.branches' cannot be changed"),
        (["versions.aliases"], "'versions.aliases' cannot be changed"),
        (["model", "split"], "must name one kind of target, or parts of versions alone"),
        (["versions", "versions.current"], "must name one kind of target"),
        (["split"], "route.split: is what update_mask names; what is set is model"),
        (["versions.current"], "route.versions: routes/r is no route of versions"),
    ],
)
async def test_masks_that_name_what_is_not_there_are_refused(
    yard: RunningApp, paths: list[str], text: str
) -> None:
    before = await yard.admin(Admin.create_route, "r", ["k1"], model="a")
    route = route_pb2.Route(name="routes/r", model=route_pb2.ModelTarget(model="models/b"))
    with pytest.raises(grpc.RpcError) as caught:
        await stub_of(yard).UpdateRoute(
            route_service_pb2.UpdateRouteRequest(route=route, update_mask=FieldMask(paths=paths))
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert text in (caught.value.details() or "")
    assert await yard.admin(Admin.get_route, "r") == before


async def test_a_mask_changes_what_it_names_and_nothing_else(yard: RunningApp) -> None:
    await yard.admin(Admin.create_route, "r", ["k1"], target=VERSIONS, prefixes=["p"])
    stub = stub_of(yard)

    async def update(*paths: str, **fields: Any) -> route_pb2.Route:
        response = await stub.UpdateRoute(
            route_service_pb2.UpdateRouteRequest(
                route=route_pb2.Route(name="routes/r", **fields),
                update_mask=FieldMask(paths=paths),
            )
        )
        found: route_pb2.Route = response.route
        return found

    changed = await update(
        "versions.current", versions={"current": "v3", "aliases": {"x": "v1"}}, keys=["k9"]
    )
    assert (changed.versions.current, dict(changed.versions.aliases)) == (
        "v3",
        {"stable": "v1", "next": "v2"},
    )
    assert (list(changed.keys), list(changed.prefixes)) == (["k1"], ["p"])
    assert changed.versions.canary.version == "next"
    changed = await update(
        "versions.canary", versions={"canary": {"version": "v1", "percent": 1.5}}
    )
    assert (changed.versions.current, changed.versions.canary.percent) == ("v3", 1.5)
    changed = await update("versions.canary")
    assert not changed.versions.HasField("canary")
    changed = await update("prefixes", versions={"current": "v1"})
    assert (list(changed.prefixes), changed.versions.current) == ([], "v3")
    changed = await update("*", keys=["k2"], prefixes=["q"], split=_split())
    assert (list(changed.keys), list(changed.prefixes)) == (["k2"], ["q"])
    assert changed.WhichOneof("target") == "split"


def _split() -> route_pb2.SplitTarget:
    split = route_pb2.SplitTarget()
    for name in ("x", "y"):
        split.branches.add(name=name, target="models/a", weight=1)
    return split


# --- Versions -------------------------------------------------------------------------------------


async def test_a_canary_is_promoted_after_it_is_loaded(yard: RunningApp) -> None:
    await yard.admin(Admin.create_route, "r", ["k1"], target=VERSIONS)
    await yard.admin(Admin.load, "a")
    promoted = await yard.admin(Admin.promote_canary, "r")
    assert promoted.target == versions(current="next", aliases=VERSIONS.aliases)
    # Loaded before it counted, and there was room for both.
    for model in ("a", "b"):
        assert (await yard.residency(model)).state is ResidencyState.RESIDENT
    updated = await yard.admin(Admin.update_route, "r", current="v3")
    # No room for b and c at once with a: so a goes, and b stays until c is there.
    assert isinstance(updated.route.target, VersionsTarget)
    assert updated.route.target.current == "v3"
    assert (await yard.residency("c")).state is ResidencyState.RESIDENT
    assert (await yard.residency("b")).state is ResidencyState.RESIDENT
    error = await refusal_of(yard.admin(Admin.promote_canary, "r"))
    assert isinstance(error, InvalidRequest)
    assert "routes/r has no canary" in str(error)


async def test_nothing_is_loaded_for_versions_that_are_not_there(yard: RunningApp) -> None:
    await yard.admin(Admin.create_route, "r", ["k1"], target=VERSIONS)
    await yard.admin(Admin.promote_canary, "r")
    assert (await yard.residency("b")).load_count == 0


async def test_a_trial_is_ended_whatever_has_become_of_its_models(yard: RunningApp) -> None:
    created = await yard.admin(Admin.create_route, "r", ["k1"], target=VERSIONS)
    ended = await yard.admin(Admin.abort_canary, "r")
    assert ended.target == versions(current="stable", aliases=VERSIONS.aliases)
    assert ended.etag != created.etag
    # Without one it changes nothing.
    assert await yard.admin(Admin.abort_canary, "r") == ended
    await yard.admin(Admin.create_route, "s", ["k2"], target=SPLIT)
    for question in (Admin.abort_canary, Admin.promote_canary):
        assert isinstance(await refusal_of(yard.admin(question, "s")), InvalidRequest)
        assert isinstance(await refusal_of(yard.admin(question, "gone")), RouteNotFound)
        assert isinstance(await refusal_of(yard.admin(question, "NO")), InvalidRequest)


async def test_promotions_and_ends_heed_etags_and_are_done_once(yard: RunningApp) -> None:
    created = await yard.admin(Admin.create_route, "r", ["k1"], target=VERSIONS)
    for question in (Admin.abort_canary, Admin.promote_canary):
        error = await refusal_of(yard.admin(question, "r", etag='"other"'))
        assert isinstance(error, EtagMismatch)
    promoted = await yard.admin(Admin.promote_canary, "r", etag=created.etag, request_id="promote")
    aborted = await yard.admin(Admin.abort_canary, "r", request_id="abort")
    assert aborted == promoted
    again = Canary(version="v3", percent=50)
    updated = await yard.admin(Admin.update_route, "r", canary=again)
    # Sent once more, neither touches the trial that came after it.
    assert (
        await yard.admin(Admin.promote_canary, "r", etag=created.etag, request_id="promote")
        == promoted
    )
    assert await yard.admin(Admin.abort_canary, "r", request_id="abort") == aborted
    assert await yard.admin(Admin.get_route, "r") == updated.route
    error = await refusal_of(yard.admin(Admin.promote_canary, "r", request_id="abort"))
    assert isinstance(error, InvalidRequest)


# --- The document ---------------------------------------------------------------------------------


async def test_the_examples_of_the_document_run(tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "routes.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    config = CONFIG
    for name in ("sentiment", "sentiment-v2", "writer"):
        config += model_table(name, "identity", device="cuda:0", options={"size_bytes": 10})

    def run(admin: Admin) -> None:
        for block in blocks:
            code = block.replace("127.0.0.1:8470", served.target)
            exec(compile(code, "docs/routes.md", "exec"), {"admin": admin})

    async with running_app(config, tmp_path) as served:
        await served.admin(run)
        routes = {route.id: route.target for route in await served.admin(Admin.list_routes)}
    assert {target.kind for target in routes.values() if target is not None} == set(KINDS)
    release = routes["release"]
    assert isinstance(release, VersionsTarget)
    assert (release.current, release.canary) == ("v1", None)


# --- The file, restarts ---------------------------------------------------------------------------

FILED = """
[[routes]]
id = "default"
prefixes = [""]
model = "c"

[[routes]]
id = "trial"
keys = ["t1"]
[routes.split]
branches = [
  {name = "old", target = "a", weight = 90},
  {name = "new", target = "routes/release", weight = 10},
]

[[routes]]
id = "release"
keys = ["r1"]
[routes.versions]
current = "stable"
aliases = {stable = "v1"}
canary = {version = "v2", percent = 5}
[[routes.versions.versions]]
name = "v1"
target = "models/a"
[[routes.versions.versions]]
name = "v2"
target = "models/b"
"""


async def test_routes_of_the_file_have_any_kind_and_belong_to_it(tmp_path: Path) -> None:
    async with running_app(STORED + CONFIG + FILED, tmp_path) as yard:
        before = {route.id: route for route in await yard.admin(Admin.list_routes)}
        assert set(before) == {"default", "release", "trial"}
        target = before["release"].target
        assert isinstance(target, VersionsTarget)
        assert (target.current, target.canary) == ("stable", Canary(version="v2", percent=5))
        assert before["default"].prefixes == ("",)
        for call in (
            yard.admin(Admin.promote_canary, "release"),
            yard.admin(Admin.abort_canary, "release"),
            yard.admin(Admin.update_route, "trial", target=SPLIT),
        ):
            assert isinstance(await refusal_of(call), ConfigOwned)
        # Routes of others may lead to those of the file.
        await yard.admin(Admin.create_route, "r", ["k"], target=steps("routes/trial", "b"))
    async with running_app(STORED + CONFIG + FILED, tmp_path) as yard:
        after = {route.id: route for route in await yard.admin(Admin.list_routes)}
        kept = after.pop("r")
        assert after == before
        assert kept.target == steps("routes/trial", "b")
    changed = FILED.replace("weight = 90", "weight = 80")
    async with running_app(STORED + CONFIG + changed, tmp_path) as yard:
        trial = await yard.admin(Admin.get_route, "trial")
        assert isinstance(trial.target, SplitTarget)
        assert trial.target.branches[0].weight == 80
        assert trial.etag != before["trial"].etag
    async with running_app(STORED + CONFIG, tmp_path) as yard:
        (left,) = await yard.admin(Admin.list_routes)
        assert left.warnings == ("sequence.steps[0].target: there is no routes/trial",)


async def test_what_the_file_makes_of_others_routes_is_told_as_a_warning(tmp_path: Path) -> None:
    filed = '\n[[routes]]\nid = "filed"\nkeys = ["f"]\n'
    async with running_app(STORED + CONFIG + filed + 'model = "a"\n', tmp_path) as yard:
        made = await yard.admin(Admin.create_route, "r", ["k"], target=members("b", "routes/filed"))
        assert not made.warnings
    choice = 'fallback.targets = ["a", "b"]\n'
    async with running_app(STORED + CONFIG + filed + choice, tmp_path) as yard:
        route = await yard.admin(Admin.get_route, "r")
        (warning,) = route.warnings
        assert "ensemble.members[1].target: routes/filed leads to a fallback" in warning
        assert (route.target, route.etag) == (made.target, made.etag)


async def ask(process: ServerProcess, question: Callable[[Admin], T]) -> T:
    def asks() -> T:
        with Admin(process.target) as admin:
            return question(admin)

    return await asyncio.to_thread(asks)


async def test_everything_acknowledged_is_there_after_a_kill(tmp_path: Path) -> None:
    def change_everything(admin: Admin) -> None:
        for kind, target in KINDS.items():
            admin.create_route(kind, [f"k/{kind}"], target=target, prefixes=[f"{kind}/"])
        admin.create_route("promoted", ["k1"], target=VERSIONS)
        admin.promote_canary("promoted")
        admin.create_route("ended", ["k2"], target=VERSIONS)
        admin.abort_canary("ended", request_id="end it")
        admin.update_route("ended", canary=Canary(version="v3", percent=7))
        admin.create_route("gone", ["k3"], target=SPLIT, prefixes=["gone/"])
        admin.delete_route("gone")
        admin.update_route("shadow", prefixes=["gone/"], add_keys=["k3"])
        admin.update_route("split", target=SplitTarget.by_weight({"a": 1, "c": 2}))

    def seen(admin: Admin) -> Any:
        keys = ("k1", "k3", "gone/x", "split/x", "model/y")
        return admin.list_routes(), [admin.resolve(key).route for key in keys]

    async with server_process(CONFIG, tmp_path) as process:
        await ask(process, change_everything)
        before = await ask(process, seen)
        process.send(signal.SIGKILL)
        assert await process.exit_code() == -signal.SIGKILL
    async with server_process(CONFIG, tmp_path) as process:
        assert await ask(process, seen) == before
        assert before[1] == [
            f"routes/{name}" for name in ("promoted", "shadow", "shadow", "split", "model")
        ]
        # Sent again after the crash, it gets its first answer, and ends no other trial.
        await ask(process, lambda admin: admin.abort_canary("ended", request_id="end it"))
        assert await ask(process, seen) == before
