"""Loads by a template: what is shared, what is not, and that nothing is left behind."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.support.tiny_models import (
    MLP_FACTORY,
    make_tiny_bert,
    make_tiny_gpt2,
    make_tiny_masked_lm,
    make_tiny_mlp,
    make_tiny_vit,
)

from modelyard_server.runtimes.api import (
    LoadCancelled,
    LoadedModel,
    ModelFilesError,
    ModelSpec,
    Runtime,
)
from modelyard_server.runtimes.conversion import to_torch, to_value
from modelyard_server.runtimes.hf import loading
from modelyard_server.runtimes.hf import runtime as hf_runtime
from modelyard_server.runtimes.hf.runtime import TransformersRuntime
from modelyard_server.runtimes.registry import make_runtimes
from modelyard_server.runtimes.targets import DISK, Place, Target
from modelyard_server.runtimes.tensors import DType, TensorValue
from modelyard_server.runtimes.torch_runtime import TorchRuntime
from modelyard_server.weights.holding import WeightPool
from modelyard_server.weights.store import WeightStore

HEAD = "text-classification"


class Yard:
    """A runtime with a store and a pool, and how often the library has built a module."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pool = WeightPool()
        self.store = WeightStore.open(folder)
        self.lock = threading.Lock()
        self.runtime = TransformersRuntime(
            construction_lock=self.lock, store=self.store, pool=self.pool
        )
        self.builds = 0
        build = loading._build

        def counting(plan: Any, weights: Any) -> Any:
            self.builds += 1
            return build(plan, weights)

        monkeypatch.setattr(loading, "_build", counting)

    def load(self, folder: Path, task: str = HEAD, **options: Any) -> LoadedModel:
        spec = spec_of(folder, task, **options)
        return self.runtime.load(spec, place=Place.on("cpu"), stop=lambda: False)


@pytest.fixture
def yard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Yard:
    return Yard(tmp_path / "store", monkeypatch)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spec_of(folder: Path, task: str = HEAD, **options: Any) -> ModelSpec:
    return ModelSpec(name="m", runtime="transformers", task=task, folder=folder, options=options)


def text(*texts: str) -> tuple[TensorValue, ...]:
    return (TensorValue(name="text", dtype=DType.TEXT, shape=(len(texts),), data=texts),)


def probabilities(model: LoadedModel, *texts: str) -> torch.Tensor:
    outputs = {value.name: value for value in model.run(text(*(texts or ("the cat",))), {})}
    return to_torch(outputs["probabilities"])


def labels(model: LoadedModel) -> tuple[Any, ...]:
    return tuple(model.run(text("the cat"), {})[0].data)


def module_of(model: LoadedModel) -> Any:
    module = vars(model).get("_held") or vars(model)["_module"]
    assert isinstance(module, torch.nn.Module)
    return module


def expected(yard: Yard, folder: Path) -> torch.Tensor:
    """What a runtime answers that has met no other model.

    From the same store, because sums depend on how the weights are aligned in memory.
    """
    runtime = TransformersRuntime(store=yard.store)
    builds = yard.builds
    model = runtime.load(spec_of(folder), place=Place.on("cpu"), stop=lambda: False)
    yard.builds = builds
    return probabilities(model)


