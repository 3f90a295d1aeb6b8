"""What is wrong with targets: in themselves, and beside models and other routes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard_server.routing import checks
from modelyard_server.routing.checks import (
    DEEPEST,
    beside,
    ensembles_above,
    in_itself,
    missing,
    models_needed,
    only_model,
)
from modelyard_server.routing.step_types import known_signature, steps_that_do_not_meet
from modelyard_server.routing.target_json import read_target
from modelyard_server.routing.targets import (
    Branch,
    Fallback,
    Link,
    One,
    Sequence,
    Split,
    Target,
    Transform,
    links_of,
)


class Others:
    """Models and routes that a test says there are."""

    def __init__(self, models: str, routes: Mapping[str, Target]) -> None:
        self.models = models.split()
        self.routes = routes

    def has_model(self, model_id: str) -> bool:
        return model_id in self.models

    def target_of(self, route_id: str) -> Target | None:
        return self.routes.get(route_id)

    def leading_to(self, link: Link) -> Collection[str]:
        return [
            name
            for name, target in self.routes.items()
            if any(each == link for _, each in links_of(target))
        ]


def split(*links: str, **changes: Any) -> Split:
    branches = tuple(Branch(f"b{i}", Link.of(link), 1) for i, link in enumerate(links))
    return replace(Split(branches), **changes)


def fallback(*links: str) -> Fallback:
    return Fallback(tuple(map(Link.of, links)))


def target_of(kind: str, **fields: Any) -> Target:
    return read_target({kind: fields})


def ensemble(*links: str) -> Target:
    members = [{"name": f"m{i}", "target": link} for i, link in enumerate(links)]
    return target_of("ensemble", members=members, combine="mean")


def sequence(*steps: Any) -> Sequence:
    found = target_of("sequence", steps=[{"target": s} if isinstance(s, str) else s for s in steps])
    assert isinstance(found, Sequence)
    return found


VERSIONS = {
    "versions": [{"name": "v1", "target": "a"}, {"name": "v2", "target": "b"}],
    "current": "v1",
}
POOLING = {"transform": {"name": "pooling"}}

RIGHT: list[Target] = [
    One("a"),
    split("a", "b"),
    split("a", "routes/r", warm_tolerance=1.0, salt="ä"),
    sequence("a", POOLING, {"name": "x", "target": "b", "rename": {"p": "q"}}),
    sequence({"target": "a", "rename": {"": "q"}}),
    ensemble("a", "b"),
    target_of("shadow", target="routes/r", shadow="b", sample=1),
    fallback("a", "a"),
    target_of(
        "versions",
        **VERSIONS,
        aliases={"stable": "v1", "next": "v2"},
        canary={"version": "next", "percent": 100},
    ),
]


@pytest.mark.parametrize("target", RIGHT)
def test_nothing_is_wrong_with_these(target: Target) -> None:
    assert in_itself(target) == []
    others = Others("a b", {"r": One("a")})
    assert missing(target, others) == []
    assert beside("new", target, others) == []


def branch(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "target": "a", "weight": 1} | changes


@pytest.mark.parametrize(
    ("target", "paths"),
    [
        (One("A"), ["model.model"]),
        (split("a"), ["split.branches"]),
        (split(*["a"] * 65), ["split.branches"]),
        (
            target_of(
                "split",
                branches=[branch(weight=-1), branch(name="X", weight=1_000_001), branch()],
                warm_tolerance=1.1,
                salt="a\0b",
            ),
            [
                "split.branches[1].name",
                "split.branches[2].name",
                "split.branches[0].weight",
                "split.branches[1].weight",
                "split.warm_tolerance",
                "split.salt",
            ],
        ),
        (
            target_of("split", branches=[branch(weight=0), branch(name="y", weight=0)]),
            ["split.branches"],
        ),
        (split("a", "b", warm_tolerance=float("nan")), ["split.warm_tolerance"]),
        (split("a", "routes/R"), ["split.branches[1].target"]),
        (sequence(), ["sequence.steps"]),
        (sequence(*["a"] * 17), ["sequence.steps"]),
        (sequence(POOLING), ["sequence.steps"]),
        (sequence({"name": "1", "target": "a"}, "b"), ["sequence.steps[1].name"]),
        (sequence("a", {"name": "a/b", "target": "a"}), ["sequence.steps[1].name"]),
        (
            sequence({"target": "a", "rename": {"": "x", "y": "x", "z": ""}}),
            ["sequence.steps[0].rename"] * 3,
        ),
        (ensemble("a"), ["ensemble.members"]),
        (ensemble(*["a"] * 17), ["ensemble.members"]),
        (
            target_of(
                "ensemble",
                members=[
                    {"name": "m", "target": "a", "weight": 0},
                    {"name": "m", "target": "a", "weight": float("nan")},
                ],
                combine="all",
            ),
            [
                "ensemble.members[1].name",
                "ensemble.members[0].weight",
                "ensemble.members[1].weight",
            ],
        ),
        (target_of("shadow", target="a", shadow="routes/r", sample=1), ["shadow.shadow"]),
        (target_of("shadow", target="a", shadow="b", sample=0), ["shadow.sample"]),
        (target_of("shadow", target="a", shadow="b", sample=1.01), ["shadow.sample"]),
        (fallback("a"), ["fallback.targets"]),
        (fallback(*["a"] * 17), ["fallback.targets"]),
        (
            target_of(
                "versions",
                versions=[],
                current="v",
                aliases={"A": "v", "s": "s"},
                canary={"version": "", "percent": -1},
            ),
            [
                "versions.versions",
                "versions.aliases",
                "versions.aliases.A",
                "versions.aliases.s",
                "versions.current",
                "versions.canary.version",
                "versions.canary.percent",
            ],
        ),
        (
            target_of(
                "versions",
                versions=[{"name": "v", "target": "a"}, {"name": "v", "target": "a"}],
                current="s",
                aliases={"v": "v", "s": "v", "t": "s"},
                canary={"version": "t", "percent": 100.5},
            ),
            [
                "versions.versions[1].name",
                "versions.aliases.v",
                "versions.aliases.t",
                "versions.canary.version",
                "versions.canary.percent",
            ],
        ),
    ],
)
def test_everything_that_is_wrong_in_itself_is_told_at_once(
    target: Target, paths: list[str]
) -> None:
    assert [path for path, _ in in_itself(target)] == paths


def test_transforms_are_asked_about_and_told_where_they_stand() -> None:
    def check(transform: Transform) -> list[tuple[str, str]]:
        return [("parameters.k", f"{transform.name} takes no k")]

    found = in_itself(sequence("a", POOLING), check_transform=check)
    assert found == [("sequence.steps[1].transform.parameters.k", "pooling takes no k")]


def test_what_is_not_there_is_told_with_its_place() -> None:
    others = Others("a", {"r": One("gone")})
    assert missing(split("a", "b", "routes/r", "routes/q"), others) == [
        ("split.branches[1].target", Link("models", "b")),
        ("split.branches[3].target", Link("routes", "q")),
    ]


def test_a_circle_is_told_with_all_that_are_in_it() -> None:
    others = Others("a", {"r": split("a", "routes/q"), "q": fallback("a", "routes/p")})
    assert beside("p", split("routes/p", "routes/r", "a"), others) == [
        ("split.branches[0].target", "leads in a circle: routes/p -> routes/p"),
        (
            "split.branches[1].target",
            "leads in a circle: routes/p -> routes/r -> routes/q -> routes/p",
        ),
    ]


def test_a_way_may_pass_eight_routes_whichever_of_them_is_changed() -> None:
    chain: dict[str, Target] = {
        f"r{i}": fallback("a", f"routes/r{i + 1}") for i in range(1, DEEPEST)
    }
    chain[f"r{DEEPEST}"] = One("a")
    others = Others("a", chain)
    for name, target in chain.items():
        assert beside(name, target, others) == []
    for name, target in (
        ("r0", fallback("a", "routes/r1")),
        ("r8", fallback("a", "routes/new")),
        ("r4", fallback("routes/r5", "routes/deep")),
    ):
        more: dict[str, Target] = {"new": One("a"), "deep": fallback("a", "routes/r5")}
        ((path, text),) = beside(name, target, Others("a", {**chain, **more}))
        assert path.startswith("fallback.targets[")
        assert f"leads through 9 routes; {DEEPEST} may be" in text


@pytest.mark.parametrize(
    ("routes", "model"),
    [
        ({"r": One("a")}, "a"),
        ({"r": sequence("b", POOLING)}, "b"),
        ({"r": sequence("a", "b")}, None),
        ({"r": split("a", "b")}, None),
        ({"r": fallback("a", "b")}, None),
        ({"r": ensemble("a", "b")}, None),
        ({"r": target_of("shadow", target="a", shadow="b", sample=1)}, None),
        ({"r": target_of("versions", **VERSIONS)}, "a"),
        (
            {"r": target_of("versions", **VERSIONS, canary={"version": "v2", "percent": 0})},
            None,
        ),
        ({"r": sequence("routes/q"), "q": One("b")}, "b"),
        ({"r": sequence("routes/q"), "q": split("a", "b")}, None),
    ],
)
def test_a_member_is_one_model_without_choice(routes: dict[str, Target], model: str | None) -> None:
    others = Others("a b", routes)
    assert only_model(Link("routes", "r"), others) == model
    found = beside("new", ensemble("a", "routes/r"), others)
    assert [path for path, _ in found] == ([] if model else ["ensemble.members[1].target"])
    if model:
        assert ensembles_above("new", ensemble("a", "routes/r"), others) == {
            "new": tuple(dict.fromkeys(["a", model]))
        }
    # The same when it is not the ensemble that changes but what it leads to.
    later = Others("a b", {**routes, "r": One("a"), "e": ensemble("b", "routes/r")})
    found = beside("r", routes["r"], later)
    assert [path for path, _ in found] == ([] if model else ["target"])
    assert model or "ensemble.members[1].target of routes/e" in found[0][1]
    if model:
        assert ensembles_above("r", routes["r"], later) == {"e": tuple({"b": 0, model: 0})}


def test_what_every_request_needs() -> None:
    routes: dict[str, Target] = {
        "one": One("a"),
        "seq": sequence("routes/one", "b", POOLING),
        "ens": ensemble("a", "c"),
        "shadow": target_of("shadow", target="routes/seq", shadow="d", sample=1),
        "split": split("a", "b"),
        "versions": target_of("versions", **VERSIONS),
        "mixed": sequence("routes/ens", "routes/split"),
    }
    others = Others("a b c d", routes)

    def needs(name: str) -> tuple[str, ...] | None:
        return models_needed(Link("routes", name), others)

    assert models_needed(Link("models", "x"), others) == ("x",)
    assert [needs(name) for name in ("one", "seq", "ens", "shadow", "versions")] == [
        ("a",),
        ("a", "b"),
        ("a", "c"),
        ("a", "b"),
        ("a",),
    ]
    assert [needs(name) for name in ("split", "mixed", "gone")] == [None] * 3


SIGNATURES = {
    "cls": known_signature("transformers", "text-classification", {}),
    "gen": known_signature("transformers", "text-generation", {}),
    "emb": known_signature("transformers", "feature-extraction", {}),
    "tokens": known_signature("transformers", "feature-extraction", {"pooling": "none"}),
    "mask": known_signature("transformers", "fill-mask", {}),
    "image": known_signature("transformers", "image-classification", {}),
    "echo": known_signature("identity", "", {}),
}


@pytest.mark.parametrize(
    ("steps", "path"),
    [
        (("gen", "cls"), "sequence.steps[1]"),  # Two outputs, and no word which.
        (("gen", {"target": "cls", "rename": {"text": "t"}}), None),
        (("gen", {"target": "cls", "rename": {"token_count": "t"}}), "sequence.steps[1]"),
        (("gen", {"target": "cls", "rename": {"tex": "t"}}), "sequence.steps[1].rename"),
        (("gen", {"target": "cls", "rename": {"": "t"}}), "sequence.steps[1].rename"),
        (("emb", "gen"), "sequence.steps[1]"),
        (("emb", {"target": "echo", "rename": {"": "x"}}), None),
        (("emb", {**POOLING, "rename": {"x": "y"}}), "sequence.steps[1].rename"),
        (("emb", POOLING, "gen"), None),
        (("mask", {"target": "cls", "rename": {"sequence": "t"}}), "sequence.steps[1]"),
        (("image", {"target": "gen", "rename": {"label": "t"}}), None),
        (("gen", {"target": "image", "rename": {"text": "t"}}), "sequence.steps[1]"),
        (("tokens", {"target": "cls", "rename": {"mask": "m"}}), "sequence.steps[1]"),
        (("tokens", {"target": "cls", "rename": {"embedding": "m"}}), "sequence.steps[1].rename"),
        (("echo", "cls"), None),
        (("gen", "echo", "image"), None),
    ],
)
def test_steps_meet_as_far_as_their_tasks_tell(steps: tuple[Any, ...], path: str | None) -> None:
    found = steps_that_do_not_meet(sequence(*steps), lambda link: SIGNATURES.get(link.id))
    assert [each for each, _ in found] == ([path] if path else [])


IDS = tuple("pqrst")


@given(
    st.lists(
        st.tuples(st.sampled_from(IDS), st.lists(st.sampled_from(IDS), max_size=3)), max_size=15
    )
)
def test_whatever_is_accepted_has_no_circle_and_is_not_too_deep(
    steps: list[tuple[str, list[str]]],
) -> None:
    routes: dict[str, Target] = {}
    for name, leads in steps:
        target = fallback("a", *(f"routes/{each}" for each in leads if each in {*routes, name}))
        others = Others("a", routes)
        with patch.object(checks, "DEEPEST", 3):
            found = beside(name, target, others)
        after = {**routes, name: target}
        assert bool(found) == (not is_fine(after, 3))
        if not found:
            routes = after


def is_fine(routes: Mapping[str, Target], deepest: int) -> bool:
    """By walking every way there is."""

    def walk(name: str, way: tuple[str, ...]) -> bool:
        if name in way or len(way) >= deepest:
            return False
        return all(
            walk(link.id, (*way, name))
            for _, link in links_of(routes[name])
            if link.kind == "routes"
        )

    return all(walk(name, ()) for name in routes)
