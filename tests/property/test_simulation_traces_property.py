"""Readers of traces take what is right unchanged, and refuse whatever else comes with one error."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelyard_server.simulation.request_logs import RequestLogWriter
from modelyard_server.simulation.trace import TraceError
from modelyard_server.simulation.trace_files import read_trace

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(
    lambda name: name == name.strip()
)
SECONDS = st.floats(0.001, 1000.0)
REQUESTS = st.lists(st.tuples(SECONDS, st.integers(0, 3), SECONDS), min_size=1, max_size=20)
MODELS = st.lists(
    st.tuples(NAMES, st.integers(1, 2**40), SECONDS),
    min_size=4,
    max_size=4,
    unique_by=lambda model: model[0],
)
CELLS = st.sampled_from(
    [
        *("", "0", "1", "-1", "nan", "inf", "1e400", "1e308", "9" * 40, "a", '"', "\0", "é", "1_0"),
        *(" ", "cuda:0|cpu", "cuda:1+cuda:1", "+", "|", "cuda:0+disk", "devices/cuda-0"),
    ]
)
TOKENS = st.sampled_from(
    [
        *('{"t": 0, "model": "a", "run_s": 1}', '{"model": "a", "size_bytes": 1, "load_s": 1}'),
        *('{"modelyard_record": 1}', "{}", "[]", "null", "1" * 5000, '{"t": ', "\0", "NaN", "\n"),
        *('{"t": 1e999, "model": "a", "run_s": 1}', '{"model": [], "size_bytes": {}}'),
        *(
            '{"model": "a", "size_bytes": 1, "places": [["cpu"], []]}',
            '{"model": "a", "size_bytes": 1, "load_s": 1, "places": [["cpu"], ["cuda:0"]]}',
        ),
        '{"t": ' + "9" * 400 + ', "model": "a", "run_s": 1}',
    ]
)
here = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@here
@given(requests=REQUESTS, models=MODELS)
def test_what_is_written_is_read(
    tmp_path: Path,
    requests: list[tuple[float, int, float]],
    models: list[tuple[str, int, float]],
) -> None:
    requests.sort(key=lambda request: request[0])
    table, log = io.StringIO(newline=""), io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["time", "model", "execution_s", "size_bytes", "load_s"])
    writer = RequestLogWriter(log)
    for arrival_s, which, run_s in requests:
        name, size, load_s = models[which]
        rows.writerow([repr(arrival_s), name, repr(run_s), size, repr(load_s)])
        writer.request(arrival_s, name, wait_s=0.0, load_s=0.0, run_s=run_s)
        writer.model(name, size_bytes=size, load_s=load_s)
    (tmp_path / "t.csv").write_text(table.getvalue(), encoding="utf-8", newline="")
    (tmp_path / "t.jsonl").write_text(log.getvalue(), encoding="utf-8")
    arrivals = np.asarray([request[0] for request in requests])
    for name in ("t.csv", "t.jsonl"):
        trace = read_trace(tmp_path / name)
        assert trace.arrival_s.tolist() == (arrivals - arrivals[0]).tolist()
        assert trace.run_s.tolist() == [request[2] for request in requests]
        found = [trace.models[m] for m in trace.model.tolist()]
        assert [(m.name, m.size_bytes, m.load_s) for m in found] == [
            models[which] for _, which, _ in requests
        ]


@here
@given(rows=st.lists(st.lists(CELLS, min_size=4, max_size=6), max_size=6))
def test_any_csv_is_read_or_refused(tmp_path: Path, rows: list[list[str]]) -> None:
    for size in ("size_bytes", "size_mb", "places,size_mb"):
        text = "\n".join(map(",".join, rows))
        path = tmp_path / "t.csv"
        path.write_text(f"time,model,execution_s,{size},load_s\n{text}", encoding="utf-8")
        try:
            read_trace(path)
        except TraceError as error:
            assert str(error).startswith("t")


@here
@given(lines=st.lists(TOKENS, max_size=6), begin=st.booleans())
def test_any_request_log_is_read_or_refused(tmp_path: Path, lines: list[str], begin: bool) -> None:
    path = tmp_path / "t.jsonl"
    header = ['{"modelyard_record": 1}'] if begin else []
    path.write_text("\n".join([*header, *lines]), encoding="utf-8")
    try:
        read_trace(path)
    except TraceError as error:
        assert str(error).startswith("t")


@here
@given(content=st.binary(max_size=300), suffix=st.sampled_from([".csv", ".npz", ".jsonl"]))
def test_any_bytes_are_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    path.write_bytes(content)
    with pytest.raises(TraceError):
        read_trace(path)


@here
@given(at=st.integers(0, 2000), value=st.integers(0, 255))
def test_a_damaged_archive_is_read_or_refused(tmp_path: Path, at: int, value: int) -> None:
    path = tmp_path / "t.npz"
    ones = np.ones(2)
    np.savez(
        path,
        t=ones,
        k=np.zeros(2, np.int32),
        e=ones,
        size_mb=np.ones(2, np.int32),
        cost_disk=ones,
        cost_host=ones,
    )
    content = bytearray(path.read_bytes())
    content[at % len(content)] = value
    path.write_bytes(bytes(content))
    try:
        read_trace(path)
    except TraceError as error:
        assert str(error).startswith("t")
