from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.support.tiny_models import (
    MLP_FACTORY,
    TinyMlp,
    make_tiny_bert,
    make_tiny_gpt2,
    make_tiny_masked_lm,
    make_tiny_mlp,
    make_tiny_vit,
)

from modelyard_server.runtimes.api import LoadedModel, ModelSpec
from modelyard_server.runtimes.hf.runtime import TransformersRuntime
from modelyard_server.runtimes.targets import Place
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue
from modelyard_server.runtimes.torch_runtime import TorchRuntime
from modelyard_server.weights.mapping import map_checkpoint
from modelyard_server.weights.safetensors_files import read_checkpoint
from modelyard_server.weights.storages import Spread, unique_storage_bytes


def test_parameters_and_buffers_are_counted() -> None:
    module = TinyMlp(inputs=8, hidden=16, outputs=4)
    assert unique_storage_bytes(module) == 4 * (8 * 16 + 16 + 16 * 4 + 4 + 4)


def test_tied_weights_are_counted_once() -> None:
    first, second = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    both = torch.nn.ModuleList([first, second])
    assert unique_storage_bytes(both) == 2 * 256
    second.weight = first.weight
    assert unique_storage_bytes(both) == 256


def test_a_view_counts_the_storage_it_keeps_alive() -> None:
    module = torch.nn.Module()
    whole = torch.zeros(100)
    module.register_buffer("a", whole[:10])
    module.register_buffer("b", whole[50:])
    assert unique_storage_bytes(module) == 400


def test_nothing_is_counted_on_meta() -> None:
    with torch.device("meta"):
        assert unique_storage_bytes(torch.nn.Linear(1_000, 1_000)) == 0


def test_mapped_tensors_count_what_they_map(tmp_path: Path) -> None:
    save_file({"a": torch.ones(10), "b": torch.ones(5)}, tmp_path / "model.safetensors")
    mapped = map_checkpoint(tmp_path, read_checkpoint(tmp_path), stop=lambda: False)
    module = torch.nn.Module()
    module.register_buffer("a", mapped.tensors["a"])
    assert unique_storage_bytes(module) == 40


def test_witnesses_die_with_the_module() -> None:
    module = TinyMlp()
    watched = Spread(home=0, home_name="cpu", devices=(0,), positions={}).witnesses(module)
    assert len(watched) == 1 + 4 + 1
    assert all(witness.reference() is not None for witness in watched)
    kept = module.first.weight
    del module
    # Negative control: what somebody still holds is seen.
    assert [witness.reference() is kept for witness in watched].count(True) == 1
    del kept
    assert all(witness.reference() is None for witness in watched)


def text(*texts: str) -> TensorValue:
    return TensorValue(name="text", dtype=DType.TEXT, shape=(len(texts),), data=texts)


def image(*shape: int) -> TensorValue:
    size = 1
    for dimension in shape:
        size *= dimension
    return TensorValue(name="image", dtype=DType.UINT8, shape=shape, data=bytes(size))


CASES = {
    "feature-extraction": (make_tiny_bert, text("the cat"), image(1, 2)),
    "fill-mask": (make_tiny_masked_lm, text("the [MASK]"), text("the")),
    "text-generation": (make_tiny_gpt2, text("the cat"), text("")),
    "image-classification": (make_tiny_vit, image(1, 16, 16, 3), image(1, 16, 16, 4)),
}


@pytest.fixture
def no_collector() -> Iterator[None]:
    # Memory must come back by reference counts alone: nobody may wait for the collector.
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def assert_released(model: LoadedModel) -> None:
    watched = model.witnesses()
    assert watched
    assert all(witness.reference() is not None for witness in watched)
    model.close()
    assert all(witness.reference() is None for witness in watched)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("task", CASES)
def test_a_closed_model_is_gone_after_good_and_bad_requests(tmp_path: Path, task: str) -> None:
    make, good, bad = CASES[task]
    spec = ModelSpec(
        name="m", runtime="transformers", task=task, folder=make(tmp_path / "m", seed=1)
    )
    model = TransformersRuntime().load(spec, place=Place.on("cpu"), stop=lambda: False)
    assert model.run((good,), {})
    with pytest.raises(TensorError) as caught:
        model.run((bad,), {})
    assert_released(model)
    assert caught.value.__traceback__ is not None


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("task", CASES)
def test_a_kept_failure_of_a_model_does_not_keep_the_model(tmp_path: Path, task: str) -> None:
    make, good, _ = CASES[task]
    spec = ModelSpec(
        name="m", runtime="transformers", task=task, folder=make(tmp_path / "m", seed=1)
    )
    model = TransformersRuntime().load(spec, place=Place.on("cpu"), stop=lambda: False)
    root = model.witnesses()[0].reference()
    assert root is not None
    for module in root.modules():
        if isinstance(module, torch.nn.LayerNorm):
            # A width that never fits: the failure comes from deep inside, through many frames.
            module.normalized_shape = (1_000,)
    del root, module
    with pytest.raises(RuntimeError) as caught:
        model.run((good,), {})
    assert_released(model)
    assert caught.value.__traceback__ is not None


@pytest.mark.usefixtures("no_collector")
def test_a_kept_failure_of_a_torch_model_does_not_keep_the_model(tmp_path: Path) -> None:
    runtime = TorchRuntime(allowed_factories=frozenset({MLP_FACTORY}))
    spec = ModelSpec(
        name="m",
        runtime="torch",
        folder=make_tiny_mlp(tmp_path / "m", seed=1),
        options={"factory": MLP_FACTORY, "factory_options": {"fails": True}},
    )
    model = runtime.load(spec, place=Place.on("cpu"), stop=lambda: False)
    value = TensorValue(name="x", dtype=DType.FLOAT32, shape=(1, 8), data=bytes(32))
    with pytest.raises(ArithmeticError) as caught:
        model.run((value,), {})
    assert_released(model)
    assert caught.value.__traceback__ is not None
