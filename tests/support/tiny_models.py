"""Tiny models with random weights, in real model folders, made in well under a second each.

Every builder writes into a folder that exists and is empty or absent, and returns it. The same seed
makes the same weights. Texts are made of the words in WORDS; anything else is an unknown word.
Nothing here needs modelyard.

    make_tiny_bert            encoder; with num_labels a text classifier
    make_tiny_masked_lm       encoder with a masked language model head, tied to its embeddings
    make_tiny_gpt2            decoder with a tied head
    make_tiny_decoder         decoders of other kinds: rotary positions, a window, no memory
    make_tiny_vit             image classifier
    make_tiny_mlp             plain torch state dict of a TinyMlp, for the factory MLP_FACTORY
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

__all__ = [
    "MLP_FACTORY",
    "WORDS",
    "TinyMlp",
    "make_tiny_bert",
    "make_tiny_decoder",
    "make_tiny_gpt2",
    "make_tiny_masked_lm",
    "make_tiny_mlp",
    "make_tiny_vit",
    "make_tokenizer",
]

WORDS = tuple(
    word
    for line in (
        "the a cat dog bird fish sat ran flew swam on in over under mat house tree river",
        "big small red blue good bad very not is was and or i you like hate this that",
    )
    for word in line.split()
)

MLP_FACTORY = "tests.support.tiny_models:TinyMlp"
"""To be put among the allowed factories."""

_BERT_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    # Of random weights as small as the default every answer looks like every other.
    "initializer_range": 0.5,
}


def make_tokenizer(folder: Path, *, for_encoder: bool) -> int:
    """Writes tokenizer.json and tokenizer_config.json: one token a word, split at white space.

    Args:
        folder: where to; must exist.
        for_encoder: with [CLS] and [SEP] around each text, [PAD] and [MASK]; else only <eos>.

    Returns:
        Number of tokens.
    """
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if for_encoder else ["<eos>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=specials[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(specials)
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _BERT_SIZES["max_position_embeddings"],
        "unk_token": specials[1],
    }
    if for_encoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        settings |= {
            "pad_token": "[PAD]",
            "mask_token": "[MASK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
        }
    else:
        settings |= {"eos_token": "<eos>"}
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)


def make_tiny_bert(
    folder: Path,
    *,
    seed: int,
    num_labels: int | None = None,
    labels: Sequence[str] | None = None,
    problem_type: str | None = None,
    dtype: torch.dtype = torch.float32,
    hidden_size: int = 32,
) -> Path:
    """Makes a BERT encoder (tasks feature-extraction and, with labels, text-classification).

    Args:
        folder: the model's folder.
        seed: of its weights.
        num_labels: number of classes; none makes the bare encoder.
        labels: names of the classes, default LABEL_0, LABEL_1, ...; implies num_labels.
        problem_type: of the library, for instance "multi_label_classification".
        dtype: of the weights.
        hidden_size: width, a multiple of 4; the model's bytes grow with its square.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = _BERT_SIZES | {
        "vocab_size": make_tokenizer(folder, for_encoder=True),
        "hidden_size": hidden_size,
    }
    if labels is not None:
        settings["id2label"] = dict(enumerate(labels))
        settings["label2id"] = {label: index for index, label in enumerate(labels)}
    elif num_labels is not None:
        settings["num_labels"] = num_labels
    if problem_type is not None:
        settings["problem_type"] = problem_type
    config = transformers.BertConfig(**settings)
    if num_labels is None and labels is None:
        return _save(transformers.BertModel, config, folder, seed, dtype)
    return _save(transformers.BertForSequenceClassification, config, folder, seed, dtype)


def make_tiny_masked_lm(folder: Path, *, seed: int) -> Path:
    """Makes a BERT masked language model (task fill-mask; its mask token is [MASK])."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = make_tokenizer(folder, for_encoder=True)
    config = transformers.BertConfig(**_BERT_SIZES, vocab_size=vocabulary)
    return _save(transformers.BertForMaskedLM, config, folder, seed, torch.float32)


def make_tiny_gpt2(
    folder: Path, *, seed: int, dtype: torch.dtype = torch.float32, hidden_size: int = 32
) -> Path:
    """Makes a GPT-2 with a head tied to its embeddings (task text-generation)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = transformers.GPT2Config(
        vocab_size=make_tokenizer(folder, for_encoder=False),
        n_embd=hidden_size,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.5,
    )
    return _save(transformers.GPT2LMHeadModel, config, folder, seed, dtype)


