"""The tables of the thrash benchmark as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from bench.thrash_figures import Answer, LoadInstance
from bench.thrash_loads import Job
from bench.thrash_rates import PRODUCT, Setting
from modelyard_server.simulation.baselines import BASELINES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_loads", "plot_overload", "plot_rates"]

_STEP_S: Final = 0.5


def plot_loads(found: Sequence[tuple[Job, LoadInstance]], path: Path) -> None:
    """Write each instance's seconds of loading as multiples of the bound, by us and by LRU."""
    names = [
        f"{one.name} at {one.share:g}" + ("" if job.seed is None else f" ({job.seed})")
        for job, one in found
    ]
    figure = _figure(10, 2 + 0.2 * len(names))
    axes = figure.add_subplot()
    at = np.arange(len(names))
    ours = np.asarray([one.vs_bound for _, one in found])
    lru = np.asarray([one.lru_s / one.bound_s for _, one in found])
    axes.barh(at - 0.2, ours, 0.4, label=PRODUCT)
    axes.barh(at + 0.2, lru, 0.4, label="lru")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(at, names, fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0.9, 1.1 * max(float(ours.max()), min(3.0, float(lru.max()))))
    axes.set_xlabel("seconds of loading / offline bound")
    axes.legend()
    figure.savefig(path)


def plot_rates(found: Mapping[Setting, Mapping[str, float]], path: Path) -> None:
    """Write the highest rate of each scheduler in each setting."""
    names = [setting.name for setting in found]
    figure = _figure(20, 5)
    axes = figure.add_subplot()
    at = np.arange(len(names))
    for i, scheduler in enumerate((PRODUCT, *BASELINES)):
        rates = [of[scheduler] for of in found.values()]
        axes.bar(at + 0.2 * (i - 1.5), rates, 0.2, label=scheduler)
    axes.set_yscale("log")
    axes.set_xticks(at, names, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("requests a second with a p99 wait of 15 s")
    axes.legend()
    figure.savefig(path)


def plot_overload(
    answers: Sequence[Sequence[Answer]], peak: float, deadline_s: float, path: Path
) -> None:
    """Write what came and what was answered in its time, over time."""
    every = [one for phase in answers for one in phase]
    end_s = max(one.ended_s for one in every)
    edges = np.arange(0.0, end_s + _STEP_S, _STEP_S)
    figure = _figure(10, 5)
    axes = figure.add_subplot()
    for label, times in (
        ("due", [one.due_s for one in every]),
        ("answered in time", [one.ended_s for one in every if one.is_good(deadline_s)]),
        ("refused", [one.ended_s for one in every if one.is_refused(deadline_s)]),
    ):
        counts, _ = np.histogram(times, edges)
        axes.plot(edges[:-1], counts / _STEP_S, label=label)
    axes.axhline(peak, color="black", linewidth=1, linestyle="--", label="peak")
    axes.set_xlabel("s")
    axes.set_ylabel("requests a second")
    axes.legend()
    figure.savefig(path)


def _figure(width: float, height: float) -> Figure:
    # Without pyplot, which would look for a display and keep the figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
