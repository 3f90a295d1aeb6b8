"""Examples of one key as rows of one request, and its answer as theirs.

A request costs the same for one row as for many, and a small model's run costs next to nothing
beside it. So rows that go together are sent together. Where that goes wrong, because of one of
them or because the model does not answer by row, each is asked for alone: one row's failure stays
its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from modelyard.errors import (
    AnswerTooLarge,
    InvalidRequest,
    ModelFailed,
    ModelyardError,
    ServerError,
    WorkerLost,
)
from modelyard.integrations.beam._asking import AskingSettings, Figures, Predictor, ask, late
from modelyard.prediction import BatchItem, Inputs, Prediction
from modelyard.tensors import Bfloat16, InputValue

__all__ = ["ask_for_rows"]

_OF_ONE_ROW: Final = (InvalidRequest, ModelFailed, AnswerTooLarge, WorkerLost, ServerError)
"""Errors that one row may bring upon its neighbours. Others are of the key, the model or the
server, and would be the same for each."""


def ask_for_rows(
    predictor: Predictor,
    items: Sequence[BatchItem],
    settings: AskingSettings,
    *,
    figures: Figures | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> list[Prediction | ModelyardError]:
    """Ask for items, those of one key together; see ``ask``.

    Items go together if they have the same key, affinity, version and parameters, and inputs of one
    row each, of the same names, types and shapes. At most ``settings.max_rows`` do.
    """
    figures = figures or Figures()
    end_s = clock() + settings.timeout_s
    together = _together(items, settings.max_rows)
    stacked = [_stacked([items[position] for position in group]) for group in together]
    answers = ask(predictor, stacked, settings, figures=figures, sleep=sleep, clock=clock)
    results: list[Any] = [None] * len(items)
    alone: list[int] = []
    for group, answer in zip(together, answers, strict=True):
        rows = [answer] * len(group) if len(group) == 1 else _rows_of(answer, len(group))
        if rows is None:
            alone += group
            continue
        for position, row in zip(group, rows, strict=True):
            results[position] = row
    left_s = end_s - clock()
    if not alone:
        return results
    if left_s > 0:
        again = [items[position] for position in alone]
        left = replace(settings, timeout_s=left_s)
        answers = ask(predictor, again, left, figures=figures, sleep=sleep, clock=clock)
    else:
        answers = [late()] * len(alone)
    for position, answer in zip(alone, answers, strict=True):
        results[position] = answer
    return results


def _together(items: Sequence[BatchItem], most_rows: int) -> list[list[int]]:
    """Positions of items that go together, by the first of them."""
    groups: list[list[int]] = []
    open_groups: dict[Hashable, list[int]] = {}
    for position, item in enumerate(items):
        kind = _kind_of(item.inputs) if most_rows > 1 else None
        if kind is None:
            groups.append([position])
            continue
        like = (item.key, item.affinity, item.version, id(item.parameters), kind)
        group = open_groups.get(like)
        if group is None or len(group) == most_rows:
            group = open_groups[like] = []
            groups.append(group)
        group.append(position)
    return groups


def _kind_of(inputs: Inputs) -> Hashable | None:
    """The same for inputs that can be rows of one request; None for what is not one row."""
    if not isinstance(inputs, Mapping):
        return _row_kind(inputs)
    kinds = tuple((name, _row_kind(value)) for name, value in inputs.items())
    return None if any(kind is None for _, kind in kinds) else kinds


def _row_kind(value: InputValue) -> Hashable | None:
    match value:
        case str() | bytes():
            return type(value)
        case Bfloat16() if value.bits.ndim and len(value.bits) == 1:
            return Bfloat16, value.bits.shape
        case np.ndarray() if value.ndim and len(value) == 1 and value.dtype.kind in "biuf":
            return value.dtype.str, value.shape
        case _:
            return None


def _stacked(items: Sequence[BatchItem]) -> BatchItem:
    if len(items) == 1:
        return items[0]
    first = items[0]
    inputs: Any
    if isinstance(first.inputs, Mapping):
        rows: list[Any] = [item.inputs for item in items]
        inputs = {name: _joined([row[name] for row in rows]) for name in first.inputs}
    else:
        inputs = _joined([item.inputs for item in items])
    return replace(first, inputs=inputs)


def _joined(values: Sequence[Any]) -> InputValue:
    match values[0]:
        case str() | bytes():
            return list(values)
        case Bfloat16():
            return Bfloat16(bits=np.concatenate([value.bits for value in values]))
        case _:
            joined: InputValue = np.concatenate(values)
            return joined


def _rows_of(
    answer: Prediction | ModelyardError, count: int
) -> Sequence[Prediction | ModelyardError] | None:
    """What each of some rows is answered; None if each has to be asked for alone."""
    if isinstance(answer, _OF_ONE_ROW):
        return None
    if isinstance(answer, ModelyardError):
        return [answer] * count
    for value in answer.values():
        bits = value.bits if isinstance(value, Bfloat16) else value
        if (isinstance(bits, np.ndarray) and not bits.ndim) or len(bits) != count:
            return None
    return [
        Prediction({name: _row(value, row) for name, value in answer.items()}, answer.served)
        for row in range(count)
    ]


def _row(value: Any, row: int) -> Any:
    if isinstance(value, Bfloat16):
        return Bfloat16(bits=value.bits[row : row + 1].copy())
    # An array of its own: a view would keep the memory of all of them.
    return value[row : row + 1].copy() if isinstance(value, np.ndarray) else value[row : row + 1]
