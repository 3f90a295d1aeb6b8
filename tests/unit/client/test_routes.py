"""Targets of routes in the client: what is refused here, and what goes over the wire and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
from tests.support.fake_api import FakeServer

from modelyard import (
    Admin,
    Branch,
    Canary,
    Combine,
    EnsembleTarget,
    FallbackTarget,
    Member,
    ModelTarget,
    RouteTarget,
    SequenceStep,
    SequenceTarget,
    ShadowTarget,
    SplitTarget,
    Transform,
    Version,
    VersionsTarget,
)
from modelyard._target_messages import put_target, target_from
from modelyard.v1 import route_pb2

VERSIONS = VersionsTarget.of({"v1": "a", "v2": "routes/r"}, current="v1")


TARGETS: list[tuple[RouteTarget, dict[str, Any]]] = [
    (ModelTarget(model="m"), {"model": "models/m"}),
    (
        SplitTarget.by_weight({"a": 0, "routes/r": 10}),
        {
            "split": {
                "branches": [
                    {"name": "a", "target": "models/a", "weight": 0},
                    {"name": "r", "target": "routes/r", "weight": 10},
                ]
            }
        },
    ),
    (
        SequenceTarget(
            steps=[
                SequenceStep(target="a"),
                SequenceStep(
                    transform=Transform(name="top_k", parameters={"k": 3, "x": [True, None]}),
                    name="best",
                    rename={"score": "s"},
                ),
            ]
        ),
        {
            "sequence": {
                "steps": [
                    {"target": "models/a"},
                    {
                        "transform": {
                            "name": "top_k",
                            "parameters": {"k": 3, "x": [True, None]},
                        },
                        "name": "best",
                        "rename": {"score": "s"},
                    },
                ]
            }
        },
    ),
    (
        EnsembleTarget(members=[Member(name="x", target="a", weight=0.5)], combine=Combine.ALL),
        {
            "ensemble": {
                "members": [{"name": "x", "target": "models/a", "weight": 0.5}],
                "combine": "all",
            }
        },
    ),
    (
        ShadowTarget(target="a", shadow="b", sample=0.5),
        {"shadow": {"target": "models/a", "shadow": "models/b", "sample": 0.5}},
    ),
    (
        FallbackTarget(targets=["a", "routes/r"], prefer_warm=True),
        {"fallback": {"targets": ["models/a", "routes/r"], "prefer_warm": True}},
    ),
    (
        VersionsTarget(
            versions=VERSIONS.versions,
            current="stable",
            aliases={"stable": "v1"},
            canary=Canary(version="v2", percent=0),
        ),
        {
            "versions": {
                "versions": [
                    {"name": "v1", "target": "models/a"},
                    {"name": "v2", "target": "routes/r"},
                ],
                "current": "stable",
                "aliases": {"stable": "v1"},
                "canary": {"version": "v2", "percent": 0},
            }
        },
    ),
]


@pytest.mark.parametrize(("target", "written"), TARGETS)
def test_a_target_goes_over_the_wire_and_back_and_is_written_as_the_file_has_it(
    target: RouteTarget, written: dict[str, Any]
) -> None:
    message = route_pb2.Route()
    put_target(message, target)
    assert message.WhichOneof("target") == target.kind
    assert target_from(route_pb2.Route.FromString(message.SerializeToString())) == target
    assert target.to_dict() == written
    hash(target)


def test_what_this_version_does_not_know_is_told_as_such() -> None:
    assert target_from(route_pb2.Route()) is None
    newer = route_pb2.Route()
    newer.sequence.steps.add(target="models/a")
    newer.sequence.steps.add(name="a step of another kind")
    assert target_from(newer) is None
    newer.ensemble.members.add(name="x", target="models/a")
    newer.ensemble.combine = 99  # type: ignore[assignment]  # a number of another version
    found = target_from(newer)
    assert isinstance(found, EnsembleTarget)
    assert (found.combine, found.members[0].weight) == (Combine.UNKNOWN, 1.0)
    with pytest.raises(ValueError, match="only ever read"):
        put_target(route_pb2.Route(), found)


WRONG: Any = object()


def split(**fields: Any) -> SplitTarget:
    given: dict[str, Any] = {"name": "x", "target": "a", "weight": 1} | fields
    return SplitTarget(branches=[Branch(**given)])


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: ModelTarget(model=WRONG), TypeError),
        (lambda: Branch(name="x", target=WRONG, weight=1), TypeError),
        (lambda: SplitTarget(branches=cast("Any", "ab")), TypeError),
        (lambda: SplitTarget(branches=WRONG), TypeError),
        (lambda: SequenceStep(), ValueError),
        (lambda: SequenceStep(target="a", transform=Transform(name="x")), ValueError),
        (lambda: SequenceStep(target="a", rename=WRONG), TypeError),
        (lambda: Transform(name="x", parameters=WRONG), TypeError),
        (lambda: EnsembleTarget(members=[], combine=cast("Any", "median")), ValueError),
        (lambda: FallbackTarget(targets="ab"), TypeError),
        (lambda: FallbackTarget(targets=[WRONG]), TypeError),
        (lambda: Version(name="v", target=WRONG), TypeError),
        (lambda: VersionsTarget(versions=[], current="v", aliases=WRONG), TypeError),
    ],
)
def test_what_no_target_is_made_of_is_refused_at_once(
    make: Callable[[], Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        make()


def test_a_value_does_not_change_with_what_it_was_made_of() -> None:
    branches = [Branch(name="x", target="a", weight=1)]
    parameters = {"k": 1}
    split = SplitTarget(branches=branches)
    transform = Transform(name="top_k", parameters=parameters)
    branches.clear()
    parameters.clear()
    assert len(split.branches) == 1
    assert transform.parameters == {"k": 1}
    with pytest.raises(TypeError):
        transform.parameters["k"] = 2  # type: ignore[index]  # the point of the test


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda admin: admin.create_route("r", ["k"]), ValueError),
        (lambda admin: admin.create_route("r", ["k"], model="m", target=VERSIONS), ValueError),
        (lambda admin: admin.create_route("r", ["k"], target=WRONG), TypeError),
        (lambda admin: admin.create_route("r", "k", model="m"), TypeError),
        (lambda admin: admin.create_route("r", model="m", prefixes="p"), TypeError),
        (
            lambda admin: admin.create_route(
                "r",
                ["k"],
                target=SplitTarget(branches=[Branch(name=cast("Any", 1), target="a", weight=1)]),
            ),
            TypeError,
        ),
        (
            lambda admin: admin.create_route(
                "r",
                ["k"],
                target=SplitTarget(
                    branches=[Branch(name="x", target="a", weight=cast("Any", 0.5))]
                ),
            ),
            TypeError,
        ),
        (lambda admin: admin.update_route("r"), ValueError),
        (lambda admin: admin.update_route("r", model="m", target=VERSIONS), ValueError),
        (lambda admin: admin.update_route("r", target=VERSIONS, current="v1"), ValueError),
        (lambda admin: admin.update_route("r", model="m", canary=None), ValueError),
        (lambda admin: admin.update_route("r", canary=WRONG), TypeError),
        (lambda admin: admin.update_route("r", prefixes="p"), TypeError),
        (lambda admin: admin.promote_canary(WRONG), TypeError),
        (lambda admin: admin.abort_canary("r", request_id="é"), ValueError),
        (lambda admin: admin.resolve("k", affinity=WRONG), TypeError),
        (lambda admin: admin.resolve("k", version=WRONG), TypeError),
    ],
)
def test_what_cannot_be_sent_is_refused_before_it_is(
    server: FakeServer, call: Callable[[Admin], object], error: type[Exception]
) -> None:
    with Admin(server.address) as admin, pytest.raises(error):
        call(admin)
    assert not server.requests
