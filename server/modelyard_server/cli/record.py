"""``modelyard record``: what a running server is asked, as a file that ``simulate`` replays."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Final, TextIO

import typer

from modelyard_server.cli.connection import DEFAULT_SERVER, AsJson, Server, exit_codes
from modelyard_server.cli.printing import print_json, print_line
from modelyard_server.cli.recorded_places import RecordedPlaces

if TYPE_CHECKING:
    from datetime import datetime

    from modelyard import RecordedModel, RecordedRequest, RequestRecords, RequestWatch
    from modelyard_server.simulation.request_logs import RequestLogWriter

__all__ = ["Recorder", "parse_duration", "register"]

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)?")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600}
_LONGEST_S: Final = 30 * 86400.0

_WANTED: Final = frozenset(
    {
        "BUDGET_EXHAUSTED",
        "DEADLINE_IN_LOAD",
        "DEADLINE_IN_QUEUE",
        "DEADLINE_UNREACHABLE",
        "QUEUE_FULL",
    }
)
"""Refusals of requests that wanted a model and lacked room or time; a replay finds its own."""


def register(app: typer.Typer) -> None:
    """Add the command to an application."""
    app.command("record")(_record)


def parse_duration(text: str) -> float:
    """Return a duration in seconds: ``90``, ``90s``, ``10m`` or ``1.5h``.

    Raises:
        ValueError: it is none, is 0, or is longer than 30 days.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:40]!r} is no duration: write 90s, 10m or 1.5h")
    seconds = float(match[1]) * _SECONDS[match[2] or "s"]
    if not 0 < seconds <= _LONGEST_S:
        raise ValueError(f"{text[:40]} is no duration to record for: above 0, at most 720h")
    return seconds


