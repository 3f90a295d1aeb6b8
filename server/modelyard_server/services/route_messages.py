"""Between modelyard.v1.Route and what it says.

Targets go through their JSON, whose shape is that of the messages: so a target is read, and its
errors are told, in one place for all that can hold one (routing/target_json.py).
"""

from __future__ import annotations

from typing import Any

from modelyard.v1 import route_pb2
from modelyard_server.catalog.records import Owner
from modelyard_server.catalog.route import Route, RouteTarget
from modelyard_server.routing.key_table import KeyChange
from modelyard_server.routing.target_json import TargetError, read_target, target_to_json
from modelyard_server.routing.targets import Target, kind_of
from modelyard_server.runtimes.api import JsonValue
from modelyard_server.services.structs import plain_values

__all__ = ["change_message", "route_message", "target_of"]

_OWNERS = {
    Owner.CONFIG: route_pb2.ROUTE_OWNER_CONFIG,
    Owner.API: route_pb2.ROUTE_OWNER_API,
}
_COMBINES = {
    "mean": route_pb2.COMBINE_MEAN,
    "vote": route_pb2.COMBINE_VOTE,
    "concat": route_pb2.COMBINE_CONCAT,
    "all": route_pb2.COMBINE_ALL,
}
_COMBINE_NAMES = {number: name for name, number in _COMBINES.items()}


def target_of(message: route_pb2.Route, kind: str | None = None) -> Target:
    """What a route's message leads to.

    Args:
        message: of the route.
        kind: what is to be read; None for the kind that is set.

    Raises:
        TargetError: it says nothing, or not what its kind needs.
        Refusal: INVALID_FIELD for a number among parameters that is none.
    """
    kind = kind or message.WhichOneof("target")
    match kind:
        case None:
            raise TargetError([("target", "is missing: set one of its kinds")])
        case "model":
            name = message.model.model
            if not name.startswith("models/"):
                text = 'a model is needed, by its name "models/{model}"'
                raise TargetError([("target", text)])
            return read_target({"model": name})
        case "sequence":
            steps = [_step_json(step, i) for i, step in enumerate(message.sequence.steps)]
            return read_target({"sequence": {"steps": steps}})
        case _:
            return read_target({kind: _JSON_OF[kind](getattr(message, kind))})


def _split_json(split: route_pb2.SplitTarget) -> JsonValue:
    return {
        "branches": [
            {"name": each.name, "target": _link(each.target), "weight": each.weight}
            for each in split.branches
        ],
        "warm_tolerance": split.warm_tolerance,
        "salt": split.salt,
    }


def _step_json(step: route_pb2.SequenceStep, place: int) -> JsonValue:
    value: dict[str, JsonValue] = {"name": step.name, "rename": dict(step.rename)}
    match step.WhichOneof("step"):
        case "target":
            value["target"] = _link(step.target)
        case "transform":
            field = f"route.sequence.steps[{place}].transform.parameters"
            value["transform"] = {
                "name": step.transform.name,
                "parameters": plain_values(step.transform.parameters, field),
            }
    return value


def _ensemble_json(ensemble: route_pb2.EnsembleTarget) -> JsonValue:
    return {
        "members": [
            {
                "name": each.name,
                "target": _link(each.target),
                "weight": each.weight if each.HasField("weight") else 1.0,
            }
            for each in ensemble.members
        ],
        # A number that this server does not know is none of the names.
        "combine": _COMBINE_NAMES.get(ensemble.combine, f"{ensemble.combine}"),
    }


def _shadow_json(shadow: route_pb2.ShadowTarget) -> JsonValue:
    return {
        "target": _link(shadow.target),
        "shadow": _link(shadow.shadow),
        "sample": shadow.sample,
    }


def _fallback_json(fallback: route_pb2.FallbackTarget) -> JsonValue:
    return {
        "targets": [_link(name) for name in fallback.targets],
        "prefer_warm": fallback.prefer_warm,
    }


def _versions_json(versions: route_pb2.VersionsTarget) -> JsonValue:
    value: dict[str, JsonValue] = {
        "versions": [
            {"name": each.name, "target": _link(each.target)} for each in versions.versions
        ],
        "current": versions.current,
        "aliases": dict(versions.aliases),
    }
    if versions.HasField("canary"):
        canary = versions.canary
        value["canary"] = {"version": canary.version, "percent": canary.percent}
    return value


_JSON_OF: dict[str, Any] = {
    "split": _split_json,
    "ensemble": _ensemble_json,
    "shadow": _shadow_json,
    "fallback": _fallback_json,
    "versions": _versions_json,
}


def _link(name: str) -> str:
    """A resource name for reading. A bare id stands for a model in a file, and not in a message."""
    return name if "/" in name else f"/{name}"


def put_target(message: route_pb2.Route, target: Target) -> None:
    """Writes a target into a message."""
    kind = kind_of(target)
    value = target_to_json(target)[kind]
    match kind:
        case "model":
            message.model.model = f"models/{value}"
        case "sequence":
            for step in value["steps"]:
                added = message.sequence.steps.add()
                if (transform := step.pop("transform", None)) is not None:
                    added.transform.name = transform["name"]
                    added.transform.parameters.update(transform.get("parameters", {}))
                _fill(added, step)
        case "ensemble":
            combine = _COMBINES[value.pop("combine")]
            _fill(message.ensemble, value)
            message.ensemble.combine = combine
        case _:
            _fill(getattr(message, kind), value)


def _fill(message: Any, value: dict[str, JsonValue]) -> None:
    """Sets the fields of a message to JSON of the same shape, without Structs and enums."""
    message.MergeFrom(type(message)(**value))


def route_message(route: Route, warnings: list[str]) -> route_pb2.Route:
    """A registered route as a message.

    Args:
        route: the route.
        warnings: what an operator should know of it.
    """
    message = route_pb2.Route(
        name=f"routes/{route.id}",
        keys=route.keys,
        prefixes=route.prefixes,
        etag=route.etag,
        owner=_OWNERS[route.owner],
        warnings=warnings,
    )
    put_target(message, route.target)
    message.create_time.FromDatetime(route.created)
    message.update_time.FromDatetime(route.updated)
    return message


def change_message(change: KeyChange[RouteTarget]) -> route_pb2.KeyChange:
    """What became of a key, as a message."""
    return route_pb2.KeyChange(
        key=str(change.key),
        previous_model="" if change.before is None else change.before.name,
        model="" if change.after is None else change.after.name,
    )
