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
from modelyard_server.simulation.baselines import BASELINES, replay_baseline
from modelyard_server.simulation.bounds import lower_bound
from modelyard_server.simulation.machine import Machine
from modelyard_server.simulation.offline import best_offline_s
from modelyard_server.simulation.request_logs import RequestLogWriter
from modelyard_server.simulation.serial_replay import replay_serially
from modelyard_server.simulation.timed_replay import replay_timed
from modelyard_server.simulation.trace import Trace, TraceError
from modelyard_server.simulation.trace_files import read_trace

HEADER = "time,model,execution_s,size_bytes,load_s\n"
SHORT_HEADER = "t,k,e,size_mb,cost_disk,cost_host\n"
LOG_HEADER = '{"modelyard_record": 1}\n'
LOG_MODEL = '{"model": "a", "size_bytes": 5, "load_s": 1.5}\n'


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def told(trace: Trace) -> tuple[list[object], list[tuple[object, ...]]]:
    """What two traces have to have in common to be the same."""
    requests: list[object] = [each.tolist() for each in (trace.arrival_s, trace.model, trace.run_s)]
    return requests, [(m.name, m.size_bytes, m.load_s, m.host_load_s) for m in trace.models]


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


def test_a_csv_trace_can_have_the_names_of_the_shared_traces(tmp_path: Path) -> None:
    long = "time,model,execution_s,size_mb,load_s,host_load_s\n"
    for rows in ("0,7,0.5,1.5,2,0.25\n1,b,1,2,3,\n2,7,0.5,,,\n", "0,b,1,4,1,1\n"):
        assert told(read_trace(write(tmp_path, "t.csv", SHORT_HEADER + rows))) == told(
            read_trace(write(tmp_path, "t.csv", long + rows))
        )
    mixed = read_trace(write(tmp_path, "t.csv", "cost_disk,time,k,e,size_bytes\n2,0,a,1,5\n"))
    assert [(m.name, m.size_bytes, m.load_s) for m in mixed.models] == [("a", 5, 2.0)]
    models = write(tmp_path, "m.csv", "k,size_bytes,cost_disk\na,5,1\n")
    apart = read_trace(write(tmp_path, "t.csv", "t,k,e\n0,a,1\n"), models)
    assert [(m.name, m.size_bytes, m.origin) for m in apart.models] == [("a", 5, "m.csv:2")]


@pytest.mark.parametrize(("text", "size"), [("1e9", 10**9), ("5.0", 5), ("1.5e3", 1500)])
def test_a_size_in_bytes_may_be_written_as_a_float(tmp_path: Path, text: str, size: int) -> None:
    trace = read_trace(write(tmp_path, "t.csv", HEADER + f"0,a,1,{text},1\n"))
    assert trace.models[0].size_bytes == size


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
        (HEADER + "0,a,1,5e-1,1\n", "t.csv:2: size_bytes is '5e-1': a whole number"),
        (HEADER + "0,a,1,inf,1\n", "t.csv:2: size_bytes is 'inf': a whole number"),
        (HEADER + "0,a,1,1_0,1\n", "t.csv:2: size_bytes is '1_0': a whole number"),
        (HEADER + "0,a,1,1e300,1\n", "t.csv:2: the size of model 'a' is 1"),
        (HEADER + '0,"a,1,5,1\n', "t.csv:2: the quotes are not right: unexpected end of data"),
        (HEADER + '0,a,1,5,1\n\n1,"a"b,1,,\n', "t.csv:4: the quotes are not right: ',' expected"),
        (HEADER + '0,"a\nb",1,5,1\n1,"a,1,5,1\n\n2,b,1,5,1\n', "t.csv:4: the quotes are not ri"),
        (HEADER + '0,"a\nb",1,5,0\n', "t.csv:2: load_s of model 'a\\nb' is 0"),
        ('time,"model\n', "t.csv:1: the quotes are not right: unexpected end of data"),
        (SHORT_HEADER + "0,a,1,1,1,1\n1,a,x,,,\n", "t.csv:3: e is 'x': a number must be there"),
        (SHORT_HEADER + "0,a,1,1,x,1\n", "t.csv:2: cost_disk is 'x': a number must be there"),
        (SHORT_HEADER + "0,a,1,1,1,x\n", "t.csv:2: cost_host is 'x': a number must be there"),
        ("t,time,k,e,size_mb,cost_disk\n", "t.csv:1: columns 'time' and 't' mean the same"),
        ("t,t,k,e,size_mb,cost_disk\n", "t.csv:1: column 't' is there twice"),
        ("t,k,e,size_mb,load\n", "t.csv:1: unknown column 'load'; there may be time, model, "),
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


