"""From statuses, built by hand here, to the client's typed errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from modelyard import errors
from modelyard._status import error_from_rpc, reading_answer
from modelyard.tensors import TensorError
from modelyard.v1.error_reason_pb2 import ErrorReason

Code = grpc.StatusCode
DETAILS_KEY = "grpc-status-details-bin"


def info(
    reason: str, metadata: Mapping[str, str] | None = None, domain: str = "modelyard"
) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=metadata or {})


def retry(delay: Duration) -> error_details_pb2.RetryInfo:
    return error_details_pb2.RetryInfo(retry_delay=delay)


def rpc_error(
    code: grpc.StatusCode, *details: Any, text: str = "no", trailer: bytes | None = None
) -> grpc.aio.AioRpcError:
    """The error a stub raises for a status with these details."""
    status = status_pb2.Status(code=code.value[0], message=text)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    value = status.SerializeToString() if trailer is None else trailer
    trailers = [("x-other", "1"), (DETAILS_KEY, value)] if details or trailer else []
    return grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details=text
    )


def translated(code: grpc.StatusCode, *details: Any, **rest: Any) -> errors.ModelyardError:
    return error_from_rpc(rpc_error(code, *details, **rest), target="there:1")


BY_REASON = [
    ("INVALID_FIELD", Code.INVALID_ARGUMENT, errors.InvalidRequest),
    ("INVALID_TENSOR", Code.INVALID_ARGUMENT, errors.InvalidRequest),
    ("KEY_NOT_FOUND", Code.NOT_FOUND, errors.KeyNotFound),
    ("MODEL_NOT_FOUND", Code.NOT_FOUND, errors.ModelNotFound),
    ("ROUTE_NOT_FOUND", Code.NOT_FOUND, errors.RouteNotFound),
    ("DEVICE_NOT_FOUND", Code.NOT_FOUND, errors.DeviceNotFound),
    ("ALREADY_EXISTS", Code.ALREADY_EXISTS, errors.AlreadyExists),
    ("ETAG_MISMATCH", Code.ABORTED, errors.EtagMismatch),
    ("MODEL_NEVER_FITS", Code.FAILED_PRECONDITION, errors.ModelNeverFits),
    ("MODEL_IN_USE", Code.FAILED_PRECONDITION, errors.ModelInUse),
    ("PLACEMENT_INVALID", Code.FAILED_PRECONDITION, errors.PlacementInvalid),
    ("BUDGET_EXHAUSTED", Code.RESOURCE_EXHAUSTED, errors.BudgetExhausted),
    ("QUEUE_FULL", Code.RESOURCE_EXHAUSTED, errors.QueueFull),
    ("DEADLINE_UNREACHABLE", Code.RESOURCE_EXHAUSTED, errors.DeadlineUnreachable),
    ("LOAD_FAILED", Code.UNAVAILABLE, errors.LoadFailed),
    ("MODEL_FAILED", Code.INTERNAL, errors.ModelFailed),
    ("DEADLINE_IN_QUEUE", Code.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
    ("DEADLINE_IN_LOAD", Code.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
    ("DEADLINE_IN_RUN", Code.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
    ("SERVER_DRAINING", Code.UNAVAILABLE, errors.ServerDraining),
    ("INTERNAL", Code.INTERNAL, errors.ServerError),
    ("CONFIG_OWNED", Code.FAILED_PRECONDITION, errors.ConfigOwned),
    ("CATALOG_UNAVAILABLE", Code.UNAVAILABLE, errors.CatalogUnavailable),
    ("WORKER_LOST", Code.UNAVAILABLE, errors.WorkerLost),
    ("ANSWER_TOO_LARGE", Code.RESOURCE_EXHAUSTED, errors.AnswerTooLarge),
    ("UNSUPPORTED", Code.UNIMPLEMENTED, errors.ModelyardError),
]


class TestReasons:
    def test_every_reason_of_the_contract_is_in_the_table(self) -> None:
        names = {name.removeprefix("ERROR_REASON_") for name in ErrorReason.keys()}  # noqa: SIM118  an enum wrapper is no mapping
        assert {reason for reason, _, _ in BY_REASON} == names - {"UNSPECIFIED"}

    @pytest.mark.parametrize(("reason", "code", "cls"), BY_REASON)
    def test_a_reason_has_its_class(
        self, reason: str, code: grpc.StatusCode, cls: type[errors.ModelyardError]
    ) -> None:
        error = translated(code, info(reason, {"a": "b"}), text="the text")
        assert type(error) is cls
        assert (error.code, error.reason, error.metadata) == (code, reason, {"a": "b"})
        assert str(error) == "the text"
        assert error.retry_after_s is None and error.violations == ()

    def test_a_model_that_never_fits_says_how_large_it_is(self) -> None:
        metadata = {"device": "devices/cuda-1", "needed_bytes": "300", "budget_bytes": "200"}
        error = translated(Code.FAILED_PRECONDITION, info("MODEL_NEVER_FITS", metadata))
        assert isinstance(error, errors.ModelNeverFits)
        assert (error.device, error.needed_bytes, error.budget_bytes) == (
            "devices/cuda-1",
            300,
            200,
        )

    def test_an_exhausted_budget_says_who_holds_it(self) -> None:
        metadata = {"device": "d", "needed_bytes": "3", "free_bytes": "0", "holders": "a, b"}
        error = translated(Code.RESOURCE_EXHAUSTED, info("BUDGET_EXHAUSTED", metadata))
        assert isinstance(error, errors.BudgetExhausted)
        assert (error.device, error.needed_bytes, error.free_bytes) == ("d", 3, 0)
        assert error.holders == "a, b"

    def test_an_unreachable_deadline_says_when_the_model_is_ready(self) -> None:
        metadata = {"ready_in_ms": "2500", "deadline_in_ms": "800.5"}
        error = translated(Code.RESOURCE_EXHAUSTED, info("DEADLINE_UNREACHABLE", metadata))
        assert isinstance(error, errors.DeadlineUnreachable)
        assert (error.ready_in_s, error.deadline_in_s) == (2.5, 0.8005)

    def test_a_failed_model_names_exception_and_log_entry(self) -> None:
        metadata = {"exception_type": "RuntimeError", "error_id": "e1"}
        error = translated(Code.INTERNAL, info("MODEL_FAILED", metadata))
        assert isinstance(error, errors.ModelFailed)
        assert (error.exception_type, error.error_id) == ("RuntimeError", "e1")
        defect = translated(Code.INTERNAL, info("INTERNAL", {"error_id": "e2"}))
        assert isinstance(defect, errors.ServerError) and defect.error_id == "e2"

    @pytest.mark.parametrize(
        ("code", "transient"), [(Code.UNAVAILABLE, True), (Code.FAILED_PRECONDITION, False)]
    )
    def test_the_code_of_a_failed_load_tells_whether_it_may_pass(
        self, code: grpc.StatusCode, transient: bool
    ) -> None:
        error = translated(code, info("LOAD_FAILED"))
        assert isinstance(error, errors.LoadFailed) and error.transient is transient

    @pytest.mark.parametrize("phase", ["queue", "load", "run"])
    def test_a_missed_deadline_names_its_phase(self, phase: str) -> None:
        error = translated(Code.DEADLINE_EXCEEDED, info(f"DEADLINE_IN_{phase.upper()}"))
        assert isinstance(error, errors.DeadlineExceeded) and error.phase == phase

    @pytest.mark.parametrize("text", ["", "many", "1e400x"])
    def test_figures_that_are_none_are_left_out(self, text: str) -> None:
        never = translated(
            Code.FAILED_PRECONDITION, info("MODEL_NEVER_FITS", {"needed_bytes": text})
        )
        late = translated(
            Code.RESOURCE_EXHAUSTED, info("DEADLINE_UNREACHABLE", {"ready_in_ms": text})
        )
        assert isinstance(never, errors.ModelNeverFits)
        assert isinstance(late, errors.DeadlineUnreachable)
        assert (never.needed_bytes, never.budget_bytes) == (None, None)
        assert (late.ready_in_s, late.deadline_in_s) == (None, None)


class TestDetails:
    def test_retry_info_is_seconds(self) -> None:
        delay = Duration(seconds=1, nanos=250_000_000)
        error = translated(Code.RESOURCE_EXHAUSTED, info("QUEUE_FULL"), retry(delay))
        assert error.retry_after_s == 1.25

    def test_a_negative_delay_is_none_at_all(self) -> None:
        error = translated(Code.RESOURCE_EXHAUSTED, info("QUEUE_FULL"), retry(Duration(seconds=-5)))
        assert error.retry_after_s == 0.0

    def test_every_violation_of_a_bad_request_is_listed(self) -> None:
        bad = error_details_pb2.BadRequest(
            field_violations=[
                {"field": "key", "description": "is empty"},
                {"field": "inputs", "description": "has none"},
            ]
        )
        error = translated(Code.INVALID_ARGUMENT, info("INVALID_FIELD"), bad)
        assert error.violations == (
            errors.Violation(field="key", description="is empty"),
            errors.Violation(field="inputs", description="has none"),
        )

    @pytest.mark.parametrize(
        "kind", [error_details_pb2.PreconditionFailure, error_details_pb2.QuotaFailure]
    )
    def test_other_failures_are_violations_of_their_subject(self, kind: Any) -> None:
        failure = kind(violations=[{"subject": "devices/cuda-1", "description": "too small"}])
        error = translated(Code.FAILED_PRECONDITION, info("MODEL_NEVER_FITS"), failure)
        assert error.violations == (
            errors.Violation(field="devices/cuda-1", description="too small"),
        )

    def test_details_of_unknown_type_are_passed_over(self) -> None:
        unknown = error_details_pb2.DebugInfo(detail="x")
        error = translated(Code.NOT_FOUND, unknown, info("KEY_NOT_FOUND"))
        assert type(error) is errors.KeyNotFound

    def test_the_blocking_client_s_errors_are_read_alike(self) -> None:
        of_aio = rpc_error(Code.RESOURCE_EXHAUSTED, info("QUEUE_FULL"), retry(Duration(seconds=2)))

        class Blocking(grpc.RpcError):
            def code(self) -> grpc.StatusCode:
                return Code.RESOURCE_EXHAUSTED

            def details(self) -> str:
                return "no"

            def trailing_metadata(self) -> Any:
                return tuple(of_aio.trailing_metadata() or ())

        error = error_from_rpc(Blocking(), target="there:1")
        assert type(error) is errors.QueueFull and error.retry_after_s == 2.0


class TestFallback:
    @pytest.mark.parametrize(
        ("code", "cls"),
        [
            (Code.INVALID_ARGUMENT, errors.InvalidRequest),
            (Code.NOT_FOUND, errors.NotFound),
            (Code.ALREADY_EXISTS, errors.AlreadyExists),
            (Code.FAILED_PRECONDITION, errors.PreconditionFailed),
            (Code.RESOURCE_EXHAUSTED, errors.ResourceExhausted),
            (Code.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
            (Code.UNAVAILABLE, errors.ServerUnavailable),
            (Code.CANCELLED, errors.ServerUnavailable),
            (Code.INTERNAL, errors.ServerError),
            (Code.UNKNOWN, errors.ServerError),
            (Code.UNIMPLEMENTED, errors.ServerError),
            (Code.DATA_LOSS, errors.ServerError),
            (Code.ABORTED, errors.ModelyardError),
            (Code.PERMISSION_DENIED, errors.ModelyardError),
            (Code.UNAUTHENTICATED, errors.ModelyardError),
            (Code.OUT_OF_RANGE, errors.ModelyardError),
        ],
    )
    @pytest.mark.parametrize(
        "details",
        [(), (info("FROM_THE_FUTURE"),), (info("QUEUE_FULL", domain="proxy.example"),)],
        ids=["no details", "unknown reason", "other domain"],
    )
    def test_the_status_code_decides_where_no_reason_does(
        self, code: grpc.StatusCode, cls: type[errors.ModelyardError], details: tuple[Any, ...]
    ) -> None:
        error = translated(code, *details)
        assert type(error) is cls and error.code is code

    def test_an_unknown_reason_is_kept(self) -> None:
        error = translated(Code.NOT_FOUND, info("FROM_THE_FUTURE"))
        assert error.reason == "FROM_THE_FUTURE"

    def test_another_domain_s_reason_is_not_ours(self) -> None:
        error = translated(Code.UNAVAILABLE, info("QUEUE_FULL", {"a": "b"}, domain="proxy.example"))
        assert error.reason is None and error.metadata == {}

    def test_a_trailer_that_is_no_status_leaves_the_code(self) -> None:
        error = translated(Code.NOT_FOUND, trailer=b"\xff\xff\xff")
        assert type(error) is errors.NotFound and error.reason is None

    def test_a_detail_that_is_not_what_it_says_leaves_the_code(self) -> None:
        status = status_pb2.Status(
            details=[
                AnyMessage(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")
            ]
        )
        error = translated(Code.NOT_FOUND, trailer=status.SerializeToString())
        assert type(error) is errors.NotFound

    def test_an_unreachable_server_is_named(self) -> None:
        error = translated(Code.UNAVAILABLE, text="connection refused")
        assert "the server at there:1 cannot be reached" in str(error)
        assert "connection refused" in str(error)

    def test_a_deadline_without_a_phase_says_what_to_do(self) -> None:
        error = translated(Code.DEADLINE_EXCEEDED, text="Deadline Exceeded")
        assert str(error) == (
            "the server at there:1 did not answer in time: Deadline Exceeded; "
            "if it can be reached, allow more time"
        )

    def test_an_error_without_text_has_one_all_the_same(self) -> None:
        assert str(translated(Code.ABORTED, text="")) == "the call ended with ABORTED"


class TestTree:
    @pytest.mark.parametrize("name", [name for name in errors.__all__ if name[0].isupper()])
    def test_every_error_is_a_modelyard_error(self, name: str) -> None:
        cls = getattr(errors, name)
        if isinstance(cls, type) and issubclass(cls, Exception):
            assert issubclass(cls, errors.ModelyardError)

    @pytest.mark.parametrize(
        ("cls", "base"),
        [
            (errors.KeyNotFound, errors.NotFound),
            (errors.ModelNotFound, errors.NotFound),
            (errors.DeviceNotFound, errors.NotFound),
            (errors.ModelNeverFits, errors.PreconditionFailed),
            (errors.ModelInUse, errors.PreconditionFailed),
            (errors.PlacementInvalid, errors.PreconditionFailed),
            (errors.QueueFull, errors.ResourceExhausted),
            (errors.BudgetExhausted, errors.ResourceExhausted),
            (errors.DeadlineUnreachable, errors.ResourceExhausted),
        ],
    )
    def test_reasons_of_one_code_have_a_class_in_common(self, cls: type, base: type) -> None:
        assert issubclass(cls, base)

    @pytest.mark.parametrize("duplicate", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
    def test_errors_survive_pickling_whole(self, duplicate: Any) -> None:
        error = translated(
            Code.RESOURCE_EXHAUSTED,
            info("QUEUE_FULL", {"a": "b"}),
            retry(Duration(seconds=3)),
            error_details_pb2.QuotaFailure(violations=[{"subject": "s", "description": "d"}]),
        )
        other = duplicate(error)
        assert type(other) is errors.QueueFull and str(other) == str(error)
        for field in ("code", "reason", "metadata", "retry_after_s", "violations"):
            assert getattr(other, field) == getattr(error, field)

    def test_an_answer_that_cannot_be_read_is_the_server_s_fault(self) -> None:
        with (
            pytest.raises(errors.ServerError, match="there:1 cannot be read: bad tensor"),
            reading_answer("there:1"),
        ):
            raise TensorError("bad tensor")
