"""What came of a replay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from modelyard_server.simulation.trace import Floats

__all__ = ["Outcome", "Progress", "hit_ratio_over_time", "load_seconds_over_time"]

Progress = Callable[[int], None]
"""Is told now and then how many requests are over."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """The figures of one replay.

    Args:
        policy: by which policy, or which reference scheduler.
        timed: False if the requests came one after the other, each when the one before was over.
        request_count: requests of the trace.
        served_count: those that ran.
        refused: those that were refused, by reason.
        cancelled_count: those that were cancelled before they ended.
        hit: bool[requests], True where the model was resident at the arrival.
        wait_s: float64[requests], from the arrival to the start of the run; NaN if there was none.
            Empty if not ``timed``.
        load_at: int64[loads], for each load the request that had arrived last when it began.
        load_took_s: float64[loads], how long each took, those that failed included.
        host_load_count: loads from copies in host memory.
        failed_load_count: loads that failed.
        evictions: by cause.
        makespan_s: virtual time from the first arrival to the end of the last request.
        step_count: events of the simulation.
        leader: the rule by which the policy went at the end.
    """

    policy: str
    timed: bool
    request_count: int
    served_count: int
    refused: Mapping[str, int] = field(default_factory=dict)
    cancelled_count: int = 0
    hit: NDArray[np.bool_]
    wait_s: Floats
    load_at: NDArray[np.int64]
    load_took_s: Floats
    host_load_count: int = 0
    failed_load_count: int = 0
    evictions: Mapping[str, int]
    makespan_s: float
    step_count: int
    leader: str = ""

    @property
    def load_count(self) -> int:
        """Loads that began."""
        return len(self.load_took_s)

    @property
    def load_s(self) -> float:
        """Seconds of loading altogether."""
        return math.fsum(self.load_took_s)

    @property
    def hit_ratio(self) -> float:
        """Share of requests that found their model resident."""
        return float(self.hit.mean())

    @property
    def eviction_count(self) -> int:
        """Models that were made to leave."""
        return sum(self.evictions.values())

    def waits(self) -> Floats:
        """Return the waits of the requests that ran, in seconds, ascending."""
        return np.sort(self.wait_s[np.isfinite(self.wait_s)])

    def wait_quantile(self, share: float) -> float:
        """Return the wait that ``share`` of those that ran did not exceed; NaN if none ran."""
        waits = self.waits()
        if len(waits) == 0:
            return float("nan")
        return float(waits[min(len(waits) - 1, int(share * len(waits)))])

    def mean_wait_s(self) -> float:
        """Return the mean wait of the requests that ran, in seconds; NaN if none ran."""
        waits = self.waits()
        return float(waits.mean()) if len(waits) else float("nan")


def hit_ratio_over_time(outcome: Outcome, parts: int = 100) -> tuple[Floats, Floats]:
    """Cut the requests into equal parts.

    Returns:
        float64[parts], the last request of each, counted from 1; float64[parts], its share of hits.
    """
    edges = _edges(outcome.request_count, parts)
    hits = np.concatenate(([0], np.cumsum(outcome.hit)))
    ratios = np.diff(hits[edges]) / np.diff(edges)
    return edges[1:].astype(np.float64), ratios


def load_seconds_over_time(outcome: Outcome, parts: int = 100) -> tuple[Floats, Floats]:
    """Sum up the seconds of loading.

    Returns:
        float64[parts], requests; float64[parts], seconds of the loads that had begun by then.
    """
    edges = _edges(outcome.request_count, parts)
    sums = np.concatenate(([0.0], np.cumsum(outcome.load_took_s)))
    began = np.searchsorted(outcome.load_at, edges[1:], side="left")
    return edges[1:].astype(np.float64), sums[began]


def _edges(count: int, parts: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count, min(parts, count) + 1).astype(np.int64))
