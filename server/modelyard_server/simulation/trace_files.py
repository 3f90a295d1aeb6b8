"""Which reader a trace's file name calls for."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from modelyard_server.simulation.csv_traces import read_csv
from modelyard_server.simulation.npz_traces import read_npz
from modelyard_server.simulation.request_logs import read_request_log
from modelyard_server.simulation.trace import Trace, TraceError

__all__ = ["read_trace"]

_FORMS: Final = ".csv, .npz, or .jsonl for what `modelyard record` wrote"


def read_trace(path: Path, models_path: Path | None = None) -> Trace:
    """Read a trace from a file.

    Args:
        path: ``.csv``, ``.npz`` or ``.jsonl``.
        models_path: what the models of a CSV trace are, if that is in a file of its own.

    Raises:
        TraceError: it cannot be read, or is wrong; the text names the file, and the line where
            there are lines.
    """
    suffix = path.suffix.lower()
    called = path.name or str(path)
    if models_path is not None and suffix != ".csv":
        raise TraceError(f"{called}: a file of models goes with a .csv trace only")
    try:
        match suffix:
            case ".csv":
                return read_csv(path, models_path)
            case ".npz":
                return read_npz(path)
            case ".jsonl":
                return read_request_log(path)
            case _:
                raise TraceError(f"{called}: the name must end in {_FORMS}")
    except OSError as error:
        named = Path(error.filename) if error.filename else path
        name = named.name or str(named)
        raise TraceError(f"{name}: {error.strerror or 'cannot be read'}") from None