def fine_tune(folder: Path, target: Path, *, scale: float) -> Path:
    """A model with the same encoder and another head."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(target / "model.safetensors")
    weights["classifier.weight"] = weights["classifier.weight"] * scale
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_the_library_builds_an_architecture_once(yard: Yard, tmp_path: Path) -> None:
    folders = [make_tiny_bert(tmp_path / str(seed), seed=seed, num_labels=2) for seed in range(4)]
    answers = [probabilities(yard.load(folder)) for folder in folders]
    for folder, answer in zip(folders, answers, strict=True):
        assert torch.equal(answer, expected(yard, folder))
    assert yard.builds == 1


def test_later_loads_do_not_wait_for_the_construction_lock(yard: Yard, tmp_path: Path) -> None:
    folder = make_tiny_bert(tmp_path / "a", seed=1, num_labels=2)
    yard.load(folder).close()
    with yard.lock:
        assert probabilities(yard.load(folder)).shape == (1, 2)


def test_labels_are_those_of_the_model_and_make_no_other_architecture(
    yard: Yard, tmp_path: Path
) -> None:
    one = make_tiny_bert(tmp_path / "one", seed=1, labels=["yes", "no"])
    two = make_tiny_bert(tmp_path / "two", seed=1, labels=["ham", "spam"])
    models = [yard.load(one), yard.load(two), yard.load(one)]
    assert yard.builds == 1
    found = [labels(model)[0] for model in models]
    assert found[0] in ("yes", "no")
    assert found[1] == {"yes": "ham", "no": "spam"}[found[0]]
    assert found[2] == found[0]
    configs = [module_of(model).config for model in models]
    assert configs[1].label2id == {"ham": 0, "spam": 1}
    assert len({id(config) for config in configs}) == 3
    for model, config in zip(models, configs, strict=True):
        assert all(getattr(part, "config", config) is config for part in module_of(model).modules())


def test_another_number_of_labels_is_another_architecture(yard: Yard, tmp_path: Path) -> None:
    for count in (2, 3):
        folder = make_tiny_bert(tmp_path / str(count), seed=1, num_labels=count)
        assert probabilities(yard.load(folder)).shape == (1, count)
    assert yard.builds == 2


@pytest.mark.parametrize("setting", ["layer_norm_eps", "hidden_act"])
def test_settings_that_change_answers_are_no_other_ones_template(
    setting: str, yard: Yard, tmp_path: Path
) -> None:
    one = make_tiny_bert(tmp_path / "one", seed=1, num_labels=2)
    two = fine_tune(one, tmp_path / "two", scale=1)
    config = json.loads((two / "config.json").read_text())
    config[setting] = {"layer_norm_eps": 0.5, "hidden_act": "relu"}[setting]
    (two / "config.json").write_text(json.dumps(config))
    answers = [probabilities(yard.load(folder)) for folder in (one, two)]
    assert not torch.equal(*answers)
    assert torch.equal(answers[1], expected(yard, two))


def test_fine_tunes_hold_their_encoder_once(yard: Yard, tmp_path: Path) -> None:
    one = make_tiny_bert(tmp_path / "one", seed=1, num_labels=2)
    two = fine_tune(one, tmp_path / "two", scale=3)
    prices = [yard.runtime.price(spec_of(folder)) for folder in (one, two)]
    models = [yard.load(folder) for folder in (one, two)]
    for model, price in zip(models, prices, strict=True):
        assert model.measured_bytes() == {0: price.resting_bytes}
        assert model.shared_bytes() == {0: dict(price.shared)}
    common = prices[0].shared.keys() & prices[1].shared.keys()
    assert len(common) == len(prices[0].shared) - 1
    assert yard.pool.bytes(0) == sum({**prices[0].shared, **prices[1].shared}.values())
    encoders = [module_of(model).bert.embeddings.word_embeddings.weight for model in models]
    assert encoders[0] is not encoders[1]
    assert encoders[0].data_ptr() == encoders[1].data_ptr()
    models[0].close()
    assert torch.equal(probabilities(models[1]), expected(yard, two))
    assert yard.pool.bytes(0) == sum(prices[1].shared.values())
    models[1].close()
    assert yard.pool.bytes(0) == 0
    assert models[1].shared_bytes() == {}
    assert models[1].measured_bytes() == {}


def test_a_closed_model_is_freed_by_reference_counts_alone(yard: Yard, tmp_path: Path) -> None:
    folder = make_tiny_bert(tmp_path / "a", seed=1, num_labels=2)
    other = yard.load(folder)
    yard.load(folder).close()
    gc.collect()
    gc.disable()
    try:
        model = yard.load(folder)
        probabilities(model)
        witnesses = model.witnesses()
        assert len(witnesses) > 20
        assert all(witness.reference() is not None for witness in witnesses)
        model.close()
        assert not any(witness.reference() is not None for witness in witnesses)
        # What the other model has is its own, though the memory is the same.
        assert all(witness.reference() is not None for witness in other.witnesses())
        other.close()
    finally:
        gc.enable()
    assert yard.pool.bytes(0) == 0


def test_models_in_several_threads_never_answer_for_each_other(yard: Yard, tmp_path: Path) -> None:
    one = make_tiny_bert(tmp_path / "one", seed=1, num_labels=2)
    two = fine_tune(one, tmp_path / "two", scale=-2)
    answers = {folder: expected(yard, folder) for folder in (one, two)}
    wrong: list[Path] = []

    def work(first: Path, second: Path) -> None:
        for _ in range(25):
            for folder in (first, second):
                model = yard.load(folder)
                if not torch.equal(probabilities(model), answers[folder]):
                    wrong.append(folder)
                model.close()

    threads = [threading.Thread(target=work, args=pair) for pair in ((one, two), (two, one))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert yard.pool.bytes(0) == 0
    assert yard.builds == 1


def test_a_price_is_worked_out_once(
    yard: Yard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_bert(tmp_path / "a", seed=1, num_labels=2)
    first = yard.runtime.price(spec_of(folder))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("read again")

    monkeypatch.setattr(hf_runtime, "read_model_config", refuse)
    assert yard.runtime.price(spec_of(folder)) is first
    assert yard.load(folder).measured_bytes() == {0: first.resting_bytes}


def test_a_changed_folder_is_another_model(yard: Yard, tmp_path: Path) -> None:
    folder = make_tiny_bert(tmp_path / "a", seed=1, num_labels=2)
    before = probabilities(yard.load(folder))
    other = make_tiny_bert(tmp_path / "b", seed=2, num_labels=2)
    (other / "model.safetensors").replace(folder / "model.safetensors")
    after = probabilities(yard.load(folder))
    assert not torch.equal(before, after)
    assert torch.equal(after, expected(yard, folder))


@pytest.mark.parametrize("with_store", [True, False])
def test_a_changed_configuration_is_another_model(
    with_store: bool, yard: Yard, tmp_path: Path
) -> None:
    folder = make_tiny_bert(tmp_path / "a", seed=1, labels=["yes", "no"])
    runtime = yard.runtime if with_store else TransformersRuntime()
    place = Place.on("cpu")
    first = runtime.load(spec_of(folder), place=place, stop=lambda: False)
    changed = (
        (folder / "config.json").read_text().replace('"yes"', '"aye"').replace('"no"', '"nay"')
    )
    (folder / "config.json").write_text(changed)
    second = runtime.load(spec_of(folder), place=place, stop=lambda: False)
    assert {labels(first), labels(second)} in ({("yes",), ("aye",)}, {("no",), ("nay",)})


def test_sharded_weights_are_cloned_too(yard: Yard, tmp_path: Path) -> None:
    folder = make_tiny_bert(tmp_path / "a", seed=1, num_labels=2)
    answer = expected(yard, folder)
    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    for _ in range(2):
        assert torch.equal(probabilities(yard.load(folder)), answer)
    assert yard.builds == 1


@pytest.mark.parametrize("same", [True, False])
def test_ties_that_the_file_has_twice_are_what_the_library_makes_of_them(
    same: bool, yard: Yard, tmp_path: Path
) -> None:
    folders = []
    for seed in (1, 2):
        folder = make_tiny_masked_lm(tmp_path / str(seed), seed=seed)
        weights = load_file(folder / "model.safetensors")
        embeddings = weights["bert.embeddings.word_embeddings.weight"]
        weights["cls.predictions.decoder.weight"] = embeddings * (1 if same else 2)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    for folder in (*folders, folders[0]):
        model = yard.load(folder, "fill-mask")
        module = module_of(model)
        reference = transformers.BertForMaskedLM.from_pretrained(folder)
        for name, tensor in reference.state_dict().items():
            assert torch.equal(module.state_dict()[name], tensor)
        tied = module.cls.predictions.decoder.weight is module.get_input_embeddings().weight
        assert tied == same
        model.close()
    assert yard.builds == 1
    # Nor is one kind's template that of the other.
    other = make_tiny_masked_lm(tmp_path / "other", seed=3)
    weights = load_file(other / "model.safetensors")
    embeddings = weights["bert.embeddings.word_embeddings.weight"]
    weights["cls.predictions.decoder.weight"] = embeddings * (2 if same else 1)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    module = module_of(yard.load(other, "fill-mask"))
    tied = module.cls.predictions.decoder.weight is module.get_input_embeddings().weight
    assert tied != same


PARTS = {
    "two devices": ((("", 0), ("bert.encoder.layer.1", 1)), {0: "cpu", 1: "cpu"}),
    "disk": ((("", 0), ("bert.encoder", 1)), {0: "cpu", 1: DISK}),
}


@pytest.mark.parametrize("whole_first", [True, False])
@pytest.mark.parametrize("name", PARTS)
def test_parts_are_cloned_and_share_nothing(
    name: str, whole_first: bool, yard: Yard, tmp_path: Path
) -> None:
    folder = make_tiny_bert(tmp_path / "a", seed=1, num_labels=2)
    parts, names = PARTS[name]
    place = Place(target=Target(home=0, parts=parts), torch_devices=names)
    if whole_first:
        yard.load(folder).close()
    price = yard.runtime.price(spec_of(folder))
    for _ in range(2):
        model = yard.runtime.load(spec_of(folder), place=place, stop=lambda: False)
        assert torch.equal(probabilities(model), expected(yard, folder))
        assert model.shared_bytes() == {}
        assert sum(model.measured_bytes().values()) >= price.resting_bytes
        witnesses = model.witnesses()
        model.close()
        assert not any(witness.reference() is not None for witness in witnesses)
    assert yard.pool.bytes(0) == 0
    assert yard.builds == 1


def test_buffers_are_nobody_elses(yard: Yard, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    one, two = (yard.load(folder, "image-classification") for _ in range(2))
    pixels = (to_value("pixel_values", torch.rand(1, 3, 32, 32)),)
    before = to_torch(two.run(pixels, {})[2])
    for buffer in module_of(one).buffers():
        buffer.add_(1)
    assert torch.equal(to_torch(two.run(pixels, {})[2]), before)
    third = yard.load(folder, "image-classification")
    assert torch.equal(to_torch(third.run(pixels, {})[2]), before)
    shared = set(yard.runtime.price(spec_of(folder, "image-classification")).shared)
    buffers = sum(buffer.nbytes for buffer in module_of(third).buffers())
    assert buffers > 0
    assert set(one.shared_bytes()[0]) == shared
    assert third.measured_bytes()[0] == yard.pool.bytes(0) + buffers


def test_how_one_model_cuts_texts_is_not_how_others_do(yard: Yard, tmp_path: Path) -> None:
    folder = make_tiny_bert(tmp_path / "a", seed=1, num_labels=2)
    short, long = yard.load(folder, max_length=4), yard.load(folder)
    lengthy = "the cat sat on the mat " * 9
    cut, whole = probabilities(short, lengthy), probabilities(long, lengthy)
    assert not torch.allclose(cut, whole)
    assert torch.equal(probabilities(short, "the cat"), cut)
    assert torch.equal(probabilities(long, lengthy), whole)


@pytest.mark.parametrize("damage", ["tokenizer", "length"])
def test_a_load_that_fails_late_holds_nothing(damage: str, yard: Yard, tmp_path: Path) -> None:
    folder = make_tiny_bert(tmp_path / "a", seed=1, num_labels=2)
    options: dict[str, Any] = {}
    if damage == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    else:
        options["max_length"] = 1000
    for _ in range(2):
        with pytest.raises(ModelFilesError) as caught:
            yard.load(folder, **options)
        assert caught.value.text
        assert yard.pool.bytes(0) == 0


def test_a_load_by_template_can_be_stopped_wherever_it_asks(yard: Yard, tmp_path: Path) -> None:
    folder = make_tiny_bert(tmp_path / "a", seed=1, num_labels=2)
    yard.load(folder).close()
    for steps in range(100):
        asked = 0

        def stop(steps: int = steps) -> bool:
            nonlocal asked
            asked += 1
            return asked > steps

        try:
            model = yard.runtime.load(spec_of(folder), place=Place.on("cpu"), stop=stop)
        except LoadCancelled:
            assert yard.pool.bytes(0) == 0
            continue
        model.close()
        break
    assert 2 <= steps < 99


def test_generators_have_their_own_settings(yard: Yard, tmp_path: Path) -> None:
    folder = make_tiny_gpt2(tmp_path / "a", seed=1)
    one, two = (module_of(yard.load(folder, "text-generation")) for _ in range(2))
    assert one.generation_config is not two.generation_config
    assert one.generation_config.to_dict() == two.generation_config.to_dict()
    assert one.config is not two.config
    assert one.lm_head.weight is one.transformer.wte.weight


def test_image_models_answer_alike_however_they_were_loaded(yard: Yard, tmp_path: Path) -> None:
    folder = make_tiny_vit(tmp_path / "a", seed=1)
    pixels = (to_value("pixel_values", torch.rand(1, 3, 16, 16)),)
    answers = [
        to_torch(yard.load(folder, "image-classification").run(pixels, {})[2]) for _ in range(2)
    ]
    assert torch.equal(*answers)
    assert yard.builds == 1


# The torch runtime.

COUNTED: list[str] = []


class Selfish(torch.nn.Module):
    """Refers to itself, so that it cannot be cloned."""

    def __init__(self) -> None:
        super().__init__()
        COUNTED.append("selfish")
        self.linear = torch.nn.Linear(8, 4)
        self.register_buffer("seen", torch.zeros(4))
        self.parts = [self.linear]
        self.seen: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.parts[0](x) + self.seen
        return result


SELFISH = f"{__name__}:Selfish"


def torch_load(runtime: Runtime, folder: Path, factory: str) -> LoadedModel:
    spec = ModelSpec(name="m", runtime="torch", folder=folder, options={"factory": factory})
    price = runtime.price(spec)
    model = runtime.load(spec, place=Place.on("cpu"), stop=lambda: False)
    assert model.measured_bytes() == {0: price.resting_bytes}
    assert model.shared_bytes().get(0, {}) == dict(price.shared)
    return model


def torch_runtime(pool: WeightPool, folder: Path) -> TorchRuntime:
    return TorchRuntime(
        allowed_factories=frozenset({MLP_FACTORY, SELFISH}),
        store=WeightStore.open(folder),
        pool=pool,
    )


def test_modules_of_factories_are_cloned(tmp_path: Path) -> None:
    pool = WeightPool()
    runtime = torch_runtime(pool, tmp_path / "store")
    x = torch.rand(3, 8)
    for seed in (1, 2, 1):
        folder = make_tiny_mlp(tmp_path / str(seed), seed=seed)
        model = torch_load(runtime, folder, MLP_FACTORY)
        weights = load_file(folder / "model.safetensors")
        hidden = torch.nn.functional.linear(x, weights["first.weight"], weights["first.bias"])
        result = torch.nn.functional.linear(
            hidden.relu(), weights["second.weight"], weights["second.bias"]
        )
        assert torch.equal(to_torch(model.run((to_value("x", x),), {})[0]), result)
        assert pool.bytes(0) == sum(value.nbytes for value in weights.values())
        witnesses = model.witnesses()
        model.close()
        assert not any(witness.reference() is not None for witness in witnesses)
        assert pool.bytes(0) == 0
    known, template = runtime._templates.find(next(iter(runtime._templates._templates)))
    assert known
    assert template is not None


def test_modules_that_cannot_be_cloned_are_built_every_time_and_share_nevertheless(
    tmp_path: Path,
) -> None:
    pool = WeightPool()
    runtime = torch_runtime(pool, tmp_path / "store")
    folder = tmp_path / "a"
    folder.mkdir()
    module = Selfish()
    module.seen.add_(1)
    save_file(module.state_dict(), folder / "model.safetensors")
    x = torch.rand(3, 8)
    answer = module(x).detach()
    torch_load(runtime, folder, SELFISH).close()
    COUNTED.clear()
    models = [torch_load(runtime, folder, SELFISH) for _ in range(2)]
    assert len(COUNTED) == 2
    assert pool.bytes(0) == module.linear.weight.nbytes + module.linear.bias.nbytes
    weights = [module_of(model).parts[0].weight for model in models]
    assert weights[0] is not weights[1]
    assert weights[0].data_ptr() == weights[1].data_ptr()
    module_of(models[0]).seen.add_(1)
    assert torch.equal(to_torch(models[1].run((to_value("x", x),), {})[0]), answer)
    for model in models:
        model.close()
    del weights
    gc.collect()
    assert pool.bytes(0) == 0


def test_runtimes_of_one_registry_have_one_pool() -> None:
    runtimes = make_runtimes(frozenset())
    pools = [vars(runtimes[name])["_weights"].pool for name in ("torch", "transformers")]
    assert pools[0] is pools[1]
    assert pools[0] is vars(runtimes["torch"])["_weights"].pool
    mine = WeightPool()
    runtimes = make_runtimes(frozenset(), pool=mine)
    assert vars(runtimes["torch"])["_weights"].pool is mine
