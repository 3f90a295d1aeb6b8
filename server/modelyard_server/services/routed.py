"""Requests for what routes lead to: one of several models, several in a row, or all at once.

`routing.resolve` has made the choices; here the plan is carried out. Every model is asked for as by
a request of its own, with a lease of its own, so whatever holds for requests holds for each. What
came of each is noted, and summed up for the answer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic_ns
from typing import Final, Protocol, assert_never

from modelyard_server.catalog.model import Model
from modelyard_server.catalog.route_view import RouteView
from modelyard_server.errors import Reason, Refusal, Violation
from modelyard_server.residency.shell import Lease, Residency
from modelyard_server.routing.balance import Balance
from modelyard_server.routing.combine import MemberAnswer, combined
from modelyard_server.routing.resolve import (
    Absent,
    Beside,
    Chain,
    Group,
    Part,
    Plan,
    Run,
    Try,
    plan_of,
    runs_of,
)
from modelyard_server.routing.targets import Split, Transform
from modelyard_server.routing.transforms import renamed, transformed
from modelyard_server.runtimes.api import JsonValue
from modelyard_server.runtimes.tensors import TensorError, TensorValue
from modelyard_server.services.asked import Asked, AskedRoute
from modelyard_server.services.gathering import Gatherer, Leases
from modelyard_server.services.request_log import RequestFacts
from modelyard_server.services.shadows import Shadows, size_of

__all__ = ["ModelRunner", "RouteRunner"]

_NS = 1_000_000_000

_MOST_HERE_BYTES: Final = 64 << 10
"""What may be transformed or combined on the event loop's thread: a fraction of a millisecond."""

_KEPT_FOR_OTHERS: Final = 0.2
"""Of the time that is left: what an option of a fallback leaves to those behind it."""

_OWN_REASONS: Final = frozenset(
    {
        *(Reason.LOAD_FAILED, Reason.MODEL_FAILED, Reason.MODEL_NEVER_FITS),
        *(Reason.BUDGET_EXHAUSTED, Reason.QUEUE_FULL, Reason.DEADLINE_UNREACHABLE),
        *(Reason.DEADLINE_IN_QUEUE, Reason.DEADLINE_IN_LOAD, Reason.DEADLINE_IN_RUN),
        *(Reason.WORKER_LOST, Reason.MODEL_NOT_FOUND, Reason.ROUTE_NOT_FOUND),
    }
)
"""Why another option of a fallback may answer where one does not."""


class ModelRunner(Leases, Protocol):
    """What answers a request for one model; see InferenceService."""

    async def answer(
        self,
        asked: Asked,
        facts: RequestFacts,
        timeout_s: float,
        client: Callable[[], str],
    ) -> tuple[TensorValue, ...]:
        """The outputs of a request. Raises Refusal."""

    async def run(
        self,
        asked: Asked,
        lease: Lease,
        facts: RequestFacts,
        timeout_s: float,
        client: Callable[[], str],
    ) -> tuple[TensorValue, ...]:
        """Runs a request that has its lease, and takes that over. Raises Refusal."""

    def is_idle(self, device: int) -> bool:
        """True if no request runs on a device or waits to."""


@dataclass(slots=True)
class _Job:
    """A request on its way.

    Attributes:
        asked: what was asked.
        client: whose it is.
        steps: what has been run for it, in the order it ended.
    """

    asked: AskedRoute
    client: Callable[[], str]
    steps: list[RequestFacts] = field(default_factory=list)


