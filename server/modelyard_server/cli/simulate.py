"""``modelyard simulate``: what a trace would cost, by policy and by budget. Needs no server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from modelyard_server.cli.connection import (
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    EXIT_USAGE,
    AsJson,
)
from modelyard_server.cli.printing import print_json, print_line, print_table
from modelyard_server.devices.sizes import parse_size

if TYPE_CHECKING:
    from modelyard_server.config import Config
    from modelyard_server.simulation.machine import Machine
    from modelyard_server.simulation.outcome import Progress
    from modelyard_server.simulation.study import Study
    from modelyard_server.simulation.trace import Trace

__all__ = ["register"]

_DEFAULT_BUDGET: Final = "0.2"
_REPLAYED_ORDER: Final = "urgency"


def register(app: typer.Typer) -> None:
    """Add the command to an application."""
    app.command("simulate")(_simulate)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What the options say."""

    trace: str
    models_file: Path | None
    policies: list[str]
    budgets: list[str]
    devices_file: Path | None
    host_budget: str | None
    places: str | None
    what_ifs: list[str]
    timed: bool
    slots: int
    deadline_s: float | None
    requests: int | None
    model_count: int | None
    seed: int
    bound: bool
    plot: Path | None


def _simulate(
    trace: Annotated[
        str,
        typer.Argument(
            metavar="TRACE",
            help="A .csv, .npz or .jsonl file, or a made-up trace: zipf:0.9, shift, loop, scan, "
            "burst, tenants, onehit, chain.",
            show_default=False,
        ),
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="P",
            help="Which rule chooses who leaves; repeatable, or all. LRU is always compared. With "
            "--timed also fifo+lru, fcfs+lru, fcfs-each+lru.",
            show_default="the server's",
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            metavar="B",
            help="A size, or a share of all models such as 0.2 or 20%. Once for each device.",
            show_default=_DEFAULT_BUDGET,
        ),
    ] = None,
    devices: Annotated[
        Path | None,
        typer.Option(
            "--devices",
            metavar="FILE",
            help="Budgets, host tier, policy and waiting rules of a server's TOML file.",
        ),
    ] = None,
    host_budget: Annotated[
        str | None,
        typer.Option("--host-budget", metavar="SIZE", help="Host memory that keeps copies."),
    ] = None,
    places: Annotated[
        str | None,
        typer.Option(
            "--places",
            metavar="anywhere|dealt",
            help="Any model on any device, or each on devices that it is given for good, so that "
            "all are as full.",
            show_default="what the trace says, or anywhere",
        ),
    ] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            "--what-if",
            metavar="+SIZE",
            help="Also with each budget changed: +8GB, -2GiB, or cuda:0=+8GB. Repeatable.",
        ),
    ] = None,
    timed: Annotated[
        bool,
        typer.Option(
            "--timed/--serial",
            help="As time goes by, with waits; or one request after the other.",
        ),
    ] = False,
    slots: Annotated[
        int, typer.Option("--slots", min=1, max=4096, help="Runs at once on a device.")
    ] = 4,
    deadline: Annotated[
        float | None,
        typer.Option(
            "--deadline", metavar="SECONDS", help="Longest wait for a model; else refused."
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests",
            min=1,
            help="The first so many only; of a made-up trace its length.",
            show_default="all, or 20000",
        ),
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option("--models", metavar="FILE", help="What the models of a .csv trace are."),
    ] = None,
    model_count: Annotated[
        int | None,
        typer.Option("--model-count", min=2, help="Of a made-up trace.", show_default="300"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of a made-up trace.")] = 1,
    bound: Annotated[
        bool, typer.Option("--bound/--no-bound", help="Compute the offline bound.")
    ] = True,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Write a picture.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replay requests through the server's own core under a virtual clock. Needs no server.

    Shows loads, load time, hits, evictions and waits, beside LRU and the offline bound.
    """
    asked = _Asked(
        trace=trace,
        models_file=models,
        policies=policy or [],
        budgets=budget or [],
        devices_file=devices,
        host_budget=host_budget,
        places=places,
        what_ifs=what_if or [],
        timed=timed,
        slots=slots,
        deadline_s=deadline,
        requests=requests,
        model_count=model_count,
        seed=seed,
        bound=bound,
        plot=plot,
    )
    with _exit_codes():
        study, others = _studies(asked)
        if as_json:
            from modelyard_server.simulation.report import json_of

            print_json(json_of(study, others))
        else:
            _print(study, others)
        if plot is not None:
            from modelyard_server.simulation.plot import plot_study

            plot_study(study, plot, others)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn errors into one line and an exit code."""
    from modelyard_server.config import ConfigError
    from modelyard_server.simulation.machine import SimulationError
    from modelyard_server.simulation.plot import PlotError
    from modelyard_server.simulation.trace import TraceError

    try:
        yield
    except ConfigError as error:
        for problem in error.problems:
            source = error.source
            name = "the file" if source is None else source.name or str(source)
            print_line(f"error: {problem.describe(name)}", err=True)
        raise typer.Exit(EXIT_USAGE) from None
    except (TraceError, PlotError, ValueError) as error:
        print_line(f"error: {error}", err=True)
        raise typer.Exit(EXIT_USAGE) from None
    except SimulationError as error:
        print_line(f"error: {error}", err=True)
        raise typer.Exit(EXIT_REFUSED) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(EXIT_INTERRUPTED) from error


def _studies(asked: _Asked) -> tuple[Study, list[Study]]:
    from modelyard_server.config import load_config
    from modelyard_server.simulation.machine_text import parse_what_if
    from modelyard_server.simulation.places import parse_places, place_models
    from modelyard_server.simulation.plot import check_plot_path
    from modelyard_server.simulation.study import choose_policies, run_study

    # What can be wrong is looked at first: a replay may take minutes.
    # Of the server's folders nothing is wanted: it may be another machine's.
    file = asked.devices_file
    config = None if file is None else load_config(file, check_paths=False)
    wanted = asked.policies or ([] if config is None else [config.yard.policy])
    policies = choose_policies(wanted, timed=asked.timed)
    what_ifs = [parse_what_if(text) for text in asked.what_ifs]
    wanted_places = None if asked.places is None else parse_places(asked.places)
    if asked.plot is not None:
        check_plot_path(asked.plot)
    if asked.timed and asked.devices_file and config and config.yard.order != _REPLAYED_ORDER:
        print_line(
            f'order = "{config.yard.order}" of {asked.devices_file.name} is not replayed: the core '
            f'decides as with "{_REPLAYED_ORDER}"; fifo+lru is in strict order',
            err=True,
        )
    trace = _trace(asked)
    if asked.timed:
        trace.check_countable()
    machine = _machine(asked, trace, config)
    trace, placing = place_models(trace, machine, wanted_places)
    changed = [(what_if.text, what_if.applied_to(machine)) for what_if in what_ifs]
    for each in (machine, *(other for _, other in changed)):
        trace.check_fits(each.budgets)
    with _Watching(total=len(trace)) as watching:
        study, *others = (
            run_study(
                trace,
                each,
                policies,
                timed=asked.timed,
                bound=asked.bound,
                watcher=watching.begin,
                placing=placing,
                label=label,
            )
            for label, each in (("", machine), *changed)
        )
    return study, others


def _trace(asked: _Asked) -> Trace:
    from modelyard_server.simulation.families import family_trace, is_family
    from modelyard_server.simulation.trace import TraceError
    from modelyard_server.simulation.trace_files import read_trace

    path = Path(asked.trace)
    if _is_there(path) or (path.suffix and not is_family(asked.trace)):
        if asked.model_count is not None:
            raise ValueError("--model-count is for made-up traces; this is a file")
        trace = read_trace(path, asked.models_file)
        return trace if asked.requests is None else trace.first(asked.requests)
    if asked.models_file is not None:
        raise ValueError("--models is for .csv traces; this one is made up")
    if not is_family(asked.trace):
        raise TraceError(_no_trace(asked.trace))
    return family_trace(
        asked.trace,
        requests=asked.requests or 20_000,
        models=asked.model_count or 300,
        seed=asked.seed,
    )


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False  # A name that no file can have.


def _no_trace(text: str) -> str:
    from modelyard_server.simulation.families import FAMILIES

    return (
        f"{text[:80]!r} is neither a .csv, .npz or .jsonl file nor a made-up trace: "
        f"{', '.join(FAMILIES)}, perhaps with a number as in zipf:0.9"
    )


def _machine(asked: _Asked, trace: Trace, config: Config | None) -> Machine:
    from modelyard_server.simulation.machine import Machine
    from modelyard_server.simulation.machine_text import machine_of_config, parse_budget

    if config is not None and asked.budgets:
        raise ValueError("--budget and --devices both say what the budgets are: give one of them")
    footprint = trace.footprint_bytes()
    texts = asked.budgets or [_DEFAULT_BUDGET]
    host_bytes = None if asked.host_budget is None else parse_size(asked.host_budget)
    base = Machine(
        budgets=tuple(parse_budget(text, footprint) for text in texts),
        host_budget_bytes=host_bytes or 0,
        slots=asked.slots,
        deadline_s=asked.deadline_s,
    )
    return base if config is None else machine_of_config(config, base, host_bytes)


def _print(study: Study, others: list[Study]) -> None:
    from modelyard_server.simulation.report import (
        cause_lines,
        rows_of,
        title_of,
        wait_rows,
        what_if_rows,
    )

    for each in (study, *others):
        print_line(title_of(each))
        print_table(*rows_of(each))
        if each.timed:
            print_table(*wait_rows(each))
        for line in cause_lines(each):
            print_line(line)
    if others:
        print_line("What if")
        print_table(*what_if_rows(study, others))
    if study.offline.note:
        print_line(study.offline.note, err=True)
    elif study.timed and study.offline.bound_s is not None:
        print_line(
            "The bound is for one request after the other. Who makes requests wait and serves "
            "several by one load can be below it."
        )


@dataclass(slots=True)
class _Watching:
    """Shows on a terminal how far long work is; quiet where nobody looks."""

    total: int
    _bar: object = field(default=None, init=False)

    def __enter__(self) -> _Watching:
        # Imported here: --help can do without.
        from rich.console import Console
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        bar = Bar(console=console, transient=True, disable=not console.is_terminal)
        bar.start()
        self._bar = bar
        return self

    def __exit__(self, *_: object) -> None:
        from rich.progress import Progress as Bar

        if isinstance(self._bar, Bar):
            self._bar.stop()

    def begin(self, what: str) -> Progress | None:
        """Show the next piece of work, and return whom to tell how far it is."""
        from rich.progress import Progress as Bar

        bar = self._bar
        if not isinstance(bar, Bar):
            return None
        for task in bar.tasks:
            bar.update(task.id, visible=False)
        task_id = bar.add_task(what, total=self.total)
        return lambda count: bar.update(task_id, completed=count)
