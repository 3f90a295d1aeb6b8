"""What routes do with tensors: transformations between steps, and answers that become one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard_server.routing.arrays import array_of, value_of
from modelyard_server.routing.combine import MemberAnswer, combined
from modelyard_server.routing.targets import Combine, Transform
from modelyard_server.routing.transforms import (
    Transformation,
    check_transform,
    register,
    registered,
    renamed,
    transformed,
)
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue


def text(name: str, *values: str, shape: tuple[int, ...] | None = None) -> TensorValue:
    return TensorValue(name=name, dtype=DType.TEXT, shape=shape or (len(values),), data=values)


def floats(name: str, values: Any, dtype: DType = DType.FLOAT32) -> TensorValue:
    return value_of(name, dtype, np.asarray(values, np.float64))


def integers(name: str, values: Any) -> TensorValue:
    return value_of(name, DType.INT64, np.asarray(values, np.int64))


def apply(name: str, parameters: Mapping[str, Any], *tensors: TensorValue) -> list[TensorValue]:
    transform = Transform(name, parameters)
    assert not check_transform(transform)
    return list(transformed(transform, tensors))


def fails(name: str, parameters: Mapping[str, Any], *tensors: TensorValue) -> str:
    transform = Transform(name, parameters)
    assert not check_transform(transform)
    with pytest.raises(TensorError) as caught:
        transformed(transform, tensors)
    return str(caught.value)


# --- Arrays ---------------------------------------------------------------------------------------


@given(st.lists(st.floats(width=32), max_size=20))
def test_bfloat16_is_rounded_to_the_nearest(numbers: list[float]) -> None:
    import torch

    array = np.asarray(numbers, np.float32)
    value = value_of("x", DType.BFLOAT16, array)
    wanted = torch.from_numpy(array.copy()).to(torch.bfloat16).float().numpy()
    assert np.array_equal(array_of(value), wanted, equal_nan=True)


def test_text_is_no_array() -> None:
    with pytest.raises(TensorError, match="holds TEXT"):
        array_of(text("t", "a"))


# --- Transformations ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16, DType.FLOAT64])
def test_pooling_takes_the_mean_of_what_is_not_masked(dtype: DType) -> None:
    hidden = floats("h", [[[1, 2], [3, 4], [100, 100]], [[5, 6], [7, 8], [9, 10]]], dtype)
    mask = integers("mask", [[1, 1, 0], [1, 1, 1]])
    (pooled,) = apply("pooling", {"mask": "mask"}, hidden, mask)
    assert (pooled.name, pooled.dtype, pooled.shape) == ("embedding", dtype, (2, 2))
    assert np.allclose(array_of(pooled), [[2, 3], [7, 8]])


def test_pooling_by_first_max_and_unit_length() -> None:
    hidden = floats("h", [[[3, 4], [0, 9]]])
    (first,) = apply("pooling", {"mode": "first", "normalize": True}, hidden)
    assert np.allclose(array_of(first), [[0.6, 0.8]])
    (most,) = apply("pooling", {"mode": "max", "output": "top", "input": "h"}, hidden)
    assert most.name == "top" and np.allclose(array_of(most), [[3, 9]])


def test_pooling_says_what_it_cannot_pool() -> None:
    assert "there are 'x' FLOAT32 [2]" in fails("pooling", {}, floats("x", [1, 2]))
    hidden = floats("h", [[[1.0], [2.0]]])
    assert "masks every token" in fails("pooling", {"mask": "m"}, hidden, integers("m", [[0, 0]]))
    assert "integers of shape [1, 2]" in fails(
        "pooling", {"mask": "m"}, hidden, integers("m", [[1]])
    )
    assert "no tensor 'm'" in fails("pooling", {"mask": "m"}, hidden)


def test_top_k_sorts_and_is_stable() -> None:
    values, indices, labels = apply(
        "top_k", {"k": 3.0, "labels": ["a", "b", "c", "d"]}, floats("s", [[1, 3, 3, 2]])
    )
    assert array_of(values).tolist() == [[3, 3, 2]]
    assert array_of(indices).tolist() == [[1, 2, 3]]
    assert labels.data == ("b", "c", "d") and labels.shape == (1, 3)


def test_top_k_of_more_than_there_are_and_of_no_numbers() -> None:
    values, indices = apply("top_k", {"k": 9}, floats("s", [float("nan"), 1, -1]))
    assert array_of(indices).tolist() == [1, 2, 0]
    assert np.isnan(array_of(values)[2])


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30), st.integers(1, 40))
def test_top_k_is_what_sorting_gives(numbers: list[float], k: int) -> None:
    values, indices = apply("top_k", {"k": k}, floats("s", numbers))
    wanted = sorted(range(len(numbers)), key=lambda i: (-numbers[i], i))[:k]
    assert array_of(indices).tolist() == wanted
    assert array_of(values).tolist() == [numbers[i] for i in wanted]


def test_labels_become_text() -> None:
    (by_number,) = apply("label_to_text", {"labels": ["no", "yes"]}, integers("l", [[1, 0]]))
    assert by_number.data == ("yes", "no") and by_number.shape == (1, 2)
    names = {"labels": {"LABEL_0": "no"}, "default": "?", "output": "word"}
    (by_name,) = apply("label_to_text", names, text("l", "LABEL_0", "LABEL_7"))
    assert by_name.name == "word" and by_name.data == ("no", "?")
    assert "'5'" in fails("label_to_text", {"labels": ["no"]}, integers("l", [5]))


def test_a_template_is_filled_row_by_row() -> None:
    (filled,) = apply(
        "template",
        {"template": "{{{a}}} is {n}: {a}", "output": "prompt"},
        text("a", "x", "{n}"),
        integers("n", [1, 2]),
    )
    assert filled.name == "prompt"
    assert filled.data == ("{x} is 1: x", "{{n}} is 2: {n}"), "what is filled in is not read again"


def test_a_template_reaches_nothing_but_outputs() -> None:
    # A field is a name and nothing else: no attribute, no item, no format.
    for template in ("{a.__class__}", "{a[0]}", "{a!r}", "{a:>9}", "{0}"):
        assert "there is no tensor" in fails("template", {"template": template}, text("a", "x"))


def test_a_template_that_grows_too_long_is_refused() -> None:
    big = text("a", *["x" * 2000] * 100)
    assert "longer than" in fails("template", {"template": "{a}" * 10}, big)


@pytest.mark.parametrize(
    ("name", "parameters", "path"),
    [
        ("nothing", {}, "name"),
        ("pooling", {"mode": "sum"}, "parameters.mode"),
        ("pooling", {"what": 1}, "parameters.what"),
        ("top_k", {}, "parameters.k"),
        ("top_k", {"k": 0}, "parameters.k"),
        ("top_k", {"k": 1.5}, "parameters.k"),
        ("top_k", {"k": 1, "labels": [1]}, "parameters.labels.0"),
        ("label_to_text", {"labels": []}, "parameters"),
        ("template", {"template": "no field"}, "parameters"),
        ("template", {"template": "{a"}, "parameters"),
        ("template", {"template": "a}"}, "parameters"),
    ],
)
def test_what_is_wrong_with_parameters_is_told(
    name: str, parameters: Mapping[str, Any], path: str
) -> None:
    found = check_transform(Transform(name, parameters))
    assert [each for each, _ in found] == [path]


def test_names_of_transformations_are_unique() -> None:
    known = registered()["template"]
    with pytest.raises(ValueError, match="already"):
        register(Transformation("template", known.parameters, known.apply))


def test_outputs_are_renamed() -> None:
    tensors = (text("a", "1"), text("b", "2"))
    assert renamed(tensors, {}) == tensors
    (only,) = renamed(tensors, {"b": "x"})
    assert (only.name, only.data) == ("x", ("2",))
    (single,) = renamed(tensors[:1], {"": "x"})
    assert single.name == "x"
    with pytest.raises(TensorError, match="there are 'a', 'b'"):
        renamed(tensors, {"c": "x"})
    with pytest.raises(TensorError, match="the same name"):
        renamed(tensors, {"a": "x", "b": "x"})


# --- Answers that become one ----------------------------------------------------------------------


def answers(
    *outputs: tuple[TensorValue, ...], weights: tuple[float, ...] = ()
) -> list[MemberAnswer]:
    return [
        MemberAnswer(f"m{i}", weights[i] if weights else 1.0, each)
        for i, each in enumerate(outputs)
    ]


def test_a_mean_goes_by_weight_and_keeps_the_type() -> None:
    found = combined(
        "mean",
        answers((floats("y", [0, 4], DType.FLOAT16),), (floats("y", [8, 4]),), weights=(3.0, 1.0)),
    )
    assert [each.name for each in found] == ["y"]
    assert found[0].dtype is DType.FLOAT16 and array_of(found[0]).tolist() == [2, 4]


def test_a_vote_counts_weights_and_the_earlier_wins_a_tie() -> None:
    (won,) = combined(
        "vote",
        answers(
            (text("l", "x", "a"),),
            (text("l", "y", "b"),),
            (text("l", "y", "c"),),
            weights=(1.5, 1.0, 1.0),
        ),
    )
    assert won.data == ("y", "a")
    (number,) = combined("vote", answers((integers("l", [3, 1]),), (integers("l", [2, 1]),)))
    assert array_of(number).tolist() == [3, 1] and number.dtype is DType.INT64


def test_answers_are_put_behind_one_another() -> None:
    (row,) = combined(
        "concat", answers((floats("e", [[1], [2]]),), (floats("e", [[3, 4], [5, 6]]),))
    )
    assert array_of(row).tolist() == [[1, 3, 4], [2, 5, 6]]
    (words,) = combined(
        "concat",
        answers((text("t", "a", "b", shape=(2, 1)),), (text("t", "c", "d", shape=(2, 1)),)),
    )
    assert words.shape == (2, 2) and words.data == ("a", "c", "b", "d")


def test_all_answers_keep_whose_they_are() -> None:
    found = combined("all", answers((text("l", "a"),), (text("", "b"), text("s", "c"))))
    assert [each.name for each in found] == ["m0.l", "m1", "m1.s"]


@pytest.mark.parametrize(
    ("how", "first", "second", "match"),
    [
        ("mean", (text("y", "a"),), (text("y", "a"),), "a mean needs floating types"),
        ("mean", (floats("y", [1]),), (floats("y", [1, 2]),), r"\[2\], of m0 FLOAT32 \[1\]"),
        ("mean", (floats("y", [1]),), (floats("z", [1]),), "none of m1 has that name"),
        ("vote", (floats("y", [1]),), (floats("y", [1]),), "a vote needs"),
        ("vote", (text("y", "a"),), (integers("y", [1]),), "of one type"),
        ("concat", (floats("y", 1),), (floats("y", 1),), "do not go together"),
        ("concat", (floats("y", [1]),), (integers("y", [1]),), "do not go together"),
        (
            "mean",
            (floats("y", [1]),),
            (floats("y", [1]), floats("z", [1])),
            "answers with 1 outputs",
        ),
    ],
)
def test_answers_that_do_not_go_together_are_told(
    how: Combine, first: tuple[TensorValue, ...], second: tuple[TensorValue, ...], match: str
) -> None:
    with pytest.raises(TensorError, match=match):
        combined(how, answers(first, second))


@given(
    st.lists(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), min_size=2, max_size=5),
    st.data(),
)
def test_a_mean_is_the_mean(rows: list[list[float]], data: st.DataObject) -> None:
    weights = tuple(data.draw(st.floats(0.1, 10)) for _ in rows)
    (found,) = combined(
        "mean", answers(*[(floats("y", row, DType.FLOAT64),) for row in rows], weights=weights)
    )
    assert np.allclose(array_of(found), np.average(rows, axis=0, weights=weights), atol=1e-6)
