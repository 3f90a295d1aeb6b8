"""Traces as NumPy archives: the arrays of the shared traces."""

from __future__ import annotations

import lzma
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from modelyard_server.simulation.trace import (
    Floats,
    Table,
    Trace,
    TraceError,
    make_trace,
)
from modelyard_server.simulation.trace_fields import (
    MEBIBYTE,
    SHORT_NAMES,
    bytes_of,
    twofold,
    written_names,
)

__all__ = ["read_npz"]

_REQUEST_FIELDS: Final = ("time", "model", "execution_s")
_MODEL_FIELDS: Final = ("size_mb", "size_bytes", "load_s", "host_load_s")
_FIELDS: Final = (*_REQUEST_FIELDS, *_MODEL_FIELDS)
_NEEDED: Final = (*_REQUEST_FIELDS, "load_s")
_MOST_WHOLE: Final = 2.0**53
"""Above it floats leave out whole numbers."""
_MOST_UNPACKED: Final = 2 << 30
_MOST_REASON: Final = 160
# RuntimeError: encrypted; its subclass NotImplementedError: packed in an unusual way. The header of
# an array is a Python literal, which can be wrong in as many ways as a program.
_UNREADABLE: Final = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tokenize.TokenError,
    ArithmeticError,
    LookupError,
    SyntaxError,
    TypeError,
    ValueError,
    EOFError,
    RuntimeError,
    MemoryError,
)


def read_npz(path: Path) -> Trace:
    """Read a trace of the arrays ``t``, ``k``, ``e``, ``size_mb``, ``cost_disk``, ``cost_host``.

    ``t`` are arrivals and ``e`` execution times in seconds, ``k`` positions of models; for each
    model ``size_mb`` (MiB) and the seconds of a load from the disk and from host memory. They may
    have the names of columns instead, with ``size_bytes`` for ``size_mb``, and be of any type of
    numbers. Without ``cost_host`` a copy in host memory is no faster than the files.

    Raises:
        TraceError: the file is none, or not so.
        OSError: it cannot be read.
    """
    arrays, titles = _arrays(path)
    requests = ", ".join(titles[field] for field in _REQUEST_FIELDS)
    models = ", ".join(titles[field] for field in _MODEL_FIELDS if field in titles)

    def locate(table: Table, index: int) -> str:
        if table == "request":
            return f"{path.name}: request {index} of arrays {requests}"
        return f"{path.name}: model {index} of arrays {models}"

    def check(fine: NDArray[np.bool_], table: Table, field: str, what: str) -> None:
        if not fine.all():
            first = int(np.argmin(fine))
            raise TraceError(
                f"{locate(table, first)}: {titles[field]} is {arrays[field][first]:g}: "
                f"{what} must be there"
            )

    which = _floats(arrays["model"])
    # Written so that NaN is wrong, too.
    known = (np.abs(which) <= _MOST_WHOLE) & (which == np.floor(which))
    check(known, "request", "model", "the whole number of a model")
    field, unit = ("size_bytes", 1) if "size_bytes" in arrays else ("size_mb", MEBIBYTE)
    if arrays[field].dtype.kind == "f":
        told = _floats(arrays[field])
        check(np.isfinite(told), "model", field, "a number")
        if unit == 1:
            check(told == np.floor(told), "model", field, "a whole number")
        sizes = [bytes_of(size, unit) for size in told.tolist()]
    else:
        # They may be int32, in which a few GiB in bytes overflow; Python's integers do not.
        sizes = [int(size) * unit for size in arrays[field].tolist()]
    load_s = _floats(arrays["load_s"]).tolist()
    return make_trace(
        path.stem,
        names=[str(i) for i in range(len(sizes))],
        size_bytes=sizes,
        load_s=load_s,
        host_load_s=_floats(arrays["host_load_s"]).tolist() if "host_load_s" in arrays else load_s,
        arrival_s=_floats(arrays["time"]),
        model=which.astype(np.int64),
        run_s=_floats(arrays["execution_s"]),
        locate=locate,
    )


def _floats(array: NDArray[Any]) -> Floats:
    """What float64 cannot hold becomes infinite, and is refused as such."""
    with np.errstate(over="ignore"):
        return array.astype(np.float64)


def _arrays(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return the array of each field that is there, and what it is called there."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > _MOST_UNPACKED:
            raise TraceError(f"{path.name}: unpacks to {unpacked} bytes: at most {_MOST_UNPACKED}")
        # It warns of files of Python 2, which are read all the same.
        with warnings.catch_warnings(action="ignore"), np.load(path, allow_pickle=False) as archive:
            titles = _titles(path.name, archive.files)
            arrays = {field: np.asarray(archive[title]) for field, title in titles.items()}
    except _UNREADABLE as error:
        # Some texts have a second line, or all that the file has.
        reason = " ".join(str(error).split())[:_MOST_REASON] or type(error).__name__
        raise TraceError(f"{path.name}: is no NumPy archive that can be read: {reason}") from None
    for fields in (_REQUEST_FIELDS, _MODEL_FIELDS):
        first, *_ = present = [field for field in fields if field in arrays]
        for field in present:
            array, name = arrays[field], titles[field]
            if array.dtype.kind not in "iuf" or array.ndim != 1:
                raise TraceError(
                    f"{path.name}: {name} has {array.dtype}, shape {array.shape}: "
                    "one row of numbers may be"
                )
            if len(array) != len(arrays[first]):
                raise TraceError(
                    f"{path.name}: {name} has {len(array)} elements and {titles[first]} has "
                    f"{len(arrays[first])}: they belong together"
                )
    return arrays, titles


def _titles(file: str, found: list[str]) -> dict[str, str]:
    """Return what each field is called among the names of an archive's arrays."""
    titles = written_names(found, _FIELDS)
    short = [SHORT_NAMES.get(field, field) for field in _FIELDS if field != "size_bytes"]
    if both := twofold(found):
        raise TraceError(f"{file}: arrays {SHORT_NAMES[both]} and {both} mean the same: one may be")
    if "size_mb" in titles and "size_bytes" in titles:
        raise TraceError(f"{file}: arrays size_mb and size_bytes mean the same: one may be")
    missing = [SHORT_NAMES[field] for field in _NEEDED if field not in titles]
    if "size_mb" not in titles and "size_bytes" not in titles:
        missing.append("size_mb")
    unknown = sorted(set(found) - set(titles.values()))
    if missing or unknown:
        texts = []
        if missing:
            texts.append(f"arrays {', '.join(sorted(missing))} are missing")
        if unknown:
            named = (name[:40] if name.isprintable() else repr(name[:40]) for name in unknown)
            texts.append(f"arrays {', '.join(named)} are unknown")
        raise TraceError(
            f"{file}: {' and '.join(texts)}; there may be {', '.join(short)}, or their names in a "
            ".csv trace"
        )
    return titles
