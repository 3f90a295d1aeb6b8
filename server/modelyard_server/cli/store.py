"""``modelyard store``: what the weight store holds, and giving back what nobody uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from modelyard_server.cli.connection import (
    DEFAULT_SERVER,
    EXIT_REFUSED,
    AsJson,
    Server,
    Timeout,
    ask,
    refuse_options_before,
)
from modelyard_server.cli.printing import print_json, print_line, print_table, size, store_rows

if TYPE_CHECKING:
    from modelyard import StoreCollected

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    store = typer.Typer(help="The weight store, and what nobody uses of it.")
    store.callback(invoke_without_command=True)(_group)
    store.command("collect")(_collect)
    app.add_typer(store, name="store")


def _group(
    ctx: typer.Context,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Say what the store holds, or do what a command says."""
    if ctx.invoked_subcommand is not None:
        refuse_options_before(ctx)
        return
    found = ask(server, timeout, lambda admin: admin.collect_store(validate_only=True))
    if as_json:
        print_json(found.store)
    else:
        _print_store(found)


def _collect(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would come back, and remove nothing.")
    ] = False,
    keep_s: Annotated[
        float | None,
        typer.Option(
            "--keep",
            metavar="SECONDS",
            help="For how long what was used is kept; 0: not at all. Else as configured.",
        ),
    ] = None,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 300.0,
    as_json: AsJson = False,
) -> None:
    """Give back now what nobody uses any more. Exit code 1 if something keeps all of it."""
    found = ask(
        server,
        timeout,
        lambda admin: admin.collect_store(keep_s=keep_s, validate_only=dry_run),
    )
    if as_json:
        print_json(found)
    else:
        if found.store is not None and not found.store.obstacle:
            done = "would come back" if dry_run else "came back"
            print_line(f"{size(found.freed_bytes)} {done}, of {found.freed_count} models")
        _print_store(found)
    if found.store is not None and found.store.obstacle:
        raise typer.Exit(EXIT_REFUSED)


def _print_store(found: StoreCollected) -> None:
    if found.store is None:
        print_line("this server has no weight store: models are read where they lie")
    else:
        print_table(["figure", "value"], store_rows(found.store))
