"""Examples as rows of inputs, and rows of outputs as predictions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from modelyard import Bfloat16, Prediction, Served

pytest.importorskip("apache_beam")

from modelyard.integrations.beam import decode_rows, encode_row, model_id_of
from modelyard.integrations.beam._rows import is_torch, size_of

SERVED = Served(model="models/m", device="devices/cpu", cold=False, wait_s=0, load_s=None, run_s=0)


def test_an_example_becomes_one_row() -> None:
    assert encode_row("text") == "text"
    assert encode_row(b"bytes") == b"bytes"
    for example in (np.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3)):
        row: Any = encode_row(example)
        assert isinstance(row, np.ndarray)
        assert row.shape == (1, 2, 3)
        assert row.tolist() == [[[0, 1, 2], [3, 4, 5]]]
    scalar: Any = encode_row(np.float32(2))
    assert (scalar.shape, scalar.dtype) == ((1,), np.float32)
    both: Any = encode_row({"text": "a", "image": np.zeros((2, 2), np.uint8)})
    assert both["text"] == "a"
    assert both["image"].shape == (1, 2, 2)


def test_torch_tensors_that_numpy_does_not_take_as_they_are_are_encoded() -> None:
    wanted = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    row: Any = encode_row(wanted)
    assert isinstance(row, Bfloat16)
    assert np.asarray(row).tolist() == [[1.5, -2.0]]
    assert np.asarray(encode_row(Bfloat16(bits=row.bits[0]))).tolist() == [[1.5, -2.0]]
    with_grad = torch.ones(2, requires_grad=True)
    assert np.asarray(encode_row(with_grad)).tolist() == [[1, 1]]
    across = torch.arange(4.0).reshape(2, 2).T
    assert np.asarray(encode_row(across)).tolist() == [[[0, 2], [1, 3]]]


@pytest.mark.parametrize("example", [1, 2.5, None, ["a", "b"], [1.0], object(), {"x": [1]}])
def test_what_is_no_row_is_refused_with_a_way_out(example: object) -> None:
    with pytest.raises(TypeError, match="give the handler an encoder"):
        encode_row(example)


def test_a_row_comes_back_without_its_batch_dimension() -> None:
    one = Prediction({"y": np.array([[1.0, 2.0]])}, SERVED)
    assert decode_rows(one).tolist() == [1.0, 2.0]
    tensor = decode_rows(one, as_torch=True)
    assert isinstance(tensor, torch.Tensor)
    assert tensor.tolist() == [1.0, 2.0]
    several = Prediction({"label": ["good"], "score": np.array([0.5], np.float32)}, SERVED)
    assert decode_rows(several) == {"label": "good", "score": 0.5}
    as_torch = decode_rows(several, as_torch=True)
    assert as_torch["label"] == "good"
    assert (as_torch["score"].dtype, as_torch["score"].item()) == (torch.float32, 0.5)


def test_outputs_of_other_kinds_come_back() -> None:
    bits = Bfloat16.from_float32(np.array([[1.5, -2.0]], np.float32))
    answer = Prediction({"y": bits}, SERVED)
    assert np.asarray(decode_rows(answer)).tolist() == [1.5, -2.0]
    tensor = decode_rows(answer, as_torch=True)
    assert tensor.dtype is torch.bfloat16
    assert tensor.tolist() == [1.5, -2.0]
    # A number for the whole run has no rows.
    assert decode_rows(Prediction({"loss": np.array(3.0)}, SERVED)) == 3.0


def test_rows_that_are_not_one_are_an_error_that_names_the_output() -> None:
    with pytest.raises(ValueError, match="output 'y' has 2 rows for one example"):
        decode_rows(Prediction({"y": np.zeros((2, 3))}, SERVED))


def test_sizes_are_those_of_the_content() -> None:
    assert size_of("häß") == 5
    assert size_of(b"abc") == 3
    assert size_of(np.zeros((2, 3), np.float32)) == 24
    assert size_of(torch.zeros(2, 3, dtype=torch.float16)) == 12
    assert size_of(torch.zeros(1000).expand(10, 1000)) == 40_000
    assert size_of(Bfloat16(bits=np.zeros(3, np.uint16))) == 6
    assert size_of({"ab": np.zeros(4, np.uint8)}) == 6
    assert size_of(("key", np.zeros(4, np.uint8))) == 7
    assert size_of(np.array(["abc", "d"], object)) == 4
    assert size_of([1, 2.0, True, None]) == 32


def test_torch_is_told_from_the_rest() -> None:
    assert is_torch(torch.ones(1))
    assert is_torch({"a": "x", "b": torch.ones(1)})
    assert not is_torch(np.ones(1))
    assert not is_torch({"a": "x"})


def test_what_served_is_told_with_version_and_branch() -> None:
    assert model_id_of(SERVED) == "m"
    assert model_id_of(replace(SERVED, version="v2")) == "m@v2"
    assert model_id_of(replace(SERVED, version="v2", branch="b/c")) == "m@v2 (b/c)"
