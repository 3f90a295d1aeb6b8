"""Traces as CSV: a line a request, with what its model is or beside a file of models."""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from modelyard_server.simulation.places import read_place_cell
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
from modelyard_server.simulation.trace_fields import (
    MEBIBYTE,
    SHORT_NAMES,
    bytes_of,
    told_names,
    twofold,
    written_names,
)

__all__ = ["read_csv"]

_REQUEST_COLUMNS: Final = ("time", "model", "execution_s")
_FACT_COLUMNS: Final = ("size_bytes", "size_mb", "load_s", "host_load_s", "places")
_MOST_DIGITS: Final = 30


@dataclass(frozen=True, slots=True)
class _Facts:
    size_bytes: int
    load_s: float
    host_load_s: float
    places: PlaceNames
    line: int
    file: str


def read_csv(path: Path, models_path: Path | None = None) -> Trace:
    """Read a trace whose first line is ``time,model,execution_s`` and perhaps more columns.

    What the models are is either in further columns ``size_bytes`` (or ``size_mb``, MiB),
    ``load_s`` and perhaps ``host_load_s`` and ``places``, at least on the first line of each model,
    or in a second file with the columns ``model`` and these. Columns may stand in any order, and
    have the short names of the shared traces. Without ``host_load_s`` a copy in host memory is no
    faster than the files. For ``places`` see ``read_place_cell``.

    Args:
        path: the trace.
        models_path: the file of models, if it is another one.

    Raises:
        TraceError: a file is not so; the text names the file and the line.
        OSError: a file cannot be read.
    """
    known: dict[str, _Facts] = {}
    if models_path is not None:
        sheet = _Sheet(models_path, ("model",), _FACT_COLUMNS)
        with closing(sheet.rows()) as rows:
            for line, row in rows:
                _learn(known, sheet, row, line, once=True)
    more = _FACT_COLUMNS if models_path is None else ()
    positions: dict[str, int] = {}
    lines, arrivals, which, runs = array("q"), array("d"), array("q"), array("d")
    sheet = _Sheet(path, _REQUEST_COLUMNS, more)
    titles = sheet.titles
    with closing(sheet.rows()) as rows:
        for line, row in rows:
            where = f"{path.name}:{line}"
            name = row["model"]
            if models_path is None:
                _learn(known, sheet, row, line, once=False)
            elif name not in known:
                raise TraceError(f"{where}: model {name[:40]!r} is not in {models_path.name}")
            lines.append(line)
            arrivals.append(_number(row["time"], titles["time"], where))
            which.append(positions.setdefault(name, len(positions)))
            runs.append(_number(row["execution_s"], titles["execution_s"], where))
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
        place_names=[each.places for each in facts],
    )


