"""What the spine costs: the core, the whole server against a bare echo, memory over reload cycles.

    python -m bench.spine --core build/bench/core.json --output build/bench/spine.json

Ratios are of rounds taken in turn within this run: the machine's speed drifts, a pair's ratio
hardly does. The load comes from h2load (nghttp2), which is light enough not to be what is measured.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.echo_server import SERVICE as ECHO_SERVICE
from bench.machine import write_figures, written
from modelyard import Admin, Client
from modelyard.v1 import inference_service_pb2 as pb
from modelyard.v1 import tensor_pb2
from modelyard_server import _core
from modelyard_server.demo.models import minilm_folder
from modelyard_server.demo.process import RunningServer, modelyard_server, python_server

_MODELS = 1000
_ROUNDS = 7
_CYCLES = 200
_SETTLED_CYCLE = 20
_PREDICT = "/modelyard.v1.InferenceService/Predict"

console = Console()


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One way to load a server.

    Attributes:
        name: of its row.
        floats: FLOAT32 elements of the request's tensor.
        connections: connections.
        streams: calls in flight on each.
        calls: calls of a round.
    """

    name: str
    floats: int
    connections: int
    streams: int
    calls: int


LOADS = (
    Load(name="c8", floats=16, connections=4, streams=2, calls=6000),
    Load(name="c64", floats=16, connections=4, streams=16, calls=8000),
    Load(name="1mib", floats=262_144, connections=4, streams=2, calls=600),
)


def main() -> None:
    """Runs everything and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--core", type=Path, required=True, help="google-benchmark's JSON")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--cycles", type=int, default=_CYCLES)
    arguments = parser.parse_args()

    figures: dict[str, Any] = {}
    figures |= core_figures(arguments.core)
    figures["py_acquire_release_us"] = python_acquire_release_us()
    show_core(figures)
    with tempfile.TemporaryDirectory() as folder:
        figures |= identity_figures(Path(folder), arguments.rounds)
        figures |= memory_figures(Path(folder), arguments.cycles)
    write_figures(arguments.output, figures)
    console.print(f"written to {arguments.output}")


# --- The core -----------------------------------------------------------------------------------


def core_figures(path: Path) -> dict[str, Any]:
    """The core's own benchmark, with the default policy."""
    medians: dict[str, float] = {}
    for run in json.loads(path.read_text())["benchmarks"]:
        if run.get("run_type") == "aggregate" and run["aggregate_name"] != "median":
            continue
        unit = {"ns": 1, "us": 1e3, "ms": 1e6}[run["time_unit"]]
        medians[run["run_name"]] = run["cpu_time"] * unit
    policy = _core.POLICIES[0]
    return {
        "core_acquire_release_ns": round(medians[f"BM_AcquireRelease/{policy}"], 1),
        "plan_us_1000x8": round(medians[f"BM_Plan1000x8/{policy}"] / 1e3, 2),
    }


def python_acquire_release_us() -> float:
    """A lease taken and given back through the bindings, with 1,000 resident models."""
    yard = _core.Yard(budgets=[_MODELS * 1000])
    models = [yard.add_model(f"m{i}", [{0: 1000}], 1.0) for i in range(_MODELS)]

    def carry_out(actions: list[Any] | None) -> None:
        for action in actions or ():
            if isinstance(action, _core.Load):
                carry_out(yard.load_done(action.model, 1, {0: 1000}, 0.1))
            elif isinstance(action, _core.Grant):
                carry_out(yard.release(action.lease, 1))

    for model in models:
        carry_out(yard.request(model, 1, _core.NEVER_NS)[1])
    yard.audit()
    order = random.Random(1).choices(models, k=100_000)
    acquire, release = yard.try_acquire, yard.release
    rounds = []
    for _ in range(9):
        began = time.thread_time_ns()
        for model in order:
            release(acquire(model, 1), 1)
        rounds.append((time.thread_time_ns() - began) / len(order) / 1000)
    return round(statistics.median(rounds), 3)


