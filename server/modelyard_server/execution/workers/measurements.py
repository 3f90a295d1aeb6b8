"""What runs take, as values of JSON, and back.

What comes back is checked: it was written by the process in which models run. What it may say wrong
is how much its own models take, and no more than a number of 64 bits of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Final

from modelyard_server.weights.activation_model import (
    ActivationModel,
    ActivationPoint,
    RunEstimate,
)

__all__ = ["decode_estimate", "decode_points", "encode_estimate", "encode_points"]

Json = Any

_MAX_POINTS: Final = 4_096
"""More than there are buckets."""

_MAX_NUMBER: Final = 2**62
_MAX_KEY: Final = 256


def encode_points(points: Sequence[ActivationPoint]) -> Json:
    """What was measured."""
    return [list(point) for point in points]


def decode_points(encoded: Json) -> tuple[ActivationPoint, ...]:
    """What was measured. Raises ValueError for what is no batch; TypeError for what is no list."""
    if len(encoded) > _MAX_POINTS:
        raise ValueError(f"{len(encoded)} measurements at once")
    return tuple(
        [
            ActivationPoint(
                _number(batch, least=1), _number(length, least=1), _number(size_bytes, least=0)
            )
            for batch, length, size_bytes in encoded
        ]
    )


def encode_estimate(estimate: RunEstimate | None) -> Json:
    """An estimate before anything was measured."""
    if estimate is None:
        return None
    model = estimate.model
    numbers = (model.base, model.per_token, model.per_pair)
    return [
        estimate.key,
        estimate.largest_batch,
        estimate.largest_length,
        [[number.numerator, number.denominator] for number in numbers],
    ]


def decode_estimate(encoded: Json) -> RunEstimate | None:
    """The estimate. Raises ValueError or TypeError if it is none."""
    if encoded is None:
        return None
    key, batch, length, numbers = encoded
    if not isinstance(key, str) or len(key) > _MAX_KEY:
        raise ValueError("an estimate without a key")
    base, per_token, per_pair = [_fraction(*number) for number in numbers]
    return RunEstimate(
        key=key,
        model=ActivationModel(base=base, per_token=per_token, per_pair=per_pair),
        largest_batch=_number(batch, least=1),
        largest_length=_number(length, least=1),
    )


def _fraction(numerator: Json, denominator: Json) -> Fraction:
    # Both are as large as exact sums over batches make them; what they stand for is not.
    if type(numerator) is not int or type(denominator) is not int or denominator < 1:
        raise ValueError("a number that is no fraction")
    value = Fraction(numerator, denominator)
    if not 0 <= value <= _MAX_NUMBER:
        raise ValueError("a size that is none")
    return value


def _number(value: Json, *, least: int) -> int:
    if type(value) is not int or not least <= value <= _MAX_NUMBER:
        raise ValueError(f"{json.dumps(value)[:40]} is no number of rows, tokens or bytes")
    return value
