"""A route: what some keys mean, apart from any model's own record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from modelyard_server.catalog.records import Owner, RouteRecord

__all__ = ["MOST_KEYS", "Route", "RouteDraft", "RouteTarget"]

MOST_KEYS = 10_000
"""Keys of one route."""


@dataclass(frozen=True, slots=True)
class RouteTarget:
    """What a key means by a route.

    Attributes:
        route: the route's id.
        model: the model's id.
    """

    route: str
    model: str

    def __str__(self) -> str:
        return f"models/{self.model} by routes/{self.route}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteDraft:
    """A route as somebody wants it; see modelyard.v1.Route.

    Attributes:
        id: its id.
        keys: as they were given; one that is given twice counts once.
        model: id of the model that they mean.
    """

    id: str
    keys: Sequence[str]
    model: str

    def digest(self) -> str:
        """A text that is the same exactly for drafts that say the same."""
        content = json.dumps([self.id, list(dict.fromkeys(self.keys)), self.model])
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A registered route: every key means one model.

    Attributes:
        id: its id.
        keys: at least one, each once.
        model: id of the model that they mean.
        owner: who may change it.
        created: when it was registered, in UTC.
        updated: when it was last changed, in UTC.
        etag: changes whenever it changes.
        origin: for routes of the configuration file, a digest of what the file said.
    """

    id: str
    keys: tuple[str, ...]
    model: str
    owner: Owner
    created: datetime
    updated: datetime
    etag: str
    origin: str = ""

    @property
    def target(self) -> RouteTarget:
        """What its keys mean."""
        return RouteTarget(self.id, self.model)

    def record(self) -> RouteRecord:
        """As the store keeps it."""
        return RouteRecord(
            id=self.id,
            owner=self.owner,
            keys=self.keys,
            model=self.model,
            created=self.created,
            updated=self.updated,
            etag=self.etag,
            origin=self.origin,
        )

    @staticmethod
    def of(record: RouteRecord) -> Route:
        """A route that was stored."""
        return Route(
            id=record.id,
            keys=record.keys,
            model=record.model,
            owner=record.owner,
            created=record.created,
            updated=record.updated,
            etag=record.etag,
            origin=record.origin,
        )
