"""A route: what some keys mean, apart from any model's own record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from modelyard_server.catalog.model import is_key, is_model_id
from modelyard_server.catalog.records import Owner, RouteRecord
from modelyard_server.errors import Violation
from modelyard_server.routing.target_json import read_target, target_to_json
from modelyard_server.routing.targets import Target, kind_of, links_of, single_model

__all__ = [
    "MOST_KEYS",
    "MOST_PREFIXES",
    "Route",
    "RouteDraft",
    "RouteTarget",
    "name_violations",
]

MOST_KEYS: Final = 10_000
"""Keys of one route."""

MOST_PREFIXES: Final = 1_000
"""Prefixes of one route."""

_MOST_NAMED: Final = 8


_ID: Final = "must match [a-z0-9][a-z0-9._-]{0,127} and hold no '..'"
_KEY: Final = "must match [A-Za-z0-9][A-Za-z0-9._:/-]{0,255} and hold no '..'"


def name_violations(
    route_id: str, keys: Sequence[str], prefixes: Sequence[str]
) -> Iterator[Violation]:
    """What is wrong with the names of a route, as they were given."""
    if not is_model_id(route_id):
        yield Violation("route_id", _ID)
    for i, key in enumerate(keys):
        if not is_key(key):
            yield Violation(f"route.keys[{i}]", _KEY)
    for i, prefix in enumerate(prefixes):
        if prefix and not is_key(prefix):
            yield Violation(f"route.prefixes[{i}]", f"must be empty, or {_KEY}")
    if not keys and not prefixes:
        yield Violation("route.keys", "at least one is needed, or a prefix")
    for field, names, most in (("keys", keys, MOST_KEYS), ("prefixes", prefixes, MOST_PREFIXES)):
        if (count := len(set(names))) > most:
            yield Violation(f"route.{field}", f"there are {count}; {most} may be")


@dataclass(frozen=True, slots=True)
class RouteTarget:
    """What a key means by a route.

    Attributes:
        route: the route's id.
        model: the model's id; None if the route means no one model.
    """

    route: str
    model: str | None

    @property
    def name(self) -> str:
        """Resource name of the model, or of the route where that means no one model."""
        return f"routes/{self.route}" if self.model is None else f"models/{self.model}"

    def __str__(self) -> str:
        return self.name if self.model is None else f"{self.name} by routes/{self.route}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteDraft:
    """A route as somebody wants it; see modelyard.v1.Route.

    Attributes:
        id: its id.
        keys: as they were given; one that is given twice counts once.
        target: what they mean.
        prefixes: beginnings of keys, as they were given; one that is given twice counts once.
    """

    id: str
    keys: Sequence[str]
    target: Target
    prefixes: Sequence[str] = ()

    def digest(self) -> str:
        """A text that is the same exactly for drafts that say the same."""
        keys, model = list(dict.fromkeys(self.keys)), single_model(self.target)
        content: list[object] = [self.id, keys, model]
        if model is None or self.prefixes:
            # Longer than that of a model, which is as it was when there was no other kind.
            prefixes = list(dict.fromkeys(self.prefixes))
            content = [self.id, keys, prefixes, target_to_json(self.target)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A registered route.

    Attributes:
        id: its id.
        keys: each once; at least one, unless there are prefixes.
        target: what they mean.
        owner: who may change it.
        created: when it was registered, in UTC.
        updated: when it was last changed, in UTC.
        etag: changes whenever it changes.
        origin: for routes of the configuration file, a digest of what the file said.
        prefixes: beginnings of keys, each once.
    """

    id: str
    keys: tuple[str, ...]
    target: Target
    owner: Owner
    created: datetime
    updated: datetime
    etag: str
    origin: str = ""
    prefixes: tuple[str, ...] = ()

    @property
    def meaning(self) -> RouteTarget:
        """What its keys mean, in short."""
        return RouteTarget(self.id, single_model(self.target))

    @property
    def summary(self) -> str:
        """What it says, in a few words for people."""
        first = self.keys[0] if self.keys else f"{self.prefixes[0]}*"
        counts = [
            f"{len(names)} {word}{'' if len(names) == 1 else end}"
            for names, word, end in ((self.keys, "key", "s"), (self.prefixes, "prefix", "es"))
            if names
        ]
        model = single_model(self.target)
        if model is not None:
            return f"{first} ({', '.join(counts)}) means models/{model}"
        links = list(dict.fromkeys(str(link) for _, link in links_of(self.target)))
        shown = ", ".join(links[:_MOST_NAMED]) + (", ..." if links[_MOST_NAMED:] else "")
        return f"{first} ({', '.join(counts)}) means the {kind_of(self.target)} of {shown}"

    def record(self) -> RouteRecord:
        """As the store keeps it."""
        return RouteRecord(
            id=self.id,
            owner=self.owner,
            keys=self.keys,
            target=target_to_json(self.target),
            created=self.created,
            updated=self.updated,
            etag=self.etag,
            origin=self.origin,
            prefixes=self.prefixes,
        )

    @staticmethod
    def of(record: RouteRecord) -> Route:
        """A route that was stored.

        Raises:
            TargetError: its target is none that this server knows.
        """
        return Route(
            id=record.id,
            keys=record.keys,
            target=read_target(record.target),
            owner=record.owner,
            created=record.created,
            updated=record.updated,
            etag=record.etag,
            origin=record.origin,
            prefixes=record.prefixes,
        )
