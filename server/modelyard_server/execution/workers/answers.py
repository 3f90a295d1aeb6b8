"""Reads what a worker answers, and checks whether it can be.

All but outcome_of raise ValueError for what cannot be; other errors of malformed data come as they
are.
"""

from __future__ import annotations

from collections.abc import Mapping

from modelyard_server.execution.engine import (
    Loaded,
    ModelFailed,
    RunOutcome,
    Unloaded,
    WorkerLost,
)
from modelyard_server.execution.workers.measurements import decode_points
from modelyard_server.execution.workers.records import (
    decode_bytes,
    decode_loaded,
    decode_price,
    decode_unloaded,
)
from modelyard_server.execution.workers.worker_process import Answer, ModelMissing, WorkerGone
from modelyard_server.runtimes.api import Price
from modelyard_server.runtimes.targets import Target
from modelyard_server.weights.activation_model import ActivationPoint

__all__ = [
    "back_of",
    "is_back_of",
    "loaded_of",
    "measured_of",
    "outcome_of",
    "price_of",
    "unloaded_of",
]


def price_of(answer: Answer) -> Price:
    """What a model costs."""
    return decode_price(answer.message["result"])


def loaded_of(answer: Answer, target: Target, devices: int) -> tuple[Loaded, dict[int, int]]:
    """What became of a load.

    Args:
        answer: of the worker.
        target: that was given to it.
        devices: how many the yard has.

    Returns:
        That, and all bytes that the model holds, by position of the device.
    """
    loaded = decode_loaded(answer.message["result"], devices)
    held = decode_bytes(answer.message["held"], devices)
    if not loaded.own_bytes.keys() <= held.keys() <= set(target.devices):
        raise ValueError("it is on devices it was not given")
    return loaded, held


def unloaded_of(
    answer: Answer,
    held: Mapping[int, int],
    keep: bool,
    devices: int,
    most_bytes: int | None = None,
) -> Unloaded:
    """What became of an unload.

    Args:
        answer: of the worker.
        held: all bytes that the model held, by position of the device.
        keep: a copy was asked for.
        devices: how many the yard has.
        most_bytes: what that might hold beside its shared tensors; None for any number.
    """
    unloaded = decode_unloaded(answer.message["result"], devices)
    if any(size > held.get(device, 0) for device, size in unloaded.freed.items()):
        raise ValueError("it gave back what it did not have")
    if unloaded.kept_bytes is not None and not keep:
        raise ValueError("it kept what was not to be kept")
    if unloaded.refused_bytes is not None and (not keep or unloaded.kept_bytes is not None):
        raise ValueError("it refused what it was not to keep, or has kept")
    if most_bytes is not None:
        if unloaded.kept_bytes is not None and unloaded.kept_bytes > most_bytes:
            raise ValueError("it kept more than it might")
        if unloaded.refused_bytes is not None and unloaded.refused_bytes <= most_bytes:
            raise ValueError("it refused to keep what it might have kept")
    return unloaded


def measured_of(answer: Answer) -> tuple[ActivationPoint, ...]:
    """What a run took, if it was measured."""
    return decode_points(answer.message.get("measured", ()))


def is_back_of(answer: Answer) -> bool:
    """Whether the memory of a copy is back."""
    is_back = answer.message["result"]
    if type(is_back) is not bool:
        raise ValueError("a copy is back or not")
    return is_back


def back_of(answer: Answer, devices: int) -> dict[int, int]:
    """What is back since an unload, by position of the device."""
    return decode_bytes(answer.message["result"], devices)


def outcome_of(outcome: Answer | WorkerGone) -> RunOutcome | None:
    """What became of a run; None if it was abandoned before it began. Never raises."""
    if isinstance(outcome, WorkerGone):
        if outcome.is_suspect:
            return ModelFailed("WorkerDied", f"its worker died while it ran ({outcome.cause})")
        return WorkerLost(f"its worker died ({outcome.cause})")
    if isinstance(outcome.error, ModelMissing):
        return WorkerLost("its worker does not have it any more")
    if outcome.error is not None:
        return outcome.error
    return outcome.tensors if "result" in outcome.message else None
