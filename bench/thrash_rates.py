"""The highest rate that a scheduler keeps up with, by timed simulation.

    python -m bench.thrash_rates --output build/bench/thrash_rates.json [--seeds 1] [--setting zipf]

What is compared: the product's core by its default policy, and the reference schedulers of
`modelyard simulate --timed`: FIFO with LRU, per-model FCFS with LRU, and that with a line for each
device. A scheduler keeps up with a rate if 99 of 100 requests begin to run within 15 s. The highest
such rate is found by halving between a rate that is kept and one that is not, until they are 0.2 %
apart. All are asked about the same requests, which come faster or slower: twenty minutes of them,
and at least 12,000. Each setting is tried with five seeds, with four devices three; what counts is
the geometric mean.

Settings: four families of requests, one device and four, all models together 1.5, 2, 3 and 5 times
as large as the devices. A load takes 0.4 s and a second for each 2 GB of a device, one at a time on
a device; four requests run at once on a device, each for about half a second. Models that would
take more than two fifths of a device are split over two or four, where there are so many.

Each model has devices of its own there, so that all devices hold the same bytes. The four families
are asked for a second time of four devices where every model may be on any: `anywhere`. All three
choose a device for each load then, so that what the reference schedulers lose at the head of their
lines is less.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from bench.machine import write_figures
from modelyard_server import _core
from modelyard_server.simulation.baselines import BASELINES, replay_baseline
from modelyard_server.simulation.families import family_trace
from modelyard_server.simulation.machine import Machine
from modelyard_server.simulation.places import dealt_out
from modelyard_server.simulation.timed_replay import replay_timed
from modelyard_server.simulation.trace import Trace, TracedModel

__all__ = [
    "PRODUCT",
    "SETTINGS",
    "Setting",
    "at_rate",
    "base_trace",
    "combined",
    "highest_rate",
    "machine_of",
    "rate_table",
    "rates_of",
    "rates_of_all",
    "summary",
]

FAMILIES: Final = ("zipf", "burst", "chain", "tenants")
DEVICES: Final = (1, 4)
WORKING_SETS: Final = (1.5, 2.0, 3.0, 5.0)
SEEDS: Final = (401, 402, 403, 404, 405)
_SEEDS_OF_FOUR: Final = 3
"""Of these the first, where there are four devices, and four times as many requests."""

P99_S: Final = 15.0
PRECISION: Final = 1.002
"""Schedulers that are bound by the same slots differ by less than 1 %."""

_SLOTS: Final = 4
_MODELS_PER_DEVICE: Final = 60
_MODELS_OF_FOUR: Final = 120
_RUN_FACTOR: Final = 2.0
"""Runs of the families are about 0.24 s on average."""
_LOAD_S: Final = 0.4
_BYTES_PER_S: Final = 2e9
_SPLIT_ABOVE: Final = 0.4
_LEAST_REQUESTS: Final = 12_000
_LEAST_S: Final = 1200.0
_WIDEST: Final = 1024.0
"""The lowest rate that is tried is this part of what the slots can do."""

PRODUCT: Final = _core.POLICIES[0]
_REFERENCES: Final = {
    "fifo_lru": "fifo+lru",
    "fcfs_lru": "fcfs+lru",
    "fcfs_each_lru": "fcfs-each+lru",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is asked for, and of what.

    Args:
        family: of requests.
        devices: how many.
        working_set: all models together, as a multiple of all budgets.
        anywhere: if a model may be on any device, or on those it was given for good.
    """

    family: str
    devices: int
    working_set: float
    anywhere: bool = False

    @property
    def name(self) -> str:
        """As it is called in figures."""
        where = "_anywhere" if self.anywhere else ""
        return f"{self.family}_d{self.devices}_{self.working_set:g}x{where}"


SETTINGS: Final = tuple(
    Setting(family=family, devices=devices, working_set=working_set, anywhere=anywhere)
    for (devices, anywhere), family, working_set in product(
        ((1, False), (4, False), (4, True)), FAMILIES, WORKING_SETS
    )
)


