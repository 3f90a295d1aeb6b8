"""What a stream saves against calls, and how near a split comes to its weights.

    python -m bench.streams --output build/bench/streams.json [--rounds N] [--only PART ...]

    stream   PredictStream with 256 items in flight against 256 Predict calls at a time: one client
             process, one connection each, one server process with the engine that it has by
             default, the identity model, tensors of 64 bytes. Rounds in turn; the figure is the
             ratio of the medians of their requests a second.
    split    100,000 affinities by the server's own choice, in percentage points off the weights,
             and 2,000 requests through a route, each of which must get the branch that was chosen.

The exit code is 1 if a bar was missed, or if a figure that has one could not be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.machine import write_figures, written
from bench.weights_figures import Bar, missed
from modelyard import AsyncClient, Client, Prediction
from modelyard.prediction import BatchItem
from modelyard.v1 import route_pb2, route_service_pb2
from modelyard.v1.route_service_pb2_grpc import RouteServiceStub
from modelyard_server.demo.process import RunningServer, modelyard_server
from modelyard_server.routing.affinity import choose

__all__ = ["BARS", "OF_PART", "largest_error_pct", "main", "split_shares"]

IN_FLIGHT: Final = 256
FLOATS: Final = 16
CALLS: Final = 4_000
ITEMS: Final = 16_000
"""Of a round; more of what is faster, so that both rounds take about as long."""

ROUNDS: Final = 7

AFFINITIES: Final = 100_000
REQUESTS: Final = 2_000
WEIGHTS: Final[Mapping[str, int]] = {"a": 50, "b": 30, "c": 15, "d": 5}
ROUTE: Final = "bench-split"

BARS: Final = (
    Bar(
        figure="stream_vs_unary",
        limit=2.5,
        at_least=True,
        text=f"{IN_FLIGHT} in flight, one connection: requests/s of PredictStream / of Predict",
    ),
    Bar(
        figure="split_max_error_pct",
        limit=0.5,
        text=f"{AFFINITIES:,} affinities: share of a branch off its weight, points, the worst",
    ),
    Bar(
        figure="split_disagreements",
        limit=0,
        text=f"{REQUESTS:,} requests through the route: other branch than the choice",
    ),
)
"""In the order in which they are shown."""

OF_PART: Final[Mapping[str, tuple[str, ...]]] = {
    "stream": ("stream_vs_unary",),
    "split": ("split_max_error_pct", "split_disagreements"),
}
"""The figures with a bar, by the part that measures them."""

_CONFIG: Final = """
[server]
listen = "127.0.0.1:0"
log_level = "warning"
[[devices]]
device = "cpu"
budget = "300MB"
[models.echo]
runtime = "identity"
"""

console = Console(highlight=False)


@dataclass(slots=True)
class Rounds:
    """What the rounds of one way came to.

    Attributes:
        rates: requests a second.
        server_us: processor time of the server's own process a request; of its workers not.
        client_us: processor time of this process a request.
    """

    rates: list[float] = field(default_factory=list)
    server_us: list[float] = field(default_factory=list)
    client_us: list[float] = field(default_factory=list)


def main() -> int:
    """Runs the parts, shows their figures beside the bars, and writes them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", action="append", choices=tuple(OF_PART))
    arguments = parser.parse_args()
    parts = tuple(arguments.only or OF_PART)
    figures: dict[str, Any] = {}
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        if "stream" in parts:
            with modelyard_server(written(Path(folder), _CONFIG)) as server:
                figures |= asyncio.run(stream_figures(server, arguments.rounds))
        if "split" in parts:
            config = _CONFIG + "".join(
                f'[models.model-{name}]\nruntime = "identity"\n' for name in WEIGHTS
            )
            with modelyard_server(written(Path(folder), config)) as server:
                figures |= split_figures(server, notes)
    show(figures, parts, notes)
    write_figures(arguments.output, figures)
    console.print(f"written to {arguments.output}")
    measured = all(name in figures for part in parts for name in OF_PART[part])
    return 0 if measured and not missed(figures, BARS) else 1


# --- A stream against calls


async def stream_figures(server: RunningServer, rounds: int) -> dict[str, Any]:
    """Asks both ways in turn; the first round of each warms up."""
    unary, stream = Rounds(), Rounds()
    async with AsyncClient(server.address) as client:
        for number in range(rounds + 1):
            into = (Rounds(), Rounds()) if number == 0 else (unary, stream)
            await measure(server, client.predict, CALLS, into[0])
            async with client.stream(max_in_flight=IN_FLIGHT) as one:
                await one.predict("echo", _tensor(0))  # It begins with its first item.
                await measure(server, one.predict, ITEMS, into[1])
    table = Table(title=f"{IN_FLIGHT} in flight over one connection, identity model")
    for column in ("", "req/s", "server us/request", "client us/request"):
        table.add_column(column, justify="right" if column else "left")
    medians: dict[str, float] = {}
    for name, found in (("Predict", unary), ("PredictStream", stream)):
        values = [statistics.median(each) for each in (found.rates, found.server_us)]
        values.append(statistics.median(found.client_us))
        medians[name] = values[0]
        table.add_row(name, f"{values[0]:,.0f}", f"{values[1]:.0f}", f"{values[2]:.0f}")
    console.print(table)
    return {
        "stream_vs_unary": round(medians["PredictStream"] / medians["Predict"], 3),
        "stream_rps": round(medians["PredictStream"]),
        "unary_rps": round(medians["Predict"]),
        "stream_server_us": round(statistics.median(stream.server_us), 1),
        "unary_server_us": round(statistics.median(unary.server_us), 1),
        "stream_client_us": round(statistics.median(stream.client_us), 1),
        "unary_client_us": round(statistics.median(unary.client_us), 1),
        "stream_rounds": rounds,
    }


