"""What keys mean: routes, what a change made of keys, and what a request would do. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from modelyard.resources import ModelOwner
from modelyard.route_targets import RouteTarget

__all__ = ["KeyChange", "Resolution", "ResolvedStep", "Route", "RouteUpdated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What some keys mean.

    Args:
        name: resource name, ``routes/{route}``.
        keys: the keys, each once, in order.
        model: resource name of the model that is all they mean; None where they mean something
            else.
        created_at: when it was registered.
        updated_at: when it was last changed.
        etag: changes whenever the route changes.
        owner: who may change or delete it.
        warnings: what an operator should know and is no error.
        target: what they mean; None for what this version does not know.
        prefixes: beginnings of keys, each once, in order.
    """

    name: str
    keys: tuple[str, ...]
    model: str | None
    created_at: datetime | None
    updated_at: datetime | None
    etag: str
    owner: ModelOwner
    warnings: tuple[str, ...] = ()
    target: RouteTarget | None = None
    prefixes: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyChange:
    """What became of one key.

    Args:
        key: the key.
        before: resource name of the model it meant, or of the route where that meant no one model;
            None: nothing.
        after: the same for what it means now.
    """

    key: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteUpdated:
    """A changed route.

    Args:
        route: as registered.
        changes: the keys that mean something else than before.
    """

    route: Route
    changes: tuple[KeyChange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedStep:
    """One thing that a request would do.

    Args:
        model: resource name of the model it would run; empty for a transformation.
        resident: True if the model is resident now.
        device: resource name of the device that would run it; None if it is not resident.
        branch: the names of the parts of routes that lead to it, outermost first, with "/" between;
            empty for a key that means a model.
        transform: name of the transformation; None for a model.
        conditional: True if not every request does it.
        version: the version that was chosen on the way; None if none was.
    """

    model: str
    resident: bool
    device: str | None
    branch: str = ""
    transform: str | None = None
    conditional: bool = False
    version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What a request for a key would do, if it came now.

    Args:
        key: the key.
        route: resource name of the route that gives it its meaning; None if it is a model's own.
        steps: what would be run, in this order.
        explanation: the same for people, with the reason.
    """

    key: str
    route: str | None
    steps: tuple[ResolvedStep, ...]
    explanation: str
