"""From gRPC statuses to errors: the one place where that happens.

The server sends ``google.rpc.Status`` in the trailer ``grpc-status-details-bin``, with an
ErrorInfo of the domain "modelyard" and whatever else fits. What comes without, from a proxy or
from gRPC itself, is classed by its status code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from modelyard import errors
from modelyard.v1 import error_reason_pb2, inference_service_pb2

__all__ = [
    "ERROR_DOMAIN",
    "error_from_item",
    "error_from_rpc",
    "reading_answer",
    "reason_name",
]

ERROR_DOMAIN: Final = "modelyard"
"""``ErrorInfo.domain`` of errors whose reasons are the contract's."""

_REASON_PREFIX: Final = "ERROR_REASON_"

_CODES: Final[Mapping[int, grpc.StatusCode]] = MappingProxyType(
    {code.value[0]: code for code in grpc.StatusCode if code is not grpc.StatusCode.OK}
)

_DETAILS_KEY: Final = "grpc-status-details-bin"

_BY_REASON: Final[Mapping[str, type[errors.ModelyardError]]] = MappingProxyType(
    {
        "INVALID_FIELD": errors.InvalidRequest,
        "INVALID_TENSOR": errors.InvalidRequest,
        "KEY_NOT_FOUND": errors.KeyNotFound,
        "MODEL_NOT_FOUND": errors.ModelNotFound,
        "ROUTE_NOT_FOUND": errors.RouteNotFound,
        "DEVICE_NOT_FOUND": errors.DeviceNotFound,
        "ALREADY_EXISTS": errors.AlreadyExists,
        "ETAG_MISMATCH": errors.EtagMismatch,
        "MODEL_NEVER_FITS": errors.ModelNeverFits,
        "MODEL_IN_USE": errors.ModelInUse,
        "PLACEMENT_INVALID": errors.PlacementInvalid,
        "BUDGET_EXHAUSTED": errors.BudgetExhausted,
        "QUEUE_FULL": errors.QueueFull,
        "DEADLINE_UNREACHABLE": errors.DeadlineUnreachable,
        "LOAD_FAILED": errors.LoadFailed,
        "MODEL_FAILED": errors.ModelFailed,
        "DEADLINE_IN_QUEUE": errors.DeadlineExceeded,
        "DEADLINE_IN_LOAD": errors.DeadlineExceeded,
        "DEADLINE_IN_RUN": errors.DeadlineExceeded,
        "SERVER_DRAINING": errors.ServerDraining,
        "INTERNAL": errors.ServerError,
        "CONFIG_OWNED": errors.ConfigOwned,
        "CATALOG_UNAVAILABLE": errors.CatalogUnavailable,
        "WORKER_LOST": errors.WorkerLost,
        "ANSWER_TOO_LARGE": errors.AnswerTooLarge,
        "UNSUPPORTED": errors.ModelyardError,
    }
)

# Codes that are missing here become a plain ModelyardError.
_BY_CODE: Final[Mapping[grpc.StatusCode, type[errors.ModelyardError]]] = MappingProxyType(
    {
        grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
        grpc.StatusCode.NOT_FOUND: errors.NotFound,
        grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
        grpc.StatusCode.FAILED_PRECONDITION: errors.PreconditionFailed,
        grpc.StatusCode.RESOURCE_EXHAUSTED: errors.ResourceExhausted,
        grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
        grpc.StatusCode.UNAVAILABLE: errors.ServerUnavailable,
        # From a server that stops with calls under way, or a channel that another thread closed.
        # A caller's own cancellation of an awaited call is a CancelledError and never gets here.
        grpc.StatusCode.CANCELLED: errors.ServerUnavailable,
        grpc.StatusCode.UNKNOWN: errors.ServerError,
        grpc.StatusCode.UNIMPLEMENTED: errors.ServerError,
        grpc.StatusCode.INTERNAL: errors.ServerError,
        grpc.StatusCode.DATA_LOSS: errors.ServerError,
    }
)


