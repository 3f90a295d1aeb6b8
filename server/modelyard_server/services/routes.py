"""modelyard.v1.RouteService."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from modelyard.v1 import route_pb2
from modelyard.v1 import route_service_pb2 as pb
from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import Model, is_key
from modelyard_server.catalog.route import Route, RouteDraft, name_violations
from modelyard_server.catalog.route_registry import RouteAnswer, RouteRegistry
from modelyard_server.catalog.writes import Writes
from modelyard_server.errors import Refusal, Violation
from modelyard_server.residency.shell import Residency
from modelyard_server.routing.checks import beside, missing
from modelyard_server.routing.resolve import resolve
from modelyard_server.routing.target_json import TargetError
from modelyard_server.routing.targets import KINDS, Canary, Target, Versions, single_model
from modelyard_server.services.handler import invalid
from modelyard_server.services.models import deadline_ns_of
from modelyard_server.services.once import Answered, checked_once, once
from modelyard_server.services.paging import page
from modelyard_server.services.resources import check_etag, id_in, unknown_fields
from modelyard_server.services.route_messages import change_message, route_message, target_of
from modelyard_server.services.route_steps import RouteSteps
from modelyard_server.transport.api import Call

__all__ = ["RouteService", "route_id_of"]

_PARTS = frozenset({"versions.current", "versions.canary"})
_UPDATABLE = ("keys", "prefixes", *KINDS, *sorted(_PARTS, reverse=True))


def route_id_of(name: str, field: str) -> str:
    """The id in a resource name "routes/{route}". Raises Refusal INVALID_FIELD."""
    return id_in(name, "route", field)


class RouteService:
    """Registers routes and tells what keys mean.

    Args:
        catalog: the models and routes.
        registry: changes routes.
        residency: tells which models are resident.
        writes: makes changes durable, one at a time.
        device_names: resource names of the devices, by position.
        max_deadline_s: for calls that load something.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        registry: RouteRegistry,
        residency: Residency,
        writes: Writes,
        device_names: Sequence[str],
        max_deadline_s: float,
    ) -> None:
        self._catalog = catalog
        self._registry = registry
        self._writes = writes
        self._steps = RouteSteps(routes=catalog, residency=residency, device_names=device_names)
        self._max_deadline_s = max_deadline_s

    async def create_route(
        self, request: pb.CreateRouteRequest, call: Call
    ) -> pb.CreateRouteResponse:
        """See RouteService.CreateRoute."""
        draft = _draft_of(request.route_id, request.route)

        def answer(created: RouteAnswer) -> pb.CreateRouteResponse:
            return pb.CreateRouteResponse(route=self._message(created.route, created.warnings))

        async def create(*, validate_only: bool, answered: Answered) -> pb.CreateRouteResponse:
            return answer(
                await self._registry.create(
                    draft,
                    validate_only=validate_only,
                    remember=lambda found: answered(answer(found)),
                )
            )

        return await checked_once(self._writes, request, pb.CreateRouteResponse, create)

    async def get_route(self, request: pb.GetRouteRequest, call: Call) -> pb.GetRouteResponse:
        """See RouteService.GetRoute."""
        route = self._catalog.get_route(route_id_of(request.name, "name"))
        return pb.GetRouteResponse(route=self._message(route))

    async def list_routes(self, request: pb.ListRoutesRequest, call: Call) -> pb.ListRoutesResponse:
        """See RouteService.ListRoutes."""
        chosen, token = page(
            self._catalog.routes(),
            size=request.page_size,
            token=request.page_token,
            name=lambda route: route.id,
        )
        return pb.ListRoutesResponse(
            routes=[self._message(route) for route in chosen], next_page_token=token
        )

    async def update_route(
        self, request: pb.UpdateRouteRequest, call: Call
    ) -> pb.UpdateRouteResponse:
        """See RouteService.UpdateRoute."""
        route_id = route_id_of(request.route.name, "route.name")
        fields = _fields_of(request)
        deadline_ns = deadline_ns_of(call, self._max_deadline_s)

        def answer(updated: RouteAnswer) -> pb.UpdateRouteResponse:
            return pb.UpdateRouteResponse(
                route=self._message(updated.route, updated.warnings),
                changes=map(change_message, updated.changes),
            )

        async def update(*, validate_only: bool, answered: Answered) -> pb.UpdateRouteResponse:
            old = self._catalog.get_route(route_id)
            check_etag("route", request.route.name, given=request.route.etag, current=old.etag)
            return answer(
                await self._registry.update(
                    old,
                    _changed_draft(old, request, fields),
                    deadline_ns=deadline_ns,
                    validate_only=validate_only,
                    remember=lambda found: answered(answer(found)),
                )
            )

        return await checked_once(self._writes, request, pb.UpdateRouteResponse, update)

    async def promote_canary(
        self, request: pb.PromoteCanaryRequest, call: Call
    ) -> pb.PromoteCanaryResponse:
        """See RouteService.PromoteCanary."""
        route_id = route_id_of(request.name, "name")
        deadline_ns = deadline_ns_of(call, self._max_deadline_s)

        def answer(promoted: RouteAnswer) -> pb.PromoteCanaryResponse:
            return pb.PromoteCanaryResponse(route=self._message(promoted.route, promoted.warnings))

        async def change(answered: Answered) -> pb.PromoteCanaryResponse:
            old = self._catalog.get_route(route_id)
            check_etag("route", request.name, given=request.etag, current=old.etag)
            return answer(
                await self._registry.promote(
                    old, deadline_ns=deadline_ns, remember=lambda found: answered(answer(found))
                )
            )

        return await once(self._writes, request, pb.PromoteCanaryResponse, change)

    async def abort_canary(
        self, request: pb.AbortCanaryRequest, call: Call
    ) -> pb.AbortCanaryResponse:
        """See RouteService.AbortCanary."""
        route_id = route_id_of(request.name, "name")

        def answer(ended: RouteAnswer) -> pb.AbortCanaryResponse:
            return pb.AbortCanaryResponse(route=self._message(ended.route, ended.warnings))

        async def change(answered: Answered) -> pb.AbortCanaryResponse:
            old = self._catalog.get_route(route_id)
            check_etag("route", request.name, given=request.etag, current=old.etag)
            return answer(
                await self._registry.abort(old, remember=lambda found: answered(answer(found)))
            )

        return await once(self._writes, request, pb.AbortCanaryResponse, change)

    async def delete_route(
        self, request: pb.DeleteRouteRequest, call: Call
    ) -> pb.DeleteRouteResponse:
        """See RouteService.DeleteRoute."""
        route_id = route_id_of(request.name, "name")

        async def change(answered: Answered) -> pb.DeleteRouteResponse:
            route = self._catalog.get_route(route_id)
            check_etag("route", request.name, given=request.etag, current=route.etag)
            response = pb.DeleteRouteResponse()
            await self._registry.delete(route, request=answered(response))
            return response

        return await once(self._writes, request, pb.DeleteRouteResponse, change)

    async def resolve_route(
        self, request: pb.ResolveRouteRequest, call: Call
    ) -> pb.ResolveRouteResponse:
        """See RouteService.ResolveRoute."""
        key, catalog = request.key, self._catalog
        exact = catalog.route_of(key)
        # Text that can be no key has no route by its beginning, either.
        route = exact or (catalog.routed(key) if is_key(key) else None)
        model_id = single_model(route.target) if route is not None else None
        if route is not None and model_id is None:
            explained = self._steps.explain(route, request.affinity, request.version)
            return pb.ResolveRouteResponse(
                route=f"routes/{route.id}",
                steps=explained.steps,
                explanation=f"routes/{route.id}, which has {_why(route, key)}, {explained.text}",
            )
        try:
            if model_id is not None and catalog.has_model(model_id):
                model = catalog.get(model_id)
            else:
                model = _model_of(resolve(catalog.keys, catalog, key))
        except Refusal as refusal:
            if route is not None:
                refusal.text += f": routes/{route.id} gives it {model_id!r}, which there is not"
            raise
        if request.version:
            text = f"the key {key!r} means a model, not versions"
            raise invalid(Violation("version", text))
        step = self._steps.of_model(model)
        if exact is not None:
            why = f"routes/{exact.id} gives this key the model {model.id!r}"
        elif route is not None:
            why = (
                f"routes/{route.id}, which has {_why(route, key)}, gives it the model {model.id!r}"
            )
        elif key == model.id:
            why = f"it is the id of the model {model.id!r}"
        else:
            why = f"it is one of the keys of the model {model.id!r}"
        now = "not resident: a request would load it"
        if step.resident:
            now = f"resident on {step.device}"
        return pb.ResolveRouteResponse(
            route="" if route is None else f"routes/{route.id}",
            steps=[step],
            explanation=f"{why}, which is {now}",
        )

    def _message(self, route: Route, warnings: Iterable[str] = ()) -> route_pb2.Route:
        told = list(warnings)
        for path, link in missing(route.target, self._catalog):
            if single_model(route.target) is None:
                told.append(f"{path}: there is no {link}")
            else:
                told.append(f"there is no model {link.id!r}: its keys mean nothing")
        # The file may have changed what it leads to, and cannot be refused by what a call has made.
        for path, text in beside(route.id, route.target, self._catalog):
            told.append(f"{path}: {text}")
        return route_message(route, told)


