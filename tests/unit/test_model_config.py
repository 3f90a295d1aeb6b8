from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.tiny_models import make_tiny_bert, make_tiny_gpt2

from modelyard_server.runtimes.api import ModelFilesError, ModelSpec
from modelyard_server.runtimes.hf.runtime import TransformersRuntime
from modelyard_server.runtimes.targets import Place
from modelyard_server.weights.model_config import read_model_config


def write(folder: Path, content: object) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "config.json").write_text(text)


GOOD: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 32,
    "torch_dtype": "bfloat16",
    "_name_or_path": "/somewhere/of/the/author",
    "_commit_hash": None,
}


def test_private_keys_are_dropped_and_the_rest_is_kept(tmp_path: Path) -> None:
    write(tmp_path, GOOD | {"_something_internal": 1, "vision_config": {"_commit_hash": "1"}})
    config = read_model_config(tmp_path)
    assert config.model_type == "bert"
    assert config.architectures == ("BertModel",)
    assert config.dtype == "bfloat16"
    assert not any(key.startswith("_") for key in config.values)
    assert config.values["vision_config"] == {}


REACHING = [
    {"auto_map": {"AutoModel": "modeling.Evil"}},
    {"trust_remote_code": True},
    {"_attn_implementation_internal": "author/kernel"},
    {"_attn_implementation": "author/kernel"},
    {"_attn_implementation": None},
    {"_experts_implementation_internal": "author/kernel"},
    {"attn_implementation": "author/kernel"},
    {"custom_pipelines": {"x": {"impl": "evil.Pipeline"}}},
    {"custom_generate": "author/generate"},
    {"kernel_config": {"RMSNorm": "author/kernel:RMSNorm"}},
    {"use_kernels": True},
    {"quantization_config": {"quant_method": "any"}},
    {"transformers_weights": "../../other.bin"},
    {"fusion_config": {"patch_embeddings": True}},
    {"distributed_config": {"tp_plan": "auto"}},
    {"backbone": "author/model", "use_pretrained_backbone": True},
    {"per_layer_config": {"0": {"hidden_size": 1}}},
]


@pytest.mark.parametrize("extra", REACHING, ids=lambda extra: next(iter(extra)))
@pytest.mark.parametrize("nested", [False, True])
def test_what_reaches_beyond_the_model_is_refused(
    tmp_path: Path, extra: dict[str, Any], nested: bool
) -> None:
    write(tmp_path, GOOD | ({"text_config": {"list": [extra]}} if nested else extra))
    with pytest.raises(ModelFilesError, match="reaches beyond") as caught:
        read_model_config(tmp_path)
    assert next(iter(extra)) in caught.value.text


def test_switches_that_are_off_are_no_reason(tmp_path: Path) -> None:
    write(tmp_path, GOOD | {"use_pretrained_backbone": False, "auto_map": {}, "backbone": None})
    assert "backbone" not in read_model_config(tmp_path).values


