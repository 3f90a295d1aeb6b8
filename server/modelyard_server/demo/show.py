"""`modelyard demo`: real models of twice the budget's size, one server, and what it does with them.

The server is the real one, in a process of its own, reached over gRPC; the demo is a client like
any other. Nothing here knows more than the answers and the admin calls tell.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import IO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from modelyard import Admin, Client, EventType, KeyNotFound, Prediction
from modelyard_server.demo.models import PackageMissing, PreparedModel, prepare
from modelyard_server.demo.process import RunningServer, ServerEnded, modelyard_server
from modelyard_server.demo.text import read_requests
from modelyard_server.devices.sizes import format_size

__all__ = ["show"]

_BUDGETS = {"cpu": 150_000_000, "cpu:1": 120_000_000}
"""Two pools of host memory. Each has room for the largest model; both together for half of all."""

_KEYS: Mapping[str, tuple[str, ...]] = {
    "minilm": ("search/embed", "helpdesk/embed"),
    "sentiment": ("acme/reviews", "globex/reviews"),
    "language": ("inbox/language",),
    "topic": ("newsroom/topic",),
    "antiberty": ("lab/antibody",),
    "rxnmapper": ("lab/reaction",),
    "storyteller": ("kids/story",),
    "efficientnet-lite0": ("camera/objects",),
    "crepe-full": ("studio/pitch",),
    "crepe-tiny": ("stage/pitch",),
}

_KINDS = {
    "minilm": "embedding",
    "sentiment": "sentiment",
    "language": "language",
    "topic": "topic",
    "antiberty": "antibody",
    "rxnmapper": "reaction",
    "storyteller": "story",
}
"""Which of the demo's requests a model answers; the others answer their example."""

_PARAMETERS = {"storyteller": {"max_new_tokens": 40}}
_LOG = "server.log"
_LOG_WIDTH = 124
_ROUNDS = 3
_CROWD = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answered:
    """One row of the table."""

    key: str
    asked: str
    answer: str
    prediction: Prediction
    took_ms: float


def show(folder: Path) -> int:
    """Prepares the models, serves them, asks them, and prints what happened.

    Args:
        folder: where models, configuration and log are kept.

    Returns:
        The exit code: 0 if every answer came and no device was ever over its budget.
    """
    # Without a terminal (a log, a pipe) there is no width to fit into.
    console = Console() if sys.stdout.isatty() else Console(width=_LOG_WIDTH)
    try:
        models = _prepare(console, folder)
    except PackageMissing as error:
        console.print(f"[red]{error}[/red]")
        return 2
    config = folder / "modelyard.toml"
    config.write_text(_config_text(folder, models))
    _show_models(console, models)

    try:
        return _serve_and_ask(console, config, models)
    except ServerEnded as error:
        console.print(f"[red]{error}; its log is {folder / _LOG}[/red]")
        return 1


def _serve_and_ask(console: Console, config: Path, models: list[PreparedModel]) -> int:
    with (
        (config.parent / _LOG).open("wb") as log,
        _running(console, config, log) as server,
        Client(server.address) as client,
        Admin(server.address) as admin,
    ):
        console.print(f"[dim]serving on {server.address}, configured by {config}[/dim]")
        rows = _ask_all(console, client, models)
        _show_rows(console, rows)
        _show_crowd(console, client, admin)
        _show_refusal(console, client, admin)
        _show_reloads(console, admin, models)
        within = _show_devices(console, admin)
    if server.exit_code:
        console.print(f"[red]the server ended with exit code {server.exit_code}[/red]")
        return 1
    return 0 if within else 1


@contextmanager
def _running(console: Console, config: Path, log: IO[bytes]) -> Iterator[RunningServer]:
    """The server, with a spinner until it serves."""
    with ExitStack() as stack:
        with console.status("starting the server (it imports torch and transformers once)"):
            server = stack.enter_context(modelyard_server(config, log=log))
        yield server


