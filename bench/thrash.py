"""No thrash, no starvation: what eviction, scheduling and batching bring, against their bars.

    python -m bench.thrash --output build/bench/thrash.json [--only PART ...] [--traces FOLDER]

Seven parts, one after the other; each is in a module of its own, which says how it is taken:

    loads     seconds of loading against the offline bound and LRU    thrash_loads
    rates     highest rates of simulated servers                      thrash_rates
    served    loads and requests/s of real servers                    thrash_served
    overload  five times what a real server can do                    thrash_overload
    batching  MiniLM with batching and without                        thrash_batching
    fairness  turns of clients of very different demand               thrash_fairness
    arrival   the core's own benchmark (--core FILE)                  thrash_arrival

Every figure is of one run. What cannot be measured is named as missing. The exit code is 1 if a bar
was missed, or if a figure that has one is missing though its part was asked for.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench.machine import write_figures
from bench.thrash_arrival import arrival_figures
from bench.thrash_batching import TEXTS_SAID, batching_figures
from bench.thrash_fairness import DEMANDS, fairness_figures
from bench.thrash_figures import BARS, fair_shares, loads_summary
from bench.thrash_loads import family_jobs, load_instances, load_table, trace_jobs
from bench.thrash_overload import DEADLINE_S, overload_figures
from bench.thrash_plots import plot_loads, plot_overload, plot_rates
from bench.thrash_rates import SEEDS, SETTINGS, rate_table, rates_of_all, summary
from bench.thrash_served import served_figures
from bench.weights_figures import missed

__all__ = ["OF_PART", "Run", "main", "show", "unmeasured"]

TRACES: Final = "MODELYARD_TRACES"
"""Environment variable with the folder of traces."""

OF_PART: Final[Mapping[str, tuple[str, ...]]] = {
    "loads": ("geomean_vs_bound", "worst_vs_lru", "loops_vs_bound"),
    "rates": ("rate_vs_fifo_lru", "rate_vs_fcfs_lru", "rate_vs_fcfs_lru_min"),
    "served": ("round_robin_loads", "zipf_rps_vs_lru_fifo", "zipf_loads_per_request"),
    "overload": (
        "goodput_5x",
        "overload_refusals_with_retry",
        "overload_accepted_in_time",
        "recovery_s",
    ),
    "batching": ("batching_c64", "batching_c1"),
    "fairness": ("fairness_jain", "fairness_quiet_runs", "fairness_line_share"),
    "arrival": ("arrival_us_300",),
}
"""The figures with a bar, by the part that measures them."""

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


@dataclass(slots=True, kw_only=True)
class Run:
    """One run of the benchmark.

    Attributes:
        plots: folder for pictures.
        traces: folder of traces.
        core: report of the core's own benchmark, if there is one.
        processes: simulations at a time.
        seeds: of the timed simulation.
        began: when, by the monotonic clock.
        notes: what is shown below the table: what is missing, above all.
    """

    plots: Path
    traces: Path
    core: Path | None
    processes: int
    seeds: Sequence[int]
    began: float = field(default_factory=time.monotonic)
    notes: list[str] = field(default_factory=list)

    def tell(self, text: str) -> None:
        """Says how far it has come."""
        errors.print(f"{time.monotonic() - self.began:6.1f} s  {text}", markup=False)

    def plot(self, name: str, draw: Callable[[Path], None]) -> None:
        """Writes a picture, where that can be done."""
        path = self.plots / f"thrash_{name}.png"
        try:
            draw(path)
        except ImportError:
            self.notes.append(f"no {path.name}: pictures need the package matplotlib")
        else:
            self.notes.append(f"picture: {path}")


def main() -> int:
    """Runs the parts, shows their figures beside the bars, and writes them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--only", action="append", choices=PARTS, help="only this part; may be given several times"
    )
    parser.add_argument(
        "--traces",
        type=Path,
        default=Path(os.environ.get(TRACES) or Path(__file__).parents[2] / "shared" / "traces"),
        help=f"folder of traces with a bounds.json; default: ${TRACES}, or ../shared/traces",
    )
    parser.add_argument("--core", type=Path, help="google-benchmark's JSON")
    parser.add_argument("--processes", type=int, default=2, help="simulations at a time")
    parser.add_argument(
        "--seeds",
        type=int,
        choices=range(1, len(SEEDS) + 1),
        default=len(SEEDS),
        help="of the timed simulation",
    )
    arguments = parser.parse_args()
    plots = arguments.output.absolute().parent
    plots.mkdir(parents=True, exist_ok=True)
    run = Run(
        plots=plots,
        traces=arguments.traces,
        core=arguments.core,
        processes=arguments.processes,
        seeds=SEEDS[: arguments.seeds],
    )
    parts = tuple(arguments.only or PARTS)
    figures: dict[str, Any] = {}
    _say_load("before")
    for name in parts:
        began = time.monotonic()
        figures |= PARTS[name](run)
        figures[f"{name}_seconds"] = round(time.monotonic() - began, 1)
    _say_load("after")
    show(figures, parts, run.notes)
    more = {"seconds": round(time.monotonic() - run.began, 1), "parts": ",".join(parts)}
    write_figures(arguments.output, figures | more)
    console.print(f"written to {arguments.output}; {more['seconds']:.0f} s")
    return 1 if missed(figures, BARS) or unmeasured(figures, parts) else 0


