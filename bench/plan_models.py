"""The models of the plan benchmarks, and what they answer, worked out without modelyard."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from tests.support.tiny_models import make_tiny_bert

from modelyard.v1 import inference_service_pb2 as pb
from modelyard.v1 import tensor_pb2
from modelyard_server.demo.models import minilm_folder

__all__ = [
    "TOLERANCE",
    "Question",
    "ServedModel",
    "difference",
    "filed_bytes",
    "make_bert_base",
    "make_models",
    "model_table",
    "questions_of",
]

TOLERANCE: Final = 1e-5
"""How far a right answer may be from the reference; models run in float32."""

_TEXTS: Final = (
    "A man is eating food.",
    "Someone is having a meal.",
    "The stock exchange closed lower today.",
    "The little dog ran over the bridge and hid under the old house.",
    "Please call me back when the parcel has arrived.",
    "Rain.",
    "The committee could not agree on a date for the next meeting.",
    "Bond yields dropped after the weak jobs report.",
)
_SIMPLE_TEXTS: Final = ("the big dog ran", "i hate this cat", "a small bird flew over the river")
_NOISE: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model folder and how the server is to run it.

    Attributes:
        name: of the model and its folder.
        task: of the transformers runtime.
        options: of the same.
        texts: what it is asked.
    """

    name: str
    task: str
    options: Mapping[str, object] = field(default_factory=dict)
    texts: tuple[str, ...] = _TEXTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A request and the right answer.

    Attributes:
        model: who is asked.
        frame: the PredictRequest, serialized.
        output: name of the output that is compared.
        expected: its elements.
    """

    model: str
    frame: bytes
    output: str
    expected: np.ndarray[Any, np.dtype[np.float32]]


def make_models(store: Path) -> tuple[ServedModel, ...]:
    """Makes MiniLM, two variants of it, and a tiny classifier, in folders below `store`."""
    _quiet_transformers()
    encoders = []
    for seed, name in enumerate(("minilm", "minilm-b", "minilm-c")):
        _vary(minilm_folder(), store / name, seed)
        encoders.append(
            ServedModel(
                name=name,
                task="feature-extraction",
                options={"pooling": "mean", "normalize": True},
            )
        )
    make_tiny_bert(store / "mood", seed=1, labels=["bad", "good"])
    mood = ServedModel(name="mood", task="text-classification", texts=_SIMPLE_TEXTS)
    return (*encoders, mood)


def make_bert_base(folder: Path) -> ServedModel:
    """Makes an encoder of BERT-base's size (438 MB) with random weights and MiniLM's tokenizer."""
    import torch

    transformers = _quiet_transformers()
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(minilm_folder() / name, folder / name)
    torch.manual_seed(1)
    # Larger than the default, of which deep encoders answer nearly the same to everything.
    model = transformers.BertModel(transformers.BertConfig(initializer_range=0.05))
    model.save_pretrained(folder)
    return ServedModel(name=folder.name, task="feature-extraction", options={"pooling": "none"})


def model_table(model: ServedModel, placement: object = None, *, name: str = "") -> str:
    """A model as a table of a configuration with the root "store"."""
    lines = [
        f"[models.{name or model.name}]",
        'runtime = "transformers"',
        f'task = "{model.task}"',
        'root = "store"',
        f'folder = "{model.name}"',
    ]
    if isinstance(placement, Mapping):
        parts = ", ".join(f'"{key}" = "{device}"' for key, device in placement.items())
        lines.append(f"device = {{{parts}}}")
    elif placement is not None:
        lines.append(f'device = "{placement}"')
    if model.options:
        lines.append(f"[models.{name or model.name}.options]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in model.options.items()]
    return "\n".join([*lines, ""])


def questions_of(models: Sequence[ServedModel], store: Path) -> list[Question]:
    """What models are asked, with the answers of plain transformers.

    Raises:
        RuntimeError: two models have one answer to the same text, so that nobody could tell who
            was asked.
    """
    found = []
    for model in models:
        answers = _reference(model, store / model.name)
        for text, answer in zip(model.texts, answers, strict=True):
            found.append(
                Question(
                    model=model.name,
                    frame=_frame(model.name, text),
                    output="embedding" if model.task == "feature-extraction" else "probabilities",
                    expected=answer,
                )
            )
    for one, other in itertools.combinations(found, 2):
        if one.expected.shape == other.expected.shape:
            apart = float(np.abs(one.expected - other.expected).max())
            if apart <= 10 * TOLERANCE:
                raise RuntimeError(f"{one.model} and {other.model} cannot be told apart")
    return found


def difference(question: Question, response: pb.PredictResponse) -> float:
    """Largest difference of an answer from the right one; infinite if it is of another kind."""
    for tensor in response.outputs:
        if tensor.name == question.output:
            if tuple(tensor.shape) != question.expected.shape:
                return float("inf")
            given = np.frombuffer(tensor.raw, np.float32).reshape(question.expected.shape)
            apart = float(np.abs(given - question.expected).max())
            return apart if apart == apart else float("inf")
    return float("inf")


def filed_bytes(folder: Path) -> dict[str, int]:
    """Bytes of each tensor of model.safetensors, from its header alone."""
    with (folder / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {
        name: entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _vary(source: Path, folder: Path, seed: int) -> None:
    """Copies a checkpoint; with a seed above 0 its encoder is another one, as after fine-tuning."""
    shutil.copytree(source, folder)
    if seed == 0:
        return
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(seed)
    weights = load_file(folder / "model.safetensors")
    for name, values in weights.items():
        if name.startswith("encoder.") and values.ndim == 2:
            noise = rng.standard_normal(values.shape, np.float32) * values.std() * _NOISE
            weights[name] = values + noise
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _frame(key: str, text: str) -> bytes:
    request = pb.PredictRequest(key=key)
    tensor = request.inputs.add(data_type=tensor_pb2.DATA_TYPE_TEXT, shape=[1])
    tensor.text.values.append(text)
    return request.SerializeToString()


def _quiet_transformers() -> Any:
    """The library without the network, and without its bars between our lines."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    # Its functions carry no annotations.
    library: Any = transformers
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


def _reference(model: ServedModel, folder: Path) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """Answers to a model's texts, each alone as the server gets them."""
    import torch

    transformers = _quiet_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    answers = []
    is_encoder = model.task == "feature-extraction"
    kind = transformers.AutoModel if is_encoder else transformers.AutoModelForSequenceClassification
    with torch.inference_mode():
        module = kind.from_pretrained(folder).eval()
        for text in model.texts:
            made = module(**tokenizer([text], return_tensors="pt"))
            if is_encoder:
                # One text alone has no padding: the mean is over all its tokens.
                vector = made.last_hidden_state.mean(1)
                answers.append(torch.nn.functional.normalize(vector, dim=-1).numpy())
            else:
                answers.append(made.logits.softmax(-1).numpy())
    return answers
