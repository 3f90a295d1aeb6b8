"""Refusals of the core in the words of the contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from modelyard_server import _core
from modelyard_server.errors import QuotaViolation, Reason, Refusal, Resource, Violation

__all__ = ["refusal_of"]


def refusal_of(
    refuse: _core.Refuse, *, device_names: Sequence[str], name_of: Callable[[int], str]
) -> Refusal:
    """The core's refusal in the words of the contract.

    Args:
        refuse: what the core said.
        device_names: resource names of the devices, by position.
        name_of: a model's id by the core's id for it; for naming who holds most.
    """
    why = _core.RefuseReason
    match refuse.reason:
        case why.NEVER_FITS | why.BUDGET_EXHAUSTED:
            return _no_room(refuse, device_names[refuse.device], name_of)
        case why.QUEUE_FULL:
            text = "too many requests wait already"
            return Refusal(
                Reason.QUEUE_FULL,
                text,
                quota=(QuotaViolation("queue", text),),
                retry_after_s=max(0.05, refuse.retry_after_ns * 1e-9),
            )
        case why.LOAD_FAILED:
            transient = refuse.failure is _core.LoadFailure.TRANSIENT
            retry_s = refuse.retry_after_ns * 1e-9
            return Refusal(
                Reason.LOAD_FAILED,
                "the model could not be loaded",
                metadata={"next_attempt_in_ms": str(round(retry_s * 1000))},
                retry_after_s=retry_s if transient else None,
                transient=transient,
            )
        case why.DEADLINE_UNREACHABLE:
            ready_s, deadline_s = refuse.needs_ns * 1e-9, refuse.left_ns * 1e-9
            text = (
                f"the model can answer in about {ready_s:.3g} s at best, and the deadline is in "
                f"{deadline_s:.3g} s"
            )
            return Refusal(
                Reason.DEADLINE_UNREACHABLE,
                text,
                metadata={
                    "ready_in_ms": str(round(ready_s * 1000)),
                    "deadline_in_ms": str(round(deadline_s * 1000)),
                },
                quota=(QuotaViolation("time", text),),
                retry_after_s=refuse.retry_after_ns * 1e-9,
            )
        case why.DEADLINE_IN_QUEUE:
            return Refusal(
                Reason.DEADLINE_IN_QUEUE,
                "the deadline passed while waiting for memory",
                retry_after_s=refuse.retry_after_ns * 1e-9,
            )
        case why.DEADLINE_IN_LOAD:
            return Refusal(
                Reason.DEADLINE_IN_LOAD,
                "the deadline passed while the model was being loaded",
                retry_after_s=refuse.retry_after_ns * 1e-9,
            )
        case _:
            return Refusal(
                Reason.MODEL_NOT_FOUND,
                "the model was removed",
                resource=Resource("model", ""),
            )


def _no_room(refuse: _core.Refuse, device: str, name_of: Callable[[int], str]) -> Refusal:
    metadata = {"device": device, "needed_bytes": str(refuse.needed)}
    if refuse.reason is _core.RefuseReason.NEVER_FITS:
        text = (
            f"the model needs {refuse.needed} bytes on {device}, whose budget is "
            f"{refuse.budget} bytes"
        )
        return Refusal(
            Reason.MODEL_NEVER_FITS,
            text,
            metadata=metadata | {"budget_bytes": str(refuse.budget)},
            violations=(Violation(device, text),),
        )
    holders = ", ".join(f"{name_of(model)}={size}" for model, size in refuse.holders)
    text = (
        f"pinned models leave {refuse.free} free bytes on {device}, and the model needs "
        f"{refuse.needed}; most is held by {holders or 'nobody'}"
    )
    return Refusal(
        Reason.BUDGET_EXHAUSTED,
        text,
        metadata=metadata | {"free_bytes": str(refuse.free), "holders": holders},
        quota=(QuotaViolation(device, text),),
    )
