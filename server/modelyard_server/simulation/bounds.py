"""The offline bound: seconds of loading that no policy can do without, in the order of the trace.

A linear programme (Berger, Beckmann and Harchol-Balter, "Practical bounds on optimal caching with
variable object sizes", 2018, here with forced admission: a request's own model is always there).
For each interval i between two requests of the same model choose the share x_i, 0 to 1, that is
kept, so that at every request the kept bytes and those of the request's own model fit into the
budget; make the seconds that are saved a maximum. A share of a model is of no use to anybody, which
is why this is a bound and not a schedule.

With the kept bytes at each request as variables of their own each column has at most two entries: a
flow through time, which the solver is quick with. What the solver says is not taken on trust: its
prices for memory make a bound by weak duality whatever they are, and that is what is computed from
them. So the bound holds even if the solver stopped early, and prices of a long trace may come from
pieces of it, each looked at with some of what is before and behind.

Several devices count as one of all their bytes, which can only lower the bound; ``pools`` says of
which devices that need not be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modelyard_server.simulation.intervals import Intervals, find_intervals
from modelyard_server.simulation.outcome import Progress
from modelyard_server.simulation.trace import Floats, Integers, Trace

if TYPE_CHECKING:
    import highspy

__all__ = ["BoundUnavailable", "LowerBound", "lower_bound"]

_MEBIBYTE: Final = float(1 << 20)
_PIECE: Final = 20_000
_MARGIN: Final = 5_000
_ROUNDING: Final = 1e-12


class BoundUnavailable(Exception):
    """There is no bound: the solver is not installed, or found none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowerBound:
    """A bound and what the solver found.

    Args:
        load_s: no schedule of the trace loads for fewer seconds.
        kept: float64[intervals], the share of each interval that the programme keeps; None if it
            was solved in pieces.
    """

    load_s: float
    kept: Floats | None


def lower_bound(
    trace: Trace,
    budget_bytes: int,
    *,
    time_limit_s: float | None = None,
    progress: Progress | None = None,
) -> LowerBound:
    """Compute the bound.

    Args:
        trace: what was wanted, in which order.
        budget_bytes: of all devices together; at least the largest model.
        time_limit_s: of the solver, for each piece. A bound that it had no time for is lower, but
            holds.
        progress: is told how many requests are behind it.

    Raises:
        BoundUnavailable: the package highspy is not installed, or the solver found nothing.
    """
    try:
        import highspy
    except ImportError:
        raise BoundUnavailable(
            "the offline bound needs the package highspy: pip install 'modelyard[simulate]'"
        ) from None
    intervals = find_intervals(trace)
    if len(intervals.first) == 0:
        return LowerBound(load_s=intervals.unavoidable_s, kept=np.zeros(0))
    room = budget_bytes - intervals.needed_bytes
    if room.min() < 0:
        raise ValueError("the budget is smaller than a model")
    kept: Floats | None = None
    if len(trace) <= _PIECE + 2 * _MARGIN:
        kept_mebibytes, prices = _solve(highspy, intervals, room, time_limit_s)
        kept = np.clip(kept_mebibytes * _MEBIBYTE / intervals.size_bytes, 0.0, 1.0)
    else:
        prices = _prices_in_pieces(highspy, intervals, room, time_limit_s, progress)
    saved_s = most_saved_s(intervals, room, prices)
    # What rounding may have added goes off again: nobody may come out below the bound.
    rounding_s = _ROUNDING * intervals.all_loaded_s
    return LowerBound(
        load_s=max(intervals.unavoidable_s, intervals.all_loaded_s - saved_s - rounding_s),
        kept=kept,
    )


def _prices_in_pieces(
    highs: Any,
    intervals: Intervals,
    room: Integers,
    time_limit_s: float | None,
    progress: Progress | None,
) -> Floats:
    """Return prices of room, worked out piece by piece."""
    prices = np.zeros(len(room))
    for begin in range(0, len(room), _PIECE):
        end = min(begin + _PIECE, len(room))
        first, last = max(0, begin - _MARGIN), min(end + _MARGIN, len(room))
        piece = _cut(intervals, first, last)
        if len(piece.first):
            _, found = _solve(highs, piece, room[first:last], time_limit_s)
            prices[begin:end] = found[begin - first : end - first]
        if progress is not None:
            progress(end)
    return prices


