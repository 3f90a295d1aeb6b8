"""Rows of different width are cut into the passes that cost least."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard_server.runtimes.passes import plan_passes


def cost_of(passes: list[list[int]], widths: list[int], pass_cost: int) -> int:
    return sum(pass_cost + len(rows) * max(widths[row] for row in rows) for rows in passes)


@pytest.mark.parametrize(
    ("widths", "passes"),
    [
        ([5], [[0]]),
        ([5, 5, 5], [[0, 1, 2]]),
        ([8, 5, 7], [[1, 2, 0]]),
        ([5, 99, 5], [[0, 2], [1]]),
        ([99, 5, 98, 5], [[1, 3], [2, 0]]),
        ([5] * 5, [[0], [1, 2, 3, 4]]),
    ],
)
def test_rows_of_like_width_go_together(widths: list[int], passes: list[list[int]]) -> None:
    assert plan_passes(widths, most_rows=4, pass_cost=32) == passes


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 100)
)
def test_every_row_has_one_place_and_no_pass_has_too_many(
    widths: list[int], most_rows: int, pass_cost: int
) -> None:
    passes = plan_passes(widths, most_rows=most_rows, pass_cost=pass_cost)
    assert sorted(row for rows in passes for row in rows) == list(range(len(widths)))
    assert all(1 <= len(rows) <= most_rows for rows in passes)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(2, 5), st.integers(0, 60))
def test_no_other_way_to_cut_the_rows_by_width_is_cheaper(
    widths: list[int], most_rows: int, pass_cost: int
) -> None:
    made = cost_of(plan_passes(widths, most_rows=most_rows, pass_cost=pass_cost), widths, pass_cost)
    order = sorted(range(len(widths)), key=widths.__getitem__)
    for count in range(len(order)):
        for cuts in combinations(range(1, len(order)), count):
            bounds = [0, *cuts, len(order)]
            passes = [order[a:b] for a, b in pairwise(bounds)]
            if max(map(len, passes)) <= most_rows:
                assert made <= cost_of(passes, widths, pass_cost)
