"""The figures of the thrash benchmark: how good each must be, and how it is worked out.

Only arithmetic: nothing here measures anything.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.weights_figures import Bar

__all__ = [
    "BARS",
    "Answer",
    "LoadInstance",
    "Turn",
    "answers_of",
    "arrival_us",
    "fair_shares",
    "fairness_summary",
    "jain",
    "loads_summary",
    "overload_summary",
    "passed_by",
    "recovery_s",
]

_LEFT: Final = 0.95
"""Who is told no later than after this part of its time is no refusal but late."""

BARS: Final = (
    Bar(
        figure="geomean_vs_bound",
        limit=1.43,
        text="seconds of loading / offline bound, geometric mean",
    ),
    Bar(
        figure="worst_vs_lru",
        limit=1.03,
        text="seconds of loading / those of LRU, the worst instance",
    ),
    Bar(
        figure="loops_vs_bound",
        limit=1.1,
        text="loops: seconds of loading / offline bound, the worst",
    ),
    Bar(
        figure="rate_vs_fifo_lru",
        limit=2.5,
        at_least=True,
        text="highest rate with a p99 wait of 15 s / that of FIFO and LRU",
    ),
    Bar(
        figure="rate_vs_fcfs_lru",
        limit=1.4,
        at_least=True,
        text="the same / that of per-model FCFS and LRU",
    ),
    Bar(
        figure="rate_vs_fcfs_lru_min",
        limit=1.0,
        at_least=True,
        text="the same, the worst setting",
    ),
    Bar(
        figure="round_robin_loads",
        limit=40,
        text="five models, room for four, 200 requests in turn: loads",
    ),
    Bar(
        figure="zipf_rps_vs_lru_fifo",
        limit=3,
        at_least=True,
        text="20 models, room for five: requests/s / with LRU in order of arrival",
    ),
    Bar(figure="zipf_loads_per_request", limit=0.16, text="the same: loads a request"),
    Bar(
        figure="goodput_5x",
        limit=0.9,
        at_least=True,
        text="five times what it can do: answers in time / those at its peak",
    ),
    Bar(
        figure="overload_refusals_with_retry",
        limit=1,
        at_least=True,
        text="the same: refusals that say when to come again, share",
    ),
    Bar(
        figure="overload_accepted_in_time",
        limit=0.99,
        at_least=True,
        text="the same: answered in time, share of those not refused",
    ),
    Bar(figure="recovery_s", limit=2, text="the same: until all is well afterwards, s"),
    Bar(
        figure="batching_c64",
        limit=2.5,
        at_least=True,
        text="MiniLM, 64 at once on one lane: requests/s / without batching",
    ),
    Bar(
        figure="batching_c1",
        limit=1.05,
        text="MiniLM, one at a time: seconds a request / without batching",
    ),
    Bar(
        figure="fairness_jain",
        limit=0.95,
        at_least=True,
        text="clients with 4 to 128 requests in flight: Jain's index of their answers",
    ),
    Bar(
        figure="fairness_quiet_runs",
        limit=2,
        text="64 in flight of another client: its runs while one asks one at a time, median",
    ),
    Bar(
        figure="fairness_line_share",
        limit=0.95,
        at_least=True,
        text="64 in flight beside many that ask one at a time: answers / an equal share",
    ),
    Bar(
        figure="arrival_us_300",
        limit=5,
        text="an arrival with all shadows, 300 models, us",
    ),
)
"""Of all figures that have one, in the order in which they are shown."""


# --- Seconds of loading


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadInstance:
    """A trace at a budget, and what loading it takes.

    Args:
        name: of the trace.
        share: the budget, of the bytes of all models.
        is_loop: it goes round and round.
        load_s: by the default policy.
        lru_s: by LRU.
        bound_s: no schedule takes less.
        best_s: some schedule that knows the future takes no more; None if none was looked for.
    """

    name: str
    share: float
    is_loop: bool
    load_s: float
    lru_s: float
    bound_s: float
    best_s: float | None = None

    @property
    def vs_bound(self) -> float:
        """Seconds, as a multiple of the bound."""
        return self.load_s / self.bound_s

    @property
    def vs_lru(self) -> float:
        """Seconds, as a multiple of LRU's."""
        return self.load_s / self.lru_s


def loads_summary(instances: Sequence[LoadInstance]) -> dict[str, float]:
    """The figures of all instances.

    Raises:
        ValueError: there are none.
    """
    if not instances:
        raise ValueError("there are no instances")
    figures = {
        "geomean_vs_bound": _mean(one.vs_bound for one in instances),
        "geomean_vs_lru": _mean(one.vs_lru for one in instances),
        "lru_geomean_vs_bound": _mean(one.lru_s / one.bound_s for one in instances),
        "worst_vs_lru": round(max(one.vs_lru for one in instances), 4),
        "load_instances": len(instances),
    }
    loops = [one for one in instances if one.is_loop]
    if loops:
        figures["loops_vs_bound"] = round(max(one.vs_bound for one in loops), 4)
        figures["loops_geomean_vs_bound"] = _mean(one.vs_bound for one in loops)
        best = [one.best_s / one.bound_s for one in loops if one.best_s is not None]
        if best:
            figures["loops_best_offline_vs_bound"] = round(max(best), 4)
    return figures


def _mean(values: Iterable[float]) -> float:
    return round(statistics.geometric_mean(values), 4)