def show_core(figures: dict[str, Any]) -> None:
    """The first table."""
    table = Table(title="The core, 1,000 resident models")
    for column in ("what", "measured", "at most"):
        table.add_column(column, justify="left" if column == "what" else "right")
    table.add_row(
        "acquire + release, C++", f"{figures['core_acquire_release_ns']:.0f} ns", "300 ns"
    )
    table.add_row(
        "acquire + release, Python", f"{figures['py_acquire_release_us']:.2f} us", "1.5 us"
    )
    table.add_row("plan on 8 devices", f"{figures['plan_us_1000x8']:.1f} us", "50 us")
    console.print(table)


# --- The whole server against a bare echo -------------------------------------------------------


def identity_figures(folder: Path, rounds: int) -> dict[str, Any]:
    """Requests per second of an identity model, as a share of a bare grpc.aio echo's."""
    config = """
        [server]
        listen = "127.0.0.1:0"
        log_level = "warning"
        # What is measured is the way of a request, not the way to another process.
        [engine]
        kind = "thread"
        [[devices]]
        device = "cpu"
        budget = "300MB"
        [models.echo]
        runtime = "identity"
        """
    figures: dict[str, Any] = {}
    table = Table(title="Identity model through the whole server, against a bare grpc.aio echo")
    for column in ("load", "server", "req/s", "CPU us/call", "of the raw echo", "of the parsed"):
        table.add_column(column, justify="left" if column in ("load", "server") else "right")
    with (
        modelyard_server(written(folder, config)) as yard,
        python_server(["-m", "bench.echo_server"]) as echo,
    ):
        for load in LOADS:
            check_identity(yard, load)
            frame = folder / f"{load.name}.bin"
            frame.write_bytes(request_frame(load))
            targets = {
                "raw echo": (echo, f"/{ECHO_SERVICE}/Raw"),
                "parsed echo": (echo, f"/{ECHO_SERVICE}/Parsed"),
                "modelyard": (yard, _PREDICT),
            }
            rates: dict[str, list[float]] = {name: [] for name in targets}
            costs: dict[str, list[float]] = {name: [] for name in targets}
            answered = answered_count(yard)
            for round_number in range(rounds + 1):
                for name, (server, path) in targets.items():
                    rate, cpu_us = measure(server, path, frame, load)
                    if round_number > 0:  # The first one warms up.
                        rates[name].append(rate)
                        costs[name].append(cpu_us)
            # h2load looks at HTTP's status only: the server says whether it answered them all.
            expected = (rounds + 1) * load.calls
            if answered_count(yard) - answered != expected:
                raise RuntimeError(f"{load.name}: not every call was answered")
            for name in targets:
                against = [ratio(rates[name], rates[echo_name]) for echo_name in list(targets)[:2]]
                table.add_row(
                    load.name,
                    name,
                    f"{statistics.median(rates[name]):,.0f}",
                    f"{statistics.median(costs[name]):.0f}",
                    f"{against[0]:.0%}",
                    f"{against[1]:.0%}",
                )
            key = "identity_1mib_vs_aio" if load.name == "1mib" else f"identity_vs_aio_{load.name}"
            figures[key] = round(ratio(rates["modelyard"], rates["raw echo"]), 3)
            figures[f"{key}_parsed"] = round(ratio(rates["modelyard"], rates["parsed echo"]), 3)
            figures[f"{key}_cpu"] = round(
                statistics.median(costs["modelyard"]) / statistics.median(costs["raw echo"]), 3
            )
    console.print(table)
    return figures


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def request_frame(load: Load) -> bytes:
    """A PredictRequest as gRPC frames it."""
    request = pb.PredictRequest(key="echo")
    tensor = request.inputs.add()
    tensor.data_type = tensor_pb2.DATA_TYPE_FLOAT32
    tensor.shape.append(load.floats)
    tensor.raw = np.arange(load.floats, dtype=np.float32).tobytes()
    body = request.SerializeToString()
    return b"\0" + struct.pack(">I", len(body)) + body


