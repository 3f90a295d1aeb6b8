"""Loads by a template onto accelerators: tensors are there once, and all of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.support.fakegpu import FakeGpu
from tests.support.fakegpu import load as load_fakegpu
from tests.support.tiny_models import make_tiny_bert

from modelyard_server.runtimes.api import LoadedModel, ModelSpec, Witness
from modelyard_server.runtimes.conversion import to_torch, to_value
from modelyard_server.runtimes.hf.runtime import TransformersRuntime
from modelyard_server.runtimes.targets import Place
from modelyard_server.runtimes.tensors import DType, TensorValue
from modelyard_server.runtimes.torch_runtime import TorchRuntime
from modelyard_server.weights.holding import WeightPool
from modelyard_server.weights.store import WeightStore

PLACE = Place.on("fakegpu:0")
TEXT = (TensorValue(name="text", dtype=DType.TEXT, shape=(1,), data=("the cat",)),)
SELFISH = f"{__name__}:Selfish"


class Selfish(torch.nn.Module):
    """Refers to itself, so that it cannot be cloned; its two layers are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8, bias=False)
        self.tied = torch.nn.Linear(8, 8, bias=False)
        self.tied.weight = self.linear.weight
        self.parts = [self.linear, self.tied]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.parts[1](self.parts[0](x))
        return result


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    gpu = load_fakegpu()
    gpu.reset()
    yield gpu
    gc.collect()
    assert gpu.used_bytes(0) == 0
    gpu.reset()


def answer(model: LoadedModel) -> torch.Tensor:
    return to_torch(model.run(TEXT, {})[2])


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_clones_are_on_the_device_and_what_they_share_is_there_once(
    gpu: FakeGpu, tmp_path: Path, dtype: str | None
) -> None:
    folder = make_tiny_bert(tmp_path / "a", seed=1, num_labels=2)
    if dtype is not None:
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace('"float32"', f'"{dtype}"'))
    spec = ModelSpec(name="m", runtime="transformers", task="text-classification", folder=folder)
    pool = WeightPool()
    runtime = TransformersRuntime(store=WeightStore.open(tmp_path / "store"), pool=pool)
    on_host = runtime.load(spec, place=Place.on("cpu"), stop=lambda: False)
    price = runtime.price(spec)
    models = []
    for count in (1, 2, 3):
        model = runtime.load(spec, place=PLACE, stop=lambda: False)
        models.append(model)
        tensors = [witness.reference() for witness in model.witnesses()[1:]]
        devices = {str(found.device) for found in tensors if isinstance(found, torch.Tensor)}
        assert devices == {"fakegpu:0"}
        del tensors
        assert torch.allclose(answer(model), answer(on_host), atol=1e-2 if dtype else 1e-5)
        assert model.measured_bytes() == {0: price.resting_bytes}
        shared = sum(price.shared.values())
        own = price.resting_bytes - shared
        assert (shared == 0) == (dtype is not None)
        assert 0 <= gpu.used_bytes(0) - shared - count * own < 256 * len(model.witnesses())
    every: list[Witness] = []
    for model in models:
        every += (witnesses := model.witnesses())
        model.close()
        # What others keep is the allocation, not a tensor of this model.
        alive = [found for witness in witnesses if (found := witness.reference()) is not None]
        assert not any(isinstance(found, torch.Tensor | torch.nn.Module) for found in alive)
        del alive
    assert not any(witness.reference() is not None for witness in every)
    assert gpu.used_bytes(0) == 0
    on_host.close()


def test_what_cannot_be_cloned_is_moved_onto_shared_tensors(gpu: FakeGpu, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    module = Selfish()
    save_file({"linear.weight": module.linear.weight.detach()}, folder / "model.safetensors")
    runtime = TorchRuntime(
        allowed_factories=frozenset({SELFISH}), store=WeightStore.open(tmp_path / "store")
    )
    spec = ModelSpec(name="m", runtime="torch", folder=folder, options={"factory": SELFISH})
    x = torch.rand(2, 8)
    models = [runtime.load(spec, place=PLACE, stop=lambda: False) for _ in range(3)]
    assert gpu.used_bytes(0) == 256
    for model in models:
        assert torch.allclose(to_torch(model.run((to_value("x", x),), {})[0]), module(x), atol=1e-5)
        assert model.measured_bytes() == {0: 256}
        assert [sum(sizes.values()) for sizes in model.shared_bytes().values()] == [256]
        model.close()
    del model, models
