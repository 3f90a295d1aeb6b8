from __future__ import annotations

import json
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError
from modelyard_server.weights.mapping import map_checkpoint
from modelyard_server.weights.safetensors_files import read_checkpoint, read_header

FILE = "model.safetensors"


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_bytes(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


GOOD = {"a": entry("F32", [2, 2], 0, 16), "b": entry("U8", [3], 16, 19)}


def test_a_good_file_is_described_exactly(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(file_bytes({"__metadata__": {"format": "pt"}} | GOOD, bytes(19)))
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.size_bytes == 19
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
        "a": (2, 2),
        "b": (3,),
    }
    assert checkpoint.tensors["b"].dtype == "U8"


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(1.5),
        "odd": torch.arange(3, dtype=torch.int8),
        "half": torch.arange(5, dtype=torch.bfloat16),
        "wide": torch.arange(4, dtype=torch.float64),
        "true": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / FILE)
    mapped = map_checkpoint(tmp_path, read_checkpoint(tmp_path), stop=lambda: False).tensors
    assert mapped.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert mapped[name].dtype == tensor.dtype
        assert torch.equal(mapped[name], tensor)


def test_tensors_behind_an_odd_one_are_aligned(tmp_path: Path) -> None:
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F64", [2], 1, 17)}
    values = torch.tensor([1.0, -2.0], dtype=torch.float64)
    (tmp_path / FILE).write_bytes(file_bytes(header, b"\x07" + values.numpy().tobytes()))
    mapped = map_checkpoint(tmp_path, read_checkpoint(tmp_path), stop=lambda: False).tensors
    assert mapped["b"].data_ptr() % 8 == 0
    assert torch.equal(mapped["b"], values)


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    save_file({"a": torch.ones(8)}, tmp_path / FILE)
    before = (tmp_path / FILE).read_bytes()
    map_checkpoint(tmp_path, read_checkpoint(tmp_path), stop=lambda: False).tensors["a"].zero_()
    assert (tmp_path / FILE).read_bytes() == before


