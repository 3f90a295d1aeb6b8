"""What commands that talk to a running server share: their options, and how they end.

They are the client half of the command line and know nothing but the client package. An error is
one line on stderr. Exit codes: 1 the server said no, 2 the command was not used properly, 3 no
server was reached, 130 Ctrl-C.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias, TypeVar

import typer

from modelyard_server.cli.printing import printable

if TYPE_CHECKING:
    from modelyard import Admin, Model, NotFound

__all__ = [
    "DEFAULT_SERVER",
    "EXIT_INTERRUPTED",
    "EXIT_REFUSED",
    "EXIT_UNREACHABLE",
    "EXIT_USAGE",
    "AsJson",
    "DeviceName",
    "ModelName",
    "Server",
    "Timeout",
    "ask",
    "exit_codes",
    "refuse_options_before",
    "suggest",
]

EXIT_REFUSED: Final = 1
"""Exit code when the server said no."""

EXIT_USAGE: Final = 2
"""Exit code for arguments that cannot be sent."""

EXIT_UNREACHABLE: Final = 3
"""Exit code when no server was reached."""

EXIT_INTERRUPTED: Final = 130
"""Exit code as a shell reports a program that Ctrl-C ended."""

DEFAULT_SERVER: Final = "127.0.0.1:8470"
_SERVER_VARIABLE: Final = "MODELYARD_SERVER"

_AnswerT = TypeVar("_AnswerT")

Server: TypeAlias = Annotated[
    str, typer.Option("--server", envvar=_SERVER_VARIABLE, help="HOST:PORT of the server.")
]
Timeout: TypeAlias = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", help="Most seconds to wait.")
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
ModelName: TypeAlias = Annotated[
    str, typer.Argument(metavar="MODEL", help="Id of the model.", show_default=False)
]
DeviceName: TypeAlias = Annotated[
    str, typer.Argument(metavar="DEVICE", help="Such as cuda:1 or cpu.", show_default=False)
]


def ask(
    server: str,
    timeout_s: float,
    question: Callable[[Admin], _AnswerT],
    *,
    model: str | None = None,
) -> _AnswerT:
    """Return the answer of a server to a question; ends the command if there is none.

    Args:
        server: its address.
        timeout_s: for each call.
        question: what to ask.
        model: the model that it is about: if there is none, those of similar names are named.
    """
    from modelyard import Admin, ModelNotFound

    with exit_codes(), Admin(server, timeout_s=timeout_s) as admin:
        try:
            return question(admin)
        except ModelNotFound as error:
            if model is not None:
                suggest(error, model, admin, lambda known: (known.id,))
            raise


def suggest(
    error: NotFound, wanted: str, admin: Admin, names_of: Callable[[Model], Iterable[str]]
) -> None:
    """Note in an error what the server has that is written nearly like what was wanted."""
    from modelyard import ModelyardError

    try:
        names = {name for model in admin.list_models() for name in names_of(model)}
    except ModelyardError:
        # It is only a hint: what matters is the error.
        return
    if near := difflib.get_close_matches(wanted, sorted(names)):
        error.add_note(f"did you mean {' or '.join(near)}?")


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn the client's errors into one line and an exit code."""
    from modelyard import ModelyardError, ServerUnavailable

    try:
        yield
    except ServerUnavailable as error:
        raise _failure(error, EXIT_UNREACHABLE) from error
    except ModelyardError as error:
        raise _failure(error, EXIT_REFUSED) from error
    except (TypeError, ValueError) as error:
        # What the client refuses to send.
        raise _failure(error, EXIT_USAGE) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(EXIT_INTERRUPTED) from error


def refuse_options_before(ctx: typer.Context) -> None:
    """Refuse options of a group that were given before one of its commands.

    They are for the group used alone. The command has its own, and would not see these.
    """
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(
                f"write {parameter.opts[0]} behind the command: "
                f"{ctx.command_path} {ctx.invoked_subcommand} {parameter.opts[0]}"
            )


def _failure(error: Exception, code: int) -> typer.Exit:
    reason = getattr(error, "reason", None)
    text = f"{reason}: {error}" if reason else str(error)
    violations = getattr(error, "violations", ())
    # Each may already be in the text; what is not would be lost.
    extra = [
        f"{violation.field}: {violation.description}"
        for violation in violations
        if violation.description not in text
    ]
    hints = getattr(error, "__notes__", ())
    typer.echo(printable(f"error: {'; '.join([text, *extra, *hints])}"), err=True)
    return typer.Exit(code)
