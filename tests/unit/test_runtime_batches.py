"""Models that answer several requests in one run: with the answers that each would have alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.tiny_models import (
    MLP_FACTORY,
    make_tiny_bert,
    make_tiny_gpt2,
    make_tiny_masked_lm,
    make_tiny_mlp,
    make_tiny_vit,
)

from modelyard_server.runtimes.api import (
    LoadedModel,
    ModelSpec,
    OptionError,
    Prepared,
)
from modelyard_server.runtimes.batches import RowsLost, split_rows
from modelyard_server.runtimes.conversion import to_torch, to_value
from modelyard_server.runtimes.hf.runtime import TransformersRuntime
from modelyard_server.runtimes.targets import Place
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue
from modelyard_server.runtimes.torch_runtime import TorchRuntime

REQUESTS = (
    ("the cat sat on the mat", "good dog"),
    ("i like this big red house or that blue river",),
    ("not bad", "a fish swam in the river", "the bird flew over a tree"),
)


def text(*texts: str) -> tuple[TensorValue, ...]:
    return (TensorValue(name="text", dtype=DType.TEXT, shape=(len(texts),), data=texts),)


def load(folder: Path, task: str, **options: Any) -> LoadedModel:
    spec = ModelSpec(name="m", runtime="transformers", task=task, folder=folder, options=options)
    return TransformersRuntime().load(spec, place=Place.on("cpu"), stop=lambda: False)


def load_torch(folder: Path, factory: str, **options: Any) -> LoadedModel:
    runtime = TorchRuntime(allowed_factories=frozenset({factory}))
    spec = ModelSpec(
        name="m", runtime="torch", folder=folder, options={"factory": factory} | options
    )
    runtime.check(spec)
    return runtime.load(spec, place=Place.on("cpu"), stop=lambda: False)


class Calls:
    """Counts the forward passes of a model, and their rows."""

    def __init__(self, model: Any) -> None:
        self.rows: list[int] = []
        module = getattr(model, "_held", None) or model._module
        module.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: Any, kwargs: Any) -> None:
        self.rows.append(len(next(iter((*args, *kwargs.values())))))


def together(
    model: LoadedModel, requests: Sequence[tuple[TensorValue, ...]], **parameters: Any
) -> Any:
    prepared = []
    for inputs in requests:
        one = model.prepare(inputs, parameters)
        assert one is not None
        prepared.append(one)
    assert len({one.key for one in prepared}) == 1
    return model.run_batch(prepared)


def check_same(answers: Any, alone: Any) -> None:
    assert len(answers) == len(alone)
    for outputs, expected in zip(answers, alone, strict=True):
        assert [(v.name, v.dtype, v.shape) for v in outputs] == [
            (v.name, v.dtype, v.shape) for v in expected
        ]
        for value, other in zip(outputs, expected, strict=True):
            if value.dtype is DType.FLOAT32:
                assert torch.allclose(to_torch(value), to_torch(other), atol=1e-5, rtol=0)
            else:
                assert value.data == other.data


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("bert"), seed=1)


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_masked_lm(tmp_path_factory.mktemp("mlm"), seed=2)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vit(tmp_path_factory.mktemp("vit"), seed=4)


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_mlp(tmp_path_factory.mktemp("mlp"), seed=5)


# --- Transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("feature-extraction", {}),
        ("feature-extraction", {"pooling": "cls", "normalize": True}),
        ("feature-extraction", {"pooling": "none"}),
    ],
    ids=str,
)
def test_texts_of_several_requests_share_one_pass(
    bert: Path, task: str, options: dict[str, Any]
) -> None:
    model = load(bert, task, **options)
    requests = [text(*texts) for texts in REQUESTS]
    alone = [model.run(inputs, {}) for inputs in requests]
    calls = Calls(model)
    check_same(together(model, requests), alone)
    assert calls.rows == [6]  # At most 12 tokens: padding is cheaper than another pass.


def test_fillings_of_several_requests_share_one_pass(masked_lm: Path) -> None:
    model = load(masked_lm, "fill-mask")
    requests = [text("the [MASK] sat", "a dog [MASK] in the big house"), text("[MASK] dog")]
    alone = [model.run(inputs, {"top_k": 3}) for inputs in requests]
    calls = Calls(model)
    check_same(together(model, requests, top_k=3), alone)
    assert calls.rows == [3]


def test_another_number_of_fillings_is_another_batch(masked_lm: Path) -> None:
    model = load(masked_lm, "fill-mask")
    keys = [
        one.key
        for parameters in ({}, {"top_k": 5}, {"top_k": 2})
        if (one := model.prepare(text("[MASK] dog"), parameters)) is not None
    ]
    assert keys[0] == keys[1] != keys[2]


def test_classes_of_several_requests_share_one_pass(tmp_path: Path) -> None:
    model = load(make_tiny_bert(tmp_path, seed=1, num_labels=3), "text-classification")
    requests = [text(*texts) for texts in REQUESTS]
    alone = [model.run(inputs, {}) for inputs in requests]
    calls = Calls(model)
    check_same(together(model, requests), alone)
    assert calls.rows == [6]


def test_a_batch_larger_than_the_models_batch_size_takes_several_passes(bert: Path) -> None:
    model = load(bert, "feature-extraction", batch_size=4)
    requests = [text(*texts) for texts in REQUESTS]
    alone = [model.run(inputs, {}) for inputs in requests]
    calls = Calls(model)
    check_same(together(model, requests), alone)
    assert sum(calls.rows) == 6
    assert max(calls.rows) <= 4


def test_long_and_short_texts_of_a_request_have_passes_of_their_own(bert: Path) -> None:
    model = load(bert, "feature-extraction", pooling="none")
    long = " ".join(["the cat sat on the mat"] * 8)
    alone = [model.run(text(one), {})[0] for one in ("good dog", long, "not bad")]
    calls = Calls(model)
    embeddings, mask = map(to_torch, model.run(text("good dog", long, "not bad"), {}))
    assert calls.rows == [2, 1]
    assert embeddings.shape[1] == 50
    assert mask.sum(1).tolist() == [4, 50, 4]
    for row, expected in zip(embeddings, alone, strict=True):
        own = to_torch(expected)[0]
        assert torch.allclose(row[: len(own)], own, atol=1e-5)
        assert not row[len(own) :].any()


def test_what_is_known_of_a_request_is_its_size_with_padding(bert: Path) -> None:
    prepared = load(bert, "feature-extraction", batch_size=7).prepare(text(*REQUESTS[0]), {})
    assert prepared is not None
    # Six words, and a token at each end.
    assert (prepared.rows, prepared.width, prepared.most_rows) == (2, 8, 7)
    assert prepared.row_bytes == 8 * 24
    assert prepared.pass_cost > 0


@pytest.mark.parametrize(
    ("inputs", "parameters", "error"),
    [
        (text(), {}, TensorError),
        (text("a dog"), {"top_k": 3}, OptionError),
        ((), {}, TensorError),
    ],
    ids=["no text", "parameter", "no input"],
)
def test_a_request_that_does_not_fit_is_refused_when_it_is_prepared(
    bert: Path, inputs: Any, parameters: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        load(bert, "feature-extraction").prepare(inputs, parameters)


def test_a_text_without_its_gap_is_refused_when_it_is_prepared(masked_lm: Path) -> None:
    with pytest.raises(TensorError, match="text 1 has 0 masks"):
        load(masked_lm, "fill-mask").prepare(text("[MASK] dog", "good dog"), {})


def test_writing_runs_alone(tmp_path: Path) -> None:
    model = load(make_tiny_gpt2(tmp_path, seed=3), "text-generation")
    assert model.prepare(text("the cat"), {}) is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_images_of_one_size_share_one_pass(vit: Path, dtype: torch.dtype) -> None:
    model: Any = load(vit, "image-classification")
    side = model._side[0]
    shape = (side + 2, side + 3, 3) if dtype is torch.uint8 else (3, side, side)
    generator = torch.Generator().manual_seed(7)
    requests = [
        (to_value("image", (torch.rand(n, *shape, generator=generator) * 255).to(dtype)),)
        for n in (1, 3)
    ]
    if dtype is torch.uint8 and model._preparation is None:
        pytest.skip("the tiny model takes prepared images only")
    alone = [model.run(inputs, {}) for inputs in requests]
    calls = Calls(model)
    check_same(together(model, requests), alone)
    assert calls.rows == [4]


def test_images_of_another_size_are_another_batch(vit: Path) -> None:
    model: Any = load(vit, "image-classification")
    side = model._side[0]
    one = model.prepare((to_value("image", torch.zeros(1, 3, side, side)),), {})
    assert one.key == model.prepare((to_value("image", torch.zeros(2, 3, side, side)),), {}).key
    assert (one.rows, one.row_bytes) == (1, 3 * side * side * 4)
    if model._preparation is not None:
        raw = torch.zeros(1, side, side, 3, dtype=torch.uint8)
        assert one.key != model.prepare((to_value("image", raw),), {}).key


def test_runs_that_are_shared_are_measured_as_what_they_are(bert: Path) -> None:
    spec = ModelSpec(name="m", runtime="transformers", task="feature-extraction", folder=bert)
    runtime = TransformersRuntime(predicts_runs=True)
    model = runtime.load(spec, place=Place.on("cpu"), stop=lambda: False)
    together(model, [text(*texts) for texts in REQUESTS])
    (point,) = model.take_measured()
    assert (point.batch, point.length) == (6, 12)
    assert point.size_bytes > 0


# --- Torch ----------------------------------------------------------------------------------------


class Mean(torch.nn.Module):
    """Answers one row whatever it is given: it must not share runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).mean(0, keepdim=True)