def _cut(intervals: Intervals, begin: int, end: int) -> Intervals:
    """Return the intervals within some requests; of one that goes on outside, its part in them."""
    first = np.clip(intervals.first, begin, end - 1)
    last = np.clip(intervals.last, begin, end - 1)
    lengths = intervals.last - intervals.first - 1
    inside = last - first > 1
    share = (last - first - 1) / lengths
    return Intervals(
        first=first[inside] - begin,
        last=last[inside] - begin,
        size_bytes=intervals.size_bytes[inside],
        load_s=(intervals.load_s * share)[inside],
        needed_bytes=intervals.needed_bytes[begin:end],
        unavoidable_s=0.0,
    )


def most_saved_s(intervals: Intervals, room: Integers, prices: Floats) -> float:
    """Return seconds that no schedule saves more than, by prices for memory.

    Whoever keeps something pays for it at each request in between. What all pay together is at most
    what all the room costs, so nobody saves more than that and what is left to the savers.

    Args:
        intervals: what may be kept.
        room: int64[requests], bytes beside the request's own model.
        prices: float64[requests], seconds for each MiB; none is negative.
    """
    paid = np.concatenate(([0.0], np.cumsum(prices)))
    mebibytes = intervals.size_bytes / _MEBIBYTE
    cost = mebibytes * (paid[intervals.last] - paid[intervals.first + 1])
    left = np.maximum(0.0, intervals.load_s - cost)
    return float(left.sum() + (prices * (room / _MEBIBYTE)).sum())


def _solve(
    highs: Any, intervals: Intervals, room: Integers, time_limit_s: float | None
) -> tuple[Floats, Floats]:
    """Return MiB that are kept of each interval, and the price of a MiB of room at each request."""
    # The class below Highs: that one prints a line when it is made, in the midst of --json.
    solver: highspy.Highs = getattr(highs, "_Highs", highs.Highs)()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    if time_limit_s is not None:
        solver.setOptionValue("time_limit", time_limit_s)
    solver.passModel(_programme(highs, intervals, room))
    solver.run()
    solution = solver.getSolution()
    if not solution.dual_valid or not solution.value_valid:
        raise BoundUnavailable(
            "the solver found no offline bound in its time: try fewer requests, such as the "
            "first 20000"
        )
    count = len(intervals.first)
    values = np.asarray(solution.col_value, dtype=np.float64)
    duals = np.asarray(solution.col_dual, dtype=np.float64)
    # Of a maximum the price of an upper limit is not negative, whatever a tolerance makes of it.
    return values[:count], np.maximum(0.0, duals[count:])


def _programme(highs: Any, intervals: Intervals, room: Integers) -> Any:
    """Return the programme in the solver's form.

    Columns: MiB kept of each interval, then MiB kept at each request. A row for each request: what
    is kept at it is what was kept before, and what begins, without what ends.
    """
    count, steps = len(intervals.first), len(room)
    lp = highs.HighsLp()
    lp.num_col_ = count + steps
    lp.num_row_ = steps
    lp.sense_ = highs.ObjSense.kMaximize
    mebibytes = intervals.size_bytes / _MEBIBYTE
    lp.col_cost_ = np.concatenate((intervals.load_s / mebibytes, np.zeros(steps)))
    lp.col_lower_ = np.zeros(count + steps)
    lp.col_upper_ = np.concatenate((mebibytes, room / _MEBIBYTE))
    lp.row_lower_ = np.zeros(steps)
    lp.row_upper_ = np.zeros(steps)
    # An interval's bytes come in at the request behind its first and go out at its last.
    interval_rows = np.column_stack((intervals.first + 1, intervals.last)).ravel()
    interval_values = np.tile((-1.0, 1.0), count)
    # What is kept at a request counts there, and is what the next one begins with.
    at = np.arange(steps)
    step_rows = np.column_stack((at, at + 1)).ravel()[:-1]
    step_values = np.tile((1.0, -1.0), steps)[:-1]
    lp.a_matrix_.format_ = highs.MatrixFormat.kColwise
    starts = np.concatenate((2 * np.arange(count + steps), [2 * (count + steps) - 1]))
    lp.a_matrix_.start_ = starts.astype(np.int32)
    lp.a_matrix_.index_ = np.concatenate((interval_rows, step_rows)).astype(np.int32)
    lp.a_matrix_.value_ = np.concatenate((interval_values, step_values))
    return lp
