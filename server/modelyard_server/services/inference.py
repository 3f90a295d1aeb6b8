"""modelyard.v1.InferenceService: one request, from wire to wire.

A request whose worker died before it began has done nothing to anybody, and nothing was done for
it: the model is asked for again, and it is run there. It waits for that as for any model that is
not there, within its own deadline, and its caller does not notice. Not for ever: what has never
begun in several workers that died may be what they died of, whatever their boards said.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from time import monotonic_ns
from typing import Any, Final, assert_never

from google.protobuf.message import DecodeError

from modelyard.v1 import inference_service_pb2 as pb
from modelyard_server.catalog.model import Model
from modelyard_server.catalog.route import Route
from modelyard_server.catalog.route_view import RouteView
from modelyard_server.errors import Reason, Refusal, Resource, Violation
from modelyard_server.execution.dispatch import run_leased
from modelyard_server.execution.engine import Engine, ModelFailed, WorkerLost
from modelyard_server.residency.shell import Lease, Residency, heir_of
from modelyard_server.routing.resolve import Plan, resolve
from modelyard_server.runtimes.api import JsonValue, OptionError
from modelyard_server.runtimes.tensors import TensorError, TensorValue
from modelyard_server.services.asked import Asked, AskedRoute
from modelyard_server.services.handler import invalid, new_error_id
from modelyard_server.services.request_log import RequestFacts, RequestLog
from modelyard_server.services.routed import RouteRunner
from modelyard_server.services.shadows import ShadowFigures
from modelyard_server.services.status import reply_of
from modelyard_server.services.structs import plain_values
from modelyard_server.services.tallies import ModelTallies
from modelyard_server.services.tensors import parse_request, serialize_response, to_value
from modelyard_server.transport.api import Call, StatusReply

__all__ = [
    "MOST_AFFINITY_BYTES",
    "MOST_WORKERS",
    "InferenceFigures",
    "InferenceService",
    "served_of",
]

logger = logging.getLogger(__name__)

MOST_WORKERS: Final = 3
"""How many workers in a row a request is given to that begins in none of them."""

MOST_AFFINITY_BYTES: Final = 256
"""Of PredictRequest.affinity, as UTF-8."""

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
        table: what each key means that means one model; a live view.
        routes: what all other keys mean; a live view.
        residency: leases models.
        engine: runs them.
        device_names: resource names of the devices, by position.
        default_deadline_s: for callers that set none.
        max_deadline_s: longer deadlines are cut to this.

    Attributes:
        figures: what it has done.
        log: is told of every request that ends, while anybody follows it.
        tallies: what each model has done.
    """

    def __init__(
        self,
        *,
        table: Mapping[str, Model],
        routes: RouteView,
        residency: Residency,
        engine: Engine,
        device_names: tuple[str, ...],
        default_deadline_s: float,
        max_deadline_s: float,
    ) -> None:
        self._table = table
        self._routes = routes
        self._residency = residency
        self._engine = engine
        self._device_names = device_names
        self._default_deadline_s = default_deadline_s
        self._max_deadline_s = max_deadline_s
        self._running = [0] * len(device_names)
        self.figures = InferenceFigures()
        self.log = RequestLog()
        self._routed = RouteRunner(routes=routes, models=self, residency=residency)
        self.tallies = ModelTallies()

    async def predict(self, call: Call) -> bytes | StatusReply:
        """See InferenceService.Predict in proto/modelyard/v1/inference_service.proto."""
        figures = self.figures
        figures.active_count += 1
        facts = RequestFacts(monotonic_ns())
        try:
            reply = await self._predict(call, facts)
        except Refusal as refusal:
            self.note_refused(facts, refusal)
            return reply_of(refusal)
        else:
            self.note_answered(facts)
            return reply
        finally:
            figures.active_count -= 1

    async def _predict(self, call: Call, facts: RequestFacts) -> bytes:
        try:
            parsed = parse_request(call.body)
        except DecodeError:
            raise invalid(Violation("", "the message is no PredictRequest")) from None
        facts.arrived_ns = monotonic_ns()
        return await self.answer_one(*parsed, self.timeout_s(call), call.client, facts)

    async def answer_one(
        self,
        request: pb.PredictRequest,
        contents: Mapping[int, bytes],
        timeout_s: float,
        client: Callable[[], str],
        facts: RequestFacts,
    ) -> bytes:
        """The whole way of one request: to its PredictResponse, serialized.

        Args:
            request: as it was parsed.
            contents: of its large inputs, by position; see parse_request.
            timeout_s: from its arrival.
            client: says whose it is; see Engine.run.
            facts: of it, with `arrived_ns`; what is found out is noted there. Whoever asks counts
                it, by note_answered or note_refused.

        Raises:
            Refusal: as Predict says.
        """
        asked = self.read(request, contents, facts)
        outputs = await self.answer(asked, facts, timeout_s, client)
        return serialize_response(outputs, served_of(facts))

    async def answer(
        self,
        asked: Asked | AskedRoute,
        facts: RequestFacts,
        timeout_s: float,
        client: Callable[[], str],
    ) -> tuple[TensorValue, ...]:
        """The outputs of a request: waits for its models and runs them.

        Args:
            asked: the request, as `read` gives it.
            facts: of it, with `arrived_ns`; what is found out is noted there, for `served_of`.
            timeout_s: from its arrival.
            client: says whose it is; see Engine.run.

        Raises:
            Refusal: whatever Predict may end with. It is not counted yet; see note_refused.
        """
        if isinstance(asked, AskedRoute):
            return await self._routed.answer(asked, facts, timeout_s, client)
        deadline_ns = facts.arrived_ns + int(timeout_s * _NS)
        lease = self._residency.try_lease(asked.model.handle, deadline_ns)
        for _ in range(MOST_WORKERS - 1):
            lease = lease or await self._wait_cold(asked, facts, deadline_ns)
            try:
                return await self.run(asked, lease, facts, timeout_s, client)
            except Refusal as refusal:
                if refusal.reason is not Reason.WORKER_LOST:
                    raise
            # Its key may mean something else by now.
            lease = self.try_lease(asked, deadline_ns)
        lease = lease or await self._wait_cold(asked, facts, deadline_ns)
        return await self.run(asked, lease, facts, timeout_s, client)

    async def _wait_cold(self, asked: Asked, facts: RequestFacts, deadline_ns: int) -> Lease:
        """Waits for a model that is not there. Raises as check and wait do."""
        facts.cold = True
        # A hit finds out by itself. A request that no load can help must cause none.
        self.check(asked)
        lease = await self.wait(asked, deadline_ns)
        facts.load_s = lease.load_s
        return lease

    # --- The steps of one request -------------------------------------------------------------

    def read(
        self, request: pb.PredictRequest, contents: Mapping[int, bytes], facts: RequestFacts
    ) -> Asked | AskedRoute:
        """What a request asks for, checked in itself.

        Args:
            request: as it was parsed.
            contents: of its large inputs, by position; see parse_request.
            facts: of it; what is found out is noted there.

        Raises:
            Refusal: INVALID_FIELD, INVALID_TENSOR or KEY_NOT_FOUND.
        """
        facts.key = request.key
        meant = self.meaning_of(request.key)
        inputs = _inputs_of(request, contents)
        parameters = (
            plain_values(request.parameters, "parameters") if request.HasField("parameters") else {}
        )
        return self.asked(
            request.key, meant, inputs, parameters, request.affinity, request.version, facts
        )

    def meaning_of(self, key: str) -> Model | Route:
        """What a key means: a model, or the route that says more.

        Raises:
            Refusal: KEY_NOT_FOUND, or INVALID_FIELD for what can be no key.
        """
        return self._table.get(key) or resolve(self._table, self._routes, key)

    def asked(
        self,
        key: str,
        meant: Model | Route,
        inputs: tuple[TensorValue, ...],
        parameters: Mapping[str, JsonValue],
        affinity: str,
        version: str,
        facts: RequestFacts,
    ) -> Asked | AskedRoute:
        """A request, from its parts; see PredictRequest.

        Args:
            key: what it asks for.
            meant: what that means.
            inputs: at least one.
            parameters: of this run.
            affinity: what choices go by; empty for none.
            version: the version that is meant; empty for the current one.
            facts: of it; what is found out is noted there.

        Raises:
            Refusal: INVALID_FIELD.
        """
        facts.row_count = inputs[0].shape[0] if inputs[0].shape else 1
        if affinity and len(affinity.encode()) > MOST_AFFINITY_BYTES:
            raise invalid(Violation("affinity", f"is longer than {MOST_AFFINITY_BYTES} bytes"))
        if isinstance(meant, Model):
            facts.model = meant.id
            if meant.id != key and (route := self._routes.route_of(key)) is not None:
                facts.route = route.id
            if version:
                raise invalid(Violation("version", f"the key {key!r} means a model, not versions"))
            return Asked(key, meant, inputs, parameters)
        facts.route = meant.id
        return AskedRoute(key, meant, inputs, parameters, affinity, version)

    def try_lease(self, asked: Asked, deadline_ns: int) -> Lease | None:
        """A lease if the model is resident now and can answer before the deadline.

        Raises:
            Refusal: KEY_NOT_FOUND, if the key has lost its meaning since it was read.
        """
        meant = self.meaning_of(asked.key)
        if isinstance(meant, Model):  # Else a route says more by now: it means what it did.
            asked.model = meant
        return self._residency.try_lease(asked.model.handle, deadline_ns)

    def lease_again(self, asked: Asked, lease: Lease) -> Lease | None:
        """Another lease on the model that a request has one on.

        Returns:
            None if the model is to leave, or is not what the request's key means any more.
        """
        model = self._table.get(asked.key)
        if model is None or model.handle is not lease.handle:
            return None
        return self._residency.try_lease(model.handle)

    def check(self, asked: Asked) -> None:
        """Checks what can be checked of a request without its model.

        Raises:
            Refusal: INVALID_TENSOR or INVALID_FIELD.
        """
        try:
            self._engine.check_request(asked.model.handle.spec, asked.inputs, asked.parameters)
        except (TensorError, OptionError) as error:
            raise _refusal_of(asked, error) from None

    async def run(
        self,
        asked: Asked,
        lease: Lease,
        facts: RequestFacts,
        timeout_s: float,
        client: Callable[[], str],
    ) -> tuple[TensorValue, ...]:
        """Runs a request and returns its outputs. Takes the lease over.

        Args:
            asked: the request.
            lease: on its model.
            facts: of it, with `cold` and `load_s`; what is found out is noted there.
            timeout_s: from its arrival.
            client: says whose it is; see Engine.run.

        Raises:
            Refusal: INVALID_TENSOR, INVALID_FIELD, MODEL_FAILED, WORKER_LOST or DEADLINE_IN_RUN.
        """
        facts.leased_ns = leased_ns = monotonic_ns()
        device = lease.device
        facts.device = self._device_names[device]
        # Its key may have got another meaning since it was read.
        facts.model = lease.handle.name
        waited_ns = leased_ns - facts.arrived_ns
        self._running[device] += 1
        try:
            outputs = await run_leased(
                self._engine,
                lease,
                asked.inputs,
                asked.parameters,
                timeout_s - waited_ns / _NS,
                client,
                waited_ns / _NS,
            )
        except (TensorError, OptionError, ModelFailed, WorkerLost) as error:
            raise _refusal_of(asked, error) from None
        finally:
            self._running[device] -= 1
        facts.ended_ns = monotonic_ns()
        return outputs

    def plan(self, asked: AskedRoute) -> Plan:
        """What a request for a route is to do. Raises Refusal INVALID_FIELD."""
        return self._routed.plan(asked)

    def is_idle(self, device: int) -> bool:
        """True if no request runs on a device, by its position, or waits in its lane."""
        return not self._running[device]

    @property
    def shadow_figures(self) -> ShadowFigures:
        """What has become of requests that models were tried with."""
        return self._routed.shadows.figures

    async def stop(self) -> None:
        """Ends what nobody waits for."""
        await self._routed.shadows.stop()

    def note_answered(self, facts: RequestFacts) -> None:
        """Counts a request that was answered, and tells of it if anybody wants to know."""
        figures = self.figures
        figures.answered_count += 1
        if facts.cold:
            figures.cold_count += 1
        else:
            figures.hit_count += 1
        self.tallies.note_answered(facts)
        if self.log.followed:
            self.log.add(facts)

    def note_refused(self, facts: RequestFacts, refusal: Refusal) -> None:
        """Counts a request that was refused or failed, and tells of it as note_answered does."""
        self.figures.error_counts[refusal.reason.name] += 1
        self.tallies.note_failed(facts)
        if self.log.followed:
            facts.reason = refusal.reason
            facts.ended_ns = monotonic_ns()
            self.log.add(facts)

    async def wait(self, asked: Asked, deadline_ns: int) -> Lease:
        """Waits for the model of a request that is not resident now.

        Raises:
            Refusal: it does not come, or not in time.
        """
        model = asked.model
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

    def timeout_s(self, call: Call) -> float:
        """How long this call may take.

        A little less than the caller will wait, so that it learns in which phase its deadline
        passed instead of hearing nothing.
        """
        wanted = self.allowed_s(call.remaining_s)
        if call.remaining_s is None:
            return wanted
        return wanted - min(wanted * _ANSWER_MARGIN, _MOST_MARGIN_S)

    def allowed_s(self, wanted_s: float | None) -> float:
        """How long a request may take that wants so long; None for the default."""
        return self._default_deadline_s if wanted_s is None else min(wanted_s, self._max_deadline_s)

    @staticmethod
    def failure_of(model: Model, error: ModelFailed) -> Refusal:
        """MODEL_FAILED; what the model raised goes to the log."""
        return _failed(model, error)