def base_trace(setting: Setting, seed: int) -> Trace:
    """The requests of a setting, at some rate; enough for the highest."""
    models = _MODELS_PER_DEVICE if setting.devices == 1 else _MODELS_OF_FOUR
    requests = max(_LEAST_REQUESTS, int(_LEAST_S * _slots_rate(setting.devices)))
    trace = family_trace(setting.family, requests=requests, models=models, seed=seed)
    budget = int(trace.footprint_bytes() / setting.working_set / setting.devices)
    made = tuple(_model_for(model, setting.devices, budget) for model in trace.models)
    if setting.devices > 1 and not setting.anywhere:
        made = dealt_out(made, (budget,) * setting.devices)
    return replace(trace, run_s=trace.run_s * _RUN_FACTOR, models=made)


def _model_for(model: TracedModel, devices: int, budget: int) -> TracedModel:
    spans = 1
    while spans < devices and model.size_bytes > spans * _SPLIT_ABOVE * budget:
        spans *= 2
    load_s = _LOAD_S + model.size_bytes / spans / _BYTES_PER_S
    return replace(model, spans=spans, load_s=load_s)


def machine_of(setting: Setting, trace: Trace) -> Machine:
    """The devices of a setting, on which all models of a trace are too many."""
    budget = int(trace.footprint_bytes() / setting.working_set / setting.devices)
    return Machine(budgets=(budget,) * setting.devices, slots=_SLOTS)


def _slots_rate(devices: int) -> float:
    """Requests a second that all slots together can run, if no model takes several."""
    return devices * _SLOTS / 0.48


def at_rate(trace: Trace, rate: float) -> Trace:
    """The first requests of a trace, coming at a mean rate: twenty minutes of them, or 12,000.

    Args:
        trace: whose requests.
        rate: of arrivals, a second; above 0.
    """
    own_rate = len(trace) / float(trace.arrival_s[-1])
    count = max(_LEAST_REQUESTS, math.ceil(_LEAST_S * rate))
    part = trace.first(count)
    return replace(part, arrival_s=part.arrival_s * (own_rate / rate))


def highest_rate(
    keeps_up: Callable[[float], bool], low: float, high: float, precision: float = PRECISION
) -> float:
    """Find the highest rate that is kept, by halving in the logarithm.

    Args:
        keeps_up: says whether a rate is kept. If one is, lower ones are taken to be.
        low: a rate above 0 that ought to be kept.
        high: a rate above it.
        precision: how far apart a kept rate and one that is not may be at the end, as a ratio.

    Returns:
        A rate that was kept; ``high`` if that was.

    Raises:
        ValueError: the lowest rate is not kept, or the bounds are none.
    """
    if not 0 < low < high or precision <= 1:
        raise ValueError(f"no bounds: {low:g} to {high:g}, {precision:g} apart")
    if keeps_up(high):
        return high
    kept = None
    while high / low > precision:
        middle = math.sqrt(low * high)
        if keeps_up(middle):
            kept = low = middle
        else:
            high = middle
    if kept is None and not keeps_up(low):
        raise ValueError(f"not even {low:g} a second are kept")
    return low


def rates_of(setting: Setting, seed: int) -> dict[str, float]:
    """The highest rate of each scheduler in a setting, and how often each loads at it."""
    trace = base_trace(setting, seed)
    machine = machine_of(setting, trace)
    most = 1.1 * _slots_rate(setting.devices)
    found: dict[str, float] = {}
    for name in (PRODUCT, *BASELINES):
        if name == "fcfs-each+lru" and (setting.devices == 1 or setting.anywhere):
            # One line, or all of them as one: whoever is held up holds up everybody.
            found[name], found[f"{name} loads"] = found["fcfs+lru"], found["fcfs+lru loads"]
            continue
        loads: dict[float, float] = {}

        def keeps_up(rate: float, name: str = name, loads: dict[float, float] = loads) -> bool:
            part = at_rate(trace, rate)
            if name in BASELINES:
                outcome = replay_baseline(part, machine, name)
            else:
                outcome = replay_timed(part, machine, name)
            loads[rate] = outcome.load_count / len(part)
            return outcome.wait_quantile(0.99) <= P99_S

        rate = highest_rate(keeps_up, most / _WIDEST, most)
        found[name] = rate
        found[f"{name} loads"] = loads[rate]
    return found


