"""An operator changes the plan of a running server: what requests notice, and what a kill costs.

    python -m bench.plan_change --output build/bench/plan.json

Three parts. Requests at a steady pace while the device plan is changed, beside as many while it is
not, in blocks taken in turn, every answer compared with plain transformers' and the ledger looked
at after every event. A model split over two devices and the disk against the whole one. Servers
killed with SIGKILL while operators write to them.

The exit code is 1 if a request was lost, an answer wrong, a budget exceeded, an acknowledged change
lost, a plan half applied, or a split answer too far from the whole one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tests.support.kill9 import Kill9Report, kill_again_and_again

from bench.budget_watch import BudgetWatch, watching
from bench.load import Answers, Load, connected
from bench.machine import write_figures, written
from bench.plan_changes import DEVICES, ChangePair, change_pairs
from bench.plan_models import TOLERANCE, make_models, model_table, questions_of
from bench.split import SplitResult, compare_split
from modelyard import Admin
from modelyard_server.demo.process import python_server

_REQUESTS: Final = 5000
_RATE_HZ: Final = 50.0
_CLIENTS: Final = 4
_KILLS: Final = 200
_KILLING_AT_ONCE: Final = 2
_BUDGET_BYTES: Final = 320_000_000
_FIRST_CHANGE: Final = 0.2
_SECOND_CHANGE: Final = 0.6
"""When a block's changes are made, as shares of the block."""

console = Console()


