"""The models of the weights benchmark: made here, of random numbers, but for MiniLM.

Their tokenizer is MiniLM's, from its package. All of one size have one architecture and weights of
their own, as after fine-tuning everything; `make_fine_tunes` makes those that share an encoder.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from modelyard_server.demo.models import minilm_folder

__all__ = [
    "BASE",
    "CLASSIFY",
    "EMBED",
    "SMALL",
    "TINY",
    "Encoder",
    "WeightsModel",
    "filed_bytes",
    "make_encoders",
    "make_fine_tunes",
    "make_minilms",
    "offline",
]

CLASSIFY: Final = "text-classification"
EMBED: Final = "feature-extraction"

_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_VOCABULARY: Final = 30_522
_DEVIATION: Final = 0.05
"""Of weights. With the library's 0.02 deep encoders answer nearly the same to everything."""
_NOISE: Final = 0.05
_HEAD: Final = "classifier."


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """The sizes of a BERT.

    Attributes:
        name: for people.
        hidden: width of a token's vector.
        layers: how many.
        heads: of each layer's attention.
    """

    name: str
    hidden: int
    layers: int
    heads: int


BASE: Final = Encoder(name="BERT-base", hidden=768, layers=12, heads=12)
"""438 MB."""
SMALL: Final = Encoder(name="BERT-mini", hidden=256, layers=4, heads=4)
"""45 MB."""
TINY: Final = Encoder(name="BERT-tiny", hidden=128, layers=2, heads=2)
"""18 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsModel:
    """A model folder, and what it is for.

    Attributes:
        folder: its files; the folder's name is the model's.
        task: of the transformers runtime.
    """

    folder: Path
    task: str

    @property
    def name(self) -> str:
        """Of the model."""
        return self.folder.name


def offline() -> Any:
    """The transformers library without the network, and without its bars between our lines."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    # Its functions carry no annotations.
    library: Any = transformers
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


def make_encoders(root: Path, encoder: Encoder, names: Sequence[str]) -> list[WeightsModel]:
    """Makes classifiers of one architecture, every weight of each its own."""
    made = []
    for name in names:
        folder = root / name
        _write_companions(folder, encoder)
        _save(folder / "model.safetensors", _random_weights(encoder, seed=name))
        made.append(WeightsModel(folder=folder, task=CLASSIFY))
    return made


def make_fine_tunes(root: Path, encoder: Encoder, count: int) -> list[WeightsModel]:
    """Makes classifiers with one encoder, and a head of each one's own.

    A folder has two weights files, and that of the encoder is one file with many names: fifty
    folders take the disk of one. Whoever reads them cannot tell.
    """
    root.mkdir(parents=True, exist_ok=True)
    weights = _random_weights(encoder, seed="encoder")
    heads = {name: tensor for name, tensor in weights.items() if name.startswith(_HEAD)}
    body = {name: tensor for name, tensor in weights.items() if name not in heads}
    encoder_file = root / "encoder.safetensors"
    _save(encoder_file, body)
    places = dict.fromkeys(body, "encoder.safetensors") | dict.fromkeys(heads, "head.safetensors")
    made = []
    for number in range(count):
        folder = root / f"tune-{number}"
        _write_companions(folder, encoder)
        os.link(encoder_file, folder / encoder_file.name)
        _save(folder / "head.safetensors", _randomized(heads, seed=f"head {number}"))
        index = json.dumps({"metadata": {}, "weight_map": places})
        (folder / "model.safetensors.index.json").write_text(index)
        made.append(WeightsModel(folder=folder, task=CLASSIFY))
    encoder_file.unlink()
    return made


def make_minilms(root: Path, names: Sequence[str]) -> list[WeightsModel]:
    """Copies MiniLM; all but the first get other layers, as after fine-tuning."""
    import torch
    from safetensors.torch import load_file

    made: list[WeightsModel] = []
    for name in names:
        folder = root / name
        folder.mkdir(parents=True)
        for file in ("config.json", *_TOKENIZER_FILES):
            shutil.copy(minilm_folder() / file, folder / file)
        weights = load_file(minilm_folder() / "model.safetensors")
        if made:
            generator = torch.Generator().manual_seed(_seed(name))
            for key, tensor in weights.items():
                if key.startswith("encoder.") and tensor.ndim == 2:
                    noise = torch.randn(tensor.shape, generator=generator)
                    weights[key] = tensor + noise * tensor.std() * _NOISE
        _save(folder / "model.safetensors", weights)
        made.append(WeightsModel(folder=folder, task=EMBED))
    return made


def filed_bytes(folder: Path) -> int:
    """Bytes of all tensors of a folder, from the headers of its weights files alone."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        total += sum(
            entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in header.items()
            if name != "__metadata__"
        )
    return total


def _config(encoder: Encoder) -> dict[str, object]:
    return {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "vocab_size": _VOCABULARY,
        "hidden_size": encoder.hidden,
        "num_hidden_layers": encoder.layers,
        "num_attention_heads": encoder.heads,
        "intermediate_size": 4 * encoder.hidden,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "id2label": {"0": "bad", "1": "good"},
        "label2id": {"bad": 0, "good": 1},
        "dtype": "float32",
    }


def _write_companions(folder: Path, encoder: Encoder) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_config(encoder), indent=2))
    for name in _TOKENIZER_FILES:
        shutil.copy(minilm_folder() / name, folder / name)


def _random_weights(encoder: Encoder, seed: str) -> dict[str, Any]:
    """Random tensors with the names and shapes that the library gives the architecture."""
    import torch

    transformers = offline()
    with torch.device("meta"):
        config = transformers.BertConfig(**_config(encoder))
        module = transformers.BertForSequenceClassification(config)
    return _randomized(module.state_dict(), seed)


def _randomized(shapes: Mapping[str, Any], seed: str) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(_seed(seed))
    made = {}
    for name, tensor in shapes.items():
        values = torch.randn(tuple(tensor.shape), generator=generator) * _DEVIATION
        # Around one, or layers would swallow what they get.
        made[name] = values + 1 if name.endswith("LayerNorm.weight") else values
    return made


def _seed(text: str) -> int:
    return zlib.crc32(text.encode())


def _save(path: Path, weights: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(dict(weights), path, metadata={"format": "pt"})