MEAN_FACTORY = "tests.unit.test_runtime_batches:Mean"


def numbers(*shape: int, name: str = "", seed: int = 0) -> TensorValue:
    return to_value(name, torch.rand(*shape, generator=torch.Generator().manual_seed(seed)))


def mlp_inputs(model: LoadedModel, rows: int, seed: int) -> tuple[TensorValue, ...]:
    module: Any = model
    width = next(module._module.parameters()).shape[1]
    return (numbers(rows, width, seed=seed),)


def test_a_torch_model_runs_alone_unless_its_options_say_otherwise(mlp: Path) -> None:
    model = load_torch(mlp, MLP_FACTORY)
    assert model.prepare(mlp_inputs(model, 1, 0), {}) is None


def test_rows_of_several_requests_share_one_call_of_a_torch_model(mlp: Path) -> None:
    model = load_torch(mlp, MLP_FACTORY, batch=True)
    requests = [mlp_inputs(model, rows, rows) for rows in (1, 2, 4)]
    alone = [model.run(inputs, {}) for inputs in requests]
    calls = Calls(model)
    check_same(together(model, requests), alone)
    assert calls.rows == [7]


def test_a_torch_models_batch_size_is_its_limit(mlp: Path) -> None:
    model = load_torch(mlp, MLP_FACTORY, batch=True, batch_size=5)
    prepared = model.prepare(mlp_inputs(model, 3, 0), {})
    assert prepared is not None
    assert (prepared.rows, prepared.most_rows) == (3, 5)
    assert prepared.row_bytes * 3 == len(mlp_inputs(model, 3, 0)[0].data)


