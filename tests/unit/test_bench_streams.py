"""The arithmetic of the streams benchmark, and that its bars can be missed."""

from __future__ import annotations

import pytest
from bench.streams import BARS, OF_PART, WEIGHTS, largest_error_pct, split_shares
from bench.weights_figures import missed


def test_every_bar_belongs_to_a_part() -> None:
    figures = [name for names in OF_PART.values() for name in names]
    assert sorted(figures) == sorted(bar.figure for bar in BARS)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"a": 50, "b": 50}, 0.0),
        ({"a": 49, "b": 51}, 1.0),
        ({"a": 100}, 50.0),
    ],
)
def test_an_error_is_in_points_of_all_requests(counts: dict[str, int], expected: float) -> None:
    assert largest_error_pct(counts, {"a": 1, "b": 1}) == pytest.approx(expected)


def test_shares_come_near_their_weights_and_near_no_others() -> None:
    counts = split_shares("salt", WEIGHTS, [f"u{number}" for number in range(20_000)])
    assert sum(counts.values()) == 20_000
    assert largest_error_pct(counts, WEIGHTS) < 1.5
    # The negative control: weights that are some points off are told apart from these.
    others = {**WEIGHTS, "a": WEIGHTS["a"] + 10}
    assert largest_error_pct(counts, others) > 2


def test_a_figure_beyond_its_bar_is_missed() -> None:
    good = {"stream_vs_unary": 2.5, "split_max_error_pct": 0.5, "split_disagreements": 0}
    assert missed(good, BARS) == []
    for figure, value in (
        ("stream_vs_unary", 2.4),
        ("split_max_error_pct", 0.6),
        ("split_disagreements", 1),
    ):
        assert [bar.figure for bar in missed({**good, figure: value}, BARS)] == [figure]
