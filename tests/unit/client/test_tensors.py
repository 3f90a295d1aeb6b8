"""Tensors of the client: what can be sent, what is read, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from modelyard.tensors import MAX_DIMENSION, Bfloat16, TensorError, from_tensor, to_tensor
from modelyard.v1 import tensor_pb2
from modelyard.v1.tensor_pb2 import DataType, Tensor

NUMERIC = [
    (np.bool_, tensor_pb2.DATA_TYPE_BOOL),
    (np.int8, tensor_pb2.DATA_TYPE_INT8),
    (np.int16, tensor_pb2.DATA_TYPE_INT16),
    (np.int32, tensor_pb2.DATA_TYPE_INT32),
    (np.int64, tensor_pb2.DATA_TYPE_INT64),
    (np.uint8, tensor_pb2.DATA_TYPE_UINT8),
    (np.uint16, tensor_pb2.DATA_TYPE_UINT16),
    (np.uint32, tensor_pb2.DATA_TYPE_UINT32),
    (np.uint64, tensor_pb2.DATA_TYPE_UINT64),
    (np.float16, tensor_pb2.DATA_TYPE_FLOAT16),
    (np.float32, tensor_pb2.DATA_TYPE_FLOAT32),
    (np.float64, tensor_pb2.DATA_TYPE_FLOAT64),
]


def array_of(tensor: Tensor) -> Any:
    value = from_tensor(tensor)
    assert isinstance(value, np.ndarray)
    return value


def raw_tensor(shape: list[int], raw: bytes, data_type: Any = DataType.DATA_TYPE_UINT8) -> Tensor:
    return Tensor(name="x", data_type=data_type, shape=shape, raw=raw)


class TestNumbers:
    @pytest.mark.parametrize(("dtype", "data_type"), NUMERIC)
    @pytest.mark.parametrize("shape", [(), (1,), (3, 2), (0,), (2, 0, 3)])
    def test_every_type_and_shape_comes_back(
        self, dtype: Any, data_type: Any, shape: tuple[int, ...]
    ) -> None:
        array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)

        tensor = to_tensor(array, "x")
        back = array_of(Tensor.FromString(tensor.SerializeToString()))

        assert (tensor.name, tensor.data_type, tuple(tensor.shape)) == ("x", data_type, shape)
        assert back.dtype == array.dtype and back.shape == shape
        np.testing.assert_array_equal(back, array)

    def test_bytes_on_the_wire_are_little_endian_and_row_major(self) -> None:
        tensor = to_tensor(np.array([[1, 2], [3, 4]], dtype=np.uint16))
        assert tensor.raw == b"\x01\x00\x02\x00\x03\x00\x04\x00"

    @pytest.mark.parametrize(
        "array",
        [
            np.array([[1, 2], [3, 4]], dtype=">u2"),
            np.asfortranarray(np.array([[1, 2], [3, 4]], dtype=np.uint16)),
            np.array([[1, 3], [2, 4]], dtype=">u2").T,
            np.array([[1, 0, 2, 0], [3, 0, 4, 0]], dtype=np.uint16)[:, ::2],
        ],
        ids=["big-endian", "column-major", "big-endian view", "strided"],
    )
    def test_byte_order_and_memory_order_of_the_input_do_not_show(self, array: Any) -> None:
        assert to_tensor(array).raw == b"\x01\x00\x02\x00\x03\x00\x04\x00"

    def test_a_numpy_scalar_has_no_dimension(self) -> None:
        tensor = to_tensor(np.float32(1.5))
        assert list(tensor.shape) == [] and array_of(tensor) == np.float32(1.5)

    def test_arrays_that_are_read_belong_to_the_caller(self) -> None:
        for shape in ([4], [2, 2], [0]):
            raw = bytes(int(np.prod(shape)))
            array = array_of(raw_tensor(shape, raw))
            assert array.flags.writeable and array.flags.c_contiguous and array.dtype.isnative

    @pytest.mark.parametrize(
        "dtype", [np.complex64, np.longdouble, "datetime64[s]", [("a", np.int8)], "V3"]
    )
    def test_types_the_contract_lacks_are_refused(self, dtype: Any) -> None:
        with pytest.raises(TypeError, match="cannot be sent: convert to bool, int8"):
            to_tensor(np.zeros(2, dtype=dtype))

    @pytest.mark.parametrize(
        ("value", "advice"),
        [
            (1, "make an array of the type the model takes"),
            (1.5, "make an array"),
            (True, "make an array"),
            ([1, 2], "make an array"),
            ([[1.0]], "use str, bytes, a list"),
            (None, "use str, bytes"),
            ({"a": 1}, "use str, bytes"),
            (bytearray(b"x"), r"use bytes\(...\)"),
            (np.ma.masked_array([1, 2], mask=[False, True]), "filled"),
            (torch.zeros(2), "numpy array"),
            (iter(["a"]), "use str, bytes"),
        ],
    )
    def test_nothing_is_guessed(self, value: Any, advice: str) -> None:
        with pytest.raises(TypeError, match=f"cannot send .*{advice}"):
            to_tensor(value)

    def test_a_name_is_text(self) -> None:
        name: Any = 3
        with pytest.raises(TypeError, match="name of a tensor must be a str, got int"):
            to_tensor("x", name)


class TestText:
    def test_one_string_is_one_row(self) -> None:
        tensor = to_tensor("grüße", "x")
        assert tensor.data_type == tensor_pb2.DATA_TYPE_TEXT
        assert list(tensor.shape) == [1]
        assert from_tensor(tensor) == ["grüße"]

    @pytest.mark.parametrize("values", [["a", "", "b\0"], ("a",), ["\U0001f600"]])
    def test_lists_and_tuples_come_back_as_lists(self, values: Any) -> None:
        assert from_tensor(to_tensor(values)) == list(values)

    def test_one_byte_string_is_one_row(self) -> None:
        tensor = to_tensor(b"\xff\0")
        assert tensor.data_type == tensor_pb2.DATA_TYPE_BYTES
        assert from_tensor(tensor) == [b"\xff\0"]

    @pytest.mark.parametrize(
        "array",
        [
            np.array([["a", "bc"]]),
            np.array([["a", "bc"]], dtype=object),
            np.array([[b"a", b"bc"]]),
            np.array([[b"a", b"bc"]], dtype=object),
            np.array("a", dtype=object),
        ],
    )
    def test_arrays_keep_their_shape(self, array: Any) -> None:
        back = array_of(to_tensor(array))
        assert back.shape == array.shape and back.dtype == object
        assert back.tolist() == array.tolist()

    @pytest.mark.parametrize("dtype", [np.str_, object])
    def test_one_dimensional_arrays_come_back_as_lists(self, dtype: Any) -> None:
        assert from_tensor(to_tensor(np.array(["a", "b"], dtype=dtype))) == ["a", "b"]

    def test_elements_are_row_major_whatever_the_memory_order(self) -> None:
        tensor = to_tensor(np.array([["a", "b"], ["c", "d"]]).T)
        assert list(tensor.text.values) == ["a", "c", "b", "d"]

    @pytest.mark.parametrize(
        ("dtype", "data_type"),
        [(np.str_, DataType.DATA_TYPE_TEXT), (np.bytes_, DataType.DATA_TYPE_BYTES)],
    )
    def test_an_empty_array_of_a_known_type_can_be_sent(self, dtype: Any, data_type: Any) -> None:
        tensor = to_tensor(np.empty(0, dtype=dtype))
        assert (tensor.data_type, list(tensor.shape)) == (data_type, [0])
        assert tensor.WhichOneof("content") in ("text", "binary")
        assert from_tensor(tensor) == []

    @pytest.mark.parametrize("value", [[], (), np.empty(0, dtype=object)])
    def test_what_is_empty_and_of_no_type_is_refused(self, value: Any) -> None:
        with pytest.raises(TensorError, match=r"could hold text or bytes: use .*numpy\.str_"):
            to_tensor(value)

    @pytest.mark.parametrize("value", [["a", b"b"], [b"b", "a"], np.array(["a", b"b"], object)])
    def test_one_tensor_holds_one_type(self, value: Any) -> None:
        with pytest.raises(TypeError, match=r"x\[1\].*one tensor holds one type"):
            to_tensor(value, "x")

    def test_half_a_surrogate_pair_is_no_text(self) -> None:
        with pytest.raises(TensorError, match=r"'x'.*no Unicode"):
            to_tensor(["\ud800"], "x")


class TestBfloat16:
    def test_rounding_is_that_of_torch(self) -> None:
        generator = np.random.default_rng(7)
        bits = generator.integers(0, 2**32, size=20_000, dtype=np.uint32)
        values = bits.view(np.float32)
        values = values[~np.isnan(values)]
        ours = Bfloat16.from_float32(values).bits
        theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
        np.testing.assert_array_equal(ours, theirs)

    @pytest.mark.parametrize("bits", [0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0xFF800001])
    def test_nan_stays_nan_of_the_same_sign(self, bits: int) -> None:
        nan = np.array(bits, dtype=np.uint32).view(np.float32)
        back = Bfloat16.from_float32(nan).to_float32()
        assert back.shape == () and np.isnan(back)
        assert np.signbit(back) == np.signbit(nan)

    @pytest.mark.parametrize("shape", [(), (3,), (0, 2)])
    def test_it_travels_as_its_bits(self, shape: tuple[int, ...]) -> None:
        value = Bfloat16.from_float32(np.full(shape, -1.5, dtype=np.float32))
        tensor = to_tensor(value)
        assert tensor.data_type == tensor_pb2.DATA_TYPE_BFLOAT16
        assert tensor.raw == b"\xc0\xbf" * int(np.prod(shape, dtype=int))
        back = from_tensor(tensor)
        assert isinstance(back, Bfloat16) and back.shape == shape
        np.testing.assert_array_equal(np.asarray(back), np.asarray(value))

    def test_numpy_reads_it_as_float32(self) -> None:
        value = Bfloat16(bits=np.array([0x3FC0], dtype=np.uint16))
        assert np.asarray(value).dtype == np.float32
        assert np.asarray(value, dtype=np.float64).tolist() == [1.5]
        with pytest.raises(ValueError, match="copy=False is not possible"):
            np.array(value, copy=False)

    @pytest.mark.parametrize("bits", [[1], np.zeros(1, np.int16), np.zeros(1, np.float32), None])
    def test_bits_are_uint16(self, bits: Any) -> None:
        with pytest.raises(TypeError, match="takes the bits as a numpy array of uint16"):
            Bfloat16(bits=bits)

    def test_values_are_float32(self) -> None:
        doubles: Any = np.zeros(1)
        with pytest.raises(TypeError, match="takes an array of float32, got an array of float64"):
            Bfloat16.from_float32(doubles)


class TestStrictReading:
    @pytest.mark.parametrize(
        ("tensor", "text"),
        [
            (raw_tensor([3], b"12"), r"2 bytes in 'raw', shape \[3\] needs 3"),
            (raw_tensor([1], b"12"), "2 bytes in 'raw'"),
            (raw_tensor([0], b"1"), "1 bytes in 'raw'"),
            (raw_tensor([], b""), r"0 bytes in 'raw', shape \[\] needs 1"),
            (raw_tensor([2], b"1", DataType.DATA_TYPE_INT64), "needs 16"),
            (raw_tensor([-1], b""), "a dimension of size -1"),
            (raw_tensor([MAX_DIMENSION + 1], b""), "a dimension of size 2147483648"),
            (raw_tensor([1] * 9, b"1"), "9 dimensions, at most 8"),
            (raw_tensor([2**31 - 1] * 3, b""), r"above 2\^63 - 1"),
            (raw_tensor([0, *[2**31 - 1] * 3], b""), r"above 2\^63 - 1"),
            (raw_tensor([1], b"1", DataType.DATA_TYPE_UNSPECIFIED), "data type 0 is not known"),
            (raw_tensor([1], b"1", 99), "data type 99 is not known"),
            (raw_tensor([1], b"\2", DataType.DATA_TYPE_BOOL), "neither 0 nor 1"),
            (raw_tensor([1], b"a", DataType.DATA_TYPE_TEXT), "in 'raw', this type has them in"),
            (raw_tensor([0], b"", DataType.DATA_TYPE_BYTES), "in 'raw', this type has them in"),
            (Tensor(name="x", data_type=DataType.DATA_TYPE_TEXT, shape=[1]), "0 values in 'text'"),
            (
                Tensor(
                    name="x",
                    data_type=DataType.DATA_TYPE_BYTES,
                    shape=[1],
                    text=tensor_pb2.TextElements(values=["a"]),
                ),
                "in 'text', this type has them in 'binary'",
            ),
            (
                Tensor(
                    name="x",
                    data_type=DataType.DATA_TYPE_TEXT,
                    shape=[2, 2],
                    text=tensor_pb2.TextElements(values=["a"]),
                ),
                r"1 values in 'text', shape \[2, 2\] needs 4",
            ),
        ],
    )
    def test_what_contradicts_itself_is_refused(self, tensor: Tensor, text: str) -> None:
        with pytest.raises(TensorError, match=f"tensor 'x': .*{text}"):
            from_tensor(tensor)

    @pytest.mark.parametrize("data_type", [DataType.DATA_TYPE_INT8, DataType.DATA_TYPE_TEXT])
    def test_no_content_is_right_where_none_is_needed(self, data_type: Any) -> None:
        assert len(from_tensor(Tensor(data_type=data_type, shape=[0]))) == 0  # type: ignore[arg-type]  # Bfloat16 has no length and is not what comes back

    def test_the_limits_hold_for_what_is_sent(self) -> None:
        with pytest.raises(TensorError, match="9 dimensions, at most 8"):
            to_tensor(np.zeros([1] * 9, dtype=np.int8))
        with pytest.raises(TensorError, match="a dimension of size 2147483648"):
            to_tensor(np.empty((0, MAX_DIMENSION + 1), dtype=np.int8))
