"""What commands print: tables for people, JSON for programs.

Texts come from models and from the network: whatever is printed goes through ``printable``, so
that no escape sequence reaches the terminal.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import typer

from modelyard_server.devices.sizes import format_size

if TYPE_CHECKING:
    from modelyard import (
        BatchFigures,
        Departures,
        DeviceCharge,
        HostTier,
        ManagedDevice,
        Regret,
        Residency,
        ShadowFigures,
        StoreFigures,
    )

__all__ = [
    "batch_rows",
    "cell",
    "charges",
    "clock",
    "departure_rows",
    "duration",
    "note",
    "plain",
    "print_devices",
    "print_json",
    "print_json_line",
    "print_line",
    "print_residencies",
    "print_table",
    "printable",
    "regret_row",
    "shadow_rows",
    "short_name",
    "show_residency",
    "size",
    "store_rows",
    "tier_rows",
]

_PIPE_WIDTH: Final = 1000


def show_residency(residency: Residency, as_json: bool) -> None:
    """Print where one model stands."""
    if as_json:
        print_json(residency)
    else:
        print_residencies([residency])


def print_residencies(residencies: Iterable[Residency]) -> None:
    """Print where models stand."""
    print_table(
        ["model", "state", "holds", "pinned", "in use", "waiting", "loads", "load time", "note"],
        (
            [
                short_name(residency.model),
                str(residency.state),
                charges(residency.charges),
                "pinned" if residency.pinned else "",
                str(residency.lease_count),
                str(residency.waiting_request_count),
                str(residency.load_count),
                "" if residency.load_s is None else duration(residency.load_s),
                note(residency),
            ]
            for residency in residencies
        ),
    )


def note(residency: Residency) -> str:
    """Return what is to be known of a model: what is wrong with it, and of its copy."""
    notes = [
        f"{size(charge.size_bytes)} not given back on {short_name(charge.device)}"
        for charge in residency.quarantined
    ]
    if residency.failure is not None:
        notes.insert(0, residency.failure.message)
    if copy := _copy(residency):
        notes.append(copy)
    return "; ".join(notes)


def _copy(residency: Residency) -> str:
    """Return words about a model's copy on the host tier: ``copy 98MiB, 12.0ms``."""
    from modelyard import CopyState

    state = residency.copy_state
    if state is CopyState.NONE:
        return ""
    words = "copy" if state is CopyState.KEPT else f"copy ({state})"
    told = [f"{words} {size(residency.copy_bytes)}" if residency.copy_bytes else words]
    if residency.copy_load_s is not None:
        told.append(duration(residency.copy_load_s))
    return ", ".join(told)


def print_devices(devices: Iterable[ManagedDevice]) -> None:
    """Print devices, their budgets and what they hold."""
    print_table(
        [
            *("device", "budget", "resident", "loading", "leaving", "quarantined", "over"),
            *("peak", "saved by sharing", "loads", "evictions"),
        ],
        (
            [
                _device_cell(device),
                size(device.budget_bytes),
                size(device.resident_bytes),
                size(device.reserved_bytes),
                size(device.draining_bytes),
                size(device.quarantined_bytes),
                size(device.deficit_bytes),
                size(device.peak_accounted_bytes),
                size(device.saved_bytes),
                str(device.load_count),
                str(device.eviction_count),
            ]
            for device in devices
        ),
    )


def _device_cell(device: ManagedDevice) -> str:
    marks = [
        word for word, holds in (("logical", device.logical), ("drained", device.drained)) if holds
    ]
    name = short_name(device.name)
    return f"{name} ({', '.join(marks)})" if marks else name


def tier_rows(tier: HostTier) -> list[list[str]]:
    """Return the rows about a host tier in a table of figures."""
    return [
        ["host tier", f"{size(tier.resident_bytes)} of {size(tier.budget_bytes)}"],
        ["  copies", str(tier.copy_count)],
        ["  being made", size(tier.reserved_bytes)],
        ["  being dropped", size(tier.draining_bytes)],
        ["  quarantined", size(tier.quarantined_bytes)],
        ["  at most", size(tier.peak_bytes)],
        ["  saved by sharing", size(tier.saved_bytes)],
        ["  measured", size(tier.measured_bytes)],
        ["  copies made", str(tier.kept_count)],
        ["  copies dropped", str(tier.dropped_count)],
        ["  loads from copies", str(tier.promotion_count)],
    ]


_CAUSES: Final = MappingProxyType(
    {
        "MODEL": "to make room for a model",
        "BUDGET": "over a budget",
        "DEVICE_DRAINED": "off a drained device",
        "DEVICE_BEHIND": "off a device behind with its work",
        "OPERATOR": "unloaded by hand",
        "REMOVED": "deleted or replaced",
        "LOST": "lost with their process",
    }
)


def store_rows(store: StoreFigures) -> list[list[str]]:
    """Return the rows about a weight store in a table of figures."""
    rows = [
        ["weight store", f"{size(store.stored_bytes)} in {store.model_count} models"],
        ["  used by nobody", f"{size(store.unused_bytes)} in {store.unused_count} models"],
        ["  given back", f"{size(store.freed_bytes)} in {store.freed_count} models"],
    ]
    if store.due_at is not None:
        rows.insert(2, ["  kept until", store.due_at.astimezone().isoformat(timespec="seconds")])
    if store.obstacle:
        rows.append(["  gives nothing back", store.obstacle])
    return rows


