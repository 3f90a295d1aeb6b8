"""Encoder tasks on texts: feature-extraction, text-classification, fill-mask."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from modelyard_server.runtimes.conversion import to_value
from modelyard_server.runtimes.hf.model import HfModel, chunks, labels_of
from modelyard_server.runtimes.hf.requests import read_top_k, texts_of
from modelyard_server.runtimes.hf.tokenizing import TextTokenizer, TokenBatch
from modelyard_server.runtimes.options import OptionReader
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue
from modelyard_server.weights.storages import Spread

__all__ = ["FeatureExtractor", "MaskFiller", "TextClassifier", "classify"]


class _TextModel(HfModel):
    def __init__(
        self,
        module: torch.nn.Module,
        spread: Spread,
        tokenizer: TextTokenizer,
        *,
        batch_size: int,
    ) -> None:
        super().__init__(module, spread)
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        # GPT-2 would take them too, and add the embedding of token 0 to every token.
        config: Any = module.config
        self._takes_types = (
            _takes_types(type(module).forward) and getattr(config, "type_vocab_size", 0) > 0
        )

    def _forward(self, batch: TokenBatch) -> Any:
        arguments = {"input_ids": batch.ids, "attention_mask": batch.mask}
        if self._takes_types:
            arguments["token_type_ids"] = batch.types
        return self._module(**arguments)

    @abstractmethod
    def _answer(
        self, inputs: Sequence[TensorValue], parameters: OptionReader
    ) -> tuple[TensorValue, ...]: ...


@lru_cache(maxsize=256)
def _takes_types(forward: Callable[..., Any]) -> bool:
    return "token_type_ids" in inspect.signature(forward).parameters


class FeatureExtractor(_TextModel):
    """Vectors for texts, from the last hidden states.

    Outputs:
        With pooling "mean" (of the tokens that are not padding) or "cls" (the first token):
        "embedding" FLOAT32 [n, hidden]. With "none": "embeddings" FLOAT32 [n, tokens, hidden] with
        zeros for padding, and "mask" BOOL [n, tokens], true for tokens.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        spread: Spread,
        tokenizer: TextTokenizer,
        *,
        batch_size: int,
        pooling: str,
        normalize: bool,
    ) -> None:
        super().__init__(module, spread, tokenizer, batch_size=batch_size)
        self._pooling = pooling
        self._normalize = normalize

    def _answer(
        self, inputs: Sequence[TensorValue], parameters: OptionReader
    ) -> tuple[TensorValue, ...]:
        parameters.finish()
        encodings = self._tokenizer.encode(*texts_of(inputs))
        vectors, masks = [], []
        for part in chunks(len(encodings), self._batch_size):
            batch = self._tokenizer.batch(encodings[part], device=self._device)
            vectors.append(self._vectors(self._forward(batch).last_hidden_state, batch.mask))
            masks.append(batch.mask.bool())
        if self._pooling != "none":
            return (to_value("embedding", torch.cat(vectors)),)
        width = max(mask.shape[1] for mask in masks)
        padded = [
            torch.nn.functional.pad(part, (0, 0, 0, width - part.shape[1])) for part in vectors
        ]
        padded_masks = [torch.nn.functional.pad(mask, (0, width - mask.shape[1])) for mask in masks]
        return (
            to_value("embeddings", torch.cat(padded)),
            to_value("mask", torch.cat(padded_masks)),
        )

    def _vectors(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = states.float()
        weights = mask.unsqueeze(-1).to(states.dtype)
        if self._pooling == "mean":
            vectors = (states * weights).sum(1) / weights.sum(1)
        elif self._pooling == "cls":
            vectors = states[:, 0]
        else:
            # where, not a product: what stands in padding may be anything, also no number.
            vectors = torch.where(weights.bool(), states, torch.zeros_like(states))
        return torch.nn.functional.normalize(vectors, dim=-1) if self._normalize else vectors


class TextClassifier(_TextModel):
    """Classes of texts.

    Outputs:
        "label" TEXT [n] and "score" FLOAT32 [n] of the likeliest class, "probabilities" FLOAT32
        [n, classes]: a distribution, or independent ones if the model's problem_type is
        multi_label_classification; the bare number if it is regression.
    """

    def _answer(
        self, inputs: Sequence[TensorValue], parameters: OptionReader
    ) -> tuple[TensorValue, ...]:
        parameters.finish()
        encodings = self._tokenizer.encode(*texts_of(inputs))
        logits = [
            self._forward(self._tokenizer.batch(encodings[part], device=self._device)).logits
            for part in chunks(len(encodings), self._batch_size)
        ]
        return classify(torch.cat(logits), self._module.config)


def classify(logits: torch.Tensor, config: Any) -> tuple[TensorValue, ...]:
    """Makes the three outputs of a classifier.

    Args:
        logits: [n, classes], n >= 1.
        config: the model's configuration; its problem_type decides what the numbers mean.
    """
    logits = logits.float()
    count = logits.shape[1]
    problem = getattr(config, "problem_type", None)
    if problem == "regression":
        probabilities = logits
    elif problem == "multi_label_classification" or count == 1:
        probabilities = logits.sigmoid()
    else:
        probabilities = logits.softmax(dim=-1)
    score, best = probabilities.max(dim=-1)
    labels = labels_of(config, count)
    chosen = tuple(labels[index] for index in best.tolist())
    return (
        TensorValue(name="label", dtype=DType.TEXT, shape=(len(chosen),), data=chosen),
        to_value("score", score),
        to_value("probabilities", probabilities),
    )


class MaskFiller(_TextModel):
    """Likely fillings of the one gap in each text.

    Parameters:
        top_k: how many a text, default the option of that name.

    Outputs, best first:
        "token" TEXT [n, k], "score" FLOAT32 [n, k], "sequence" TEXT [n, k]: the text with the gap
        filled, as the tokenizer spells it.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        spread: Spread,
        tokenizer: TextTokenizer,
        *,
        batch_size: int,
        top_k: int,
    ) -> None:
        super().__init__(module, spread, tokenizer, batch_size=batch_size)
        self._top_k = top_k

    def _answer(
        self, inputs: Sequence[TensorValue], parameters: OptionReader
    ) -> tuple[TensorValue, ...]:
        top_k = read_top_k(parameters, self._top_k)
        name, texts = texts_of(inputs)
        encodings = self._tokenizer.encode(name, texts)
        mask_id = self._tokenizer.mask_id
        gaps = []
        for index, encoding in enumerate(encodings):
            found = [at for at, token in enumerate(encoding.ids) if token == mask_id]
            if len(found) != 1:
                raise TensorError(
                    name,
                    f"text {index} has {len(found)} masks within the model's length; exactly one "
                    f"{self._tokenizer.mask_token} is needed",
                )
            gaps.append(found[0])
        scores, tokens, sequences = [], [], []
        for part in chunks(len(encodings), self._batch_size):
            batch = self._tokenizer.batch(encodings[part], device=self._device)
            logits = self._forward(batch).logits
            rows = torch.arange(len(logits), device=logits.device)
            at_gap = logits[rows, torch.tensor(gaps[part], device=logits.device)]
            best = at_gap.float().softmax(dim=-1).topk(min(top_k, at_gap.shape[-1]))
            scores.append(best.values)
            for encoding, gap, ids in zip(
                encodings[part], gaps[part], best.indices.tolist(), strict=True
            ):
                for token in ids:
                    tokens.append(self._tokenizer.decode([token], skip_special=False))
                    filled = [*encoding.ids[:gap], token, *encoding.ids[gap + 1 :]]
                    sequences.append(self._tokenizer.decode(filled))
        score = torch.cat(scores)
        shape = tuple(score.shape)
        return (
            TensorValue(name="token", dtype=DType.TEXT, shape=shape, data=tuple(tokens)),
            to_value("score", score),
            TensorValue(name="sequence", dtype=DType.TEXT, shape=shape, data=tuple(sequences)),
        )