def check_identity(server: RunningServer, load: Load) -> None:
    """The server answers what it was asked, before it is asked how fast."""
    with Client(server.address) as client:
        sent = np.arange(load.floats, dtype=np.float32)
        if not np.array_equal(client.predict("echo", sent)[""], sent):
            raise RuntimeError("the identity model changed its input")


def answered_count(server: RunningServer) -> int:
    """Predict calls the server has answered with outputs."""
    with Admin(server.address) as admin:
        return admin.stats().answered_count


def measure(server: RunningServer, path: str, frame: Path, load: Load) -> tuple[float, float]:
    """One round: requests per second, and microseconds of the server's processor time per call."""
    before = server.cpu_s()
    done = subprocess.run(
        [
            *("h2load", "-t", "1", "-n", str(load.calls)),
            *("-c", str(load.connections), "-m", str(load.streams), "-d", str(frame)),
            *("-H", "content-type: application/grpc", "-H", "te: trailers"),
            f"http://{server.address}{path}",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    cpu_us = (server.cpu_s() - before) / load.calls * 1e6
    found = re.search(r"finished in .*?, ([\d.]+) req/s", done.stdout)
    ok = re.search(r"(\d+) succeeded", done.stdout)
    if found is None or ok is None or int(ok[1]) != load.calls:
        raise RuntimeError(f"h2load: {done.stdout}")
    return float(found[1]), cpu_us


# --- Memory over reload cycles ------------------------------------------------------------------


def memory_figures(folder: Path, cycles: int) -> dict[str, Any]:
    """Resident set of a server and its workers that load and evict MiniLM over and over."""
    source = minilm_folder()
    config = f"""
        [server]
        listen = "127.0.0.1:0"
        log_level = "warning"
        [[devices]]
        device = "cpu"
        budget = "100MB"
        [roots]
        packages = {json.dumps(str(source.parent))}
        [models.a]
        runtime = "transformers"
        task = "feature-extraction"
        root = "packages"
        folder = {json.dumps(source.name)}
        [models.b]
        runtime = "transformers"
        task = "feature-extraction"
        root = "packages"
        folder = {json.dumps(source.name)}
        """
    resident: list[int] = []
    with (
        modelyard_server(written(folder, config)) as server,
        Client(server.address) as client,
        Admin(server.address) as admin,
    ):
        for cycle in range(cycles):
            # Taken out by hand: what the two have in common would otherwise keep both in.
            client.predict("ab"[cycle % 2], "a sentence that is embedded in every cycle")
            stats = admin.stats()
            resident.append(stats.process_resident_bytes + stats.worker_resident_bytes)
            admin.unload("ab"[cycle % 2])
        loads = admin.stats().load_count
        if loads != cycles:
            raise RuntimeError(f"{cycles} cycles made {loads} loads")
        (device,) = admin.list_devices()
        left = device.reserved_bytes + device.resident_bytes + device.draining_bytes
        peak = device.peak_accounted_bytes / device.budget_bytes
    settled = resident[min(_SETTLED_CYCLE, cycles) - 1]
    drift = (resident[-1] - settled) / settled * 100
    table = Table(title=f"{cycles} load/evict cycles of MiniLM (91 MB), budget for one")
    for column in ("after", "resident set"):
        table.add_column(column, justify="right")
    for cycle in sorted({1, min(_SETTLED_CYCLE, cycles), cycles // 2, cycles}):
        table.add_row(f"cycle {cycle}", f"{resident[cycle - 1] / 1e6:,.1f} MB")
    table.add_row("drift since cycle 20", f"{drift:+.2f} % (at most 5 %)")
    table.add_row("ledger after unloading", f"{left} bytes")
    table.add_row("peak accounted / budget", f"{peak:.1%}")
    console.print(table)
    if left:
        raise RuntimeError(f"{left} bytes are left in the ledger")
    return {
        "rss_drift_200_cycles_pct": round(drift, 2),
        "rss_after_cycle_20_mb": round(settled / 1e6, 1),
        "ledger_bytes_at_end": left,
    }


if __name__ == "__main__":
    main()
