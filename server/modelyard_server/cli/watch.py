"""``modelyard watch`` and ``modelyard explain``: what happens, and why a model is where it is."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from modelyard_server.cli.connection import (
    DEFAULT_SERVER,
    AsJson,
    ModelName,
    Server,
    Timeout,
    ask,
    exit_codes,
)
from modelyard_server.cli.explaining import evictions_told
from modelyard_server.cli.printing import (
    charges,
    clock,
    duration,
    note,
    plain,
    print_json,
    print_json_line,
    print_line,
    print_residencies,
    print_table,
    short_name,
    size,
)

if TYPE_CHECKING:
    from modelyard import Admin, Event, Residency

__all__ = ["event_line", "register"]


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    app.command("watch")(_watch)
    app.command("explain")(_explain)


def _watch(
    events: Annotated[
        bool, typer.Option("--events", help="Tell every decision and change, with its cause.")
    ] = False,
    past: Annotated[
        bool, typer.Option("--past", help="With --events: begin with those of the server's log.")
    ] = False,
    server: Server = DEFAULT_SERVER,
    timeout: Annotated[
        float,
        typer.Option("--timeout", metavar="SECONDS", help="Most seconds to be without the server."),
    ] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Tell where every model stands, and then each change, a line each, until Ctrl-C.

    Goes on by itself when the server comes back. With --json each line is a JSON object.
    """
    from modelyard import Admin

    with exit_codes(), Admin(server, timeout_s=timeout) as admin:
        if past and not events:
            raise ValueError("--past goes with --events")
        if events:
            _watch_events(admin, past=past, as_json=as_json)
        else:
            _watch_residencies(admin, as_json=as_json)


def _watch_events(admin: Admin, *, past: bool, as_json: bool) -> None:
    with admin.watch_events(include_past=past) as watch:
        for event in watch:
            if as_json:
                epoch = watch.position.epoch if watch.position is not None else None
                print_json_line(
                    {"truncated": watch.truncated, "epoch": epoch, "event": plain(event)}
                )
                continue
            if watch.truncated:
                print_line("-- events are missing here --")
            print_line(event_line(event))


def _watch_residencies(admin: Admin, *, as_json: bool) -> None:
    said: dict[str, str] = {}
    with admin.watch_residencies() as watch:
        for change in watch:
            kind = "snapshot" if change.snapshot else "change"
            if change.snapshot_begins and not as_json:
                said.clear()
                print_line("-- as it is now --")
            for residency in change.residencies:
                if as_json:
                    print_json_line(
                        {"kind": kind, "model": residency.model, "residency": residency}
                    )
                    continue
                line = _residency_line(residency)
                # What else has changed, such as its leases, is not on the line.
                if said.get(residency.name) != line:
                    said[residency.name] = line
                    print_line(f"{_now()} {line}")
            for name in change.removed:
                said.pop(name, None)
                model = f"models/{short_name(name)}"
                if as_json:
                    print_json_line({"kind": "removed", "model": model, "residency": None})
                else:
                    print_line(f"{_now()} {short_name(name)} removed")


def _explain(
    model: ModelName,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Tell why a model is where it is, why it had to leave, and what that has cost."""
    explanation = ask(server, timeout, lambda admin: admin.explain(model), model=model)
    if as_json:
        print_json(explanation)
        return
    print_line(explanation.summary)
    if explanation.residency is not None:
        print_residencies([explanation.residency])
    if explanation.truncated:
        print_line("older events have been dropped")
    for line in evictions_told(explanation.evictions):
        print_line(line)
    if explanation.events:
        print_table(
            ["time", "event", "subject", "for", "bytes", "what"],
            (
                [
                    clock(event.happened_at),
                    str(event.type),
                    short_name(event.subject),
                    short_name(event.cause),
                    size(event.size_bytes) if event.size_bytes else "",
                    ", ".join(_details(event)),
                ]
                for event in explanation.events
            ),
        )


def event_line(event: Event) -> str:
    """Return an event as one line for people."""
    words = [clock(event.happened_at), str(event.type), short_name(event.subject)]
    told = size(event.size_bytes)
    # Some descriptions name it.
    if event.size_bytes and told not in event.description:
        words.append(told)
    if event.cause:
        words.append(f"for {short_name(event.cause)}")
    text = " ".join(filter(None, words))
    return ", ".join([text, *_details(event)])


def _details(event: Event) -> list[str]:
    details = []
    if event.waited_s is not None:
        details.append(f"waited {duration(event.waited_s)}")
    if event.load_s is not None:
        details.append(f"loaded in {duration(event.load_s)}")
    if event.score is not None:
        details.append(f"score {event.score:.4g}")
    if event.description:
        details.append(event.description)
    if event.identity:
        details.append(f"by {event.identity}")
    return details


def _residency_line(residency: Residency) -> str:
    words = [short_name(residency.model), str(residency.state), charges(residency.charges)]
    if residency.pinned:
        words.append("pinned")
    text = " ".join(filter(None, words))
    return ", ".join(filter(None, [text, note(residency)]))


def _now() -> str:
    return clock(datetime.now(UTC))
