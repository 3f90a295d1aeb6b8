"""`modelyard serve`, with a heartbeat on the event loop that serves.

    python -m bench.weights_server --config FILE --report FILE

It is the same server. A task of its loop sleeps a millisecond over and over: what keeps the loop
busy in one piece keeps it asleep, and such gaps are written to the report when the server ends.
While it runs, a file beside the report says in which processes the models are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from modelyard_server import lifecycle
from modelyard_server.config import load_config

__all__ = ["ServerReport", "beat", "read_report", "worker_pids"]

_BEAT_S: Final = 0.001
_SHORTEST_S: Final = 0.004
"""Gaps below it are what a sleep of a millisecond takes anyway."""
_MOST_GAPS: Final = 100_000
_OF_MODELS: Final = "models"
"""What the engine's workers that hold models are called, first."""


@dataclass(slots=True)
class ServerReport:
    """What was seen of a server.

    Attributes:
        engine_kind: "process" or "thread".
        beats: of the heart.
        gaps: between beats, those that were long: when each ended, and its length, in seconds. The
            clock is the machine's monotonic one, which all processes share.
    """

    engine_kind: str = ""
    beats: int = 0
    gaps: list[tuple[float, float]] = field(default_factory=list)


def read_report(path: Path) -> ServerReport:
    """Reads the report of a server that has ended."""
    found = json.loads(path.read_text())
    gaps = [(float(end), float(length)) for end, length in found.pop("gaps")]
    return ServerReport(**found, gaps=gaps)


def worker_pids(report: Path) -> tuple[int, ...]:
    """Numbers of the processes in which the models of a running server are."""
    found: Mapping[str, int] = json.loads(_pids_file(report).read_text())
    return tuple(sorted(pid for name, pid in found.items() if name.startswith(_OF_MODELS)))


def main() -> int:
    """Serves until SIGTERM, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args()
    report = ServerReport()
    build: Any = vars(lifecycle)["build"]
    tasks = []

    def watched(*settings: Any, **more: Any) -> Any:
        app = build(*settings, **more)
        beating = beat(app.engine, report, _pids_file(arguments.report))
        tasks.append(asyncio.get_running_loop().create_task(beating, name="heartbeat"))
        return app

    vars(lifecycle)["build"] = watched
    exit_code = lifecycle.run_server(load_config(arguments.config))
    arguments.report.write_text(json.dumps(asdict(report)))
    return exit_code


async def beat(engine: Any, report: ServerReport, pids_file: Path) -> None:
    """Beats until it is cancelled; says in a file where the models are whenever that changes."""
    told: Mapping[str, int] | None = None
    last = time.monotonic()
    while True:
        await asyncio.sleep(_BEAT_S)
        now = time.monotonic()
        report.beats += 1
        if now - last >= _SHORTEST_S and len(report.gaps) < _MOST_GAPS:
            report.gaps.append((now, now - last))
        last = now
        pids = getattr(engine, "pids", None)
        report.engine_kind = "thread" if pids is None else "process"
        here = {_OF_MODELS: os.getpid()} if pids is None else dict(pids)
        if here != told:
            told = here
            new = pids_file.with_suffix(".new")
            new.write_text(json.dumps(here))
            new.replace(pids_file)


def _pids_file(report: Path) -> Path:
    return report.with_suffix(".pids")


if __name__ == "__main__":
    sys.exit(main())