class _Sheet:
    """A CSV file, whose columns are told apart by what they mean.

    Args:
        path: of the file.
        needed: columns that must be there, by the names that say what they are.
        more: columns that may be there: those of ``_FACT_COLUMNS``, or none.
    """

    def __init__(self, path: Path, needed: Sequence[str], more: Sequence[str]) -> None:
        self.file = path.name
        self.titles: dict[str, str] = {}
        """Of each column that is there, as it stands there; known with the first of the rows."""
        self._path = path
        self._needed = needed
        self._more = more

    def rows(self) -> Generator[tuple[int, dict[str, str]]]:
        """Yield for each row the line that it begins on, and its cells by column.

        Lines without anything are passed over.

        Raises:
            TraceError: the columns are not right, or cannot be told apart; the text names the line.
            OSError: the file cannot be read.
        """
        begin = 1
        try:
            with closing(lines_of(self._path)) as lines:
                reader = csv.reader(lines, strict=True)
                header = [name.strip() for name in next(reader, [])]
                self._read_header(header)
                fields = {title: column for column, title in self.titles.items()}
                columns = [fields[title] for title in header]
                begin = reader.line_num + 1
                for cells in reader:
                    # With line ends between quotes a row is several lines.
                    line, begin = begin, reader.line_num + 1
                    if not cells:
                        continue
                    if len(cells) != len(columns):
                        raise TraceError(
                            f"{self.file}:{line}: {len(cells)} cells, and line 1 has "
                            f"{len(columns)} columns"
                        )
                    stripped = map(str.strip, cells)
                    yield line, dict(zip(columns, stripped, strict=True))
        except csv.Error as error:
            raise TraceError(f"{self.file}:{begin}: the quotes are not right: {error}") from None

    def _read_header(self, header: Sequence[str]) -> None:
        where = f"{self.file}:1"
        allowed = (*self._needed, *self._more)
        titles = written_names(header, allowed)
        if both := twofold(header):
            raise TraceError(
                f"{where}: columns {both!r} and {SHORT_NAMES[both]!r} mean the same: one may be"
            )
        if unknown := [name for name in header if name not in titles.values()]:
            raise TraceError(
                f"{where}: unknown column {unknown[0][:40]!r}; there may be {told_names(allowed)}"
            )
        if missing := [name for name in self._needed if name not in titles]:
            raise TraceError(f"{where}: column {missing[0]!r} is missing")
        if twice := [name for name in header if header.count(name) > 1]:
            raise TraceError(f"{where}: column {twice[0]!r} is there twice")
        self.titles.update(titles)
        if not self._more:
            return
        if ("size_bytes" in titles) == ("size_mb" in titles):
            raise TraceError(
                f"{where}: either size_bytes or size_mb must be there; with --models FILE another "
                "file says what the models are"
            )
        if "load_s" not in titles:
            raise TraceError(f"{where}: column 'load_s' is missing")


def _learn(
    known: dict[str, _Facts], sheet: _Sheet, row: dict[str, str], line: int, *, once: bool
) -> None:
    """Note what a line says of its model; it may say nothing if a line before it did."""
    name, where, titles = row["model"], f"{sheet.file}:{line}", sheet.titles
    before = known.get(name)
    if before is not None and once:
        raise TraceError(f"{where}: model {name[:40]!r} is also on line {before.line}")
    told = [row[column] for column in _FACT_COLUMNS if column in row]
    if before is not None and not any(told):
        return
    if "size_bytes" in row:
        size = _whole(row["size_bytes"], "size_bytes", where)
    else:
        size = bytes_of(_number(row["size_mb"], "size_mb", where), MEBIBYTE)
    load_s = _number(row["load_s"], titles["load_s"], where)
    host = row.get("host_load_s", "")
    host_load_s = _number(host, titles["host_load_s"], where) if host else load_s
    places = read_place_cell(row.get("places", ""), where)
    if before is not None and not row.get("places"):
        places = before.places  # Nothing is said here, and a line before it may have.
    facts = _Facts(size, load_s, host_load_s, places, line, sheet.file)
    if before is None:
        known[name] = facts
    elif replace(facts, line=before.line) != before:
        raise TraceError(
            f"{where}: model {name[:40]!r} is not what line {before.line} says it is: a model has "
            "one size and one load time, and the same places"
        )


def _number(text: str, column: str, where: str) -> float:
    value = _float(text)
    if not math.isfinite(value):
        raise TraceError(f"{where}: {column} is {text[:40]!r}: a number must be there")
    return value


def _float(text: str) -> float:
    """The number; not finite if it is none."""
    try:
        # float() takes "1_0", which here is more likely a mistake.
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan


def _whole(text: str, column: str, where: str) -> int:
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()):
        # Some programs write 1e9, or 5.0.
        value = _float(text)
        if not value.is_integer():
            raise TraceError(f"{where}: {column} is {text[:40]!r}: a whole number must be there")
        return int(value)
    if len(digits) > _MOST_DIGITS:
        raise TraceError(f"{where}: {column} is {text[:40]!r}: more than {_MOST_DIGITS} digits")
    return int(text)
