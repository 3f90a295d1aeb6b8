"""The figures of lanes: what they count, and how they add up."""

from __future__ import annotations

from dataclasses import fields

from modelyard_server.execution.figures import FIGURE_COUNT, MOST_FIGURE, LaneFigures
from modelyard_server.runtimes.api import Prepared


def request(rows: int, width: int) -> Prepared:
    return Prepared(key=(), rows=rows, width=width, most_rows=64, content=None)


def test_a_batch_is_padded_to_its_widest_request() -> None:
    figures = LaneFigures()
    figures.note_batch([request(2, 10), request(1, 4), request(3, 10)], 0)
    # 6 rows of 10 are computed; the second asked for 4.
    assert (figures.cell_count, figures.padding_cell_count) == (60, 6)
    assert (figures.batch_count, figures.request_count, figures.row_count) == (1, 3, 6)
    assert (figures.largest_request_count, figures.largest_row_count) == (3, 6)
    assert figures.alone_count == 0


def test_one_request_alone_has_no_padding() -> None:
    figures = LaneFigures()
    figures.note_batch([request(5, 7)], 0)
    assert (figures.alone_count, figures.cell_count, figures.padding_cell_count) == (1, 35, 0)


def test_the_largest_batches_need_not_be_the_same() -> None:
    figures = LaneFigures()
    figures.note_batch([request(9, 1)], 0)
    figures.note_batch([request(1, 1), request(1, 1)], 3)
    assert (figures.largest_request_count, figures.largest_row_count) == (2, 9)
    assert figures.split_count == 3


def test_lanes_add_up_and_the_largest_of_them_counts() -> None:
    one = LaneFigures(*range(1, FIGURE_COUNT + 1))
    other = LaneFigures(*(10 * number for number in one.numbers()))
    one.add(other)
    for index, field in enumerate(fields(LaneFigures), 1):
        expected = 10 * index if field.name.startswith("largest_") else 11 * index
        assert getattr(one, field.name) == expected, field.name


def test_sums_end_where_a_message_can_carry_them() -> None:
    figures = LaneFigures(*[MOST_FIGURE] * FIGURE_COUNT)
    figures.add(figures)
    assert set(figures.numbers()) == {MOST_FIGURE}
    assert MOST_FIGURE < 2**63
