"""The figures of the weights benchmark: how each is worked out, and how good it must be.

Only arithmetic: nothing here measures anything. A figure that could not be measured is None, and
then its bar is missed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

__all__ = [
    "BARS",
    "NOTED",
    "ROOM_BYTES",
    "Bar",
    "beyond_ledger",
    "error_pct",
    "longest_gap_ms",
    "missed",
    "over_limit",
    "over_pct",
    "paired_ratio",
    "slope_per_100",
    "within",
    "worst_error_pct",
]

ROOM_BYTES: Final = 32 << 20
"""What a process that holds models may have beside them: inputs, outputs, what libraries keep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """How good a figure must be.

    Attributes:
        figure: its name in the file.
        limit: the worst value that is good enough.
        at_least: True if more is better.
        text: what it is, for people.
    """

    figure: str
    limit: float
    at_least: bool = False
    text: str

    def is_met(self, value: float | None) -> bool:
        """True if a value is good enough; what is missing or no number is not."""
        if value is None or math.isnan(value):
            return False
        return value >= self.limit if self.at_least else value <= self.limit

    @property
    def shown(self) -> str:
        """The limit, for people."""
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


BARS: Final = (
    Bar(
        figure="reload_vs_from_pretrained",
        limit=10,
        at_least=True,
        text="438 MB, load: from_pretrained / ours",
    ),
    Bar(
        figure="ttfi_vs_from_pretrained",
        limit=1.25,
        at_least=True,
        text="438 MB, load + first inference: from_pretrained / ours",
    ),
    Bar(
        figure="ttfi_vs_steady",
        limit=1.5,
        text="438 MB, ours: load + first inference / steady inference",
    ),
    Bar(
        figure="small_reload_vs_from_pretrained",
        limit=10,
        at_least=True,
        text="small models, load: from_pretrained / ours, the worst",
    ),
    Bar(
        figure="cold_vs_limit",
        limit=1.15,
        text="438 MB off the disk: load + first inference / (read + steady inference)",
    ),
    Bar(
        figure="shared_50_ratio",
        limit=1.15,
        text="fifty fine-tunes: memory / (one encoder + fifty heads)",
    ),
    Bar(
        figure="shared_50_with_cached_ratio",
        limit=1.15,
        text="the same, with all of their files' pages that are in memory",
    ),
    Bar(
        figure="shared_50_ledger_bytes_off",
        limit=0,
        text="fifty fine-tunes: ledger, bytes off the files",
    ),
    Bar(
        figure="rss_over_baseline_pct",
        limit=5,
        text="load/evict cycles: resident set when empty, % over baseline",
    ),
    Bar(
        figure="rss_slope_mb_per_100",
        limit=1,
        text="load/evict cycles: growth over the last half, MB a 100 cycles",
    ),
    Bar(figure="fds_growth", limit=0, text="load/evict cycles: descriptors more"),
    Bar(figure="threads_growth", limit=0, text="load/evict cycles: threads more"),
    Bar(figure="maps_growth", limit=0, text="load/evict cycles: mappings more"),
    Bar(
        figure="p99_during_load_ratio",
        limit=1.5,
        text="p99 of MiniLM while 438 MB models load elsewhere / while none do",
    ),
    Bar(
        figure="stall_ms",
        limit=50,
        text="longest gap of a 1 ms heartbeat on the serving loop meanwhile, ms",
    ),
    Bar(
        figure="measured_vs_ledger",
        limit=1.05,
        text="(memory of workers - baseline - 32 MiB) / ledger, the worst quiet point",
    ),
    Bar(
        figure="price_error_pct",
        limit=0.1,
        text="price before loading against unique storages, %, the worst",
    ),
    Bar(
        figure="activation_error_pct",
        limit=5,
        text="predicted activations against the allocator's peak, %, the worst",
    ),
    Bar(figure="answers_wrong", limit=0, text="answers that were not plain transformers'"),
)
"""Of all figures that have one, in the order in which they are shown."""

NOTED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "promotion_vs_cold": "438 MB, load: off the disk / from a copy on the host tier",
        "promotion_vs_cache": "438 MB, load: from the page cache / from a copy",
        "demote_seconds_per_gb": "making a copy: seconds a GB",
        "tier_rps_vs_none": "cold files, requests/s: with a host tier / without",
        "tier_cold_demotions": "cold files: copies made",
        "tier_cold_promotions": "cold files: loads from copies",
        "tier_warm_copies": "files in the page cache, prices known: copies made",
    }
)
"""Figures that are shown with the others and have no bar, and what they are."""


def missed(figures: Mapping[str, float | None], bars: Iterable[Bar] = BARS) -> list[Bar]:
    """The bars that are not met by what was measured; those of parts that were left out are not."""
    return [bar for bar in bars if bar.figure in figures and not bar.is_met(figures[bar.figure])]


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round.

    The machine's speed drifts over a run, and hardly within a round.

    Raises:
        ValueError: there are no rounds, or not as many of both.
    """
    if not over or len(over) != len(under):
        raise ValueError(f"rounds must come in pairs, got {len(over)} and {len(under)}")
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def over_limit(seconds: Sequence[float], limits: Sequence[float], steady: Sequence[float]) -> float:
    """How much longer something took than it could have: reading from the disk, then a run.

    Args:
        seconds: of each round, all of it.
        limits: of each round, what reading alone took.
        steady: of runs in which nothing is read.
    """
    run = statistics.median(steady)
    return paired_ratio(seconds, [limit + run for limit in limits])


def slope_per_100(values: Sequence[float]) -> float:
    """By how much values grow in a hundred steps: the slope of the line nearest to them, times 100.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError("a slope needs at least two values")
    line = statistics.linear_regression(range(len(values)), values)
    return line.slope * 100


def over_pct(value: float, baseline: float) -> float:
    """How far a value is above its baseline, in percent; negative below it."""
    return (value - baseline) / baseline * 100


def error_pct(said: float, measured: float) -> float:
    """How far what was said is from what was measured, in percent; above it is positive."""
    if measured == 0:
        return 0.0 if said == 0 else math.copysign(math.inf, said)
    return (said - measured) / measured * 100


def worst_error_pct(errors: Iterable[float]) -> float:
    """The one that is farthest from zero, with its sign."""
    return max(errors, key=abs)


def beyond_ledger(memory_bytes: int, ledger_bytes: int, room_bytes: int = ROOM_BYTES) -> float:
    """Memory that is there, as a multiple of what is accounted for.

    Args:
        memory_bytes: of the processes that hold models, above their baseline.
        ledger_bytes: what the ledger says at the same moment; more than 0.
        room_bytes: what is theirs anyway.
    """
    return max(0.0, (memory_bytes - room_bytes) / ledger_bytes)


def within(at_s: float, windows: Iterable[tuple[float, float]]) -> bool:
    """True if a time is in one of the windows, ends included."""
    return any(begin <= at_s <= end for begin, end in windows)


def longest_gap_ms(
    gaps: Iterable[tuple[float, float]], windows: Sequence[tuple[float, float]]
) -> float:
    """The longest gap that ended within a window, in milliseconds; 0 if none did.

    Args:
        gaps: when each ended, and its length, both in seconds.
        windows: when each began and ended, by the same clock.
    """
    return max((length * 1e3 for end, length in gaps if within(end, windows)), default=0.0)
