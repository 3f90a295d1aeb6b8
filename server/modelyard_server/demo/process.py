"""Server processes for the demo and the benchmarks, found by the address they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

__all__ = ["RunningServer", "ServerEnded", "modelyard_server", "python_server"]

_ADDRESS = re.compile(r"serving on (127\.0\.0\.1:\d+)")
_STOP_S = 30


class ServerEnded(Exception):
    """A server ended before it served.

    Attributes:
        exit_code: of its process.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"the server ended with exit code {exit_code} before it served")
        self.exit_code = exit_code


@dataclass(slots=True, kw_only=True)
class RunningServer:
    """A server in a process of its own.

    Attributes:
        address: "127.0.0.1:port".
        pid: its process.
        exit_code: set once it has ended.
    """

    address: str
    pid: int
    exit_code: int | None = None

    def cpu_s(self) -> float:
        """Processor time of all its threads so far, in seconds."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def python_server(
    arguments: Sequence[str], *, log: IO[bytes] | None = None
) -> Iterator[RunningServer]:
    """Runs `python ARGUMENTS`, which prints "serving on ADDRESS", until the block ends.

    Args:
        arguments: of the interpreter.
        log: where its standard error goes; None for ours.

    Raises:
        ServerEnded: it did not get that far.
    """
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=log, text=True
    ) as process:
        running = None
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := _ADDRESS.search(line):
                    running = RunningServer(address=found[1], pid=process.pid)
                    break
            if running is None:
                raise ServerEnded(process.wait())
            yield running
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if running is not None:
                running.exit_code = process.returncode


@contextmanager
def modelyard_server(config: Path, *, log: IO[bytes] | None = None) -> Iterator[RunningServer]:
    """Runs `modelyard serve --config CONFIG` until the block ends."""
    serve = ["-m", "modelyard_server", "serve", "--config", str(config)]
    with python_server(serve, log=log) as server:
        yield server
