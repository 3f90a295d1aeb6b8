"""``modelyard devices plan`` and ``apply``: the device plan, from files and for people."""

from __future__ import annotations

import json
import sys
import threading
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from modelyard.placements import placement_text
from modelyard_server.cli.connection import (
    DEFAULT_SERVER,
    EXIT_REFUSED,
    AsJson,
    Server,
    Timeout,
    ask,
    exit_codes,
)
from modelyard_server.cli.printing import (
    charges,
    print_json,
    print_line,
    print_table,
    short_name,
    size,
)
from modelyard_server.cli.watch import event_line

if TYPE_CHECKING:
    from modelyard import (
        Admin,
        DeviceForecast,
        DevicePlan,
        EventWatch,
        ModelForecast,
        PlacedModel,
        PlanReport,
    )

__all__ = ["print_forecasts", "register"]

_PREFIXES_SHOWN: Final = 3


def register(app: typer.Typer) -> None:
    """Add the commands to the group of devices."""
    app.command("plan")(_plan)
    app.command("apply")(_apply)


def _plan(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]",
            help="Plan to try, TOML or JSON; - for standard input. Without: the plan in force.",
            show_default=False,
        ),
    ] = None,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Say what a plan would do, and change nothing; or print the plan in force.

    Exit code 1 if the plan cannot be applied.
    """
    if file is None:
        plan = ask(server, timeout, lambda admin: admin.get_plan())
        if as_json:
            print_json(plan)
        else:
            _print_plan(plan)
        return
    with exit_codes():
        change = _read_plan(file)
    report = ask(server, timeout, lambda admin: admin.plan_devices(change))
    if as_json:
        print_json(report)
    else:
        _print_report(report)
    if report.obstacles:
        raise typer.Exit(EXIT_REFUSED)


def _apply(
    file: Annotated[
        str,
        typer.Argument(help="Plan to apply, TOML or JSON; - for standard input.", metavar="FILE"),
    ],
    etag: Annotated[
        str | None,
        typer.Option(
            "--etag", help="Apply it only if this is the etag of the plan in force.", metavar="ETAG"
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 300.0,
    as_json: AsJson = False,
) -> None:
    """Apply a plan, all of it or nothing, while requests flow.

    Shows what it will do, asks, and tells how it goes. --json needs --yes. Ctrl-C while it is
    applied, or its time being over, leaves the plan as it was.
    """
    from modelyard import Admin

    with exit_codes():
        if not yes and (as_json or file == "-"):
            raise ValueError(f"nobody can be asked with {'--json' if as_json else '-'}: give --yes")
        change = _read_plan(file)
        with Admin(server, timeout_s=timeout) as admin:
            if as_json:
                print_json(admin.apply_plan(change, etag=etag))
                return
            if not yes and etag is None and not change.etag:
                # What is asked about is what is applied, or nothing.
                etag = admin.get_plan().etag
            report = admin.plan_devices(change)
            _print_report(report)
            if report.obstacles:
                raise typer.Exit(EXIT_REFUSED)
            if not yes and not typer.confirm("Apply this plan?"):
                raise typer.Exit(EXIT_REFUSED)
            with _progress(admin):
                applied = admin.apply_plan(change, etag=etag)
    plan = applied.plan
    print_line(f"applied: the plan in force has revision {plan.revision}, etag {plan.etag}")
    if applied.report != report:
        print_line("what it did is not quite the forecast:")
        _print_report(applied.report)


@contextmanager
def _progress(admin: Admin) -> Iterator[None]:
    """Tell on stderr what happens meanwhile."""
    with admin.watch_events() as watch:
        # A daemon, because it ends with the watch and nothing is lost with it.
        thread = threading.Thread(
            target=_tell, args=(watch,), name="modelyard-progress", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            watch.close()
            thread.join()


def _tell(watch: EventWatch) -> None:
    from modelyard import EventType, ModelyardError

    of_requests = (EventType.QUEUED, EventType.REFUSED)
    try:
        for event in watch:
            if event.type not in of_requests:
                print_line(event_line(event), err=True)
    except (ModelyardError, RuntimeError):
        # It is only an accompaniment: the call itself tells how it ended.
        return


def _read_plan(file: str) -> DevicePlan:
    """Read a plan. Raises ``ValueError`` or ``TypeError``, with the name of the file."""
    from modelyard import DevicePlan

    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        is_json = (
            text.lstrip().startswith("{") if file == "-" else Path(file).suffix.lower() == ".json"
        )
        data = json.loads(text, object_pairs_hook=_once) if is_json else tomllib.loads(text)
        return DevicePlan.from_dict(data)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror or error}") from error
    except RecursionError as error:
        raise ValueError(f"{file}: too many levels") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse what JSON lets through: of two equal names it would silently take the last."""
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"{name[:60]!r} is there twice")
        table[name] = value
    return table