# --- The parts


def _loads(run: Run) -> dict[str, Any]:
    jobs, missing = trace_jobs(run.traces)
    for path in missing:
        run.notes.append(f"[bold]missing: {path}[/bold]: the figures of loads are without it")
    # What takes longest is at the front, so that no process is left with it in the end.
    found, skipped = load_instances([*family_jobs(), *jobs], run.tell, run.processes)
    for text in skipped:
        run.notes.append(f"[bold]skipped: {text}[/bold]: the figures of loads are without it")
    console.print(load_table(found))
    run.plot("loads", lambda path: plot_loads(found, path))
    figures: dict[str, Any] = loads_summary([one for _, one in found])
    for job, one in found:
        which = "" if job.seed is None else f"_{job.seed}"
        which += "" if job.devices == 1 else f"_d{job.devices}"
        figures[f"load_{job.name}_{job.share:g}{which}_vs_bound"] = round(one.vs_bound, 4)
        figures[f"load_{job.name}_{job.share:g}{which}_vs_lru"] = round(one.vs_lru, 4)
    if replayed := [one for job, one in found if job.path is not None]:
        of_traces = loads_summary(replayed)
        figures["traces_geomean_vs_bound"] = of_traces["geomean_vs_bound"]
        figures["traces_worst_vs_lru"] = of_traces["worst_vs_lru"]
    figures["traces_missing"] = len(missing)
    figures["traces_skipped"] = len(skipped)
    return figures


def _rates(run: Run) -> dict[str, Any]:
    found = rates_of_all(run.tell, SETTINGS, run.seeds, run.processes)
    console.print(rate_table(found))
    run.plot("rates", lambda path: plot_rates(found, path))
    return {**summary(found), "rate_seeds": len(run.seeds)}


def _served(run: Run) -> dict[str, Any]:
    with _scratch(run) as folder:
        figures = served_figures(Path(folder), run.tell)
    table = Table(title="More models than there is room for, real servers")
    table.add_column("")
    for column in ("requests/s", "loads a request", "ms a load"):
        table.add_column(column, justify="right")
    for text, suffix in (("default", ""), ("lru, in order of arrival", "_lru_fifo")):
        table.add_row(
            f"zipf, {text}",
            f"{figures[f'zipf_rps{suffix}']:g}",
            f"{figures[f'zipf_loads_per_request{suffix}']:.3f}",
            f"{figures[f'zipf_load_ms{suffix}']:g}",
        )
    console.print(table)
    run.notes.append(
        f"served: models of {figures['served_model_bytes'] / 1e6:.1f} MB, files in the page cache; "
        f"200 requests in turn by LRU in order of arrival: {figures['round_robin_lru_fifo_loads']} "
        "loads"
    )
    return figures


