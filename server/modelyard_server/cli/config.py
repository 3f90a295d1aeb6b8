"""Commands that work on files and need no running server: ``check-config`` and ``import``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Final

import typer

from modelyard_server.config import ConfigError, load_config
from modelyard_server.config.problems import quoted
from modelyard_server.devices.sizes import format_size

__all__ = ["EXIT_REFUSED", "register"]

EXIT_REFUSED: Final = 2
"""Exit code for input that cannot be used."""

_NAMES_SHOWN: Final = 10


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    app.command("check-config")(_check_config)
    app.command("import")(_import)


def _check_config(
    file: Annotated[Path, typer.Argument(help="Configuration file (TOML).", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a configuration file and print everything that is wrong with it.

    Each problem is one line, FILE:LINE: key: text. Exit code 2 if there is any.
    """
    try:
        config = load_config(file)
    except ConfigError as error:
        if as_json:
            _echo_json(
                {
                    "ok": False,
                    "file": str(file),
                    "problems": [
                        {"key": problem.key, "line": problem.line, "text": problem.text}
                        for problem in error.problems
                    ],
                }
            )
        else:
            for problem in error.problems:
                typer.echo(problem.describe(str(file)))
        raise typer.Exit(EXIT_REFUSED) from error
    models, devices = len(config.models), len(config.devices)
    if as_json:
        _echo_json({"ok": True, "file": str(file), "models": models, "devices": devices})
    else:
        typer.echo(f"ok: {models} models, {devices} devices")


def _import(
    source: Annotated[Path, typer.Argument(help="Checkpoint to read.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="Model folder to write.", show_default=False)],
) -> None:
    """Turn a checkpoint into a safetensors model folder.

    Exit code 2, and no folder, if it is refused.
    """
    # Here, not above: the other commands shall not wait for a framework to be imported.
    from modelyard_server.weights.importing import ImportRefused, import_checkpoint

    try:
        report = import_checkpoint(source, folder)
    except ImportRefused as error:
        typer.echo(f"refused: {error}", err=True)
        raise typer.Exit(EXIT_REFUSED) from error
    typer.echo(
        f"imported {source} into {folder}: "
        f"{report.tensor_count} tensors, {format_size(report.size_bytes)}"
    )
    if report.left_out:
        # The names come from the checkpoint: quoted, or they could drive the terminal.
        shown = ", ".join(quoted(name) for name in report.left_out[:_NAMES_SHOWN])
        more = len(report.left_out) - _NAMES_SHOWN
        typer.echo(f"left out: {shown}{f' and {more} more' if more > 0 else ''}")


def _echo_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=True))
