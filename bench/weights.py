"""What bringing weights into memory, holding and releasing them costs, against limits and peers.

    python -m bench.weights --output build/bench/weights.json [--quick] [--part NAME ...]

Six parts, each in a process of its own and in a folder of its own, one after the other:

    loads     load times against transformers' from_pretrained, warm and off the disk
    cycles    what is left of a process after a thousand loads and evictions
    shared    memory of fifty fine-tunes of one encoder, in a whole server
    loading   latency of a model while others load, and the serving loop's heartbeat
    sizes     prices and predicted activations against what is measured
    tier      loads from copies on the host tier, and a server that decides whether it makes any

Every figure is of one run; times are medians of rounds in which both sides take turns, ratios
medians of the ratios of the rounds. A bar that is missed is shown as missed; the exit code says
only whether everything was measured.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench.machine import write_figures
from bench.weights_cycles import cycle_figures
from bench.weights_figures import BARS, NOTED, missed
from bench.weights_loads import load_figures
from bench.weights_serving import loading_figures, shared_figures
from bench.weights_sizes import size_figures
from bench.weights_tier import tier_figures

__all__ = ["PARTS", "Part", "combined", "main"]

Part = Callable[[Path, bool, Callable[[str], None]], dict[str, Any]]
"""Measures in a folder, quickly or in full, and tells how far it has come."""

PARTS: Final[Mapping[str, Part]] = {
    "loads": load_figures,
    "cycles": cycle_figures,
    "shared": shared_figures,
    "loading": loading_figures,
    "sizes": size_figures,
    "tier": tier_figures,
}

_SUMMED: Final = ("answers_wrong",)
_WORST_OF: Final = {"measured_vs_ledger": ("shared_measured_vs_ledger", "mixed_measured_vs_ledger")}

_NOTED_PROCESSORS: Final = 0.1
"""Below it the machine's own business."""

console = Console(highlight=False)


def main() -> int:
    """Runs the parts, shows their figures beside the bars, and writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a small version of each part")
    parser.add_argument(
        "--part", action="append", choices=PARTS, help="only this part; may be given several times"
    )
    arguments = parser.parse_args()
    # torch's profiler otherwise writes lines of its own between ours.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    _say_load("before")
    figures: list[dict[str, Any]] = []
    began = time.monotonic()
    for name in arguments.part or PARTS:
        # Not where the system has temporary files, which may be in memory: the disk is measured.
        with tempfile.TemporaryDirectory(dir=_scratch(arguments.output)) as folder:
            figures.append(_alone(name, Path(folder), arguments.quick))
    _say_load("after")
    found = combined(figures)
    show(found, quick=arguments.quick)
    more = {
        "quick": arguments.quick,
        "nice": os.nice(0),
        "seconds": round(time.monotonic() - began, 1),
    }
    write_figures(arguments.output, found | more)
    console.print(f"written to {arguments.output}; {more['seconds']:.0f} s")
    return 0


def combined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all parts together.

    Raises:
        ValueError: two parts have a figure of one name that says different things.
    """
    found: dict[str, Any] = {}
    for figures in parts:
        for name, value in figures.items():
            if name in _SUMMED:
                found[name] = found.get(name, 0) + value
            elif found.setdefault(name, value) != value:
                raise ValueError(f"{name} is {found[name]!r} and {value!r}")
    for name, of in _WORST_OF.items():
        values = [found[one] for one in of if one in found]
        if values:
            found[name] = max(values)
    return found


def show(figures: Mapping[str, Any], *, quick: bool) -> None:
    """A table of the figures that have a bar, and of some that have none."""
    table = Table(title="Weights" + (", a small run: not to be compared" if quick else ""))
    for column in ("what", "measured", "bar", ""):
        table.add_column(column, justify="right" if column in ("measured", "bar") else "left")
    not_met = missed(figures)
    for bar in BARS:
        if bar.figure not in figures:
            continue
        value = figures[bar.figure]
        table.add_row(
            bar.text,
            "unknown" if value is None else f"{value:g}",
            bar.shown,
            "[red]MISSED[/red]" if bar in not_met else "",
        )
    for figure, text in NOTED.items():
        if figure in figures:
            table.add_row(text, f"{figures[figure]:g}", "none", "")
    console.print(table)
    for text in _notes(figures):
        console.print(text)