def test_torch_inputs_of_another_kind_are_another_batch(mlp: Path) -> None:
    model = load_torch(mlp, MLP_FACTORY, batch=True)
    first, second = numbers(2, 3), numbers(2, 4)
    keys = []
    for inputs in (
        (first,),
        (second,),
        (numbers(2, 3, name="x"),),
        (to_value("", torch.zeros(2, 3, dtype=torch.float64)),),
    ):
        prepared = model.prepare(inputs, {})
        assert prepared is not None
        keys.append(prepared.key)
    assert len(set(keys)) == 4


def test_torch_inputs_without_common_rows_run_alone(mlp: Path) -> None:
    model = load_torch(mlp, MLP_FACTORY, batch=True)
    a, b = numbers(2, 3, name="a"), numbers(1, 3, name="b")
    assert model.prepare((a, b), {}) is None
    assert model.prepare((numbers(0, 3),), {}) is None
    assert model.prepare((to_value("", torch.tensor(1.0)),), {}) is None


def test_torch_requests_are_checked_when_they_are_prepared(mlp: Path) -> None:
    model = load_torch(mlp, MLP_FACTORY, batch=True)
    with pytest.raises(OptionError):
        model.prepare((numbers(1, 3),), {"k": 1})
    with pytest.raises(TensorError):
        model.prepare(text("a"), {})
    with pytest.raises(TensorError):
        model.prepare((numbers(1, 3), numbers(1, 3)), {})


