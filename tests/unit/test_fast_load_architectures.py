"""Of every architecture: clones are, bit by bit, what the library itself loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tests.support.tiny_models import make_tokenizer

from modelyard_server.runtimes.api import LoadedModel, ModelSpec
from modelyard_server.runtimes.conversion import to_torch, to_value
from modelyard_server.runtimes.hf import loading
from modelyard_server.runtimes.hf.runtime import TransformersRuntime
from modelyard_server.runtimes.targets import Place
from modelyard_server.runtimes.tensors import DType, TensorValue
from modelyard_server.weights.store import WeightStore

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
ENCODER = "encoder"
DECODER = "decoder"
IMAGES = "images"


@dataclass(frozen=True)
class Case:
    """An architecture: the task, a class and its configuration, and what it takes."""

    task: str
    model_class: Any
    config: Callable[[int], Any]
    takes: str = ENCODER


def sized(config_class: Any, **more: Any) -> Callable[[int], Any]:
    return lambda vocabulary: config_class(**(SIZES | {"vocab_size": vocabulary} | more))


CASES = {
    "albert": Case("fill-mask", hf.AlbertForMaskedLM, sized(hf.AlbertConfig, embedding_size=16)),
    "bert": Case("feature-extraction", hf.BertModel, sized(hf.BertConfig)),
    "bert-head": Case(
        "text-classification", hf.BertForSequenceClassification, sized(hf.BertConfig, num_labels=3)
    ),
    "bert-mlm": Case("fill-mask", hf.BertForMaskedLM, sized(hf.BertConfig)),
    "deberta": Case(
        "text-classification",
        hf.DebertaV2ForSequenceClassification,
        sized(
            hf.DebertaV2Config,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
        ),
    ),
    "distilbert": Case(
        "feature-extraction",
        hf.DistilBertModel,
        lambda vocabulary: hf.DistilBertConfig(
            vocab_size=vocabulary, dim=32, n_layers=2, n_heads=4, hidden_dim=64
        ),
    ),
    "electra": Case(
        "text-classification",
        hf.ElectraForSequenceClassification,
        sized(hf.ElectraConfig, embedding_size=16),
    ),
    "mobilebert": Case(
        "feature-extraction",
        hf.MobileBertModel,
        sized(
            hf.MobileBertConfig,
            embedding_size=16,
            intra_bottleneck_size=16,
            true_hidden_size=16,
        ),
    ),
    "modernbert": Case(
        "feature-extraction",
        hf.ModernBertModel,
        sized(hf.ModernBertConfig, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3),
    ),
    "mpnet": Case("feature-extraction", hf.MPNetModel, sized(hf.MPNetConfig)),
    "roberta": Case(
        "fill-mask", hf.RobertaForMaskedLM, sized(hf.RobertaConfig, bos_token_id=2, eos_token_id=3)
    ),
    "gpt2": Case(
        "text-generation",
        hf.GPT2LMHeadModel,
        lambda vocabulary: hf.GPT2Config(
            vocab_size=vocabulary,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.5,
        ),
        DECODER,
    ),
    "llama": Case(
        "text-generation",
        hf.LlamaForCausalLM,
        sized(hf.LlamaConfig, num_key_value_heads=2, bos_token_id=0, eos_token_id=0),
        DECODER,
    ),
    "llama-head": Case(
        "text-classification",
        hf.LlamaForSequenceClassification,
        sized(hf.LlamaConfig, num_key_value_heads=2, bos_token_id=0, eos_token_id=0),
        DECODER,
    ),
    "qwen2": Case(
        "text-generation",
        hf.Qwen2ForCausalLM,
        sized(
            hf.Qwen2Config,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        ),
        DECODER,
    ),
    "mixtral": Case(
        "text-generation",
        hf.MixtralForCausalLM,
        sized(
            hf.MixtralConfig,
            num_key_value_heads=2,
            num_local_experts=2,
            bos_token_id=0,
            eos_token_id=0,
        ),
        DECODER,
    ),
    "convnext": Case(
        "image-classification",
        hf.ConvNextForImageClassification,
        lambda _: hf.ConvNextConfig(
            hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32
        ),
        IMAGES,
    ),
    "resnet": Case(
        "image-classification",
        hf.ResNetForImageClassification,
        lambda _: hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        IMAGES,
    ),
    "vit": Case(
        "image-classification",
        hf.ViTForImageClassification,
        lambda _: hf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            initializer_range=0.5,
        ),
        IMAGES,
    ),
}
WITH_POOLER = frozenset({"bert", "mobilebert", "mpnet"})
"""Whose vectors are taken without the pooler that the file holds."""

FUSED = frozenset({"mixtral"})
"""Whose parameters the library computes from several of the file's."""


