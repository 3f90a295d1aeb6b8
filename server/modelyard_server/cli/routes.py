"""``modelyard routes``: what keys mean, and changing it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from modelyard_server.cli.connection import (
    DEFAULT_SERVER,
    AsJson,
    Server,
    Timeout,
    ask,
    exit_codes,
    refuse_options_before,
)
from modelyard_server.cli.printing import (
    print_json,
    print_line,
    print_table,
    short_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from modelyard import KeyChange, Route

__all__ = ["register"]

_KEYS_SHOWN = 6

_RouteName: TypeAlias = Annotated[
    str, typer.Argument(metavar="ROUTE", help="Id of the route.", show_default=False)
]
_Etag: TypeAlias = Annotated[
    str | None,
    typer.Option("--etag", metavar="ETAG", help="Do it only if this is the route's etag."),
]
_DryRun: TypeAlias = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and change nothing.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    routes = typer.Typer(help="What keys mean.")
    routes.callback(invoke_without_command=True)(_group)
    routes.command("list")(_list)
    routes.command("show")(_show)
    routes.command("add")(_add)
    routes.command("update")(_update)
    routes.command("rm")(_remove)
    routes.command("resolve")(_resolve)
    app.add_typer(routes, name="routes")


def _group(
    ctx: typer.Context,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """List the routes, or do what a command says."""
    if ctx.invoked_subcommand is None:
        _list(server, timeout, as_json)
    else:
        refuse_options_before(ctx)


def _list(
    server: Server = DEFAULT_SERVER, timeout: Timeout = 30.0, as_json: AsJson = False
) -> None:
    """List the routes."""
    routes = ask(server, timeout, lambda admin: admin.list_routes())
    if as_json:
        print_json(routes)
        return
    print_table(
        ["route", "keys", "model", "owner", "warnings"],
        (
            [
                route.id,
                _few(route.keys),
                "" if route.model is None else short_name(route.model),
                str(route.owner),
                "; ".join(route.warnings),
            ]
            for route in routes
        ),
    )


def _show(
    route: _RouteName,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Print everything about one route."""
    _print_route(ask(server, timeout, lambda admin: admin.get_route(route)), as_json)


def _add(
    route: _RouteName,
    keys: Annotated[
        list[str], typer.Argument(metavar="KEY...", help="Keys of it.", show_default=False)
    ],
    model: Annotated[
        str, typer.Option("--model", help="Id of the model they mean.", show_default=False)
    ],
    dry_run: _DryRun = False,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Give keys a model. Nothing is loaded."""
    added = ask(
        server,
        timeout,
        lambda admin: admin.create_route(route, keys, model=model, validate_only=dry_run),
        model=model,
    )
    _print_route(added, as_json)


def _update(
    route: _RouteName,
    model: Annotated[str | None, typer.Option("--model", help="What its keys shall mean.")] = None,
    keys: Annotated[
        list[str] | None,
        typer.Option("--key", help="A key it shall have, in place of all it has; may be repeated."),
    ] = None,
    add_keys: Annotated[
        list[str] | None, typer.Option("--add-key", help="A key to add; may be repeated.")
    ] = None,
    remove_keys: Annotated[
        list[str] | None, typer.Option("--rm-key", help="A key to take away; may be repeated.")
    ] = None,
    etag: _Etag = None,
    dry_run: _DryRun = False,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 300.0,
    as_json: AsJson = False,
) -> None:
    """Change a route while requests flow; what is not given stays as it is.

    Where its model is resident, another one is loaded before the keys mean it.
    """
    with exit_codes():
        if not (model or keys or add_keys or remove_keys):
            raise ValueError("nothing to change: give --model, --key, --add-key or --rm-key")
    updated = ask(
        server,
        timeout,
        lambda admin: admin.update_route(
            route,
            model=model,
            keys=keys or None,
            add_keys=add_keys or (),
            remove_keys=remove_keys or (),
            etag=etag,
            validate_only=dry_run,
        ),
        model=model,
    )
    if as_json:
        print_json(updated)
        return
    _print_route(updated.route, as_json)
    _print_changes(updated.changes)


def _remove(
    route: _RouteName,
    etag: _Etag = None,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Remove a route; its keys mean nothing then."""
    ask(server, timeout, lambda admin: admin.delete_route(route, etag=etag))
    if as_json:
        print_json({"removed": f"routes/{short_name(route)}"})
    else:
        print_line(f"removed {short_name(route)}")


def _resolve(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="What to ask about.", show_default=False)
    ],
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Say what a request for a key would do, and do nothing."""
    resolution = ask(server, timeout, lambda admin: admin.resolve(key))
    if as_json:
        print_json(resolution)
        return
    print_table(
        ["step", "model", "resident", "device"],
        (
            [
                str(number),
                short_name(step.model),
                "resident" if step.resident else "",
                "" if step.device is None else short_name(step.device),
            ]
            for number, step in enumerate(resolution.steps, 1)
        ),
    )
    print_line(f"{key}: {resolution.explanation}")


def _print_route(route: Route, as_json: bool) -> None:
    if as_json:
        print_json(route)
        return
    print_table(
        ["field", "value"],
        [
            ["route", route.id],
            ["keys", ", ".join(route.keys)],
            ["model", "" if route.model is None else short_name(route.model)],
            ["owner", str(route.owner)],
            ["created", "" if route.created_at is None else route.created_at.isoformat()],
            ["changed", "" if route.updated_at is None else route.updated_at.isoformat()],
            ["etag", route.etag],
        ],
    )
    for warning in route.warnings:
        print_line(f"warning: {warning}")


def _print_changes(changes: Iterable[KeyChange]) -> None:
    def named(model: str | None) -> str:
        return "nothing" if model is None else short_name(model)

    for change in changes:
        print_line(f"{change.key}: {named(change.before)} -> {named(change.after)}")


def _few(keys: tuple[str, ...]) -> str:
    more = len(keys) - _KEYS_SHOWN
    return ", ".join(keys[:_KEYS_SHOWN]) + (f" and {more} more" if more > 0 else "")
