"""Seconds of loading by the default policy, against the offline bound and against LRU.

Each request needs its model and is over before the next comes, so that the choice of victims alone
counts. The traces are those of a folder, with the budgets and bounds of its bounds.json, and
families of the simulator with bounds that are computed here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from bench.thrash_figures import LoadInstance
from modelyard_server import _core
from modelyard_server.simulation.bounds import lower_bound
from modelyard_server.simulation.families import family_trace
from modelyard_server.simulation.machine import Machine
from modelyard_server.simulation.offline import best_offline_s
from modelyard_server.simulation.serial_replay import replay_serially
from modelyard_server.simulation.trace import Trace, TraceError
from modelyard_server.simulation.trace_files import read_trace

__all__ = ["Job", "family_jobs", "load_instance", "load_instances", "load_table", "trace_jobs"]

FAMILIES: Final = (
    "zipf:0.6",
    "zipf:0.9",
    "zipf:1.2",
    "shift",
    "scan",
    "burst",
    "tenants",
    "onehit",
)
LOOPS: Final = ("loop:0.25", "loop:1")
SHARES: Final = (0.1, 0.2, 0.4)
LOOP_SHARES: Final = (0.8, 0.9)
"""Slightly over capacity: nine tenths of what they go round over fit, or eight."""
SEEDS: Final = (501, 502)
_SOLVER_LIMIT_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A trace at a budget.

    Args:
        name: of the family, or of the file.
        share: the budget, of the bytes of all models that occur.
        seed: of the family; None for a file.
        path: of the file; None for a family.
        requests: the first how many, of a file.
        bound_s: if it is known.
        devices: among how many equal ones the budget is shared out.
    """

    name: str
    share: float
    seed: int | None = None
    path: Path | None = None
    requests: int = 0
    bound_s: float | None = None
    devices: int = 1

    @property
    def title(self) -> str:
        """Its name, and on how many devices if there are several."""
        return self.name if self.devices == 1 else f"{self.name} on {self.devices} devices"

    @property
    def is_loop(self) -> bool:
        """True if it goes round and round over slightly more than fits."""
        return self.path is None and self.name in LOOPS

    def trace(self) -> Trace:
        """Read it or make it."""
        if self.path is not None:
            return read_trace(self.path).first(self.requests)
        return family_trace(self.name, seed=self.seed or 0)


def trace_jobs(folder: Path) -> tuple[list[Job], list[str]]:
    """The traces of a folder at each budget of its bounds.json, and what is missing there.

    An entry that is for several devices (``devices``) is replayed on so many equal ones that have
    its budget together.
    """
    path = folder / "bounds.json"
    if not path.is_file():
        return [], [str(path)]
    known: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    jobs: list[Job] = []
    missing: dict[str, None] = {}
    for entry in known:
        file = folder / f"{entry['trace']}.npz"
        if not file.is_file():
            missing[str(file)] = None
            continue
        jobs.append(
            Job(
                name=entry["trace"],
                share=entry["budget_share"],
                path=file,
                requests=entry["requests"],
                bound_s=entry["lower_bound_s"],
                devices=entry.get("devices", 1),
            )
        )
    return jobs, list(missing)


def family_jobs(seeds: Sequence[int] = SEEDS) -> list[Job]:
    """The families at each budget; those whose bounds take longest first."""
    shares = dict.fromkeys(LOOPS, LOOP_SHARES) | dict.fromkeys(FAMILIES, SHARES)
    return [
        Job(name=name, share=share, seed=seed)
        for name, of_name in shares.items()
        for share in of_name
        for seed in seeds
    ]


def load_instances(
    jobs: Sequence[Job], tell: Callable[[str], None], processes: int = 2
) -> tuple[list[tuple[Job, LoadInstance]], list[str]]:
    """Replay jobs, several at a time; return also which could not be, each with the reason."""
    found: list[tuple[Job, LoadInstance]] = []
    skipped: list[str] = []
    with ProcessPoolExecutor(processes) as pool:
        for job, came in zip(jobs, pool.map(load_instance, jobs), strict=True):
            begin = f"{len(found) + len(skipped) + 1} of {len(jobs)}:"
            if isinstance(came, str):
                skipped.append(f"{job.title} at {job.share:g}: {came}")
                tell(f"{begin} skipped {skipped[-1]}")
            else:
                found.append((job, came))
                tell(
                    f"{begin} {job.title} at {job.share:g}: "
                    f"{came.vs_bound:.3f} x bound, {came.vs_lru:.3f} x LRU"
                )
    return found, skipped


def load_instance(job: Job) -> LoadInstance | str:
    """Replay a job; return why if its devices cannot have its trace."""
    if type(job.devices) is not int or job.devices < 1:
        return f"its devices are {job.devices!r}: a whole number must be there"
    trace = job.trace()
    budget = int(job.share * trace.footprint_bytes())
    try:
        machine = Machine(budgets=(budget // job.devices,) * job.devices)
        trace.check_fits(machine.budgets)
    except (TraceError, ValueError) as error:
        return str(error)
    bound_s = job.bound_s
    best_s: float | None = None
    if bound_s is None:
        found = lower_bound(trace, budget, time_limit_s=_SOLVER_LIMIT_S)
        bound_s = found.load_s
        if job.is_loop:
            # The bound lets parts of models be kept: how near to it can anybody come?
            best_s = best_offline_s(trace, machine.budgets, found.kept)
    return LoadInstance(
        name=job.title,
        share=job.share,
        is_loop=job.is_loop,
        load_s=replay_serially(trace, machine, _core.POLICIES[0]).load_s,
        lru_s=replay_serially(trace, machine, "lru").load_s,
        bound_s=bound_s,
        best_s=best_s,
    )


def load_table(found: Sequence[tuple[Job, LoadInstance]]) -> Table:
    """The instances, for people."""
    table = Table(title="Seconds of loading, one request after the other")
    table.add_column("trace")
    for column in ("seed", "budget", "bound, s", _core.POLICIES[0], "x bound", "x lru"):
        table.add_column(column, justify="right")
    for column in ("lru x bound", "best offline x bound"):
        table.add_column(column, justify="right")
    for job, one in found:
        table.add_row(
            one.name,
            "" if job.seed is None else str(job.seed),
            f"{one.share:g}",
            f"{one.bound_s:,.0f}",
            f"{one.load_s:,.0f}",
            f"{one.vs_bound:.3f}",
            f"{one.vs_lru:.3f}",
            f"{one.lru_s / one.bound_s:.2f}",
            "" if one.best_s is None else f"{one.best_s / one.bound_s:.3f}",
        )
    return table