def _record(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to, by custom a .jsonl.")],
    duration: Annotated[
        str | None,
        typer.Option("--for", metavar="TIME", help="How long: 90s, 10m, 1.5h.", show_default=False),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option("--requests", min=1, help="Until there are so many.", show_default=False),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that is there.")
    ] = False,
    server: Server = DEFAULT_SERVER,
    timeout: Annotated[
        float,
        typer.Option("--timeout", metavar="SECONDS", help="Most seconds to be without the server."),
    ] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Write what a server is asked from now on to a file, until Ctrl-C or as long as was said.

    `modelyard simulate FILE` replays it. It holds models, times and durations, and no inputs.
    """
    from modelyard import Admin, DeadlineExceeded

    with exit_codes(), Admin(server, timeout_s=timeout) as admin:
        most_s = None if duration is None else parse_duration(duration)
        began_s = time.monotonic()
        places = RecordedPlaces(admin)
        places.look()
        # The first is waited for before there is a file: a server that cannot be reached leaves
        # none behind.
        with admin.watch_requests(timeout_s=most_s) as watch, _Interrupts() as interrupts:
            first = interrupts.next(watch)
            with _created(file, force=force) as out:
                recorder = Recorder(out, most=requests, places=places)
                try:
                    if first is not None:
                        recorder.write(first)
                    while not recorder.full and (records := interrupts.next(watch)) is not None:
                        recorder.write(records)
                except DeadlineExceeded:
                    if most_s is None or time.monotonic() - began_s < most_s - 1:
                        raise  # It is the server's, not ours.
                finally:
                    recorder.tell(_name(file), as_json)


class _Interrupts:
    """Ctrl-C ends the wait for what comes next, and nothing else: no line is cut in the middle."""

    def __init__(self) -> None:
        self._wanted = False
        self._waiting = False
        self._before: object = None

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._before)  # type: ignore[arg-type]  # what it gave

    def next(self, watch: RequestWatch) -> RequestRecords | None:
        """What comes next; None after Ctrl-C."""
        self._waiting = True
        try:
            return None if self._wanted else next(watch, None)
        except KeyboardInterrupt:
            return None
        finally:
            self._waiting = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._wanted = True
        if self._waiting:
            raise KeyboardInterrupt


def _name(file: Path) -> str:
    return file.name or str(file)  # The second is of ".", say.


@contextmanager
def _created(file: Path, *, force: bool) -> Iterator[TextIO]:
    try:
        with file.open("w" if force else "x", encoding="utf-8") as out:
            yield out
    except FileExistsError:
        raise ValueError(f"{_name(file)} is there already; --force writes over it") from None
    except OSError as error:
        raise ValueError(f"{_name(file)} cannot be written: {error.strerror}") from None


class Recorder:
    """Writes records to a file.

    Args:
        out: the file.
        most: requests to write; None for all.
        places: knows where models may be; None for wherever they fit.
    """

    def __init__(
        self, out: TextIO, *, most: int | None, places: RecordedPlaces | None = None
    ) -> None:
        from modelyard_server.simulation.request_logs import RequestLogWriter

        self._out = out
        self._page = StringIO()
        self._writer: RequestLogWriter = RequestLogWriter(self._page)
        self._flush()
        self._most = most
        self._places = places
        self._began: datetime | None = None
        self._loads: dict[str, float | None] = {}
        self._models: set[str] = set()
        self._count = 0
        self._missed = 0
        self._breaks = -1
        self._left_out: Counter[str] = Counter()

    @property
    def full(self) -> bool:
        """Whether there are as many requests as were asked for."""
        return self._most is not None and self._count >= self._most

    def write(self, records: RequestRecords) -> None:
        """Write what came, whole lines at a time."""
        self._breaks += records.begins
        if records.begins and self._breaks > 0 and self._places is not None:
            self._places.look_again()
        self._missed += records.missed_count
        if self._began is None:
            self._began = records.started_at
        # Another run of the server counts from its own start.
        shift_s = (records.started_at - self._began).total_seconds()
        for model in records.models:
            self._write_model(model)
        for request in records.requests:
            if self.full:
                break
            self._write_request(request, shift_s)
        self._flush()

    def tell(self, name: str, as_json: bool) -> None:
        """Print what there is in the file, and what is not."""
        told = {
            "file": name,
            "request_count": self._count,
            "model_count": len(self._models),
            "left_out": dict(self._left_out),
            "missed_count": self._missed,
            "break_count": max(0, self._breaks),
        }
        if as_json:
            print_json(told)
            return
        print_line(f"{name}: {self._count} requests for {len(self._models)} models")
        if self._left_out:
            reasons = ", ".join(f"{count} {why}" for why, count in self._left_out.most_common())
            print_line(f"left out, because they used no model: {reasons}")
        if self._missed:
            print_line(f"{self._missed} requests came faster than they were read, and are missing")
        if self._breaks > 0:
            print_line(f"the connection broke {self._breaks} times; requests are missing")

    def _write_model(self, model: RecordedModel) -> None:
        name = model.model.removeprefix("models/")
        self._loads[name] = model.load_s
        self._writer.model(
            name,
            size_bytes=max(1, model.size_bytes),  # A replay knows no model of no size.
            load_s=model.load_s,
            host_load_s=model.copy_load_s,
            places=() if self._places is None else self._places.of(model.model),
        )

    def _write_request(self, request: RecordedRequest, shift_s: float) -> None:
        name = request.model.removeprefix("models/")
        used = request.run_s is not None or request.reason in _WANTED
        # A replay has to know what a load takes; nobody does of a model that never was loaded.
        if not used or self._loads.get(name) is None:
            self._left_out[request.reason or "of a deleted model"] += 1
            return
        self._count += 1
        self._models.add(name)
        self._writer.request(
            max(0.0, shift_s + request.arrival_s),
            name,
            wait_s=request.wait_s,
            load_s=request.load_s or 0.0,
            run_s=request.run_s or 0.0,
        )

    def _flush(self) -> None:
        self._out.write(self._page.getvalue())
        self._out.flush()
        self._page.seek(0)
        self._page.truncate()
