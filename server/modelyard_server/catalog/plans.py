"""The device plan: budgets, drained devices and placements, forecast and changed together.

A change is worked out first; see forecaster.py. Carrying it out goes: what only makes room (larger
budgets, devices that are undrained); then the heirs of models that move are loaded beside them;
then, in one step, the change is made durable, the heirs take over, smaller budgets and drains take
effect. Until that step everything is taken back if anything fails, and no request has noticed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

from modelyard.placements import Placement, placement_text, placement_to_json
from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.forecaster import (
    DeviceState,
    Forecaster,
    PlanChange,
    Steps,
    change_states,
)
from modelyard_server.catalog.forecasts import DeviceForecast, ModelForecast, Obstacle, PlanReport
from modelyard_server.catalog.model import Model
from modelyard_server.catalog.rebalancing import Rebalancing
from modelyard_server.catalog.records import Change, DeviceRecord, PlacementRecord, RequestRecord
from modelyard_server.catalog.registry import Registry
from modelyard_server.catalog.succession import IN_MEMORY, Succession
from modelyard_server.catalog.writes import Writes, to_the_end
from modelyard_server.devices.budgets import budget_violations
from modelyard_server.devices.host_tier import HostTier
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.errors import Reason, Refusal, Resource, Violation
from modelyard_server.residency.journal import EventType, Journal
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import DeviceUse

__all__ = ["Applied", "DevicePlans", "DeviceState", "Plan", "PlanChange"]

logger = logging.getLogger(__name__)

_OPERATOR = "operator"
_LEFT = frozenset({EventType.EVICTED, EventType.DRAINED})

_MOST_TOLD = 200
"""Characters of a placement in an event."""

_STOPPING_S = 5.0
"""How long a plan that is taken back waits for the loads it began to stop."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plan in force.

    Attributes:
        devices: by position.
        placements: by the model's id, in order.
        etag: changes whenever the plan does.
        revision: counts the changes.
        changed: when it was last changed; None if it is still that of the configuration.
    """

    devices: tuple[DeviceState, ...]
    placements: Mapping[str, Placement | None]
    etag: str
    revision: int
    changed: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """A plan that was applied, or would be."""

    plan: Plan
    report: PlanReport


class DevicePlans:
    """Forecasts and changes the device plan.

    What changes it is called inside `Writes.alone`.

    Args:
        devices: by position.
        catalog: the models.
        registry: checks and places them.
        residency: carries the plan out.
        writes: makes it durable.
        journal: is told of it.
        tier: the host tier, which has its part of host memory.
    """

    def __init__(
        self,
        *,
        devices: Sequence[ManagedDevice],
        catalog: Catalog,
        registry: Registry,
        residency: Residency,
        writes: Writes,
        journal: Journal,
        tier: HostTier | None = None,
    ) -> None:
        self._devices = tuple(devices)
        self._tier = tier
        self._catalog = catalog
        self._registry = registry
        self._residency = residency
        self._writes = writes
        self._journal = journal
        self._forecaster = Forecaster(
            devices=devices,
            catalog=catalog,
            registry=registry,
            residency=residency,
            tier=tier,
        )
        self._revision = 0
        self._changed: datetime | None = None
        # While a plan is staged: the devices as the plan in force has them.
        self._in_force: tuple[DeviceState, ...] | None = None

    def restored(self, revision: int, changed: datetime | None) -> None:
        """Goes on from the plan that was stored."""
        self._revision, self._changed = revision, changed

    # --- Looking ------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The plan in force."""
        return self._plan_of(
            self._states(),
            {model.id: model.placement for model in self._catalog.models()},
            self._revision,
            self._changed,
        )

    def device_etag(self, position: int, *, budget_bytes: int, drained: bool) -> str:
        """An etag of what a plan says of one device."""
        return _etag([self._devices[position].name, budget_bytes, drained])

    def pinned_on(self, position: int) -> list[str]:
        """Resource names of the pinned models that hold something on a device."""
        return [
            f"models/{model.id}"
            for model in self._catalog.models()
            if (use := self._residency.use(model.handle)).pinned
            and use.state in IN_MEMORY
            and position in use.charges
        ]

    async def forecast(self, change: PlanChange) -> PlanReport:
        """Says what a change would do; changes nothing. Also called inside `Writes.alone`.

        Raises:
            Refusal: INVALID_FIELD: budgets that cannot be, models that there are not.
        """
        return (await self._forecaster.work_out(change, self._states())).report

    # --- Changing -----------------------------------------------------------------------------

    async def apply(
        self,
        change: PlanChange,
        *,
        etag: str = "",
        deadline_ns: int,
        validate_only: bool = False,
        remember: Callable[[Applied], RequestRecord | None] = lambda _: None,
    ) -> Applied:
        """Applies a change, all of it or nothing.

        Args:
            change: what is to be changed.
            etag: of the plan it was made for; empty for whatever the plan is.
            deadline_ns: of the residency's clock: for the loads it takes.
            validate_only: check everything, change nothing, answer as if it had been done.
            remember: what is to be remembered of the call, given its answer.

        Raises:
            Refusal: ETAG_MISMATCH; the first obstacle's reason; LOAD_FAILED, DEADLINE_IN_LOAD and
                the like: a model cannot be loaded in its new place; CATALOG_UNAVAILABLE. The plan
                is as it was.
        """
        self.check_etag(etag, self.plan().etag, "plan")
        steps = await self._forecaster.work_out(change, self._states())
        if steps.report.obstacles:
            raise _refusal(steps.report.obstacles)
        applied = Applied(plan=self._plan_after(change, steps), report=steps.report)
        if validate_only:
            return applied
        return await self._carry_out(change, steps, applied, deadline_ns, remember)

    async def change_device(
        self,
        position: int,
        *,
        answer: Callable[[DeviceUse], T],
        etag: str = "",
        budget_bytes: int | None = None,
        drained: bool | None = None,
        remember: Callable[[T], RequestRecord | None] = lambda _: None,
    ) -> T:
        """Changes one device's budget, or drains or undrains it, without a forecast.

        Models that no longer fit leave as their requests end; the call does not wait for them.

        Args:
            position: of the device.
            answer: makes the call's answer of the device right after the change. It is asked
                before the change is made durable, because the answer is remembered with it.
            etag: of the device; empty for whatever it is.
            budget_bytes: None leaves it.
            drained: None leaves it.
            remember: what is to be remembered of the call, given its answer.

        Returns:
            The answer.

        Raises:
            Refusal: ETAG_MISMATCH, INVALID_FIELD (a budget that cannot be), BUDGET_EXHAUSTED
                (pinned models hold more), CATALOG_UNAVAILABLE.
        """
        today = self._states()
        state = today[position]
        name = self._devices[position].name
        real = self.device_etag(position, budget_bytes=state.budget_bytes, drained=state.drained)
        self.check_etag(etag, real, name)
        new = DeviceState(
            budget_bytes=state.budget_bytes if budget_bytes is None else budget_bytes,
            drained=state.drained if drained is None else drained,
        )
        states = (*today[:position], new, *today[position + 1 :])
        self._check_budgets(states)
        if new.budget_bytes < state.budget_bytes:
            rehearsal = self._forecaster.rehearsal()
            owed = [rehearsal.account(i).deficit for i in range(len(today))]
            rehearsal.set_budget(position, new.budget_bytes)
            if obstacles := self._forecaster.overfull(rehearsal, owed):
                raise _refusal(obstacles)
        use = self._residency.rehearse().right_after(
            position,
            budget_bytes=None if new.budget_bytes == state.budget_bytes else new.budget_bytes,
            closed=None if new.drained == state.drained else new.drained,
        )
        answered = answer(use)

        async def finish() -> None:
            changed = datetime.now(UTC)
            await self._writes.write(
                Change(
                    put_devices=(self.device_record(position, new),),
                    new_plan=True,
                    plan_time=changed,
                    request=remember(answered),
                )
            )
            change_states(self._residency, today, states)
            self._revision += 1
            self._changed = changed

        await to_the_end(f"change {name}", finish)
        return answered

    async def rebalance(
        self, *, deadline_ns: int, validate_only: bool
    ) -> tuple[list[ModelForecast], tuple[DeviceForecast, ...]]:
        """Evens out the devices; see DeviceService.RebalanceDevices.

        Returns:
            The models that were moved, or would be, in that order, and the devices afterwards.

        Raises:
            Refusal: one of them could not be loaded in its new place. Moves made before stay.
        """
        rebalancing = Rebalancing(
            devices=self._devices,
            catalog=self._catalog,
            registry=self._registry,
            residency=self._residency,
            journal=self._journal,
            forecaster=self._forecaster,
            states=self._states(),
        )
        return await rebalancing.run(deadline_ns=deadline_ns, validate_only=validate_only)

    def check_etag(self, given: str, real: str, name: str) -> None:
        """Raises Refusal ETAG_MISMATCH if an etag was given and is another one."""
        if given and given != real:
            raise Refusal(
                Reason.ETAG_MISMATCH,
                f"{name} has changed since its etag was read",
                resource=Resource(name.partition("/")[0].rstrip("s"), name),
            )

    # --- Carrying a plan out ------------------------------------------------------------------

    async def _carry_out(
        self,
        change: PlanChange,
        steps: Steps,
        applied: Applied,
        deadline_ns: int,
        remember: Callable[[Applied], RequestRecord | None],
    ) -> Applied:
        began = self._journal.revision
        succession = self._registry.succession(steps.heirs)
        try:
            with succession:
                self._in_force = steps.today
                change_states(self._residency, steps.today, steps.roomy)
                await succession.stage(deadline_ns)
                finish = partial(self._finish, change, steps, applied, succession, remember)
                return await to_the_end("apply a plan", finish)
        except BaseException as error:
            if self._in_force is not None:  # Else it was applied, and only its caller has gone.
                take_back = partial(self._take_back, steps, succession, began, error)
                await to_the_end("take a plan back", take_back)
            raise

    async def _finish(
        self,
        change: PlanChange,
        steps: Steps,
        applied: Applied,
        succession: Succession,
        remember: Callable[[Applied], RequestRecord | None],
    ) -> Applied:
        await self._writes.write(self._record(change, steps, applied, remember(applied)))
        models = succession.commit()
        change_states(self._residency, steps.roomy, steps.states)
        self._in_force = None
        self._revision, self._changed = applied.plan.revision, applied.plan.changed
        self._tell(change, models)
        return applied

    async def _take_back(
        self, steps: Steps, succession: Succession, began: int, error: BaseException
    ) -> None:
        """Brings everything back to where it was, and tells of it.

        Args:
            steps: of the plan.
            succession: was discarded.
            began: the journal's revision before the plan.
            error: why it failed.
        """
        # While a discarded heir still holds its bytes, a smaller budget would make others leave.
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOPPING_S):
                await succession.gone()
        change_states(self._residency, steps.roomy, steps.today)
        self._in_force = None
        self._ask_back({f"models/{heir.id}" for heir in steps.heirs}, began)
        match error:
            case Refusal():
                why = error.text
            case asyncio.CancelledError():
                why = "its caller has gone"
            case _:
                why = f"it raised {type(error).__name__}"
        self._journal.publish(EventType.PLAN_ROLLED_BACK, "plan", cause=_OPERATOR, description=why)

    def _ask_back(self, heirs: set[str], began: int) -> None:
        """Loads again who had to leave for heirs that are no more."""
        events, _ = self._journal.events_after(began)
        displaced = {
            event.subject for event in events if event.type in _LEFT and event.cause in heirs
        }
        for model in self._catalog.models():
            use = self._residency.use(model.handle)
            if f"models/{model.id}" in displaced and use.state not in IN_MEMORY:
                with suppress(Refusal):  # There is no room for it any more.
                    self._residency.want(model.handle)

    def _record(
        self,
        change: PlanChange,
        steps: Steps,
        applied: Applied,
        request: RequestRecord | None,
    ) -> Change:
        # Every device and model that the change names is on record with what it was given, even
        # where that is what the configuration says today.
        named = {*change.budgets, *change.drained}
        return Change(
            # Models that are placed elsewhere have other etags now.
            put_models=tuple(
                heir.registration.record(pinned=self._residency.use(heir.old.handle).pinned)
                for heir in steps.heirs
                if heir.registration.etag != heir.old.etag
            ),
            put_devices=tuple(self.device_record(i, steps.states[i]) for i in sorted(named)),
            put_placements=tuple(
                PlacementRecord(
                    model=model_id,
                    placement=placement_to_json(placement),
                    origin=placement_origin(self._catalog.get(model_id)),
                )
                for model_id, placement in sorted(change.placements.items())
            ),
            new_plan=True,
            plan_time=applied.plan.changed,
            request=request,
        )

    def device_record(self, position: int, state: DeviceState) -> DeviceRecord:
        """What is stored of a device that a plan has named."""
        device = self._devices[position]
        return DeviceRecord(
            name=device.name,
            budget_bytes=None if state.budget_bytes == device.budget_bytes else state.budget_bytes,
            drained=state.drained,
            origin=device_origin(device),
        )

    def _tell(self, change: PlanChange, models: Sequence[Model]) -> None:
        for model in models:
            self._journal.publish(
                EventType.PLACEMENT_CHANGED,
                f"models/{model.id}",
                cause=_OPERATOR,
                description=f"its placement is {_brief(placement_text(model.placement))} now",
            )
            self._journal.changed(model.id)
            if self._residency.use(model.handle).pinned:
                try:
                    self._residency.want(model.handle)
                except Refusal as refusal:
                    logger.error("%s is pinned and cannot be loaded: %s", model.id, refusal)
        self._journal.publish(
            EventType.PLAN_APPLIED,
            "plan",
            cause=_OPERATOR,
            description=f"revision {self._revision}; it names {len(change.budgets)} budgets, "
            f"{len(change.drained)} drains, {len(change.placements)} placements",
        )

    # --- What is ------------------------------------------------------------------------------

    def _states(self) -> tuple[DeviceState, ...]:
        """The devices as the plan in force has them."""
        if self._in_force is not None:
            return self._in_force
        return tuple(
            DeviceState(
                budget_bytes=self._residency.device_use(i).budget,
                drained=self._residency.is_closed(i),
            )
            for i in range(len(self._devices))
        )

    def _plan_after(self, change: PlanChange, steps: Steps) -> Plan:
        placements = {
            model.id: change.placements.get(model.id, model.placement)
            for model in self._catalog.models()
        }
        return self._plan_of(steps.states, placements, self._revision + 1, datetime.now(UTC))

    def _plan_of(
        self,
        states: tuple[DeviceState, ...],
        placements: Mapping[str, Placement | None],
        revision: int,
        changed: datetime | None,
    ) -> Plan:
        content = [
            [[state.budget_bytes, state.drained] for state in states],
            [[model_id, placement_to_json(p)] for model_id, p in sorted(placements.items())],
            revision,
        ]
        return Plan(
            devices=states,
            placements=placements,
            etag=_etag(content),
            revision=revision,
            changed=changed,
        )

    def _check_budgets(self, states: Sequence[DeviceState]) -> None:
        budgets = [state.budget_bytes for state in states]
        if violations := budget_violations(self._devices, budgets, self._tier):
            text = "; ".join(f"{v.field}: {v.description}" for v in violations)
            raise Refusal(
                Reason.INVALID_FIELD,
                text,
                violations=tuple(Violation("budget_bytes", v.description) for v in violations),
            )


def placement_origin(model: Model) -> str:
    """What a model's own placement is, to notice when its owner says another one later."""
    return json.dumps(placement_to_json(model.draft.placement), sort_keys=True)


def device_origin(device: ManagedDevice) -> str:
    """What the configuration says of a device's budget, to notice when it says another one."""
    return f"{device.budget_bytes}"


def _brief(text: str) -> str:
    """A text for an event: the journal is bounded, and maps have no end."""
    return text if len(text) <= _MOST_TOLD else f"{text[:_MOST_TOLD]}..."


def _refusal(obstacles: Sequence[Obstacle]) -> Refusal:
    """The refusal of the first obstacle, with a text that names them all."""
    first = obstacles[0]
    kind, _, _ = first.subject.partition("s/")
    text = "; ".join(f"{each.subject}: {each.refusal.text}" for each in obstacles)
    metadata = {**first.refusal.metadata, kind: first.subject}
    return replace(first.refusal, text=text, metadata=metadata)


def _etag(content: object) -> str:
    text = json.dumps(content, sort_keys=True)
    return f'"{hashlib.sha256(text.encode()).hexdigest()[:16]}"'