def served_of(facts: RequestFacts) -> pb.Served:
    """What an answer says of how it came about."""
    served = pb.Served(model=f"models/{facts.model}" if facts.model else "", device=facts.device)
    _set_duration(served.wait_duration, facts.leased_ns - facts.arrived_ns)
    _set_duration(served.run_duration, facts.ended_ns - facts.leased_ns)
    if facts.cold:
        served.cold = True
        if facts.load_s is not None:
            _set_duration(served.load_duration, int(facts.load_s * _NS))
    if facts.route:
        served.route = f"routes/{facts.route}"
        served.branch = facts.branch
        served.version = facts.version
    for step in facts.steps:
        served.steps.append(served_of(step))
    return served


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


def _invalid_tensor(asked: Asked, error: TensorError) -> Refusal:
    names = [value.name for value in asked.inputs]
    field = f"inputs[{names.index(error.tensor)}]" if error.tensor in names else "inputs"
    return Refusal(
        Reason.INVALID_TENSOR,
        f"{field}: {error.text}",
        violations=(Violation(field, error.text),),
    )


def _refusal_of(
    asked: Asked, error: TensorError | OptionError | ModelFailed | WorkerLost
) -> Refusal:
    match error:
        case TensorError():
            return _invalid_tensor(asked, error)
        case OptionError():
            return invalid(Violation(f"parameters.{error.option}", error.text))
        case ModelFailed():
            return _failed(asked.model, error)
        case WorkerLost():
            return Refusal(Reason.WORKER_LOST, error.text, retry_after_s=_RELOAD_S)
        case _:
            assert_never(error)


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
