"""modelyard.v1.RouteService."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from modelyard.v1 import route_pb2
from modelyard.v1 import route_service_pb2 as pb
from modelyard_server.catalog.catalog import Catalog
from modelyard_server.catalog.model import is_model_id
from modelyard_server.catalog.records import Owner
from modelyard_server.catalog.route import Route, RouteDraft, RouteTarget
from modelyard_server.catalog.route_registry import RouteAnswer, RouteRegistry
from modelyard_server.catalog.writes import Writes
from modelyard_server.errors import Reason, Refusal, Resource, Violation
from modelyard_server.residency.shell import Residency
from modelyard_server.residency.values import State
from modelyard_server.routing.key_table import KeyChange
from modelyard_server.routing.resolve import resolve
from modelyard_server.services.handler import invalid
from modelyard_server.services.models import deadline_ns_of
from modelyard_server.services.once import Answered, once
from modelyard_server.services.paging import page
from modelyard_server.transport.api import Call

__all__ = ["RouteService", "route_id_of"]

_OWNERS = {
    Owner.CONFIG: route_pb2.ROUTE_OWNER_CONFIG,
    Owner.API: route_pb2.ROUTE_OWNER_API,
}
_UPDATABLE = ("keys", "model")


def route_id_of(name: str, field: str) -> str:
    """The id in a resource name "routes/{route}". Raises Refusal INVALID_FIELD."""
    route_id = name.removeprefix("routes/")
    if route_id == name or not is_model_id(route_id):
        raise invalid(Violation(field, 'must be "routes/{route}"'))
    return route_id


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
        self._residency = residency
        self._writes = writes
        self._device_names = tuple(device_names)
        self._max_deadline_s = max_deadline_s

    async def create_route(
        self, request: pb.CreateRouteRequest, call: Call
    ) -> pb.CreateRouteResponse:
        """See RouteService.CreateRoute."""
        draft = RouteDraft(
            id=request.route_id, keys=tuple(request.route.keys), model=_model_of(request.route)
        )

        def answer(created: RouteAnswer) -> pb.CreateRouteResponse:
            return pb.CreateRouteResponse(route=self._message(created.route, created.warnings))

        async def check() -> pb.CreateRouteResponse:
            return answer(await self._registry.create(draft, validate_only=True))

        async def change(answered: Answered) -> pb.CreateRouteResponse:
            return answer(
                await self._registry.create(draft, remember=lambda found: answered(answer(found)))
            )

        if request.validate_only:
            return await check()
        return await once(self._writes, request, pb.CreateRouteResponse, change, check=check)

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
                changes=map(_change_message, updated.changes),
            )

        async def update(
            *, validate_only: bool, answered: Answered | None = None
        ) -> pb.UpdateRouteResponse:
            old = self._catalog.get_route(route_id)
            _check_etag(old, request.route.etag, request.route.name)
            draft = RouteDraft(
                id=route_id,
                keys=_keys_of(old, request, fields),
                model=_model_of(request.route) if "model" in fields else old.model,
            )
            return answer(
                await self._registry.update(
                    old,
                    draft,
                    deadline_ns=deadline_ns,
                    validate_only=validate_only,
                    remember=lambda found: None if answered is None else answered(answer(found)),
                )
            )

        async def check() -> pb.UpdateRouteResponse:
            return await update(validate_only=True)

        async def change(answered: Answered) -> pb.UpdateRouteResponse:
            return await update(validate_only=False, answered=answered)

        if request.validate_only:
            return await check()
        return await once(self._writes, request, pb.UpdateRouteResponse, change, check=check)

    async def delete_route(
        self, request: pb.DeleteRouteRequest, call: Call
    ) -> pb.DeleteRouteResponse:
        """See RouteService.DeleteRoute."""
        route_id = route_id_of(request.name, "name")

        async def change(answered: Answered) -> pb.DeleteRouteResponse:
            route = self._catalog.get_route(route_id)
            _check_etag(route, request.etag, request.name)
            response = pb.DeleteRouteResponse()
            await self._registry.delete(route, request=answered(response))
            return response

        return await once(self._writes, request, pb.DeleteRouteResponse, change)

    async def resolve_route(
        self, request: pb.ResolveRouteRequest, call: Call
    ) -> pb.ResolveRouteResponse:
        """See RouteService.ResolveRoute."""
        route = self._catalog.route_of(request.key)
        try:
            model = resolve(self._catalog.keys, request.key)
        except Refusal as refusal:
            if route is not None:
                refusal.text += f": routes/{route.id} gives it {route.model!r}, which there is not"
            raise
        resident = self._residency.use(model.handle).state is State.RESIDENT
        device = self._device_names[self._residency.device_of(model.handle)] if resident else ""
        if route is not None:
            why = f"routes/{route.id} gives this key the model {model.id!r}"
        elif request.key == model.id:
            why = f"it is the id of the model {model.id!r}"
        else:
            why = f"it is one of the keys of the model {model.id!r}"
        now = f"resident on {device}" if resident else "not resident: a request would load it"
        return pb.ResolveRouteResponse(
            route="" if route is None else f"routes/{route.id}",
            steps=[
                route_pb2.ResolvedStep(model=f"models/{model.id}", resident=resident, device=device)
            ],
            explanation=f"{why}, which is {now}",
        )

    def _message(self, route: Route, warnings: Iterable[str] = ()) -> route_pb2.Route:
        message = route_pb2.Route(
            name=f"routes/{route.id}",
            keys=route.keys,
            etag=route.etag,
            owner=_OWNERS[route.owner],
            warnings=warnings,
            model=route_pb2.ModelTarget(model=f"models/{route.model}"),
        )
        if not self._catalog.has_model(route.model):
            message.warnings.append(f"there is no model {route.model!r}: its keys mean nothing")
        message.create_time.FromDatetime(route.created)
        message.update_time.FromDatetime(route.updated)
        return message


def _model_of(route: route_pb2.Route) -> str:
    """Id of the model in a route's target; empty if there is none, which is refused later."""
    name = route.model.model
    model_id = name.removeprefix("models/")
    return "" if model_id == name else model_id


