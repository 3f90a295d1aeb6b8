"""modelyard.v1.InferenceService: one request, from wire to wire."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from time import monotonic_ns
from typing import Any

from google.protobuf.message import DecodeError

from modelyard.v1 import inference_service_pb2 as pb
from modelyard_server.catalog.model import Model
from modelyard_server.errors import Reason, Refusal, Resource, Violation
from modelyard_server.execution.dispatch import run_leased
from modelyard_server.execution.engine import Engine, ModelFailed, WorkerLost
from modelyard_server.residency.shell import Lease, Residency, heir_of
from modelyard_server.routing.resolve import resolve
from modelyard_server.runtimes.api import OptionError
from modelyard_server.runtimes.tensors import TensorError, TensorValue
from modelyard_server.services.handler import invalid, new_error_id
from modelyard_server.services.status import reply_of
from modelyard_server.services.structs import plain_values
from modelyard_server.services.tensors import parse_request, serialize_response, to_value
from modelyard_server.transport.api import Call, StatusReply

__all__ = ["InferenceFigures", "InferenceService"]

logger = logging.getLogger(__name__)

_NS = 1_000_000_000
_RELOAD_S = 0.1
"""When a model of a worker that died may be there again."""
_ANSWER_MARGIN = 0.05
_MOST_MARGIN_S = 0.05


class InferenceFigures:
    """What the data plane has done since it started."""

    def __init__(self) -> None:
        self.answered_count = 0
        self.hit_count = 0
        self.cold_count = 0
        self.active_count = 0
        self.error_counts: Counter[str] = Counter()


class InferenceService:
    """Answers Predict.

    Args:
        table: what each key means; a live view.
        residency: leases models.
        engine: runs them.
        device_names: resource names of the devices, by position.
        default_deadline_s: for callers that set none.
        max_deadline_s: longer deadlines are cut to this.
    """

    def __init__(
        self,
        *,
        table: Mapping[str, Model],
        residency: Residency,
        engine: Engine,
        device_names: tuple[str, ...],
        default_deadline_s: float,
        max_deadline_s: float,
    ) -> None:
        self._table = table
        self._residency = residency
        self._engine = engine
        self._device_names = device_names
        self._default_deadline_s = default_deadline_s
        self._max_deadline_s = max_deadline_s
        self.figures = InferenceFigures()

    async def predict(self, call: Call) -> bytes | StatusReply:
        """See InferenceService.Predict in proto/modelyard/v1/inference_service.proto."""
        figures = self.figures
        figures.active_count += 1
        try:
            return await self._predict(call)
        except Refusal as refusal:
            figures.error_counts[refusal.reason.name] += 1
            return reply_of(refusal)
        finally:
            figures.active_count -= 1

    async def _predict(self, call: Call) -> bytes:
        try:
            request, contents = parse_request(call.body)
        except DecodeError:
            raise invalid(Violation("", "the message is no PredictRequest")) from None
        model = resolve(self._table, request.key)
        inputs = _inputs_of(request, contents)
        parameters = (
            plain_values(request.parameters, "parameters") if request.HasField("parameters") else {}
        )
        timeout_s = self._timeout_s(call)
        began_ns = monotonic_ns()

        lease = self._residency.try_lease(model.handle)
        cold = lease is None
        try:
            if lease is None:
                # A hit finds out by itself. A request that no load can help must cause none.
                self._engine.check_request(model.handle.spec, inputs, parameters)
                lease = await self._wait(model, began_ns + int(timeout_s * _NS))
            leased_ns = monotonic_ns()
            device = lease.device
            left_s = timeout_s - (leased_ns - began_ns) / _NS
            outputs = await run_leased(self._engine, lease, inputs, parameters, left_s)
        except TensorError as error:
            raise _invalid_tensor(request, error) from None
        except OptionError as error:
            raise invalid(Violation(f"parameters.{error.option}", error.text)) from None
        except ModelFailed as error:
            raise _failed(model, error) from None
        except WorkerLost as error:
            raise Refusal(Reason.WORKER_LOST, error.text, retry_after_s=_RELOAD_S) from None

        served = pb.Served(model=f"models/{model.id}", device=self._device_names[device])
        _set_duration(served.wait_duration, leased_ns - began_ns)
        _set_duration(served.run_duration, monotonic_ns() - leased_ns)
        if cold:
            served.cold = True
            if lease.load_s is not None:
                _set_duration(served.load_duration, int(lease.load_s * _NS))
            self.figures.cold_count += 1
        else:
            self.figures.hit_count += 1
        self.figures.answered_count += 1
        return serialize_response(outputs, served)

    async def _wait(self, model: Model, deadline_ns: int) -> Lease:
        try:
            return await self._residency.lease(model.handle, deadline_ns)
        except Refusal as refusal:
            handle = heir_of(model.handle)  # Another copy may have taken over meanwhile.
            if refusal.reason is Reason.LOAD_FAILED and handle.failure_text:
                refusal.text = f"{refusal.text}: {handle.failure_text}"
            elif refusal.reason is Reason.DEADLINE_IN_QUEUE:
                if drained := self._residency.closed_to(handle):
                    names = ", ".join(drained)
                    refusal.text = f"{refusal.text}; it lives on {names} alone, which is drained"
                    refusal.metadata = {**refusal.metadata, "drained_devices": names}
            elif refusal.reason is Reason.MODEL_NOT_FOUND:
                refusal.resource = Resource("model", f"models/{model.id}")
            raise

    def _timeout_s(self, call: Call) -> float:
        """How long this call may take.

        A little less than the caller will wait, so that it learns in which phase its deadline
        passed instead of hearing nothing.
        """
        if call.remaining_s is None:
            return self._default_deadline_s
        wanted = min(call.remaining_s, self._max_deadline_s)
        return wanted - min(wanted * _ANSWER_MARGIN, _MOST_MARGIN_S)


def _inputs_of(
    request: pb.PredictRequest, contents: Mapping[int, bytes]
) -> tuple[TensorValue, ...]:
    if not request.inputs:
        raise Refusal(
            Reason.INVALID_TENSOR,
            "inputs: at least one tensor is needed",
            violations=(Violation("inputs", "at least one tensor is needed"),),
        )
    values: list[TensorValue] = []
    violations: list[Violation] = []
    for i, message in enumerate(request.inputs):
        try:
            values.append(to_value(message, contents.get(i)))
        except TensorError as error:
            violations.append(Violation(f"inputs[{i}]", error.text))
    if len(values) > 1 and len({value.name for value in values}) != len(values):
        violations.append(Violation("inputs", "two inputs have the same name"))
    if violations:
        text = "; ".join(f"{v.field}: {v.description}" for v in violations)
        raise Refusal(Reason.INVALID_TENSOR, text, violations=tuple(violations))
    return tuple(values)


def _invalid_tensor(request: pb.PredictRequest, error: TensorError) -> Refusal:
    names = [message.name for message in request.inputs]
    field = f"inputs[{names.index(error.tensor)}]" if error.tensor in names else "inputs"
    return Refusal(
        Reason.INVALID_TENSOR,
        f"{field}: {error.text}",
        violations=(Violation(field, error.text),),
    )


def _failed(model: Model, error: ModelFailed) -> Refusal:
    error_id = new_error_id()
    logger.error("model %s failed, error_id=%s\n%s", model.id, error_id, error.log_text)
    return Refusal(
        Reason.MODEL_FAILED,
        f"the model raised {error.exception_type}; error_id={error_id}",
        metadata={"exception_type": error.exception_type, "error_id": error_id},
    )


def _set_duration(duration: Any, nanoseconds: int) -> None:
    if nanoseconds >= _NS:
        duration.seconds, nanoseconds = divmod(nanoseconds, _NS)
    duration.nanos = nanoseconds