def regret_row(regret: Regret) -> list[str]:
    """Return the row about LRU in a table of figures."""
    more = "more" if regret.regret_s >= 0 else "less"
    told = f"{duration(regret.lru_load_s)}, it is {duration(abs(regret.regret_s))} {more} here"
    return ["  under LRU", told]


def departure_rows(departures: Departures) -> list[list[str]]:
    """Return the rows about models that had to leave in a table of figures."""
    rows = [["models told to leave", str(sum(departures.counts.values()))]]
    rows += [
        [f"  {_CAUSES.get(cause, cause.lower())}", str(count)]
        for cause, count in departures.counts.items()
    ]
    of = f"last {departures.age_count} chosen"
    for name, median_s, p90_s in (
        ("idle before", departures.median_idle_s, departures.p90_idle_s),
        ("resident before", departures.median_resident_s, departures.p90_resident_s),
    ):
        if median_s is not None and p90_s is not None:
            told = f"median {duration(median_s)}, p90 {duration(p90_s)} ({of})"
            rows.append([f"  {name}", told])
    return rows


def shadow_rows(shadows: ShadowFigures) -> list[list[str]]:
    """Return the rows about shadows in a table of figures; none if there were none."""
    counts = (shadows.answered_count, shadows.failed_count, shadows.dropped_count)
    if not any(counts):
        return []
    return [["shadows", "{} answered, {} failed, {} dropped".format(*counts)]]


def batch_rows(batches: BatchFigures) -> list[list[str]]:
    """Return the rows about batches in a table of figures."""
    rows = [
        [
            "batches",
            f"{batches.batch_count} of {batches.request_count} requests, {batches.row_count} rows",
        ],
        [
            "  at most",
            f"{batches.largest_request_count} requests, {batches.largest_row_count} rows",
        ],
        ["  requests alone", str(batches.alone_count)],
        ["  run again in parts", str(batches.split_count)],
    ]
    if batches.padding_ratio is not None:
        rows.append(["  padding", f"{batches.padding_ratio:.1%} at most"])
    return [*rows, ["requests that share no run", str(batches.unshared_count)]]


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table, as wide as it needs to be where no terminal reads it."""
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
        table.add_row(*(Text(printable(cell)) for cell in row))
    # A pipe has no width of its own, and the program behind it no use for folded lines.
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(file=sys.stdout, width=width).print(table)


def print_line(text: str, *, err: bool = False) -> None:
    """Print one line, on stderr if it is not what was asked for."""
    typer.echo(printable(text), err=err)


def print_json(value: object) -> None:
    """Print a value of the client as JSON."""
    typer.echo(json.dumps(plain(value), indent=2, ensure_ascii=True, allow_nan=False))


def print_json_line(value: object) -> None:
    """Print a value of the client as JSON on one line, for programs that read line by line."""
    typer.echo(json.dumps(plain(value), ensure_ascii=True, allow_nan=False))


def plain(value: object) -> Any:
    """Return a value of the client as JSON has it.

    Byte strings become base64; NaN and infinities, which JSON lacks, become null.
    """
    from modelyard import AutomaticPlacement, ComponentDevice, Device, DevicePlan, RouteTarget
    from modelyard.placements import placement_to_json

    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return base64.b64encode(value).decode("ascii")
        case Enum() | Device():
            return str(value)
        case ComponentDevice() | AutomaticPlacement():
            return placement_to_json(value)
        case DevicePlan():
            return value.to_dict()
        case _ if isinstance(value, RouteTarget):
            return value.to_dict()
        case datetime():
            return value.isoformat()
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case _ if dataclasses.is_dataclass(value) and hasattr(value, "to_float32"):
            return plain(value.to_float32().tolist())
        case _ if dataclasses.is_dataclass(value):
            return {
                field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
            }
        case _ if hasattr(value, "tolist"):
            return plain(value.tolist())
        case _:
            raise TypeError(f"{type(value).__name__} has no form in JSON")


def cell(value: object) -> str:
    """Return a JSON value as a cell of a table; numbers to six digits."""
    match value:
        case str():
            return value
        case float():
            return f"{value:.6g}"
        case list():
            return f"[{', '.join(map(cell, value))}]"
        case _:
            return json.dumps(value)


def size(size_bytes: int) -> str:
    """Return a size for people."""
    # A server may be broken, and this is where somebody finds out.
    return format_size(size_bytes) if size_bytes >= 0 else f"{size_bytes}B"


def duration(seconds: float) -> str:
    """Return a duration for people."""
    return f"{seconds * 1000:.1f}ms" if seconds < 1 else f"{seconds:.2f}s"


def clock(moment: datetime | None) -> str:
    """Return the time of day here, for people; empty if there is none."""
    return "" if moment is None else f"{moment.astimezone():%H:%M:%S}"


def charges(held: Iterable[DeviceCharge]) -> str:
    """Return bytes per device for people: ``cuda:0 1GiB (900MiB shared), cpu 20MiB``."""
    return ", ".join(
        f"{short_name(charge.device)} {size(charge.size_bytes)}"
        + (f" ({size(charge.shared_bytes)} shared)" if charge.shared_bytes else "")
        for charge in held
    )


def short_name(name: str) -> str:
    """Return the id in a resource name, a device as people write it; other words as they are."""
    collection, _, last = name.rpartition("/")
    return last.replace("-", ":") if collection == "devices" else last


def printable(text: str) -> str:
    """Return one line without anything a terminal would act on."""
    return "".join(map(_printable_character, text))


def _printable_character(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else "\N{REPLACEMENT CHARACTER}"
