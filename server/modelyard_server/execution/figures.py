"""What lanes have run, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Final

from modelyard_server.runtimes.api import Prepared

__all__ = ["FIGURE_COUNT", "MOST_FIGURE", "LaneFigures"]

MOST_FIGURE: Final = 2**62
"""Where sums end: what a broken worker says must not keep others from being told."""


@dataclass(slots=True)
class LaneFigures:
    """What a lane has run, or several lanes together.

    A cell is a row's worth of one step of its width: a token of a text, or whatever else shorter
    rows are padded by.

    Attributes:
        batch_count: runs that requests could share, those included that one had for itself.
        request_count: requests that were in them.
        row_count: their rows.
        largest_request_count: most requests that one of them had.
        largest_row_count: most rows that one of them had.
        alone_count: of request_count, those that had a run for themselves.
        unshared_count: requests that could not share a run; in none of the above.
        split_count: batches that failed and were run again in parts.
        cell_count: cells of all rows, each made as wide as the widest request of its batch. A model
            that cuts a batch into passes by width computes fewer.
        padding_cell_count: of these, those that the rows' own requests did not ask for.
    """

    batch_count: int = 0
    request_count: int = 0
    row_count: int = 0
    largest_request_count: int = 0
    largest_row_count: int = 0
    alone_count: int = 0
    unshared_count: int = 0
    split_count: int = 0
    cell_count: int = 0
    padding_cell_count: int = 0

    def note_batch(self, requests: Sequence[Prepared], split_count: int) -> None:
        """A batch has run.

        Args:
            requests: that were in it; at least one.
            split_count: how often it, or a part of it, failed and was run again in parts.
        """
        rows = sum(request.rows for request in requests)
        cells = rows * max(request.width for request in requests)
        self.batch_count += 1
        self.request_count += len(requests)
        self.row_count += rows
        self.largest_request_count = max(self.largest_request_count, len(requests))
        self.largest_row_count = max(self.largest_row_count, rows)
        self.alone_count += len(requests) == 1
        self.split_count += split_count
        self.cell_count += cells
        self.padding_cell_count += cells - sum(request.rows * request.width for request in requests)

    def add(self, other: LaneFigures) -> None:
        """Adds those of another lane."""
        for field in fields(self):
            mine, others = getattr(self, field.name), getattr(other, field.name)
            both = max(mine, others) if field.name in _LARGEST else mine + others
            setattr(self, field.name, min(both, MOST_FIGURE))

    def numbers(self) -> tuple[int, ...]:
        """All of them, FIGURE_COUNT, in the order in which the class takes them."""
        return astuple(self)


_LARGEST: Final = frozenset({"largest_request_count", "largest_row_count"})

FIGURE_COUNT: Final = len(fields(LaneFigures))
