"""A study: one trace, one machine, several policies, and what the offline bound says to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from modelyard_server import _core
from modelyard_server.simulation.baselines import BASELINES, replay_baseline
from modelyard_server.simulation.bounds import BoundUnavailable
from modelyard_server.simulation.machine import Machine
from modelyard_server.simulation.offline import spans_devices
from modelyard_server.simulation.outcome import Outcome, Progress
from modelyard_server.simulation.places import Placing
from modelyard_server.simulation.pools import bound_of_pools, pools_of, schedule_of_pools
from modelyard_server.simulation.serial_replay import replay_serially
from modelyard_server.simulation.timed_replay import replay_timed
from modelyard_server.simulation.trace import Floats, Trace

__all__ = ["BASE_POLICY", "OfflineFigures", "Study", "Watcher", "choose_policies", "run_study"]

BASE_POLICY: Final = "lru"
"""What every policy is compared with."""

_SOLVER_LIMIT_S: Final = 120.0
_NO_SCHEDULE: Final = "no offline schedule is looked for: models are on several devices at once"

Watcher = Callable[[str], Progress | None]
"""Is told what begins, and returns whom to tell how far it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineFigures:
    """What is known of the best there can be, in the order of the trace.

    Args:
        bound_s: no schedule loads for fewer seconds; None if it was not computed.
        schedule_s: some schedule loads for no more; None if none was looked for.
        note: why there is no bound.
        schedule_note: why no schedule was looked for.
    """

    bound_s: float | None = None
    schedule_s: float | None = None
    note: str = ""
    schedule_note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What came of it.

    Args:
        trace: what was replayed.
        machine: on what.
        timed: whether time went by.
        outcomes: of each policy, in the order they were asked for, behind them LRU and then
            reference schedulers to compare with.
        offline: what is known of the optimum.
        placing: who said where the models may be.
        label: what is different here; empty for the first study.
    """

    trace: Trace
    machine: Machine
    timed: bool
    outcomes: tuple[Outcome, ...]
    offline: OfflineFigures
    placing: Placing
    label: str = ""

    def outcome_of(self, policy: str) -> Outcome:
        """Return the outcome of a policy.

        Raises:
            KeyError: it was not replayed.
        """
        for outcome in self.outcomes:
            if outcome.policy == policy:
                return outcome
        raise KeyError(policy)

    def ratio_to_base(self, outcome: Outcome) -> float | None:
        """Return the seconds of loading as a multiple of LRU's; None if LRU loads nothing."""
        base_s = self.outcome_of(BASE_POLICY).load_s
        return outcome.load_s / base_s if base_s > 0 else None

    def ratio_to_bound(self, outcome: Outcome) -> float | None:
        """Return the seconds of loading as a multiple of the bound; None if there is none."""
        bound_s = self.offline.bound_s
        return outcome.load_s / bound_s if bound_s else None


def choose_policies(asked: Sequence[str], *, timed: bool) -> tuple[str, ...]:
    """Return the policies to replay.

    Args:
        asked: names, or ``all``; none for the core's default.
        timed: whether time goes by. Then reference schedulers are replayed, too: those that are
            named, or else all.

    Raises:
        ValueError: a name is none, or of a reference scheduler where no time goes by; the text has
            all that there are.
    """
    known = _core.POLICIES
    for name in asked:
        if name in BASELINES and not timed:
            raise ValueError(f"{name!r} is a reference scheduler of timed replays: add --timed")
        if name != "all" and name not in known and name not in BASELINES:
            raise ValueError(
                f"no policy {name[:40]!r}; there are {', '.join(known)}, and all; with --timed "
                f"also {', '.join(BASELINES)}"
            )
    wanted = (*known, *asked) if "all" in asked else tuple(asked) or known[:1]
    references = BASELINES if timed and not set(asked).intersection(BASELINES) else ()
    # A dict keeps the order and drops what is there twice.
    names = dict.fromkeys((*wanted, BASE_POLICY, *references))
    return tuple(name for name in names if name != "all")


def run_study(
    trace: Trace,
    machine: Machine,
    policies: Sequence[str],
    *,
    timed: bool,
    bound: bool,
    watcher: Watcher,
    placing: Placing | None = None,
    label: str = "",
) -> Study:
    """Replay a trace with several policies.

    Args:
        trace: what was wanted.
        machine: on what.
        policies: from ``choose_policies``.
        timed: whether time goes by.
        bound: whether to compute what the optimum is at least and at most.
        watcher: is told what goes on.
        placing: who said where the models may be; None for the trace itself.
        label: of the study.

    Raises:
        TraceError: a model is larger than every budget.
        SimulationError: the core and the simulator disagree.
    """
    trace.check_fits(machine.budgets)
    outcomes = tuple(_replay(trace, machine, policy, timed, watcher) for policy in policies)
    offline = _offline(trace, machine, watcher) if bound else OfflineFigures()
    return Study(
        trace=trace,
        machine=machine,
        timed=timed,
        outcomes=outcomes,
        offline=offline,
        placing=placing or Placing.of(trace),
        label=label,
    )


def _replay(trace: Trace, machine: Machine, policy: str, timed: bool, watcher: Watcher) -> Outcome:
    progress = watcher(policy)
    if not timed:
        return replay_serially(trace, machine, policy, progress)
    if policy in BASELINES:
        return replay_baseline(trace, machine, policy, progress)
    return replay_timed(trace, machine, policy, progress=progress)


def _offline(trace: Trace, machine: Machine, watcher: Watcher) -> OfflineFigures:
    if machine.host_budget_bytes:
        return OfflineFigures(note="the offline bound knows no host tier")
    bound_s: float | None = None
    kept: list[Floats | None] | None = None
    note = ""
    pools = pools_of(trace, machine)
    progress = watcher("offline bound")
    try:
        bound_s, kept = bound_of_pools(
            trace, pools, time_limit_s=_SOLVER_LIMIT_S, progress=progress
        )
    except BoundUnavailable as error:
        note = str(error)
    if spans_devices(trace, machine.budgets):
        return OfflineFigures(bound_s=bound_s, note=note, schedule_note=_NO_SCHEDULE)
    progress = watcher("offline schedule")
    schedule_s = schedule_of_pools(pools, kept, progress)
    return OfflineFigures(bound_s=bound_s, schedule_s=schedule_s, note=note)
