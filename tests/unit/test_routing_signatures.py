"""What is known of plans before they are carried out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from modelyard_server.catalog.model import Model
from modelyard_server.errors import Reason, Refusal
from modelyard_server.routing.resolve import Absent, Beside, Chain, Group, Part, Plan, Run, Try
from modelyard_server.routing.signatures import can_answer, models_of_plan, signature_of_plan
from modelyard_server.routing.targets import Transform
from modelyard_server.runtimes.signature import ANY, Signature, TensorKind
from modelyard_server.runtimes.tensors import DType


def run(name: str) -> Run:
    return Run(cast(Model, SimpleNamespace(id=name)), "", "")


A, B, C = run("a"), run("b"), run("c")
GONE = Absent(Refusal(Reason.MODEL_NOT_FOUND, "gone"), "")


def part(does: Plan | Transform, name: str = "p") -> Part:
    return Part(name, does, {})


CUT = part(Transform("cut"))


@pytest.mark.parametrize(
    ("plan", "able", "wanted"),
    [
        (A, "a", True),
        (A, "b", False),
        (GONE, "abc", False),
        (Chain((part(A), CUT, part(B))), "ab", True),
        (Chain((part(A), CUT, part(B))), "a", False),
        (Chain((part(A), part(GONE))), "abc", False),
        (Group((part(A), part(B)), "all"), "ab", True),
        (Group((part(A), part(B)), "all"), "b", False),
        (Try((A, B)), "b", True),
        (Try((A, B)), "c", False),
        (Try((A, GONE)), "a", True),
        (Try((A, B), drawn=True), "b", False),
        (Try((A, B), drawn=True), "ab", True),
        (Beside(A, B), "a", True),
        (Beside(A, B), "b", False),
        (Try((Chain((part(A), part(B))), C)), "ac", True),
        (Try((Chain((part(A), part(B))), C), drawn=True), "ac", False),
    ],
)
def test_a_plan_can_answer_if_what_it_needs_can(plan: Plan, able: str, wanted: bool) -> None:
    assert can_answer(plan, lambda model: model.id in able) is wanted


def test_models_of_a_plan_are_each_told_once_and_in_order() -> None:
    plan = Chain((part(B), CUT, part(Try((A, B))), part(Group((part(C), part(A)), "vote"))))
    assert [model.id for model in models_of_plan(plan)] == ["b", "a", "c"]


TEXT = (TensorKind("text", DType.TEXT, (ANY,)),)
NUMBERS = (TensorKind("score", DType.FLOAT32, (ANY, 3)),)
SIGNATURES = {
    "a": Signature(inputs=TEXT, outputs=NUMBERS, is_exact=True),
    "b": Signature(inputs=TEXT, outputs=NUMBERS, is_exact=True),
    "c": Signature(inputs=NUMBERS, outputs=TEXT, is_exact=True),
}


def known(plan: Plan) -> Signature:
    return signature_of_plan(plan, lambda model: SIGNATURES[model.id])


def test_a_chain_takes_what_its_first_model_takes_and_gives_what_its_last_gives() -> None:
    found = known(Chain((part(A), part(C))))
    assert (found.inputs, found.outputs, found.is_exact) == (TEXT, TEXT, True)
    assert found.takes_text


def test_behind_a_transformation_it_is_an_example() -> None:
    for chain in (Chain((CUT, part(A))), Chain((part(A), CUT))):
        found = known(chain)
        assert (found.inputs, found.outputs, found.is_exact) == (TEXT, NUMBERS, False)


def test_of_alternatives_only_what_all_say_is_exact() -> None:
    assert known(Try((A, B))).is_exact
    assert not known(Try((A, C))).is_exact
    assert not known(Try((A, GONE))).is_exact
    assert known(Try((GONE, A))).inputs == TEXT


def test_an_ensemble_of_all_gives_each_members_outputs_by_its_name() -> None:
    found = known(Group((part(A, "one"), part(B, "two")), "all"))
    assert [kind.name for kind in found.outputs] == ["one.score", "two.score"]
    assert found.is_exact
