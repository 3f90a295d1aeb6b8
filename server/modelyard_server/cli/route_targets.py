"""What the command line says of a route's target, and how one is shown."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard_server.cli.printing import short_name

if TYPE_CHECKING:
    from modelyard import Canary, RouteTarget
    from modelyard_server.routing.targets import Step, Target

__all__ = ["canary_of", "leads_to", "read_file", "split_of", "target_rows", "versions_of"]

_MOST_BYTES = 4 * 1024**2


def split_of(text: str) -> RouteTarget:
    """A split from ``a=90,b=10``: models, or ``routes/r``, by their weights. Raises ValueError."""
    from modelyard import SplitTarget

    weights = {}
    for target, weight in _pairs("--split", text):
        try:
            weights[target] = int(weight)
        except ValueError:
            raise ValueError(f"--split: the weight of {target} must be a number") from None
    return SplitTarget.by_weight(weights)


def versions_of(text: str, current: str | None) -> RouteTarget:
    """Versions from ``v1=a,v2=b``; the first is current unless another is. Raises ValueError."""
    from modelyard import VersionsTarget

    versions = dict(_pairs("--versions", text))
    return VersionsTarget.of(versions, current=current or next(iter(versions)))


def canary_of(text: str) -> Canary:
    """A canary from ``v2=5``: its version, and how many percent. Raises ValueError."""
    from modelyard import Canary

    ((version, percent),) = _pairs("--canary", text, most=1)
    try:
        return Canary(version=version, percent=float(percent))
    except ValueError:
        raise ValueError(f"--canary: percent must be a number, got {percent}") from None


def read_file(path: Path) -> RouteTarget:
    """A target from a file of TOML or JSON, by its ending.

    Raises:
        ValueError: it cannot be read, or holds no target; with everything that is wrong with it.
    """
    from modelyard_server.routing.target_json import read_target

    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"is larger than {_MOST_BYTES} bytes")
        text = content.decode()
        value = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
        return _value_of(read_target(value))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def leads_to(target: RouteTarget | None) -> str:
    """What a target leads to, in a few words; empty for what this version does not know."""
    from modelyard import ModelTarget

    match target:
        case None:
            return ""
        case ModelTarget():
            return short_name(target.model)
        case _:
            parts = [part for _, part, _ in target_rows(target) if part]
            return f"{target.kind}: {', '.join(dict.fromkeys(parts))}"


def target_rows(target: RouteTarget) -> list[tuple[str, str, str]]:
    """The parts of a target: the name of each, what it leads to, and what is said of it."""
    from modelyard import (
        EnsembleTarget,
        FallbackTarget,
        SequenceTarget,
        ShadowTarget,
        SplitTarget,
        VersionsTarget,
    )

    match target:
        case SplitTarget():
            whole = sum(branch.weight for branch in target.branches) or 1
            return [
                (each.name, _short(each.target), f"{100 * each.weight / whole:.3g} %")
                for each in target.branches
            ]
        case SequenceTarget():
            return [
                (
                    step.name or str(i),
                    _short(step.target or ""),
                    " ".join(
                        [step.transform.name if step.transform else ""]
                        + [f"{old or '(all)'}->{new}" for old, new in step.rename.items()]
                    ).strip(),
                )
                for i, step in enumerate(target.steps)
            ]
        case EnsembleTarget():
            return [
                (each.name, _short(each.target), f"weight {each.weight:g}")
                for each in target.members
            ]
        case ShadowTarget():
            return [
                ("answers", _short(target.target), ""),
                ("shadow", _short(target.shadow), f"{100 * target.sample:.3g} %"),
            ]
        case FallbackTarget():
            return [(str(i), _short(link), "") for i, link in enumerate(target.targets)]
        case VersionsTarget(canary=canary):
            said = {
                each.name: [a for a, v in target.aliases.items() if v == each.name]
                for each in target.versions
            }
            named = {name: name for name in said} | dict(target.aliases)
            said.get(named.get(target.current, ""), []).append("current")
            if canary is not None:
                said.get(named.get(canary.version, ""), []).append(f"canary {canary.percent:g} %")
            return [
                (each.name, _short(each.target), ", ".join(said[each.name]))
                for each in target.versions
            ]
        case _:
            return [("", _short(target.model), "")]


def _short(name: str) -> str:
    """A model by its id; a route stays one by its name."""
    return short_name(name) if name.startswith("models/") else name


def _pairs(option: str, text: str, most: int | None = None) -> list[tuple[str, str]]:
    """The pairs of ``a=1,b=2``. Raises ValueError."""
    pairs = [
        (name.strip(), value.strip())
        for name, _, value in (part.partition("=") for part in text.split(","))
    ]
    if not all(name and value for name, value in pairs):
        raise ValueError(f"{option} {text!r} must be written as NAME=VALUE,NAME=VALUE")
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{option} {text!r} names one of them twice")
    if most is not None and len(pairs) > most:
        raise ValueError(f"{option} {text!r} is more than {most}")
    return pairs


def _value_of(target: Target) -> RouteTarget:
    """A target as the client has it."""
    import modelyard as client
    from modelyard_server.routing import targets

    match target:
        case targets.One():
            return client.ModelTarget(model=target.model)
        case targets.Split():
            return client.SplitTarget(
                branches=[
                    client.Branch(name=each.name, target=str(each.target), weight=each.weight)
                    for each in target.branches
                ],
                warm_tolerance=target.warm_tolerance,
                salt=target.salt,
            )
        case targets.Sequence():
            return client.SequenceTarget(steps=[_step_value(step) for step in target.steps])
        case targets.Ensemble():
            return client.EnsembleTarget(
                members=[
                    client.Member(name=each.name, target=str(each.target), weight=each.weight)
                    for each in target.members
                ],
                combine=client.Combine(target.combine),
            )
        case targets.Shadow():
            return client.ShadowTarget(
                target=str(target.target), shadow=str(target.shadow), sample=target.sample
            )
        case targets.Fallback():
            return client.FallbackTarget(
                targets=[str(link) for link in target.targets], prefer_warm=target.prefer_warm
            )
        case targets.Versions(canary=canary):
            return client.VersionsTarget(
                versions=[
                    client.Version(name=each.name, target=str(each.target))
                    for each in target.versions
                ],
                current=target.current,
                aliases=target.aliases,
                canary=None
                if canary is None
                else client.Canary(version=canary.version, percent=canary.percent),
            )


def _step_value(step: Step) -> Any:
    from modelyard import SequenceStep, Transform
    from modelyard_server.routing.targets import Link

    if isinstance(step.does, Link):
        return SequenceStep(name=step.name, target=str(step.does), rename=step.rename)
    return SequenceStep(
        name=step.name,
        transform=Transform(name=step.does.name, parameters=step.does.parameters),
        rename=step.rename,
    )