def main() -> int:
    """Runs everything, writes the figures, and says whether they may be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=_REQUESTS, help="with changes, and without")
    parser.add_argument("--rate", type=float, default=_RATE_HZ, help="requests a second")
    parser.add_argument("--kills", type=int, default=_KILLS)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    arguments = parser.parse_args()
    console.print(f"seed {arguments.seed}")

    with tempfile.TemporaryDirectory() as name, _progress() as progress:
        folder = Path(name)
        for part in ("load", "split", "kill9"):
            (folder / part).mkdir()
        changes = asyncio.run(
            change_under_load(
                folder / "load", arguments.requests, arguments.rate, arguments.seed, progress
            )
        )
        splits = compare_split(folder / "split")
        kills = asyncio.run(
            kill_servers(folder / "kill9", arguments.kills, arguments.seed, progress)
        )
    show(changes, splits, kills)
    figures = {**changes.figures(), **split_figures(splits), **kill_figures(kills)}
    write_figures(arguments.output, figures | {"seed": arguments.seed})
    console.print(f"written to {arguments.output}")
    wrong = list(problems(changes, splits, kills))
    for text in wrong:
        console.print(f"[red]not as it must be:[/red] {text}", highlight=False)
    return 1 if wrong else 0


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


# --- Requests while the plan is changed ---------------------------------------------------------


@dataclass(slots=True)
class Changes:
    """What came of requests.

    Attributes:
        steady: those in blocks without changes.
        changing: those in blocks with changes.
        by_pair: those of each pair of changes.
        block_ratios: p99 of each block with changes to that of the block beside it.
        made: changes.
        steps: events after which the server's core was looked at.
        steps_wrong: those after which something was wrong.
        watch: what was seen from outside.
        loads: of models, since the server started.
        texts: what was wrong with the budgets.
    """

    steady: Answers = field(default_factory=Answers)
    changing: Answers = field(default_factory=Answers)
    by_pair: dict[str, Answers] = field(default_factory=dict)
    block_ratios: list[float] = field(default_factory=list)
    made: int = 0
    steps: int = 0
    steps_wrong: int = 0
    watch: BudgetWatch = field(default_factory=BudgetWatch)
    loads: int = 0
    texts: list[str] = field(default_factory=list)

    def add(self, pair: ChangePair, steady: Answers, changing: Answers) -> None:
        """Adds a block without changes and the one with a pair of changes beside it."""
        self.steady.add(steady)
        self.changing.add(changing)
        self.by_pair[pair.name] = changing
        self.block_ratios.append(changing.percentile_ms(99) / steady.percentile_ms(99))

    def figures(self) -> dict[str, Any]:
        """As they are written."""
        steady, changing = self.steady.percentile_ms(99), self.changing.percentile_ms(99)
        return {
            "lost": len(self.changing.lost) + len(self.steady.lost),
            "wrong": len(self.changing.wrong) + len(self.steady.wrong),
            "over_budget_steps": self.steps_wrong + self.watch.over,
            "p99_ratio": round(changing / steady, 3),
            # Of each block and the one beside it: a burst of the machine's own is in few of them.
            "p99_ratio_block_median": round(statistics.median(self.block_ratios), 3),
            "p99_ms_changing": round(changing, 2),
            "p99_ms_steady": round(steady, 2),
            "p50_ms_changing": round(self.changing.percentile_ms(50), 2),
            "p50_ms_steady": round(self.steady.percentile_ms(50), 2),
            "max_ms_changing": round(max(self.changing.seconds) * 1e3, 2),
            "max_ms_steady": round(max(self.steady.seconds) * 1e3, 2),
            "requests": self.changing.count,
            "requests_steady": self.steady.count,
            "plan_changes": self.made,
            "audited_steps": self.steps,
            "watch_samples": self.watch.samples,
            "watch_events": self.watch.events,
            "most_bytes_above_lowered_budget": self.watch.most_over_bytes,
            "model_loads": self.loads,
        }


async def change_under_load(
    folder: Path, requests: int, rate_hz: float, seed: int, progress: Progress
) -> Changes:
    """Runs the blocks, each pair of changes beside a block of as many requests without."""
    task = progress.add_task("making models", total=2 * requests)
    store = folder / "store"
    models = make_models(store)
    questions = questions_of(models, store)
    config = """
        [server]
        listen = "127.0.0.1:0"
        log_level = "warning"
        [roots]
        store = "store"
        """
    for device in (*DEVICES, "disk"):
        logical = "" if device == "disk" else "logical = true"
        config += f'\n[[devices]]\ndevice = "{device}"\nbudget = {_BUDGET_BYTES}\n{logical}\n'
    config += "".join(model_table(model) for model in models)
    report = folder / "report.json"
    pairs = change_pairs(_BUDGET_BYTES)
    changes = Changes()
    with ExitStack() as stack:
        server = stack.enter_context(
            python_server(
                [
                    *("-m", "bench.audited_server"),
                    *("--config", str(written(folder, config)), "--report", str(report)),
                ]
            )
        )
        admin = stack.enter_context(Admin(server.address))
        async with connected(server.address, _CLIENTS) as clients, watching(server.address) as seen:
            load = Load(clients, questions, rate_hz, seed)
            changes.watch = seen
            for i, pair in enumerate(pairs):
                # As many in each block, and all of them in the end.
                count = requests * (i + 1) // len(pairs) - requests * i // len(pairs)
                blocks: dict[bool, Answers] = {}
                # In turn first and second, so that neither gains by what the machine does.
                for changing in (True, False) if i % 2 else (False, True):
                    progress.update(task, description=pair.name if changing else "steady")
                    blocks[changing] = await _block(
                        load,
                        count,
                        rate_hz,
                        changes,
                        pair if changing else None,
                        admin,
                        lambda: progress.advance(task),
                    )
                changes.add(pair, blocks[False], blocks[True])
            (changes.loads,) = [(await asyncio.to_thread(admin.stats)).load_count]
            for left in await asyncio.to_thread(admin.list_devices):
                if left.budget_bytes != _BUDGET_BYTES or left.drained:
                    raise RuntimeError(f"{left.name} is not as it was before all changes")
    progress.remove_task(task)
    audit = json.loads(report.read_text())
    changes.steps, changes.steps_wrong = audit["steps"], audit["wrong"]
    changes.texts = [*audit["texts"], *changes.watch.texts]
    return changes


async def _block(
    load: Load,
    count: int,
    rate_hz: float,
    changes: Changes,
    pair: ChangePair | None,
    admin: Admin,
    on_answer: Any,
) -> Answers:
    """One block of requests, with a pair of changes in it or without."""
    # What an earlier block has unloaded is loaded before this one's times count.
    warm = await load.ask_all()
    if warm.lost or warm.wrong:
        raise RuntimeError(f"before a block: {[*warm.lost, *warm.wrong][0]}")

    async def change(pair: ChangePair) -> None:
        steps = pair.steps(admin)
        passed = 0.0
        for share in (_FIRST_CHANGE, _SECOND_CHANGE):
            await asyncio.sleep((share - passed) * count / rate_hz)
            passed = share
            await asyncio.to_thread(next, steps)
            changes.made += 1

    async with asyncio.TaskGroup() as group:
        if pair is not None:
            group.create_task(change(pair), name=pair.name)
        return await load.run(count, on_answer)


# --- Kills --------------------------------------------------------------------------------------


async def kill_servers(
    folder: Path, kills: int, seed: int, progress: Progress
) -> list[Kill9Report]:
    """Kills servers, several at a time: each of them mostly waits for its start."""
    task = progress.add_task("kill -9", total=kills)
    async with asyncio.TaskGroup() as group:
        running = []
        for i in range(_KILLING_AT_ONCE):
            own = folder / str(i)
            own.mkdir()
            count = kills * (i + 1) // _KILLING_AT_ONCE - kills * i // _KILLING_AT_ONCE
            work = kill_again_and_again(
                own, kills=count, seed=seed + i, after_kill=lambda *_: progress.advance(task)
            )
            running.append(group.create_task(work, name=f"kill servers {i}"))
    progress.remove_task(task)
    return [each.result() for each in running]


def kill_figures(reports: Sequence[Kill9Report]) -> dict[str, Any]:
    """As they are written."""
    return {
        "kill9_lost": sum(len(report.lost) + len(report.half_applied) for report in reports),
        "kill9_half_applied": sum(len(report.half_applied) for report in reports),
        "kill9_damaged": sum(len(report.damaged) for report in reports),
        "kill9_acknowledged": sum(report.acknowledged for report in reports),
        "kill9_plans": sum(report.plans for report in reports),
        "kill9_in_flight_kept": sum(report.in_flight_kept for report in reports),
        "kills": sum(report.kills for report in reports),
    }


# --- Results ------------------------------------------------------------------------------------


def split_figures(results: Sequence[SplitResult]) -> dict[str, Any]:
    """As they are written."""
    return {
        "split_max_abs_diff": max(result.most_apart for result in results),
        "split_ledger_bytes_off": sum(_bytes_off(result) for result in results),
    }


def _bytes_off(result: SplitResult) -> int:
    devices = result.expected_bytes.keys() | result.charged_bytes.keys()
    return sum(
        abs(result.expected_bytes.get(device, 0) - result.charged_bytes.get(device, 0))
        for device in devices
    )


def problems(
    changes: Changes, splits: Sequence[SplitResult], kills: Sequence[Kill9Report]
) -> Iterator[str]:
    """What must not be."""
    both = (changes.changing, changes.steady)
    for what, texts in (
        ("lost", [text for answers in both for text in answers.lost]),
        ("wrong", [text for answers in both for text in answers.wrong]),
        ("over budget", changes.texts),
        ("kill -9", [text for report in kills for text in report.problems]),
    ):
        yield from (f"{what}: {text}" for text in texts[:5])
        if len(texts) > 5:
            yield f"{what}: {len(texts) - 5} more"
    for result in splits:
        if not result.most_apart <= TOLERANCE:
            yield f"{result.model} in parts is {result.most_apart:.3g} from the whole one"
        if _bytes_off(result):
            yield (
                f"{result.model}: the ledger says {dict(result.charged_bytes)}, the file's header "
                f"{dict(result.expected_bytes)}"
            )


def show(changes: Changes, splits: Sequence[SplitResult], kills: Sequence[Kill9Report]) -> None:
    """Three tables."""
    console.print(_load_table(changes))
    console.print(
        f"{changes.steps:,} events of the core audited, {changes.steps_wrong} over budget; "
        f"{changes.watch.samples:,} looks from outside, {changes.watch.over} over budget; "
        f"{changes.loads} loads",
        highlight=False,
    )
    table = Table(title="Split over two devices and the disk, against whole on one")
    for column in ("model", "device", "ledger, bytes", "header, bytes", "most apart"):
        table.add_column(column, justify="left" if column in ("model", "device") else "right")
    for result in splits:
        for i, device in enumerate(sorted(result.expected_bytes)):
            table.add_row(
                "" if i else result.model,
                device,
                f"{result.charged_bytes.get(device, 0):,}",
                f"{result.expected_bytes[device]:,}",
                "" if i else f"{result.most_apart:.2g}",
            )
    console.print(table)
    found = kill_figures(kills)
    table = Table(title=f"{found['kills']} x kill -9 while operators write")
    for column in ("acknowledged", "plans", "interrupted and kept", "lost", "half", "damaged"):
        table.add_column(column, justify="right")
    table.add_row(
        *(
            f"{found[name]:,}"
            for name in (
                "kill9_acknowledged",
                "kill9_plans",
                "kill9_in_flight_kept",
                "kill9_lost",
                "kill9_half_applied",
                "kill9_damaged",
            )
        )
    )
    console.print(table)


def _load_table(changes: Changes) -> Table:
    table = Table(title=f"Requests while the plan is changed {changes.made} times")
    for column in ("block", "requests", "lost", "wrong", "p50", "p99", "slowest"):
        table.add_column(column, justify="left" if column == "block" else "right")
    rows = {**changes.by_pair, "all with changes": changes.changing, "all without": changes.steady}
    for name, answers in rows.items():
        if name == "all with changes":
            table.add_section()
        table.add_row(
            name,
            f"{answers.count:,}",
            str(len(answers.lost)),
            str(len(answers.wrong)),
            f"{answers.percentile_ms(50):.1f} ms",
            f"{answers.percentile_ms(99):.1f} ms",
            f"{max(answers.seconds) * 1e3:.0f} ms",
        )
    ratio = changes.changing.percentile_ms(99) / changes.steady.percentile_ms(99)
    median = statistics.median(changes.block_ratios)
    table.caption = f"p99 with changes / without: {ratio:.2f}; median of the blocks: {median:.2f}"
    return table


if __name__ == "__main__":
    sys.exit(main())
