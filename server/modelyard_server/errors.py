"""The server's errors: what a call is refused with.

One class, because a client tells refusals apart by their reason, and every reason travels the same
way: status code, text, machine-readable details. services/status.py turns it into a gRPC status;
    that
is the only place that does.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Code", "QuotaViolation", "Reason", "Refusal", "Resource", "Violation"]


class Code(enum.IntEnum):
    """gRPC status codes the server answers with (google.rpc.Code)."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class Reason(enum.Enum):
    """modelyard.v1.ErrorReason, each with its status code. LOAD_FAILED has two; see Refusal."""

    INVALID_FIELD = Code.INVALID_ARGUMENT, 1
    INVALID_TENSOR = Code.INVALID_ARGUMENT, 2
    KEY_NOT_FOUND = Code.NOT_FOUND, 3
    MODEL_NOT_FOUND = Code.NOT_FOUND, 4
    ROUTE_NOT_FOUND = Code.NOT_FOUND, 5
    DEVICE_NOT_FOUND = Code.NOT_FOUND, 6
    ALREADY_EXISTS = Code.ALREADY_EXISTS, 7
    ETAG_MISMATCH = Code.ABORTED, 8
    MODEL_NEVER_FITS = Code.FAILED_PRECONDITION, 9
    MODEL_IN_USE = Code.FAILED_PRECONDITION, 10
    PLACEMENT_INVALID = Code.FAILED_PRECONDITION, 11
    BUDGET_EXHAUSTED = Code.RESOURCE_EXHAUSTED, 12
    QUEUE_FULL = Code.RESOURCE_EXHAUSTED, 13
    DEADLINE_UNREACHABLE = Code.RESOURCE_EXHAUSTED, 14
    LOAD_FAILED = Code.FAILED_PRECONDITION, 15
    MODEL_FAILED = Code.INTERNAL, 16
    DEADLINE_IN_QUEUE = Code.DEADLINE_EXCEEDED, 17
    DEADLINE_IN_LOAD = Code.DEADLINE_EXCEEDED, 18
    DEADLINE_IN_RUN = Code.DEADLINE_EXCEEDED, 19
    SERVER_DRAINING = Code.UNAVAILABLE, 20
    INTERNAL = Code.INTERNAL, 21
    CONFIG_OWNED = Code.FAILED_PRECONDITION, 22
    CATALOG_UNAVAILABLE = Code.UNAVAILABLE, 23
    WORKER_LOST = Code.UNAVAILABLE, 24
    ANSWER_TOO_LARGE = Code.RESOURCE_EXHAUSTED, 25
    UNSUPPORTED = Code.UNIMPLEMENTED, 26

    @property
    def code(self) -> Code:
        """The status code that goes with it."""
        return self.value[0]

    @property
    def number(self) -> int:
        """Its number in modelyard.v1.ErrorReason."""
        return self.value[1]


@dataclass(frozen=True, slots=True)
class Violation:
    """A field that breaks its rule, or a device whose budget stands in the way."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Resource:
    """What was not found, or exists already."""

    type: str
    name: str


@dataclass(frozen=True, slots=True)
class QuotaViolation:
    """A budget or queue that is exhausted."""

    subject: str
    description: str


@dataclass(slots=True)
class Refusal(Exception):
    """A call is refused.

    Attributes:
        reason: why.
        text: for people; a fixed template with what varies also in metadata. Shown to clients: no
            paths, no object reprs, no versions.
        metadata: what varies, for programs.
        violations: of the request's fields (INVALID_*), or per device (MODEL_NEVER_FITS).
        resource: for NOT_FOUND and ALREADY_EXISTS.
        quota: for RESOURCE_EXHAUSTED.
        retry_after_s: set exactly when a retry can help.
        transient: for LOAD_FAILED: it may pass, which makes the code UNAVAILABLE.
    """

    reason: Reason
    text: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: tuple[Violation, ...] = ()
    resource: Resource | None = None
    quota: tuple[QuotaViolation, ...] = ()
    retry_after_s: float | None = None
    transient: bool = False

    @property
    def code(self) -> Code:
        """The status code to answer with."""
        if self.reason is Reason.LOAD_FAILED and self.transient:
            return Code.UNAVAILABLE
        return self.reason.code

    def __str__(self) -> str:
        return f"{self.reason.name}: {self.text}"
