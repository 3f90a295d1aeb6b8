"""What may go wrong in a timed replay, by seed: loads slow or failed, clocks stalled, cancels."""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["Clock", "Disturbances", "StallingClock", "load_factor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbances:
    """How a replay is disturbed.

    Args:
        seed: of everything random here.
        load_spread: loads take up to this many times as long, and as little as that part; 1 for
            none. Their logarithms are even between the two.
        fail_every: each how many-th load fails, half-way; 0 for none.
        cancel_share: share of the requests that are cancelled at some time, if they are not over.
        cancel_within_s: most seconds from the arrival to the cancel.
        stall_every_s: mean seconds from one stall of the core's clock to the next; 0 for none.
        stall_s: mean seconds that it stands still; then it jumps to the right time.
        audit_every: each how many steps the core's audit runs; 0 for at the end only.

    Raises:
        ValueError: a number is out of range.
    """

    seed: int
    load_spread: float = 1.0
    fail_every: int = 0
    cancel_share: float = 0.0
    cancel_within_s: float = 10.0
    stall_every_s: float = 0.0
    stall_s: float = 0.0
    audit_every: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.load_spread <= 100:
            raise ValueError(f"load_spread is 1 to 100, got {self.load_spread:g}")
        if self.fail_every < 0 or self.audit_every < 0:
            raise ValueError("fail_every and audit_every are 0 or more")
        if self.fail_every == 1:
            raise ValueError("if every load fails nothing is ever served: fail_every is 0 or 2...")
        if not 0 <= self.cancel_share <= 1:
            raise ValueError(f"cancel_share is 0 to 1, got {self.cancel_share:g}")
        if min(self.cancel_within_s, self.stall_every_s, self.stall_s) < 0:
            raise ValueError("seconds are 0 or more")


def load_factor(chance: random.Random, spread: float) -> float:
    """Return how many times as long as it should a load takes."""
    return spread ** chance.uniform(-1.0, 1.0) if spread > 1 else 1.0


class Clock:
    """The core's clock: the virtual time itself."""

    def read(self, at_ns: int) -> int:
        """Return what the clock shows at a virtual time; times of calls must not descend."""
        return at_ns

    def next_reading(self, at_ns: int) -> int:
        """Return the first virtual time after ``at_ns`` at which the clock shows something else."""
        return at_ns + 1


class StallingClock(Clock):
    """A clock that stands still now and then, and then jumps.

    Args:
        chance: when and for how long.
        every_s: mean seconds from the end of a stall to the next.
        stall_s: mean seconds of a stall.
    """

    def __init__(self, chance: random.Random, every_s: float, stall_s: float) -> None:
        self._chance = chance
        self._every_s = every_s
        self._stall_s = stall_s
        self._begin_ns = 0
        self._end_ns = 0
        self._advance()

    def read(self, at_ns: int) -> int:
        """See ``Clock.read``."""
        while at_ns >= self._end_ns:
            self._advance()
        return min(at_ns, self._begin_ns)

    def next_reading(self, at_ns: int) -> int:
        """See ``Clock.next_reading``."""
        return self._end_ns if self.read(at_ns) == self._begin_ns else at_ns + 1

    def _advance(self) -> None:
        pause_s = self._chance.expovariate(1 / self._every_s)
        self._begin_ns = self._end_ns + 1 + int(pause_s * 1e9)
        self._end_ns = self._begin_ns + 1 + int(self._chance.expovariate(1 / self._stall_s) * 1e9)