def _model_of(meant: Model | Route) -> Model:
    """The model of a key of which it is known that it means none by a route of another kind."""
    assert isinstance(meant, Model)
    return meant


def _why(route: Route, key: str) -> str:
    """What of a route makes a key its own."""
    if key in route.keys:
        return "this key"
    prefix = max((each for each in route.prefixes if key.startswith(each)), key=len)
    return f'the prefix "{prefix}" of it'


def _draft_of(route_id: str, message: route_pb2.Route) -> RouteDraft:
    """A draft of what a message says. Raises Refusal INVALID_FIELD with every violation at once."""
    keys, prefixes = tuple(message.keys), tuple(message.prefixes)
    try:
        target = target_of(message)
    except TargetError as error:
        raise invalid(*name_violations(route_id, keys, prefixes), *_violations(error)) from None
    return RouteDraft(id=route_id, keys=keys, prefixes=prefixes, target=target)


def _violations(error: TargetError) -> Iterator[Violation]:
    return (Violation(f"route.{path}", text) for path, text in error.findings)


def _fields_of(request: pb.UpdateRouteRequest) -> frozenset[str]:
    paths = tuple(request.update_mask.paths)
    if paths == ("*",):
        # The target by the kind that is set; none is told as a missing target.
        paths = ("keys", "prefixes", request.route.WhichOneof("target") or "model")
    fields = frozenset(paths)
    violations = unknown_fields(sorted(fields), _UPDATABLE)
    some = bool(request.add_keys or request.remove_keys)
    if not fields and not some:
        violations.append(Violation("update_mask", "must name at least one field"))
    if "keys" in fields and some:
        violations.append(
            Violation("update_mask", '"keys" replaces them all: then none are added or removed')
        )
    if both := sorted(set(request.add_keys) & set(request.remove_keys)):
        violations.append(Violation("remove_keys", f"{both[0][:64]!r} is to be added and removed"))
    if len(fields & KINDS.keys()) > 1 or (fields & KINDS.keys() and fields & _PARTS):
        violations.append(
            Violation("update_mask", "must name one kind of target, or parts of versions alone")
        )
    if violations:
        raise invalid(*violations)
    return fields


