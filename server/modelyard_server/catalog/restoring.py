"""What a server starts with: the configuration file, and what was stored since it was last read.

The latest word counts. A record of the configuration file follows the file; what was changed on it
by a call (a budget, a drain, a placement, a pin) is kept as long as the file says what it said when
that was changed. If the file says something else now, the file was the last to speak. Records of
the API are kept until they are deleted.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from modelyard.placements import placement_to_json, read_placement
from modelyard_server.catalog.model import GivenPlacement, Model, ModelDraft
from modelyard_server.catalog.plans import DevicePlans, device_origin
from modelyard_server.catalog.records import (
    Change,
    DeviceRecord,
    ModelRecord,
    Owner,
    PlacementRecord,
    RouteRecord,
    Stored,
)
from modelyard_server.catalog.registry import Checked, Registry
from modelyard_server.catalog.route import Route, RouteDraft
from modelyard_server.catalog.route_registry import RouteRegistry
from modelyard_server.catalog.writes import Writes
from modelyard_server.devices.budgets import budget_violations
from modelyard_server.devices.host_tier import HostTier
from modelyard_server.devices.inventory import ManagedDevice
from modelyard_server.errors import Reason, Refusal, Resource
from modelyard_server.residency.shell import Residency
from modelyard_server.routing.target_json import TargetError
from modelyard_server.runtimes.api import ModelSpec, OptionError, Price

__all__ = ["ConfiguredModel", "Restorer"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfiguredModel:
    """A model of the configuration file."""

    draft: ModelDraft
    pinned: bool

    def origin(self) -> str:
        """A digest of what the file says."""
        return f"{self.draft.digest()}{'+' if self.pinned else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """A model that is to be there."""

    draft: ModelDraft
    owner: Owner
    given: PlacementRecord | None
    pinned: bool
    created: datetime
    etag: str | None
    origin: str


class Restorer:
    """Brings a server to where it was.

    Args:
        devices: by position, with their configured budgets.
        registry: registers the models.
        routes: registers the routes.
        plans: is told the stored plan's revision.
        residency: gets budgets, drains and pins.
        writes: makes durable what the file has changed.
        tier: the host tier, which has its part of host memory.
    """

    def __init__(
        self,
        *,
        devices: Sequence[ManagedDevice],
        registry: Registry,
        routes: RouteRegistry,
        plans: DevicePlans,
        residency: Residency,
        writes: Writes,
        tier: HostTier | None = None,
    ) -> None:
        self._devices = tuple(devices)
        self._tier = tier
        self._registry = registry
        self._routes = routes
        self._plans = plans
        self._residency = residency
        self._writes = writes

    async def restore(
        self,
        configured: Sequence[ConfiguredModel],
        stored: Stored,
        routes: Sequence[RouteDraft] = (),
    ) -> None:
        """Registers everything, and stores what the file has changed since the last time.

        A model whose files are broken now is registered all the same: a broken model breaks only
        itself.

        Raises:
            Refusal: a model, route or key of the file is one that the API has registered, or the
                file itself is wrong about a model; its text names the model or route.
        """
        self._plans.restored(stored.plan_revision, stored.plan_time)
        dropped_devices = self._restore_devices(stored.devices)
        wanted, dropped_models, dropped_placements = _merge(configured, stored)
        models = await self._register(wanted)
        put_routes = self._restore_routes(routes, stored)
        for each in wanted:
            if each.given is not None and models[each.draft.id].given is None:
                dropped_placements.append(each.draft.id)
        change = Change(
            put_models=tuple(
                record
                for each in wanted
                if (record := models[each.draft.id].record(pinned=each.pinned)) not in stored.models
            ),
            delete_models=tuple(dropped_models),
            put_routes=tuple(route.record() for route in put_routes),
            delete_routes=tuple(
                record.id
                for record in stored.routes
                if record.owner is Owner.CONFIG and record.id not in {each.id for each in routes}
            ),
            delete_placements=tuple(dropped_placements),
            delete_devices=tuple(dropped_devices),
        )
        if change != Change():
            try:
                await self._writes.write(change)
            except Refusal:
                # It follows from the file: if it is never written, the next start finds it again.
                logger.exception("what the configuration has changed could not be stored")
                self._writes.owe(change)
        for each in wanted:
            if each.pinned:
                self._pin(models[each.draft.id])

    def _restore_routes(self, configured: Sequence[RouteDraft], stored: Stored) -> list[Route]:
        """Registers the routes; returns those that are not as they are stored."""
        records = {record.id: record for record in stored.routes}
        routes: list[Route] = []
        changed = []
        for draft in configured:
            record = records.get(draft.id)
            if record is not None and record.owner is Owner.API:
                raise Refusal(
                    Reason.ALREADY_EXISTS,
                    f"routes.{draft.id}: the catalog holds a route of this name that CreateRoute "
                    "registered; delete that one, or name this one otherwise",
                    resource=Resource("route", f"routes/{draft.id}"),
                )
            if record is not None and record.origin == draft.digest():
                routes.append(_route_of(record))
                continue
            answer = self._routes.check(
                draft,
                owner=Owner.CONFIG,
                created=None if record is None else record.created,
                origin=draft.digest(),
            )
            for warning in answer.warnings:
                logger.warning("route %s: %s", draft.id, warning)
            changed.append(answer.route)
        routes += changed
        routes += [_route_of(record) for record in stored.routes if record.owner is Owner.API]
        self._routes.restore(routes)
        return changed

    def _restore_devices(self, records: Sequence[DeviceRecord]) -> list[str]:
        """Sets budgets and drains; returns names whose records are void."""
        void = []
        positions = {device.name: i for i, device in enumerate(self._devices)}
        budgets = [device.budget_bytes for device in self._devices]
        kept = []
        for record in records:
            position = positions.get(record.name)
            if position is None or record.origin != device_origin(self._devices[position]):
                logger.warning(
                    "the configuration says something else of %s than when it was changed by a "
                    "call: the configuration counts",
                    record.name,
                )
                void.append(record.name)
                continue
            kept.append((position, record))
            if record.budget_bytes is not None:
                budgets[position] = record.budget_bytes
        if problems := budget_violations(self._devices, budgets, self._tier):
            logger.error(
                "stored budgets are not possible any more (%s): the configured ones count",
                "; ".join(f"{p.field}: {p.description}" for p in problems),
            )
            budgets = [device.budget_bytes for device in self._devices]
        for position, record in kept:
            if budgets[position] != self._devices[position].budget_bytes:
                self._residency.set_budget(position, budgets[position])
            if record.drained:
                self._residency.set_closed(position, True)
        return void

    async def _register(self, wanted: Sequence[_Wanted]) -> dict[str, Model]:
        checked = [self._checked(each) for each in wanted]
        prices = await asyncio.gather(*(self._price(each) for each in checked))
        models = {}
        for each, right, price in zip(wanted, checked, prices, strict=True):
            try:
                models[each.draft.id] = self._registered(each, right, price)
            except Refusal as refusal:
                raise _named(each.draft.id, refusal) from None
        return models

    def _checked(self, wanted: _Wanted) -> Checked:
        given = None
        if wanted.given is not None:
            try:
                given = GivenPlacement(read_placement(wanted.given.placement))
            except (TypeError, ValueError) as error:
                logger.error("the stored placement of %s is void: %s", wanted.draft.id, error)
        try:
            return self._registry.check(wanted.draft, folder_needed=False, given=given)
        except Refusal as refusal:
            if wanted.owner is Owner.CONFIG:
                raise _named(wanted.draft.id, refusal) from None
            # Of the API, so nobody can mend it before the server runs: its root or its factory is
            # not in the configuration any more. It is there, and its loads fail.
            logger.error("model %s cannot be loaded as it is: %s", wanted.draft.id, refusal.text)
            return _unusable(wanted.draft, given, refusal)

    async def _price(self, checked: Checked) -> Price | None:
        try:
            return await self._registry.price(checked.spec)
        except Refusal as refusal:
            logger.warning("model %s cannot be loaded as it is: %s", checked.draft.id, refusal.text)
        except OptionError:
            pass  # Of one that is not usable, which has been said.
        return None  # Priced again before every load.

    def _registered(self, wanted: _Wanted, checked: Checked, price: Price | None) -> Model:
        try:
            registration = self._registry.register(
                checked,
                price,
                owner=wanted.owner,
                created=wanted.created,
                etag=wanted.etag,
                origin=wanted.origin,
            )
        except Refusal as refusal:
            if refusal.reason is Reason.MODEL_NEVER_FITS and price is not None:
                # The budgets of today are too small for it, and a call may have made them so. It
                # is placed again before every load, which fails until they are large enough.
                logger.error("model %s does not fit: %s", wanted.draft.id, refusal.text)
                return self._registered(wanted, checked, None)
            if wanted.owner is Owner.CONFIG and checked.given is None:
                raise
            if checked.given is not None:
                # The plan is of another day: devices have gone, or the files have changed.
                logger.error(
                    "the placement that a plan gave %s is void: %s", wanted.draft.id, refusal.text
                )
                own = self._registry.check(wanted.draft, folder_needed=False)
                return self._registered(wanted, own, price)
            # Of the API, so nobody can mend it before the server runs: it is there and says why.
            logger.error("model %s cannot be placed: %s", wanted.draft.id, refusal.text)
            anywhere = replace(checked, placement=None, warnings=(refusal.text,))
            registration = self._registry.register(
                anywhere,
                None,
                owner=wanted.owner,
                created=wanted.created,
                etag=wanted.etag,
                origin=wanted.origin,
            )
        self._registry.check_free(registration)
        return self._registry.add(registration, checked.spec, price)

    def _pin(self, model: Model) -> None:
        try:
            self._residency.want(model.handle)
        except Refusal as refusal:
            logger.error("%s is to be pinned and cannot be: %s", model.id, refusal)
        self._residency.set_pinned(model.handle, True)


def _merge(
    configured: Sequence[ConfiguredModel], stored: Stored
) -> tuple[list[_Wanted], list[str], list[str]]:
    """What is to be there, ids that are stored and gone, and ids whose plan placement is void."""
    records = {record.id: record for record in stored.models}
    placements = {record.model: record for record in stored.placements}
    wanted: list[_Wanted] = []
    void: list[str] = []
    named = {model.draft.id for model in configured}
    for model in configured:
        record = records.get(model.draft.id)
        if record is not None and record.owner is Owner.API:
            raise Refusal(
                Reason.ALREADY_EXISTS,
                f"models.{model.draft.id}: the catalog holds a model of this name that CreateModel "
                "registered; delete that one, or name this one otherwise",
                resource=Resource("model", f"models/{model.draft.id}"),
            )
        same = record is not None and record.origin == model.origin()
        wanted.append(
            _Wanted(
                draft=model.draft,
                owner=Owner.CONFIG,
                given=_still_given(model.draft, placements, void),
                pinned=record.pinned if same and record is not None else model.pinned,
                created=datetime.now(UTC) if record is None else record.created,
                etag=record.etag if same and record is not None else None,
                origin=model.origin(),
            )
        )
    for record in stored.models:
        if record.owner is Owner.CONFIG:
            continue
        draft = _draft_of(record)
        wanted.append(
            _Wanted(
                draft=draft,
                owner=Owner.API,
                given=_still_given(draft, placements, void),
                pinned=record.pinned,
                created=record.created,
                etag=record.etag,
                origin="",
            )
        )
    gone = [
        record.id
        for record in stored.models
        if record.owner is Owner.CONFIG and record.id not in named
    ]
    return wanted, gone, [model_id for model_id in void if model_id not in gone]


def _still_given(
    draft: ModelDraft, placements: dict[str, PlacementRecord], void: list[str]
) -> PlacementRecord | None:
    record = placements.get(draft.id)
    if record is None:
        return None
    if record.origin == json.dumps(placement_to_json(draft.placement), sort_keys=True):
        return record
    logger.warning(
        "the configuration gives %s another placement than when a plan changed it: the "
        "configuration counts",
        draft.id,
    )
    void.append(draft.id)
    return None


def _route_of(record: RouteRecord) -> Route:
    """A stored route. Raises Refusal INTERNAL if it cannot be read."""
    try:
        return Route.of(record)
    except TargetError as error:
        # Not left out: its keys would then mean nothing, or something else by a prefix.
        raise Refusal(
            Reason.INTERNAL, f"routes.{record.id}: what the catalog holds is no route: {error}"
        ) from None


def _draft_of(record: ModelRecord) -> ModelDraft:
    return ModelDraft(
        id=record.id,
        keys=record.keys,
        root=record.root,
        folder=record.folder,
        runtime=record.runtime,
        task=record.task,
        options=record.options,
        placement=read_placement(record.placement),
    )


def _unusable(draft: ModelDraft, given: GivenPlacement | None, refusal: Refusal) -> Checked:
    """A model without files, which no runtime that needs some can load."""
    return Checked(
        draft=draft,
        given=given,
        spec=ModelSpec(
            name=draft.id, runtime=draft.runtime, task=draft.task, options=dict(draft.options)
        ),
        placement=None,
        warnings=(refusal.text,),
    )


def _named(model_id: str, refusal: Refusal) -> Refusal:
    refusal.text = f"models.{model_id}: {refusal.text}"
    return refusal
