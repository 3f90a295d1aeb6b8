"""What a call can end with, besides an answer.

One class per reason of the contract (``proto/modelyard/v1/error_reason.proto``), below
``ModelyardError``. Where a status code covers several reasons there is a class for the code too
(``NotFound``, ``PreconditionFailed``, ``ResourceExhausted``); it is also what a reason this
version does not know turns into.

Not in this tree: arguments that are wrong before anything is sent (``TypeError``, ``ValueError``
and its subclass ``TensorError``), a client used after ``close`` (``RuntimeError``), and
``asyncio.CancelledError``, which passes through untouched.

Every error can be pickled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import grpc

__all__ = [
    "AlreadyExists",
    "AnswerTooLarge",
    "BudgetExhausted",
    "CatalogUnavailable",
    "ConfigOwned",
    "DeadlineExceeded",
    "DeadlinePhase",
    "DeadlineUnreachable",
    "DeviceNotFound",
    "EtagMismatch",
    "InvalidRequest",
    "KeyNotFound",
    "LoadFailed",
    "ModelFailed",
    "ModelInUse",
    "ModelNeverFits",
    "ModelNotFound",
    "ModelyardError",
    "NotFound",
    "PlacementInvalid",
    "PreconditionFailed",
    "QueueFull",
    "ResourceExhausted",
    "RouteNotFound",
    "ServerDraining",
    "ServerError",
    "ServerUnavailable",
    "StreamBroken",
    "Violation",
    "WorkerLost",
]

DeadlinePhase: TypeAlias = Literal["queue", "load", "run"]
"""What a call was waiting for: memory, the model's load, or the model's answer."""

_PHASES: Mapping[str, DeadlinePhase] = {
    "DEADLINE_IN_QUEUE": "queue",
    "DEADLINE_IN_LOAD": "load",
    "DEADLINE_IN_RUN": "run",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One of the things that are wrong with a request.

    Args:
        field: path of the field, for instance ``inputs[0].shape``; for refusals that are about
            memory or state, the resource concerned, for instance ``devices/cuda-1``.
        description: what is wrong with it.
    """

    field: str
    description: str


class ModelyardError(Exception):
    """A call the server refused or could not answer. The text is the server's.

    Args:
        message: what happened.
        code: gRPC status code of the answer.
        reason: name of the contract's reason, for instance ``QUEUE_FULL``; None where the answer
            came without one, as it does from a proxy or when no server was reached.
        metadata: the values the text mentions, by name.
        retry_after_s: seconds after which a retry can help; None when the server promises nothing.
        violations: everything that is wrong with the request, where the server lists it.
    """

    code: grpc.StatusCode
    reason: str | None
    metadata: Mapping[str, str]
    retry_after_s: float | None
    violations: tuple[Violation, ...]

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        violations: Sequence[Violation] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s
        self.violations = tuple(violations)

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call the class with the message alone.
        fields = {
            "code": self.code,
            "reason": self.reason,
            "metadata": dict(self.metadata),
            "retry_after_s": self.retry_after_s,
            "violations": self.violations,
        }
        return _rebuild, (type(self), str(self), fields)


class InvalidRequest(ModelyardError):
    """The request breaks the contract; ``violations`` lists every way in which it does.

    Reasons INVALID_FIELD and INVALID_TENSOR.
    """


class NotFound(ModelyardError):
    """Something the request names does not exist."""


class KeyNotFound(NotFound):
    """No model goes by this key."""


class ModelNotFound(NotFound):
    """No such model."""


class RouteNotFound(NotFound):
    """No such route."""


class DeviceNotFound(NotFound):
    """The server manages no such device."""


class AlreadyExists(ModelyardError):
    """The model's name, or one of its keys, is taken."""


class EtagMismatch(ModelyardError):
    """The resource has changed since its etag was read. Read it again, decide again."""


class PreconditionFailed(ModelyardError):
    """The request is in order, but what it asks for cannot be done as things are."""


class ModelNeverFits(PreconditionFailed):
    """The model is larger than a device's whole budget. Nothing was evicted."""

    @property
    def device(self) -> str | None:
        """Resource name of the (first) device whose budget is too small."""
        return self.metadata.get("device")

    @property
    def needed_bytes(self) -> int | None:
        """Bytes the model needs there."""
        return _integer(self.metadata.get("needed_bytes"))

    @property
    def budget_bytes(self) -> int | None:
        """Bytes that device's budget has in all."""
        return _integer(self.metadata.get("budget_bytes"))


