"""What crosses to a worker and back is what was sent, field by field."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard_server.execution.engine import (
    DeviceMemory,
    EngineDevice,
    Loaded,
    ModelFailed,
    Unloaded,
)
from modelyard_server.execution.workers.framing import MalformedMessage
from modelyard_server.execution.workers.payload import (
    RemoteError,
    decode_error,
    encode_error,
    understand,
)
from modelyard_server.execution.workers.records import (
    decode_bytes,
    decode_device,
    decode_loaded,
    decode_memory,
    decode_price,
    decode_spec,
    decode_target,
    decode_unloaded,
    encode_bytes,
    encode_device,
    encode_loaded,
    encode_memory,
    encode_price,
    encode_spec,
    encode_target,
    encode_unloaded,
    plain,
)
from modelyard_server.runtimes.api import (
    LoadCancelled,
    LoadSource,
    ModelFilesError,
    ModelSpec,
    OptionError,
    Price,
)
from modelyard_server.runtimes.targets import Structure, Target, TensorPart
from modelyard_server.runtimes.tensors import TensorError
from modelyard_server.weights.activation_model import RunEstimate


def across(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_specs_cross() -> None:
    full = ModelSpec(
        name="m",
        runtime="torch",
        task="t",
        folder=Path("/a/\udcff b"),
        root=Path("/a"),
        options=MappingProxyType({"a": [1, 2.5, None, {"b": True}], "ж": "x"}),
    )
    assert decode_spec(across(encode_spec(full))) == full
    bare = ModelSpec(name="m", runtime="torch")
    assert decode_spec(across(encode_spec(bare))) == bare


def test_prices_cross() -> None:
    full = Price(
        resting_bytes=5,
        peak_bytes=2**60,
        structure=Structure(
            tensors=(
                TensorPart(names=("a.b", "c"), size_bytes=5),
                TensorPart(names=("d",), size_bytes=0, is_buffer=True, as_filed=False),
            ),
            blocks=("a",),
            units=("a.b", "d"),
        ),
        shared={"ab" * 32: 5},
        activation_bytes=9,
        runs=RunEstimate(key="k", largest_batch=8, largest_length=64),
        input_names=("ids", "mask"),
    )
    assert decode_price(across(encode_price(full))) == full
    bare = Price(resting_bytes=0, peak_bytes=0)
    assert decode_price(across(encode_price(bare))) == bare


def test_targets_devices_and_sizes_cross() -> None:
    target = Target(home=3, parts=(("", 3), ("a.b", 0)))
    assert decode_target(across(encode_target(target))) == target
    device = EngineDevice(
        name="a", torch_device="cuda:1", threads=3, transfer_bytes_per_s=7, group="g"
    )
    assert decode_device(across(encode_device(device))) == device
    assert decode_bytes(across(encode_bytes({1: 5, 0: 0})), 2) == {1: 5, 0: 0}
    memory = {0: DeviceMemory(measured_bytes=3, peak_measured_bytes=7)}
    assert decode_memory(across(encode_memory(memory)), 1) == memory


def test_what_became_of_loads_and_unloads_crosses() -> None:
    for source in LoadSource:
        loaded = Loaded(own_bytes={1: 5, 0: 0}, source=source)
        assert decode_loaded(across(encode_loaded(loaded)), 2) == loaded
    for unloaded in (
        Unloaded(freed={1: 5, 0: 0}),
        Unloaded(freed={}, kept_bytes=0, keep_s=0.25),
        Unloaded(freed={0: 2**60}, kept_bytes=2**60, keep_s=1e9),
        Unloaded(freed={0: 7}, refused_bytes=2**60),
    ):
        assert decode_unloaded(across(encode_unloaded(unloaded)), 2) == unloaded


@pytest.mark.parametrize(
    ("kind", "crossing"),
    [
        (ModelSpec, {"name", "runtime", "task", "folder", "root", "options"}),
        (
            Price,
            {
                *("resting_bytes", "peak_bytes", "structure", "shared", "activation_bytes", "runs"),
                "input_names",
            },
        ),
        (Structure, {"tensors", "blocks", "units"}),
        (TensorPart, {"names", "size_bytes", "is_buffer", "as_filed"}),
        (Target, {"home", "parts"}),
        (EngineDevice, {"name", "torch_device", "threads", "transfer_bytes_per_s", "group"}),
        (DeviceMemory, {"measured_bytes", "peak_measured_bytes"}),
        (Loaded, {"own_bytes", "source"}),
        (Unloaded, {"freed", "kept_bytes", "keep_s", "refused_bytes"}),
    ],
)
def test_no_field_is_left_behind(kind: Any, crossing: set[str]) -> None:
    """A field that is new must be added to records.py, and here."""
    assert {field.name for field in fields(kind)} == crossing


@pytest.mark.parametrize(
    "encoded",
    [
        None,
        [[0, -1]],
        [[2, 1]],
        [[-1, 1]],
        [[True, 1]],
        [[0, 1.5]],
        [[0, 1], [0, 2]],
        [[0]],
        {"0": 1},
        [["0", 1]],
    ],
)
def test_sizes_that_cannot_be_are_not_understood(encoded: Any) -> None:
    with pytest.raises(MalformedMessage):
        understand(lambda: decode_bytes(encoded, 2))


@given(
    st.recursive(
        st.none() | st.integers() | st.text() | st.floats(),
        lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(), inner, max_size=6),
        max_leaves=12,
    )
)
def test_whatever_else_comes_for_a_price_is_not_understood(encoded: Any) -> None:
    for value in (
        encoded,
        {"resting_bytes": 1, "peak_bytes": 1, "structure": encoded, "shared": {}},
        {"resting_bytes": encoded, "peak_bytes": encoded, "structure": None, "shared": encoded},
    ):
        with pytest.raises(MalformedMessage):
            understand(lambda value=value: decode_price(value))  # type: ignore[misc]


def test_options_that_are_no_json_are_refused() -> None:
    with pytest.raises(TypeError, match="bytes is no value of JSON"):
        plain({"a": [b"x"]})
    assert plain({"a": (1, {2: "x"})}) == {"a": [1, {"2": "x"}]}


@pytest.mark.parametrize(
    ("error", "attributes"),
    [
        (ModelFilesError("cut", transient=True), ("text", "transient")),
        (ModelFilesError("cut"), ("text", "transient")),
        (OptionError("o", "t"), ("option", "text")),
        (TensorError("x", "t"), ("tensor", "text")),
        (ModelFailed("KeyError", "story"), ("exception_type", "log_text")),
        (LoadCancelled(), ()),
        (MemoryError(), ()),
    ],
)
def test_errors_cross(error: Exception, attributes: tuple[str, ...]) -> None:
    crossed = decode_error(across(encode_error(error, "unused")))
    assert type(crossed) is type(error)
    assert str(crossed) == str(error)
    for name in attributes:
        assert getattr(crossed, name) == getattr(error, name)


def test_other_errors_keep_their_names_and_their_story() -> None:
    class SafetensorsError(Exception):
        pass

    crossed = decode_error(across(encode_error(SafetensorsError("x"), "the story")))
    assert type(crossed).__name__ == "SafetensorsError"
    assert isinstance(crossed, RemoteError)
    assert crossed.log_text == str(crossed) == "the story"
    assert type(decode_error(["other", "not a name", "x"])) is RemoteError
    assert type(decode_error(["other", "a" * 101, "x"])) is RemoteError


@pytest.mark.parametrize(
    "encoded", [None, [], ["files"], ["files", 1, True], ["files", "a", 1], ["what"], "other"]
)
def test_what_is_no_error_is_not_understood(encoded: Any) -> None:
    with pytest.raises(MalformedMessage):
        decode_error(encoded)