def _overload(run: Run) -> dict[str, Any]:
    with _scratch(run) as folder:
        figures, answers = overload_figures(Path(folder), run.tell)
    run.notes.append(
        f"overload: peak {figures['overload_peak_per_s']:g} requests/s with "
        f"{figures['overload_peak_callers']} callers, texts of {figures['overload_words']} words, "
        f"deadline {DEADLINE_S:g} s; of {figures['overload_requests']} requests "
        f"{figures['overload_refused']} were refused and {figures['overload_late']} late"
    )
    peak = figures["overload_peak_per_s"]
    run.plot("overload", lambda path: plot_overload(answers, peak, DEADLINE_S, path))
    return figures


def _batching(run: Run) -> dict[str, Any]:
    run.notes.append(f"batching: {TEXTS_SAID}")
    with _scratch(run) as folder:
        return batching_figures(Path(folder), run.tell)


def _fairness(run: Run) -> dict[str, Any]:
    with _scratch(run) as folder:
        figures, shares = fairness_figures(Path(folder), run.tell)
    table = Table(title="Eight clients of a model: answers, over an equal share")
    table.add_column("requests in flight of the client", justify="right")
    columns = [(rows, name) for rows, answers in shares.items() for name in answers]
    for rows, name in columns:
        table.add_column(f"runs of {rows}, {_IDENTITIES[name]}", justify="right")
    parts = [fair_shares(shares[rows][name]) for rows, name in columns]
    for demand in map(str, DEMANDS):
        table.add_row(demand, *(f"{part[demand]:.2f}" for part in parts))
    console.print(table)
    for rows in shares:
        own, one, other = (
            figures[f"fairness_{name}_rows_{rows}"]
            for name in ("quiet_wait_ratio", "quiet_wait_ratio_shared", "other_model_answers")
        )
        run.notes.append(
            f"fairness, runs of {rows}: beside a flood one waits {own:g} times as long as alone, "
            f"{one:g} times in one line with it; models take turns by age, so {other:g} answers of "
            "a flood of another model come first"
        )
    return figures


_IDENTITIES: Final = {"own": "own identities", "shared": "one for all"}


def _arrival(run: Run) -> dict[str, Any]:
    if run.core is None:
        run.notes.append(
            "[bold]missing: arrival_us_300[/bold]: it is read from the report of the core's own "
            "benchmark, --core FILE; `make bench-thrash` builds and runs that"
        )
        return {}
    return arrival_figures(run.core)


PARTS: Final[Mapping[str, Callable[[Run], dict[str, Any]]]] = {
    "loads": _loads,
    "rates": _rates,
    "served": _served,
    "overload": _overload,
    "batching": _batching,
    "fairness": _fairness,
    "arrival": _arrival,
}


# --- What is shown


def unmeasured(figures: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    """The figures with a bar that parts should have measured, and did not."""
    return [name for part in parts for name in OF_PART[part] if name not in figures]


def show(figures: Mapping[str, Any], parts: Sequence[str], notes: Sequence[str]) -> None:
    """The figures that have a bar, and what else there is to say."""
    table = Table(title="No thrash, no starvation")
    for column in ("what", "measured", "bar", ""):
        table.add_column(column, justify="right" if column in ("measured", "bar") else "left")
    not_met, not_there = missed(figures, BARS), unmeasured(figures, parts)
    for bar in BARS:
        if bar.figure in not_there:
            table.add_row(bar.text, "not measured", bar.shown, "[red]MISSING[/red]")
        elif bar.figure in figures:
            value = figures[bar.figure]
            table.add_row(
                bar.text,
                "unknown" if value is None else f"{value:g}",
                bar.shown,
                "[red]missed[/red]" if bar in not_met else "[green]met[/green]",
            )
    console.print(table)
    for note in notes:
        console.print(note)


def _scratch(run: Run) -> tempfile.TemporaryDirectory[str]:
    # Not where the system has temporary files, which may be in memory.
    return tempfile.TemporaryDirectory(dir=run.plots)


def _say_load(when: str) -> None:
    one, five, fifteen = os.getloadavg()
    errors.print(
        f"{when}: {os.cpu_count()} processors, load {one:.2f}, {five:.2f}, {fifteen:.2f} "
        f"(1, 5, 15 minutes), niceness {os.nice(0)}"
    )


if __name__ == "__main__":
    sys.exit(main())