def _print_plan(plan: DevicePlan) -> None:
    print_table(
        ["device", "budget", "drained"],
        (
            [
                short_name(setting.device),
                "" if setting.budget_bytes is None else size(setting.budget_bytes),
                "drained" if setting.drained else "",
            ]
            for setting in plan.devices
        ),
    )
    print_table(
        ["model", "placement"],
        ([short_name(entry.model), placement_text(entry.placement)] for entry in plan.models),
    )
    since = "" if plan.updated_at is None else f", since {plan.updated_at.isoformat()}"
    print_line(f"revision {plan.revision}, etag {plan.etag}{since}")


def _print_report(report: PlanReport) -> None:
    if report.models:
        print_table(
            ["model", "holds now", "will hold", "placed", "how"],
            (
                [
                    short_name(model.model),
                    charges(model.current),
                    charges(model.planned),
                    _placed(model.alternatives),
                    _how(model),
                ]
                for model in report.models
            ),
        )
    else:
        print_line("no model is placed otherwise")
    if report.displaced:
        print_table(
            ["leaves", "gives back", "for", "note"],
            (
                [
                    short_name(displaced.model),
                    charges(displaced.charges),
                    short_name(displaced.cause),
                    "when its requests end" if displaced.in_use else "",
                ]
                for displaced in report.displaced
            ),
        )
    print_forecasts(report.devices)
    if report.obstacles:
        print_table(
            ["obstacle", "reason", "what is wrong", "needed", "there"],
            (
                [
                    short_name(obstacle.subject),
                    obstacle.reason,
                    obstacle.description,
                    size(obstacle.needed_bytes) if obstacle.needed_bytes else "",
                    size(obstacle.available_bytes) if obstacle.needed_bytes else "",
                ]
                for obstacle in report.obstacles
            ),
        )
        print_line("the plan cannot be applied")


def print_forecasts(devices: Iterable[DeviceForecast]) -> None:
    """Print devices as they will be."""
    print_table(
        ["device", "budget", "will hold", "drained"],
        (
            [
                short_name(device.device),
                size(device.budget_bytes),
                size(device.used_bytes),
                "drained" if device.drained else "",
            ]
            for device in devices
        ),
    )


def _placed(alternatives: Iterable[PlacedModel]) -> str:
    """Return the ways to load a model: ``cuda:0 1GiB (encoder) + cpu 2MiB (head), or ...``."""
    return ", or ".join(
        " + ".join(
            f"{short_name(part.device)} {size(part.size_bytes)}{_prefixes(part.prefixes)}"
            for part in placed.parts
        )
        for placed in alternatives
    )


def _prefixes(prefixes: tuple[str, ...]) -> str:
    if prefixes in ((), ("",)):
        return ""
    shown = ", ".join(prefix or "(rest)" for prefix in prefixes[:_PREFIXES_SHOWN])
    more = len(prefixes) - _PREFIXES_SHOWN
    return f" ({shown}{f' and {more} more' if more > 0 else ''})"


def _how(model: ModelForecast) -> str:
    if not model.placement_changed:
        return ""
    return "loaded before the old one leaves" if model.staged else "at its next request"
