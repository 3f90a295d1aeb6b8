"""Messages about routes as values."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from modelyard._admin_messages import time_from
from modelyard._target_messages import target_from
from modelyard.resources import ModelOwner
from modelyard.routes import KeyChange, Resolution, ResolvedStep, Route, RouteUpdated
from modelyard.v1 import route_pb2, route_service_pb2

__all__ = ["resolution_from", "resolve_request", "route_from", "route_updated_from"]

_OWNERS: Final[Mapping[int, ModelOwner]] = MappingProxyType(
    {
        route_pb2.ROUTE_OWNER_CONFIG: ModelOwner.CONFIG,
        route_pb2.ROUTE_OWNER_API: ModelOwner.API,
    }
)


def route_from(message: route_pb2.Route) -> Route:
    """Return a route. Raises ``ValueError`` if a time is out of range."""
    return Route(
        name=message.name,
        keys=tuple(message.keys),
        model=message.model.model if message.WhichOneof("target") == "model" else None,
        created_at=time_from(message.create_time) if message.HasField("create_time") else None,
        updated_at=time_from(message.update_time) if message.HasField("update_time") else None,
        etag=message.etag,
        owner=_OWNERS.get(message.owner, ModelOwner.UNKNOWN),
        warnings=tuple(message.warnings),
        target=target_from(message),
        prefixes=tuple(message.prefixes),
    )


def route_updated_from(response: route_service_pb2.UpdateRouteResponse) -> RouteUpdated:
    """Return what a change has come to. Raises as ``route_from``."""
    return RouteUpdated(
        route=route_from(response.route),
        changes=tuple(
            KeyChange(
                key=change.key, before=change.previous_model or None, after=change.model or None
            )
            for change in response.changes
        ),
    )


def resolve_request(
    key: str, affinity: str | None, version: str | None
) -> route_service_pb2.ResolveRouteRequest:
    """Return the message that asks what a key means. Raises ``TypeError`` for no str."""
    for name, text in (("key", key), ("affinity", affinity or ""), ("version", version or "")):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a str, got {type(text).__name__}")
    return route_service_pb2.ResolveRouteRequest(
        key=key, affinity=affinity or "", version=version or ""
    )


def resolution_from(key: str, response: route_service_pb2.ResolveRouteResponse) -> Resolution:
    """Return what a key means."""
    return Resolution(
        key=key,
        route=response.route or None,
        steps=tuple(
            ResolvedStep(
                model=step.model,
                resident=step.resident,
                device=step.device or None,
                branch=step.branch,
                transform=step.transform or None,
                conditional=step.conditional,
                version=step.version or None,
            )
            for step in response.steps
        ),
        explanation=response.explanation,
    )
