"""Generate's request and answers: what ``Client`` and ``AsyncClient`` have in common."""

from __future__ import annotations

from collections.abc import Iterable

from modelyard._predict_messages import served_from
from modelyard.generation import FinishReason, GenerationPiece
from modelyard.v1 import inference_service_pb2 as pb

__all__ = ["generate_request", "piece_from"]

_INT32 = range(2**31)
_INT64 = range(-(2**63), 2**63)

_FINISHES = {
    pb.FINISH_REASON_END: FinishReason.END,
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


def generate_request(
    key: str,
    prompt: str,
    *,
    max_new_tokens: int | None,
    stop: str | Iterable[str],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    affinity: str | None,
    version: str | None,
) -> pb.GenerateRequest:
    """Return the message of a generation.

    Raises:
        TypeError: an argument of a type that cannot be sent.
        ValueError: an argument of the right type that cannot be sent.
    """
    request = pb.GenerateRequest(
        key=_text("key", key),
        prompt=_text("prompt", prompt),
        stop=[_text("stop", item) for item in ([stop] if isinstance(stop, str) else stop)],
        temperature=_number("temperature", temperature),
    )
    if max_new_tokens is not None:
        request.max_new_tokens = _integer("max_new_tokens", max_new_tokens, _INT32[1:])
    if top_k is not None:
        request.top_k = _integer("top_k", top_k, _INT32[1:])
    if top_p is not None:
        request.top_p = _number("top_p", top_p)
        if not request.top_p > 0:
            raise ValueError(f"top_p is {top_p}: it must be above 0")
    if seed is not None:
        request.seed = _integer("seed", seed, _INT64)
    if affinity is not None:
        request.affinity = _text("affinity", affinity)
    if version is not None:
        request.version = _text("version", version)
    return request


def piece_from(message: pb.GenerateResponse) -> GenerationPiece:
    """Return what a message says.

    Raises:
        ValueError: it breaks the contract.
    """
    if not message.finish:
        return GenerationPiece(text=message.text, token_ids=tuple(message.token_ids))
    if not message.HasField("served"):
        raise ValueError("the last message does not say what served it")
    return GenerationPiece(
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish=_FINISHES.get(message.finish, FinishReason.UNKNOWN),
        served=served_from(message.served),
        prompt_token_count=message.prompt_token_count,
        token_count=message.token_count,
    )


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def _integer(name: str, value: object, allowed: range) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name} is {value}: {allowed[0]} to {allowed[-1]} may be")
    return value
