"""Registers routes: checks them, gives their keys a model, and changes which."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import Model, is_key, is_model_id
from modelyard_server.catalog.records import Change, Owner, RequestRecord
from modelyard_server.catalog.route import MOST_KEYS, Route, RouteDraft, RouteTarget
from modelyard_server.catalog.writes import Writes, to_the_end
from modelyard_server.errors import Reason, Refusal, Resource, Violation
from modelyard_server.residency.journal import EventType, Journal
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import NEVER_NS, State
from modelyard_server.routing.key_table import KeyChange, KeyMapping, KeyTable

__all__ = ["RememberRoute", "RouteAnswer", "RouteRegistry"]

logger = logging.getLogger(__name__)

_ID = "must match [a-z0-9][a-z0-9._-]{0,127} and hold no '..'"
_KEY = "must match [A-Za-z0-9][A-Za-z0-9._:/-]{0,255} and hold no '..'"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteAnswer:
    """What a change of a route has come to.

    Attributes:
        route: as registered.
        warnings: what its owner should know of the keys as they were given.
        changes: keys that mean something else than before.
    """

    route: Route
    warnings: tuple[str, ...] = ()
    changes: tuple[KeyChange[RouteTarget], ...] = ()


RememberRoute = Callable[[RouteAnswer], RequestRecord | None]
"""What is to be remembered of a call, given its answer."""


def _nothing(answer: RouteAnswer) -> None:
    return None


class RouteRegistry:
    """Registers, changes and removes routes.

    What changes the catalog is called inside `Writes.alone`. What it makes durable it shows in the
    same step, whatever becomes of its caller.

    Args:
        catalog: where routes are put.
        residency: loads a model before keys are pointed to it.
        writes: makes changes durable.
        journal: is told of them.
    """

    def __init__(
        self, *, catalog: Catalog, residency: Residency, writes: Writes, journal: Journal
    ) -> None:
        self._catalog = catalog
        self._residency = residency
        self._writes = writes
        self._journal = journal

    async def create(
        self, draft: RouteDraft, *, validate_only: bool = False, remember: RememberRoute = _nothing
    ) -> RouteAnswer:
        """Registers a route.

        Raises:
            Refusal: INVALID_FIELD (every violation at once), ALREADY_EXISTS, MODEL_NOT_FOUND,
                CATALOG_UNAVAILABLE.
        """
        answer = self.check(draft, owner=Owner.API)
        route = answer.route
        self._catalog.check_route_free(route.id, route.keys)
        self._catalog.get(route.model)
        if validate_only:
            return answer

        async def finish() -> RouteAnswer:
            await self._writes.write(Change(put_routes=(route.record(),), request=remember(answer)))
            self._catalog.add_routes(route)
            self._tell(EventType.ROUTE_CREATED, route)
            return answer

        return await to_the_end(f"create route {route.id}", finish)

    async def update(
        self,
        old: Route,
        draft: RouteDraft,
        *,
        deadline_ns: int = NEVER_NS,
        validate_only: bool = False,
        remember: RememberRoute = _nothing,
    ) -> RouteAnswer:
        """Changes a route to what the draft says.

        If it is pointed to another model while the one it has is resident, that other one is
        loaded first, where both fit.

        Args:
            old: as it is.
            draft: as it is to be.
            deadline_ns: of the residency's clock, for the load.
            validate_only: check everything, change nothing.
            remember: what is to be remembered of the call, given its answer.

        Raises:
            Refusal: CONFIG_OWNED, or as `create`. LOAD_FAILED, DEADLINE_IN_LOAD and others of a
                request: the new model cannot be loaded; everything is as before.
        """
        self._check_owner(old)
        checked = self.check(draft, owner=old.owner, old=old)
        route = checked.route
        self._catalog.check_route_free(route.id, route.keys, but_for=old)
        model = self._catalog.get(route.model)
        _, changes = self._catalog.changed_by(old, route)
        answer = replace(checked, changes=changes)
        if validate_only:
            return answer
        with ExitStack() as leases:
            if route.model != old.model:
                await self._stage(old, model, deadline_ns, leases)

            async def finish() -> RouteAnswer:
                await self._writes.write(
                    Change(put_routes=(route.record(),), request=remember(answer))
                )
                self._catalog.replace_route(old, route)
                self._tell(EventType.ROUTE_UPDATED, route)
                return answer

            return await to_the_end(f"update route {route.id}", finish)

    async def delete(self, route: Route, *, request: RequestRecord | None = None) -> None:
        """Takes a route out.

        Raises:
            Refusal: CONFIG_OWNED, CATALOG_UNAVAILABLE.
        """
        self._check_owner(route)

        async def finish() -> None:
            await self._writes.write(Change(delete_routes=(route.id,), request=request))
            self._catalog.remove_route(route)
            self._tell(EventType.ROUTE_DELETED, route)

        await to_the_end(f"delete route {route.id}", finish)

    def restore(self, routes: Sequence[Route]) -> None:
        """Makes routes known that are stored, or will be.

        Raises:
            Refusal: ALREADY_EXISTS: a key is taken; its text names the route.
        """
        for route in routes:
            if not self._catalog.has_model(route.model):
                # Of the API, and its model has left the configuration file.
                logger.error(
                    "route %s: there is no model %s, its keys mean nothing", route.id, route.model
                )
        self._catalog.add_routes(*routes)

    def check(
        self,
        draft: RouteDraft,
        *,
        owner: Owner,
        old: Route | None = None,
        etag: str | None = None,
        created: datetime | None = None,
        origin: str = "",
    ) -> RouteAnswer:
        """Checks what a draft says in itself, and makes a route of it.

        Args:
            draft: what to check.
            owner: of its record.
            old: what it changes.
            etag: None for a new one.
            created: None for that of the old one, or now.
            origin: for routes of the configuration file, a digest of what the file said.

        Raises:
            Refusal: INVALID_FIELD, with every violation at once.
        """
        violations: list[Violation] = []
        if not is_model_id(draft.id):
            violations.append(Violation("route_id", _ID))
        violations += [
            Violation(f"route.keys[{i}]", _KEY)
            for i, key in enumerate(draft.keys)
            if not is_key(key)
        ]
        table: KeyTable[str] | None = None
        try:
            table = KeyTable.of([KeyMapping(tuple(draft.keys), f"models/{draft.model}")])
        except ValueError:
            violations.append(Violation("route.keys", "at least one is needed"))
        if table is not None and len(table) > MOST_KEYS:
            text = f"there are {len(table)}; {MOST_KEYS} may be"
            violations.append(Violation("route.keys", text))
        if not is_model_id(draft.model):
            violations.append(
                Violation("route.target", 'a model is needed, by its name "models/{model}"')
            )
        if violations or table is None:
            text = "; ".join(f"{v.field}: {v.description}" for v in violations)
            raise Refusal(Reason.INVALID_FIELD, text, violations=tuple(violations))
        now = datetime.now(UTC)
        route = Route(
            id=draft.id,
            keys=tuple(map(str, table)),
            model=draft.model,
            owner=owner,
            created=created or (now if old is None else old.created),
            updated=now,
            etag=etag or f'"{secrets.token_hex(8)}"',
            origin=origin,
        )
        return RouteAnswer(route=route, warnings=table.warnings)

    async def _stage(self, old: Route, model: Model, deadline_ns: int, leases: ExitStack) -> None:
        """Loads the model that keys are to mean, if what they mean now is resident.

        Args:
            old: the route as it is.
            model: what its keys are to mean.
            deadline_ns: of the residency's clock.
            leases: gets the leases that keep both models until the keys are pointed.
        """
        if not self._catalog.has_model(old.model):
            return
        present = self._catalog.get(old.model)
        # Not while it is being loaded: its requests wait as it is, and the load may be what is
        # wrong with it.
        if self._residency.use(present.handle).state is not State.RESIDENT:
            return
        rehearsal = self._residency.rehearse()
        rehearsal.settle()
        rehearsal.set_pinned(present.handle.core_id, True)
        if not rehearsal.want(model.handle.core_id):
            return
        # Leased, the present model is nobody's victim: least of all its follower's.
        if (lease := self._residency.try_lease(present.handle)) is not None:
            leases.callback(lease.release)
        try:
            lease = await self._residency.lease(model.handle, deadline_ns, asked=True)
        except Refusal as refusal:
            why = f": {model.handle.failure_text}" if model.handle.failure_text else ""
            refusal.text = f"models/{model.id}, for routes/{old.id}: {refusal.text}{why}"
            raise
        leases.callback(lease.release)

    def _check_owner(self, route: Route) -> None:
        if route.owner is Owner.CONFIG:
            raise Refusal(
                Reason.CONFIG_OWNED,
                f"route {route.id!r} belongs to the configuration file: change it there",
                resource=Resource("route", f"routes/{route.id}"),
            )

    def _tell(self, event: EventType, route: Route) -> None:
        count = "1 key" if len(route.keys) == 1 else f"{len(route.keys)} keys"
        self._journal.publish(
            event,
            f"routes/{route.id}",
            cause="operator",
            description=f"{route.keys[0]} ({count}) means models/{route.model}",
        )
