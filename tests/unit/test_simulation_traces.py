"""Reading traces: what is read, and that errors name the line."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.traces import small_trace

from modelyard_server import _core
from modelyard_server.simulation.request_logs import RequestLogWriter
from modelyard_server.simulation.trace import TraceError
from modelyard_server.simulation.trace_files import read_trace

HEADER = "time,model,execution_s,size_bytes,load_s\n"
LOG_HEADER = '{"modelyard_record": 1}\n'
LOG_MODEL = '{"model": "a", "size_bytes": 5, "load_s": 1.5}\n'


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def npz(folder: Path, **changed: Any) -> Path:
    arrays: dict[str, Any] = {
        "t": np.array([0.0, 1.5]),
        "k": np.array([1, 0], dtype=np.int32),
        "e": np.array([0.25, 0.5], dtype=np.float32),
        "size_mb": np.array([32_000, 1], dtype=np.int32),
        "cost_disk": np.array([2.0, 1.0], dtype=np.float32),
        "cost_host": np.array([0.5, 0.25], dtype=np.float32),
    }
    arrays.update(changed)
    path = folder / "t.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_a_csv_trace_has_its_models_facts_on_their_first_lines(tmp_path: Path) -> None:
    text = (
        "model,time,execution_s,size_mb,load_s,host_load_s\n"
        "b,10,0.5,1.5,2,0.25\na,10,0,2,3,\n\nb,12.5,1,,,\n"
    )
    trace = read_trace(write(tmp_path, "day.csv", text))
    assert trace.name == "day"
    assert [(m.name, m.size_bytes, m.load_s, m.host_load_s) for m in trace.models] == [
        ("b", 3 << 19, 2.0, 0.25),
        ("a", 2 << 20, 3.0, 3.0),
    ]
    assert trace.model.tolist() == [0, 1, 0]
    assert trace.arrival_s.tolist() == [0.0, 0.0, 2.5]
    assert trace.run_s.tolist() == [0.5, 0.0, 1.0]
    assert trace.footprint_bytes() == 7 << 19
    assert trace.compulsory_s() == 5.0


def test_a_csv_trace_can_have_its_models_in_a_file_of_their_own(tmp_path: Path) -> None:
    trace = write(tmp_path, "t.csv", "time,model,execution_s\n0,a,1\n1,b,1\n")
    models = write(tmp_path, "m.csv", "model,size_bytes,load_s\nb,7,2\na,5,1\nc,9,9\n")
    read = read_trace(trace, models)
    assert [(m.name, m.size_bytes, m.origin) for m in read.models] == [
        ("a", 5, "m.csv:3"),
        ("b", 7, "m.csv:2"),
    ]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "t.csv:1: column 'time' is missing"),
        ("time,model\n", "t.csv:1: column 'execution_s' is missing"),
        ("time,model,execution_s,colour\n", "t.csv:1: unknown column 'colour'; there may be time,"),
        ("time,time,model,execution_s,size_mb,load_s\n", "t.csv:1: column 'time' is there twice"),
        ("time,model,execution_s\n0,a,1\n", "t.csv:1: either size_bytes or size_mb must be there"),
        ("time,model,execution_s,size_mb\n0,a,1,1\n", "t.csv:1: column 'load_s' is missing"),
        (HEADER, "t: there are no requests"),
        (HEADER + "0,a,1,5\n", "t.csv:2: 4 cells, and line 1 has 5 columns"),
        (HEADER + "0,a,1,5,1\n-1,a,1,,\n", "t.csv:3: the time is -1: 0 to"),
        (HEADER + "2,a,1,5,1\n\n1,a,1,,\n", "t.csv:4: the time 1 is before that of the request"),
        (HEADER + "nan,a,1,5,1\n", "t.csv:2: time is 'nan': a number must be there"),
        (HEADER + "1e300,a,1,5,1\n", "t.csv:2: the time is 1e+300"),
        (HEADER + "0,a,-1,5,1\n", "t.csv:2: the execution time is -1"),
        (HEADER + "0,a,1_0,5,1\n", "t.csv:2: execution_s is '1_0'"),
        (HEADER + "0,a,1,0,1\n", "t.csv:2: the size of model 'a' is 0 bytes: 1 to"),
        (HEADER + "0,a,1,-5,1\n", "t.csv:2: the size of model 'a' is -5 bytes"),
        (HEADER + f"0,a,1,{10**20},1\n", f"t.csv:2: the size of model 'a' is {10**20} bytes"),
        (HEADER + "0,a,1,5.5,1\n", "t.csv:2: size_bytes is '5.5': a whole number"),
        (HEADER + f"0,a,1,{'9' * 31},1\n", f"t.csv:2: size_bytes is '{'9' * 31}': more than 30"),
        (HEADER.replace("bytes", "mb") + "0,a,1,1e308,1\n", "t.csv:2: the size of model 'a' is 1"),
        (HEADER.replace("bytes", "mb") + "0,a,1,-1e308,1\n", "t.csv:2: the size of model 'a' is -"),
        (HEADER + "0,a,1,,\n", "t.csv:2: size_bytes is '': a whole number"),
        (HEADER + "0,a,1,5,0\n", "t.csv:2: load_s of model 'a' is 0: above 0"),
        (HEADER + "0,,1,5,1\n", "t.csv:2: a model's name has 1 to 256 characters"),
        (HEADER + "0,a,1,5,1\n1,a,1,6,1\n", "t.csv:3: model 'a' is not what line 2 says it is"),
        (HEADER + '0,"a,1,5,1\n', "t.csv: behind line 1: unexpected end of data"),
    ],
)
def test_a_wrong_csv_trace_is_refused_by_line(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(TraceError) as refused:
        read_trace(write(tmp_path, "t.csv", text))
    assert str(refused.value).startswith(error)


def test_a_wrong_file_of_models_is_refused_by_line(tmp_path: Path) -> None:
    trace = write(tmp_path, "t.csv", "time,model,execution_s\n0,a,1\n")
    twice = write(tmp_path, "twice.csv", "model,size_bytes,load_s\na,5,1\na,5,1\n")
    with pytest.raises(TraceError, match=r"^twice\.csv:3: model 'a' is also on line 2"):
        read_trace(trace, twice)
    other = write(tmp_path, "other.csv", "model,size_bytes,load_s\nb,5,1\n")
    with pytest.raises(TraceError, match=r"^t\.csv:2: model 'a' is not in other\.csv"):
        read_trace(trace, other)
    with pytest.raises(TraceError, match=r"^none\.csv: No such file"):
        read_trace(trace, tmp_path / "none.csv")


def test_sizes_of_an_archive_do_not_overflow(tmp_path: Path) -> None:
    trace = read_trace(npz(tmp_path))
    assert [m.size_bytes for m in trace.models] == [32_000 << 20, 1 << 20]
    assert trace.model.tolist() == [1, 0]
    assert trace.models[0].host_load_s == 0.5


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"e": None}, "t.npz: arrays e are missing; there may be t, k, e"),
        ({"x": np.zeros(1)}, "t.npz: arrays x are unknown"),
        ({"t": np.array([0.0])}, "t.npz: k has 2 elements and t has 1"),
        ({"t": np.array([-1.0, 0.0])}, "t.npz: request 0 of arrays t, k, e: the time is -1"),
        ({"t": np.array([0.0, np.nan])}, "t.npz: request 1 of arrays t, k, e: the time is nan"),
        ({"k": np.array([0, 2])}, "t.npz: request 1 of arrays t, k, e: model 2 is none"),
        ({"k": np.array([0.0, 1.0])}, "t.npz: k has float64, not integers"),
        ({"k": np.array([[0, 1]])}, "t.npz: k has int64, shape (1, 2)"),
        ({"size_mb": np.array([0, 1])}, "t.npz: model 0 of arrays size_mb, cost_disk, cost_host"),
        ({"size_mb": np.array([2**31, 1])}, "t.npz: model 0 of arrays size_mb"),
        ({"t": np.array(["a", "b"])}, "t.npz: t has <U1"),
    ],
)
def test_a_wrong_archive_is_refused_by_element(
    tmp_path: Path, changed: dict[str, Any], error: str
) -> None:
    with pytest.raises(TraceError) as refused:
        read_trace(npz(tmp_path, **changed))
    assert str(refused.value).startswith(error)


def test_an_archive_that_is_none_or_holds_objects_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="is no NumPy archive"):
        read_trace(write(tmp_path, "t.npz", "no archive"))
    with pytest.raises(TraceError, match="is no NumPy archive"):
        read_trace(npz(tmp_path, k=np.array([{}, {}], dtype=object)))


HEAD = "{'descr': '<f8', 'fortran_order': False, 'shape': (2,), }"


@pytest.mark.parametrize(
    "head",
    [
        HEAD[:-5],
        "'''",
        "{[]: 1}",
        HEAD.replace("2,", f"{10**30},"),
        HEAD.replace("2,", "True,"),
        HEAD.replace("'<f8'", "('<f8',)"),
        HEAD.replace("<f8", "<f8,("),
        "[" * 3000,
        "-" * 9000,
    ],
)
def test_an_archive_whose_array_has_a_broken_head_is_refused(tmp_path: Path, head: str) -> None:
    text = head.encode() + b"\n"
    array = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(16)
    path = with_member(npz(tmp_path), "t.npy", array)
    with pytest.raises(TraceError) as refused:
        read_trace(path)
    error = str(refused.value)
    assert error.startswith("t.npz: is no NumPy archive that can be read: ")
    assert len(error) < 250 and "\n" not in error


@pytest.mark.parametrize(
    "packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_an_archive_that_was_damaged_anywhere_is_read_or_refused(
    tmp_path: Path, packed: int
) -> None:
    whole = with_member(npz(tmp_path), "", b"", packed).read_bytes()
    damaged = tmp_path / "d.npz"
    refused = 0
    for at in range(0, len(whole), 7):
        damaged.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            read_trace(damaged)
        except TraceError as error:
            refused += 1
            assert str(error).startswith("d.npz: ") and len(str(error)) < 300
    assert refused > 20


def with_member(archive: Path, name: str, content: bytes, packed: int = zipfile.ZIP_STORED) -> Path:
    """The archive, packed again, and with other content of one member."""
    with zipfile.ZipFile(archive) as file:
        members = {each: file.read(each) for each in file.namelist()}
    if name:
        members[name] = content
    with zipfile.ZipFile(archive, "w", packed) as file:
        for each, its in members.items():
            file.writestr(each, its)
    return archive


def test_what_float64_cannot_hold_is_refused_without_a_warning(tmp_path: Path) -> None:
    huge = np.array(["0", "1e4000"], dtype=np.longdouble)
    with pytest.raises(TraceError, match="request 1 of arrays t, k, e: the execution time is inf"):
        read_trace(npz(tmp_path, e=huge))


@pytest.mark.parametrize(
    ("name", "head", "row"),
    [
        ("t.csv", HEADER, "0,a,1,5,1\n"),
        ("t.jsonl", LOG_HEADER + LOG_MODEL, '{"t": 0, "model": "a", "run_s": 1}\n'),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_what_is_not_utf8_is_refused_by_its_line(
    tmp_path: Path, name: str, head: str, row: str, end: str
) -> None:
    path = tmp_path / name
    fine = (head + row * 400).replace("\n", end).encode()
    path.write_bytes(fine + row.replace("a", "\xff").encode("latin-1"))
    line = head.count("\n") + 401
    with pytest.raises(TraceError, match=f"^{name}:{line}: is not UTF-8: "):
        read_trace(path)
    path.write_bytes(b"\xef\xbb\xbf" + fine)
    assert len(read_trace(path)) == 400


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_no_more_of_a_line_is_read_than_one_may_have(tmp_path: Path, name: str) -> None:
    text = (HEADER if name == "t.csv" else LOG_HEADER) + "," * 70_000
    with pytest.raises(TraceError, match=f"^{name}:2: longer than 65536 characters$"):
        read_trace(write(tmp_path, name, text))


def test_what_is_wrong_with_a_folder_is_told_of_it() -> None:
    with pytest.raises(TraceError, match=r"^\.: the name must end in"):
        read_trace(Path())


def test_what_a_log_writer_writes_is_read_in_order_of_arrival(tmp_path: Path) -> None:
    file = io.StringIO()
    writer = RequestLogWriter(file)
    writer.request(101.0, "b", wait_s=2.0, load_s=1.5, run_s=0.25)
    writer.model("a", size_bytes=5, load_s=1.0, host_load_s=0.5)
    writer.model("b", size_bytes=6)
    writer.request(100.0, "a", wait_s=0.0, load_s=0.0, run_s=0.5)
    writer.request(101.0, "b", wait_s=3.0, load_s=2.5, run_s=0.75)
    writer.model("a", size_bytes=7, load_s=3.0)
    trace = read_trace(write(tmp_path, "log.jsonl", file.getvalue()))
    assert trace.arrival_s.tolist() == [0.0, 1.0, 1.0]
    assert trace.run_s.tolist() == [0.5, 0.25, 0.75]
    # The last line about a model counts; what nobody said is the mean of what was measured.
    assert [(m.name, m.size_bytes, m.load_s, m.host_load_s) for m in trace.models] == [
        ("a", 7, 3.0, 3.0),
        ("b", 6, 2.0, 2.0),
    ]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "l.jsonl:1: a line with 'modelyard_record' must be first"),
        ("{}\n", "l.jsonl:1: is no request log"),
        ('{"modelyard_record": 2}\n', "l.jsonl:1: version 2 of the format; this reads 1"),
        (LOG_HEADER + "{\n", "l.jsonl:2: is no JSON"),
        (LOG_HEADER + "[1]\n", "l.jsonl:2: is no JSON object"),
        (LOG_HEADER + "[" * 60_000 + "\n", "l.jsonl:2: is no JSON"),
        (LOG_HEADER + " " * 70_000, "l.jsonl:2: longer than"),
        (LOG_HEADER + '{"model": "a"}\n', "l.jsonl:2: field 'size_bytes' is missing"),
        (LOG_HEADER + '{"model": 1, "size_bytes": 5}\n', "l.jsonl:2: model must be text"),
        (LOG_HEADER + '{"model": "a", "size_bytes": 5.0}\n', "l.jsonl:2: size_bytes must be"),
        (LOG_HEADER + '{"t": 0, "model": "a", "run_s": 1}\n', "l.jsonl:2: no line says what"),
        (LOG_HEADER + LOG_MODEL + '{"t": 0, "model": "a", "run_s": 1, "x": 1}\n', "l.jsonl:3: unk"),
        (LOG_HEADER + LOG_MODEL + '{"t": -1, "model": "a", "run_s": 1}\n', "l.jsonl:3: t is -1"),
        (
            LOG_HEADER + LOG_MODEL + f'{{"t": -{10**4000}, "model": "a", "run_s": 1}}\n',
            "l.jsonl:3: t is negative",
        ),
        (
            LOG_HEADER
            + LOG_MODEL.replace("5", str(10**4000), 1)
            + '{"t": 0, "model": "a", "run_s": 1}\n',
            "l.jsonl:2: the size of model 'a' is far too many bytes: ",
        ),
        (
            LOG_HEADER
            + LOG_MODEL.replace('"a"', '"\\ud800"')
            + '{"t": 0, "model": "\\ud800", "run_s": 1}\n',
            "l.jsonl:2: the model's name '\\ud800' has half a character",
        ),
        (
            LOG_HEADER + f'{{"t": 0, "model": "{"a" * 9000}", "run_s": 1}}\n',
            f"l.jsonl:2: no line says what model '{'a' * 40}' is",
        ),
        (LOG_HEADER + LOG_MODEL + '{"t": NaN, "model": "a", "run_s": 1}\n', "l.jsonl:3: is no JS"),
        (LOG_HEADER + LOG_MODEL + '{"t": 1e400, "model": "a", "run_s": 1}\n', "l.jsonl:3: t is to"),
        (LOG_HEADER + LOG_MODEL + '{"t": true, "model": "a", "run_s": 1}\n', "l.jsonl:3: t must"),
        (
            LOG_HEADER + '{"model": "a", "size_bytes": 0, "load_s": 1}\n'
            '{"t": 0, "model": "a", "run_s": 1}\n',
            "l.jsonl:2: the size of model 'a' is 0 bytes",
        ),
        (
            LOG_HEADER + '{"model": "a", "size_bytes": 5}\n{"t": 0, "model": "a", "run_s": 1}\n',
            "l.jsonl:2: nothing says how long model 'a' takes to load",
        ),
    ],
)
def test_a_wrong_request_log_is_refused_by_line(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(TraceError) as refused:
        read_trace(write(tmp_path, "l.jsonl", text))
    assert str(refused.value).startswith(error)


def test_a_file_of_another_kind_or_none_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"^t\.txt: the name must end in \.csv, \.npz"):
        read_trace(write(tmp_path, "t.txt", ""))
    with pytest.raises(TraceError, match=r"^t\.csv: No such file"):
        read_trace(tmp_path / "t.csv")
    with pytest.raises(TraceError, match=r"goes with a \.csv trace only"):
        read_trace(npz(tmp_path), tmp_path / "m.csv")


def test_a_model_larger_than_every_budget_is_named_with_its_line(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, "t.csv", HEADER + "0,a,1,5,1\n1,b,1,9,1\n"))
    trace.check_fits((5, 9))
    with pytest.raises(TraceError, match=r"^t\.csv:3: model 'b' of 9B is larger than the largest"):
        trace.check_fits((5, 8))


def test_what_the_core_cannot_count_is_refused() -> None:
    with pytest.raises(TraceError, match="larger than 70368744177663 bytes"):
        small_trace([0, 1], sizes=[_core.MAX_BYTES, 1])
    with pytest.raises(TraceError, match="seconds of its own time"):
        small_trace([0, 0], sizes=[1], arrivals=[0.0, 1e10])


def test_the_first_requests_of_a_trace_know_only_their_models() -> None:
    trace = small_trace([0, 1, 2], sizes=[1, 2, 4])
    assert trace.first(2).used() == [0, 1]
    assert trace.first(2).footprint_bytes() == 3
    assert trace.first(9) is trace
