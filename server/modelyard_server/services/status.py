"""Refusals as statuses: the only place that knows google.rpc."""

from __future__ import annotations

from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from modelyard_server.errors import Reason, Refusal
from modelyard_server.transport.api import StatusReply

__all__ = ["DOMAIN", "reply_of"]

DOMAIN = "modelyard"
"""Domain of every ErrorInfo."""

_NO_RETRY = -1


def reply_of(refusal: Refusal) -> StatusReply:
    """The status of a refusal: code, text, ErrorInfo always, and what else fits its reason.

    A retry hint goes three ways: RetryInfo for programs, retry_after_ms in the text for people, and
    pushback for the retry policy of stock gRPC clients.
    """
    text = refusal.text
    metadata = dict(refusal.metadata)
    status = status_pb2.Status(code=refusal.code)
    info = error_details_pb2.ErrorInfo(reason=refusal.reason.name, domain=DOMAIN)
    pushback_ms = None
    retry: Duration | None = None
    if refusal.retry_after_s is not None:
        pushback_ms = max(1, round(refusal.retry_after_s * 1000))
        text = f"{text}; retry_after_ms={pushback_ms}"
        metadata["retry_after_ms"] = str(pushback_ms)
        retry = Duration()
        retry.FromMilliseconds(pushback_ms)
    elif refusal.code in _RETRIED_BY_DEFAULT:
        pushback_ms = _NO_RETRY
    for key, value in metadata.items():
        info.metadata[key] = value
    status.message = text
    _add(status, info)

    if refusal.violations:
        if refusal.reason is Reason.MODEL_NEVER_FITS:
            failure = error_details_pb2.PreconditionFailure()
            for violation in refusal.violations:
                failure.violations.add(
                    type="BUDGET", subject=violation.field, description=violation.description
                )
            _add(status, failure)
        else:
            bad = error_details_pb2.BadRequest()
            for violation in refusal.violations:
                bad.field_violations.add(field=violation.field, description=violation.description)
            _add(status, bad)
    if refusal.resource is not None:
        _add(
            status,
            error_details_pb2.ResourceInfo(
                resource_type=refusal.resource.type, resource_name=refusal.resource.name
            ),
        )
    if refusal.quota:
        quota = error_details_pb2.QuotaFailure()
        for exhausted in refusal.quota:
            quota.violations.add(subject=exhausted.subject, description=exhausted.description)
        _add(status, quota)
    if retry is not None:
        _add(status, error_details_pb2.RetryInfo(retry_delay=retry))
    return StatusReply(
        code=refusal.code, text=text, details=status.SerializeToString(), pushback_ms=pushback_ms
    )


_RETRIED_BY_DEFAULT = frozenset({8, 14})
"""RESOURCE_EXHAUSTED and UNAVAILABLE: clients retry these unless they are told not to."""


def _add(status: status_pb2.Status, detail: object) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)  # type: ignore[arg-type]  # google.rpc has no stubs: every detail is Any
    status.details.append(packed)
