"""``residency``, ``load``, ``unload``, ``pin`` and ``unpin``: what is in memory, by hand."""

from __future__ import annotations

import typer

from modelyard_server.cli.connection import (
    DEFAULT_SERVER,
    AsJson,
    ModelName,
    Server,
    Timeout,
    ask,
)
from modelyard_server.cli.printing import print_json, print_residencies, show_residency

__all__ = ["register", "register_changes"]


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    app.command("residency")(_residency)
    register_changes(app)


def register_changes(app: typer.Typer) -> None:
    """Add the commands that change where a model stands, which are there twice."""
    app.command("load")(_load)
    app.command("unload")(_unload)
    app.command("pin")(_pin)
    app.command("unpin")(_unpin)


def _residency(
    server: Server = DEFAULT_SERVER, timeout: Timeout = 30.0, as_json: AsJson = False
) -> None:
    """List where every model stands."""
    residencies = ask(server, timeout, lambda admin: admin.list_residencies())
    if as_json:
        print_json(residencies)
    else:
        print_residencies(residencies)


def _load(
    model: ModelName,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Ask for a model to be loaded; returns at once."""
    show_residency(ask(server, timeout, lambda admin: admin.load(model), model=model), as_json)


def _unload(
    model: ModelName,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Take a model out of memory; returns when its memory is back."""
    show_residency(ask(server, timeout, lambda admin: admin.unload(model), model=model), as_json)


def _pin(
    model: ModelName,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Load a model and never evict it; returns at once."""
    show_residency(ask(server, timeout, lambda admin: admin.pin(model), model=model), as_json)


def _unpin(
    model: ModelName,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Let a pinned model be evicted again."""
    show_residency(ask(server, timeout, lambda admin: admin.unpin(model), model=model), as_json)
