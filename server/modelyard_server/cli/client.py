"""``predict``, ``generate`` and ``stats``: what anybody asks a running server."""

from __future__ import annotations

from typing import Annotated

import typer

from modelyard_server.cli.connection import (
    DEFAULT_SERVER,
    AsJson,
    Server,
    Timeout,
    ask,
    exit_codes,
    suggest,
)
from modelyard_server.cli.printing import (
    batch_rows,
    cell,
    departure_rows,
    duration,
    plain,
    print_json,
    print_json_line,
    print_line,
    print_table,
    printable,
    regret_row,
    shadow_rows,
    short_name,
    size,
    store_rows,
    tier_rows,
)

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands to an application."""
    app.command("predict")(_predict)
    app.command("generate")(_generate)
    app.command("stats")(_stats)


def _predict(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Key to ask for.", show_default=False)],
    texts: Annotated[
        list[str], typer.Argument(metavar="TEXT...", help="Inputs, a row each.", show_default=False)
    ],
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Ask for predictions on texts."""
    from modelyard import Admin, Client, KeyNotFound

    with exit_codes(), Client(server, timeout_s=timeout) as client:
        try:
            prediction = client.predict(key, texts)
        except KeyNotFound as error:
            with Admin(server, timeout_s=timeout) as admin:
                suggest(error, key, admin, lambda model: (model.id, *model.keys))
            raise
    outputs = {name: plain(value) for name, value in prediction.items()}
    served = prediction.served
    if as_json:
        print_json({"outputs": outputs, "served": plain(served)})
        return
    # Only what has one row per input stands beside the inputs.
    rows = {name: value for name, value in outputs.items() if _has_rows(value, len(texts))}
    columns = [["input", *texts]]
    columns += [[name or "output", *(cell(item) for item in value)] for name, value in rows.items()]
    print_table(
        [column[0] for column in columns],
        zip(*(column[1:] for column in columns), strict=True),
    )
    for name, value in outputs.items():
        if name not in rows:
            print_line(f"{name or 'output'}: {cell(value)}")
    load = "" if served.load_s is None else f" ({duration(served.load_s)} of it loading)"
    found = "cold" if served.cold else "hit"
    print_line(
        f"{short_name(served.model)} on {short_name(served.device)}, {found}: "
        f"waited {duration(served.wait_s)}{load}, ran {duration(served.run_s)}"
    )


def _generate(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Key to ask for.", show_default=False)],
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to go on from.", show_default=False)
    ],
    most: Annotated[
        int | None, typer.Option("--max-new-tokens", metavar="N", help="Most tokens to generate.")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Above 0: draw tokens at random.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="N", help="Draw among so many tokens.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Draw among those of this probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the draws.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Ends the text; may be given more than once.")
    ] = None,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Generate text and print it as it comes; with --json a line for each piece."""
    from modelyard import Admin, Client, KeyNotFound

    with (
        exit_codes(),
        Client(server, timeout_s=timeout) as client,
        client.generate(
            key,
            prompt,
            max_new_tokens=most,
            stop=stop or (),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        ) as generation,
    ):
        try:
            for piece in generation:
                if as_json:
                    print_json_line(piece)
                else:
                    # Its lines are its own; all else is not to touch the terminal.
                    typer.echo("\n".join(map(printable, piece.text.split("\n"))), nl=False)
        except KeyNotFound as error:
            with Admin(server, timeout_s=timeout) as admin:
                suggest(error, key, admin, lambda model: (model.id, *model.keys))
            raise
        finally:
            if not as_json:
                typer.echo()


def _stats(
    server: Server = DEFAULT_SERVER, timeout: Timeout = 30.0, as_json: AsJson = False
) -> None:
    """Tell what the server is and what it has done."""
    info, stats = ask(server, timeout, lambda admin: (admin.info(), admin.stats()))
    if as_json:
        print_json({"server": info, "stats": stats})
        return
    errors = ", ".join(f"{reason} {count}" for reason, count in stats.error_counts.items())
    libraries = ", ".join(f"{name} {version}" for name, version in info.library_versions.items())
    print_table(
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
            ["loads", f"{stats.load_count} in {duration(stats.load_s)}"],
            ["  in the last minute", duration(stats.recent_load_s)],
            *([] if stats.regret is None else [regret_row(stats.regret)]),
            ["failed loads", str(stats.load_failure_count)],
            ["evictions", str(stats.eviction_count)],
            *([] if stats.departures is None else departure_rows(stats.departures)),
            *([] if stats.batches is None else batch_rows(stats.batches)),
            *([] if stats.shadows is None else shadow_rows(stats.shadows)),
            ["process memory", size(stats.process_resident_bytes)],
            ["  at most", size(stats.peak_process_resident_bytes)],
            ["memory of workers", size(stats.worker_resident_bytes)],
            *([] if stats.host_tier is None else tier_rows(stats.host_tier)),
            *([] if stats.store is None else store_rows(stats.store)),
        ],
    )


def _has_rows(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count
