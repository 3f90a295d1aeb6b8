"""Encoder tasks on texts: feature-extraction, text-classification, fill-mask."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, Final

import torch
from tokenizers import Encoding

from modelyard_server.runtimes.api import Prepared
from modelyard_server.runtimes.batches import split_rows
from modelyard_server.runtimes.conversion import to_value
from modelyard_server.runtimes.hf.model import BatchedModel, labels_of
from modelyard_server.runtimes.hf.requests import read_top_k, texts_of
from modelyard_server.runtimes.hf.tokenizing import TextTokenizer, TokenBatch
from modelyard_server.runtimes.options import OptionReader
from modelyard_server.runtimes.passes import plan_passes
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue
from modelyard_server.weights.storages import Spread

__all__ = ["FeatureExtractor", "MaskFiller", "TextClassifier", "classify"]


_TOKEN_BYTES: Final = 24
"""Of a token's id, mask and type."""

_HOST_PASS_TOKENS: Final = 32
_ACCELERATOR_PASS_TOKENS: Final = 2_048
"""Tokens that take as long as the fixed part of a pass. On a processor that is mostly reading the
weights: 9.5 ms, with 0.3 ms a token (MiniLM, one thread). An accelerator has far more arithmetic
for what it reads, and is told of every operation by a thread that takes its time."""


class _TextModel(BatchedModel):
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
        on_host = torch.device(self._device).type == "cpu"
        self._pass_tokens = _HOST_PASS_TOKENS if on_host else _ACCELERATOR_PASS_TOKENS
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

    def _passes(self, encodings: Sequence[Encoding]) -> list[list[int]]:
        """Which rows go through the model together."""
        widths = [len(encoding) for encoding in encodings]
        return plan_passes(widths, most_rows=self._batch_size, pass_cost=self._pass_tokens)

    def _pass_of(self, encodings: Sequence[Encoding]) -> AbstractContextManager[None]:
        return self._forward_pass(len(encodings), max(map(len, encodings)))

    def _prepare(self, inputs: Sequence[TensorValue], parameters: OptionReader) -> Prepared:
        parameters.finish()
        encodings = self._tokenizer.encode(*texts_of(inputs))
        return self._prepared(encodings, (), encodings)

    def _prepared(self, encodings: Sequence[Encoding], key: Hashable, content: Any) -> Prepared:
        width = max(map(len, encodings))
        return Prepared(
            key=key,
            rows=len(encodings),
            width=width,
            row_bytes=width * _TOKEN_BYTES,
            most_rows=self._batch_size,
            pass_cost=self._pass_tokens,
            content=content,
        )


def _encodings_of(requests: Sequence[Prepared]) -> list[Encoding]:
    return [encoding for request in requests for encoding in request.content]


def _in_order(parts: Sequence[torch.Tensor], passes: Sequence[Sequence[int]]) -> torch.Tensor:
    """What passes made of their rows, in the order in which the rows came."""
    made = torch.cat(list(parts))
    order = [row for rows in passes for row in rows]
    if order == sorted(order):
        return made
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order)] = torch.arange(len(order))
    return made[back.to(made.device)]


def _rows_of(requests: Sequence[Prepared]) -> list[int]:
    return [request.rows for request in requests]


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

    def _answer_batch(self, requests: Sequence[Prepared]) -> list[tuple[TensorValue, ...]]:
        encodings = _encodings_of(requests)
        passes, vectors, masks = self._passes(encodings), [], []
        for rows in passes:
            part = [encodings[row] for row in rows]
            with self._pass_of(part):
                batch = self._tokenizer.batch(part, device=self._device)
                vectors.append(self._vectors(self._forward(batch).last_hidden_state, batch.mask))
                masks.append(batch.mask.bool())
        if self._pooling != "none":
            outputs = (to_value("embedding", _in_order(vectors, passes)),)
            return split_rows(outputs, _rows_of(requests))
        width = max(mask.shape[1] for mask in masks)
        pad = torch.nn.functional.pad
        padded = _in_order(
            [pad(part, (0, 0, 0, width - part.shape[1])) for part in vectors], passes
        )
        padded_mask = _in_order([pad(mask, (0, width - mask.shape[1])) for mask in masks], passes)
        answers: list[tuple[TensorValue, ...]] = []
        begin = 0
        for request in requests:
            # As wide as its own longest text, whatever else was in the batch.
            own = (slice(begin, begin + request.rows), slice(request.width))
            answers.append(
                (to_value("embeddings", padded[own]), to_value("mask", padded_mask[own]))
            )
            begin += request.rows
        return answers

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

    def _answer_batch(self, requests: Sequence[Prepared]) -> list[tuple[TensorValue, ...]]:
        encodings = _encodings_of(requests)
        passes, logits = self._passes(encodings), []
        for rows in passes:
            part = [encodings[row] for row in rows]
            with self._pass_of(part):
                batch = self._tokenizer.batch(part, device=self._device)
                logits.append(self._forward(batch).logits)
        return split_rows(
            classify(_in_order(logits, passes), self._module.config), _rows_of(requests)
        )


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

    def _prepare(self, inputs: Sequence[TensorValue], parameters: OptionReader) -> Prepared:
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
        return self._prepared(encodings, top_k, list(zip(encodings, gaps, strict=True)))

    def _answer_batch(self, requests: Sequence[Prepared]) -> list[tuple[TensorValue, ...]]:
        texts = [text for request in requests for text in request.content]
        encodings = [encoding for encoding, _ in texts]
        passes, best_scores, best_ids = self._passes(encodings), [], []
        for rows in passes:
            part = [encodings[row] for row in rows]
            gaps = [texts[row][1] for row in rows]
            with self._pass_of(part):
                batch = self._tokenizer.batch(part, device=self._device)
                best = self._best(self._forward(batch).logits, gaps, requests[0].key)
            best_scores.append(best.values)
            best_ids.append(best.indices)
        score = _in_order(best_scores, passes)
        tokens, sequences = [], []
        for (encoding, gap), ids in zip(texts, _in_order(best_ids, passes).tolist(), strict=True):
            for token in ids:
                tokens.append(self._tokenizer.decode([token], skip_special=False))
                filled = [*encoding.ids[:gap], token, *encoding.ids[gap + 1 :]]
                sequences.append(self._tokenizer.decode(filled))
        shape = tuple(score.shape)
        outputs = (
            TensorValue(name="token", dtype=DType.TEXT, shape=shape, data=tuple(tokens)),
            to_value("score", score),
            TensorValue(name="sequence", dtype=DType.TEXT, shape=shape, data=tuple(sequences)),
        )
        return split_rows(outputs, _rows_of(requests))

    def _best(self, logits: torch.Tensor, gaps: Sequence[int], top_k: Any) -> Any:
        """Scores and tokens of the likeliest fillings of each row's gap."""
        rows = torch.arange(len(logits), device=logits.device)
        at_gap = logits[rows, torch.tensor(gaps, device=logits.device)]
        return at_gap.float().softmax(dim=-1).topk(min(top_k, at_gap.shape[-1]))
