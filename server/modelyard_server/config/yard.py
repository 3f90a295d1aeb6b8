"""How the yard decides: ``[yard]``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from modelyard_server.config import rules
from modelyard_server.config.rules import Finding
from modelyard_server.config.sections import DAY_S, ascending, check, ruled

__all__ = ["ORDERS", "POLICIES", "YardConfig"]

POLICIES: Final = (
    "ensemble",
    "learned",
    "next-use",
    "due",
    "gap",
    "mix",
    "decay",
    "gdsf",
    "lru",
)
"""The core's eviction policies, the default first: a configuration is checked without the core."""

ORDERS: Final = ("urgency", "fifo")
"""The orders in which requests are served, the default first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class YardConfig:
    """How the yard decides what stays resident and who waits: ``[yard]``.

    Raises:
        ValueError: a field breaks its rule, or two contradict each other.
    """

    policy: str = field(default=POLICIES[0], metadata=ruled(rules.one_of(*POLICIES)))
    """How victims are chosen."""
    order: str = field(default=ORDERS[0], metadata=ruled(rules.one_of(*ORDERS)))
    """Who is served next: whom the yard chooses, or strictly who came first."""
    max_waiting_per_model: int = field(default=1024, metadata=ruled(rules.integer(1, 1_000_000)))
    """Most requests that wait for one model."""
    max_waiting: int = field(default=65536, metadata=ruled(rules.integer(1, 10_000_000)))
    """Most requests that wait altogether."""
    overdue_after_s: float = field(default=30.0, metadata=ruled(rules.seconds(0.001, DAY_S)))
    """A request that has waited this long may make models in use give way, in seconds."""
    backoff_initial_s: float = field(default=1.0, metadata=ruled(rules.seconds(0.001, DAY_S)))
    """How long a model rests after its first failed load, in seconds; doubles with each failure."""
    backoff_max_s: float = field(default=60.0, metadata=ruled(rules.seconds(0.001, DAY_S)))
    """Longest such rest, in seconds."""
    loads_per_device: int = field(default=1, metadata=ruled(rules.integer(1, 64)))
    """Loads that may run on one device at once."""
    explain_capacity: int = field(default=4096, metadata=ruled(rules.integer(1, 1_048_576)))
    """Decisions that are remembered for explanations."""

    def __post_init__(self) -> None:
        check(self)

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Finding]:
        """See ``Section``."""
        yield from ascending(given, "backoff_initial_s", "backoff_max_s")
