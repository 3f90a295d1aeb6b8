"""Request logs: what a server was asked, as JSON lines that the simulator replays.

The first line says what it is::

    {"modelyard_record": 1}

Every other line is about a model or a request, in any order; the last line about a model counts::

    {"model": "a", "size_bytes": 300000000, "load_s": 1.2, "host_load_s": 0.2}
    {"model": "b", "size_bytes": 500000000, "load_s": 2, "places": [["cuda:0"], ["cuda:1"]]}
    {"t": 12.25, "model": "a", "wait_s": 1.3, "load_s": 1.2, "run_s": 0.05}

``t`` is the arrival in seconds, of any origin. Requests are written when they end, so a reader
sorts them. ``wait_s`` is from the arrival to the start of the run, ``load_s`` how long the load
took that the request waited for (0 if the model was there), ``run_s`` how long it ran. A model's
``load_s`` may be left out: then the mean of what its requests say counts. Its ``places``, where
alone it may be, each have the devices that it is on at once; without any it may be on any. A replay
takes ``t``, ``model`` and ``run_s``; waits and loads are what it finds out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np

from modelyard_server.simulation.places import read_places
from modelyard_server.simulation.text_lines import lines_of
from modelyard_server.simulation.trace import (
    MOST_MODELS,
    MOST_REQUESTS,
    PlaceNames,
    Table,
    Trace,
    TraceError,
    make_trace,
)

__all__ = ["RECORD_VERSION", "RequestLogWriter", "read_request_log"]

RECORD_VERSION: Final = 1
_HEADER: Final = "modelyard_record"
_MODEL_FIELDS: Final = ("model", "size_bytes", "load_s", "host_load_s", "places")
_REQUEST_FIELDS: Final = ("t", "model", "wait_s", "load_s", "run_s")


class RequestLogWriter:
    """Writes a request log, a line at a time.

    Args:
        file: where to; text, to be flushed and closed by its owner.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._write({_HEADER: RECORD_VERSION})

    def model(
        self,
        name: str,
        *,
        size_bytes: int,
        load_s: float | None = None,
        host_load_s: float | None = None,
        places: Sequence[Sequence[str]] = (),
    ) -> None:
        """Write what a model is; again when it is known better.

        Args:
            name: of the model.
            size_bytes: what it holds.
            load_s: seconds of a load from its files, if that is known.
            host_load_s: the same from a copy in host memory.
            places: where alone it may be, each as the names of the devices that it is on at once.
        """
        self._write(
            {
                "model": name,
                "size_bytes": size_bytes,
                **({} if load_s is None else {"load_s": load_s}),
                **({} if host_load_s is None else {"host_load_s": host_load_s}),
                **({"places": [list(place) for place in places]} if places else {}),
            }
        )

    def request(
        self, arrival_s: float, model: str, *, wait_s: float, load_s: float, run_s: float
    ) -> None:
        """Write a request that has ended; times in seconds."""
        self._write(
            {"t": arrival_s, "model": model, "wait_s": wait_s, "load_s": load_s, "run_s": run_s}
        )

    def _write(self, line: Mapping[str, object]) -> None:
        self._file.write(json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n")


def read_request_log(path: Path) -> Trace:
    """Read a request log; see this module for its form.

    Raises:
        TraceError: it is none, or a line of it is wrong; the text names the line.
        OSError: it cannot be read.
    """
    reader = _Reader(path.name)
    with closing(lines_of(path)) as lines:
        for line, text in enumerate(lines, 1):
            if text.strip():
                reader.read(line, text)
    return reader.trace(path.stem)


class _Reader:
    """What has been read of a log."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._begun = False
        self._models: dict[str, tuple[int, dict[str, Any]]] = {}
        self._requests: list[tuple[float, int, str, float, float]] = []

    def read(self, line: int, text: str) -> None:
        where = f"{self._file}:{line}"
        try:
            told = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise TraceError(f"{where}: is no JSON") from None
        if not isinstance(told, dict):
            raise TraceError(f"{where}: is no JSON object")
        if not self._begun:
            self._begin(told, where)
        elif "t" in told:
            self._request(told, line, where)
        else:
            self._model(told, line, where)

    def trace(self, name: str) -> Trace:
        if not self._begun:
            raise TraceError(f"{self._file}:1: a line with {_HEADER!r} must be first")
        requests = sorted(self._requests, key=lambda request: request[:2])
        positions: dict[str, int] = {}
        waits: dict[str, list[float]] = {}
        for _, line, model, load_s, _ in requests:
            if model not in self._models:
                raise TraceError(f"{self._file}:{line}: no line says what model {model[:40]!r} is")
            positions.setdefault(model, len(positions))
            if load_s > 0:
                waits.setdefault(model, []).append(load_s)
        names = list(positions)
        loads = [self._load_s(model, waits.get(model, [])) for model in names]

        def locate(table: Table, index: int) -> str:
            if table == "request":
                return f"{self._file}:{requests[index][1]}"
            return f"{self._file}:{self._models[names[index]][0]}"

        return make_trace(
            name,
            names=names,
            size_bytes=[self._models[model][1]["size_bytes"] for model in names],
            load_s=loads,
            host_load_s=[
                float(self._models[model][1].get("host_load_s", load_s))
                for model, load_s in zip(names, loads, strict=True)
            ],
            arrival_s=np.asarray([request[0] for request in requests], dtype=np.float64),
            model=np.asarray([positions[request[2]] for request in requests], dtype=np.int64),
            run_s=np.asarray([request[4] for request in requests], dtype=np.float64),
            locate=locate,
            place_names=[self._models[model][1].get("places", ()) for model in names],
        )

    def _load_s(self, model: str, measured: list[float]) -> float:
        line, told = self._models[model]
        if "load_s" in told:
            return float(told["load_s"])
        if not measured:
            raise TraceError(
                f"{self._file}:{line}: nothing says how long model {model[:40]!r} takes to load: "
                "add load_s"
            )
        return sum(measured) / len(measured)

    def _begin(self, told: dict[str, Any], where: str) -> None:
        version = told.get(_HEADER)
        if type(version) is not int:
            raise TraceError(
                f'{where}: is no request log: its first line is {{"{_HEADER}": {RECORD_VERSION}}}'
            )
        if version != RECORD_VERSION:
            raise TraceError(
                f"{where}: version {version} of the format; this reads {RECORD_VERSION}"
            )
        _check_fields(told, (_HEADER,), (_HEADER,), where)
        self._begun = True

    def _model(self, told: dict[str, Any], line: int, where: str) -> None:
        _check_fields(told, _MODEL_FIELDS, ("model", "size_bytes"), where)
        name = _name(told, where)
        if type(told["size_bytes"]) is not int:
            raise TraceError(f"{where}: size_bytes must be a whole number")
        for field in ("load_s", "host_load_s"):
            if field in told:
                _seconds(told, field, where)
        if "places" in told:
            told["places"] = _places(told["places"], where)
        if len(self._models) >= MOST_MODELS and name not in self._models:
            raise TraceError(f"{where}: at most {MOST_MODELS} models may be")
        self._models[name] = (line, told)

    def _request(self, told: dict[str, Any], line: int, where: str) -> None:
        _check_fields(told, _REQUEST_FIELDS, ("t", "model", "run_s"), where)
        if len(self._requests) >= MOST_REQUESTS:
            raise TraceError(f"{where}: at most {MOST_REQUESTS} requests may be")
        load_s = _seconds(told, "load_s", where) if "load_s" in told else 0.0
        if "wait_s" in told:
            _seconds(told, "wait_s", where)
        self._requests.append(
            (
                _seconds(told, "t", where),
                line,
                _name(told, where),
                load_s,
                _seconds(told, "run_s", where),
            )
        )


def _no_constant(text: str) -> float:
    raise ValueError(text)


def _check_fields(
    told: dict[str, Any], allowed: tuple[str, ...], needed: tuple[str, ...], where: str
) -> None:
    if unknown := [field for field in told if field not in allowed]:
        raise TraceError(
            f"{where}: unknown field {unknown[0][:40]!r}; there may be {', '.join(allowed)}"
        )
    if missing := [field for field in needed if field not in told]:
        raise TraceError(f"{where}: field {missing[0]!r} is missing")


def _places(told: object, where: str) -> PlaceNames:
    if not isinstance(told, list) or not all(
        isinstance(place, list) and all(isinstance(name, str) for name in place) for place in told
    ):
        raise TraceError(
            f'{where}: places must be a list of lists of devices, such as [["cuda:0"], ["cuda:1"]]'
        )
    return read_places(told, where)


def _name(told: dict[str, Any], where: str) -> str:
    name = told["model"]
    if not isinstance(name, str):
        raise TraceError(f"{where}: model must be text")
    return name


def _seconds(told: dict[str, Any], field: str, where: str) -> float:
    value = told[field]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TraceError(f"{where}: {field} must be a number")
    # An integer may be too large for a float; 1e400 is read as infinity.
    seconds = float(value) if abs(value) < 1e300 else math.inf
    if not 0 <= seconds < math.inf:
        too = "too large" if value > 0 else "negative"
        raise TraceError(f"{where}: {field} is {value if -1e30 < value < 0 else too}")
    return seconds
