"""Commands that talk to a running server: predictions, what it holds, and its budgets.

They are the client half of the command line and know nothing but the client package. Output is
tables for people, or one JSON value with ``--json`` for programs; an error is one line on stderr.
Exit codes: 1 the server said no, 2 the command was not used properly, 3 no server was reached.

Texts come from models and from the network: whatever is printed goes through ``_printable``, so
that no escape sequence reaches the terminal.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, TypeVar

import typer

from modelyard_server.devices.sizes import format_size, parse_size

if TYPE_CHECKING:
    from modelyard import Admin, ManagedDevice, Residency

__all__ = ["EXIT_REFUSED", "EXIT_UNREACHABLE", "EXIT_USAGE", "register"]

EXIT_REFUSED: Final = 1
"""Exit code when the server said no."""

EXIT_USAGE: Final = 2
"""Exit code for arguments that cannot be sent."""

EXIT_UNREACHABLE: Final = 3
"""Exit code when no server was reached."""

_DEFAULT_SERVER: Final = "127.0.0.1:8470"
_SERVER_VARIABLE: Final = "MODELYARD_SERVER"

_PIPE_WIDTH: Final = 1000

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


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    app.command("predict")(_predict)
    app.command("models")(_models)
    app.command("devices")(_devices)
    app.command("residency")(_residency)
    app.command("stats")(_stats)
    app.command("load")(_load)
    app.command("unload")(_unload)
    app.command("pin")(_pin)
    app.command("unpin")(_unpin)
    app.command("budget")(_budget)


def _predict(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Key to ask for.", show_default=False)],
    texts: Annotated[
        list[str], typer.Argument(metavar="TEXT...", help="Inputs, a row each.", show_default=False)
    ],
    server: Server = _DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Ask for predictions on texts."""
    from modelyard import Client

    with _exit_codes(), Client(server, timeout_s=timeout) as client:
        prediction = client.predict(key, texts)
    outputs = {name: _plain(value) for name, value in prediction.items()}
    served = prediction.served
    if as_json:
        _print_json({"outputs": outputs, "served": _plain(served)})
        return
    # Only what has one row per input stands beside the inputs.
    rows = {name: value for name, value in outputs.items() if _has_rows(value, len(texts))}
    columns = [["input", *texts]]
    columns += [
        [name or "output", *(_cell(item) for item in value)] for name, value in rows.items()
    ]
    _print_table(
        [column[0] for column in columns],
        zip(*(column[1:] for column in columns), strict=True),
    )
    for name, value in outputs.items():
        if name not in rows:
            typer.echo(_printable(f"{name or 'output'}: {_cell(value)}"))
    load = "" if served.load_s is None else f" ({_duration(served.load_s)} of it loading)"
    typer.echo(
        _printable(
            f"{_id(served.model)} on {_id(served.device)}, {'cold' if served.cold else 'hit'}: "
            f"waited {_duration(served.wait_s)}{load}, ran {_duration(served.run_s)}"
        )
    )


def _models(
    server: Server = _DEFAULT_SERVER, timeout: Timeout = 30.0, as_json: AsJson = False
) -> None:
    """List the registered models."""
    models = _ask(server, timeout, lambda admin: admin.list_models())
    if as_json:
        _print_json(models)
        return
    _print_table(
        ["model", "keys", "runtime", "task", "placement", "estimated"],
        (
            [
                model.id,
                ", ".join(model.keys),
                model.runtime,
                model.task,
                "automatic" if model.placement is None else _cell(_plain(model.placement)),
                _size(model.estimated_bytes),
            ]
            for model in models
        ),
    )


def _devices(
    server: Server = _DEFAULT_SERVER, timeout: Timeout = 30.0, as_json: AsJson = False
) -> None:
    """List the devices, their budgets and what they hold."""
    devices = _ask(server, timeout, lambda admin: admin.list_devices())
    if as_json:
        _print_json(devices)
    else:
        _print_devices(devices)


