"""Runs of the runtimes' models that are measured: as predicted, once, and with the same answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.faulty_models import make_weights
from tests.support.measured_modules import FACTORIES
from tests.support.tiny_models import (
    make_tiny_bert,
    make_tiny_gpt2,
    make_tiny_masked_lm,
    make_tiny_vit,
)

from modelyard_server.runtimes.api import LoadedModel, ModelSpec, Price, Runtime
from modelyard_server.runtimes.hf import text
from modelyard_server.runtimes.hf.runtime import TransformersRuntime
from modelyard_server.runtimes.registry import make_runtimes
from modelyard_server.runtimes.targets import Place
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue

TEXTS = ("the cat sat on the mat " * 4, "a dog ran", "the dog sat")


def texts(*rows: str) -> TensorValue:
    return TensorValue(name="text", dtype=DType.TEXT, shape=(len(rows),), data=rows)


def pictures(side: int = 16, count: int = 3) -> TensorValue:
    data = bytes(i % 251 for i in range(count * side * side * 3))
    shape = (count, side, side, 3)
    return TensorValue(name="image", dtype=DType.UINT8, shape=shape, data=data)


def encoder(folder: Path) -> Path:
    return make_tiny_bert(folder, seed=1)


def classifier(folder: Path) -> Path:
    return make_tiny_bert(folder, seed=1, num_labels=3)


def masked_lm(folder: Path) -> Path:
    return make_tiny_masked_lm(folder, seed=1)


def gpt2(folder: Path) -> Path:
    return make_tiny_gpt2(folder, seed=1)


def vit(folder: Path) -> Path:
    preparation = {"size": {"height": 16, "width": 16}, "do_resize": True}
    return make_tiny_vit(folder, seed=1, preprocessor=preparation)


def loaded(runtime: Runtime, spec: ModelSpec) -> LoadedModel:
    return runtime.load(spec, place=Place.on("cpu"), stop=lambda: False)


TASKS: list[tuple[str, Callable[[Path], Path], TensorValue, dict[str, Any]]] = [
    ("feature-extraction", encoder, texts(*TEXTS), {}),
    ("text-classification", classifier, texts(*TEXTS), {}),
    ("fill-mask", masked_lm, texts("the [MASK] sat", "a dog [MASK]"), {}),
    ("text-generation", gpt2, texts(*TEXTS), {"max_new_tokens": 6}),
    (
        "text-generation",
        gpt2,
        texts(*TEXTS),
        {"max_new_tokens": 6, "temperature": 0.8, "top_p": 0.9, "seed": 3},
    ),
    ("image-classification", vit, pictures(), {}),
    ("image-classification", vit, pictures(side=40), {}),
]
EACH = pytest.mark.parametrize(("task", "make", "value", "parameters"), TASKS)


@EACH
def test_answers_are_the_same_to_the_bit_and_runs_take_what_was_predicted(
    tmp_path: Path,
    task: str,
    make: Callable[[Path], Path],
    value: TensorValue,
    parameters: dict[str, Any],
) -> None:
    spec = ModelSpec(
        name="m",
        runtime="transformers",
        task=task,
        folder=make(tmp_path / "m"),
        options={"batch_size": 2},
    )
    expected = loaded(TransformersRuntime(), spec).run((value,), parameters)
    runtime = TransformersRuntime(predicts_runs=True)
    price = runtime.price(spec)
    model = loaded(runtime, spec)
    assert model.run((value,), parameters) == expected
    points = model.take_measured()
    # Three rows are two passes, of two rows and of one.
    assert [point.batch for point in points] == ([2, 1] if value.shape[0] == 3 else [2])
    assert price.runs is not None
    for point in points:
        predicted = price.runs.model.predict(point.batch, point.length)
        assert 0 < point.size_bytes <= 1.05 * predicted
    assert model.run((value,), parameters) == expected
    assert model.take_measured() == ()
    model.close()


def test_a_runtime_that_predicts_nothing_measures_nothing(tmp_path: Path) -> None:
    spec = ModelSpec(
        name="m",
        runtime="transformers",
        task="feature-extraction",
        folder=encoder(tmp_path / "m"),
    )
    model = loaded(TransformersRuntime(), spec)
    model.run((texts("a dog ran"),), {})
    assert model.take_measured() == ()


def test_fine_tunes_of_one_architecture_are_measured_once(tmp_path: Path) -> None:
    runtime = TransformersRuntime(predicts_runs=True)
    specs = [
        ModelSpec(
            name=f"m{seed}",
            runtime="transformers",
            task="text-classification",
            folder=make_tiny_bert(tmp_path / f"m{seed}", seed=seed, num_labels=3),
        )
        for seed in range(2)
    ]
    prices: list[Price] = [runtime.price(spec) for spec in specs]
    assert prices[0].runs is prices[1].runs
    assert prices[0].runs is not None
    assert prices[0].runs.key
    measured = []
    for spec in specs:
        model = loaded(runtime, spec)
        model.run((texts("a dog ran"),), {})
        measured.append(len(model.take_measured()))
    assert measured == [1, 0]


def test_of_writing_the_first_token_is_measured_however_many_follow(tmp_path: Path) -> None:
    folder = gpt2(tmp_path / "m")
    points = []
    for new_tokens in (1, 30):
        runtime = TransformersRuntime(predicts_runs=True)
        spec = ModelSpec(name="m", runtime="transformers", task="text-generation", folder=folder)
        model = loaded(runtime, spec)
        model.run((texts("a dog ran"),), {"max_new_tokens": new_tokens})
        points.append(model.take_measured())
    assert len(points[0]) == 1
    assert points[0] == points[1]


def test_a_run_that_fails_in_its_second_batch_tells_nothing_of_its_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = TransformersRuntime(predicts_runs=True)
    spec = ModelSpec(
        name="m",
        runtime="transformers",
        task="text-classification",
        folder=classifier(tmp_path / "m"),
        options={"batch_size": 2},
    )
    model = loaded(runtime, spec)
    forward = text.TextClassifier._forward
    passes = []

    def failing(self: Any, batch: Any) -> Any:
        passes.append(len(batch.ids))
        if len(passes) == 2:
            raise ArithmeticError("asked to fail")
        return forward(self, batch)

    monkeypatch.setattr(text.TextClassifier, "_forward", failing)
    with pytest.raises(ArithmeticError):
        model.run((texts(*TEXTS),), {})
    assert model.take_measured() == ()
    model.run((texts(*TEXTS),), {})
    assert [point.batch for point in model.take_measured()] == [2, 1]


def test_pictures_that_are_larger_than_the_model_s_own_are_of_other_buckets(
    tmp_path: Path,
) -> None:
    runtime = TransformersRuntime(predicts_runs=True)
    spec = ModelSpec(
        name="m", runtime="transformers", task="image-classification", folder=vit(tmp_path / "m")
    )
    model = loaded(runtime, spec)
    lengths = []
    for side in (16, 40, 160):
        model.run((pictures(side=side, count=1),), {})
        lengths += [point.length for point in model.take_measured()]
    assert lengths == [1, 7, 100]


class TestTorch:
    def spec(self, folder: Path) -> ModelSpec:
        make_weights(folder)
        options = {"factory": FACTORIES[0], "factory_options": {"width": 1000}}
        return ModelSpec(name="m", runtime="torch", folder=folder, options=options)

    def numbers(self, *shape: int) -> TensorValue:
        size = 1
        for dimension in shape:
            size *= dimension
        return TensorValue(name="x", dtype=DType.FLOAT32, shape=shape, data=bytes(4 * size))

    def test_modules_are_measured_by_rows_and_numbers_a_row(self, tmp_path: Path) -> None:
        runtime = make_runtimes(frozenset(FACTORIES), predicts_runs=True)["torch"]
        spec = self.spec(tmp_path / "m")
        price = runtime.price(spec)
        assert price.activation_bytes == 0
        assert price.runs is not None
        assert price.runs.key.startswith("torch:")
        model = loaded(runtime, spec)
        for shape in ((1, 4), (1, 4), (3, 2, 2), (8, 4), (1, 5)):
            model.run((self.numbers(*shape),), {})
        points = model.take_measured()
        assert [point[:2] for point in points] == [(1, 4), (3, 4), (8, 4), (1, 5)]
        assert all(4_000 * point.batch <= point.size_bytes for point in points)

    def test_inputs_of_no_rows_and_no_dimensions_are_measured_too(self, tmp_path: Path) -> None:
        runtime = make_runtimes(frozenset(FACTORIES), predicts_runs=True)["torch"]
        model = loaded(runtime, self.spec(tmp_path / "m"))
        with pytest.raises(TypeError):  # Of the module, which takes the length of a number.
            model.run((self.numbers(),), {})
        with pytest.raises(IndexError):
            model.run((self.numbers(0, 4),), {})
        with pytest.raises(TensorError):
            model.run((replace(self.numbers(1, 4), name="unknown"),), {})
        assert model.take_measured() == ()
        model.run((self.numbers(1),), {})
        assert [point[:2] for point in model.take_measured()] == [(1, 1)]

    def test_it_measures_only_where_it_is_to(self, tmp_path: Path) -> None:
        runtime = make_runtimes(frozenset(FACTORIES))["torch"]
        spec = self.spec(tmp_path / "m")
        assert runtime.price(spec).runs is None
        model = loaded(runtime, spec)
        model.run((self.numbers(1, 4),), {})
        assert model.take_measured() == ()
