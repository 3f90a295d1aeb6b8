"""Replays in which everything goes wrong, by seed: nothing may hang and no request may be lost.

    python -m tests.support.simulated_faults --seeds 1000 --steps 100000

Each seed chooses a made-up trace, devices, a policy and how replays are disturbed: loads take up to
ten times as long, every third fails, the core's clock stands still now and then, requests are
cancelled or have deadlines. The core's audit runs every thousand steps and at the end.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass
from typing import Final

from modelyard_server import _core
from modelyard_server.simulation.disturbances import Disturbances
from modelyard_server.simulation.families import FAMILIES, family_trace
from modelyard_server.simulation.machine import Machine, SimulationError
from modelyard_server.simulation.outcome import Outcome
from modelyard_server.simulation.timed_replay import replay_timed
from modelyard_server.simulation.trace import Trace

__all__ = ["Tally", "check_outcome", "disturbed_replay", "run_seed"]

_TENFOLD: Final = 10**0.5
"""A spread to both sides: from the shortest to the longest load it is ten times."""

_MOST_REQUESTS: Final = 10_000
"""Of one replay: several replays try more than a long one."""


@dataclass(slots=True)
class Tally:
    """What replays came to."""

    steps: int = 0
    requests: int = 0
    served: int = 0
    refused: int = 0
    cancelled: int = 0
    loads: int = 0
    failed_loads: int = 0

    def add(self, outcome: Outcome) -> None:
        """Count an outcome."""
        self.steps += outcome.step_count
        self.requests += outcome.request_count
        self.served += outcome.served_count
        self.refused += sum(outcome.refused.values())
        self.cancelled += outcome.cancelled_count
        self.loads += outcome.load_count
        self.failed_loads += outcome.failed_load_count


def run_seed(seed: int, steps: int) -> Tally:
    """Run replays of a seed until they have taken so many steps.

    Raises:
        SimulationError: a request was lost, a replay hung, or the core's audit failed.
    """
    tally = Tally()
    chance = random.Random(seed)
    while tally.steps < steps:
        # At least two steps for most requests.
        requests = min(_MOST_REQUESTS, (steps - tally.steps) // 2 + 1)
        trace, machine, policy, disturbances = _draw(chance, requests)
        outcome = replay_timed(trace, machine, policy, disturbances)
        check_outcome(outcome)
        tally.add(outcome)
    return tally


def disturbed_replay(seed: int, requests: int) -> Outcome:
    """Run one replay of a seed."""
    trace, machine, policy, disturbances = _draw(random.Random(seed), requests)
    return replay_timed(trace, machine, policy, disturbances)


def check_outcome(outcome: Outcome) -> None:
    """Check that every request ended in exactly one way.

    Raises:
        SimulationError: one did not.
    """
    ended = outcome.served_count + outcome.cancelled_count + sum(outcome.refused.values())
    if ended != outcome.request_count:
        raise SimulationError(f"{outcome.request_count} requests, and {ended} ended")


def _draw(chance: random.Random, requests: int) -> tuple[Trace, Machine, str, Disturbances]:
    family = chance.choice(list(FAMILIES))
    trace = family_trace(
        # More models that are wanted once would make each step slow, and find no more.
        "onehit:0.02" if family == "onehit" else family,
        requests=requests,
        models=chance.randint(2, 60),
        seed=chance.randrange(2**31),
    )
    footprint = trace.footprint_bytes()
    largest = max(trace.models[m].size_bytes for m in trace.used())
    budgets = [int(footprint * chance.uniform(0.02, 0.5)) for _ in range(chance.randint(1, 4))]
    budgets[0] = max(budgets[0], int(largest * chance.uniform(1.0, 1.5)))
    tiered = chance.random() < 0.4
    machine = Machine(
        budgets=tuple(max(1, budget) for budget in budgets),
        host_budget_bytes=int(footprint * chance.uniform(0.05, 0.5)) if tiered else 0,
        slots=chance.choice((1, 2, 4, 16)),
        loads_per_device=chance.choice((1, 1, 2, 4)),
        unload_s=chance.choice((0.0, 0.02, 1.0)),
        deadline_s=chance.choice((None, None, 5.0, 60.0)),
        overdue_after_s=chance.choice((1.0, 30.0)),
        max_waiting=chance.choice((20, 1000)),
    )
    disturbances = Disturbances(
        seed=chance.randrange(2**31),
        load_spread=_TENFOLD,
        fail_every=3,
        cancel_share=chance.choice((0.02, 0.3)),
        cancel_within_s=chance.choice((0.1, 10.0, 100.0)),
        stall_every_s=chance.choice((1.0, 60.0)),
        stall_s=chance.choice((0.1, 5.0)),
        audit_every=1000,
    )
    return trace, machine, chance.choice(_core.POLICIES), disturbances


def main() -> int:
    """Run many seeds; say which one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100_000)
    asked = parser.parse_args()
    failed = []
    total = Tally()
    for seed in range(asked.first, asked.first + asked.seeds):
        try:
            tally = run_seed(seed, asked.steps)
        except (SimulationError, RuntimeError) as error:
            failed.append(seed)
            print(f"seed {seed}: {error}", flush=True)
            continue
        for name in Tally.__slots__:
            setattr(total, name, getattr(total, name) + getattr(tally, name))
        if (seed + 1) % 50 == 0:
            print(f"seed {seed}: {total}", flush=True)
    print(f"{asked.seeds} seeds, {len(failed)} failed {failed}: {total}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
