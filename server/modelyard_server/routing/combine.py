"""How the answers of an ensemble become one. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from modelyard_server.routing.arrays import FLOATS, INTEGERS, array_of, value_of
from modelyard_server.routing.targets import Combine
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue

__all__ = ["MemberAnswer", "combined"]


@dataclass(frozen=True, slots=True)
class MemberAnswer:
    """What a member has answered.

    Attributes:
        name: of the member.
        weight: of its answer, above 0.
        outputs: at least one.
    """

    name: str
    weight: float
    outputs: tuple[TensorValue, ...]


def combined(how: Combine, answers: Sequence[MemberAnswer]) -> tuple[TensorValue, ...]:
    """The answer of an ensemble.

    Args:
        how: see modelyard.v1.Combine.
        answers: of all members, in their order.

    Raises:
        TensorError: the answers cannot be combined so; its text names the members.
    """
    if how == "all":
        return tuple(
            replace(output, name=f"{answer.name}.{output.name}" if output.name else answer.name)
            for answer in answers
            for output in answer.outputs
        )
    combine = {"mean": _mean, "vote": _vote, "concat": _concat}[how]
    results = []
    for position, first in enumerate(answers[0].outputs):
        same = [_same_output(answers[0].name, answer, first, position) for answer in answers]
        results.append(combine(answers, same))
    for answer in answers[1:]:
        if len(answer.outputs) != len(results):
            raise TensorError(
                "",
                f"{answers[0].name} answers with {len(results)} outputs, {answer.name} with "
                f"{len(answer.outputs)}: they cannot be combined by {how}",
            )
    return tuple(results)


def _same_output(
    first_member: str, answer: MemberAnswer, wanted: TensorValue, position: int
) -> TensorValue:
    for output in answer.outputs:
        if output.name == wanted.name:
            return output
    raise TensorError(
        wanted.name, f"is an output of {first_member}, and none of {answer.name} has that name"
    )


def _mean(answers: Sequence[MemberAnswer], values: Sequence[TensorValue]) -> TensorValue:
    first = values[0]
    for answer, value in zip(answers, values, strict=True):
        if value.dtype not in FLOATS:
            raise TensorError(
                value.name, f"of {answer.name} is {value.dtype.value}; a mean needs floating types"
            )
        _check_shape(answers, first, answer, value, value.shape == first.shape)
    whole = sum(answer.weight for answer in answers)
    total = np.zeros(first.shape, np.float64)
    for answer, value in zip(answers, values, strict=True):
        total += array_of(value).astype(np.float64) * (answer.weight / whole)
    return value_of(first.name, first.dtype, total)


def _vote(answers: Sequence[MemberAnswer], values: Sequence[TensorValue]) -> TensorValue:
    first = values[0]
    for answer, value in zip(answers, values, strict=True):
        if value.dtype is not first.dtype or value.dtype not in {*INTEGERS, DType.BOOL, DType.TEXT}:
            raise TensorError(
                value.name,
                f"of {answer.name} is {value.dtype.value}, of {answers[0].name} "
                f"{first.dtype.value}; a vote needs TEXT or integers of one type",
            )
        _check_shape(answers, first, answer, value, value.shape == first.shape)
    ballots = [
        value.data if value.dtype is DType.TEXT else array_of(value).reshape(-1).tolist()
        for value in values
    ]
    winners = [
        _winner(
            [(ballot[i], answer.weight) for answer, ballot in zip(answers, ballots, strict=True)]
        )
        for i in range(len(ballots[0]))
    ]
    if first.dtype is DType.TEXT:
        return replace(first, data=tuple(winners))
    array = np.asarray(winners, array_of(first).dtype).reshape(first.shape)
    return value_of(first.name, first.dtype, array)


def _winner(votes: Sequence[tuple[Any, float]]) -> Any:
    counted: dict[Hashable, float] = defaultdict(float)
    for choice, weight in votes:
        counted[choice] += weight
    # Of as many votes the one that was named first: a dict keeps that order.
    return max(counted, key=counted.__getitem__)


def _concat(answers: Sequence[MemberAnswer], values: Sequence[TensorValue]) -> TensorValue:
    first = values[0]
    for answer, value in zip(answers, values, strict=True):
        fits = bool(value.shape) and value.shape[:-1] == first.shape[:-1]
        _check_shape(answers, first, answer, value, fits and value.dtype is first.dtype)
    shape = (*first.shape[:-1], sum(value.shape[-1] for value in values))
    if not isinstance(first.data, bytes):
        rows = 1
        for size in first.shape[:-1]:
            rows *= size
        parts: list[Any] = []
        for row in range(rows):
            for value in values:
                width = value.shape[-1]
                parts += value.data[row * width : (row + 1) * width]
        return replace(first, shape=shape, data=tuple(parts))
    array = np.concatenate([array_of(value) for value in values], axis=-1)
    return value_of(first.name, first.dtype, array)


def _check_shape(
    answers: Sequence[MemberAnswer],
    first: TensorValue,
    answer: MemberAnswer,
    value: TensorValue,
    fits: bool,
) -> None:
    if not fits:
        raise TensorError(
            value.name,
            f"of {answer.name} is {value.dtype.value} {list(value.shape)}, of {answers[0].name} "
            f"{first.dtype.value} {list(first.shape)}: they do not go together",
        )