def make_tiny_decoder(
    folder: Path, kind: str, *, seed: int, positions: int = 64, ends: bool = True
) -> Path:
    """Makes a decoder of another kind than GPT-2 (task text-generation).

    Args:
        folder: the model's folder.
        kind: "llama" (rotary positions), "mistral" (the same with a window of 8 tokens), "bloom"
            (distances instead of positions) or "gpt1" (it remembers nothing from step to step).
        seed: of its weights.
        positions: most tokens of a text.
        ends: it has a token that says that a text is at its end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "vocab_size": make_tokenizer(folder, for_encoder=False),
        "hidden_size": 32,
        "bos_token_id": 0,
        "eos_token_id": 0 if ends else None,
        "initializer_range": 0.5,
    }
    attention: dict[str, Any] = {
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": positions,
    }
    tokenizer = folder / "tokenizer_config.json"
    limited = json.loads(tokenizer.read_text()) | {"model_max_length": positions}
    tokenizer.write_text(json.dumps(limited))
    config: Any
    match kind:
        case "llama":
            config, cls = transformers.LlamaConfig(**settings, **attention), "LlamaForCausalLM"
        case "mistral":
            config = transformers.MistralConfig(**settings, **attention, sliding_window=8)
            cls = "MistralForCausalLM"
        case "bloom":
            settings |= {"n_layer": 2, "n_head": 4}
            config, cls = transformers.BloomConfig(**settings), "BloomForCausalLM"
        case "gpt1":
            settings |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": positions}
            del settings["hidden_size"]
            config, cls = transformers.OpenAIGPTConfig(**settings), "OpenAIGPTLMHeadModel"
        case _:
            raise ValueError(kind)
    return _save(getattr(transformers, cls), config, folder, seed, torch.float32)


def make_tiny_vit(
    folder: Path, *, seed: int, num_labels: int = 3, preprocessor: dict[str, Any] | None = None
) -> Path:
    """Makes a ViT for 16 x 16 images (task image-classification).

    Args:
        folder: the model's folder.
        seed: of its weights.
        num_labels: number of classes.
        preprocessor: content of preprocessor_config.json; default: resize to 16 x 16, scale by
            1/255, normalise with mean and deviation 0.5. An empty one is not written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    labels = [f"LABEL_{index}" for index in range(num_labels)]
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        initializer_range=0.5,
    )
    if preprocessor is None:
        preprocessor = {
            "do_resize": True,
            "size": {"height": 16, "width": 16},
            "resample": 2,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return _save(transformers.ViTForImageClassification, config, folder, seed, torch.float32)


class TinyMlp(torch.nn.Module):
    """Two layers, y = relu(x A + a) B + b, with a computed buffer that scales the result.

    Args:
        inputs: width of x.
        hidden: width between the layers.
        outputs: width of y.
        scale: what the result is multiplied by; held in a buffer that is not saved.
        fails: raise in forward, for tests of that.
    """

    def __init__(
        self,
        inputs: int = 8,
        hidden: int = 16,
        outputs: int = 4,
        scale: float = 1.0,
        fails: bool = False,
    ) -> None:
        super().__init__()
        self.first = torch.nn.Linear(inputs, hidden)
        self.second = torch.nn.Linear(hidden, outputs)
        self.fails = fails
        self.register_buffer("scale", torch.full((outputs,), scale), persistent=False)
        self.scale: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: [n, inputs]. Returns: [n, outputs]."""
        if self.fails:
            raise ArithmeticError("asked to fail")
        result: torch.Tensor = self.second(self.first(x).relu()) * self.scale
        return result


def make_tiny_mlp(
    folder: Path, *, seed: int, inputs: int = 8, hidden: int = 16, outputs: int = 4
) -> Path:
    """Makes the weights of a TinyMlp (runtime "torch", factory MLP_FACTORY).

    The factory needs `factory_options` with the same sizes when they are not the defaults.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = TinyMlp(inputs, hidden, outputs)
    save_file(module.state_dict(), folder / "model.safetensors")
    return folder


def _save(model_class: Any, config: Any, folder: Path, seed: int, dtype: torch.dtype) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.to(dtype).save_pretrained(folder)
    return folder