class RouteRunner:
    """Answers requests for routes.

    Args:
        routes: the routes and models there are; a live view.
        models: answers a request for one model.
        residency: tells what is resident.

    Attributes:
        shadows: models that are tried.
    """

    def __init__(self, *, routes: RouteView, models: ModelRunner, residency: Residency) -> None:
        self._routes = routes
        self._models = models
        self._residency = residency
        self._gatherer = Gatherer(models, residency)
        self._balances: dict[str, tuple[Split, Balance]] = {}
        self.shadows = Shadows(models, residency)

    async def answer(
        self,
        asked: AskedRoute,
        facts: RequestFacts,
        timeout_s: float,
        client: Callable[[], str],
    ) -> tuple[TensorValue, ...]:
        """The outputs of a request.

        Args:
            asked: the request.
            facts: of it, with `arrived_ns`; what is found out is noted there.
            timeout_s: from its arrival.
            client: says whose it is.

        Raises:
            Refusal: of the plan or of one of its models; the text says of which.
        """
        plan = self.plan(asked)
        job = _Job(asked, client)
        limit_ns = facts.arrived_ns + int(timeout_s * _NS)
        try:
            return await self._do(plan, asked.inputs, asked.parameters, job, limit_ns)
        finally:
            _sum_up(facts, job.steps)

    def plan(self, asked: AskedRoute) -> Plan:
        """What a request is to do. Raises Refusal INVALID_FIELD: there is no such version."""
        return plan_of(
            self._routes,
            asked.route,
            affinity=asked.affinity,
            version=asked.version,
            is_resident=self._is_resident,
            balance_of=self._balance_of,
        )

    def _is_resident(self, model: Model) -> bool:
        return self._residency.is_resident(model.handle)

    def _balance_of(self, route: str, split: Split) -> Balance:
        known = self._balances.get(route)
        if known is None or known[0] != split:
            weights = [float(branch.weight) for branch in split.branches]
            known = self._balances[route] = (split, Balance(weights, split.warm_tolerance))
        return known[1]

    # --- Plans ----------------------------------------------------------------------------------

    async def _do(
        self,
        plan: Plan,
        inputs: tuple[TensorValue, ...],
        parameters: Mapping[str, JsonValue],
        job: _Job,
        limit_ns: int,
    ) -> tuple[TensorValue, ...]:
        match plan:
            case Run():
                return await self._run(plan, inputs, parameters, job, limit_ns)
            case Absent():
                raise _of_branch(plan.branch, replace(plan.refusal))
            case Chain():
                return await self._in_order(plan, inputs, parameters, job, limit_ns)
            case Group():
                return await self._together(plan, inputs, parameters, job, limit_ns)
            case Try():
                return await self._first_of(plan, inputs, parameters, job, limit_ns)
            case Beside():
                outputs = await self._do(plan.answer, inputs, parameters, job, limit_ns)
                if plan.shadow is not None:
                    self.shadows.add(plan.shadow.model, inputs, parameters)
                return outputs
            case _:
                assert_never(plan)

    async def _run(
        self,
        run: Run,
        inputs: tuple[TensorValue, ...],
        parameters: Mapping[str, JsonValue],
        job: _Job,
        limit_ns: int,
    ) -> tuple[TensorValue, ...]:
        asked, facts = self._asked(run, inputs, parameters, job)
        timeout_s = (limit_ns - facts.arrived_ns) / _NS
        if timeout_s <= 0:
            text = "the deadline passed before its turn came"
            raise _of_branch(run.branch, Refusal(Reason.DEADLINE_IN_RUN, text))
        try:
            outputs = await self._models.answer(asked, facts, timeout_s, job.client)
        except Refusal as refusal:
            raise _of_branch(run.branch, refusal) from None
        job.steps.append(facts)
        return outputs

    def _asked(
        self,
        run: Run,
        inputs: tuple[TensorValue, ...],
        parameters: Mapping[str, JsonValue],
        job: _Job,
    ) -> tuple[Asked, RequestFacts]:
        # A model's id is a key of its own: whoever looks again finds its successor.
        asked = Asked(run.model.id, run.model, inputs, parameters)
        facts = RequestFacts(monotonic_ns())
        facts.key = job.asked.key
        facts.model = run.model.id
        facts.row_count = inputs[0].shape[0] if inputs and inputs[0].shape else 1
        facts.route = job.asked.route.id
        facts.branch = run.branch
        facts.version = run.version
        return asked, facts

    # --- Sequences ------------------------------------------------------------------------------

    async def _in_order(
        self,
        chain: Chain,
        inputs: tuple[TensorValue, ...],
        parameters: Mapping[str, JsonValue],
        job: _Job,
        limit_ns: int,
    ) -> tuple[TensorValue, ...]:
        ahead: list[asyncio.Task[None]] = []
        tensors = inputs
        try:
            for i, step in enumerate(chain.steps):
                try:
                    tensors = renamed(tensors, step.rename)
                    if isinstance(step.does, Transform):
                        tensors = await _aside(tensors, partial(transformed, step.does, tensors))
                        continue
                except TensorError as error:
                    raise _of_step(step.name, error) from None
                ahead += self._ask_ahead(chain.steps[i + 1 :], limit_ns)
                tensors = await self._do(step.does, tensors, parameters, job, limit_ns)
                parameters = {}
            return tensors
        finally:
            for task in ahead:
                task.cancel()
            if ahead:
                await asyncio.gather(*ahead, return_exceptions=True)

    def _ask_ahead(self, steps: Sequence[Part], limit_ns: int) -> Iterable[asyncio.Task[None]]:
        """Asks for the models of the next step that has some, while the step before it runs.

        Nothing is held: a lease on one model that waits for another would be in others' way.
        """
        following = next((s.does for s in steps if not isinstance(s.does, Transform)), None)
        while isinstance(following, Try | Chain | Beside):
            match following:
                case Try():
                    following = following.options[0]
                case Beside():
                    following = following.answer
                case Chain():
                    parts = (s.does for s in following.steps)
                    following = next((d for d in parts if not isinstance(d, Transform)), None)
        for run in runs_of(following) if following is not None else ():
            if not self._is_resident(run.model):
                yield asyncio.create_task(self._fetch(run, limit_ns), name="ask ahead")

    async def _fetch(self, run: Run, limit_ns: int) -> None:
        try:
            lease = await self._residency.lease(run.model.handle, limit_ns)
        except Refusal:
            return  # Who asks in earnest is told.
        lease.release()

    # --- Ensembles ------------------------------------------------------------------------------

    async def _together(
        self,
        group: Group,
        inputs: tuple[TensorValue, ...],
        parameters: Mapping[str, JsonValue],
        job: _Job,
        limit_ns: int,
    ) -> tuple[TensorValue, ...]:
        runs = [_member_run(member) for member in group.members]
        pairs = [self._asked(run, inputs, parameters, job) for run in runs]
        leases = deque(await self._gatherer.gather([asked for asked, _ in pairs], limit_ns))
        tasks = [
            asyncio.create_task(self._member(run, asked, facts, leases, job, limit_ns))
            for run, (asked, facts) in zip(runs, pairs, strict=True)
        ]
        try:
            outputs = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        finally:
            for lease in leases:  # Of members that were cancelled before they began.
                lease.release()
        answers = [
            MemberAnswer(member.name, member.weight, output)
            for member, output in zip(group.members, outputs, strict=True)
        ]
        try:
            given = [value for answer in answers for value in answer.outputs]
            return await _aside(given, partial(combined, group.combine, answers))
        except TensorError as error:
            raise _of_step(group.combine, error) from None

    async def _member(
        self,
        run: Run,
        asked: Asked,
        facts: RequestFacts,
        leases: deque[Lease],
        job: _Job,
        limit_ns: int,
    ) -> tuple[TensorValue, ...]:
        lease = leases.popleft()  # Members begin in their order.
        facts.cold = lease.load_s is not None
        facts.load_s = lease.load_s
        timeout_s = (limit_ns - facts.arrived_ns) / _NS
        try:
            outputs = await self._models.run(asked, lease, facts, timeout_s, job.client)
        except Refusal as refusal:
            if refusal.reason is not Reason.WORKER_LOST:
                raise _of_branch(run.branch, refusal) from None
            # It had not begun: this one is asked for again, as any request is.
            return await self._run(run, asked.inputs, asked.parameters, job, limit_ns)
        job.steps.append(facts)
        return outputs

    # --- Fallbacks ------------------------------------------------------------------------------

    async def _first_of(
        self,
        plan: Try,
        inputs: tuple[TensorValue, ...],
        parameters: Mapping[str, JsonValue],
        job: _Job,
        limit_ns: int,
    ) -> tuple[TensorValue, ...]:
        options = list(plan.options)
        if plan.prefer_warm:
            options.sort(key=lambda option: not self._is_warm(option))  # Stable: in their order.
        first: Refusal | None = None
        for i, option in enumerate(options):
            now_ns = monotonic_ns()
            left_ns = limit_ns - now_ns
            if i < len(options) - 1:
                left_ns -= int(left_ns * _KEPT_FOR_OTHERS)
            try:
                return await self._do(option, inputs, parameters, job, now_ns + left_ns)
            except Refusal as refusal:
                if refusal.reason not in _OWN_REASONS:
                    raise
                first = first or refusal
        assert first is not None  # There is at least one option.
        raise first

    def _is_warm(self, plan: Plan) -> bool:
        runs = list(runs_of(plan))
        return bool(runs) and all(self._is_resident(run.model) for run in runs)


