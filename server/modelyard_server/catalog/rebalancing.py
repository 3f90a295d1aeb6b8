"""Evens out the devices; see DeviceService.RebalanceDevices.

Every move is decided on a rehearsal that goes along, so that asking what would be moved and moving
it come to the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.forecaster import DeviceState, Forecaster, is_cut, same_ways
from modelyard_server.catalog.forecasts import DeviceForecast, ModelForecast
from modelyard_server.catalog.model import Model
from modelyard_server.catalog.registry import Registry
from modelyard_server.catalog.succession import Heir, rehearse_staging, rehearse_switch
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.errors import Refusal
from modelyard_server.residency.journal import EventType, Journal
from modelyard_server.residency.rehearsal import Rehearsal
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import State

__all__ = ["Rebalancing"]

logger = logging.getLogger(__name__)


class Rebalancing:
    """Evens out the devices once.

    Args:
        devices: by position.
        catalog: the models.
        registry: moves them.
        residency: where they are.
        journal: is told of moves.
        forecaster: rehearses.
        states: the devices as the plan in force has them.
    """

    def __init__(
        self,
        *,
        devices: Sequence[ManagedDevice],
        catalog: Catalog,
        registry: Registry,
        residency: Residency,
        journal: Journal,
        forecaster: Forecaster,
        states: tuple[DeviceState, ...],
    ) -> None:
        self._devices = tuple(devices)
        self._catalog = catalog
        self._registry = registry
        self._residency = residency
        self._journal = journal
        self._forecaster = forecaster
        self._states = states

    async def run(
        self, *, deadline_ns: int, validate_only: bool
    ) -> tuple[list[ModelForecast], tuple[DeviceForecast, ...]]:
        """Moves what is to be moved.

        Args:
            deadline_ns: of the residency's clock, for the loads.
            validate_only: say what would be moved, and move nothing.

        Returns:
            The models that were moved, or would be, in that order, and the devices afterwards.

        Raises:
            Refusal: one of them could not be loaded in its new place. Moves made before stay.
        """
        moves: list[ModelForecast] = []
        # All prices first: what is rehearsed from then on is how things are.
        cuts = await self._cuts()
        rehearsal = self._forecaster.rehearsal()
        for heir in cuts:
            moves.append(await self._move(heir, rehearsal, deadline_ns, validate_only))
        while (heir_or_none := self._next(rehearsal, {move.model for move in moves})) is not None:
            moves.append(await self._move(heir_or_none, rehearsal, deadline_ns, validate_only))
        return moves, self._forecaster.devices(rehearsal, self._states)

    async def _cuts(self) -> list[Heir]:
        """Automatic cuts that are others for the budgets of today."""
        budgets = [state.budget_bytes for state in self._states]
        heirs = []
        for model in self._catalog.models():
            if not is_cut(model) or self._residency.use(model.handle).pinned:
                continue
            try:
                heir = await self._forecaster.heir(
                    model, model.placement, budgets, given=model.given
                )
            except Refusal as refusal:
                # It fits nowhere, or its files are broken: it stays as it is, and so it says.
                logger.warning("%s cannot be cut again: %s", model.id, refusal)
                continue
            if not same_ways(heir.registration.ways, model.ways):
                heirs.append(heir)
        return heirs

    def _next(self, rehearsal: Rehearsal, moved: set[str]) -> Heir | None:
        """The largest AUTO model whose move makes the fullest device emptier, if there is one."""
        shares = {
            i: rehearsal.account(i).used / state.budget_bytes
            for i, state in enumerate(self._states)
            if self._devices[i].executes and not state.drained and state.budget_bytes > 0
        }
        if len(shares) < 2:
            return None
        fullest = max(shares, key=lambda i: shares[i])
        emptiest = min(shares, key=lambda i: shares[i])
        account = rehearsal.account(emptiest)
        best: tuple[int, Model, int] | None = None
        for model in self._catalog.models():
            use = self._residency.use(model.handle)
            if model.id in moved or use.pinned or use.state is not State.RESIDENT:
                continue
            if set(use.charges) != {fullest} or not rehearsal.is_resident(model.handle.core_id):
                continue
            ways = enumerate(model.ways)
            way = next((i for i, each in ways if set(each.charges) == {emptiest}), None)
            if way is None:
                continue
            needed = model.ways[way].charges[emptiest]
            after = (account.used + needed) / account.budget
            if needed > account.free or after >= shares[fullest]:
                continue
            if best is None or needed > best[0]:
                best = needed, model, way
        if best is None:
            return None
        _, model, way = best
        handle = model.handle
        return Heir(
            old=model,
            registration=model,
            spec=handle.spec,
            priced_bytes=handle.priced_bytes,
            staged=True,
            way=way,
        )

    async def _move(
        self, heir: Heir, rehearsal: Rehearsal, deadline_ns: int, validate_only: bool
    ) -> ModelForecast:
        """Moves one model, or rehearses it only."""
        uses = {heir.id: self._residency.use(heir.old.handle)}
        ids = rehearse_staging(rehearsal, [heir], uses)
        rehearse_switch(rehearsal, [heir], uses, ids)
        forecast = ModelForecast(
            model=heir.id,
            ways=heir.registration.ways,
            placement_changed=False,
            current=dict(uses[heir.id].charges),
            planned=dict(rehearsal.held(ids[heir.id])),
            staged=heir.staged,
        )
        if validate_only:
            return forecast
        with self._registry.succession([heir]) as succession:
            await succession.stage(deadline_ns)
            (model,) = succession.commit()
        self._journal.publish(
            EventType.PLACEMENT_CHANGED,
            f"models/{heir.id}",
            cause="operator",
            description="moved to even out the devices",
        )
        self._journal.changed(heir.id)
        return replace(forecast, planned=dict(self._residency.use(model.handle).charges))
