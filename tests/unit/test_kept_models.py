"""Models whose weights are kept when they leave, and come back from there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.support.sharing import make_family
from tests.support.tiny_models import MLP_FACTORY, make_tiny_bert, make_tiny_gpt2, make_tiny_mlp

from modelyard_server.runtimes.api import LoadedModel, LoadSource, ModelSpec, Runtime
from modelyard_server.runtimes.conversion import to_torch, to_value
from modelyard_server.runtimes.hf.runtime import TransformersRuntime
from modelyard_server.runtimes.targets import DISK, Place, Target
from modelyard_server.runtimes.tensors import DType, TensorValue
from modelyard_server.runtimes.torch_runtime import TorchRuntime
from modelyard_server.weights.holding import WeightPool
from modelyard_server.weights.pages import are_cached
from modelyard_server.weights.store import WeightStore

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


class Yard:
    """Both runtimes over one store and one pool."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = WeightPool()
        self.store = WeightStore.open(folder)
        self.transformers = TransformersRuntime(store=self.store, pool=self.pool)
        self.torch = TorchRuntime(
            allowed_factories=frozenset({SELFISH, MLP_FACTORY}), store=self.store, pool=self.pool
        )

    def load(self, spec: ModelSpec, place: Place | None = None) -> LoadedModel:
        runtime: Runtime = self.torch if spec.runtime == "torch" else self.transformers
        return runtime.load(spec, place=place or Place.on("cpu"), stop=lambda: False)

    def packs(self) -> list[Path]:
        """The files of the store, those that hold weights among them."""
        return [
            path for path in self.folder.rglob("*") if path.is_file() and path.stat().st_size > 100
        ]

    def drop(self) -> None:
        """Throws them out of the page cache."""
        for path in self.packs():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                if are_cached(descriptor, 0, path.stat().st_size):
                    pytest.skip("this file system keeps its pages in memory")
            finally:
                os.close(descriptor)

    def warm(self) -> None:
        """Reads them."""
        for path in self.packs():
            path.read_bytes()


@pytest.fixture
def yard(tmp_path: Path) -> Yard:
    return Yard(tmp_path / "store")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def classifier(folder: Path) -> ModelSpec:
    return ModelSpec(name="m", runtime="transformers", task="text-classification", folder=folder)


def module_of(model: LoadedModel) -> torch.nn.Module:
    module = vars(model).get("_held") or vars(model)["_module"]
    assert isinstance(module, torch.nn.Module)
    return module


def weights_of(model: LoadedModel) -> dict[str, torch.Tensor]:
    """Copies of all its tensors; tied ones by each of their names."""
    return {name: tensor.clone() for name, tensor in module_of(model).state_dict().items()}


def assert_same(model: LoadedModel, expected: dict[str, torch.Tensor]) -> None:
    found = module_of(model).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def bert(folder: Path) -> ModelSpec:
    return classifier(make_tiny_bert(folder, seed=1, num_labels=2))


def gpt2(folder: Path) -> ModelSpec:
    return ModelSpec(
        name="m",
        runtime="transformers",
        task="text-generation",
        folder=make_tiny_gpt2(folder, seed=2),
    )


def mlp(folder: Path) -> ModelSpec:
    options = {"factory": MLP_FACTORY}
    return ModelSpec(
        name="m", runtime="torch", folder=make_tiny_mlp(folder, seed=3), options=options
    )


def selfish(folder: Path) -> ModelSpec:
    folder.mkdir()
    save_file({"linear.weight": torch.randn(8, 8)}, folder / "model.safetensors")
    return ModelSpec(name="m", runtime="torch", folder=folder, options={"factory": SELFISH})


@pytest.mark.parametrize("make", [bert, gpt2, mlp, selfish])
def test_a_model_comes_back_from_its_copy_as_it_was(
    yard: Yard, tmp_path: Path, make: Callable[[Path], ModelSpec]
) -> None:
    spec = make(tmp_path / "a")
    model = yard.load(spec)
    weights = weights_of(model)
    (shared,) = model.shared_bytes().values()
    measured = model.measured_bytes()
    copy = model.keep()
    assert copy is not None
    assert copy.shared == shared
    assert copy.own_bytes == -sum(shared.values()) % 4096
    assert yard.pool.copies_bytes == sum(shared.values()) + copy.own_bytes
    assert model.measured_bytes() == measured
    assert_same(model, weights)
    model.close()
    assert model.keep() is None
    # One of these reads as much from its file as there is in its copy: it has tensors of its own.
    source = LoadSource.PAGE_CACHE if make is selfish else LoadSource.COPY
    for _ in range(2):
        model = yard.load(spec)
        assert model.source is source
        assert_same(model, weights)
        assert model.measured_bytes() == measured
        assert list(model.shared_bytes().values()) == [shared]
        again = model.keep()
        assert again is not None
        assert yard.pool.copies_bytes == sum(shared.values()) + copy.own_bytes
        again.release()
        model.close()
    model = yard.load(spec)
    copy.release()
    assert (copy.is_held, yard.pool.copies_bytes) == (False, 0)
    assert_same(model, weights)
    model.close()
    assert yard.load(spec).source is not LoadSource.COPY


