"""What workers say of runs: it crosses as it is, and is not believed if it cannot be."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest

from modelyard_server.execution.workers.measurements import (
    decode_estimate,
    decode_points,
    encode_estimate,
    encode_points,
)
from modelyard_server.weights.activation_model import ActivationModel, ActivationPoint, RunEstimate


def across(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_measurements_cross() -> None:
    points = (ActivationPoint(1, 1, 0), ActivationPoint(2**40, 7, 2**50))
    assert decode_points(across(encode_points(points))) == points
    assert decode_points(across(encode_points(()))) == ()


def test_estimates_cross() -> None:
    points = [ActivationPoint(1, 511, 97), ActivationPoint(8, 255, 1_003), ActivationPoint(8, 9, 3)]
    full = RunEstimate(
        key="k" * 80, model=ActivationModel.fit(points), largest_batch=8, largest_length=512
    )
    assert decode_estimate(across(encode_estimate(full))) == full
    assert decode_estimate(across(encode_estimate(RunEstimate()))) == RunEstimate()
    assert decode_estimate(across(encode_estimate(None))) is None


@pytest.mark.parametrize(
    "wrong",
    [
        5,
        [5],
        [[1, 1]],
        [[1, 1, 1, 1]],
        [[0, 1, 1]],
        [[1, -1, 1]],
        [[1, 1, -1]],
        [[1, 1, 1.5]],
        [[True, 1, 1]],
        [["1", 1, 1]],
        [[1, 1, 2**62 + 1]],
        [[1, 1, 1]] * 4_097,
    ],
)
def test_what_is_no_measurement_is_refused(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        decode_points(wrong)


ZERO = [[0, 1], [0, 1], [0, 1]]


@pytest.mark.parametrize(
    "wrong",
    [
        5,
        ["k", 1, 1],
        [5, 1, 1, ZERO],
        ["k" * 257, 1, 1, ZERO],
        ["k", 0, 1, ZERO],
        ["k", 1, 2.0, ZERO],
        ["k", 1, 1, ZERO[:2]],
        ["k", 1, 1, [[1, 0], [0, 1], [0, 1]]],
        ["k", 1, 1, [[-1, 1], [0, 1], [0, 1]]],
        ["k", 1, 1, [[0.5, 1], [0, 1], [0, 1]]],
        ["k", 1, 1, [[2**63, 1], [0, 1], [0, 1]]],
    ],
)
def test_what_is_no_estimate_is_refused(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        decode_estimate(wrong)


def test_fractions_of_any_length_are_sizes_if_their_value_is_one() -> None:
    long = Fraction(10**200 + 1, 10**199)
    model = ActivationModel(base=long, per_token=Fraction(0), per_pair=Fraction(0))
    runs = RunEstimate(model=model)
    assert decode_estimate(across(encode_estimate(runs))) == runs