class ModelInUse(PreconditionFailed):
    """The model is pinned, or being removed."""


class PlacementInvalid(PreconditionFailed):
    """The placement names a device the server does not manage, or does not fit the model.

    A map has to give every parameter a device, and each of its keys has to cover one.
    """


class ConfigOwned(PreconditionFailed):
    """The record belongs to the server's configuration file: change it there."""


class ResourceExhausted(ModelyardError):
    """The server has no room for this request now."""


class AnswerTooLarge(ResourceExhausted):
    """With this item's answer, those of a batch would be larger together than a message may be.

    It was computed and thrown away: ask for fewer items at a time.
    """


class BudgetExhausted(ResourceExhausted):
    """Pinned models leave no room for the model, or hold more than the budget asked for."""

    @property
    def device(self) -> str | None:
        """Resource name of the device that is full."""
        return self.metadata.get("device")

    @property
    def needed_bytes(self) -> int | None:
        """Bytes the model needs there."""
        return _integer(self.metadata.get("needed_bytes"))

    @property
    def free_bytes(self) -> int | None:
        """Bytes that are, or can be made, free there."""
        return _integer(self.metadata.get("free_bytes"))

    @property
    def holders(self) -> str | None:
        """Who holds most of the rest, as the server words it."""
        return self.metadata.get("holders")


class QueueFull(ResourceExhausted):
    """Too many requests wait already; ``retry_after_s`` says when to come back."""


class DeadlineUnreachable(ResourceExhausted):
    """The model cannot be ready before the deadline, so the call did not wait for it."""

    @property
    def ready_in_s(self) -> float | None:
        """Seconds until the model is expected to be ready."""
        return _seconds(self.metadata.get("ready_in_ms"))

    @property
    def deadline_in_s(self) -> float | None:
        """Seconds the call had left."""
        return _seconds(self.metadata.get("deadline_in_ms"))


class LoadFailed(ModelyardError):
    """The model's weights could not be loaded."""

    @property
    def transient(self) -> bool:
        """True when it may pass; False when somebody has to change the model's files."""
        return self.code is grpc.StatusCode.UNAVAILABLE


class ModelFailed(ModelyardError):
    """The model raised while it ran."""

    @property
    def exception_type(self) -> str | None:
        """Name of the exception's class."""
        return self.metadata.get("exception_type")

    @property
    def error_id(self) -> str | None:
        """What to look for in the server's log."""
        return self.metadata.get("error_id")


class DeadlineExceeded(ModelyardError):
    """Time ran out. What the call waited for goes on, so that a later call may find it done."""

    @property
    def phase(self) -> DeadlinePhase | None:
        """What the call was waiting for; None when this side's clock ran out first."""
        return _PHASES.get(self.reason or "")


class CatalogUnavailable(ModelyardError):
    """The server cannot write its catalog, for instance because the disk is full.

    Nothing was changed and predictions go on; ``retry_after_s`` says when to try again.
    """


class WorkerLost(ModelyardError):
    """The process that held the model has died; the request had not begun.

    The model is being loaded again; ``retry_after_s`` says when to try again. The client does so by
    itself.
    """


class ServerDraining(ModelyardError):
    """The server is shutting down."""


class ServerUnavailable(ModelyardError):
    """The server cannot be reached, or the connection broke."""


class StreamBroken(ServerUnavailable):
    """A stream ended before it had answered this item. Whether it was computed is not known.

    Predictions are idempotent: it may be asked again, on another stream.
    """


class ServerError(ModelyardError):
    """A defect: of the server, of something between, or an answer this client cannot read."""

    @property
    def error_id(self) -> str | None:
        """What to look for in the server's log."""
        return self.metadata.get("error_id")


def _integer(text: str | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def _seconds(milliseconds: str | None) -> float | None:
    try:
        value = math.nan if milliseconds is None else float(milliseconds)
    except ValueError:
        return None
    return value / 1000 if math.isfinite(value) else None


def _rebuild(cls: type[ModelyardError], message: str, fields: dict[str, Any]) -> ModelyardError:
    return cls(message, **fields)
