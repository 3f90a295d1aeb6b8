"""Which branch an affinity has, what a split that leans to the warm may do, and plans of routes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard_server.catalog.model import Model
from modelyard_server.catalog.records import Owner
from modelyard_server.catalog.route import Route
from modelyard_server.errors import Reason, Refusal
from modelyard_server.routing.affinity import choose
from modelyard_server.routing.balance import Balance
from modelyard_server.routing.resolve import (
    Absent,
    Beside,
    Chain,
    Group,
    Plan,
    Run,
    Try,
    plan_of,
    resolve,
    runs_of,
)
from modelyard_server.routing.targets import (
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
)

A, B, C = (Link("models", name) for name in "abc")


# --- Affinity -------------------------------------------------------------------------------------


def test_affinities_are_spread_by_weight() -> None:
    branches = [("a", 70.0), ("b", 29.0), ("c", 1.0)]
    counts = Counter(choose("route", branches, f"user-{i}") for i in range(100_000))
    for i, (_, weight) in enumerate(branches):
        assert abs(counts[i] / 1000 - weight) <= 0.5


def test_an_affinity_has_its_branch_for_ever() -> None:
    # Written down: another version, another machine, another language has to agree.
    branches = [("control", 50.0), ("candidate", 50.0)]
    found = "".join(str(choose("exp", branches, f"user-{i}")) for i in range(32))
    assert found == "11011010010011010110011010100001"


def test_moving_a_percent_of_weight_moves_a_percent_of_affinities() -> None:
    before, after = [("a", 50.0), ("b", 50.0)], [("a", 51.0), ("b", 49.0)]
    moved = Counter(
        (choose("r", before, f"u{i}"), choose("r", after, f"u{i}")) for i in range(100_000)
    )
    assert moved[0, 1] == 0, "nobody leaves the branch that grows"
    assert 700 <= moved[1, 0] <= 1300


def test_a_new_branch_takes_from_others_only_what_it_gets() -> None:
    before, after = [("a", 1.0), ("b", 1.0)], [("a", 1.0), ("b", 1.0), ("c", 1.0)]
    for i in range(5_000):
        new = choose("r", after, f"u{i}")
        assert new == 2 or new == choose("r", before, f"u{i}")


def test_salts_choose_independently() -> None:
    branches = [("a", 1.0), ("b", 1.0)]
    same = sum(
        choose("x", branches, f"u{i}") == choose("y", branches, f"u{i}") for i in range(10_000)
    )
    assert 4_700 <= same <= 5_300


@given(st.lists(st.integers(0, 1_000_000), min_size=1, max_size=8), st.text(max_size=40))
def test_a_branch_without_weight_is_never_chosen(weights: list[int], affinity: str) -> None:
    branches = [(f"b{i}", float(weight)) for i, weight in enumerate(weights)]
    if not any(weights):
        with pytest.raises(ValueError, match="weight of 0"):
            choose("r", branches, affinity)
        return
    assert weights[choose("r", branches, affinity)] > 0


# --- Balance --------------------------------------------------------------------------------------


def test_a_split_leans_no_further_than_it_may() -> None:
    balance = Balance([50, 50], 0.1)
    counts = Counter[int]()
    for i in range(5_000):
        drawn = i % 2
        chosen = balance.instead_of(drawn, [0]) if drawn == 1 else drawn
        balance.note(chosen)
        counts[chosen] += 1
        if i == 99:
            assert counts[1] == 0, "the tolerance of a whole window is used at once"
        if i == 999:
            assert abs(counts[0] / 1000 - 0.6) <= 0.002
    # A thousand later ones may lean as the first did, and no more.
    assert abs(counts[0] / 5000 - 0.6) <= 0.002


def test_without_others_a_split_does_not_lean() -> None:
    assert Balance([1, 1], 1.0).instead_of(1, []) == 1


@given(st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 2))), max_size=300))
def test_a_choice_that_leans_stays_within_the_tolerance(
    draws: list[tuple[int, set[int]]],
) -> None:
    balance, counts = Balance([1, 2, 1], 0.05), [0, 0, 0]
    for total, (drawn, warm) in enumerate(draws):
        chosen = balance.instead_of(drawn, sorted(warm - {drawn}))
        balance.note(chosen)
        counts[chosen] += 1
        if chosen != drawn:
            shares = [0.25, 0.5, 0.25]
            assert counts[chosen] - shares[chosen] * total <= 50 + 1
            assert shares[drawn] * total - counts[drawn] <= 50 + 1


# --- Plans ----------------------------------------------------------------------------------------


class Known:
    """Models a, b and c, and some routes."""

    def __init__(self, **targets: Target) -> None:
        time = datetime(2026, 1, 1, tzinfo=UTC)
        self.routes = {
            name: Route(
                id=name,
                keys=(f"key-{name}",),
                target=target,
                owner=Owner.API,
                created=time,
                updated=time,
                etag='"x"',
            )
            for name, target in targets.items()
        }
        self.models = {name: cast(Model, SimpleNamespace(id=name)) for name in "abc"}

    def routed(self, key: str) -> Route | None:
        return self.routes.get(key.removeprefix("key-"))

    def route_of(self, key: str) -> Route | None:
        return self.routed(key)

    def get_route(self, route_id: str) -> Route:
        if route_id not in self.routes:
            raise Refusal(Reason.ROUTE_NOT_FOUND, f"there is no route {route_id!r}")
        return self.routes[route_id]

    def get(self, model_id: str) -> Model:
        if model_id not in self.models:
            raise Refusal(Reason.MODEL_NOT_FOUND, f"there is no model {model_id!r}")
        return self.models[model_id]

    def plan(
        self,
        route: str = "r",
        *,
        affinity: str = "someone",
        version: str = "",
        resident: str = "",
        balance: Balance | None = None,
        draw: Callable[[], str] | None = None,
    ) -> Plan:
        return plan_of(
            self,
            self.routes[route],
            affinity=affinity,
            version=version,
            is_resident=lambda model: model.id in resident,
            balance_of=lambda _, split: (
                balance or Balance([b.weight for b in split.branches], split.warm_tolerance)
            ),
            **({} if draw is None else {"draw": draw}),
        )


def told(plan: Plan) -> list[tuple[str, str, str]]:
    return [(run.model.id, run.branch, run.version) for run in runs_of(plan)]


def test_a_split_leads_to_the_branch_of_the_affinity() -> None:
    known = Known(r=Split((Branch("x", A, 1), Branch("y", B, 1))))
    for i in range(50):
        expected = ["a", "b"][choose("r", [("x", 1.0), ("y", 1.0)], f"u{i}")]
        assert told(known.plan(affinity=f"u{i}")) == [
            (expected, "x" if expected == "a" else "y", "")
        ]


def test_a_salt_takes_the_place_of_the_route() -> None:
    split = Split((Branch("x", A, 1), Branch("y", B, 1)), salt="s")
    known = Known(r=split, other=split)
    for i in range(50):
        assert told(known.plan("r", affinity=f"u{i}")) == told(
            known.plan("other", affinity=f"u{i}")
        )


def test_a_request_without_affinity_goes_to_the_warm_one_and_one_with_does_not() -> None:
    known = Known(r=Split((Branch("x", A, 1), Branch("y", B, 1)), warm_tolerance=0.2))
    balance = Balance([1, 1], 0.2)
    numbers = (str(i) for i in itertools.count())
    found = Counter(
        told(known.plan(affinity="", resident="b", balance=balance, draw=lambda: next(numbers)))[0][
            0
        ]
        for _ in range(1000)
    )
    assert 680 <= found["b"] <= 702
    stuck = {told(known.plan(affinity="u1", resident=r, balance=balance))[0][0] for r in ("a", "b")}
    assert len(stuck) == 1


def test_routes_lead_to_routes() -> None:
    known = Known(
        r=Split((Branch("old", A, 0), Branch("new", Link("routes", "inner"), 1))),
        inner=Versions((Version("v1", B), Version("v2", C)), current="v2"),
    )
    assert told(known.plan()) == [("c", "new", "v2")]


def test_what_is_not_there_is_told_by_who_asks_for_it() -> None:
    known = Known(r=Fallback((Link("models", "gone"), Link("routes", "gone"), A)))
    plan = known.plan()
    assert isinstance(plan, Try)
    gone, lost, there = plan.options
    assert isinstance(gone, Absent) and gone.refusal.reason is Reason.MODEL_NOT_FOUND
    assert isinstance(lost, Absent) and lost.refusal.reason is Reason.ROUTE_NOT_FOUND
    assert isinstance(there, Run) and there.branch == "a"


def test_a_circle_that_a_file_may_hold_ends() -> None:
    known = Known(r=Fallback((A, Link("routes", "s"))), s=Fallback((B, Link("routes", "r"))))
    assert [model for model, _, _ in told(known.plan())] == ["a", "b"] * 4


def test_a_sequence_is_steps_and_an_ensemble_members() -> None:
    steps = (
        Step("embed", A),
        Step("", Transform("pooling")),
        Step("classify", B, {"embedding": "x"}),
    )
    known = Known(r=Sequence(steps), e=Ensemble((Member("one", A), Member("two", B, 2.0)), "mean"))
    chain = known.plan()
    assert isinstance(chain, Chain)
    assert [step.name for step in chain.steps] == ["embed", "1", "classify"]
    assert chain.steps[2].rename == {"embedding": "x"}
    assert told(chain) == [("a", "embed", ""), ("b", "classify", "")]
    group = known.plan("e")
    assert isinstance(group, Group)
    assert [(m.name, m.weight) for m in group.members] == [("one", 1.0), ("two", 2.0)]


def test_a_shadow_gets_its_share() -> None:
    known = Known(r=Shadow(A, B, 0.25))
    plans = [known.plan(affinity=f"u{i}") for i in range(4_000)]
    assert all(told(plan) == [("a", "", "")] for plan in plans)
    tried = [plan for plan in plans if isinstance(plan, Beside) and plan.shadow is not None]
    assert 900 <= len(tried) <= 1100
    assert {plan.shadow.model.id for plan in tried if plan.shadow is not None} == {"b"}
    always = Known(r=Shadow(A, B, 1.0)).plan()
    assert isinstance(always, Beside) and always.shadow is not None


def test_versions_have_names_aliases_and_a_canary() -> None:
    target = Versions(
        (Version("v1", A), Version("v2", B), Version("v3", C)),
        current="stable",
        aliases={"stable": "v1", "next": "v2"},
        canary=Canary("next", 10.0),
    )
    known = Known(r=target)
    assert told(known.plan(version="v3")) == [("c", "", "v3")]
    assert told(known.plan(version="next")) == [("b", "", "v2")]
    found = Counter(told(known.plan(affinity=f"u{i}"))[0][2] for i in range(5_000))
    assert set(found) == {"v1", "v2"}
    assert 420 <= found["v2"] <= 580
    with pytest.raises(Refusal, match="no version 'v9': there are v1, v2, v3") as caught:
        known.plan(version="v9")
    assert caught.value.reason is Reason.INVALID_FIELD


def test_growing_a_canary_moves_nobody_back() -> None:
    def at(percent: float) -> Known:
        versions = (Version("v1", A), Version("v2", B))
        return Known(r=Versions(versions, "v1", canary=Canary("v2", percent)))

    small, large = at(5), at(20)
    for i in range(3_000):
        if told(small.plan(affinity=f"u{i}"))[0][0] == "b":
            assert told(large.plan(affinity=f"u{i}"))[0][0] == "b"


def test_a_version_is_refused_where_nothing_has_versions() -> None:
    with pytest.raises(Refusal, match="routes/r has no versions"):
        Known(r=Split((Branch("x", A, 1), Branch("y", B, 1)))).plan(version="v1")


# --- Keys -----------------------------------------------------------------------------------------


def test_a_key_means_a_model_or_a_route() -> None:
    known = Known(r=Fallback((A, B)), one=One("a"), lost=One("gone"))
    table = {"own": known.models["b"]}
    assert resolve(table, known, "own") is known.models["b"]
    assert resolve(table, known, "key-r") is known.routes["r"]
    assert resolve(table, known, "key-one") is known.models["a"]
    for key in ("key-lost", "nothing"):
        with pytest.raises(Refusal) as caught:
            resolve(table, known, key)
        assert caught.value.reason is Reason.KEY_NOT_FOUND
    with pytest.raises(Refusal) as caught:
        resolve(table, known, "no key")
    assert caught.value.reason is Reason.INVALID_FIELD
