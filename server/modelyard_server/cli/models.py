"""``modelyard models``: registering, changing and removing models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import typer

from modelyard.placements import placement_text
from modelyard_server.cli import residencies as residency_commands
from modelyard_server.cli.connection import (
    DEFAULT_SERVER,
    AsJson,
    ModelName,
    Server,
    Timeout,
    ask,
    exit_codes,
)
from modelyard_server.cli.printing import (
    plain,
    print_json,
    print_line,
    print_table,
    short_name,
    size,
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

if TYPE_CHECKING:
    from modelyard import Model

__all__ = ["register"]

_RUNTIME_HELP: Final = "What executes it: transformers, torch or identity."

_Runtime: TypeAlias = Annotated[str | None, typer.Option("--runtime", help=_RUNTIME_HELP)]
_Root: TypeAlias = Annotated[
    str | None, typer.Option("--root", help="Name of the server's folder with the weights.")
]
_Folder: TypeAlias = Annotated[
    str | None, typer.Option("--folder", help="Folder below the root, relative.")
]
_Task: TypeAlias = Annotated[
    str | None, typer.Option("--task", help="What it does, such as text-classification.")
]
_Keys: TypeAlias = Annotated[
    list[str] | None, typer.Option("--key", help="A key that means it; may be repeated.")
]
_Placement: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="PLACEMENT",
        help="Where it lives: cuda:1, auto, balanced, sequential, or a table as JSON.",
    ),
]
_Options: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--option", metavar="NAME=JSON", help="An option of the runtime; may be repeated."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    models = record_group("models", "Registered models.", _list)
    models.command("list")(_list)
    models.command("show")(_show)
    models.command("add")(_add)
    models.command("update")(_update)
    models.command("rm")(_remove)
    residency_commands.register_changes(models)
    app.add_typer(models, name="models")


def _list(
    server: Server = DEFAULT_SERVER, timeout: Timeout = 30.0, as_json: AsJson = False
) -> None:
    """List the registered models."""
    models = ask(server, timeout, lambda admin: admin.list_models())
    print_list(
        models,
        as_json,
        ["model", "keys", "runtime", "task", "placement", "estimated", "owner", "pinned"],
        lambda model: [
            model.id,
            ", ".join(model.keys),
            model.runtime,
            model.task,
            placement_text(model.placement),
            size(model.estimated_bytes),
            str(model.owner),
            "pinned" if model.pinned else "",
        ],
    )


def _show(
    model: ModelName,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Print everything about one model."""
    _print_model(ask(server, timeout, lambda admin: admin.get_model(model), model=model), as_json)


def _add(
    model: ModelName,
    runtime: Annotated[str, typer.Option("--runtime", help=_RUNTIME_HELP, show_default=False)],
    root: _Root = None,
    folder: _Folder = None,
    task: _Task = None,
    keys: _Keys = None,
    placement: _Placement = None,
    options: _Options = None,
    dry_run: DryRun = False,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Register a model. Its files are checked and priced; nothing is loaded."""
    with exit_codes():
        given = {
            "root": root,
            "folder": folder,
            "task": task or "",
            "keys": keys or [],
            "placement": _read_placement(placement),
            "options": _read_options(options),
        }
    added = ask(
        server,
        timeout,
        lambda admin: admin.create_model(model, runtime=runtime, validate_only=dry_run, **given),
    )
    _print_model(added, as_json)


def _update(
    model: ModelName,
    runtime: _Runtime = None,
    root: _Root = None,
    folder: _Folder = None,
    task: _Task = None,
    keys: _Keys = None,
    no_keys: Annotated[bool, typer.Option("--no-keys", help="Take its keys away.")] = False,
    placement: _Placement = None,
    options: _Options = None,
    no_options: Annotated[
        bool, typer.Option("--no-options", help="Take its options away.")
    ] = False,
    etag: Etag = None,
    dry_run: DryRun = False,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 300.0,
    as_json: AsJson = False,
) -> None:
    """Change a model; what is not given stays as it is.

    Keys and options that are given replace all there were. A resident model is loaded anew before
    the old one leaves.
    """
    with exit_codes():
        if (keys and no_keys) or (options and no_options):
            raise ValueError("give new ones or take them away, not both")
        texts = {"runtime": runtime, "root": root, "folder": folder, "task": task}
        given: dict[str, Any] = {name: text for name, text in texts.items() if text is not None}
        if keys or no_keys:
            given["keys"] = keys or []
        if options or no_options:
            given["options"] = _read_options(options)
        if placement is not None:
            given["placement"] = _read_placement(placement)
    changed = ask(
        server,
        timeout,
        lambda admin: admin.update_model(model, etag=etag, validate_only=dry_run, **given),
        model=model,
    )
    _print_model(changed, as_json)


def _remove(
    model: ModelName,
    etag: Etag = None,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Remove a model. Requests that run are answered, requests that wait are refused."""
    ask(server, timeout, lambda admin: admin.delete_model(model, etag=etag), model=model)
    print_removed("model", model, as_json)


def _read_placement(text: str | None) -> Any:
    """Return a placement as the client takes it: a table if it is written as JSON."""
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--device is no JSON: {error}") from error


def _read_options(texts: list[str] | None) -> dict[str, Any] | None:
    if not texts:
        return None
    options: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise ValueError(f"--option {text!r} must be NAME=JSON, such as top_k=5")
        if name in options:
            raise ValueError(f"--option {name!r} is given twice")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"--option {name!r} is no JSON: {error}; text needs its quotes: "
                f"""'{name}="text"'"""
            ) from error
    return options


def _print_model(model: Model, as_json: bool) -> None:
    if as_json:
        print_json(model)
        return
    source = "" if model.root is None else f"{model.root}: {model.folder}"
    by_plan = " (by the device plan)" if model.placed_by_plan else ""
    print_record(
        [
            ["model", model.id],
            ["keys", ", ".join(model.keys)],
            ["weights", source],
            ["runtime", model.runtime],
            ["task", model.task],
            ["options", json.dumps(plain(model.options))],
            ["placement", placement_text(model.placement) + by_plan],
            ["estimated", size(model.estimated_bytes)],
            [
                "largest run",
                size(model.estimated_activation_bytes) if model.estimated_activation_bytes else "",
            ],
            ["owner", str(model.owner)],
            ["pinned", "pinned" if model.pinned else ""],
            ["created", when(model.created_at)],
            ["etag", model.etag],
        ]
    )
    if model.alternatives:
        print_table(
            ["way", "device", "bytes", "parts"],
            (
                [
                    str(number),
                    short_name(part.device),
                    size(part.size_bytes),
                    ", ".join(prefix or "(all)" for prefix in part.prefixes),
                ]
                for number, placed in enumerate(model.alternatives, 1)
                for part in placed.parts
            ),
        )
    for warning in model.warnings:
        print_line(f"warning: {warning}")