def _prepare(console: Console, folder: Path) -> list[PreparedModel]:
    with Progress(
        SpinnerColumn(),
        TextColumn("[bold]preparing {task.fields[model]:<18}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("", total=1.0, model="")
        return prepare(
            folder / "models",
            progress=lambda at: progress.update(
                task, model=at.model, completed=(at.index + at.share) / at.count
            ),
        )


def _config_text(folder: Path, models: list[PreparedModel]) -> str:
    """The configuration the demo's server runs with; one a person could have written."""
    lines = [
        "# Written by `modelyard demo`.",
        "[server]",
        'listen = "127.0.0.1:0"',
        "",
        "[roots]",
        f"demo = {json.dumps(str((folder / 'models').resolve()))}",
        "",
        "[runtimes.torch]",
        "allowed_factories = [",
        *sorted({f"  {json.dumps(m.options['factory'])}," for m in models if m.runtime == "torch"}),
        "]",
    ]
    for device, budget in _BUDGETS.items():
        lines += [
            "",
            "[[devices]]",
            f'device = "{device}"',
            f"budget = {budget}",
            f"logical = {json.dumps(':' in device)}",
        ]
    for model in models:
        lines += [
            "",
            f"[models.{json.dumps(model.name)}]",
            f"keys = {json.dumps(_KEYS[model.name])}",
            f'runtime = "{model.runtime}"',
            *([f'task = "{model.task}"'] if model.task else []),
            'root = "demo"',
            f"folder = {json.dumps(model.folder.name)}",
        ]
        if model.options:
            lines.append(f"[models.{json.dumps(model.name)}.options]")
            lines += [f"{name} = {json.dumps(value)}" for name, value in model.options.items()]
    return "\n".join(lines) + "\n"


def _show_models(console: Console, models: list[PreparedModel]) -> None:
    table = Table(title="The models", caption_justify="left")
    for column in ("model", "what it does", "weights", "held-out accuracy", "keys"):
        wide = column in ("model", "weights", "keys")
        table.add_column(
            column,
            justify="right" if column == "weights" else "left",
            no_wrap=wide,
            min_width=18 if column == "model" else None,
        )
    for model in models:
        accuracy = model.held_out_accuracy
        table.add_row(
            model.name,
            model.task or "torch module",
            format_size(model.size_bytes),
            "" if accuracy is None else f"{accuracy:.0%}, trained here",
            "\n".join(_KEYS[model.name]),
        )
    total, budget = sum(m.size_bytes for m in models), sum(_BUDGETS.values())
    table.caption = (
        f"together {format_size(total)}; the two devices' budgets are {format_size(budget)}: "
        f"{total / budget:.1f} times too little"
    )
    console.print(table)


def _ask_all(console: Console, client: Client, models: list[PreparedModel]) -> list[_Answered]:
    """Asks every key in turn, three times over: the order that a plain LRU handles worst."""
    texts: dict[str, list[str]] = {}
    for request in read_requests():
        texts.setdefault(request.label, []).append(request.text)
    turns = []
    for turn in range(_ROUNDS):
        for model in models:
            keys = _KEYS[model.name]
            key = keys[turn % len(keys)]
            of_kind = texts.get(_KINDS.get(model.name, ""), [])
            asked = of_kind[turn % len(of_kind)] if of_kind else model.example
            turns.append((key, model, asked))
    rows = []
    with Progress(
        TextColumn("[bold]asking {task.fields[key]:<16}"),
        BarColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("", total=len(turns), key="")
        for key, model, asked in turns:
            progress.update(task, advance=1, key=key)
            began = perf_counter()
            prediction = client.predict(key, asked, parameters=_PARAMETERS.get(model.name))
            took_ms = (perf_counter() - began) * 1000
            rows.append(
                _Answered(
                    key=key,
                    asked=asked if isinstance(asked, str) else f"{model.name}'s example",
                    answer=_in_words(model, prediction),
                    prediction=prediction,
                    took_ms=took_ms,
                )
            )
    return rows


def _in_words(model: PreparedModel, prediction: Prediction) -> str:
    """What a model said, short enough for a table."""
    match model.task:
        case "text-classification":
            label, score = np.asarray(prediction["label"])[0], np.asarray(prediction["score"])[0]
            return f"{label} ({score:.0%})"
        case "feature-extraction":
            vector = np.asarray(prediction.only)
            return f"{vector.shape[1]} numbers, the first {vector[0, 0]:+.3f}"
        case "fill-mask":
            tokens, scores = np.asarray(prediction["token"]), np.asarray(prediction["score"])
            return f"{tokens[0][0]} ({scores[0][0]:.0%})"
        case "text-generation":
            return f"...{np.asarray(prediction['text'])[0]}".replace("\n", " ")
        case _:
            scores = np.asarray(prediction.only)
            best = int(scores.reshape(-1, scores.shape[-1])[0].argmax())
            return f"class {best}" if "crepe" not in model.name else f"pitch bin {best} of 360"


def _show_rows(console: Console, rows: list[_Answered]) -> None:
    table = Table(title="Every key in turn, three times over")
    # On a narrow terminal the texts give way, and the figures stay.
    table.add_column("key", no_wrap=True, min_width=14)
    table.add_column("model", no_wrap=True, min_width=11)
    table.add_column("asked", no_wrap=True, max_width=28, overflow="ellipsis")
    table.add_column("answer", no_wrap=True, max_width=33, overflow="ellipsis")
    table.add_column("device", no_wrap=True, min_width=6)
    table.add_column("hit?", no_wrap=True, min_width=4)
    table.add_column("ms", justify="right", no_wrap=True, min_width=4)
    for row in rows:
        served = row.prediction.served
        table.add_row(
            row.key,
            served.model.removeprefix("models/"),
            row.asked,
            row.answer,
            served.device.removeprefix("devices/"),
            "[cyan]cold[/cyan]" if served.cold else "[green]hit[/green]",
            f"{row.took_ms:.0f}",
        )
    console.print(table)
    cold = sum(row.prediction.served.cold for row in rows)
    console.print(
        f"{len(rows)} requests answered, {len(rows) - cold} of them by models that were resident "
        f"and {cold} after a load.\n"
    )


def _show_crowd(console: Console, client: Client, admin: Admin) -> None:
    """Many clients ask for the same cold model at once: it is loaded once."""
    admin.unload("topic")
    before = admin.stats().load_count
    with ThreadPoolExecutor(_CROWD) as crowd:
        answers = list(
            crowd.map(
                lambda _: client.predict("newsroom/topic", "The striker scored twice."),
                range(_CROWD),
            )
        )
    loads = admin.stats().load_count - before
    labels = {str(np.asarray(answer["label"])[0]) for answer in answers}
    console.print(
        f"{_CROWD} clients ask for a cold model at once: {loads} load, {len(answers)} answers, "
        f"all of them {' or '.join(sorted(labels))}."
    )


def _show_refusal(console: Console, client: Client, admin: Admin) -> None:
    """What cannot be answered is refused at once, and costs nobody anything."""
    before = admin.stats().eviction_count
    try:
        client.predict("nobody/knows", "hello")
    except KeyNotFound as error:
        evicted = admin.stats().eviction_count - before
        console.print(f"An unknown key: {error.reason} ({error}); models evicted: {evicted}.\n")


def _show_reloads(console: Console, admin: Admin, models: list[PreparedModel]) -> None:
    """What it costs that a model is away, and what those that are there have in common."""
    table = Table(title="What coming back costs", caption_justify="left")
    for column in ("model", "weights", "loads", "first", "last", "now holds", "of that shared"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    sizes = {model.name: model.size_bytes for model in models}
    shared = 0
    for residency in admin.list_residencies():
        name = residency.model.removeprefix("models/")
        held = sum(charge.size_bytes for charge in residency.charges)
        common = sum(charge.shared_bytes for charge in residency.charges)
        took_ms = [
            event.load_s * 1000
            for event in admin.explain(name).events
            if event.type is EventType.LOAD_DONE and event.load_s is not None
        ]
        shared += common
        table.add_row(
            name,
            format_size(sizes[name]),
            str(residency.load_count),
            f"{took_ms[0]:.1f} ms" if took_ms else "",
            f"{took_ms[-1]:.1f} ms" if len(took_ms) > 1 else "",
            format_size(held) if held else "",
            format_size(common) if common else "",
        )
    saved = sum(device.saved_bytes for device in admin.list_devices())
    if shared:
        table.caption = (
            "the fine-tunes have most of their tensors in common with the model they were made "
            f"from: held and charged once, which saves {format_size(saved)} now"
        )
    console.print(table)


def _show_devices(console: Console, admin: Admin) -> bool:
    """The last table. False if a device was ever over its budget."""
    table = Table(title="The devices")
    for column in (
        "device",
        "budget",
        "peak accounted",
        "peak measured",
        "saved by sharing",
        "loads",
        "evictions",
    ):
        table.add_column(column, justify="left" if column == "device" else "right")
    within = True
    for device in admin.list_devices():
        ok = device.peak_accounted_bytes <= device.budget_bytes
        within = within and ok
        table.add_row(
            f"{device.device}{', logical' if device.logical else ''}",
            format_size(device.budget_bytes),
            f"{format_size(device.peak_accounted_bytes)}{'' if ok else ' OVER'}",
            format_size(device.peak_measured_bytes),
            format_size(device.saved_bytes),
            str(device.load_count),
            str(device.eviction_count),
        )
    console.print(table)
    stats = admin.stats()
    console.print(
        f"Peak accounted is within the budget on every device: {'yes' if within else 'NO'}. "
        f"Loading took {stats.load_s:.1f} s in all, for {stats.load_count} loads. The server's own "
        f"process peaked at {format_size(stats.peak_process_resident_bytes)}; its workers, torch "
        f"and models included, hold {format_size(stats.worker_resident_bytes)}."
    )
    return within
