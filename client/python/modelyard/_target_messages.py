"""What routes lead to, as messages and back."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from modelyard._struct_messages import struct_from, struct_to_dict
from modelyard.route_targets import (
    Branch,
    Canary,
    Combine,
    EnsembleTarget,
    FallbackTarget,
    Member,
    ModelTarget,
    RouteTarget,
    SequenceStep,
    SequenceTarget,
    ShadowTarget,
    SplitTarget,
    Transform,
    Version,
    VersionsTarget,
)
from modelyard.v1 import route_pb2

__all__ = ["canary_message", "put_target", "target_from"]

_COMBINES: Final[Mapping[Combine, route_pb2.Combine.ValueType]] = MappingProxyType(
    {
        Combine.MEAN: route_pb2.COMBINE_MEAN,
        Combine.VOTE: route_pb2.COMBINE_VOTE,
        Combine.CONCAT: route_pb2.COMBINE_CONCAT,
        Combine.ALL: route_pb2.COMBINE_ALL,
    }
)
_COMBINE_VALUES: Final[Mapping[int, Combine]] = MappingProxyType(
    {number: each for each, number in _COMBINES.items()}
)


def put_target(message: route_pb2.Route, target: RouteTarget) -> None:
    """Write a target into a route's message.

    Raises:
        TypeError: no target, or parts of another type than they should be.
        ValueError: what this version does not know, or a Struct cannot hold.
    """
    match target:
        case ModelTarget():
            message.model.model = target.model
        case SplitTarget():
            message.split.CopyFrom(
                route_pb2.SplitTarget(
                    branches=[
                        route_pb2.Branch(name=each.name, target=each.target, weight=each.weight)
                        for each in target.branches
                    ],
                    warm_tolerance=target.warm_tolerance,
                    salt=target.salt,
                )
            )
        case SequenceTarget():
            message.sequence.CopyFrom(
                route_pb2.SequenceTarget(steps=map(_step_message, target.steps))
            )
        case EnsembleTarget():
            if target.combine not in _COMBINES:
                raise ValueError(f"combine cannot be {target.combine}: it is only ever read")
            message.ensemble.CopyFrom(
                route_pb2.EnsembleTarget(
                    members=[
                        route_pb2.Member(name=each.name, target=each.target, weight=each.weight)
                        for each in target.members
                    ],
                    combine=_COMBINES[target.combine],
                )
            )
        case ShadowTarget():
            message.shadow.CopyFrom(
                route_pb2.ShadowTarget(
                    target=target.target, shadow=target.shadow, sample=target.sample
                )
            )
        case FallbackTarget():
            message.fallback.CopyFrom(
                route_pb2.FallbackTarget(targets=target.targets, prefer_warm=target.prefer_warm)
            )
        case VersionsTarget():
            message.versions.CopyFrom(
                route_pb2.VersionsTarget(
                    versions=[
                        route_pb2.Version(name=each.name, target=each.target)
                        for each in target.versions
                    ],
                    current=target.current,
                    aliases=dict(target.aliases),
                    canary=None if target.canary is None else canary_message(target.canary),
                )
            )
        case _:
            raise TypeError(f"target must be a target of a route, got a {type(target).__name__}")


def canary_message(canary: Canary) -> route_pb2.Canary:
    """Return a canary as a message. Raises ``TypeError`` for anything else."""
    if not isinstance(canary, Canary):
        raise TypeError(f"canary must be a Canary, got a {type(canary).__name__}")
    return route_pb2.Canary(version=canary.version, percent=canary.percent)


def _step_message(step: SequenceStep) -> route_pb2.SequenceStep:
    message = route_pb2.SequenceStep(name=step.name, rename=dict(step.rename))
    if step.target is not None:
        message.target = step.target
    elif step.transform is not None:
        message.transform.name = step.transform.name
        parameters = struct_from(step.transform.parameters, f"parameters of {step.transform.name}")
        message.transform.parameters.CopyFrom(parameters)
    return message


def target_from(message: route_pb2.Route) -> RouteTarget | None:
    """Return what a route leads to; None for what this version does not know."""
    match message.WhichOneof("target"):
        case "model":
            return ModelTarget(model=message.model.model)
        case "split":
            split = message.split
            return SplitTarget(
                branches=tuple(
                    Branch(name=each.name, target=each.target, weight=each.weight)
                    for each in split.branches
                ),
                warm_tolerance=split.warm_tolerance,
                salt=split.salt,
            )
        case "sequence":
            steps = [_step_from(step) for step in message.sequence.steps]
            known = tuple(step for step in steps if step is not None)
            # Some of its steps alone would be another sequence.
            return SequenceTarget(steps=known) if len(known) == len(steps) else None
        case "ensemble":
            return EnsembleTarget(
                members=tuple(
                    Member(
                        name=each.name,
                        target=each.target,
                        weight=each.weight if each.HasField("weight") else 1.0,
                    )
                    for each in message.ensemble.members
                ),
                combine=_COMBINE_VALUES.get(message.ensemble.combine, Combine.UNKNOWN),
            )
        case "shadow":
            shadow = message.shadow
            return ShadowTarget(target=shadow.target, shadow=shadow.shadow, sample=shadow.sample)
        case "fallback":
            fallback = message.fallback
            return FallbackTarget(targets=tuple(fallback.targets), prefer_warm=fallback.prefer_warm)
        case "versions":
            return _versions_from(message.versions)
        case _:
            return None


def _step_from(step: route_pb2.SequenceStep) -> SequenceStep | None:
    match step.WhichOneof("step"):
        case "target":
            return SequenceStep(name=step.name, target=step.target, rename=dict(step.rename))
        case "transform":
            return SequenceStep(
                name=step.name,
                transform=Transform(
                    name=step.transform.name,
                    parameters=struct_to_dict(step.transform.parameters),
                ),
                rename=dict(step.rename),
            )
        case _:
            return None


def _versions_from(versions: route_pb2.VersionsTarget) -> VersionsTarget:
    canary = None
    if versions.HasField("canary"):
        canary = Canary(version=versions.canary.version, percent=versions.canary.percent)
    return VersionsTarget(
        versions=tuple(Version(name=each.name, target=each.target) for each in versions.versions),
        current=versions.current,
        aliases=dict(versions.aliases),
        canary=canary,
    )
