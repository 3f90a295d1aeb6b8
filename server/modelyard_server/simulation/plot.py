"""A study as a picture."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from modelyard_server.simulation.outcome import hit_ratio_over_time, load_seconds_over_time
from modelyard_server.simulation.report import title_of
from modelyard_server.simulation.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PlotError", "check_plot_path", "plot_study"]

_SUFFIX: Final = ".png"
_LEAST_WAIT_S: Final = 1e-3


class PlotError(Exception):
    """The picture cannot be made."""


def check_plot_path(path: Path) -> None:
    """Find out before long work if a picture can be made.

    Raises:
        PlotError: matplotlib is not installed, or the name is none for a picture.
    """
    if path.suffix.lower() != _SUFFIX:
        raise PlotError(f"{path.name}: the picture is a PNG: the name must end in {_SUFFIX}")
    if not path.absolute().parent.is_dir():
        raise PlotError(f"{path.name}: there is no folder {path.parent.name!r} for it")
    if path.exists() and not path.is_file():
        raise PlotError(f"{path.name}: is there, and no file that could be written over")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PlotError(
            "a picture needs the package matplotlib: pip install 'modelyard[simulate]'"
        ) from None


def plot_study(study: Study, path: Path, others: Sequence[Study] = ()) -> None:
    """Write a picture: load time by policy, hits over time, and waits or loads over time.

    Args:
        study: what came of it.
        path: a file that ends in ``.png``.
        others: with other budgets, whose load times stand beside.

    Raises:
        PlotError: see ``check_plot_path``; or the file cannot be written.
    """
    check_plot_path(path)
    # Without pyplot, which would look for a display and keep the figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    FigureCanvasAgg(figure)
    # Of names: a "$" in one begins no formula, and what has no letters in the font has boxes.
    figure.suptitle(title_of(study), parse_math=False)
    _plot_load_time(figure.add_subplot(1, 3, 1), study, others)
    _plot_hits(figure.add_subplot(1, 3, 2), study)
    if study.timed:
        _plot_waits(figure.add_subplot(1, 3, 3), study)
    else:
        _plot_loads(figure.add_subplot(1, 3, 3), study)
    picture = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph ", category=UserWarning)
        figure.savefig(picture, dpi=100, format="png")
    try:
        _write(path.resolve(), picture.getvalue())
    except OSError as error:
        raise PlotError(f"{path.name}: {error.strerror or 'cannot be written'}") from None


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name[:100]}.{os.getpid()}.part")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _plot_load_time(axes: Axes, study: Study, others: Sequence[Study]) -> None:
    studies = (study, *others)
    at = np.arange(len(study.outcomes))
    width = 0.8 / len(studies)
    for i, each in enumerate(studies):
        seconds = [each.outcome_of(outcome.policy).load_s for outcome in study.outcomes]
        axes.bar(at + i * width, seconds, width, label=each.label or "budgets as they are")
    bound_s, schedule_s = study.offline.bound_s, study.offline.schedule_s
    if bound_s is not None:
        axes.axhline(bound_s, color="black", linestyle="-", label="offline bound")
    if schedule_s is not None:
        axes.axhline(schedule_s, color="black", linestyle=":", label="best offline schedule found")
    axes.set_xticks(at + width * (len(studies) - 1) / 2)
    axes.set_xticklabels([o.policy for o in study.outcomes], rotation=30, ha="right")
    axes.set_ylabel("load time, s")
    axes.set_title("time spent loading")
    axes.legend(fontsize="small")


def _plot_hits(axes: Axes, study: Study) -> None:
    for outcome in study.outcomes:
        requests, ratios = hit_ratio_over_time(outcome)
        axes.plot(requests, ratios * 100, label=outcome.policy)
    axes.set_xlabel("requests")
    axes.set_ylabel("requests whose model was there, %")
    axes.set_title("hits")
    axes.legend(fontsize="small")


def _plot_loads(axes: Axes, study: Study) -> None:
    for outcome in study.outcomes:
        requests, seconds = load_seconds_over_time(outcome)
        axes.plot(requests, seconds, label=outcome.policy)
    axes.set_xlabel("requests")
    axes.set_ylabel("load time so far, s")
    axes.set_title("loads")
    axes.legend(fontsize="small")


def _plot_waits(axes: Axes, study: Study) -> None:
    for outcome in study.outcomes:
        waits = outcome.waits()
        if len(waits) == 0:
            continue
        longer = 1 - np.arange(len(waits)) / len(waits)
        axes.plot(np.maximum(waits, _LEAST_WAIT_S), longer, label=outcome.policy)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("wait, s")
    axes.set_ylabel("share of the requests that waited as long")
    axes.set_title("waits")
    axes.legend(fontsize="small")
