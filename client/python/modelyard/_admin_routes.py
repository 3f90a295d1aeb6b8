"""An operator's calls about routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask

from modelyard._admin_calls import PAGE_SIZE, AdminCalls, checked_etag, checked_request_id
from modelyard._admin_models import UNSET, Unset
from modelyard._names import model_name, route_id, route_name
from modelyard._route_messages import (
    resolution_from,
    resolve_request,
    route_from,
    route_updated_from,
)
from modelyard._target_messages import canary_message, put_target
from modelyard.route_targets import Canary, ModelTarget, RouteTarget
from modelyard.routes import Resolution, Route, RouteUpdated
from modelyard.v1 import route_pb2, route_service_pb2
from modelyard.v1.route_service_pb2_grpc import RouteServiceStub

__all__ = ["RouteCalls"]


class RouteCalls(AdminCalls):
    """Gives keys a meaning, changes it, and tells what keys mean."""

    _routes: RouteServiceStub

    def create_route(
        self,
        route: str,
        keys: Sequence[str] = (),
        *,
        model: str | None = None,
        target: RouteTarget | None = None,
        prefixes: Sequence[str] = (),
        validate_only: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Route:
        """Register a route and return it as registered. Nothing is loaded.

        Args:
            route: the id it shall have.
            keys: what shall have the meaning, at least one unless there are prefixes; one that is
                given twice counts once.
            model: which model they shall mean; None where a target is given.
            target: what they shall mean, for instance a ``SplitTarget``; None where a model is
                given.
            prefixes: beginnings of keys: a key that nothing has as it is belongs to the route with
                the longest prefix of it. The empty prefix is one of every key.
            validate_only: check everything and change nothing.
            request_id: see the class.
            timeout_s: see the class.

        Raises:
            InvalidRequest, AlreadyExists, ModelNotFound, RouteNotFound: as named.
            ModelNeverFits: the members of an ensemble do not fit together.
            CatalogUnavailable: it could not be kept; try again.
            ModelyardError: any other failure.
            TypeError, ValueError: an argument that cannot be sent, or not one of model and target.
        """
        message = route_pb2.Route(
            keys=_checked(keys, "keys"), prefixes=_checked(prefixes, "prefixes")
        )
        wanted = _target_of(model, target)
        if wanted is None:
            raise ValueError("give a model or a target")
        put_target(message, wanted)
        request = route_service_pb2.CreateRouteRequest(
            route_id=route_id(route),
            route=message,
            validate_only=validate_only,
            request_id=checked_request_id(request_id, validate_only=validate_only),
        )
        response = self._change(self._routes.CreateRoute, request, timeout_s)
        return self._read(route_from, response.route)

    def get_route(self, route: str, *, timeout_s: float | None = None) -> Route:
        """Return one route. Raises ``RouteNotFound`` and as the class says."""
        request = route_service_pb2.GetRouteRequest(name=route_name(route))
        response = self._connection.call(self._routes.GetRoute, request, timeout_s)
        return self._read(route_from, response.route)

    def list_routes(self, *, timeout_s: float | None = None) -> tuple[Route, ...]:
        """Return every route, in the order of their names. ``timeout_s`` is for all of it."""

        def page(token: str, left_s: float) -> tuple[Sequence[route_pb2.Route], str]:
            request = route_service_pb2.ListRoutesRequest(page_size=PAGE_SIZE, page_token=token)
            response = self._connection.call(self._routes.ListRoutes, request, left_s)
            return response.routes, response.next_page_token

        return self._list(page, route_from, timeout_s)

    def update_route(
        self,
        route: str,
        *,
        model: str | None = None,
        target: RouteTarget | None = None,
        current: str | None = None,
        canary: Canary | Unset | None = UNSET,
        keys: Sequence[str] | None = None,
        add_keys: Sequence[str] = (),
        remove_keys: Sequence[str] = (),
        prefixes: Sequence[str] | None = None,
        etag: str | None = None,
        validate_only: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> RouteUpdated:
        """Change a route and return what has become of it and its keys.

        Where its model is resident, another one, or another version, is loaded before the keys mean
        it, so that no request waits; if that fails, everything is as before.

        Args:
            route: which one.
            model: the model that its keys shall mean; None leaves what they mean.
            target: what its keys shall mean, whole; None leaves it.
            current: of a route of versions which one its keys shall mean; None leaves it.
            canary: of a route of versions the version on trial; None for none.
            keys: all the keys it shall have; None leaves them.
            add_keys: keys to add; not together with ``keys``.
            remove_keys: keys to take away; not together with ``keys``.
            prefixes: all the prefixes it shall have; None leaves them.
            etag: change it only if this is its etag.
            validate_only: check everything and change nothing.
            request_id: see the class.
            timeout_s: see the class.

        Raises:
            RouteNotFound, ModelNotFound, AlreadyExists, EtagMismatch, ConfigOwned: as named.
            LoadFailed, DeadlineExceeded, InvalidRequest, ModelNeverFits: as named.
            CatalogUnavailable: it could not be kept; try again.
            ModelyardError: any other failure.
            TypeError, ValueError: an argument that cannot be sent, or nothing to change.
        """
        message = route_pb2.Route(name=route_name(route), etag=checked_etag(etag))
        paths: list[str] = []
        if keys is not None:
            if add_keys or remove_keys:
                raise ValueError("give all the keys, or those to add and remove, not both")
            paths.append("keys")
            message.keys.extend(_checked(keys, "keys"))
        if prefixes is not None:
            paths.append("prefixes")
            message.prefixes.extend(_checked(prefixes, "prefixes"))
        wanted = _target_of(model, target)
        parts = current is not None or not isinstance(canary, Unset)
        if wanted is not None:
            if parts:
                raise ValueError("give the whole target, or its current version and canary alone")
            paths.append(wanted.kind)
            put_target(message, wanted)
        if current is not None:
            paths.append("versions.current")
            message.versions.current = current
        if not isinstance(canary, Unset):
            paths.append("versions.canary")
            if canary is not None:
                message.versions.canary.CopyFrom(canary_message(canary))
        if not (paths or add_keys or remove_keys):
            raise ValueError("nothing to change: give a model, a target or keys")
        request = route_service_pb2.UpdateRouteRequest(
            route=message,
            update_mask=FieldMask(paths=paths),
            add_keys=_checked(add_keys, "add_keys"),
            remove_keys=_checked(remove_keys, "remove_keys"),
            validate_only=validate_only,
            request_id=checked_request_id(request_id, validate_only=validate_only),
        )
        response = self._change(self._routes.UpdateRoute, request, timeout_s)
        return self._read(route_updated_from, response)

    def promote_canary(
        self,
        route: str,
        *,
        etag: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Route:
        """Make the canary of a route of versions the current version, and return the route.

        It is loaded first, as by ``update_route``.

        Args:
            route: which one.
            etag: do it only if this is its etag.
            request_id: see the class.
            timeout_s: see the class.

        Raises:
            InvalidRequest: it has no canary.
            RouteNotFound, EtagMismatch, ConfigOwned, LoadFailed, DeadlineExceeded: as named.
            CatalogUnavailable: it could not be kept; try again.
            ModelyardError: any other failure.
        """
        request = route_service_pb2.PromoteCanaryRequest(
            name=route_name(route),
            etag=checked_etag(etag),
            request_id=checked_request_id(request_id),
        )
        response = self._change(self._routes.PromoteCanary, request, timeout_s)
        return self._read(route_from, response.route)

    def abort_canary(
        self,
        route: str,
        *,
        etag: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Route:
        """End the trial of a route of versions, and return the route. Without one, nothing changes.

        Args:
            route: which one.
            etag: do it only if this is its etag.
            request_id: see the class.
            timeout_s: see the class.

        Raises:
            InvalidRequest: it is no route of versions.
            RouteNotFound, EtagMismatch, ConfigOwned: as named.
            CatalogUnavailable: it could not be kept; try again.
            ModelyardError: any other failure.
        """
        request = route_service_pb2.AbortCanaryRequest(
            name=route_name(route),
            etag=checked_etag(etag),
            request_id=checked_request_id(request_id),
        )
        response = self._change(self._routes.AbortCanary, request, timeout_s)
        return self._read(route_from, response.route)

    def delete_route(
        self,
        route: str,
        *,
        etag: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Remove a route; its keys mean nothing then.

        Args:
            route: which one.
            etag: remove it only if this is its etag.
            request_id: see the class.
            timeout_s: see the class.

        Raises:
            RouteNotFound, EtagMismatch, ConfigOwned: as named.
            InvalidRequest: another route leads to it.
            CatalogUnavailable: it could not be removed; try again.
            ModelyardError: any other failure.
        """
        request = route_service_pb2.DeleteRouteRequest(
            name=route_name(route),
            etag=checked_etag(etag),
            request_id=checked_request_id(request_id),
        )
        self._change(self._routes.DeleteRoute, request, timeout_s)

    def resolve(
        self,
        key: str,
        *,
        affinity: str | None = None,
        version: str | None = None,
        timeout_s: float | None = None,
    ) -> Resolution:
        """Return what a request for a key would do now; nothing is run or loaded.

        Args:
            key: what would be asked for.
            affinity: what a request would be given; without, a split answers with all branches.
            version: what a request would be given.
            timeout_s: see the class.

        Raises:
            KeyNotFound, InvalidRequest: as named.
            ModelyardError: any other failure.
            TypeError: no str.
        """
        request = resolve_request(key, affinity, version)
        response = self._connection.call(self._routes.ResolveRoute, request, timeout_s)
        return resolution_from(key, response)


def _target_of(model: str | None, target: RouteTarget | None) -> RouteTarget | None:
    if model is not None and target is not None:
        raise ValueError("give a model or a target, not both")
    return target if model is None else ModelTarget(model=model_name(model))


def _checked(keys: Any, name: str) -> Sequence[str]:
    # A str is a sequence of str too, and would become one key per letter.
    if isinstance(keys, str):
        raise TypeError(f"{name} must be a list of str, got a str: write [{keys!r}]")
    checked: Sequence[str] = keys
    return checked