def make(case: Case, folder: Path, seed: int, asked: str | None) -> Path:
    """Writes a model; `asked` is the type of its configuration."""
    folder.mkdir()
    vocabulary = (
        0 if case.takes == IMAGES else make_tokenizer(folder, for_encoder=case.takes == ENCODER)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = case.model_class(case.config(vocabulary))
        for buffer in model.buffers():
            # Batch norms that have seen something.
            if buffer.dtype == torch.float32 and buffer.dim() == 1 and case.takes == IMAGES:
                buffer.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    if asked is not None:
        settings["dtype"] = asked
    if "id2label" in settings:
        settings["id2label"] = {key: f"{seed}-{key}" for key in settings["id2label"]}
        settings["label2id"] = {text: int(key) for key, text in settings["id2label"].items()}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def request(case: Case) -> tuple[TensorValue, ...]:
    if case.takes == IMAGES:
        generator = torch.Generator().manual_seed(5)
        pixels = torch.rand(2, 3, 32, 32, generator=generator)
        return (to_value("pixel_values", pixels),)
    texts = ("the cat sat on the mat", "good dog")
    if case.task == "fill-mask":
        texts = ("the cat [MASK] on the mat", "good [MASK]")
    return (TensorValue(name="text", dtype=DType.TEXT, shape=(2,), data=texts),)


def answers(model: LoadedModel, case: Case) -> dict[str, Any]:
    parameters = {"max_new_tokens": 3} if case.task == "text-generation" else {}
    return {
        value.name: value.data if value.dtype is DType.TEXT else to_torch(value)
        for value in model.run(request(case), parameters)
    }


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), raw.numpy().tobytes()


def state(module: torch.nn.Module) -> dict[str, Any]:
    named: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    named |= dict(module.named_buffers(remove_duplicate=False))
    return {name: bits(tensor) for name, tensor in named.items()}


def ties(module: torch.nn.Module) -> set[tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {tuple(group) for group in names.values()}


def module_of(model: LoadedModel) -> Any:
    module = vars(model)["_held"]
    assert isinstance(module, torch.nn.Module)
    return module


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
        for name, value in left.items()
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads only get in each other's way where everything is this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("asked", [None, "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_clones_are_what_the_library_loads(
    name: str, asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    first = make(case, tmp_path / "first", 1, asked)
    second = make(case, tmp_path / "second", 2, asked)
    built: list[Any] = []
    build = loading._build

    def counting(plan: Any, weights: Any) -> Any:
        built.append(plan)
        return build(plan, weights)

    monkeypatch.setattr(loading, "_build", counting)
    with_store = TransformersRuntime(store=WeightStore.open(tmp_path / "store"))
    in_place = TransformersRuntime()
    arguments = {"add_pooling_layer": False} if name in WITH_POOLER else {}
    for folder in (first, second, first, second):
        spec = ModelSpec(name="m", runtime="transformers", task=case.task, folder=folder)
        config = json.loads((folder / "config.json").read_text())
        with torch.random.fork_rng(devices=[]):
            reference = case.model_class.from_pretrained(
                folder, dtype=getattr(torch, config.get("dtype") or "float32"), **arguments
            ).eval()
        for runtime in (with_store, in_place):
            price = runtime.price(spec)
            model = runtime.load(spec, place=Place.on("cpu"), stop=lambda: False)
            module = module_of(model)
            assert model.measured_bytes() == {0: price.resting_bytes}
            assert model.shared_bytes().get(0, {}) == dict(price.shared)
            assert state(module) == state(reference)
            assert ties(module) == ties(reference)
            assert not any(part.training for part in module.modules())
            assert not any(parameter.requires_grad for parameter in module.parameters())
            assert module.config.id2label == reference.config.id2label
            expected = type(model).__new__(type(model))
            vars(expected).update(vars(model) | {"_held": reference, "_weights": None})
            assert same(answers(model, case), answers(expected, case))
            model.close()
    # One build a runtime, of eight loads.
    assert len(built) == (8 if name in FUSED else 2)
