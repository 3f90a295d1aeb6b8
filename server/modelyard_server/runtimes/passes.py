"""Cuts rows of different width into passes, so that little is computed for padding."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["plan_passes"]


def plan_passes(widths: Sequence[int], *, most_rows: int, pass_cost: int) -> list[list[int]]:
    """Finds the passes that cost least together.

    A pass costs `pass_cost`, and its rows times the width of its longest. Among the cheapest ways
    there is one that takes the rows by width; of these, all are compared.

    Args:
        widths: of the rows, at least one.
        most_rows: most rows of a pass, at least 1.
        pass_cost: of a pass beside its rows, in rows times width.

    Returns:
        The rows of each pass, by position. Rows of one width stay in order.
    """
    order = sorted(range(len(widths)), key=widths.__getitem__)
    if len(order) <= most_rows and widths[order[0]] == widths[order[-1]]:
        return [order]
    # Of the first rows: what they cost at least, and where their last pass begins.
    costs, begins = [0], [0]
    for end in range(1, len(order) + 1):
        width = widths[order[end - 1]]
        cost, begin = min(
            (costs[begin] + (end - begin) * width, begin)
            for begin in range(max(0, end - most_rows), end)
        )
        costs.append(cost + pass_cost)
        begins.append(begin)
    passes = []
    end = len(order)
    while end:
        passes.append(order[begins[end] : end])
        end = begins[end]
    passes.reverse()
    return passes
