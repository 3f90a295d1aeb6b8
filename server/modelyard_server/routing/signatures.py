"""What a plan takes and gives, as far as that of its models tells. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

from modelyard_server.catalog.model import Model
from modelyard_server.routing.resolve import Absent, Beside, Chain, Group, Plan, Run, Try, runs_of
from modelyard_server.routing.targets import Transform
from modelyard_server.runtimes.signature import ANY, Signature, TensorKind

__all__ = ["can_answer", "models_of_plan", "signature_of_plan"]

_NOTHING_KNOWN = Signature(inputs=(), outputs=(), is_exact=False)


def signature_of_plan(plan: Plan, of_model: Callable[[Model], Signature]) -> Signature:
    """What a plan takes and gives.

    Args:
        plan: what requests do.
        of_model: what a model takes and gives.

    Returns:
        Exact only where every way through the plan is exact, and takes and gives the same.
    """
    match plan:
        case Run():
            return of_model(plan.model)
        case Absent():
            return _NOTHING_KNOWN
        case Beside():
            return signature_of_plan(plan.answer, of_model)
        case Try():
            found = [signature_of_plan(option, of_model) for option in plan.options]
            known = [each for each in found if each is not _NOTHING_KNOWN] or [_NOTHING_KNOWN]
            return replace(known[0], is_exact=all(each == known[0] for each in found))
        case Chain():
            return _of_chain(plan, of_model)
        case Group():
            return _of_group(plan, of_model)
        case _:
            assert_never(plan)


def _of_chain(chain: Chain, of_model: Callable[[Model], Signature]) -> Signature:
    first, last = chain.steps[0], chain.steps[-1]
    # Of a transformation at either end it is not known what it takes or gives: the model next to it
    # is an example that has the right types more often than not.
    models = [step.does for step in chain.steps if not isinstance(step.does, Transform)]
    if not models:
        return _NOTHING_KNOWN
    takes = signature_of_plan(models[0], of_model)
    gives = signature_of_plan(models[-1], of_model)
    exact = not (
        isinstance(first.does, Transform) or isinstance(last.does, Transform) or first.rename
    )
    return Signature(
        inputs=takes.inputs,
        outputs=gives.outputs,
        is_exact=exact and takes.is_exact and gives.is_exact,
        shares_runs=takes.shares_runs,
    )


def _of_group(group: Group, of_model: Callable[[Model], Signature]) -> Signature:
    found = [
        (member.name, signature_of_plan(member.does, of_model))
        for member in group.members
        if not isinstance(member.does, Transform)
    ]
    _, first = found[0]
    same = all(
        each.is_exact and (each.inputs, each.outputs) == (first.inputs, first.outputs)
        for _, each in found
    )
    outputs = first.outputs
    match group.combine:
        case "mean" | "vote":
            pass
        case "concat":
            outputs = tuple(
                TensorKind(kind.name, kind.dtype, (*kind.shape[:-1], ANY)) for kind in first.outputs
            )
        case "all":
            same = all(each.is_exact and each.inputs == first.inputs for _, each in found)
            outputs = tuple(
                TensorKind(f"{name}.{kind.name}" if kind.name else name, kind.dtype, kind.shape)
                for name, each in found
                for kind in each.outputs
            )
    return Signature(
        inputs=first.inputs, outputs=outputs, is_exact=same, shares_runs=first.shares_runs
    )


def can_answer(plan: Plan, is_able: Callable[[Model], bool]) -> bool:
    """True if a request would be answered whatever is still to be chosen.

    Args:
        plan: what requests do.
        is_able: whether a model would answer.
    """
    match plan:
        case Run():
            return is_able(plan.model)
        case Absent():
            return False
        case Beside():
            return can_answer(plan.answer, is_able)
        case Try():
            able = [can_answer(option, is_able) for option in plan.options]
            return all(able) if plan.drawn else any(able)
        case Chain(parts) | Group(parts, _):
            return all(
                can_answer(part.does, is_able)
                for part in parts
                if not isinstance(part.does, Transform)
            )
        case _:
            assert_never(plan)


def models_of_plan(plan: Plan) -> tuple[Model, ...]:
    """The models that a plan may run before it answers, each once, in its order."""
    return tuple({run.model.id: run.model for run in runs_of(plan)}.values())
