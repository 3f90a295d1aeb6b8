"""``modelyard routes``: what keys mean, and changing it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from modelyard_server.cli.connection import (
    DEFAULT_SERVER,
    AsJson,
    Server,
    Timeout,
    ask,
    exit_codes,
)
from modelyard_server.cli.printing import (
    print_json,
    print_line,
    print_table,
    short_name,
)
from modelyard_server.cli.records import (
    DryRun,
    Etag,
    print_list,
    print_record,
    print_removed,
    record_group,
    when,
)
from modelyard_server.cli.route_targets import (
    canary_of,
    leads_to,
    read_file,
    split_of,
    target_rows,
    versions_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from modelyard import KeyChange, Route, RouteTarget

__all__ = ["register"]

_KEYS_SHOWN = 6

_RouteName: TypeAlias = Annotated[
    str, typer.Argument(metavar="ROUTE", help="Id of the route.", show_default=False)
]
_Model: TypeAlias = Annotated[
    str | None, typer.Option("--model", help="Id of the model that its keys mean.")
]
_Split: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--split", metavar="A=90,B=10", help="Models, or routes/R, with the weights of a split."
    ),
]
_Versions: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--versions", metavar="V1=A,V2=B", help="Versions, each with its model or routes/R."
    ),
]
_Current: TypeAlias = Annotated[
    str | None, typer.Option("--current", help="The version that its keys mean.")
]
_File: TypeAlias = Annotated[
    Path | None,
    typer.Option("--file", help="A file of TOML or .json with a target of any kind."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    routes = record_group("routes", "What keys mean.", _list)
    routes.command("list")(_list)
    routes.command("show")(_show)
    routes.command("create")(_create)
    routes.command("update")(_update)
    routes.command("promote")(_promote)
    routes.command("abort")(_abort)
    routes.command("delete")(_delete)
    routes.command("resolve")(_resolve)
    # As those of models are called.
    routes.command("add", hidden=True)(_create)
    routes.command("rm", hidden=True)(_delete)
    app.add_typer(routes, name="routes")


def _list(
    server: Server = DEFAULT_SERVER, timeout: Timeout = 30.0, as_json: AsJson = False
) -> None:
    """List the routes."""
    print_list(
        ask(server, timeout, lambda admin: admin.list_routes()),
        as_json,
        ["route", "keys", "means", "owner", "warnings"],
        lambda route: [
            route.id,
            _few((*route.keys, *map(_prefix, route.prefixes))),
            leads_to(route.target),
            str(route.owner),
            "; ".join(route.warnings),
        ],
    )


def _show(
    route: _RouteName,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Print everything about one route."""
    _print_route(ask(server, timeout, lambda admin: admin.get_route(route)), as_json)


def _create(
    route: _RouteName,
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="KEY...", help="Keys of it.", show_default=False)
    ] = None,
    model: _Model = None,
    split: _Split = None,
    versions: _Versions = None,
    current: _Current = None,
    file: _File = None,
    prefixes: Annotated[
        list[str] | None,
        typer.Option("--prefix", help='Beginning of keys; "" is all; may be repeated.'),
    ] = None,
    dry_run: DryRun = False,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Give keys a meaning. Nothing is loaded."""
    with exit_codes():
        target = _target_of(model, split, versions, current, file)
        if target is None:
            raise ValueError("what shall it mean? Give --model, --split, --versions or --file")
        if not keys and prefixes is None:
            raise ValueError("give it a key, or a --prefix")
    created = ask(
        server,
        timeout,
        lambda admin: admin.create_route(
            route, keys or (), target=target, prefixes=prefixes or (), validate_only=dry_run
        ),
        model=model,
    )
    _print_route(created, as_json)


def _update(
    route: _RouteName,
    model: _Model = None,
    split: _Split = None,
    versions: _Versions = None,
    current: _Current = None,
    canary: Annotated[
        str | None,
        typer.Option(
            "--canary", metavar="V2=5", help="A version on trial, and how many percent it gets."
        ),
    ] = None,
    file: _File = None,
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
    prefixes: Annotated[
        list[str] | None,
        typer.Option(
            "--prefix", help="A prefix it shall have, in place of all it has; may be repeated."
        ),
    ] = None,
    no_prefixes: Annotated[
        bool, typer.Option("--no-prefixes", help="Take its prefixes away.")
    ] = False,
    etag: Etag = None,
    dry_run: DryRun = False,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 300.0,
    as_json: AsJson = False,
) -> None:
    """Change a route while requests flow; what is not given stays as it is.

    Where what its keys mean is resident, another model or version is loaded before they mean it.
    """
    with exit_codes():
        if prefixes and no_prefixes:
            raise ValueError("give new prefixes or take them away, not both")
        target = _target_of(model, split, versions, None if versions is None else current, file)
        given: dict[str, Any] = {"target": target}
        if versions is None:
            given["current"] = current
        if canary is not None:
            given["canary"] = canary_of(canary)
        if prefixes or no_prefixes:
            given["prefixes"] = prefixes or ()
        if not any((target, current, canary, keys, add_keys, remove_keys, prefixes, no_prefixes)):
            raise ValueError("nothing to change: give a target, keys or prefixes; see --help")
    updated = ask(
        server,
        timeout,
        lambda admin: admin.update_route(
            route,
            keys=keys or None,
            add_keys=add_keys or (),
            remove_keys=remove_keys or (),
            etag=etag,
            validate_only=dry_run,
            **given,
        ),
        model=model,
    )
    if as_json:
        print_json(updated)
        return
    _print_route(updated.route, as_json)
    _print_changes(updated.changes)


def _promote(
    route: _RouteName,
    etag: Etag = None,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 300.0,
    as_json: AsJson = False,
) -> None:
    """Make the version on trial the current one, which is loaded first."""
    _print_route(
        ask(server, timeout, lambda admin: admin.promote_canary(route, etag=etag)), as_json
    )


def _abort(
    route: _RouteName,
    etag: Etag = None,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """End a trial: every request gets the current version again."""
    _print_route(ask(server, timeout, lambda admin: admin.abort_canary(route, etag=etag)), as_json)


def _delete(
    route: _RouteName,
    etag: Etag = None,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Delete a route; its keys mean nothing then."""
    ask(server, timeout, lambda admin: admin.delete_route(route, etag=etag))
    print_removed("route", route, as_json)


