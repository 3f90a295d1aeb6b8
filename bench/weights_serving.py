"""Whole servers: what fifty fine-tunes take together, and what loads cost those who are not loaded.

Memory is that of the processes in which models are (the workers, or the server where it has none):
their proportional set, in which a page that several processes have counts a part in each. It is
looked at when nothing runs, against a baseline of the same processes, empty, after a model has been
loaded, has answered and has gone.

Pages of a mapped file that no process has touched yet are in none's set, though they are in memory
for it. So of the fifty there is also what their memory is with all of their files' cached pages.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.load import Answers, Load, connected
from bench.machine import written
from bench.plan_models import make_models, model_table, questions_of
from bench.weights_cache import resident_share
from bench.weights_figures import beyond_ledger, longest_gap_ms
from bench.weights_loads import TEXT, Tell
from bench.weights_models import (
    BASE,
    SMALL,
    WeightsModel,
    filed_bytes,
    make_encoders,
    make_fine_tunes,
)
from bench.weights_server import ServerReport, read_report, worker_pids
from modelyard import Admin, Client, ResidencyState
from modelyard_server.demo.process import python_server
from modelyard_server.observability.process import read_process_memory

__all__ = ["loading_figures", "shared_figures"]

_HERE: Final = "cuda:0"
_THERE: Final = "cuda:1"
_RATE_HZ: Final = 20.0
_CLIENTS: Final = 2
_BETWEEN_WINDOWS_S: Final = 0.3
_START_S: Final = 300.0
_BUFFER_BYTES: Final = 2 * 8 * 512
"""Of each BERT: two numbers for each position, which the library computes. Nobody shares them."""
_LOOKS: Final = (1, 10, 25, 50)
"""After so many fine-tunes memory is compared with the ledger."""


@dataclass(slots=True)
class _Server:
    """A running server.

    Attributes:
        admin: of it.
        client: of it.
        address: of it.
        report_file: where its report will be.
        packs: folder of the files in which its weights are.
        baseline_bytes: memory of its workers when they are empty.
    """

    admin: Admin
    client: Client
    address: str
    report_file: Path
    packs: Path
    baseline_bytes: int = 0
    _anonymous_bytes: int = 0
    _pids: tuple[int, ...] = ()

    def take_baseline(self, models: Sequence[str]) -> None:
        """Loads models, asks each, unloads them, and notes what is left.

        Args:
            models: one on each device, so that every worker has run one.
        """
        for model in models:
            self.client.predict(model, [TEXT])
        for model in models:
            self.admin.unload(model)
        self._pids = worker_pids(self.report_file)
        self.baseline_bytes, self._anonymous_bytes = self._read()

    def look(self) -> tuple[int, int]:
        """Memory above the baseline, and what the ledger says.

        Raises:
            RuntimeError: a worker has died meanwhile.
        """
        if worker_pids(self.report_file) != self._pids:
            raise RuntimeError("the workers are not those of the baseline: one has died")
        ledger = sum(device.accounted_bytes for device in self.admin.list_devices())
        return self._read()[0] - self.baseline_bytes, ledger

    def with_cached_bytes(self) -> int:
        """Memory above the baseline that is in no file, and all of the packs that is in memory."""
        cached = sum(
            round(resident_share(path) * path.stat().st_size)
            for path in self.packs.glob("*.safetensors")
        )
        return self._read()[1] - self._anonymous_bytes + cached

    def _read(self) -> tuple[int, int]:
        """Proportional and anonymous bytes of the workers."""
        found = [read_process_memory(pid) for pid in self._pids]
        return (
            sum(memory.proportional_bytes for memory in found),
            sum(memory.anonymous_bytes for memory in found),
        )


@contextmanager
def _running(folder: Path, config: str) -> Iterator[_Server]:
    # Registering brings what is registered into the store, which is most of the start.
    report = folder / "report.json"
    head = """
        [server]
        listen = "127.0.0.1:0"
        log_level = "warning"
        [catalog]
        durable = false
        [weights]
        store = "weights"
        [engine]
        kind = "process"
        [roots]
        store = "store"
        """
    path = written(folder, head + config)
    arguments = ["-m", "bench.weights_server", "--config", str(path), "--report", str(report)]
    with (
        python_server(arguments) as server,
        Admin(server.address, timeout_s=_START_S) as admin,
        Client(server.address, timeout_s=_START_S) as client,
    ):
        yield _Server(
            admin=admin,
            client=client,
            address=server.address,
            report_file=report,
            packs=folder / "weights" / "packs",
        )


def _device(device: str, budget_bytes: int) -> str:
    # A worker each, as one has it who does not want loads on one device to be noticed on another.
    worker = device.replace(":", "-")
    return (
        f'\n[[devices]]\ndevice = "{device}"\nbudget = {budget_bytes}\nlogical = true\n'
        f'worker = "{worker}"\n'
    )


def _table(model: WeightsModel, device: str) -> str:
    return (
        f'\n[models.{model.name}]\nruntime = "transformers"\ntask = "{model.task}"\n'
        f'root = "store"\nfolder = "{model.name}"\ndevice = "{device}"\n'
    )


# --- Fifty fine-tunes ---------------------------------------------------------------------------


def shared_figures(folder: Path, quick: bool, tell: Tell) -> dict[str, Any]:
    """Loads fine-tunes with one encoder, each with a head of its own, and asks each once.

    Args:
        folder: for models and the server; exists.
        quick: ten of 45 MB instead of fifty of 438 MB.
        tell: is told what goes on.
    """
    tell("making fine-tunes")
    count = 10 if quick else 50
    encoder = SMALL if quick else BASE
    models = make_fine_tunes(folder / "store", encoder, count)
    heads = [_head_bytes(model) for model in models]
    encoder_bytes = filed_bytes(models[0].folder) - heads[0]
    expected = encoder_bytes + sum(heads)
    # Room for the encoder once, and not twice.
    config = _device(_HERE, expected + encoder_bytes // 2)
    config += "".join(_table(model, _HERE) for model in models)
    beyond, looks = [], 0
    tell(f"starting a server with {count} of them")
    with _running(folder, config) as server:
        server.take_baseline([models[0].name])
        memory = ledger = 0
        for number, model in enumerate(models, start=1):
            server.client.predict(model.name, [TEXT])
            if number in _LOOKS or number == count:
                memory, ledger = server.look()
                beyond.append(beyond_ledger(memory, ledger))
                looks += 1
                tell(
                    f"{number} of {count}: {memory / 1e6:.0f} MB in memory, "
                    f"{ledger / 1e6:.0f} MB in the ledger"
                )
        with_cached = server.with_cached_bytes()
        resident = sum(
            residency.state is ResidencyState.RESIDENT
            for residency in server.admin.list_residencies()
        )
    report = read_report(server.report_file)
    off = ledger - expected - count * _BUFFER_BYTES
    return {
        # Of fewer than all nothing can be said.
        "shared_50_ratio": round(memory / expected, 3) if resident == count else None,
        "shared_50_with_cached_ratio": (
            round(with_cached / expected, 3) if resident == count else None
        ),
        "shared_50_ledger_bytes_off": off if resident == count else None,
        "shared_count": count,
        "shared_resident": resident,
        "shared_memory_mb": round(memory / 1e6, 1),
        "shared_ledger_bytes": ledger,
        "shared_encoder_bytes": encoder_bytes,
        "shared_measured_vs_ledger": round(max(beyond), 3),
        "engine_kind": report.engine_kind,
    }


def _head_bytes(model: WeightsModel) -> int:
    """Of the tensors that are not the encoder's."""
    from safetensors import safe_open

    total = 0
    with safe_open(model.folder / "head.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            tensor = file.get_tensor(name)
            total += tensor.numel() * tensor.element_size()
    return total


# --- Requests while others load -----------------------------------------------------------------


@dataclass(slots=True)
class _Windows:
    """Requests of windows of one kind.

    Attributes:
        answers: of all.
        p99_ms: of each window.
        times: when each began and ended.
    """

    answers: Answers = field(default_factory=Answers)
    p99_ms: list[float] = field(default_factory=list)
    times: list[tuple[float, float]] = field(default_factory=list)


def loading_figures(folder: Path, quick: bool, tell: Tell) -> dict[str, Any]:
    """Asks MiniLM at a steady pace, while models of 438 MB load back to back elsewhere and not.

    Args:
        folder: for models and the server; exists.
        quick: fewer and shorter windows.
        tell: is told what goes on.
    """
    tell("making models")
    store = folder / "store"
    minilm, *others = make_models(store)
    large = make_encoders(store, BASE, ["base-a", "base-b"])
    questions = questions_of([minilm], store)
    room = filed_bytes(large[0].folder) * 3 // 2
    config = _device(_HERE, 400_000_000) + _device(_THERE, room)
    config += "".join(model_table(model, _HERE) for model in (minilm, *others))
    config += "".join(_table(model, _THERE) for model in large)
    pairs, window_s = (2, 2.0) if quick else (10, 4.0)
    tell("starting a server")
    with _running(folder, config) as server:
        beyond = _mixed_points(server, [model.name for model in (minilm, *others)], large)
        tell(f"memory beyond the ledger: {max(beyond):.3f} of it")
        loads_before = server.admin.stats().load_count
        steady, loading = asyncio.run(_windows(server, questions, large, pairs, window_s, tell))
        loads = server.admin.stats().load_count - loads_before
    report = read_report(server.report_file)
    return _loading_figures(steady, loading, report) | {
        "loads_in_windows": loads,
        "mixed_measured_vs_ledger": round(max(beyond), 3),
        "engine_kind": report.engine_kind,
    }


def _mixed_points(
    server: _Server, small: Sequence[str], large: Sequence[WeightsModel]
) -> list[float]:
    """Memory against the ledger as models of several sizes come and go."""
    server.take_baseline([small[0], large[0].name])
    beyond = []
    for name in (*small, *(model.name for model in large), small[0], large[0].name):
        server.client.predict(name, [TEXT])
        memory, ledger = server.look()
        beyond.append(beyond_ledger(memory, ledger))
    for name in small[1:]:
        server.admin.unload(name)
        memory, ledger = server.look()
        beyond.append(beyond_ledger(memory, ledger))
    return beyond


def _loading_figures(steady: _Windows, loading: _Windows, report: ServerReport) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(loading.p99_ms, steady.p99_ms, strict=True)]
    lost = [*steady.answers.lost, *loading.answers.lost]
    if lost:
        raise RuntimeError(f"{len(lost)} requests were lost: {lost[0]}")
    return {
        "p99_during_load_ratio": round(
            loading.answers.percentile_ms(99) / steady.answers.percentile_ms(99), 3
        ),
        "p99_during_load_ratio_window_median": round(statistics.median(ratios), 3),
        "p99_during_load_ms": round(loading.answers.percentile_ms(99), 2),
        "p99_steady_ms": round(steady.answers.percentile_ms(99), 2),
        "p50_during_load_ms": round(loading.answers.percentile_ms(50), 2),
        "p50_steady_ms": round(steady.answers.percentile_ms(50), 2),
        "requests_during_load": loading.answers.count,
        "requests_steady": steady.answers.count,
        "stall_ms": round(longest_gap_ms(report.gaps, loading.times), 1),
        "stall_steady_ms": round(longest_gap_ms(report.gaps, steady.times), 1),
        "heartbeats": report.beats,
        "answers_wrong": len(steady.answers.wrong) + len(loading.answers.wrong),
    }


