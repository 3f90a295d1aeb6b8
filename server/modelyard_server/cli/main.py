"""The command line: `modelyard serve`, `modelyard demo`, and what talks to a running server."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from modelyard_server.cli import (
    client,
    config,
    devices,
    models,
    record,
    residencies,
    routes,
    simulate,
    store,
    watch,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="modelyard",
    help="Serves many keyed models from few devices, within real memory budgets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"modelyard {version('modelyard')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Serves many keyed models from few devices, within real memory budgets."""


@app.command()
def serve(
    config: Annotated[Path, typer.Option("--config", help="The server's TOML file.")],
) -> None:
    """Serve the models of a configuration file until SIGTERM or Ctrl-C.

    Exit code 2 if the file is wrong, a device is missing or the port is in use.
    """
    from modelyard_server.config import ConfigError, load_config
    from modelyard_server.lifecycle import EXIT_CANNOT_START, run_server

    try:
        loaded = load_config(config)
    except ConfigError as error:
        for problem in error.problems:
            typer.echo(problem.describe(str(config)), err=True)
        raise typer.Exit(EXIT_CANNOT_START) from None
    raise typer.Exit(run_server(loaded))


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Option("--folder", help="Where its models are kept between runs.")
    ] = Path("build/demo"),
) -> None:
    """Serve real models of twice the budget's size, and show what happens."""
    from modelyard_server.demo.show import show

    raise typer.Exit(show(folder))


client.register(app)
devices.register(app)
models.register(app)
routes.register(app)
residencies.register(app)
watch.register(app)
store.register(app)
config.register(app)
record.register(app)
simulate.register(app)


def main() -> None:
    """Entry point of the `modelyard` command."""
    app()
