"""What a task takes: its inputs and parameters, read without a model, torch or transformers.

Read twice for a request that finds its model cold: before anything is loaded for it, and when the
model answers it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from modelyard_server.runtimes.api import OptionError
from modelyard_server.runtimes.options import OptionReader
from modelyard_server.runtimes.tensors import DType, TensorError, TensorValue

__all__ = [
    "Sampling",
    "Writing",
    "check_request",
    "image_of",
    "read_top_k",
    "read_writing",
    "texts_of",
]

_DEFAULT_NEW_TOKENS = 20
_MAX_NEW_TOKENS = 65_536
_MAX_STOPS = 16
_MIN_TEMPERATURE = 0.01
_MAX_TOP_K = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw tokens; see TextGenerator. The seed is always there."""

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """What text-generation is asked to write; see TextGenerator.

    Attributes:
        new_tokens: most tokens a text.
        sampling: None to take the likeliest token.
        stops: texts that end the writing.
    """

    new_tokens: int
    sampling: Sampling | None
    stops: tuple[str, ...]


def check_request(task: str, inputs: Sequence[TensorValue], parameters: OptionReader) -> None:
    """Checks what can be checked of a request without its model.

    Raises:
        TensorError: another number, type or rank of inputs than the task takes.
        OptionError: a parameter the task does not know or cannot use.
    """
    match task:
        case "text-generation":
            read_writing(parameters)
        case "fill-mask":
            read_top_k(parameters, 1)
        case _:
            parameters.finish()
    if task == "image-classification":
        image_of(inputs)
    else:
        texts_of(inputs)


def read_writing(parameters: OptionReader) -> Writing:
    """Reads all parameters of text-generation. Raises OptionError."""
    new_tokens = parameters.integer(
        "max_new_tokens", _DEFAULT_NEW_TOKENS, low=1, high=_MAX_NEW_TOKENS
    )
    sampling = _sampling(parameters)
    stops = parameters.texts("stop", limit=_MAX_STOPS) or ()
    parameters.finish()
    return Writing(new_tokens=new_tokens or _DEFAULT_NEW_TOKENS, sampling=sampling, stops=stops)


def _sampling(parameters: OptionReader) -> Sampling | None:
    temperature = parameters.number("temperature", None, low=0.0, high=100.0)
    top_k = parameters.integer("top_k", None, low=1, high=1_000_000)
    top_p = parameters.number("top_p", None, low=0.0, high=1.0)
    seed = parameters.integer("seed", None, low=0, high=2**53)
    if temperature is not None and 0.0 < temperature < _MIN_TEMPERATURE:
        # The logits are divided by it and would overflow.
        raise OptionError("temperature", f"must be 0 or at least {_MIN_TEMPERATURE}")
    if temperature == 0.0 or (temperature is None and top_k is None and top_p is None):
        return None
    if seed is None:
        seed = secrets.randbits(53)
    return Sampling(
        temperature=1.0 if temperature is None else temperature, top_k=top_k, top_p=top_p, seed=seed
    )


def read_top_k(parameters: OptionReader, default: int) -> int:
    """Reads all parameters of fill-mask: fillings a text. Raises OptionError."""
    top_k = parameters.integer("top_k", default, low=1, high=_MAX_TOP_K) or default
    parameters.finish()
    return top_k


def texts_of(inputs: Sequence[TensorValue]) -> tuple[str, tuple[str, ...]]:
    """Returns name and texts of the one TEXT tensor of shape [n].

    Raises:
        TensorError: another number, type or rank, or no text at all.
    """
    value = _only_input(inputs)
    if value.dtype is not DType.TEXT or len(value.shape) != 1:
        raise TensorError(
            value.name,
            f"is {value.dtype.value} of shape {list(value.shape)}; the model takes TEXT of "
            "shape [n]",
        )
    if not value.data:
        raise TensorError(value.name, "holds no text; at least one is needed")
    return value.name, tuple(text for text in value.data if isinstance(text, str))


def image_of(inputs: Sequence[TensorValue], channels: int | None = None) -> TensorValue:
    """Returns the one tensor of images, of a type and rank that some model takes.

    Args:
        inputs: of the request.
        channels: of the model's images, for the error; None if the model is not known.

    Raises:
        TensorError: another number, type or rank, or no image at all.
    """
    value = _only_input(inputs)
    shape = value.shape
    if len(shape) != 4 or 0 in shape or value.dtype not in (DType.UINT8, DType.FLOAT32):
        depth = "channels" if channels is None else str(channels)
        raise TensorError(
            value.name,
            f"is {value.dtype.value} of shape {list(shape)}; the model takes UINT8 [n, height, "
            f"width, {depth}] or FLOAT32 [n, {depth}, height, width], none of them 0",
        )
    return value


def _only_input(inputs: Sequence[TensorValue]) -> TensorValue:
    if len(inputs) != 1:
        raise TensorError("", f"the model takes one input; {len(inputs)} were given")
    return inputs[0]
