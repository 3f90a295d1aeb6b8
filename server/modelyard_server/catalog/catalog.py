"""The registered models and routes, by id, key and prefix: the tables that requests look at."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from modelyard_server.catalog.model import Model
from modelyard_server.catalog.route import Route, RouteTarget
from modelyard_server.errors import Reason, Refusal, Resource
from modelyard_server.routing.key_table import KeyChange, KeyMapping, KeyTable
from modelyard_server.routing.prefix_table import PrefixTable
from modelyard_server.routing.targets import Link, One, Target, links_of

__all__ = ["Catalog"]


class Catalog:
    """Models and routes by id, and what keys mean.

    Only what is in memory; the store keeps what is to last. Every change is one step between two
    requests. For requests it is a RouteView.

    Invariants: a key means one thing; a model's id is one of its keys, and no key of a route. In
    `keys` are the keys that one model is all the meaning of: its own, and those of routes of the
    kind "model" as long as there is that model. A key that nothing has as it is belongs to the
    route with the longest prefix of it. On the event loop's thread only.

    Attributes:
        on_models: is called when there are other models than before, or soon will be; None for
            nobody.
    """

    def __init__(self) -> None:
        self.on_models: Callable[[], None] | None = None
        self._models: dict[str, Model] = {}
        self._routes: dict[str, Route] = {}
        # Which keys and prefixes are of which route.
        self._table: KeyTable[RouteTarget] = KeyTable()
        self._prefixes: PrefixTable[RouteTarget] = PrefixTable()
        # Which routes name a model or route in their targets.
        self._leading: dict[Link, dict[str, None]] = {}
        # What requests look at first: the keys that mean one model.
        self._keys: dict[str, Model] = {}

    @property
    def keys(self) -> Mapping[str, Model]:
        """The model that each key means, of the keys that mean one. A live view."""
        return MappingProxyType(self._keys)

    def names(self) -> set[str]:
        """Every key that means something, or would if its model were there."""
        return {*self._keys, *(key for route in self._routes.values() for key in route.keys)}

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
        self.note_models()

    def note_models(self) -> None:
        """Tells whoever wants to know that there are other models, or soon will be."""
        if self.on_models is not None:
            self.on_models()

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
        self.note_models()

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
        self,
        route_id: str,
        keys: Iterable[str],
        prefixes: Iterable[str] = (),
        *,
        but_for: Route | None = None,
    ) -> None:
        """Raises Refusal ALREADY_EXISTS if an id, a key or a prefix of a route is taken.

        Args:
            route_id: the id, which no other route may have.
            keys: the keys, which nothing else may have.
            prefixes: the prefixes, which no other route may have.
            but_for: a route whose id, keys and prefixes count as free.
        """
        if self._routes.get(route_id, but_for) is not but_for:
            raise _taken("route", route_id)
        for key in keys:
            if (target := self._table.get(key)) is not None:
                if but_for is None or target.route != but_for.id:
                    raise _taken("key", key, f", and means {target}")
            elif (model := self._keys.get(key)) is not None:
                raise _taken("key", key, f", and means models/{model.id}")
        for prefix in prefixes:
            target = self._prefixes.get(prefix)
            if target is not None and (but_for is None or target.route != but_for.id):
                raise _taken("prefix", prefix, f", and means {target}")

    def add_routes(self, *routes: Route) -> None:
        """Adds routes whose ids, keys and prefixes are free, at the cost of one.

        Raises:
            Refusal: ALREADY_EXISTS; its text names the route that comes too late. None is added.
        """
        first: dict[tuple[str, str], Route] = {}
        for route in routes:
            try:
                self.check_route_free(route.id, route.keys, route.prefixes)
                for what in _names_of(route):
                    if (other := first.setdefault(what, route)) is not route:
                        text = "" if what[0] == "route" else f", and means {other.meaning}"
                        raise _taken(*what, text)
            except Refusal as refusal:
                refusal.text = f"routes.{route.id}: {refusal.text}"
                raise
        updated = self._table.added(
            KeyMapping(route.keys, route.meaning) for route in routes if route.keys
        )
        self._prefixes = self._prefixes.changed(
            added={prefix: route.meaning for route in routes for prefix in route.prefixes}
        )
        for route in routes:
            self._routes[route.id] = route
            self._note_links(route)
        self._show(updated.table, updated.changes)

    def replace_route(self, old: Route, new: Route) -> None:
        """Puts a route of the same id in another's place, in one step."""
        self.check_route_free(new.id, new.keys, new.prefixes, but_for=old)
        table, changes = self._with(old, new)
        self._prefixes = self._prefixes_with(old, new)
        self._forget_links(old)
        self._note_links(new)
        self._routes[new.id] = new
        self._show(table, changes)

    def changed_by(self, old: Route, new: Route) -> tuple[KeyChange[RouteTarget], ...]:
        """The keys of either that would mean something else with a route in another's place.

        A key that a route loses, or gets, may have a meaning without it, by a prefix.
        """
        _, changes = self._with(old, new)
        prefixes = self._prefixes_with(old, new)
        told = []
        for change in changes:
            key = str(change.key)
            before, after = change.before, change.after
            before = self._prefixes.find(key) if before is None else before
            after = prefixes.find(key) if after is None else after
            if (before and before.name) != (after and after.name):
                told.append(KeyChange(key, before, after))
        return tuple(told)

    def remove_route(self, route: Route) -> None:
        """Takes a route, its keys and its prefixes out."""
        updated = self._table.without(route.keys)
        self._prefixes = self._prefixes.changed(gone=route.prefixes)
        self._forget_links(route)
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

    def target_of(self, route_id: str) -> Target | None:
        """What a route leads to; None if there is no such route."""
        route = self._routes.get(route_id)
        return None if route is None else route.target

    def route_of(self, key: str) -> Route | None:
        """The route that has exactly this key; None if none has."""
        target = self._table.get(key)
        return None if target is None else self._routes[target.route]

    def routed(self, key: str) -> Route | None:
        """See RouteView."""
        if key in self._keys:
            return None
        target = self._table.get(key) or self._prefixes.find(key)
        return None if target is None else self._routes[target.route]

    def routes(self) -> list[Route]:
        """All routes, in the order of their ids."""
        return [self._routes[route_id] for route_id in sorted(self._routes)]

    def leading_to(self, link: Link) -> Collection[str]:
        """Ids of the routes whose targets name a model or route. Not for keeping."""
        return self._leading.get(link, {}).keys()

    def routes_to(self, model_id: str) -> list[Route]:
        """The routes whose targets name a model, in the order of their ids."""
        return [self._routes[each] for each in sorted(self.leading_to(Link("models", model_id)))]

    def _routed_to(self, model_id: str) -> list[str]:
        """The keys of routes that one model is all the meaning of."""
        return [
            key
            for route_id in self.leading_to(Link("models", model_id))
            if isinstance((route := self._routes[route_id]).target, One)
            for key in route.keys
        ]

    def _with(
        self, old: Route, new: Route
    ) -> tuple[KeyTable[RouteTarget], list[KeyChange[RouteTarget]]]:
        """The table of keys with a route in another's place, and what is different in it."""
        table, changes = self._table, list[KeyChange[RouteTarget]]()
        wanted = set(new.keys)
        gone = [key for key in old.keys if key not in wanted]
        if old.keys:
            pointed = table.updated([KeyMapping(old.keys, new.meaning)])
            table = pointed.table
            changes += [change for change in pointed.changes if change.key in wanted]
        if new.keys:
            mapping = KeyMapping(new.keys, new.meaning)
            extended = table.extended(old.keys[0], new.keys) if old.keys else table.added([mapping])
            table = extended.table
            changes += extended.changes
        changes += [KeyChange(key, old.meaning, None) for key in gone]
        return table.without(gone).table, changes

    def _prefixes_with(self, old: Route, new: Route) -> PrefixTable[RouteTarget]:
        return self._prefixes.changed(
            gone=old.prefixes, added=dict.fromkeys(new.prefixes, new.meaning)
        )

    def _note_links(self, route: Route) -> None:
        for _, link in links_of(route.target):
            self._leading.setdefault(link, {})[route.id] = None

    def _forget_links(self, route: Route) -> None:
        for _, link in links_of(route.target):
            leading = self._leading.get(link, {})
            leading.pop(route.id, None)
            if not leading:
                self._leading.pop(link, None)

    def _show(
        self, table: KeyTable[RouteTarget], changes: Sequence[KeyChange[RouteTarget]]
    ) -> None:
        self._table = table
        for change in changes:
            key, after = str(change.key), change.after
            model = after and after.model and self._models.get(after.model)
            if model:
                self._keys[key] = model
            else:
                self._keys.pop(key, None)


def _names_of(route: Route) -> Iterator[tuple[str, str]]:
    """What no two routes may both have."""
    yield "route", route.id
    yield from (("key", key) for key in route.keys)
    yield from (("prefix", prefix) for prefix in route.prefixes)


def _taken(kind: str, name: str, what: str = "") -> Refusal:
    return Refusal(
        Reason.ALREADY_EXISTS,
        f"{kind} {name!r} exists already{what}",
        resource=Resource(kind, f"{kind}s/{name}" if kind in ("model", "route") else name),
    )