def _residency(
    server: Server = _DEFAULT_SERVER, timeout: Timeout = 30.0, as_json: AsJson = False
) -> None:
    """List where every model stands."""
    residencies = _ask(server, timeout, lambda admin: admin.list_residencies())
    if as_json:
        _print_json(residencies)
    else:
        _print_residencies(residencies)


def _stats(
    server: Server = _DEFAULT_SERVER, timeout: Timeout = 30.0, as_json: AsJson = False
) -> None:
    """Tell what the server is and what it has done."""
    info, stats = _ask(server, timeout, lambda admin: (admin.info(), admin.stats()))
    if as_json:
        _print_json({"server": info, "stats": stats})
        return
    errors = ", ".join(f"{reason} {count}" for reason, count in stats.error_counts.items())
    libraries = ", ".join(f"{name} {version}" for name, version in info.library_versions.items())
    _print_table(
        ["figure", "value"],
        [
            ["version", info.version],
            ["libraries", libraries],
            ["started", "" if info.started_at is None else info.started_at.isoformat()],
            ["process", str(info.process_id)],
            ["eviction policy", info.eviction_policy],
            ["runtimes", ", ".join(info.runtimes)],
            ["answered", str(stats.answered_count)],
            ["  hits", str(stats.hit_count)],
            ["  cold", str(stats.cold_count)],
            ["refused or failed", errors or "0"],
            ["running now", str(stats.active_request_count)],
            ["waiting now", str(stats.waiting_request_count)],
            ["loads", f"{stats.load_count} in {_duration(stats.load_s)}"],
            ["failed loads", str(stats.load_failure_count)],
            ["evictions", str(stats.eviction_count)],
            ["process memory", _size(stats.process_resident_bytes)],
            ["  at most", _size(stats.peak_process_resident_bytes)],
        ],
    )