# --- Overload


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of a request that was due at a time.

    Args:
        due_s: when, in seconds of some origin.
        ended_s: when it was over, by the same clock.
        error: what it ended with if it was not answered: the server's reason, or a status code.
        has_retry: the server said when to come again.
    """

    due_s: float
    ended_s: float
    error: str = ""
    has_retry: bool = False

    def is_good(self, deadline_s: float) -> bool:
        """True if it was answered in its time."""
        return not self.error and self.ended_s - self.due_s <= deadline_s

    def is_refused(self, deadline_s: float) -> bool:
        """True if it was told no while it had time left to go elsewhere."""
        return bool(self.error) and self.ended_s - self.due_s < _LEFT * deadline_s


def overload_summary(
    answers: Sequence[Answer], *, begin_s: float, end_s: float, deadline_s: float, peak: float
) -> dict[str, float | None]:
    """The figures of an overload.

    Args:
        answers: of the requests that were due in it.
        begin_s: of it.
        end_s: of it; what is answered later is no goodput of its time.
        deadline_s: of each request.
        peak: answers in time a second, when there was no more than could be done.
    """
    good = [one for one in answers if one.is_good(deadline_s)]
    refused = [one for one in answers if one.is_refused(deadline_s)]
    accepted = [one for one in answers if not one.is_refused(deadline_s)]
    within = sum(one.ended_s <= end_s for one in good)
    goodput = within / (end_s - begin_s)
    waits = sorted(one.ended_s - one.due_s for one in answers if not one.error)
    errors = Counter(one.error for one in answers if one.error)
    figures: dict[str, float | None] = {
        "goodput_5x": round(goodput / peak, 4),
        "goodput_5x_per_s": round(goodput, 2),
        "overload_requests": len(answers),
        "overload_refused": len(refused),
        "overload_late": len(accepted) - len(good),
        "overload_refusals_with_retry": (
            round(sum(one.has_retry for one in refused) / len(refused), 4) if refused else None
        ),
        "overload_accepted_in_time": round(len(good) / len(accepted), 4) if accepted else None,
        "overload_answer_p99_s": (
            round(waits[min(len(waits) - 1, math.ceil(0.99 * len(waits)) - 1)], 4)
            if waits
            else None
        ),
    }
    return figures | {f"overload_{name.lower()}": count for name, count in sorted(errors.items())}


def recovery_s(answers: Iterable[Answer], *, end_s: float, deadline_s: float) -> float:
    """How long after the overload the last request was due that was not answered in its time.

    Args:
        answers: of requests that were due after it.
        end_s: of it.
        deadline_s: of each request.
    """
    bad = [one.due_s - end_s for one in answers if not one.is_good(deadline_s)]
    return round(max(bad, default=0.0), 3)


# --- Fairness


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """An answer, in a list of all answers in the order in which they came.

    Attributes:
        client: who has it.
        asked: how many answers there had been, to anybody, when it was asked for.
        seconds: from the question to the answer.
    """

    client: str
    asked: int
    seconds: float


def jain(amounts: Sequence[float]) -> float:
    """Jain's index of fairness: 1 if all have the same, 1/n if one of n has all.

    Jain, Chiu and Hawe 1984, DEC-TR-301.

    Raises:
        ValueError: nobody has anything.
    """
    squares = sum(amount**2 for amount in amounts)
    if not squares:
        raise ValueError("nobody has anything")
    return sum(amounts) ** 2 / (len(amounts) * squares)


def answers_of(turns: Iterable[Turn], clients: Iterable[str]) -> dict[str, int]:
    """How many answers each client has had, also who had none."""
    counts = Counter(turn.client for turn in turns)
    return {client: counts[client] for client in clients}


def fair_shares(answers: Mapping[str, int]) -> dict[str, float]:
    """What each client has had, as a multiple of an equal part.

    Raises:
        ValueError: nobody has anything.
    """
    total = sum(answers.values())
    if not total:
        raise ValueError("nobody has anything")
    return {client: count * len(answers) / total for client, count in answers.items()}


def passed_by(turns: Sequence[Turn], client: str, other: str, *, later: bool = False) -> list[int]:
    """For each answer of a client, how many of another came between its question and it.

    Args:
        turns: all, in the order in which they came.
        client: who waits.
        other: whose answers count.
        later: only those that were asked for later than it, with at least one answer in between.
    """
    return [
        sum(
            between.client == other and (not later or between.asked > turn.asked)
            for between in turns[turn.asked : place]
        )
        for place, turn in enumerate(turns)
        if turn.client == client
    ]


def fairness_summary(figures: Mapping[str, float], rows: Iterable[int]) -> dict[str, float]:
    """What is said of both servers: the figure of the worse of them.

    Args:
        figures: of each, with a suffix that says how many rows a run has at most.
        rows: of each server.
    """
    worst = {
        "fairness_jain": min,
        "fairness_line_share": min,
        "fairness_quiet_runs": max,
        "fairness_quiet_wait_ratio": max,
    }
    return {
        name: worse(figures[f"{name}_rows_{most}"] for most in rows)
        for name, worse in worst.items()
    }


# --- The core


def arrival_us(report: Mapping[str, Any], policy: str, models: int) -> float:
    """Microseconds of processor time of an arrival, from what google-benchmark wrote.

    Args:
        report: its JSON; with repetitions the median counts.
        policy: whose run.
        models: how many.

    Raises:
        ValueError: there is no such run.
    """
    name = f"BM_ArrivalWithShadows/{policy}/{models}"
    units = {"ns": 1e-3, "us": 1.0, "ms": 1e3}
    times = {
        run.get("aggregate_name", ""): run["cpu_time"] * units[run["time_unit"]]
        for run in report["benchmarks"]
        if run["run_name"] == name
    }
    if not times:
        raise ValueError(f"no run of {name} in the report")
    return round(float(times.get("median", next(iter(times.values())))), 3)
