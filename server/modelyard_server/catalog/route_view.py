"""What the data plane sees of models and routes."""

from __future__ import annotations

from typing import Protocol

from modelyard_server.catalog.model import Model
from modelyard_server.catalog.route import Route

__all__ = ["RouteView"]


class RouteView(Protocol):
    """Models and routes by what they are called. On the event loop's thread only.

    What a key means is found in two steps: by `Catalog.keys`, which has the keys that mean one
    model, and for all others by `routed`. `Catalog` is one.
    """

    def routed(self, key: str) -> Route | None:
        """The route that says what a key means, if the key itself does not mean a model.

        It is the one that has exactly this key (which, if it is of the kind "model", means one that
        is not there), or else the one with the longest prefix of it, of whatever kind. None if
        there is no such route, and for a key that means a model.
        """

    def route_of(self, key: str) -> Route | None:
        """The route that has exactly this key; None if none has."""

    def get_route(self, route_id: str) -> Route:
        """The route of an id. Raises Refusal ROUTE_NOT_FOUND."""

    def get(self, model_id: str) -> Model:
        """The model of an id. Raises Refusal MODEL_NOT_FOUND."""
