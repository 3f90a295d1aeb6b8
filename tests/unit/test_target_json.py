"""Targets of routes as JSON: what comes back, and everything that is told of what is none."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard_server.routing.target_json import (
    TargetError,
    path_parts,
    read_target,
    target_to_json,
)
from modelyard_server.routing.targets import (
    KINDS,
    Branch,
    Canary,
    Ensemble,
    Fallback,
    Link,
    Member,
    One,
    Sequence,
    Shadow,
    Split,
    Step,
    Target,
    Transform,
    Version,
    Versions,
    kind_of,
)

NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,8}", fullmatch=True)
LINKS = st.builds(Link, st.sampled_from(["models", "routes"]), NAMES)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
NUMBERS = st.floats(-1e6, 1e6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
STEPS = st.builds(
    Step,
    TEXTS,
    LINKS | st.builds(Transform, TEXTS, st.dictionaries(TEXTS, JSON, max_size=3)),
    st.dictionaries(TEXTS, TEXTS, max_size=2),
)


def few(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(values, max_size=3).map(tuple)


TARGETS: st.SearchStrategy[Target] = st.one_of(
    st.builds(One, NAMES),
    st.builds(Split, few(st.builds(Branch, TEXTS, LINKS, st.integers(-9, 9))), NUMBERS, TEXTS),
    st.builds(Sequence, few(STEPS)),
    st.builds(
        Ensemble,
        few(st.builds(Member, TEXTS, LINKS, NUMBERS)),
        st.sampled_from(["mean", "vote", "concat", "all"]),
    ),
    st.builds(Shadow, LINKS, LINKS, NUMBERS),
    st.builds(Fallback, few(LINKS), st.booleans()),
    st.builds(
        Versions,
        few(st.builds(Version, TEXTS, LINKS)),
        TEXTS,
        st.dictionaries(TEXTS, TEXTS, max_size=2),
        st.none() | st.builds(Canary, TEXTS, NUMBERS),
    ),
)


@given(TARGETS)
def test_a_target_comes_back_as_it_was(target: Target) -> None:
    value = target_to_json(target)
    assert list(value) == [kind_of(target)]
    # Through the text, as in the store: what is no JSON would show.
    read = read_target(json.loads(json.dumps(value)))
    assert read == target
    assert target_to_json(read) == value


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*KINDS, "branches", "steps", "name", "target", "weight", "x"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_whatever_is_read_is_a_target_or_told_with_its_places(value: Any) -> None:
    try:
        target = read_target(value)
    except TargetError as error:
        assert error.findings
        assert all(text and text.isprintable() for _, text in error.findings)
        assert all(path_parts(path) or not path for path, _ in error.findings)
    else:
        assert isinstance(value, Mapping)
        assert kind_of(target) in value


def test_a_bare_id_is_a_models_and_what_has_its_default_is_left_out() -> None:
    split = read_target(
        tomllib.loads(
            """
            [split]
            branches = [{name = "a", target = "m", weight = 1},
                        {name = "b", target = "routes/r", weight = 0}]
            """
        )
    )
    assert split == Split(
        (Branch("a", Link("models", "m"), 1), Branch("b", Link("routes", "r"), 0))
    )
    assert target_to_json(split) == {
        "split": {
            "branches": [
                {"name": "a", "target": "models/m", "weight": 1},
                {"name": "b", "target": "routes/r", "weight": 0},
            ]
        }
    }
    assert read_target({"model": "models/m"}) == read_target({"model": "m"}) == One("m")


SPLIT = {"branches": [{"name": "a", "target": "m", "weight": 1}] * 2}
DEEP: Any = {}
for _ in range(20):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("value", "findings"),
    [
        (None, [("", "must be an object, got null")]),
        ([], [("", "must be an object, got an array")]),
        ({}, [("", "must have exactly one of model, split")]),
        ({"model": "m", "split": SPLIT}, [("", "there is model, split")]),
        ({"splitt": SPLIT}, [("splitt", "unknown field"), ("", "exactly one")]),
        ({"model": 1}, [("model", "must be text, got a number")]),
        ({"model": "routes/r"}, [("model", "must be")]),
        ({"model": "models/"}, [("model", "must be")]),
        ({"split": []}, [("split", "must be an object, got an array")]),
        ({"split": {}}, [("split.branches", "is missing")]),
        ({"split": {"branches": {}}}, [("split.branches", "must be an array, got an object")]),
        (
            {"split": {"branches": ["a"], "warm_tolerance": "1", "salt": 1, "x": 1}},
            [
                ("split.x", "unknown field"),
                ("split.branches[0]", "must be an object, got text"),
                ("split.warm_tolerance", "must be a number, got text"),
                ("split.salt", "must be text, got a number"),
            ],
        ),
        (
            {"split": {"branches": [{"name": None, "target": "x/y", "weight": 1.0, "to": "m"}]}},
            [
                ("split.branches[0].to", "unknown field; known here: name, target, weight"),
                ("split.branches[0].name", "must be text, got null"),
                ("split.branches[0].target", 'must be "models/{model}" or "routes/{route}"'),
                ("split.branches[0].weight", "must be an integer, got a number"),
            ],
        ),
        (
            {"split": {"branches": [{"name": "a", "target": "m", "weight": True}]}},
            [("split.branches[0].weight", "must be an integer, got a boolean")],
        ),
        (
            {"split": {"branches": [{"name": "a", "target": "m", "weight": 10**5000}]}},
            [("split.branches[0].weight", "is out of range")],
        ),
        (
            {"split": {**SPLIT, "salt": "\ud800"}},
            [("split.salt", "must be valid Unicode")],
        ),
        (
            {"sequence": {"steps": [{}, {"target": "m", "transform": {"name": "top_k"}}]}},
            [
                ("sequence.steps[0]", "must have either a target or a transform"),
                ("sequence.steps[1]", "must have either a target or a transform"),
            ],
        ),
        (
            {"sequence": {"steps": [{"target": "m", "rename": {"a": 1}}]}},
            [("sequence.steps[0].rename.'a'", "must be text")],
        ),
        (
            {
                "sequence": {
                    "steps": [
                        {"transform": {"parameters": {"k": [float("nan")], "b": b"x", "d": DEEP}}}
                    ]
                }
            },
            [
                ("sequence.steps[0].transform.name", "is missing"),
                ("sequence.steps[0].transform.parameters.k[0]", "must be a finite number"),
                ("sequence.steps[0].transform.parameters.b", "must be JSON, got a bytes"),
                (f"sequence.steps[0].transform.parameters.d{'.a' * 15}", "nested more than 16"),
            ],
        ),
        (
            {"ensemble": {"members": [{"name": "a", "target": "m", "weight": []}], "combine": "x"}},
            [
                ("ensemble.members[0].weight", "must be a number, got an array"),
                ("ensemble.combine", "must be one of mean, vote, concat, all, got 'x'"),
            ],
        ),
        (
            {"shadow": {"target": "m"}},
            [("shadow.shadow", "is missing"), ("shadow.sample", "is missing")],
        ),
        (
            {"fallback": {"targets": [1, "m"], "prefer_warm": 1}},
            [
                ("fallback.targets[0]", "must be text"),
                ("fallback.prefer_warm", "must be true or false, got a number"),
            ],
        ),
        (
            {"versions": {"versions": [{"name": "a"}], "aliases": [], "canary": {"percent": "5"}}},
            [
                ("versions.current", "is missing"),
                ("versions.versions[0].target", "is missing"),
                ("versions.aliases", "must be an object, got an array"),
                ("versions.canary.version", "is missing"),
                ("versions.canary.percent", "must be a number, got text"),
            ],
        ),
    ],
)
def test_everything_that_is_not_of_its_kind_is_told_with_its_path(
    value: Any, findings: list[tuple[str, str]]
) -> None:
    with pytest.raises(TargetError) as caught:
        read_target(value)
    assert [path for path, _ in caught.value.findings] == [path for path, _ in findings]
    for (_, text), (_, wanted) in zip(caught.value.findings, findings, strict=True):
        assert wanted in text


def test_a_path_has_its_parts() -> None:
    assert path_parts("") == ()
    assert path_parts("split.branches[10].weight") == ("split", "branches", 10, "weight")