def test_tied_weights_come_back_tied(yard: Yard, tmp_path: Path) -> None:
    for make, first, second in (
        (gpt2, "transformer.wte.weight", "lm_head.weight"),
        (selfish, "linear.weight", "tied.weight"),
    ):
        spec = make(tmp_path / first)
        model = yard.load(spec)
        copy = model.keep()
        assert copy is not None
        model.close()
        model = yard.load(spec)
        assert (model.source is LoadSource.COPY) == (make is gpt2)
        tensors = module_of(model).state_dict()
        assert tensors[first].data_ptr() == tensors[second].data_ptr()
        del tensors
        model.close()
        copy.release()


def test_a_fine_tune_finds_its_encoder_in_the_copy_of_another(yard: Yard, tmp_path: Path) -> None:
    first, second = (classifier(folder) for folder in make_family(tmp_path, ["a", "b"], seed=4))
    expected = yard.load(second)
    weights, answer = weights_of(expected), to_torch(expected.run(TEXT, {})[2])
    (theirs,) = expected.shared_bytes().values()
    expected.close()
    model = yard.load(first)
    (shared,) = model.shared_bytes().values()
    copy = model.keep()
    model.close()
    assert copy is not None
    tuned = yard.load(second)
    assert tuned.source is LoadSource.COPY
    assert_same(tuned, weights)
    assert torch.allclose(to_torch(tuned.run(TEXT, {})[2]), answer, atol=1e-6)
    other = tuned.keep()
    tuned.close()
    assert other is not None
    assert other.shared == theirs
    union = sum((dict(shared) | dict(theirs)).values())
    assert union < sum(shared.values()) + sum(theirs.values())
    assert union <= yard.pool.copies_bytes <= union + copy.own_bytes + other.own_bytes
    copy.release()
    assert not copy.is_held
    remains = sum(theirs.values())
    assert remains <= yard.pool.copies_bytes <= remains + other.own_bytes
    tuned = yard.load(second)
    assert tuned.source is LoadSource.COPY
    assert_same(tuned, weights)
    other.release()
    assert yard.pool.copies_bytes == 0


def test_models_that_hold_nothing_together_with_others_are_not_kept(
    yard: Yard, tmp_path: Path
) -> None:
    folder = make_tiny_bert(tmp_path / "a", seed=1, num_labels=2)
    other = make_tiny_bert(tmp_path / "b", seed=1, num_labels=2)
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"float32"', '"bfloat16"'))
    converted = yard.load(classifier(other))
    assert module_of(converted).state_dict()["classifier.weight"].dtype is torch.bfloat16
    assert converted.keep() is None
    parts = Place(
        target=Target(home=0, parts=(("bert", 1), ("classifier", 0))),
        torch_devices={0: "cpu", 1: DISK},
    )
    in_parts = yard.load(classifier(folder), parts)
    assert in_parts.keep() is None
    in_place = TransformersRuntime().load(
        classifier(folder), place=Place.on("cpu"), stop=lambda: False
    )
    assert in_place.keep() is None
    assert yard.pool.copies_bytes == 0


@pytest.mark.parametrize("make", [bert, mlp, selfish])
def test_a_first_load_and_a_later_one_say_where_the_files_were(
    yard: Yard, tmp_path: Path, make: Callable[[Path], ModelSpec]
) -> None:
    spec = make(tmp_path / "a")
    runtime = yard.torch if spec.runtime == "torch" else yard.transformers
    runtime.price(spec)
    # The first load learns from a module that is built over the files, and then loads again.
    for _ in range(3):
        yard.drop()
        model = yard.load(spec)
        assert model.source is LoadSource.STORAGE
        joined = yard.load(spec)
        if make is not selfish:
            assert joined.source is LoadSource.PAGE_CACHE
        joined.close()
        model.close()
        yard.warm()
        model = yard.load(spec)
        assert model.source is LoadSource.PAGE_CACHE
        model.close()


def test_a_model_in_parts_says_where_the_files_were(yard: Yard, tmp_path: Path) -> None:
    spec = bert(tmp_path / "a")
    parts = Place(
        target=Target(home=0, parts=(("bert", 1), ("classifier", 0))),
        torch_devices={0: "cpu", 1: "cpu"},
    )
    yard.transformers.price(spec)
    for _ in range(2):
        yard.drop()
        model = yard.load(spec, parts)
        assert model.source is LoadSource.STORAGE
        assert model.shared_bytes() == {}
        model.close()
        yard.warm()
        model = yard.load(spec, parts)
        assert model.source is LoadSource.PAGE_CACHE
        model.close()


def test_what_a_model_writes_to_is_not_part_of_its_copy(yard: Yard, tmp_path: Path) -> None:
    spec = mlp(tmp_path / "a")
    model = yard.load(spec)
    before = to_torch(model.run((to_value("x", torch.ones(2, 8)),), {})[0])
    copy = model.keep()
    assert copy is not None
    for buffer in module_of(model).buffers():
        buffer.zero_()
    model.close()
    model = yard.load(spec)
    assert model.source is LoadSource.COPY
    after = to_torch(model.run((to_value("x", torch.ones(2, 8)),), {})[0])
    assert torch.allclose(before, after, atol=1e-6)
    copy.release()
