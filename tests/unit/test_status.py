"""Refusals as statuses: every reason, its code, and what rides along."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from modelyard.v1 import error_reason_pb2
from modelyard_server.errors import (
    Code,
    QuotaViolation,
    Reason,
    Refusal,
    Resource,
    Violation,
)
from modelyard_server.services.status import DOMAIN, item_error_of, reply_of
from modelyard_server.transport.api import StatusReply

CODES = {
    "INVALID_FIELD": Code.INVALID_ARGUMENT,
    "INVALID_TENSOR": Code.INVALID_ARGUMENT,
    "KEY_NOT_FOUND": Code.NOT_FOUND,
    "MODEL_NOT_FOUND": Code.NOT_FOUND,
    "ROUTE_NOT_FOUND": Code.NOT_FOUND,
    "DEVICE_NOT_FOUND": Code.NOT_FOUND,
    "ALREADY_EXISTS": Code.ALREADY_EXISTS,
    "ETAG_MISMATCH": Code.ABORTED,
    "MODEL_NEVER_FITS": Code.FAILED_PRECONDITION,
    "MODEL_IN_USE": Code.FAILED_PRECONDITION,
    "PLACEMENT_INVALID": Code.FAILED_PRECONDITION,
    "BUDGET_EXHAUSTED": Code.RESOURCE_EXHAUSTED,
    "QUEUE_FULL": Code.RESOURCE_EXHAUSTED,
    "LOAD_FAILED": Code.FAILED_PRECONDITION,
    "MODEL_FAILED": Code.INTERNAL,
    "DEADLINE_IN_QUEUE": Code.DEADLINE_EXCEEDED,
    "DEADLINE_UNREACHABLE": Code.RESOURCE_EXHAUSTED,
    "DEADLINE_IN_LOAD": Code.DEADLINE_EXCEEDED,
    "DEADLINE_IN_RUN": Code.DEADLINE_EXCEEDED,
    "SERVER_DRAINING": Code.UNAVAILABLE,
    "INTERNAL": Code.INTERNAL,
    "CONFIG_OWNED": Code.FAILED_PRECONDITION,
    "CATALOG_UNAVAILABLE": Code.UNAVAILABLE,
    "WORKER_LOST": Code.UNAVAILABLE,
    "ANSWER_TOO_LARGE": Code.RESOURCE_EXHAUSTED,
    "UNSUPPORTED": Code.UNIMPLEMENTED,
}
"""The table of the design, and what the durable catalog added to it."""

MOST_DETAILS = 2048


def details_of(reply: StatusReply) -> dict[str, Any]:
    """The details by the names of their messages."""
    status = status_pb2.Status.FromString(reply.details)
    assert status.code == reply.code
    assert status.message == reply.text
    found: dict[str, Message] = {}
    for packed in status.details:
        name = packed.type_url.rpartition(".")[2]
        assert name not in found
        found[name] = getattr(error_details_pb2, name).FromString(packed.value)
    return found


def test_every_reason_is_of_the_contract_and_has_the_designs_code() -> None:
    assert {reason.name for reason in Reason} == set(CODES)
    for reason in Reason:
        code, number = reason.value
        assert error_reason_pb2.ErrorReason.Value(f"ERROR_REASON_{reason.name}") == number
        assert reason.code is code is CODES[reason.name]


def test_a_load_that_may_pass_is_unavailable() -> None:
    assert Refusal(Reason.LOAD_FAILED, "x").code is Code.FAILED_PRECONDITION
    assert Refusal(Reason.LOAD_FAILED, "x", transient=True).code is Code.UNAVAILABLE
    assert Refusal(Reason.QUEUE_FULL, "x", transient=True).code is Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("retry_after_s", [None, 0.25])
@pytest.mark.parametrize("reason", list(Reason))
def test_error_info_always_and_retry_info_exactly_when_a_retry_can_help(
    reason: Reason, retry_after_s: float | None
) -> None:
    refusal = Refusal(reason, "it is so", metadata={"device": "d"}, retry_after_s=retry_after_s)
    reply = reply_of(refusal)
    details = details_of(reply)
    info = details["ErrorInfo"]
    assert (info.reason, info.domain) == (reason.name, DOMAIN) == (reason.name, "modelyard")
    assert info.metadata["device"] == "d"
    assert reply.code == refusal.code
    if retry_after_s is None:
        assert "RetryInfo" not in details
        assert "retry_after_ms" not in reply.text
        assert "retry_after_ms" not in info.metadata
        retried = refusal.code in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)
        assert reply.pushback_ms == (-1 if retried else None)
    else:
        assert details["RetryInfo"].retry_delay.ToMilliseconds() == 250
        assert reply.text.endswith("; retry_after_ms=250")
        assert info.metadata["retry_after_ms"] == "250"
        # Within the deadline that is out of reach no attempt could fare better.
        too_late = reason is Reason.DEADLINE_UNREACHABLE
        assert reply.pushback_ms == (-1 if too_late else 250)


@pytest.mark.parametrize("retry_after_s", [0.0, 1e-9, 0.0004])
def test_a_retry_is_never_at_once(retry_after_s: float) -> None:
    reply = reply_of(Refusal(Reason.QUEUE_FULL, "full", retry_after_s=retry_after_s))
    assert reply.pushback_ms == 1
    assert details_of(reply)["RetryInfo"].retry_delay.ToMilliseconds() == 1


def test_violations_of_fields_are_a_bad_request() -> None:
    violations = (Violation("key", "too long"), Violation("inputs[0]", "no"))
    details = details_of(reply_of(Refusal(Reason.INVALID_FIELD, "x", violations=violations)))
    found = [(v.field, v.description) for v in details["BadRequest"].field_violations]
    assert found == [("key", "too long"), ("inputs[0]", "no")]


def test_violations_of_budgets_are_a_precondition_failure() -> None:
    violations = (Violation("devices/cuda-0", "needs 2 bytes"),)
    details = details_of(reply_of(Refusal(Reason.MODEL_NEVER_FITS, "x", violations=violations)))
    (found,) = details["PreconditionFailure"].violations
    assert (found.type, found.subject, found.description) == (
        "BUDGET",
        "devices/cuda-0",
        "needs 2 bytes",
    )
    assert "BadRequest" not in details


def test_a_resource_and_a_quota_are_named() -> None:
    reply = reply_of(Refusal(Reason.KEY_NOT_FOUND, "x", resource=Resource("key", "k")))
    resource = details_of(reply)["ResourceInfo"]
    assert (resource.resource_type, resource.resource_name) == ("key", "k")
    reply = reply_of(Refusal(Reason.QUEUE_FULL, "x", quota=(QuotaViolation("queue", "full"),)))
    (violation,) = details_of(reply)["QuotaFailure"].violations
    assert (violation.subject, violation.description) == ("queue", "full")


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(
            Reason.INVALID_FIELD,
            "; ".join(f"model.keys[{i}]: must match something long" for i in range(1000)),
            violations=tuple(Violation(f"model.keys[{i}]", "must match") for i in range(1000)),
        ),
        Refusal(Reason.INVALID_FIELD, "x" * 100_000, violations=(Violation("f", "x" * 100_000),)),
        Refusal(Reason.KEY_NOT_FOUND, "x", resource=Resource("key", "k" * 10_000)),
        Refusal(Reason.BUDGET_EXHAUSTED, "x", metadata={"holders": "h" * 10_000}),
        Refusal(Reason.QUEUE_FULL, "x", quota=(QuotaViolation("q", "d" * 10_000),)),
        Refusal(Reason.INVALID_FIELD, "é" * 5_000),
    ],
    ids=["many violations", "long text", "long resource", "long metadata", "long quota", "utf-8"],
)
def test_details_stay_within_what_clients_accept_as_trailers(refusal: Refusal) -> None:
    # Clients take 8 KiB of metadata; beyond that they report an error of their own instead.
    reply = reply_of(refusal)
    assert len(reply.details) < MOST_DETAILS
    assert len(reply.text.encode()) < MOST_DETAILS
    details = details_of(reply)
    assert details["ErrorInfo"].reason == refusal.reason.name
    if refusal.violations:
        assert details["BadRequest"].field_violations


@pytest.mark.parametrize("retry_after_s", [None, 0.0, 0.25])
@pytest.mark.parametrize("reason", list(Reason))
def test_an_item_is_told_what_the_status_says(reason: Reason, retry_after_s: float | None) -> None:
    refusal = Refusal(
        reason,
        "it is so",
        metadata={"device": "d"},
        violations=(Violation("inputs[0]", "odd"),),
        quota=(QuotaViolation("devices/cpu", "full"),),
        resource=Resource("key", "k"),
        retry_after_s=retry_after_s,
    )
    reply, error = reply_of(refusal), item_error_of(refusal)
    info = details_of(reply)["ErrorInfo"]
    assert (error.code, error.message) == (reply.code, reply.text)
    assert error_reason_pb2.ErrorReason.Name(error.reason) == f"ERROR_REASON_{info.reason}"
    assert error.metadata == info.metadata
    assert [(v.subject, v.description) for v in error.violations] == [
        ("inputs[0]", "odd"),
        ("devices/cpu", "full"),
    ]
    assert error.resource_name == "k"
    assert error.HasField("retry_delay") == (retry_after_s is not None)
    if retry_after_s is not None:
        assert error.retry_delay == details_of(reply)["RetryInfo"].retry_delay


def test_an_item_is_told_no_more_than_a_bounded_message_holds() -> None:
    long = "é" * 5_000
    error = item_error_of(
        Refusal(
            Reason.INVALID_FIELD,
            long,
            metadata={str(i): long for i in range(100)},
            violations=tuple(Violation(f"{i} {long}", long) for i in range(1000)),
            resource=Resource("key", long),
            retry_after_s=1.0,
        )
    )
    assert error.ByteSize() < MOST_DETAILS
    assert error.metadata["retry_after_ms"] == "1000"
    assert error.violations[-1].description.endswith("more")


def test_a_usual_refusal_with_everything_is_small() -> None:
    reply = reply_of(
        Refusal(
            Reason.BUDGET_EXHAUSTED,
            "pinned models leave 5 free bytes on devices/cuda-0",
            metadata={"device": "devices/cuda-0", "needed_bytes": "1", "free_bytes": "5"},
            resource=Resource("model", "models/m"),
            quota=(QuotaViolation("devices/cuda-0", "pinned models leave 5 free bytes"),),
            retry_after_s=1.5,
        )
    )
    assert len(reply.details) < MOST_DETAILS
    assert set(details_of(reply)) == {"ErrorInfo", "ResourceInfo", "QuotaFailure", "RetryInfo"}


def test_a_refusal_reads_well_in_a_log() -> None:
    assert str(Refusal(Reason.QUEUE_FULL, "too many")) == "QUEUE_FULL: too many"
