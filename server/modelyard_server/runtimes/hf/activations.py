"""What a run of a task takes beside the weights, predicted from the model's skeleton.

The pass that is predicted is the task's: with the mask of a batch of texts of different lengths,
with the cache of a text that is being written, and with what the task computes from the outcome.
What depends on the request alone is not in it: pictures that are larger than the model's, and
outcomes of one batch that are kept until the last batch of a request is done.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any, Final

import torch

from modelyard_server.weights.activation_model import ActivationModel, ActivationPoint
from modelyard_server.weights.activations import (
    Forward,
    InputShapes,
    Prediction,
    predict_peak_bytes,
)

__all__ = ["model_for_task"]

logger = logging.getLogger(__name__)

_PICTURES: Final = "image-classification"
_SHORT: Final = (16, 32)
"""From these, texts that take too many operations: those of models that loop over tokens. Two, for
a line: what such models keep grows with the tokens, and a curve would magnify every bend."""
_CACHES: Final = ("cache", "past_key_values", "cache_params")
"""What the library's models have called what they remember of a text."""
_USUAL_SIDE: Final = 224


def model_for_task(
    module: torch.nn.Module, config: Any, task: str, batch_size: int, max_length: int
) -> ActivationModel | None:
    """Says what every batch of a task takes beside the weights, its inputs included.

    Reads no files and no weights. Takes some tenths of a second, for long texts too: what has no
    memory has no length. Only of models that loop over tokens is it extrapolated from short texts.
    The outcome is numbers only, and can be kept where the module cannot.

    Args:
        module: the model on the meta device. Nobody else may use it meanwhile; it is left in the
            mode in which models are served (eval()).
        config: the model's configuration.
        task: one of the runtime's tasks.
        batch_size: most rows of one forward pass.
        max_length: most tokens of a text; of no meaning for pictures, whose length is 1.

    Returns:
        None if nothing can be known without running the model.
    """
    if task == _PICTURES:
        return _fit(module, config, task, [(max(1, batch_size // 2), 1), (max(2, batch_size), 1)])
    longest = max(2, max_length)
    # The ends, where being wrong costs most, and one between them for the curve. Then one that is
    # mostly what a text takes whatever its length: a measurement of short texts is no surprise.
    batches = [(1, longest), (batch_size, max(1, longest // 2)), (batch_size, longest)]
    batches.append((batch_size, 2))
    found = _fit(module, config, task, batches)
    if found is not None or longest <= max(_SHORT):
        return found
    return _fit(module, config, task, [(batch_size, length) for length in _SHORT])


def _fit(
    module: torch.nn.Module, config: Any, task: str, batches: list[tuple[int, int]]
) -> ActivationModel | None:
    points = []
    for batch, length in dict.fromkeys(batches):
        found = _predict(module, config, task, batch, length)
        if found.peak_bytes is None:
            return None
        points.append(ActivationPoint(batch, length, found.peak_bytes))
    return ActivationModel.fit(points)


def _predict(
    module: torch.nn.Module, config: Any, task: str, batch: int, length: int
) -> Prediction:
    if task == _PICTURES:
        inputs = _picture(module, config, batch)
        forward: Forward = _classify_pictures
    else:
        inputs = _texts(module, config, batch, length)
        forward = _FORWARDS[task]
    found = predict_peak_bytes(module.eval(), inputs, forward=forward)
    if found.peak_bytes is None:
        logger.info("what runs of a %s take is not known: %s", type(module).__name__, found.reason)
        return found
    given = sum(_size_bytes(shape, dtype) for shape, dtype in inputs.values())
    return Prediction(peak_bytes=found.peak_bytes + given)


def _size_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    size_bytes = dtype.itemsize
    for size in shape:
        size_bytes *= size
    return size_bytes


def _texts(module: torch.nn.Module, config: Any, batch: int, length: int) -> InputShapes:
    tokens = ((batch, length), torch.int64)
    inputs = {"input_ids": tokens, "attention_mask": tokens}
    if getattr(config, "type_vocab_size", 0) > 0 and _takes(module, "token_type_ids"):
        inputs["token_type_ids"] = tokens
    return inputs


def _picture(module: torch.nn.Module, config: Any, batch: int) -> InputShapes:
    side = getattr(config, "image_size", None)
    height, width = side if isinstance(side, list | tuple) else (side or _USUAL_SIDE,) * 2
    channels = int(getattr(config, "num_channels", 3))
    return {"images": ((batch, height, width, channels), torch.uint8)}


def _classify_pictures(module: Any, inputs: Mapping[str, torch.Tensor]) -> object:
    pixels = inputs["images"].permute(0, 3, 1, 2).float()
    pixels = pixels * pixels.new_ones(1) + pixels.new_ones(1)
    return module(pixel_values=pixels.to(next(module.parameters()).dtype))


def _extract(module: Any, inputs: Mapping[str, torch.Tensor]) -> object:
    states = module(**inputs).last_hidden_state.float()
    weights = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def _head(module: Any, inputs: Mapping[str, torch.Tensor]) -> object:
    return module(**inputs).logits[:, 0].float().softmax(dim=-1)


def _write(module: Any, inputs: Mapping[str, torch.Tensor]) -> object:
    """Reads all tokens but one and writes the last, as the library's loop does."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    arguments: dict[str, Any] = {"use_cache": True} if _takes(module, "use_cache") else {}
    if _takes(module, "logits_to_keep"):
        arguments["logits_to_keep"] = 1
    read = max(1, ids.shape[1] - 1)
    outcome = module(input_ids=ids[:, :read], attention_mask=mask[:, :read], **arguments)
    name = next((name for name in _CACHES if _takes(module, name)), "")
    cache = getattr(outcome, name, None) if name else None
    chances = _sampled(outcome.logits[:, -1])
    del outcome
    if cache is None or read == ids.shape[1]:
        return chances
    outcome = module(input_ids=ids[:, read:], attention_mask=mask, **{name: cache}, **arguments)
    return cache, _sampled(outcome.logits[:, -1])


def _sampled(logits: torch.Tensor) -> torch.Tensor:
    """What choosing a token among the likeliest takes: the scores once more, in order."""
    scores = logits.to(copy=True, dtype=torch.float32)
    ordered, order = scores.sort(descending=False)
    dropped = ordered.softmax(dim=-1).cumsum(dim=-1) <= 0.5
    scores = scores.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
    return scores.softmax(dim=-1)


def _takes(module: torch.nn.Module, argument: str) -> bool:
    return argument in inspect.signature(module.forward).parameters


_FORWARDS: Final[Mapping[str, Forward]] = {
    "feature-extraction": _extract,
    "text-classification": _head,
    "fill-mask": _head,
    "text-generation": _write,
}