def _fields_of(request: pb.UpdateRouteRequest) -> frozenset[str]:
    paths = tuple(request.update_mask.paths)
    fields = frozenset(_UPDATABLE if paths == ("*",) else paths)
    violations = [
        Violation("update_mask", f"{path[:64]!r} cannot be changed; {', '.join(_UPDATABLE)} can")
        for path in sorted(fields - set(_UPDATABLE))
    ]
    some = bool(request.add_keys or request.remove_keys)
    if not fields and not some:
        violations.append(Violation("update_mask", "must name at least one field"))
    if "keys" in fields and some:
        violations.append(
            Violation("update_mask", '"keys" replaces them all: then none are added or removed')
        )
    if both := sorted(set(request.add_keys) & set(request.remove_keys)):
        violations.append(Violation("remove_keys", f"{both[0][:64]!r} is to be added and removed"))
    if violations:
        raise invalid(*violations)
    return fields


def _keys_of(old: Route, request: pb.UpdateRouteRequest, fields: frozenset[str]) -> tuple[str, ...]:
    """All keys that a route is to have. Raises Refusal INVALID_FIELD."""
    if "keys" in fields:
        return tuple(request.route.keys)
    gone, there = set(request.remove_keys), set(old.keys)
    if missing := [key for key in request.remove_keys if key not in there]:
        raise invalid(Violation("remove_keys", f"{missing[0][:64]!r} is no key of routes/{old.id}"))
    kept = [key for key in old.keys if key not in gone]
    # One that is given twice, or is there already, counts once.
    return tuple(dict.fromkeys((*kept, *request.add_keys)))


def _check_etag(route: Route, etag: str, name: str) -> None:
    if etag and etag != route.etag:
        raise Refusal(
            Reason.ETAG_MISMATCH,
            f"{name} has changed since its etag was read",
            resource=Resource("route", name),
        )


def _change_message(change: KeyChange[RouteTarget]) -> route_pb2.KeyChange:
    return route_pb2.KeyChange(
        key=str(change.key),
        previous_model="" if change.before is None else f"models/{change.before.model}",
        model="" if change.after is None else f"models/{change.after.model}",
    )