async def _windows(
    server: _Server,
    questions: Sequence[Any],
    large: Sequence[WeightsModel],
    pairs: int,
    window_s: float,
    tell: Tell,
) -> tuple[_Windows, _Windows]:
    """As many windows without loads as with, in turn, and first in turn."""
    steady, loading = _Windows(), _Windows()
    async with connected(server.address, _CLIENTS) as clients:
        load = Load(clients, questions, _RATE_HZ, seed=1)
        for number in range(pairs):
            # Loaded again, and everything that is made in a first run.
            await load.ask_all()
            for with_loads in (True, False) if number % 2 else (False, True):
                kind = loading if with_loads else steady
                await asyncio.sleep(_BETWEEN_WINDOWS_S)
                with _loads_going_on(server.admin, large if with_loads else ()):
                    began = time.monotonic()
                    answers = await load.run(round(_RATE_HZ * window_s))
                    kind.times.append((began, time.monotonic()))
                kind.answers.add(answers)
                kind.p99_ms.append(answers.percentile_ms(99))
            tell(
                f"window {number + 1} of {pairs}: p99 {loading.p99_ms[-1]:.1f} ms with loads, "
                f"{steady.p99_ms[-1]:.1f} without"
            )
    return steady, loading


@contextmanager
def _loads_going_on(admin: Admin, models: Sequence[WeightsModel]) -> Iterator[None]:
    """Has models loaded one after the other, each as soon as the one before is there.

    There is room for one: each load begins by taking the other model out of memory.
    """
    if not models:
        yield
        return
    stopped = threading.Event()
    failed: list[BaseException] = []
    names = [f"models/{model.name}" for model in models]

    def keep_loading() -> None:
        current = 0
        try:
            with admin.watch_residencies() as watch:
                admin.load(names[current])
                for change in watch:
                    for residency in change.residencies:
                        is_there = residency.state is ResidencyState.RESIDENT
                        if residency.model == names[current] and is_there:
                            if stopped.is_set():
                                return
                            current = (current + 1) % len(names)
                            admin.load(names[current])
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=keep_loading, name="loads", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(_START_S)
    if failed:
        raise failed[0]
    if thread.is_alive():
        raise RuntimeError("loads do not come to their end")