def test_a_model_that_is_not_row_by_row_gives_nobody_a_wrong_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import save_file

    save_file(Mean().state_dict(), tmp_path / "model.safetensors")
    model = load_torch(tmp_path, MEAN_FACTORY, batch=True)
    requests = [(numbers(1, 3, seed=seed),) for seed in range(3)]
    with pytest.raises(RowsLost):
        together(model, requests)
    assert "batch = true" in caplog.text
    # It will not be tried again.
    assert model.prepare(requests[0], {}) is None
    alone = model.run(requests[0], {})
    assert torch.allclose(to_torch(alone[0]), to_torch(requests[0][0]))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"batch": 1}, "batch"),
        ({"batch_size": 4}, "batch_size"),
        ({"batch": True, "batch_size": 0}, "batch_size"),
    ],
    ids=str,
)
def test_options_of_batches_are_checked(mlp: Path, options: dict[str, Any], name: str) -> None:
    with pytest.raises(OptionError) as caught:
        load_torch(mlp, MLP_FACTORY, **options)
    assert caught.value.option == name


# --- Rows -----------------------------------------------------------------------------------------


def test_rows_go_back_to_whom_they_are_of() -> None:
    outputs = (
        TensorValue(name="a", dtype=DType.INT16, shape=(3, 2), data=bytes(range(12))),
        TensorValue(name="b", dtype=DType.TEXT, shape=(3,), data=("x", "y", "z")),
        TensorValue(
            name="c", dtype=DType.BYTES, shape=(3, 2), data=(b"1", b"2", b"3", b"4", b"5", b"6")
        ),
        TensorValue(name="d", dtype=DType.FLOAT32, shape=(3, 0), data=b""),
    )
    first, second = split_rows(outputs, [1, 2])
    assert [value.data for value in first] == [bytes(range(4)), ("x",), (b"1", b"2"), b""]
    assert [value.data for value in second] == [
        bytes(range(4, 12)),
        ("y", "z"),
        (b"3", b"4", b"5", b"6"),
        b"",
    ]
    assert [value.shape for value in second] == [(2, 2), (2,), (2, 2), (2, 0)]
    assert [value.name for value in first] == list("abcd")


@pytest.mark.parametrize("shape", [(2,), (4,), ()])
def test_rows_that_are_missing_or_too_many_are_told(shape: tuple[int, ...]) -> None:
    output = to_value("a", torch.zeros(shape))
    for rows in ([1, 2], [3]):
        with pytest.raises(RowsLost, match="'a'"):
            split_rows((output,), rows)


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"most_rows": 0}])
def test_a_request_without_rows_cannot_be_prepared(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Prepared(key=(), content=None, **({"rows": 1, "most_rows": 1} | wrong))
