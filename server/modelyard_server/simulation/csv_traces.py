"""Traces as CSV: a line a request, with what its model is or beside a file of models."""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from modelyard_server.simulation.text_lines import lines_of
from modelyard_server.simulation.trace import (
    MOST_MODELS,
    MOST_REQUESTS,
    Table,
    Trace,
    TraceError,
    make_trace,
)

__all__ = ["read_csv"]

_REQUEST_COLUMNS: Final = ("time", "model", "execution_s")
_FACT_COLUMNS: Final = ("size_bytes", "size_mb", "load_s", "host_load_s")
_MEBIBYTE: Final = 1 << 20
_MOST_DIGITS: Final = 30


@dataclass(frozen=True, slots=True)
class _Facts:
    size_bytes: int
    load_s: float
    host_load_s: float
    line: int
    file: str


def read_csv(path: Path, models_path: Path | None = None) -> Trace:
    """Read a trace whose first line is ``time,model,execution_s`` and perhaps more columns.

    What the models are is either in further columns ``size_bytes`` (or ``size_mb``, MiB),
    ``load_s`` and perhaps ``host_load_s``, at least on the first line of each model, or in a second
    file with the columns ``model`` and these. Columns may stand in any order. Without
    ``host_load_s`` a copy in host memory is no faster than the files.

    Args:
        path: the trace.
        models_path: the file of models, if it is another one.

    Raises:
        TraceError: a file is not so; the text names the file and the line.
        OSError: a file cannot be read.
    """
    known: dict[str, _Facts] = {}
    if models_path is not None:
        for line, row in _rows(models_path, ("model",), _FACT_COLUMNS):
            _learn(known, row, line, models_path.name, once=True)
    more = _FACT_COLUMNS if models_path is None else ()
    positions: dict[str, int] = {}
    lines, arrivals, which, runs = array("q"), array("d"), array("q"), array("d")
    for line, row in _rows(path, _REQUEST_COLUMNS, more):
        where = f"{path.name}:{line}"
        name = row["model"]
        if models_path is None:
            _learn(known, row, line, path.name, once=False)
        elif name not in known:
            raise TraceError(f"{where}: model {name[:40]!r} is not in {models_path.name}")
        lines.append(line)
        arrivals.append(_number(row["time"], "time", where))
        which.append(positions.setdefault(name, len(positions)))
        runs.append(_number(row["execution_s"], "execution_s", where))
        if len(lines) > MOST_REQUESTS or len(positions) > MOST_MODELS:
            raise TraceError(
                f"{where}: too long: at most {MOST_REQUESTS} requests of {MOST_MODELS} models"
            )
    facts = [known[name] for name in positions]

    def locate(table: Table, index: int) -> str:
        if table == "request":
            return f"{path.name}:{lines[index]}"
        return f"{facts[index].file}:{facts[index].line}"

    return make_trace(
        path.stem,
        names=list(positions),
        size_bytes=[each.size_bytes for each in facts],
        load_s=[each.load_s for each in facts],
        host_load_s=[each.host_load_s for each in facts],
        arrival_s=np.asarray(arrivals, dtype=np.float64),
        model=np.asarray(which, dtype=np.int64),
        run_s=np.asarray(runs, dtype=np.float64),
        locate=locate,
    )


def _rows(
    path: Path, needed: Sequence[str], more: Sequence[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield each line's number and cells by column; lines without anything are passed over."""
    line = 1
    try:
        reader = csv.reader(lines_of(path), strict=True)
        header = [name.strip() for name in next(reader, [])]
        _check_header(header, needed, more, path.name)
        for cells in reader:
            line = reader.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                raise TraceError(
                    f"{path.name}:{line}: {len(cells)} cells, and line 1 has {len(header)} columns"
                )
            stripped = map(str.strip, cells)
            yield line, dict(zip(header, stripped, strict=True))
    except csv.Error as error:
        raise TraceError(f"{path.name}: behind line {line}: {error}") from None


def _check_header(
    header: Sequence[str], needed: Sequence[str], more: Sequence[str], file: str
) -> None:
    where = f"{file}:1"
    allowed = (*needed, *more)
    if unknown := [name for name in header if name not in allowed]:
        raise TraceError(
            f"{where}: unknown column {unknown[0][:40]!r}; there may be {', '.join(allowed)}"
        )
    if missing := [name for name in needed if name not in header]:
        raise TraceError(f"{where}: column {missing[0]!r} is missing")
    if twice := [name for name in header if header.count(name) > 1]:
        raise TraceError(f"{where}: column {twice[0]!r} is there twice")
    if not more:
        return
    if ("size_bytes" in header) == ("size_mb" in header):
        raise TraceError(
            f"{where}: either size_bytes or size_mb must be there; with --models FILE another file "
            "says what the models are"
        )
    if "load_s" not in header:
        raise TraceError(f"{where}: column 'load_s' is missing")


def _learn(
    known: dict[str, _Facts], row: dict[str, str], line: int, file: str, *, once: bool
) -> None:
    """Note what a line says of its model; it may say nothing if a line before it did."""
    name, where = row["model"], f"{file}:{line}"
    before = known.get(name)
    if before is not None and once:
        raise TraceError(f"{where}: model {name[:40]!r} is also on line {before.line}")
    told = [row[column] for column in _FACT_COLUMNS if column in row]
    if before is not None and not any(told):
        return
    if "size_bytes" in row:
        size = _whole(row["size_bytes"], "size_bytes", where)
    else:
        size = _mebibytes(row["size_mb"], where)
    load_s = _number(row["load_s"], "load_s", where)
    host = row.get("host_load_s", "")
    host_load_s = _number(host, "host_load_s", where) if host else load_s
    facts = _Facts(size, load_s, host_load_s, line, file)
    if before is None:
        known[name] = facts
    elif (before.size_bytes, before.load_s, before.host_load_s) != (size, load_s, host_load_s):
        raise TraceError(
            f"{where}: model {name[:40]!r} is not what line {before.line} says it is: a model has "
            "one size and one load time"
        )


def _number(text: str, column: str, where: str) -> float:
    try:
        # float() takes "1_0", which here is more likely a mistake.
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise TraceError(f"{where}: {column} is {text[:40]!r}: a number must be there")
    return value


def _whole(text: str, column: str, where: str) -> int:
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()):
        raise TraceError(f"{where}: {column} is {text[:40]!r}: a whole number must be there")
    if len(digits) > _MOST_DIGITS:
        raise TraceError(f"{where}: {column} is {text[:40]!r}: more than {_MOST_DIGITS} digits")
    return int(text)


def _mebibytes(text: str, where: str) -> int:
    # As integers: a float may be too large to be multiplied, and is refused with its own number.
    whole, rest = divmod(_number(text, "size_mb", where), 1.0)
    return int(whole) * _MEBIBYTE + int(rest * _MEBIBYTE)