async def measure(
    server: RunningServer,
    predict: Callable[..., Awaitable[Prediction]],
    count: int,
    into: Rounds,
) -> None:
    """One round: so many requests, IN_FLIGHT of them at a time; every answer is looked at.

    Raises:
        RuntimeError: an answer is not what was asked.
    """
    numbers = iter(range(count))

    async def ask() -> None:
        for number in numbers:
            answer = await predict("echo", _tensor(number))
            if not np.array_equal(np.asarray(answer.only), _tensor(number)):
                raise RuntimeError(f"request {number} was answered with another tensor")

    server_s, client_s = server.cpu_s(), time.process_time()
    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(IN_FLIGHT):
            tasks.create_task(ask())
    into.rates.append(count / (time.perf_counter() - began))
    into.server_us.append((server.cpu_s() - server_s) / count * 1e6)
    into.client_us.append((time.process_time() - client_s) / count * 1e6)


def _tensor(number: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.full(FLOATS, number, np.float32)


# --- A split against its weights


def split_shares(salt: str, weights: Mapping[str, int], affinities: Sequence[str]) -> Counter[str]:
    """How many affinities each branch gets by the server's own choice."""
    branches = [(name, float(weight)) for name, weight in weights.items()]
    names = list(weights)
    return Counter(names[choose(salt, branches, affinity)] for affinity in affinities)


def largest_error_pct(counts: Mapping[str, int], weights: Mapping[str, int]) -> float:
    """How far the share of a branch is off its weight at most, in percentage points."""
    asked, total = sum(counts.values()), sum(weights.values())
    return max(
        abs(counts.get(name, 0) / asked - weight / total) * 100 for name, weight in weights.items()
    )


def split_figures(server: RunningServer, notes: list[str]) -> dict[str, Any]:
    """Makes the route, asks through it, and counts what the choice says of many more."""
    affinities = [f"user-{number}" for number in range(AFFINITIES)]
    error_pct = largest_error_pct(split_shares(ROUTE, WEIGHTS, affinities), WEIGHTS)
    figures: dict[str, Any] = {
        "split_max_error_pct": round(error_pct, 3),
        "split_affinities": AFFINITIES,
    }
    try:
        create_route(server.address)
    except grpc.RpcError as error:
        notes.append(f"[bold]missing: split_disagreements[/bold]: no route: {error.details()}")
        return figures
    branches = [(name, float(weight)) for name, weight in WEIGHTS.items()]
    names, wrong = list(WEIGHTS), 0
    asked = affinities[:REQUESTS]
    items = [BatchItem(key=ROUTE, inputs=affinity, affinity=affinity) for affinity in asked]
    with Client(server.address) as client, client.stream() as stream:
        for affinity, answer in zip(asked, stream.map(items), strict=True):
            if not isinstance(answer, Prediction):
                raise answer
            name = names[choose(ROUTE, branches, affinity)]
            wrong += (answer.served.branch, answer.served.model) != (name, f"models/model-{name}")
    return {**figures, "split_disagreements": wrong, "split_requests": REQUESTS}


def create_route(address: str) -> None:
    """Creates a split whose salt is its id, and whose key too."""
    split = route_pb2.SplitTarget(
        branches=[
            route_pb2.Branch(name=name, target=f"models/model-{name}", weight=weight)
            for name, weight in WEIGHTS.items()
        ]
    )
    request = route_service_pb2.CreateRouteRequest(
        route_id=ROUTE, route=route_pb2.Route(keys=[ROUTE], split=split)
    )
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options=options) as channel:
        RouteServiceStub(channel).CreateRoute(request, timeout=30)


# --- What is shown


def show(figures: Mapping[str, Any], parts: Sequence[str], notes: Sequence[str]) -> None:
    """The figures that have a bar, and what else there is to say."""
    table = Table(title="Streams and splits")
    for column in ("what", "measured", "bar", ""):
        table.add_column(column, justify="right" if column in ("measured", "bar") else "left")
    asked = {name for part in parts for name in OF_PART[part]}
    not_met = missed(figures, BARS)
    for bar in BARS:
        if bar.figure in figures:
            verdict = "[red]missed[/red]" if bar in not_met else "[green]met[/green]"
            table.add_row(bar.text, f"{figures[bar.figure]:g}", bar.shown, verdict)
        elif bar.figure in asked:
            table.add_row(bar.text, "not measured", bar.shown, "[red]MISSING[/red]")
    console.print(table)
    for note in notes:
        console.print(note)
    one, five, fifteen = os.getloadavg()
    console.print(
        f"{os.cpu_count()} processors, load {one:.2f}, {five:.2f}, {fifteen:.2f} (1, 5, 15 minutes)"
    )


if __name__ == "__main__":
    sys.exit(main())