def _changed_draft(
    old: Route, request: pb.UpdateRouteRequest, fields: frozenset[str]
) -> RouteDraft:
    """A draft with what an update names. Raises Refusal INVALID_FIELD."""
    keys = _keys_of(old, request, fields)
    prefixes = tuple(request.route.prefixes) if "prefixes" in fields else old.prefixes
    try:
        target = _changed_target(old, request.route, fields)
    except TargetError as error:
        raise invalid(*name_violations(old.id, keys, prefixes), *_violations(error)) from None
    return RouteDraft(id=old.id, keys=keys, prefixes=prefixes, target=target)


def _changed_target(old: Route, message: route_pb2.Route, fields: frozenset[str]) -> Target:
    """A route's target with what an update names. Raises TargetError."""
    for kind in fields & KINDS.keys():
        given = message.WhichOneof("target")
        if given not in (kind, None):
            raise TargetError([(kind, f"is what update_mask names; what is set is {given}")])
        return target_of(message, kind)
    target = old.target
    if not fields & _PARTS:
        return target
    if not isinstance(target, Versions):
        raise TargetError([("versions", f"routes/{old.id} is no route of versions")])
    versions = message.versions
    if "versions.current" in fields:
        target = replace(target, current=versions.current)
    if "versions.canary" in fields:
        canary = None
        if versions.HasField("canary"):
            canary = Canary(versions.canary.version, versions.canary.percent)
        target = replace(target, canary=canary)
    return target


def _keys_of(old: Route, request: pb.UpdateRouteRequest, fields: frozenset[str]) -> tuple[str, ...]:
    """All keys that a route is to have. Raises Refusal INVALID_FIELD."""
    if "keys" in fields:
        return tuple(request.route.keys)
    gone, there = set(request.remove_keys), set(old.keys)
    if absent := [key for key in request.remove_keys if key not in there]:
        raise invalid(Violation("remove_keys", f"{absent[0][:64]!r} is no key of routes/{old.id}"))
    kept = [key for key in old.keys if key not in gone]
    # One that is given twice, or is there already, counts once.
    return tuple(dict.fromkeys((*kept, *request.add_keys)))
