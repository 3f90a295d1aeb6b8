"""What the commands for models and routes have in common: both are records of the catalog."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Annotated, TypeAlias, TypeVar

import typer

from modelyard_server.cli.connection import (
    DEFAULT_SERVER,
    AsJson,
    Server,
    Timeout,
    refuse_options_before,
)
from modelyard_server.cli.printing import print_json, print_line, print_table, short_name

__all__ = ["DryRun", "Etag", "print_list", "print_record", "print_removed", "record_group", "when"]

T = TypeVar("T")

Etag: TypeAlias = Annotated[
    str | None,
    typer.Option("--etag", metavar="ETAG", help="Do it only if this is the etag it has."),
]
"""Guards a change."""

DryRun: TypeAlias = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and change nothing.")
]
"""Checks a change."""


def record_group(
    what: str, description: str, list_all: Callable[[str, float, bool], None]
) -> typer.Typer:
    """Return a group of commands that lists everything if it is used alone.

    Args:
        what: the records, for instance "models".
        description: of the group.
        list_all: lists them, given a server, a timeout in seconds, and whether as JSON.
    """

    def group(
        ctx: typer.Context,
        server: Server = DEFAULT_SERVER,
        timeout: Timeout = 30.0,
        as_json: AsJson = False,
    ) -> None:
        if ctx.invoked_subcommand is None:
            list_all(server, timeout, as_json)
        else:
            refuse_options_before(ctx)

    group.__doc__ = f"List the {what}, or do what a command says."
    commands = typer.Typer(help=description)
    commands.callback(invoke_without_command=True)(group)
    return commands


def print_list(
    records: Sequence[T], as_json: bool, headers: Sequence[str], row: Callable[[T], Sequence[str]]
) -> None:
    """Print records, each as a row of a table."""
    if as_json:
        print_json(records)
    else:
        print_table(headers, map(row, records))


def print_record(fields: Iterable[Sequence[str]]) -> None:
    """Print the fields of a record, each with its name."""
    print_table(["field", "value"], fields)


def print_removed(kind: str, name: str, as_json: bool) -> None:
    """Say that a record is gone.

    Args:
        kind: "model" or "route".
        name: its id, or its resource name.
        as_json: for a program.
    """
    if as_json:
        print_json({"removed": f"{kind}s/{short_name(name)}"})
    else:
        print_line(f"removed {short_name(name)}")


def when(time: datetime | None) -> str:
    """A time as a cell; empty if it is not known."""
    return "" if time is None else time.isoformat()