def error_from_rpc(error: grpc.RpcError, *, target: str) -> errors.ModelyardError:
    """Return the typed error for a failed call, of grpc or grpc.aio.

    Args:
        error: as raised by a stub.
        target: whom the call was for; named when nobody answered.
    """
    code = error.code()
    details = _read_details(error)
    message = error.details() or f"the call ended with {code.name}"
    cls = _BY_REASON.get(details.reason or "") or _BY_CODE.get(code, errors.ModelyardError)
    if cls is errors.ServerUnavailable:
        message = (
            f"the server at {target} cannot be reached, or the connection broke: {message}; "
            "check that it runs and that the address is right"
        )
    elif cls is errors.DeadlineExceeded and details.reason is None:
        message = (
            f"the server at {target} did not answer in time: {message}; "
            "if it can be reached, allow more time"
        )
    return cls(
        message,
        code=code,
        reason=details.reason,
        metadata=details.metadata,
        retry_after_s=details.retry_after_s,
        violations=details.violations,
    )


def error_from_item(message: inference_service_pb2.PredictBatchError) -> errors.ModelyardError:
    """Return the typed error for an item of a batch that was refused or failed."""
    reason = reason_name(message.reason)
    # A code that is none is a server's of some other kind.
    code = _CODES.get(message.code, grpc.StatusCode.UNKNOWN)
    cls = _BY_REASON.get(reason or "") or _BY_CODE.get(code, errors.ModelyardError)
    delay = message.retry_delay
    return cls(
        message.message or f"the item ended with {code.name}",
        code=code,
        reason=reason,
        metadata=dict(message.metadata),
        retry_after_s=(
            max(0.0, delay.seconds + delay.nanos / 1e9) if message.HasField("retry_delay") else None
        ),
        violations=[
            errors.Violation(field=violation.subject, description=violation.description)
            for violation in message.violations
        ],
    )


def reason_name(number: int) -> str | None:
    """Return the name of a reason without its prefix; None for none.

    One that this version does not know goes by its number.
    """
    if not number:
        return None
    value = error_reason_pb2.ErrorReason.DESCRIPTOR.values_by_number.get(number)
    return str(number) if value is None else value.name.removeprefix(_REASON_PREFIX)


@contextmanager
def reading_answer(target: str) -> Iterator[None]:
    """Turn a ``ValueError`` about what the server sent into a ``ServerError``.

    The caller did nothing wrong, so nothing that says otherwise may reach them.
    """
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise errors.ServerError(
            f"the answer of the server at {target} cannot be read: {error}; "
            "is it a modelyard server of a version that fits this client?",
            code=grpc.StatusCode.INTERNAL,
        ) from error


@dataclass(slots=True, kw_only=True)
class _Details:
    """What the status details say, as far as they are there."""

    reason: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None
    violations: list[errors.Violation] = field(default_factory=list)


def _read_details(error: grpc.RpcError) -> _Details:
    details = _Details()
    try:
        for packed in _packed_details(error):
            _read_detail(packed, details)
    except DecodeError:
        # Somebody else's idea of this trailer: the status code still holds.
        return _Details()
    return details


def _packed_details(error: grpc.RpcError) -> list[AnyMessage]:
    # Pairs, in both of gRPC's implementations; its annotations differ.
    trailers = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    for key, value in trailers:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            return list(status_pb2.Status.FromString(value).details)
    return []


def _read_detail(packed: AnyMessage, details: _Details) -> None:
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    bad_request = error_details_pb2.BadRequest()
    precondition = error_details_pb2.PreconditionFailure()
    quota = error_details_pb2.QuotaFailure()
    if _unpack(packed, info):
        # Another domain's reasons may share a name with ours and mean something else.
        if info.domain == ERROR_DOMAIN:
            details.reason = info.reason or None
            details.metadata = dict(info.metadata)
    elif _unpack(packed, retry):
        delay = retry.retry_delay
        details.retry_after_s = max(0.0, delay.seconds + delay.nanos / 1e9)
    elif _unpack(packed, bad_request):
        details.violations += [
            errors.Violation(field=violation.field, description=violation.description)
            for violation in bad_request.field_violations
        ]
    elif _unpack(packed, precondition) or _unpack(packed, quota):
        details.violations += [
            errors.Violation(field=violation.subject, description=violation.description)
            for violation in (*precondition.violations, *quota.violations)
        ]


def _unpack(packed: AnyMessage, message: Message) -> bool:
    # Bound to Message here because google.rpc is untyped.
    return packed.Unpack(message)