def _resolve(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="What to ask about.", show_default=False)
    ],
    affinity: Annotated[
        str | None, typer.Option("--affinity", help="What the request would be given.")
    ] = None,
    version: Annotated[
        str | None, typer.Option("--version", help="The version it would ask for.")
    ] = None,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Say what a request for a key would do, and do nothing."""
    resolution = ask(
        server, timeout, lambda admin: admin.resolve(key, affinity=affinity, version=version)
    )
    if as_json:
        print_json(resolution)
        return
    print_table(
        ["step", "model", "resident", "device", "part", "version", ""],
        (
            [
                str(number),
                f"({step.transform})" if step.transform else short_name(step.model),
                "resident" if step.resident else "",
                "" if step.device is None else short_name(step.device),
                step.branch,
                step.version or "",
                "perhaps" if step.conditional else "",
            ]
            for number, step in enumerate(resolution.steps, 1)
        ),
    )
    print_line(f"{key}: {resolution.explanation}")


def _target_of(
    model: str | None,
    split: str | None,
    versions: str | None,
    current: str | None,
    file: Path | None,
) -> RouteTarget | None:
    """The target that options say; None if they say none. Raises ValueError."""
    from modelyard import ModelTarget

    if current is not None and versions is None:
        raise ValueError("--current is for --versions")
    if sum(each is not None for each in (model, split, versions, file)) > 1:
        raise ValueError("give one of --model, --split, --versions and --file")
    if model is not None:
        return ModelTarget(model=model)
    if split is not None:
        return split_of(split)
    if versions is not None:
        return versions_of(versions, current)
    return None if file is None else read_file(file)


def _print_route(route: Route, as_json: bool) -> None:
    from modelyard import ModelTarget

    if as_json:
        print_json(route)
        return
    target = route.target
    fields = [["route", route.id], ["keys", ", ".join(route.keys)]]
    if route.prefixes:
        fields.append(["prefixes", ", ".join(map(_prefix, route.prefixes))])
    if target is None or isinstance(target, ModelTarget):
        fields.append(["model", leads_to(target)])
    else:
        fields.append(["kind", target.kind])
        said = target.to_dict()[target.kind].items()
        fields += [[name, str(value)] for name, value in said if not isinstance(value, dict | list)]
    fields += [
        ["owner", str(route.owner)],
        ["created", when(route.created_at)],
        ["changed", when(route.updated_at)],
        ["etag", route.etag],
    ]
    print_record(fields)
    if target is not None and not isinstance(target, ModelTarget):
        print_table(["part", "leads to", ""], target_rows(target))
    for warning in route.warnings:
        print_line(f"warning: {warning}")


def _print_changes(changes: Iterable[KeyChange]) -> None:
    def named(meaning: str | None) -> str:
        if meaning is None:
            return "nothing"
        return short_name(meaning) if meaning.startswith("models/") else meaning

    for change in changes:
        print_line(f"{change.key}: {named(change.before)} -> {named(change.after)}")


def _few(keys: tuple[str, ...]) -> str:
    more = len(keys) - _KEYS_SHOWN
    return ", ".join(keys[:_KEYS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _prefix(prefix: str) -> str:
    return f"{prefix}*"
