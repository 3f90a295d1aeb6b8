"""Elements of the protocol's tensors: examples. tests/property has what holds for all of them."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue
from modelyard_server.services.oip.contents import as_text, from_raw, from_typed, raw_of, to_typed
from modelyard_server.services.oip.datatypes import DATATYPES, datatype_of
from modelyard_server.services.oip.messages import message


def contents(**fields: list[Any]) -> Any:
    return message("InferTensorContents")(**fields)


def text(error: pytest.ExceptionInfo[TensorError]) -> str:
    return error.value.text


def test_every_type_inside_has_a_name_outside() -> None:
    for dtype in DType:
        known = datatype_of(dtype)
        assert known.dtype is (DType.BYTES if dtype is DType.TEXT else dtype)
        assert DATATYPES[known.name] is known


def test_raw_elements_are_taken_as_they_are() -> None:
    raw = struct.pack("<3f", 1.0, -2.0, 3.5)
    value = from_raw("x", "FP32", [3], raw)
    assert value == TensorValue(name="x", dtype=DType.FLOAT32, shape=(3,), data=raw)
    assert raw_of(value) is raw


def test_raw_byte_strings_have_their_lengths_before_them() -> None:
    raw = b"\x02\x00\x00\x00ab" + b"\x00\x00\x00\x00" + b"\x01\x00\x00\x00\xff"
    value = from_raw("x", "BYTES", [3, 1], raw)
    assert (value.dtype, value.data) == (DType.BYTES, (b"ab", b"", b"\xff"))
    assert raw_of(value) == raw


def test_texts_travel_as_utf_8_and_what_is_no_unicode_as_question_marks() -> None:
    value = TensorValue(name="x", dtype=DType.TEXT, shape=(2,), data=("я", "a\ud800"))
    assert raw_of(value) == b"\x02\x00\x00\x00\xd1\x8f" + b"\x02\x00\x00\x00a?"


def test_byte_strings_of_utf_8_are_texts() -> None:
    value = TensorValue(name="x", dtype=DType.BYTES, shape=(2, 1), data=("я".encode(), b""))
    assert as_text(value) == TensorValue(name="x", dtype=DType.TEXT, shape=(2, 1), data=("я", ""))


@pytest.mark.parametrize("data", [b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"])
def test_other_byte_strings_are_not(data: bytes) -> None:
    value = TensorValue(name="x", dtype=DType.BYTES, shape=(2,), data=(b"a", data))
    with pytest.raises(TensorError) as error:
        as_text(value)
    assert text(error) == "element 1 is not valid UTF-8"


@pytest.mark.parametrize(
    ("shape", "raw", "part"),
    [
        ([1], b"", "at least 4 bytes"),
        ([10**9], b"\x00" * 64, "at least 4000000000 bytes"),
        ([2], b"\x04\x00\x00\x00abcd", "element 1 has no room for its length"),
        ([1], b"\x05\x00\x00\x00abcd", "element 0 is said to have 5 bytes; 4 are left"),
        ([1], b"\xff\xff\xff\xffabcd", "said to have 4294967295 bytes"),
        ([1], b"\x03\x00\x00\x00abcd", "1 bytes are left after its last element"),
        ([0], b"\x00", "1 bytes are left"),
        ([2**31], b"", "dimension 2147483648 is outside"),
        ([-1], b"", "dimension -1 is outside"),
    ],
)
def test_lengths_that_lie_are_found_out(shape: list[int], raw: bytes, part: str) -> None:
    with pytest.raises(TensorError) as error:
        from_raw("x", "BYTES", shape, raw)
    assert part in text(error)


def test_a_scalar_has_one_element_and_no_dimension() -> None:
    assert from_raw("x", "BYTES", [], b"\x00\x00\x00\x00").data == (b"",)
    assert from_typed("x", "INT64", [], contents(int64_contents=[5])).data == struct.pack("<q", 5)


@pytest.mark.parametrize(
    ("datatype", "shape", "fields", "part"),
    [
        ("FP32", [1], {"fp64_contents": [1.0]}, "belong in `fp32_contents`, not in"),
        ("FP32", [1], {"fp32_contents": [1.0], "int_contents": [1]}, "not in `int_contents`"),
        ("FP32", [2], {"fp32_contents": [1.0]}, "needs 2 elements; 1 were given"),
        ("FP32", [1], {}, "needs 1 elements; 0 were given"),
        ("FP16", [1], {"fp32_contents": [1.0]}, "belong in raw_input_contents"),
        ("BF16", [0], {}, "have no typed field"),
        ("INT8", [1], {"int_contents": [128]}, "holds a number that is no INT8"),
        ("INT16", [1], {"int_contents": [-32769]}, "no INT16"),
        ("UINT8", [1], {"uint_contents": [256]}, "no UINT8"),
        ("BYTES", [2], {"bytes_contents": [b"a"]}, "needs 2 elements"),
        ("COMPLEX64", [1], {}, "datatype 'COMPLEX64' is unknown"),
        ("x" * 900, [1], {}, "is unknown"),
    ],
)
def test_typed_elements_that_do_not_fit_are_refused(
    datatype: str, shape: list[int], fields: dict[str, list[Any]], part: str
) -> None:
    with pytest.raises(TensorError) as error:
        from_typed("x", datatype, shape, contents(**fields))
    assert part in text(error)
    assert len(text(error)) < 300


def test_half_precision_has_no_typed_field() -> None:
    value = TensorValue(name="x", dtype=DType.FLOAT16, shape=(1,), data=b"\x00\x3c")
    empty = contents()
    assert to_typed(value, empty) is False
    assert empty == contents()
