"""What the runtime's tasks take beside the weights, against what its models really take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.support.tiny_models import (
    make_tiny_bert,
    make_tiny_gpt2,
    make_tiny_masked_lm,
    make_tiny_vit,
)

from modelyard_server.runtimes.api import ModelSpec
from modelyard_server.runtimes.hf.activations import model_for_task
from modelyard_server.runtimes.hf.architectures import find_architecture
from modelyard_server.runtimes.hf.runtime import TransformersRuntime
from modelyard_server.runtimes.targets import Place
from modelyard_server.runtimes.tensors import DType, TensorValue
from modelyard_server.weights.measured_peaks import measured_peak
from modelyard_server.weights.model_config import read_model_config

ROWS, LENGTH = 8, 64
# A text of as many words as fit beside the tokenizer's own tokens, and a shorter one.
LONG = " ".join(["the cat sat on the mat"] * 11)
SHORT = "a dog ran"


def skeleton(folder: Path, task: str) -> tuple[torch.nn.Module, Any]:
    architecture = find_architecture(read_model_config(folder), task)
    with torch.device("meta"):
        module: torch.nn.Module = architecture.model_class._from_config(
            architecture.config, **architecture.arguments
        )
    return module, architecture.config


def predicted(module: torch.nn.Module, config: Any, task: str, rows: int, length: int) -> int:
    """What the largest batch takes; 0 if it cannot be known."""
    model = model_for_task(module, config, task, rows, length)
    return 0 if model is None else model.predict(rows, length)


def texts(last: str = "") -> TensorValue:
    rows = (*[LONG + last] * (ROWS - 1), SHORT + last)
    return TensorValue(name="text", dtype=DType.TEXT, shape=(ROWS,), data=rows)


def pictures() -> TensorValue:
    shape = (ROWS, 16, 16, 3)
    return TensorValue(name="image", dtype=DType.UINT8, shape=shape, data=bytes(ROWS * 16 * 16 * 3))


def measured(folder: Path, task: str, value: TensorValue, parameters: dict[str, Any]) -> int:
    """What a run of the largest batch takes, by the operations that it runs."""
    spec = ModelSpec(name="m", runtime="transformers", task=task, folder=folder)
    model = TransformersRuntime().load(spec, place=Place.on("cpu"), stop=lambda: False)
    model.run((value,), parameters)
    with measured_peak("cpu") as peak:
        model.run((value,), parameters)
    model.close()
    assert peak.size_bytes is not None
    return peak.size_bytes


def bert(folder: Path) -> Path:
    return make_tiny_bert(folder, seed=1)


def classifier(folder: Path) -> Path:
    return make_tiny_bert(folder, seed=1, num_labels=3)


def masked_lm(folder: Path) -> Path:
    return make_tiny_masked_lm(folder, seed=1)


def gpt2(folder: Path) -> Path:
    return make_tiny_gpt2(folder, seed=1)


def vit(folder: Path) -> Path:
    return make_tiny_vit(folder, seed=1)


TASKS: list[tuple[str, Callable[[Path], Path], TensorValue, dict[str, Any]]] = [
    ("feature-extraction", bert, texts(), {}),
    ("text-classification", classifier, texts(), {}),
    ("fill-mask", masked_lm, texts(), {}),
    ("text-generation", gpt2, texts(), {"max_new_tokens": 2}),
    ("text-generation", gpt2, texts(), {"max_new_tokens": 2, "temperature": 0.8, "top_p": 0.9}),
    ("image-classification", vit, pictures(), {}),
]
EACH = pytest.mark.parametrize(("task", "make", "value", "parameters"), TASKS)


@EACH
def test_the_largest_batch_takes_what_was_predicted(
    tmp_path: Path,
    task: str,
    make: Callable[[Path], Path],
    value: TensorValue,
    parameters: dict[str, Any],
) -> None:
    folder = make(tmp_path / "model")
    if task == "fill-mask":
        masked = f"[MASK] {' '.join(LONG.split()[:60])}"
        value = TensorValue(name="text", dtype=DType.TEXT, shape=(ROWS,), data=(masked,) * ROWS)
    length = 1 if task == "image-classification" else LENGTH
    expected = predicted(*skeleton(folder, task), task, ROWS, length)
    real = measured(folder, task, value, parameters)
    # Not below by more than what is laid out otherwise, and no idle reserve either.
    assert 0.95 * real <= expected <= 1.25 * real


@EACH
def test_smaller_batches_take_what_they_take_as_the_largest(
    tmp_path: Path,
    task: str,
    make: Callable[[Path], Path],
    value: TensorValue,
    parameters: dict[str, Any],
) -> None:
    module, config = skeleton(make(tmp_path / "model"), task)
    model = model_for_task(module, config, task, ROWS, LENGTH)
    assert model is not None
    length = 1 if task == "image-classification" else LENGTH
    expected = predicted(module, config, task, ROWS // 2, length)
    assert model.predict(ROWS // 2, length) == pytest.approx(expected, rel=0.1)


def test_a_batch_of_one_token_can_be_asked_for(tmp_path: Path) -> None:
    for make, task in ((bert, "feature-extraction"), (gpt2, "text-generation")):
        module, config = skeleton(make(tmp_path / task), task)
        model = model_for_task(module, config, task, 1, 1)
        assert model is not None
        assert model.predict(1, 1) > 0
    module, config = skeleton(vit(tmp_path / "vit"), "image-classification")
    model = model_for_task(module, config, "image-classification", 1, 1)
    assert model is not None
    assert model.predict(1, 1) > 0


def test_the_skeleton_is_still_one_afterwards(tmp_path: Path) -> None:
    module, config = skeleton(gpt2(tmp_path / "model"), "text-generation")
    before = dict(module.named_parameters(remove_duplicate=False))
    predicted(module, config, "text-generation", 2, 32)
    after = dict(module.named_parameters(remove_duplicate=False))
    assert all(parameter is before[name] for name, parameter in after.items())
    assert all(parameter.is_meta for parameter in after.values())


def test_texts_longer_than_a_million_tokens_are_predicted_too() -> None:
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=4,
        vocab_size=100,
        max_position_embeddings=2**21,
    )
    with torch.device("meta"):
        module = transformers.LlamaForCausalLM(config)
    short, long = (
        predicted(module, config, "text-generation", 1, length) for length in (2**10, 2**20)
    )
    assert 0 < 1_000 * short < long


class Sequential(torch.nn.Module):
    """Goes from token to token, and keeps what it saw of each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 64)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        state = torch.zeros_like(self.embedding(input_ids[:, 0]))
        seen = []
        for at in range(input_ids.shape[1]):
            for _ in range(6):
                state = (state + self.embedding(input_ids[:, at])).tanh()
            seen.append(state)
        return transformers.modeling_outputs.BaseModelOutput(torch.stack(seen, 1))


