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

from modelyard_server.simulation.trace import Floats, Table, Trace, TraceError, make_trace

__all__ = ["read_npz"]

_REQUEST_ARRAYS: Final = ("t", "k", "e")
_MODEL_ARRAYS: Final = ("size_mb", "cost_disk", "cost_host")
_ARRAYS: Final = (*_REQUEST_ARRAYS, *_MODEL_ARRAYS)
_MEBIBYTE: Final = 1 << 20
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
    model ``size_mb`` (MiB) and the seconds of a load from the disk and from host memory.

    Raises:
        TraceError: the file is none, or not so.
        OSError: it cannot be read.
    """
    arrays = _arrays(path)
    for name in ("k", "size_mb"):
        if arrays[name].dtype.kind not in "iu":
            raise TraceError(f"{path.name}: {name} has {arrays[name].dtype}, not integers")

    def locate(table: Table, index: int) -> str:
        if table == "request":
            return f"{path.name}: request {index} of arrays t, k, e"
        return f"{path.name}: model {index} of arrays size_mb, cost_disk, cost_host"

    # size_mb may be int32, in which a few GiB in bytes overflow; Python's integers do not.
    sizes = [int(size) * _MEBIBYTE for size in arrays["size_mb"].tolist()]
    return make_trace(
        path.stem,
        names=[str(i) for i in range(len(sizes))],
        size_bytes=sizes,
        load_s=_floats(arrays["cost_disk"]).tolist(),
        host_load_s=_floats(arrays["cost_host"]).tolist(),
        arrival_s=_floats(arrays["t"]),
        model=arrays["k"].astype(np.int64),
        run_s=_floats(arrays["e"]),
        locate=locate,
    )


def _floats(array: NDArray[Any]) -> Floats:
    """What float64 cannot hold becomes infinite, and is refused as such."""
    with np.errstate(over="ignore"):
        return array.astype(np.float64)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > _MOST_UNPACKED:
            raise TraceError(f"{path.name}: unpacks to {unpacked} bytes: at most {_MOST_UNPACKED}")
        # It warns of files of Python 2, which are read all the same.
        with warnings.catch_warnings(action="ignore"), np.load(path, allow_pickle=False) as archive:
            _check_names(path.name, archive.files)
            arrays = {name: np.asarray(archive[name]) for name in _ARRAYS}
    except _UNREADABLE as error:
        # Some texts have a second line, or all that the file has.
        reason = " ".join(str(error).split())[:_MOST_REASON] or type(error).__name__
        raise TraceError(f"{path.name}: is no NumPy archive that can be read: {reason}") from None
    for names in (_REQUEST_ARRAYS, _MODEL_ARRAYS):
        for name in names:
            array = arrays[name]
            if array.dtype.kind not in "iuf" or array.ndim != 1:
                raise TraceError(
                    f"{path.name}: {name} has {array.dtype}, shape {array.shape}: "
                    "one row of numbers may be"
                )
            if len(array) != len(arrays[names[0]]):
                raise TraceError(
                    f"{path.name}: {name} has {len(array)} elements and {names[0]} has "
                    f"{len(arrays[names[0]])}: they belong together"
                )
    return arrays


def _check_names(file: str, found: list[str]) -> None:
    missing = sorted(set(_ARRAYS) - set(found))
    unknown = sorted(set(found) - set(_ARRAYS))
    if missing or unknown:
        texts = []
        if missing:
            texts.append(f"arrays {', '.join(missing)} are missing")
        if unknown:
            texts.append(f"arrays {', '.join(name[:40] for name in unknown)} are unknown")
        raise TraceError(f"{file}: {' and '.join(texts)}; there may be {', '.join(_ARRAYS)}")