def _load(
    model: ModelName,
    server: Server = _DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Ask for a model to be loaded; returns at once."""
    _show_residency(_ask(server, timeout, lambda admin: admin.load(model)), as_json)


def _unload(
    model: ModelName,
    server: Server = _DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Take a model out of memory; returns when its memory is back."""
    _show_residency(_ask(server, timeout, lambda admin: admin.unload(model)), as_json)


def _pin(
    model: ModelName,
    server: Server = _DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Load a model and never evict it; returns at once."""
    _show_residency(_ask(server, timeout, lambda admin: admin.pin(model)), as_json)


def _unpin(
    model: ModelName,
    server: Server = _DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Let a pinned model be evicted again."""
    _show_residency(_ask(server, timeout, lambda admin: admin.unpin(model)), as_json)


def _budget(
    device: Annotated[
        str, typer.Argument(metavar="DEVICE", help="Such as cuda:1 or cpu.", show_default=False)
    ],
    size: Annotated[
        str,
        typer.Argument(
            metavar="BYTES", help="New budget, such as 300MB or 1.5GiB.", show_default=False
        ),
    ],
    server: Server = _DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Change the budget of a device while requests flow."""
    with _exit_codes():
        budget_bytes = parse_size(size)
    changed = _ask(server, timeout, lambda admin: admin.update_budget(device, budget_bytes))
    if as_json:
        _print_json(changed)
    else:
        _print_devices([changed])


def _ask(server: str, timeout_s: float, question: Callable[[Admin], _AnswerT]) -> _AnswerT:
    from modelyard import Admin

    with _exit_codes(), Admin(server, timeout_s=timeout_s) as admin:
        return question(admin)


@contextmanager
def _exit_codes() -> Iterator[None]:
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
        # As a shell reports a program that Ctrl-C ended.
        raise typer.Exit(130) from error


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
    typer.echo(_printable(f"error: {'; '.join([text, *extra])}"), err=True)
    return typer.Exit(code)


def _show_residency(residency: Residency, as_json: bool) -> None:
    if as_json:
        _print_json(residency)
    else:
        _print_residencies([residency])


def _print_residencies(residencies: Iterable[Residency]) -> None:
    _print_table(
        ["model", "state", "holds", "pinned", "in use", "waiting", "loads", "load time", "note"],
        (
            [
                _id(residency.model),
                str(residency.state),
                ", ".join(
                    f"{_id(charge.device)} {_size(charge.size_bytes)}"
                    for charge in residency.charges
                ),
                "pinned" if residency.pinned else "",
                str(residency.lease_count),
                str(residency.waiting_request_count),
                str(residency.load_count),
                "" if residency.load_s is None else _duration(residency.load_s),
                _note(residency),
            ]
            for residency in residencies
        ),
    )


def _note(residency: Residency) -> str:
    notes = [
        f"{_size(charge.size_bytes)} not given back on {_id(charge.device)}"
        for charge in residency.quarantined
    ]
    if residency.failure is not None:
        notes.insert(0, residency.failure.message)
    return "; ".join(notes)


def _print_devices(devices: Iterable[ManagedDevice]) -> None:
    _print_table(
        [
            *("device", "budget", "resident", "loading", "leaving", "quarantined", "over"),
            *("peak", "loads", "evictions"),
        ],
        (
            [
                f"{device.id} (logical)" if device.logical else device.id,
                _size(device.budget_bytes),
                _size(device.resident_bytes),
                _size(device.reserved_bytes),
                _size(device.draining_bytes),
                _size(device.quarantined_bytes),
                _size(device.deficit_bytes),
                _size(device.peak_accounted_bytes),
                str(device.load_count),
                str(device.eviction_count),
            ]
            for device in devices
        ),
    )


def _print_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    # Imported here: `--json` and `--help` can do without.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        # fold: a cell that is too long continues below, instead of ending in an ellipsis.
        table.add_column(header, overflow="fold")
    for row in rows:
        # Text, because a str would be read as markup, and "[/]" in an output as broken markup.
        table.add_row(*(Text(_printable(cell)) for cell in row))
    # A pipe has no width of its own, and the program behind it no use for folded lines.
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(file=sys.stdout, width=width).print(table)


def _print_json(value: object) -> None:
    typer.echo(json.dumps(_plain(value), indent=2, ensure_ascii=True, allow_nan=False))


def _plain(value: object) -> Any:
    """Return a value of the client as JSON has it.

    Byte strings become base64; NaN and infinities, which JSON lacks, become null.
    """
    from modelyard import ComponentDevice, Device

    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return base64.b64encode(value).decode("ascii")
        case Enum() | Device():
            return str(value)
        case ComponentDevice():
            return value.to_dict()
        case datetime():
            return value.isoformat()
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _ if dataclasses.is_dataclass(value) and hasattr(value, "to_float32"):
            return _plain(value.to_float32().tolist())
        case _ if dataclasses.is_dataclass(value):
            return {
                field.name: _plain(getattr(value, field.name))
                for field in dataclasses.fields(value)
            }
        case _ if hasattr(value, "tolist"):
            return _plain(value.tolist())
        case _:
            raise TypeError(f"{type(value).__name__} has no form in JSON")


def _has_rows(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count


def _cell(value: object) -> str:
    """Return a JSON value as a cell of a table; numbers to six digits."""
    match value:
        case str():
            return value
        case float():
            return f"{value:.6g}"
        case list():
            return f"[{', '.join(map(_cell, value))}]"
        case _:
            return json.dumps(value)


def _size(size_bytes: int) -> str:
    # A server may be broken, and this is where somebody finds out.
    return format_size(size_bytes) if size_bytes >= 0 else f"{size_bytes}B"


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.1f}ms" if seconds < 1 else f"{seconds:.2f}s"


def _id(name: str) -> str:
    return name.rpartition("/")[2]


def _printable(text: str) -> str:
    """Return one line without anything a terminal would act on."""
    return "".join(map(_printable_character, text))


def _printable_character(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else "\N{REPLACEMENT CHARACTER}"
