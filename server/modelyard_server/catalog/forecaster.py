"""Works a change of the device plan out: what it takes, what comes of it, what stands in its way.

Every placement that the change gives is expanded against the model's real parameters and the new
budgets. Then the whole is rehearsed on a clone of the yard, in the order and by the very steps in
which it will be carried out. What comes of that is a report, and the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from modelyard.placements import AutomaticPlacement, Placement, PlacementStrategy
from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.forecasts import (
    DeviceForecast,
    Displacement,
    ModelForecast,
    Obstacle,
    PlanReport,
)
from modelyard_server.catalog.model import GivenPlacement, Model
from modelyard_server.catalog.obstacles import (
    beaten,
    closed_to,
    fits_somewhere,
    never_fitting,
    no_room_for,
    overfull,
    refused,
)
from modelyard_server.catalog.registry import Registry
from modelyard_server.catalog.succession import Heir, rehearse_staging, rehearse_switch
from modelyard_server.devices.budgets import budget_violations
from modelyard_server.devices.host_tier import HostTier
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.devices.placed import PlacedAs
from modelyard_server.devices.placement import effective_placement
from modelyard_server.errors import Reason, Refusal, Violation
from modelyard_server.residency.rehearsal import Rehearsal
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import ModelUse, State

__all__ = [
    "DeviceState",
    "Forecaster",
    "PlanChange",
    "Steps",
    "change_states",
    "is_cut",
    "same_ways",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceState:
    """What a plan says of a device."""

    budget_bytes: int
    drained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChange:
    """A change of the plan: what it does not name stays as it is.

    Attributes:
        budgets: bytes by position of the device.
        drained: by position of the device.
        placements: by the model's id.
    """

    budgets: Mapping[int, int] = field(default_factory=dict)
    drained: Mapping[int, bool] = field(default_factory=dict)
    placements: Mapping[str, Placement | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """A change that was worked out.

    Attributes:
        today: the devices as they are.
        roomy: the devices while heirs are staged: with what only makes room.
        states: the devices as they will be.
        heirs: models that change.
        report: what comes of it.
    """

    today: tuple[DeviceState, ...]
    roomy: tuple[DeviceState, ...]
    states: tuple[DeviceState, ...]
    heirs: tuple[Heir, ...]
    report: PlanReport


class _Devices(Protocol):
    """The residency, or a rehearsal."""

    def set_budget(self, device: int, budget_bytes: int) -> None: ...

    def set_closed(self, device: int, closed: bool) -> None: ...


def change_states(
    devices: _Devices, before: Sequence[DeviceState], after: Sequence[DeviceState]
) -> None:
    """Changes budgets and drains.

    First what takes room, so that in between no budgets are in force that together are more than
    the machine has, and nothing is loaded only to leave at once.
    """
    changes = list(enumerate(zip(before, after, strict=True)))
    for i, (old, new) in changes:
        if new.budget_bytes < old.budget_bytes:
            devices.set_budget(i, new.budget_bytes)
    for i, (old, new) in changes:
        if new.drained and not old.drained:
            devices.set_closed(i, True)
    for i, (old, new) in changes:
        if new.budget_bytes > old.budget_bytes:
            devices.set_budget(i, new.budget_bytes)
    for i, (old, new) in changes:
        if old.drained and not new.drained:
            devices.set_closed(i, False)


class Forecaster:
    """Works changes out. Changes nothing.

    Args:
        devices: by position.
        catalog: the models.
        registry: checks and places them.
        residency: where they are.
        tier: the host tier, which has its part of host memory.
    """

    def __init__(
        self,
        *,
        devices: Sequence[ManagedDevice],
        catalog: Catalog,
        registry: Registry,
        residency: Residency,
        tier: HostTier | None = None,
    ) -> None:
        self._devices = tuple(devices)
        self._tier = tier
        self._catalog = catalog
        self._registry = registry
        self._residency = residency

    async def work_out(self, change: PlanChange, today: tuple[DeviceState, ...]) -> Steps:
        """Works a change out; what is rehearsed is how things are when this returns.

        Args:
            change: what is to be changed.
            today: the devices as they are.

        Raises:
            Refusal: INVALID_FIELD: budgets that cannot be, models that there are not.
        """
        states = tuple(
            DeviceState(
                budget_bytes=change.budgets.get(i, state.budget_bytes),
                drained=change.drained.get(i, state.drained),
            )
            for i, state in enumerate(today)
        )
        self._check(change, states)
        now = [state.budget_bytes for state in today]
        budgets = [state.budget_bytes for state in states]
        obstacles: list[Obstacle] = []
        heirs: list[Heir] = []
        for model in self._catalog.models():
            named = model.id in change.placements
            if not named and (not is_cut(model) or fits_somewhere(model.ways, budgets)):
                continue
            placement = change.placements.get(model.id, model.placement)
            try:
                given = GivenPlacement(placement) if named else model.given
                heir = await self.heir(model, placement, budgets, given=given)
            except Refusal as refusal:
                # What does not fit today either is no matter of this change.
                if named or fits_somewhere(model.ways, now):
                    obstacles.append(refused(model, refusal))
                continue
            if named and heir.registration.warnings:
                obstacles.append(beaten(model, heir.registration.warnings))
            elif placement != model.placement or not same_ways(heir.registration.ways, model.ways):
                heirs.append(heir)
        # No waiting from here on: what is rehearsed is what is carried out.
        ways_of = {heir.id: heir.registration.ways for heir in heirs}
        unfitting = never_fitting(self._catalog, ways_of, self._devices, now, budgets)
        # Those of which it has been said already are left out.
        said = {obstacle.subject for obstacle in obstacles}
        obstacles += [each for each in unfitting if each.subject not in said]
        roomy = self._roomy(today, states)
        report = self._rehearse(today, roomy, states, heirs, obstacles)
        return Steps(today=today, roomy=roomy, states=states, heirs=tuple(heirs), report=report)

    async def heir(
        self,
        model: Model,
        placement: Placement | None,
        budgets: Sequence[int],
        *,
        given: GivenPlacement | None,
    ) -> Heir:
        """A model as it is with another placement, or for other budgets.

        Raises:
            Refusal: PLACEMENT_INVALID; MODEL_NEVER_FITS for an automatic cut; LOAD_FAILED: its
                files are broken.
        """
        checked = self._registry.check(model.draft, folder_needed=False, given=given)
        price = await self._registry.price(checked.spec)
        registration = self._registry.register(
            checked,
            price,
            owner=model.owner,
            created=model.created,
            # The record itself stays as it is; what a plan says shows in the plan's etag.
            etag=model.etag if placement == model.placement else None,
            origin=model.origin,
            budgets=budgets,
        )
        return Heir(
            old=model,
            registration=registration,
            spec=checked.spec,
            priced_bytes=price.peak_bytes,
            staged=False,
        )

    def uses(self) -> dict[str, ModelUse]:
        """Where every model stands, by id."""
        return {model.id: self._residency.use(model.handle) for model in self._catalog.models()}

    def rehearsal(self) -> Rehearsal:
        """A rehearsal from when what runs now has ended."""
        rehearsal = self._residency.rehearse()
        rehearsal.settle()
        return rehearsal

    def devices(
        self, rehearsal: Rehearsal, states: Sequence[DeviceState]
    ) -> tuple[DeviceForecast, ...]:
        """The devices after a rehearsal."""
        return tuple(
            DeviceForecast(
                device=device.name,
                budget_bytes=state.budget_bytes,
                used_bytes=rehearsal.account(i).used,
                drained=state.drained,
            )
            for i, (device, state) in enumerate(zip(self._devices, states, strict=True))
        )

    def overfull(self, rehearsal: Rehearsal, owed: Sequence[int]) -> list[Obstacle]:
        """Obstacles that a rehearsed change of budgets meets; see obstacles.overfull."""
        pinned = {name: use.charges for name, use in self.uses().items() if use.pinned}
        return list(overfull(rehearsal, owed, self._devices, pinned))

    def _check(self, change: PlanChange, states: Sequence[DeviceState]) -> None:
        violations = [
            *budget_violations(self._devices, [state.budget_bytes for state in states], self._tier),
            *(
                Violation(f"models/{model_id}", "there is no such model")
                for model_id in sorted(
                    set(change.placements) - {model.id for model in self._catalog.models()}
                )
            ),
        ]
        if violations:
            text = "; ".join(f"{v.field}: {v.description}" for v in violations)
            raise Refusal(Reason.INVALID_FIELD, text, violations=tuple(violations))

    # --- The rehearsal ------------------------------------------------------------------------

    def _roomy(
        self, today: Sequence[DeviceState], states: Sequence[DeviceState]
    ) -> tuple[DeviceState, ...]:
        """Budgets that grow and devices that are undrained; the rest as it is.

        Devices that share the host's memory grow only as far as it goes beside those that are to
        shrink; the rest of it comes with the switch.
        """
        budgets = [state.budget_bytes for state in today]
        for i, state in enumerate(states):
            grown = [*budgets[:i], max(budgets[i], state.budget_bytes), *budgets[i + 1 :]]
            if not budget_violations(self._devices, grown, self._tier):
                budgets = grown
        return tuple(
            DeviceState(budget_bytes=budget, drained=old.drained and new.drained)
            for budget, old, new in zip(budgets, today, states, strict=True)
        )

    def _rehearse(
        self,
        today: Sequence[DeviceState],
        roomy: Sequence[DeviceState],
        states: Sequence[DeviceState],
        heirs: Sequence[Heir],
        obstacles: Sequence[Obstacle],
    ) -> PlanReport:
        rehearsal = self.rehearsal()
        uses = self.uses()
        owed = [rehearsal.account(i).deficit for i in range(len(self._devices))]
        for heir in heirs:
            target = self._residency.target_of(heir.old.handle)
            places = [way.target for way in heir.registration.ways]
            heir.stays = uses[heir.id].state is State.RESIDENT and target in places
            heir.staged = heir.stays
        change_states(rehearsal, today, roomy)
        new_ids = rehearse_staging(rehearsal, heirs, uses)
        rehearse_switch(rehearsal, heirs, uses, new_ids)
        change_states(rehearsal, roomy, states)
        models = self._catalog.models()
        old_ids = {model.id: model.handle.core_id for model in models}
        ids = old_ids | new_ids
        homeless: list[Obstacle] = []
        for heir in heirs:
            if heir.stays or not uses[heir.id].pinned:
                continue
            if not rehearsal.want(ids[heir.id]):
                homeless += self._homeless(rehearsal, states, heir, uses, ids)
        for heir in heirs:
            if uses[heir.id].waiting_count:
                rehearsal.want(ids[heir.id])  # Who waits for the old one asks for the new one.

        changed = {heir.id: heir for heir in heirs}
        forecasts = []
        for model in models:
            heir_of = changed.get(model.id)
            current, planned = uses[model.id].charges, rehearsal.held(ids[model.id])
            if heir_of is None and dict(current) == dict(planned):
                continue
            forecasts.append(
                ModelForecast(
                    model=model.id,
                    ways=model.ways if heir_of is None else heir_of.registration.ways,
                    placement_changed=heir_of is not None,
                    current=dict(current),
                    planned=dict(planned),
                    staged=heir_of is not None and heir_of.staged,
                )
            )
        names = {core_id: model_id for each in (old_ids, ids) for model_id, core_id in each.items()}
        kept = {model_id for model_id, core_id in ids.items() if rehearsal.is_resident(core_id)}
        return PlanReport(
            models=tuple(forecasts),
            displaced=self._displaced(rehearsal, names.get, kept),
            obstacles=(*obstacles, *homeless, *self.overfull(rehearsal, owed)),
            devices=self.devices(rehearsal, states),
        )

    def _homeless(
        self,
        rehearsal: Rehearsal,
        states: Sequence[DeviceState],
        heir: Heir,
        uses: Mapping[str, ModelUse],
        ids: Mapping[str, int],
    ) -> Iterator[Obstacle]:
        """Why a pinned model could not be in its new place, unless it only has to wait for it."""
        pinned = {
            name: rehearsal.held(core_id) for name, core_id in ids.items() if uses[name].pinned
        }
        if rehearsal.no_room is not None:
            yield no_room_for(heir.id, rehearsal.no_room, self._devices, pinned)
            return
        ways = heir.registration.ways
        closed = [[device for device in way.charges if states[device].drained] for way in ways]
        if all(closed):
            device = closed[0][0]
            yield closed_to(heir.id, ways[0], device, self._devices[device].name)

    def _displaced(
        self, rehearsal: Rehearsal, name_of: Callable[[int], str | None], kept: set[str]
    ) -> tuple[Displacement, ...]:
        found = []
        for departure in rehearsal.departures:
            name = name_of(departure.core_id)
            if name is None or name in kept or departure.why == "REMOVED":
                continue
            cause = name_of(departure.cause) if departure.cause else None
            if departure.device >= 0:
                where = self._devices[departure.device].name
            else:
                where = "" if cause is None else f"models/{cause}"
            found.append(
                Displacement(
                    model=f"models/{name}",
                    charges=dict(departure.charges),
                    cause=where,
                    in_use=departure.in_use,
                )
            )
        return tuple(found)


def is_cut(model: Model) -> bool:
    """True if the server has cut the model into parts, by its placement or by its options."""
    placement, _, _ = effective_placement(model.placement, model.draft.options)
    return (
        isinstance(placement, AutomaticPlacement)
        and placement.strategy is not PlacementStrategy.AUTO
    )


def same_ways(one: Sequence[PlacedAs], other: Sequence[PlacedAs]) -> bool:
    """True if they load a model onto the same devices with the same bytes."""
    return [(way.target, dict(way.charges)) for way in one] == [
        (way.target, dict(way.charges)) for way in other
    ]