def test_an_archive_may_have_any_type_of_numbers(tmp_path: Path) -> None:
    usual = told(read_trace(npz(tmp_path)))
    for kind in (np.float64, np.float32, np.int64, np.uint16):
        sizes = np.array([32_000, 1], dtype=kind)
        assert told(read_trace(npz(tmp_path, size_mb=sizes, k=np.array([1, 0], kind)))) == usual
    halves = read_trace(npz(tmp_path, size_mb=np.array([0.5, 2.25])))
    assert [m.size_bytes for m in halves.models] == [1 << 19, 9 << 18]


def test_an_archive_without_host_costs_loads_from_a_copy_as_from_the_disk(tmp_path: Path) -> None:
    trace = read_trace(npz(tmp_path, cost_host=None))
    assert [(m.load_s, m.host_load_s) for m in trace.models] == [(2.0, 2.0), (1.0, 1.0)]


def test_an_archive_can_have_the_names_of_columns(tmp_path: Path) -> None:
    usual = npz(tmp_path)
    with np.load(usual) as arrays:
        renamed = {
            "time": arrays["t"],
            "model": arrays["k"],
            "execution_s": arrays["e"],
            "size_bytes": arrays["size_mb"].astype(np.float64) * 2**20,
            "load_s": arrays["cost_disk"],
            "host_load_s": arrays["cost_host"],
        }
    np.savez(tmp_path / "r.npz", **renamed)
    assert told(read_trace(tmp_path / "r.npz")) == told(read_trace(usual))


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"e": None}, "t.npz: arrays e are missing; there may be t, k, e"),
        ({"x": np.zeros(1)}, "t.npz: arrays x are unknown"),
        ({"t": np.array([0.0])}, "t.npz: k has 2 elements and t has 1"),
        ({"t": np.array([-1.0, 0.0])}, "t.npz: request 0 of arrays t, k, e: the time is -1"),
        ({"t": np.array([0.0, np.nan])}, "t.npz: request 1 of arrays t, k, e: the time is nan"),
        ({"k": np.array([0, 2])}, "t.npz: request 1 of arrays t, k, e: model 2 is none"),
        ({"k": np.array([0.0, 0.5])}, "t.npz: request 1 of arrays t, k, e: k is 0.5: the whole"),
        ({"k": np.array([0.0, np.nan])}, "t.npz: request 1 of arrays t, k, e: k is nan"),
        ({"k": np.array([1e300, 0.0])}, "t.npz: request 0 of arrays t, k, e: k is 1e+300"),
        (
            {"k": np.array([2**64 - 1, 0], np.uint64)},
            "t.npz: request 0 of arrays t, k, e: k is 1.8",
        ),
        ({"k": np.array([False, True])}, "t.npz: k has bool"),
        (
            {"devices": np.ones(2)},
            "t.npz: arrays devices are unknown; there may be t, k, e, size_mb",
        ),
        ({"meta": np.array({}, dtype=object)}, "t.npz: arrays meta are unknown; there may be t, k"),
        ({"a\nb": np.ones(2)}, "t.npz: arrays 'a\\nb' are unknown"),
        ({"time": np.ones(2)}, "t.npz: arrays t and time mean the same: one may be"),
        ({"size_bytes": np.ones(2)}, "t.npz: arrays size_mb and size_bytes mean the same: one may"),
        ({"size_mb": None}, "t.npz: arrays size_mb are missing"),
        ({"size_mb": np.array([1.0, np.nan])}, "t.npz: model 1 of arrays size_mb, cost_disk, cost"),
        ({"size_mb": np.array([np.inf, 1.0])}, "t.npz: model 0 of arrays size_mb, cost_disk, cost"),
        ({"size_mb": np.array([1.0, -1.0])}, "t.npz: model 1 of arrays size_mb, cost_disk, cost_h"),
        (
            {"size_mb": None, "size_bytes": np.array([5.0, 5.5])},
            "t.npz: model 1 of arrays size_bytes, cost_disk, cost_host: size_bytes is 5.5: a whole",
        ),
        (
            {"cost_host": None, "cost_disk": np.array([1.0, 0.0])},
            "t.npz: model 1 of arrays size_mb, cost_disk: load_s of model '1' is 0",
        ),
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
    assert "\n" not in str(refused.value)


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


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="nobody tells which files are open")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", HEADER + "0,a,-1,x,1\n1,a,1,,\n"),
        ("t.csv", HEADER + "0,a\n1,a,1,,\n"),
        ("t.csv", "time\n0\n"),
        ("t.jsonl", LOG_HEADER + "{}\n{}\n"),
    ],
)
def test_a_refused_trace_is_left_closed(tmp_path: Path, name: str, text: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(TraceError) as refused:
        read_trace(path)
    # While the error is held, and with it the readers' frames.
    opened = [file.readlink() for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    assert path not in opened, refused.value


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
    with pytest.raises(TraceError, match="is 70368744177664 bytes: 1 to 70368744177663 may be"):
        small_trace([0], sizes=[_core.MAX_BYTES + 1])
    many = small_trace(range(65_537), sizes=[1] * 65_537)
    with pytest.raises(TraceError, match="65537 models are wanted: the core takes 65536"):
        replay_serially(many, Machine(budgets=(9,)), "lru")


@pytest.mark.parametrize(
    "trace",
    [
        small_trace([0, 0], sizes=[1], arrivals=[0.0, 1e10]),
        small_trace([0] * 1000, sizes=[1], loads=[1e6]),
        small_trace([0] * 1000, sizes=[1], host_loads=[1e6]),
        small_trace([0] * 1000, sizes=[1], runs=[1e6] * 1000),
    ],
)
def test_the_clock_of_a_timed_replay_is_all_that_limits_how_long_a_trace_is(trace: Trace) -> None:
    machine = Machine(budgets=(9,))
    for name in ("lru", *BASELINES):
        replay = replay_baseline if name in BASELINES else replay_timed
        with pytest.raises(TraceError, match="seconds of its own time: at most 8e\\+08 can be"):
            replay(trace, machine, name)
    assert replay_serially(trace, machine, "lru").load_count == 1
    assert replay_timed(trace.first(1), machine, "lru").served_count == 1


def test_a_model_that_is_seldom_wanted_may_take_long() -> None:
    # With its seconds for every request the clock would not do.
    small_trace([0] * 1000 + [1], sizes=[1, 1], loads=[1.0, 1e6]).check_countable()


def test_all_models_together_may_be_larger_than_any_device() -> None:
    large_unit, small_unit = 2**40, 2**20
    wanted = [i % 12 for i in range(60)] + [0, 1] * 10
    # A bound, a schedule and every policy do with them what they do with a part of them that is a
    # power of two: then numbers are rounded alike, which may decide between equals.
    large, small = (
        small_trace(wanted, sizes=[7 * unit] * 12, loads=[float(i + 1) for i in range(12)])
        for unit in (large_unit, small_unit)
    )
    assert large.footprint_bytes() == 84 * large_unit > _core.MAX_BYTES
    budgets = (20 * large_unit,)
    for policy in _core.POLICIES:
        found = replay_serially(large, Machine(budgets=budgets), policy)
        as_small = replay_serially(small, Machine(budgets=(20 * small_unit,)), policy)
        assert found.load_took_s.tolist() == as_small.load_took_s.tolist()
    best_s = best_offline_s(large, budgets)
    assert best_s == best_offline_s(small, (20 * small_unit,))
    assert best_s <= min(
        replay_serially(large, Machine(budgets=budgets), policy).load_s for policy in _core.POLICIES
    )
    pytest.importorskip("highspy")
    bound_s = lower_bound(large, budgets[0]).load_s
    assert bound_s == pytest.approx(lower_bound(small, 20 * small_unit).load_s)
    assert large.compulsory_s() < bound_s <= best_s


def test_the_first_requests_of_a_trace_know_only_their_models() -> None:
    trace = small_trace([0, 1, 2], sizes=[1, 2, 4])
    assert trace.first(2).used() == [0, 1]
    assert trace.first(2).footprint_bytes() == 3
    assert trace.first(9) is trace