@pytest.mark.parametrize(
    "extra",
    [
        {"hidden_size": 2**31},
        {"hidden_size": -1},
        {"vocab_size": -1},
        {"num_hidden_layers": 10**6},
        {"n_layer": 10**6},
        {"num_hidden_layers": -1},
        {"decoder_layers": 10**5},
        {"num_local_experts": 10**5},
        {"num_labels": 10**7},
        {"depths": [10**5]},
        {"hidden_sizes": [1] * 30_000},
        {"text_config": {"num_hidden_layers": 10**6}},
        {"dtype": "complex64"},
        {"dtype": 1},
        {"architectures": "BertModel"},
        {"architectures": ["os.system('true')"]},
        {"model_type": None},
        {"model_type": "x" * 100},
    ],
    ids=str,
)
def test_what_no_model_has_is_refused(tmp_path: Path, extra: dict[str, Any]) -> None:
    write(tmp_path, GOOD | extra)
    with pytest.raises(ModelFilesError):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "nonsense",
        '{"model_type": "bert", "model_type": "gpt2"}',
        '{"a":' * 40 + "1" + "}" * 40,
        '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
        "{" + " " * (9 << 20) + "}",
    ],
    ids=range(7),
)
def test_files_that_are_no_configuration_are_refused(tmp_path: Path, content: str) -> None:
    write(tmp_path, content)
    with pytest.raises(ModelFilesError, match=r"config\.json"):
        read_model_config(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=r"config\.json is missing"):
        read_model_config(tmp_path)


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    write(folder, config | values)


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": 2**31 - 4},
        {"hidden_size": 64},
        {"vocab_size": 2**31 - 1},
        {"vocab_size": 10**6},
        {"num_hidden_layers": 200},
        {"num_hidden_layers": 1_000},
        {"num_hidden_layers": 3},
        {"intermediate_size": 2**31 - 1},
        {"max_position_embeddings": 2**31 - 1},
        {"num_attention_heads": 5},
        {"num_attention_heads": 0},
        {"hidden_act": "author/kernel"},
        {"hidden_size": "32"},
        {"model_type": "evil"},
        {"model_type": "vit"},
        {"architectures": ["AuthorsOwnModel"]},
    ],
    ids=str,
)
def test_claims_are_compared_with_the_weights_before_anything_is_built(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    folder = make_tiny_bert(tmp_path / "bert", seed=1)
    change(folder, **values)
    runtime = TransformersRuntime()
    spec = ModelSpec(name="m", runtime="transformers", task="feature-extraction", folder=folder)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFilesError) as caught:
            runtime.price(spec)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert str(tmp_path) not in caught.value.text


@pytest.mark.parametrize(
    ("task", "needed"),
    [
        ("text-classification", "BertForSequenceClassification"),
        ("fill-mask", "BertForMaskedLM"),
        ("text-generation", "BertLMHeadModel"),
    ],
)
def test_a_task_needs_its_head(tmp_path: Path, task: str, needed: str) -> None:
    folder = make_tiny_bert(tmp_path / "bert", seed=1)
    spec = ModelSpec(name="m", runtime="transformers", task=task, folder=folder)
    with pytest.raises(ModelFilesError, match=needed):
        TransformersRuntime().price(spec)


def test_without_architectures_the_weights_must_have_the_head(tmp_path: Path) -> None:
    folder = make_tiny_bert(tmp_path / "bert", seed=1)
    change(folder, architectures=None, id2label={"0": "only"})
    # Elements enough for a head, under another name.
    weights = load_file(folder / "model.safetensors") | {"unused": torch.zeros(100)}
    save_file(weights, folder / "model.safetensors")
    spec = ModelSpec(name="m", runtime="transformers", task="text-classification", folder=folder)
    with pytest.raises(ModelFilesError, match="lack 2 parameters"):
        TransformersRuntime().load(spec, place=Place.on("cpu"), stop=lambda: False)


def test_keys_the_class_does_not_declare_never_reach_it(tmp_path: Path) -> None:
    folder = make_tiny_bert(tmp_path / "bert", seed=1)
    change(folder, to_dict="shadowed", name_or_path="/etc", gradient_checkpointing=True)
    spec = ModelSpec(name="m", runtime="transformers", task="feature-extraction", folder=folder)
    model = TransformersRuntime().load(spec, place=Place.on("cpu"), stop=lambda: False)
    assert model.measured_bytes()[0] > 0


def test_other_files_of_the_folder_are_not_looked_at(tmp_path: Path) -> None:
    folder = make_tiny_gpt2(tmp_path / "gpt2", seed=1)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "author/other"}')
    (folder / "custom_generate").mkdir()
    canary = tmp_path / "canary"
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(canary)!r}, 'w')")
    (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    (folder / "generation_config.json").write_text(
        '{"eos_token_id": 0, "custom_generate": "author/other", "max_new_tokens": 100000}'
    )
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    spec = ModelSpec(name="m", runtime="transformers", task="text-generation", folder=folder)
    TransformersRuntime().load(spec, place=Place.on("cpu"), stop=lambda: False)
    assert not canary.exists()