def _notes(figures: Mapping[str, Any]) -> list[str]:
    notes = []
    if "reload_ms" in figures:
        for key in (
            "reload",
            "reload_as_imported",
            "minilm_reload",
            "mini_reload",
            "tiny_reload",
        ):
            notes.append(
                f"{key.replace('_', ' ')}: ours {figures[f'{key}_ms']:.2f} ms with tokenizer, "
                f"from_pretrained {figures[f'{key}_from_pretrained_ms']:.2f} ms without; "
                f"to the first answer {figures[f'{key}_ttfi_ms']:.2f} and "
                f"{figures[f'{key}_from_pretrained_ttfi_ms']:.2f} ms"
            )
        notes.append(
            f"cold: {figures['cold_ttfi_ms']:.0f} ms to the first answer; reading alone takes "
            f"{figures['cold_read_ms']:.0f} ms at {figures['disk_gb_per_s']:.2f} GB/s"
        )
    if "p99_steady_ms" in figures:
        notes.append(
            f"p99 {figures['p99_during_load_ms']:.1f} ms with loads, "
            f"{figures['p99_steady_ms']:.1f} without; {figures['loads_in_windows']} loads; "
            f"longest gap without loads {figures['stall_steady_ms']:.1f} ms"
        )
    if "promotion_vs_cold" in figures:
        notes.append(
            f"load: {figures['tier_cold_load_ms']:.1f} ms off the disk, "
            f"{figures['tier_cache_load_ms']:.1f} from the page cache, "
            f"{figures['tier_copy_load_ms']:.1f} from a copy, which takes "
            f"{figures['demote_ms']:.1f} ms to make"
        )
        notes.append(
            f"cold files: {figures['tier_rps']:.2f} requests/s with a host tier, "
            f"{figures['none_rps']:.2f} without; {figures['tier_cold_promotions']} loads from "
            f"copies, {figures['tier_cold_demotions']} copies made"
        )
    for name in PARTS:
        others = figures.get(f"{name}_others_processors", 0.0)
        if others >= _NOTED_PROCESSORS:
            notes.append(f"{name}: other programs kept {others:.2f} processors busy meanwhile")
    if "engine_kind" in figures:
        notes.append(f"servers ran their models in: {figures['engine_kind']}")
    return notes


def _alone(name: str, folder: Path, quick: bool) -> dict[str, Any]:
    """Runs a part in a process of its own: what one leaves behind is not in the next one's way."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_run_part, name, folder, quick).result()


def _run_part(name: str, folder: Path, quick: bool) -> dict[str, Any]:
    began, busy_s, own_s = time.monotonic(), _busy_s(), _own_s()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {name}: {text}", flush=True)

    figures = PARTS[name](folder, quick, tell)
    took_s = time.monotonic() - began
    others = max(0.0, (_busy_s() - busy_s) - (_own_s() - own_s)) / took_s
    return figures | {
        f"{name}_seconds": round(took_s, 1),
        f"{name}_others_processors": round(others, 2),
    }


def _busy_s() -> float:
    """Processor time of the whole machine since it started, in seconds."""
    user, nice, system, _, _, interrupts, soft, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    """Processor time of this process and of those below it that have ended, in seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _scratch(output: Path) -> Path:
    """A folder on the disk that the output is on."""
    folder = output.parent.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _say_load(when: str) -> None:
    one, five, fifteen = os.getloadavg()
    console.print(
        f"{when}: {os.cpu_count()} processors, load {one:.2f}, {five:.2f}, {fifteen:.2f} "
        f"(1, 5, 15 minutes), niceness {os.nice(0)}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
