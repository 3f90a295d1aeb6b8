"""What sharing runs brings: MiniLM on one lane, with batching and without, at two concurrencies.

    python -m bench.batching --output build/bench/batching.json

Two servers answer the same short texts, of the same weights on one thread; one of them has
`max_batch_rows = 1`. They are asked in turn, and ratios are of rounds within this run. While one is
asked the other is idle. Answers are compared with those of a request that was alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.load import connected
from bench.machine import write_figures, written
from modelyard import Client
from modelyard.v1 import inference_service_pb2 as pb
from modelyard.v1 import tensor_pb2
from modelyard_server.demo.models import minilm_folder
from modelyard_server.demo.process import RunningServer, modelyard_server

_ROUNDS: Final = 5
_CONNECTIONS: Final = 4
_DEADLINE_S: Final = 60.0
_TOLERANCE: Final = 1e-5
_TEXT: Final = (
    "the model was asked how long a request may wait before its answer is of no use to anybody"
)

console = Console()


@dataclass(frozen=True, slots=True, kw_only=True)
class Concurrency:
    """A way to load a server.

    Attributes:
        name: of its figure.
        callers: that ask one after the other.
        calls: of a round.
        rounds: for each that was asked for. Short rounds in turn tell small differences.
    """

    name: str
    callers: int
    calls: int
    rounds: int = 1


LOADS = (
    Concurrency(name="c1", callers=1, calls=40, rounds=5),
    Concurrency(name="c64", callers=64, calls=768),
)


def main() -> None:
    """Runs everything and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--engine", choices=("process", "thread"), default="process")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, both_servers(Path(folder), arguments) as servers:
        figures = asyncio.run(measured(servers, arguments.rounds))
    write_figures(arguments.output, figures)
    console.print(f"written to {arguments.output}")


@contextmanager
def both_servers(folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, RunningServer]]:
    """Servers by whether they batch: "on" and "off"."""
    source = minilm_folder()
    with ExitStack() as stack:
        servers = {}
        for name, most_rows in {"on": 64, "off": 1}.items():
            own = folder / name
            own.mkdir()
            config = f"""
                [server]
                listen = "127.0.0.1:0"
                log_level = "warning"
                [engine]
                kind = {json.dumps(arguments.engine)}
                max_batch_rows = {most_rows}
                [[devices]]
                device = "cpu"
                budget = "300MB"
                threads = 1
                [roots]
                packages = {json.dumps(str(source.parent))}
                [models.minilm]
                runtime = "transformers"
                task = "feature-extraction"
                root = "packages"
                folder = {json.dumps(source.name)}
                pinned = true
                """
            servers[name] = stack.enter_context(modelyard_server(written(own, config)))
        yield servers


def texts() -> tuple[str, ...]:
    """Texts of 2 to 9 words, as people search."""
    words = _TEXT.split()
    return tuple(" ".join(words[: 2 + i]) for i in range(8))


def frame_of(text: str) -> bytes:
    """A PredictRequest for one text."""
    request = pb.PredictRequest(key="minilm")
    tensor = request.inputs.add()
    tensor.data_type = tensor_pb2.DATA_TYPE_TEXT
    tensor.shape.append(1)
    tensor.text.values.append(text)
    return request.SerializeToString()


async def measured(
    servers: dict[str, RunningServer],
    rounds: int,
    asked_texts: Sequence[str] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """All figures, of rounds taken in turn.

    Args:
        servers: from both_servers.
        rounds: of each way to load them.
        asked_texts: what they are asked; what texts() has if there are none.
        tell: is told what goes on.
    """
    asked = {text: frame_of(text) for text in asked_texts or texts()}
    expected = {}
    with Client(servers["off"].address) as client:
        for text in asked:
            expected[text] = np.asarray(client.predict("minilm", [text])["embedding"])
    figures: dict[str, Any] = {}
    table = Table(title="MiniLM on one lane of one thread, short texts: requests per second")
    for column in ("at once", "batching", "without", "ratio"):
        table.add_column(column, justify="right")
    for load in LOADS:
        rates: dict[str, list[float]] = {name: [] for name in servers}
        for round_number in range(load.rounds * rounds + 1):
            # Who comes first changes: the one after it finds the machine as it left it.
            for name in sorted(servers, reverse=round_number % 2 == 1):
                server = servers[name]
                rate = await one_round(server, load, asked, expected)
                if round_number > 0:  # The first one warms up.
                    rates[name].append(rate)
                tell(f"{load.name}, round {round_number}, batching {name}: {rate:.0f} a second")
        ratio = statistics.median(a / b for a, b in zip(rates["on"], rates["off"], strict=True))
        figures[f"batching_{load.name}"] = round(ratio, 3)
        for name, of_server in rates.items():
            figures[f"batching_{load.name}_{name}_per_s"] = round(statistics.median(of_server), 1)
        table.add_row(
            str(load.callers),
            *(f"{statistics.median(rates[name]):,.0f}" for name in ("on", "off")),
            f"{ratio:.2f}",
        )
    console.print(table)
    return figures


async def one_round(
    server: RunningServer,
    load: Concurrency,
    asked: dict[str, bytes],
    expected: dict[str, np.ndarray[Any, Any]],
) -> float:
    """Requests per second of one round, all of which were answered, and right."""
    turns = cycle(asked.items())
    answers: list[tuple[str, pb.PredictResponse]] = []
    left = load.calls

    async def caller(predict: Any) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            text, frame = next(turns)
            answers.append((text, await predict(frame, timeout=_DEADLINE_S)))

    async with connected(server.address, min(_CONNECTIONS, load.callers)) as clients:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for i in range(load.callers):
                group.create_task(caller(clients[i % len(clients)]))
        seconds = time.perf_counter() - began
    check(answers, expected)
    return len(answers) / seconds


def check(
    answers: Sequence[tuple[str, pb.PredictResponse]], expected: dict[str, np.ndarray[Any, Any]]
) -> None:
    """Raises if an answer is not that of a request that was alone."""
    for text, response in answers:
        (output,) = response.outputs
        vector = np.frombuffer(output.raw, dtype=np.float32)
        apart = float(np.abs(vector - expected[text].ravel()).max())
        if not apart <= _TOLERANCE:
            raise RuntimeError(f"{text!r}: {apart:.3g} from the right answer")


if __name__ == "__main__":
    main()
