"""What offline computations look at: for each request, until when its model is wanted again.

Between two requests of the same model the model is either kept or loaded again. Keeping it takes
its bytes at every request in between, each of which needs its own model as well. So an offline
schedule is a choice of intervals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelyard_server.simulation.trace import Floats, Integers, Trace

__all__ = ["Intervals", "find_intervals", "next_requests"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Intervals:
    """The choices of an offline schedule.

    Args:
        first: int64[intervals], the request after which the model is kept or not.
        last: int64[intervals], the next request of the same model; at least two after ``first``.
        size_bytes: int64[intervals], bytes of the model.
        load_s: float64[intervals], what keeping it saves, in seconds.
        needed_bytes: int64[requests], bytes of each request's own model.
        unavoidable_s: seconds of the first load of each model.
    """

    first: Integers
    last: Integers
    size_bytes: Integers
    load_s: Floats
    needed_bytes: Integers
    unavoidable_s: float

    @property
    def all_loaded_s(self) -> float:
        """Seconds of loading if nothing is kept that could be left out."""
        return math.fsum((self.unavoidable_s, *self.load_s))


def next_requests(trace: Trace) -> Integers:
    """Return int64[requests]: the next request of the same model, or the number of requests."""
    count = len(trace)
    following = np.full(count, count, dtype=np.int64)
    order = np.argsort(trace.model, kind="stable")
    models = trace.model[order]
    same = models[:-1] == models[1:]
    following[order[:-1][same]] = order[1:][same]
    return following


def find_intervals(trace: Trace) -> Intervals:
    """Find the choices of an offline schedule of a trace.

    A model that is wanted twice in a row is there for the second request: that is no choice, and
    not among them.
    """
    sizes = np.asarray([model.size_bytes for model in trace.models], dtype=np.int64)
    loads = np.asarray([model.load_s for model in trace.models], dtype=np.float64)
    following = next_requests(trace)
    at = np.arange(len(trace), dtype=np.int64)
    chosen: NDArray[np.bool_] = (following < len(trace)) & (following > at + 1)
    first = at[chosen]
    return Intervals(
        first=first,
        last=following[chosen],
        size_bytes=sizes[trace.model[first]],
        load_s=loads[trace.model[first]],
        needed_bytes=sizes[trace.model],
        unavoidable_s=trace.compulsory_s(),
    )
