"""Registers routes: checks them, gives their keys a meaning, and changes which."""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.ensembles import fit_together
from modelyard_server.catalog.model import Model
from modelyard_server.catalog.records import Change, Owner, RequestRecord
from modelyard_server.catalog.route import Route, RouteDraft, RouteTarget, name_violations
from modelyard_server.catalog.writes import Writes, to_the_end
from modelyard_server.errors import Reason, Refusal, Resource, Violation
from modelyard_server.residency.journal import EventType, Journal
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import NEVER_NS, State
from modelyard_server.routing.checks import (
    TransformCheck,
    beside,
    ensembles_above,
    in_itself,
    missing,
    models_needed,
    only_model,
)
from modelyard_server.routing.key_table import KeyChange
from modelyard_server.routing.step_types import known_signature, steps_that_do_not_meet
from modelyard_server.routing.target_json import Finding
from modelyard_server.routing.targets import (
    Link,
    One,
    Target,
    Versions,
    single_model,
)
from modelyard_server.routing.targets import Sequence as SequenceTarget
from modelyard_server.routing.transforms import check_transform
from modelyard_server.runtimes.signature import Signature

__all__ = ["RememberRoute", "RouteAnswer", "RouteRegistry"]

logger = logging.getLogger(__name__)

_MOST_NAMED = 8
"""Routes that a refusal names."""


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
        check_transform: tells what is wrong with a transform of a sequence.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        residency: Residency,
        writes: Writes,
        journal: Journal,
        check_transform: TransformCheck = check_transform,
    ) -> None:
        self._catalog = catalog
        self._residency = residency
        self._writes = writes
        self._journal = journal
        self._check_transform = check_transform

    async def create(
        self, draft: RouteDraft, *, validate_only: bool = False, remember: RememberRoute = _nothing
    ) -> RouteAnswer:
        """Registers a route.

        Raises:
            Refusal: INVALID_FIELD (every violation at once), ALREADY_EXISTS, MODEL_NOT_FOUND,
                ROUTE_NOT_FOUND, MODEL_NEVER_FITS (members of an ensemble), CATALOG_UNAVAILABLE.
        """
        answer = self.check(draft, owner=Owner.API, among_others=True)
        route = answer.route
        self._catalog.check_route_free(route.id, route.keys, route.prefixes)
        self._check_there(route)
        self._check_fits(route)
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

        If its keys are to mean another model, or another version, while what they mean is resident,
        then that other one is loaded first, where both fit.

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
        checked = self.check(draft, owner=old.owner, old=old, among_others=True)
        route = checked.route
        self._catalog.check_route_free(route.id, route.keys, route.prefixes, but_for=old)
        self._check_there(route)
        self._check_fits(route)
        answer = replace(checked, changes=self._catalog.changed_by(old, route))
        if validate_only:
            return answer
        with ExitStack() as leases:
            await self._stage(old, route, deadline_ns, leases)
            return await self._put(old, answer, remember)

    async def promote(
        self, old: Route, *, deadline_ns: int = NEVER_NS, remember: RememberRoute = _nothing
    ) -> RouteAnswer:
        """Makes the canary of a route of versions the current version; loads it first as `update`.

        Raises:
            Refusal: INVALID_FIELD: it has no canary. CONFIG_OWNED and others as `update`.
        """
        target = old.target
        if not isinstance(target, Versions) or target.canary is None:
            self._check_owner(old)
            raise _invalid([Violation("name", f"routes/{old.id} has no canary")])
        promoted = replace(target, current=target.canary.version, canary=None)
        return await self.update(
            old, _draft_of(old, promoted), deadline_ns=deadline_ns, remember=remember
        )

    async def abort(self, old: Route, *, remember: RememberRoute = _nothing) -> RouteAnswer:
        """Takes the canary out of a route of versions. Without one it changes nothing.

        Raises:
            Refusal: INVALID_FIELD: it is no route of versions. CONFIG_OWNED, CATALOG_UNAVAILABLE.
        """
        self._check_owner(old)
        if not isinstance(old.target, Versions):
            raise _invalid([Violation("name", f"routes/{old.id} is no route of versions")])
        if old.target.canary is None:
            answer = RouteAnswer(route=old)
            # Remembered all the same: sent again, it must not end the trial that came after it.
            if (request := remember(answer)) is not None:
                await self._writes.write(Change(request=request))
            return answer
        # What it leads to is not looked at: a trial can be ended whatever has become of the models.
        checked = self.check(
            _draft_of(old, replace(old.target, canary=None)), owner=old.owner, old=old
        )
        return await self._put(old, checked, remember)

    async def _put(self, old: Route, answer: RouteAnswer, remember: RememberRoute) -> RouteAnswer:
        """Puts a changed route in another's place, durably."""
        route = answer.route

        async def finish() -> RouteAnswer:
            await self._writes.write(Change(put_routes=(route.record(),), request=remember(answer)))
            self._catalog.replace_route(old, route)
            self._tell(EventType.ROUTE_UPDATED, route)
            return answer

        return await to_the_end(f"update route {route.id}", finish)

    async def delete(self, route: Route, *, request: RequestRecord | None = None) -> None:
        """Takes a route out.

        Raises:
            Refusal: CONFIG_OWNED, INVALID_FIELD (other routes lead to it), CATALOG_UNAVAILABLE.
        """
        self._check_owner(route)
        if above := sorted(self._catalog.leading_to(Link("routes", route.id))):
            shown = _listed(f"routes/{each}" for each in above)
            raise _invalid([Violation("name", f"routes/{route.id} is what {shown} lead to")])

        async def finish() -> None:
            await self._writes.write(Change(delete_routes=(route.id,), request=request))
            self._catalog.remove_route(route)
            self._tell(EventType.ROUTE_DELETED, route)

        await to_the_end(f"delete route {route.id}", finish)

    def restore(self, routes: Sequence[Route]) -> None:
        """Makes routes known that are stored, or will be.

        Raises:
            Refusal: ALREADY_EXISTS: a key or prefix is taken; its text names the route.
        """
        self._catalog.add_routes(*routes)
        for route in routes:
            for path, link in missing(route.target, self._catalog):
                # Of the API, and what it leads to has left the configuration file.
                logger.error("route %s: %s: there is no %s", route.id, path, link)

    def check(
        self,
        draft: RouteDraft,
        *,
        owner: Owner,
        old: Route | None = None,
        etag: str | None = None,
        created: datetime | None = None,
        origin: str = "",
        among_others: bool = False,
    ) -> RouteAnswer:
        """Checks what a draft says, and makes a route of it.

        Args:
            draft: what to check.
            owner: of its record.
            old: what it changes.
            etag: None for a new one.
            created: None for that of the old one, or now.
            origin: for routes of the configuration file, a digest of what the file said.
            among_others: check as well how its target is beside other routes.

        Raises:
            Refusal: INVALID_FIELD, with every violation at once.
        """
        findings = in_itself(draft.target, check_transform=self._check_transform)
        if among_others and not findings:
            findings = self._findings_beside(draft.id, draft.target)
        violations = [
            *name_violations(draft.id, draft.keys, draft.prefixes),
            *_violations(findings),
        ]
        if violations:
            raise _invalid(violations)
        now = datetime.now(UTC)
        route = Route(
            id=draft.id,
            keys=tuple(dict.fromkeys(draft.keys)),
            prefixes=tuple(dict.fromkeys(draft.prefixes)),
            target=draft.target,
            owner=owner,
            created=created or (now if old is None else old.created),
            updated=now,
            etag=etag or f'"{secrets.token_hex(8)}"',
            origin=origin,
        )
        meaning = route.meaning.name
        warnings = [
            f"key {key} is given more than once for {meaning}: it counts once"
            for key in _repeated(draft.keys)
        ]
        warnings += [
            f'prefix "{prefix}" is given more than once for {meaning}: it counts once'
            for prefix in _repeated(draft.prefixes)
        ]
        return RouteAnswer(route=route, warnings=tuple(warnings))

    def _findings_beside(self, route_id: str, target: Target) -> list[Finding]:
        """What cannot be beside other routes: circles, members with a choice, steps, and so on.

        What is not there is among it only if there is something else: alone it has its own reason.
        """
        findings = beside(route_id, target, self._catalog)
        if isinstance(target, SequenceTarget):
            findings += steps_that_do_not_meet(target, self._signature_of)
        if findings:
            findings += [
                (path, f"there is no {link}") for path, link in missing(target, self._catalog)
            ]
        return findings

    def _check_there(self, route: Route) -> None:
        """Raises Refusal MODEL_NOT_FOUND or ROUTE_NOT_FOUND if it leads to what is not there."""
        absent = missing(route.target, self._catalog)
        if not absent:
            return
        _, first = absent[0]
        kind = "model" if first.kind == "models" else "route"
        text = f"there is no {kind} {first.id!r}"
        violations: tuple[Violation, ...] = ()
        if single_model(route.target) is None:
            violations = tuple(_violations((path, f"there is no {link}") for path, link in absent))
            text = "; ".join(f"{each.field}: {each.description}" for each in violations)
        raise Refusal(
            Reason.MODEL_NOT_FOUND if kind == "model" else Reason.ROUTE_NOT_FOUND,
            text,
            violations=violations,
            resource=Resource(kind, str(first)),
        )

    def _check_fits(self, route: Route) -> None:
        """Raises Refusal MODEL_NEVER_FITS if members of an ensemble can never be held together.

        Ensembles that lead to the route are looked at as well: it may be a member of theirs.
        """
        for each, members in ensembles_above(route.id, route.target, self._catalog).items():
            models = [self._catalog.get(m) for m in members if self._catalog.has_model(m)]
            if fit_together(self._residency, [model.handle.ways for model in models]):
                continue
            names = _listed(f"models/{model.id}" for model in models)
            text = f"{names}, the members of routes/{each}, do not fit into the budgets together"
            raise Refusal(
                Reason.MODEL_NEVER_FITS,
                text,
                metadata={"route": f"routes/{each}"},
                violations=(Violation("route.ensemble.members", text),),
            )

    def _signature_of(self, link: Link) -> Signature | None:
        model_id = only_model(link, self._catalog)
        if model_id is None or not self._catalog.has_model(model_id):
            return None
        draft = self._catalog.get(model_id).draft
        return known_signature(draft.runtime, draft.task, draft.options)

    async def _stage(self, old: Route, new: Route, deadline_ns: int, leases: ExitStack) -> None:
        """Loads what keys are to mean, if what they mean now is resident.

        Args:
            old: the route as it is.
            new: as it is to be.
            deadline_ns: of the residency's clock.
            leases: gets the leases that keep all of it until the keys are pointed.
        """
        present, wanted = self._meant_by(old.target), self._meant_by(new.target)
        follow = [model for model in wanted if model not in present]
        # Not while it is being loaded: its requests wait as it is, and the load may be what is
        # wrong with it.
        if not follow or not present or not all(map(self._is_resident, present)):
            return
        rehearsal = self._residency.rehearse()
        rehearsal.settle()
        for model in present:
            rehearsal.set_pinned(model.handle.core_id, True)
        for model in follow:
            if not rehearsal.want(model.handle.core_id):
                return
            rehearsal.set_pinned(model.handle.core_id, True)
        # Leased, what is there is nobody's victim: least of all its follower's.
        for model in present:
            if (lease := self._residency.try_lease(model.handle)) is not None:
                leases.callback(lease.release)
        for model in follow:
            try:
                lease = await self._residency.lease(model.handle, deadline_ns, asked=True)
            except Refusal as refusal:
                why = f": {model.handle.failure_text}" if model.handle.failure_text else ""
                refusal.text = f"models/{model.id}, for routes/{old.id}: {refusal.text}{why}"
                raise
            leases.callback(lease.release)

    def _meant_by(self, target: Target) -> tuple[Model, ...]:
        """The models that a key needs; none if that is up to its request, or if one is missing.

        Of versions it is the current one that counts, also beside a canary.
        """
        link: Link | None = None
        match target:
            case One(model=model):
                link = Link("models", model)
            case Versions() if version := target.find(target.current):
                link = version.target
        ids = link and models_needed(link, self._catalog)
        if not ids or not all(map(self._catalog.has_model, ids)):
            return ()
        return tuple(map(self._catalog.get, ids))

    def _is_resident(self, model: Model) -> bool:
        return self._residency.use(model.handle).state is State.RESIDENT

    def _check_owner(self, route: Route) -> None:
        if route.owner is Owner.CONFIG:
            raise Refusal(
                Reason.CONFIG_OWNED,
                f"route {route.id!r} belongs to the configuration file: change it there",
                resource=Resource("route", f"routes/{route.id}"),
            )

    def _tell(self, event: EventType, route: Route) -> None:
        self._journal.publish(
            event, f"routes/{route.id}", cause="operator", description=route.summary
        )


def _draft_of(route: Route, target: Target) -> RouteDraft:
    return RouteDraft(id=route.id, keys=route.keys, prefixes=route.prefixes, target=target)


def _invalid(found: Iterable[Violation]) -> Refusal:
    violations = tuple(found)
    text = "; ".join(f"{v.field}: {v.description}" for v in violations)
    return Refusal(Reason.INVALID_FIELD, text, violations=violations)


def _violations(findings: Iterable[Finding]) -> Iterator[Violation]:
    for path, text in findings:
        yield Violation(f"route.{path}" if path else "route.target", text)


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:_MOST_NAMED]) + (", ..." if every[_MOST_NAMED:] else "")