def test_models_that_loop_over_tokens_are_extrapolated_from_short_texts() -> None:
    module = Sequential().to("meta")
    arguments = (object(), "feature-extraction", 4)
    at_64 = predicted(module, *arguments, 64)
    at_640 = predicted(module, *arguments, 640)
    assert at_640 == pytest.approx(10 * at_64, rel=0.1)


class Chooses(torch.nn.Module):
    """Has outcomes whose size depends on the values."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        kept = input_ids[attention_mask.bool()].tolist()
        return transformers.modeling_outputs.BaseModelOutput(torch.tensor(kept))


def test_what_cannot_be_known_is_nothing() -> None:
    module = Chooses()
    assert predicted(module, object(), "feature-extraction", 2, 8) == 0
    assert predicted(module, object(), "feature-extraction", 2, 4_096) == 0
    assert model_for_task(module, object(), "feature-extraction", 2, 4_096) is None


def test_pictures_that_are_not_square_are_predicted(tmp_path: Path) -> None:
    folder = vit(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["image_size"] = [16, 32]
    (folder / "config.json").write_text(json.dumps(config))
    wide = predicted(*skeleton(folder, "image-classification"), "image-classification", 4, 1)
    config["image_size"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    square = predicted(*skeleton(folder, "image-classification"), "image-classification", 4, 1)
    assert square < wide