def combined(of_seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The geometric means of what several seeds brought."""
    return {name: statistics.geometric_mean(of[name] for of in of_seeds) for name in of_seeds[0]}


def summary(found: Mapping[Setting, Mapping[str, float]]) -> dict[str, float]:
    """The figures of all settings: means where each model has its devices, and where it has not.

    Args:
        found: for each setting the rate of each scheduler.
    """
    figures: dict[str, float] = {}
    for anywhere, prefix in ((False, "rate"), (True, "rate_anywhere")):
        chosen = [of for setting, of in found.items() if setting.anywhere == anywhere]
        for name, reference in _REFERENCES.items():
            ratios = [of[PRODUCT] / of[reference] for of in chosen]
            if ratios:
                figures[f"{prefix}_vs_{name}"] = round(statistics.geometric_mean(ratios), 3)
    for name, reference in _REFERENCES.items():
        worst = min(of[PRODUCT] / of[reference] for of in found.values())
        figures[f"rate_vs_{name}_min"] = round(worst, 3)
    for setting, of in found.items():
        figures[f"rate_{setting.name}"] = round(of[PRODUCT], 3)
        figures[f"rate_{setting.name}_vs_fifo_lru"] = round(of[PRODUCT] / of["fifo+lru"], 3)
        figures[f"rate_{setting.name}_vs_fcfs_lru"] = round(of[PRODUCT] / of["fcfs+lru"], 3)
    return figures


def rates_of_all(
    tell: Callable[[str], None],
    settings: Sequence[Setting] = SETTINGS,
    seeds: Sequence[int] = SEEDS,
    processes: int = 2,
) -> dict[Setting, dict[str, float]]:
    """The rates of each setting, several at a time."""
    found: dict[Setting, dict[str, float]] = {}
    with ProcessPoolExecutor(processes) as pool:
        jobs = {
            setting: [
                pool.submit(rates_of, setting, seed)
                for seed in seeds[: None if setting.devices == 1 else _SEEDS_OF_FOUR]
            ]
            for setting in settings
        }
        for setting, of_seeds in jobs.items():
            of = found[setting] = combined([job.result() for job in of_seeds])
            tell(
                f"{len(found)} of {len(settings)}: {setting.name}: {of[PRODUCT]:.2f} a second, "
                + " and ".join(f"{of[PRODUCT] / of[name]:.2f}" for name in BASELINES)
                + " times as many"
            )
    return found


def rate_table(found: Mapping[Setting, Mapping[str, float]]) -> Table:
    """The rates of each setting, for people."""
    table = Table(title=f"Highest rate with a p99 wait of {P99_S:g} s, requests a second")
    table.add_column("requests")
    columns = ("devices", "models / budget", PRODUCT, *BASELINES, *(f"x {b}" for b in BASELINES))
    for column in (*columns, "loads a request"):
        table.add_column(column, justify="right")
    for setting, of in found.items():
        rates = [of[name] for name in (PRODUCT, *BASELINES)]
        loads = (f"{of[f'{name} loads']:.2f}" for name in (PRODUCT, *BASELINES))
        table.add_row(
            setting.family,
            f"{setting.devices}, any" if setting.anywhere else str(setting.devices),
            f"{setting.working_set:g}",
            *(f"{rate:.2f}" for rate in rates),
            *(f"{rates[0] / rate:.2f}" for rate in rates[1:]),
            " ".join(loads),
        )
    return table


def _chosen(names: Iterable[str]) -> tuple[Setting, ...]:
    """The settings in whose names one of some texts occurs."""
    wanted = tuple(names)
    return tuple(s for s in SETTINGS if not wanted or any(text in s.name for text in wanted))


def main() -> int:
    """Finds the rates, shows them and writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--setting", action="append", default=[], help="only those with this in their names"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        choices=range(1, len(SEEDS) + 1),
        default=len(SEEDS),
        help="how many of them",
    )
    arguments = parser.parse_args()
    console = Console(highlight=False)
    began = time.monotonic()

    def tell(text: str) -> None:
        Console(stderr=True, highlight=False).print(f"{time.monotonic() - began:6.1f} s  {text}")

    seeds = SEEDS[: arguments.seeds]
    found = rates_of_all(tell, _chosen(arguments.setting), seeds, arguments.processes)
    console.print(rate_table(found))
    figures = summary(found)
    for name, figure in figures.items():
        if "_lru" in name and not name.startswith(tuple(f"rate_{f}_d" for f in FAMILIES)):
            console.print(f"{name} {figure:g}")
    write_figures(arguments.output, figures)
    console.print(f"written to {arguments.output}; {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