def _member_run(member: Part) -> Run:
    """The run of a member of an ensemble, which leads to one model: checked when it was registered.

    Raises:
        Refusal: it does not any more.
    """
    if isinstance(member.does, Run):
        return member.does
    if isinstance(member.does, Absent):
        raise _of_branch(member.does.branch, replace(member.does.refusal))
    text = f"member {member.name!r} leads to more than one model by now"
    raise Refusal(Reason.INVALID_FIELD, text, violations=(Violation("key", text),))


async def _aside(
    tensors: Iterable[TensorValue], work: Callable[[], tuple[TensorValue, ...]]
) -> tuple[TensorValue, ...]:
    """Does work on tensors: here if it is little, else in a thread, where it is in nobody's way."""
    if sum(size_of(value) for value in tensors) <= _MOST_HERE_BYTES:
        return work()
    return await asyncio.to_thread(work)


def _of_branch(branch: str, refusal: Refusal) -> Refusal:
    """A refusal whose text says which part of a route it is of."""
    if branch:
        refusal.text = f"{branch}: {refusal.text}"
    return refusal


def _of_step(name: str, error: TensorError) -> Refusal:
    text = f"step {name!r}: {error}"
    return Refusal(
        Reason.INVALID_TENSOR, text, violations=(Violation(f"step {name!r}", str(error)),)
    )


def _sum_up(facts: RequestFacts, steps: Sequence[RequestFacts]) -> None:
    """Notes of a request what its runs have come to together."""
    if not steps:
        return
    last = steps[-1]
    facts.model, facts.device = last.model, last.device
    facts.branch, facts.version = last.branch, last.version
    facts.cold = any(step.cold for step in steps)
    loads = [step.load_s for step in steps if step.load_s is not None]
    facts.load_s = max(loads) if loads else None
    facts.ended_ns = max(step.ended_ns for step in steps)
    if len(steps) > 1:
        facts.steps = tuple(steps)
    # Waiting is whatever was not running: steps may have waited at the same time.
    waited_ns = sum(step.leased_ns - step.arrived_ns for step in steps)
    facts.leased_ns = min(facts.arrived_ns + waited_ns, facts.ended_ns)