def changed(key: str, value: object) -> dict[str, Any]:
    return {"a": GOOD["a"] | {key: value}, "b": GOOD["b"]}


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": bytes(7),
    "length only": (0).to_bytes(8, "little"),
    "header length 2^63": file_bytes(GOOD, bytes(19), length=2**63),
    "header length 2^64-1": file_bytes(GOOD, bytes(19), length=2**64 - 1),
    "header longer than the file": file_bytes(GOOD, bytes(19), length=10_000),
    "truncated data": file_bytes(GOOD, bytes(18)),
    "truncated header": file_bytes(GOOD)[:40],
    "trailing byte": file_bytes(GOOD, bytes(20)),
    "not JSON": file_bytes(b"{nonsense}"),
    "not UTF-8": file_bytes(b'{"\xff":1}'),
    "not an object": file_bytes([1, 2]),
    "nothing in it": file_bytes({}),
    "metadata alone": file_bytes({"__metadata__": {"format": "pt"}}),
    "metadata of numbers": file_bytes({"__metadata__": {"a": 1}} | GOOD, bytes(19)),
    "metadata is a list": file_bytes({"__metadata__": []} | GOOD, bytes(19)),
    "a name twice": file_bytes(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
    ),
    "a key of a tensor twice": file_bytes(
        b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"
    ),
    "nested 200,000 deep": file_bytes(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "nested 50,000 objects deep": file_bytes(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "a number of a million digits": file_bytes(b'{"a":' + b"1" * 1_000_000 + b"}"),
    "a hole": file_bytes({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"xyz"),
    "a hole at the start": file_bytes({"a": entry("U8", [1], 1, 2)}, b"xy"),
    "an overlap": file_bytes({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"xyz"),
    "the same bytes twice": file_bytes(
        {"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 0, 2)}, b"xy"
    ),
    "an empty tensor inside another": file_bytes(
        {"a": entry("U8", [2], 0, 2), "b": entry("U8", [0], 1, 1)}, b"xy"
    ),
    "reversed offsets": file_bytes(changed("data_offsets", [16, 0]), bytes(19)),
    "negative offsets": file_bytes(changed("data_offsets", [-16, 0]), bytes(19)),
    "three offsets": file_bytes(changed("data_offsets", [0, 16, 16]), bytes(19)),
    "offsets beyond 2^63": file_bytes(changed("data_offsets", [2**63, 2**63 + 16]), bytes(19)),
    "a negative dimension": file_bytes(changed("shape", [-2, -2]), bytes(19)),
    "a float dimension": file_bytes(changed("shape", [2.0, 2]), bytes(19)),
    "a true dimension": file_bytes(changed("shape", [True, 4]), bytes(19)),
    "NaN": file_bytes(b'{"a":NaN}'),
    # Modulo 2^64 this product is 4, and the size right.
    "a shape that wraps": file_bytes(
        changed("shape", [4194305, 4398045462528, 4398047559681]), bytes(19)
    ),
    "a dimension of 2^63": file_bytes(changed("shape", [2**63]), bytes(19)),
    "a shape of 1,000 dimensions": file_bytes(changed("shape", [1] * 1_000), bytes(19)),
    "a shape that is no list": file_bytes(changed("shape", "22"), bytes(19)),
    "an unknown type": file_bytes(changed("dtype", "F31"), bytes(19)),
    "a type that is no text": file_bytes(changed("dtype", ["F32"]), bytes(19)),
    "another size than the shape's": file_bytes(changed("shape", [2, 3]), bytes(19)),
    "a missing key": file_bytes({"a": {"dtype": "U8", "shape": [0]}}),
    "a further key": file_bytes({"a": entry("U8", [0], 0, 0) | {"more": 1}}),
    "NUL in a name": file_bytes({"a\0b": entry("U8", [1], 0, 1)}, b"x"),
    "no name": file_bytes({"": entry("U8", [1], 0, 1)}, b"x"),
    "a pickle": pickle.dumps({"weight": list(range(100))}),
    "a pickle of protocol 0": pickle.dumps({"weight": list(range(100))}, protocol=0),
    "GGUF": b"GGUF" + (3).to_bytes(4, "little") + bytes(200),
    "a header of 8 MiB and a byte": file_bytes(b"{" + b" " * (8 << 20)),
    "200,000 tensors": file_bytes({f"{index}": entry("U8", [0], 0, 0) for index in range(110_000)}),
    "a million lists": file_bytes(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"),
    "two million numbers": file_bytes(b'{"a":[' + b"1," * 2_000_000 + b"1]}"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / FILE).write_bytes(HOSTILE[name])
    with pytest.raises(ModelFilesError) as caught:
        read_checkpoint(tmp_path)
    assert caught.value.text.startswith(FILE)
    assert str(tmp_path) not in caught.value.text
    assert len(caught.value.text) < 300
    assert not caught.value.transient


HUGE = [name for name, content in HOSTILE.items() if len(content) > 100_000]


@pytest.mark.parametrize("name", HUGE)
def test_refusing_takes_little_memory(tmp_path: Path, name: str) -> None:
    (tmp_path / FILE).write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(ModelFilesError):
            read_header(tmp_path, FILE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20


def test_a_torch_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / FILE, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    with pytest.raises(ModelFilesError, match="no safetensors file"):
        read_checkpoint(tmp_path)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(canary),))

    (tmp_path / FILE).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelFilesError):
        read_checkpoint(tmp_path)
    assert not canary.exists()


def test_a_sparse_terabyte_is_refused_by_its_header(tmp_path: Path) -> None:
    with (tmp_path / FILE).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelFilesError):
        read_checkpoint(tmp_path)


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(ModelFilesError, match="not a regular file"):
        read_checkpoint(tmp_path)


def test_a_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(ModelFilesError, match="not a regular file"):
        read_checkpoint(tmp_path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(file_bytes(GOOD, bytes(19)))
    (tmp_path / FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelFilesError, match="symbolic link"):
        read_checkpoint(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=r"^model.safetensors is missing$"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "", "a\0b"])
def test_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelFilesError):
        read_header(tmp_path, name)


def write_shards(folder: Path, places: dict[str, str]) -> None:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(3), "c": torch.zeros(1)}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


SHARDS = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    write_shards(tmp_path, SHARDS)
    checkpoint = read_checkpoint(tmp_path)
    assert sorted(checkpoint.tensors) == ["a", "b", "c"]
    assert checkpoint.size_bytes == 24
    mapped = map_checkpoint(tmp_path, checkpoint, stop=lambda: False).tensors
    assert torch.equal(mapped["a"], torch.ones(2))


@pytest.mark.parametrize(
    "places",
    [
        SHARDS | {"d": "two.safetensors"},
        SHARDS | {"a": "two.safetensors"},
        {"a": "one.safetensors", "b": "two.safetensors"},
        SHARDS | {"d": "three.safetensors"},
        SHARDS | {"d": "../one.safetensors"},
        SHARDS | {"d": "model.bin"},
        {},
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, places: dict[str, str]) -> None:
    write_shards(tmp_path, places)
    with pytest.raises(ModelFilesError):
        read_checkpoint(tmp_path)


def test_a_file_that_changed_after_the_check_is_not_mapped(tmp_path: Path) -> None:
    save_file({"a": torch.ones(8)}, tmp_path / FILE)
    checkpoint = read_checkpoint(tmp_path)
    os.truncate(tmp_path / FILE, 40)
    with pytest.raises(ModelFilesError, match="changed") as caught:
        map_checkpoint(tmp_path, checkpoint, stop=lambda: False)
    assert caught.value.transient


def test_mapping_can_be_stopped(tmp_path: Path) -> None:
    save_file({"a": torch.ones(8)}, tmp_path / FILE)
    with pytest.raises(LoadCancelled):
        map_checkpoint(tmp_path, read_checkpoint(tmp_path), stop=lambda: True)
