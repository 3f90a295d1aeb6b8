"""What a few predictions tell of every batch, and what measurements add."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard_server.weights.activation_model import (
    MAX_CORRECTION,
    ActivationModel,
    ActivationPoint,
)

ROWS = st.integers(1, 4096)
TOKENS = st.integers(1, 2**20)
BYTES = st.integers(0, 2**50)
BATCHES = st.tuples(ROWS, TOKENS)
POINTS = st.lists(st.builds(ActivationPoint, ROWS, TOKENS, BYTES), min_size=2, max_size=4).filter(
    lambda points: len({point.batch * point.length for point in points}) > 1
)
MODELS = POINTS.map(ActivationModel.fit)
OBSERVATIONS = st.lists(st.tuples(ROWS, TOKENS, BYTES), max_size=6)


def bucket(batch: int, length: int) -> tuple[int, int]:
    """Next powers of two."""
    rows = tokens = 1
    while rows < batch:
        rows *= 2
    while tokens < length:
        tokens *= 2
    return rows, tokens


def observed(model: ActivationModel, seen: list[tuple[int, int, int]]) -> ActivationModel:
    for observation in seen:
        model = model.observe(*observation)
    return model


@given(
    st.integers(0, 2**40), st.integers(0, 2**30), st.integers(0, 2**20), BATCHES,
    st.lists(BATCHES, min_size=3, max_size=3, unique=True),
)  # fmt: skip
def test_what_is_such_a_sum_is_told_exactly(
    base: int,
    per_token: int,
    per_pair: int,
    asked: tuple[int, int],
    known: list[tuple[int, int]],
) -> None:
    def size_bytes(batch: int, length: int) -> int:
        return base + per_token * batch * length + per_pair * batch * length * length

    # One length in common and one not, so that each of the three numbers shows.
    (batch, length), (other, longer), _ = known
    places = [(batch, length), (batch + other, length), (batch, length + longer)]
    points = [ActivationPoint(*place, size_bytes(*place)) for place in places]
    assert ActivationModel.fit(points).predict(*asked) == size_bytes(*asked)


@given(POINTS)
def test_it_is_never_below_what_it_was_made_from(points: list[ActivationPoint]) -> None:
    model = ActivationModel.fit(points)
    assert all(model.predict(batch, length) >= size for batch, length, size in points)


@given(st.integers(1, 1000), st.integers(1, 1000), BYTES, BYTES)
def test_two_points_make_a_line_over_tokens(
    tokens: int, more: int, size_bytes: int, larger: int
) -> None:
    points = [
        ActivationPoint(1, tokens, size_bytes),
        ActivationPoint(1, tokens + more, size_bytes + larger),
    ]
    model = ActivationModel.fit(points)
    if size_bytes * more >= larger * tokens:  # else it would cross zero
        assert model.per_pair == 0
        assert model.predict(1, tokens + 2 * more) == size_bytes + 2 * larger
    assert model.predict(1, tokens + 2 * more) >= size_bytes + larger


@given(MODELS, OBSERVATIONS, BATCHES, ROWS, TOKENS)
def test_more_rows_or_tokens_never_take_less(
    model: ActivationModel,
    seen: list[tuple[int, int, int]],
    asked: tuple[int, int],
    rows: int,
    tokens: int,
) -> None:
    model = observed(model, seen)
    batch, length = asked
    known = model.predict(batch, length)
    assert 0 <= known <= model.predict(batch + rows, length)
    assert known <= model.predict(batch, length + tokens)


@given(MODELS, OBSERVATIONS)
def test_it_is_never_below_what_was_measured_in_the_bucket(
    model: ActivationModel, seen: list[tuple[int, int, int]]
) -> None:
    model = observed(model, seen)
    for batch, length, size_bytes in seen:
        assert model.predict(batch, length) >= size_bytes
        rows, tokens = bucket(batch, length)
        assert model.predict(rows // 2 + 1, tokens // 2 + 1) >= size_bytes
        assert model.predict(rows, tokens) >= size_bytes


@given(MODELS, OBSERVATIONS, BATCHES)
def test_a_measurement_raises_other_batches_by_a_bounded_factor_and_lowers_none(
    model: ActivationModel, seen: list[tuple[int, int, int]], asked: tuple[int, int]
) -> None:
    after = observed(model, seen)
    before_bytes, after_bytes = model.predict(*asked), after.predict(*asked)
    highest = max((size_bytes for *_, size_bytes in seen), default=0)
    assert before_bytes <= after_bytes <= max(before_bytes * MAX_CORRECTION, highest)
    assert 1 <= after.correction <= MAX_CORRECTION


@given(MODELS, OBSERVATIONS)
def test_the_order_of_measurements_is_no_matter(
    model: ActivationModel, seen: list[tuple[int, int, int]]
) -> None:
    forth, back = observed(model, seen), observed(model, seen[::-1])
    assert forth.correction == back.correction
    assert forth.measured == back.measured


@given(MODELS, OBSERVATIONS)
def test_what_it_knows_does_not_change_it(
    model: ActivationModel, seen: list[tuple[int, int, int]]
) -> None:
    model = observed(model, seen)
    for observation in seen:
        assert model.observe(*observation) is model
    assert len(model.measured) <= len(seen)


def test_a_measurement_above_the_prediction_corrects_the_others() -> None:
    model = ActivationModel(base=Fraction(0), per_token=Fraction(10), per_pair=Fraction(0))
    after = model.observe(2, 100, 3_000)
    assert after.predict(2, 100) == 3_000
    assert after.predict(8, 1_000) == 120_000
    assert model.predict(8, 1_000) == 80_000, "the earlier one is as it was"


def test_one_wild_measurement_stays_in_its_bucket() -> None:
    model = ActivationModel(base=Fraction(0), per_token=Fraction(10), per_pair=Fraction(0))
    after = model.observe(64, 1_000, 10**12)
    assert after.predict(64, 1_000) == 10**12
    assert after.predict(2, 100) == 2_000 * MAX_CORRECTION


def test_of_nothing_there_is_no_multiple() -> None:
    model = ActivationModel.fit([ActivationPoint(1, 1, 0), ActivationPoint(2, 1, 0)])
    after = model.observe(4, 4, 1_000)
    assert (after.predict(4, 4), after.predict(1, 1)) == (1_000, 0)
    assert after.correction == 1


@pytest.mark.parametrize(
    "points",
    [
        [],
        [ActivationPoint(1, 1, 1)],
        [ActivationPoint(2, 6, 1), ActivationPoint(3, 4, 9)],
        [ActivationPoint(0, 1, 1), ActivationPoint(1, 1, 1)],
        [ActivationPoint(1, -1, 1), ActivationPoint(1, 1, 1)],
        [ActivationPoint(1, 1, -1), ActivationPoint(1, 2, 1)],
    ],
)
def test_too_little_or_impossible_knowledge_is_refused(points: list[ActivationPoint]) -> None:
    with pytest.raises(ValueError, match="batch"):
        ActivationModel.fit(points)


@pytest.mark.parametrize("asked", [(0, 1), (1, 0), (-1, 5)])
def test_batches_that_cannot_be_are_refused(asked: tuple[int, int]) -> None:
    model = ActivationModel.fit([ActivationPoint(1, 1, 1), ActivationPoint(2, 1, 2)])
    with pytest.raises(ValueError, match="no batch has"):
        model.predict(*asked)
    with pytest.raises(ValueError, match="no batch has"):
        model.observe(*asked, 1)
    with pytest.raises(ValueError, match="no batch has"):
        model.observe(1, 1, -1)
