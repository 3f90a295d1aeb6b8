"""Gives each request of a batch its rows of what came out. Plain data, no framework."""

from __future__ import annotations

import math
from collections.abc import Sequence

from modelyard_server.runtimes.tensors import TensorValue

__all__ = ["RowsLost", "split_rows"]


class RowsLost(ValueError):
    """An output does not have a row for each row of the inputs."""


def split_rows(
    outputs: Sequence[TensorValue], rows: Sequence[int]
) -> list[tuple[TensorValue, ...]]:
    """Cuts outputs along their first dimension.

    Args:
        outputs: of a batch.
        rows: how many each request brought, in the order of the batch; each at least 1.

    Returns:
        The outputs of each request, in the same order.

    Raises:
        RowsLost: an output has more or fewer rows than all requests together, or none at all.
    """
    total = sum(rows)
    for output in outputs:
        if not output.shape or output.shape[0] != total:
            raise RowsLost(
                f"output {output.name!r} has shape {list(output.shape)} for {total} rows of input"
            )
    if len(rows) == 1:
        return [tuple(outputs)]
    answers: list[tuple[TensorValue, ...]] = []
    begin = 0
    for count in rows:
        answers.append(tuple(_rows_of(output, begin, begin + count) for output in outputs))
        begin += count
    return answers


def _rows_of(output: TensorValue, begin: int, end: int) -> TensorValue:
    # Bytes of a fixed-size type, else elements.
    step = math.prod(output.shape[1:]) * (output.dtype.item_size or 1)
    return TensorValue(
        name=output.name,
        dtype=output.dtype,
        shape=(end - begin, *output.shape[1:]),
        data=output.data[begin * step : end * step],
    )
