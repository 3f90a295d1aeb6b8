"""The registered models and routes, by id and by key: the table that requests look at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from modelyard_server.catalog.model import Model
from modelyard_server.catalog.route import Route, RouteTarget
from modelyard_server.errors import Reason, Refusal, Resource
from modelyard_server.routing.key_table import KeyChange, KeyMapping, KeyTable

__all__ = ["Catalog"]


class Catalog:
    """Models and routes by id, and models by key.

    Only what is in memory; the store keeps what is to last. Every change is one step between two
    requests.

    Invariant: a key means one model; a model's id is one of its keys, and no key of a route. A
    route's keys mean its model as long as there is that model, and nothing without. On the event
    loop's thread only.
    """

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._routes: dict[str, Route] = {}
        # Which keys are of which route.
        self._table: KeyTable[RouteTarget] = KeyTable()
        # What requests look at: the keys of models and of routes.
        self._keys: dict[str, Model] = {}

    @property
    def keys(self) -> Mapping[str, Model]:
        """What each key means. A live view."""
        return MappingProxyType(self._keys)

    # --- Models -------------------------------------------------------------------------------

    def check_free(
        self, model_id: str, keys: Iterable[str], *, but_for: Model | None = None
    ) -> None:
        """Raises Refusal ALREADY_EXISTS if the id or a key is taken by another model, or a route.

        Args:
            model_id: the id.
            keys: the keys.
            but_for: a model whose id and keys count as free.
        """
        if self._models.get(model_id, but_for) is not but_for:
            raise _taken("model", model_id)
        for key in (model_id, *keys):
            if (target := self._table.get(key)) is not None:
                raise _taken("key", key, f", and means {target}")
            if self._keys.get(key, but_for) is not but_for:
                raise _taken("key", key)

    def add(self, model: Model) -> None:
        """Adds a model whose id and keys are free."""
        self.check_free(model.id, model.draft.keys)
        self._models[model.id] = model
        for key in (model.id, *model.draft.keys, *self._routed_to(model.id)):
            self._keys[key] = model

    def replace(self, old: Model, new: Model) -> None:
        """Puts a model of the same id in another's place, in one step."""
        self.check_free(new.id, new.draft.keys, but_for=old)
        self.remove(old)
        self.add(new)

    def remove(self, model: Model) -> None:
        """Takes a model and its keys out; keys of routes that mean it mean nothing then."""
        del self._models[model.id]
        for key in (model.id, *model.draft.keys, *self._routed_to(model.id)):
            self._keys.pop(key, None)

    def get(self, model_id: str) -> Model:
        """The model of an id. Raises Refusal MODEL_NOT_FOUND."""
        try:
            return self._models[model_id]
        except KeyError:
            raise Refusal(
                Reason.MODEL_NOT_FOUND,
                f"there is no model {model_id!r}",
                resource=Resource("model", f"models/{model_id}"),
            ) from None

    def has_model(self, model_id: str) -> bool:
        """True if there is a model of that id."""
        return model_id in self._models

    def models(self) -> list[Model]:
        """All models, in the order of their ids."""
        return [self._models[model_id] for model_id in sorted(self._models)]

    # --- Routes -------------------------------------------------------------------------------

    def check_route_free(
        self, route_id: str, keys: Iterable[str], *, but_for: Route | None = None
    ) -> None:
        """Raises Refusal ALREADY_EXISTS if the id is taken by another route, or a key by anything.

        Args:
            route_id: the id.
            keys: the keys.
            but_for: a route whose id and keys count as free.
        """
        if self._routes.get(route_id, but_for) is not but_for:
            raise _taken("route", route_id)
        for key in keys:
            if (target := self._table.get(key)) is not None:
                if but_for is None or target.route != but_for.id:
                    raise _taken("key", key, f", and means {target}")
            elif (model := self._keys.get(key)) is not None:
                raise _taken("key", key, f", and means models/{model.id}")

    def add_routes(self, *routes: Route) -> None:
        """Adds routes whose ids and keys are free, at the cost of one.

        Raises:
            Refusal: ALREADY_EXISTS; its text names the route that comes too late. None is added.
        """
        keys: dict[str, Route] = {}
        ids: set[str] = set()
        for route in routes:
            try:
                self.check_route_free(route.id, route.keys)
                if route.id in ids:
                    raise _taken("route", route.id)
                for key in route.keys:
                    if (other := keys.setdefault(key, route)) is not route:
                        raise _taken("key", key, f", and means {other.target}")
            except Refusal as refusal:
                refusal.text = f"routes.{route.id}: {refusal.text}"
                raise
            ids.add(route.id)
        updated = self._table.added(KeyMapping(route.keys, route.target) for route in routes)
        self._routes.update((route.id, route) for route in routes)
        self._show(updated.table, updated.changes)

    def replace_route(self, old: Route, new: Route) -> None:
        """Puts a route of the same id in another's place, in one step."""
        self.check_route_free(new.id, new.keys, but_for=old)
        table, changes = self.changed_by(old, new)
        self._routes[new.id] = new
        self._show(table, changes)

    def changed_by(
        self, old: Route, new: Route
    ) -> tuple[KeyTable[RouteTarget], tuple[KeyChange[RouteTarget], ...]]:
        """The table as it would be with a route in another's place, and what would be different."""
        pointed = self._table.updated([KeyMapping(old.keys, new.target)])
        gone = [key for key in old.keys if key not in set(new.keys)]
        extended = pointed.table.extended(old.keys[0], new.keys)
        without = extended.table.without(gone)
        kept = [change for change in pointed.changes if change.key not in set(gone)]
        left = [KeyChange(key, old.target, None) for key in gone]
        return without.table, (*kept, *extended.changes, *left)

    def remove_route(self, route: Route) -> None:
        """Takes a route and its keys out."""
        updated = self._table.without(route.keys)
        del self._routes[route.id]
        self._show(updated.table, updated.changes)

    def get_route(self, route_id: str) -> Route:
        """The route of an id. Raises Refusal ROUTE_NOT_FOUND."""
        try:
            return self._routes[route_id]
        except KeyError:
            raise Refusal(
                Reason.ROUTE_NOT_FOUND,
                f"there is no route {route_id!r}",
                resource=Resource("route", f"routes/{route_id}"),
            ) from None

    def route_of(self, key: str) -> Route | None:
        """The route that has a key; None if none has."""
        target = self._table.get(key)
        return None if target is None else self._routes[target.route]

    def routes(self) -> list[Route]:
        """All routes, in the order of their ids."""
        return [self._routes[route_id] for route_id in sorted(self._routes)]

    def routes_to(self, model_id: str) -> list[Route]:
        """The routes whose keys mean a model, in the order of their ids."""
        return [route for route in self.routes() if route.model == model_id]

    def _routed_to(self, model_id: str) -> list[str]:
        return [
            key for route in self._routes.values() if route.model == model_id for key in route.keys
        ]

    def _show(
        self, table: KeyTable[RouteTarget], changes: Sequence[KeyChange[RouteTarget]]
    ) -> None:
        self._table = table
        for change in changes:
            key = str(change.key)
            model = None if change.after is None else self._models.get(change.after.model)
            if model is None:
                self._keys.pop(key, None)
            else:
                self._keys[key] = model


def _taken(kind: str, name: str, what: str = "") -> Refusal:
    return Refusal(
        Reason.ALREADY_EXISTS,
        f"{kind} {name!r} exists already{what}",
        resource=Resource(kind, name if kind == "key" else f"{kind}s/{name}"),
    )
