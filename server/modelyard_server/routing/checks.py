"""What is wrong with a route's target: in itself, and beside models and other routes. Pure.

Every function tells everything that it finds at once, as (field, text): the field is the path in
modelyard.v1.Route, "split.branches[1].weight". The rules are those of route.proto.

How routes may hang together:

* What a target leads to is registered.
* No way from a route leads back to it, and none passes more than DEEPEST routes, the route itself
  counted.
* A member of an ensemble leads to one model, the same for every request (`only_model`): all members
  are held at once, so what they are is known before one is asked for.

They hold for all routes whenever they hold for the one that is changed and for those that lead to
it, which is what `beside` looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, assert_never

from modelyard_server.routing.names import MODEL_ID_PATTERN, is_model_id
from modelyard_server.routing.target_json import Finding
from modelyard_server.routing.targets import (
    Ensemble,
    Fallback,
    Link,
    One,
    Shadow,
    Split,
    Step,
    Target,
    Transform,
    Versions,
    links_of,
)
from modelyard_server.routing.targets import Sequence as SequenceTarget

__all__ = [
    "DEEPEST",
    "KNOWN",
    "Others",
    "TransformCheck",
    "beside",
    "ensembles_above",
    "in_itself",
    "missing",
    "models_needed",
    "only_model",
]

DEEPEST: Final = 8
"""Most routes on a way from a key to a model."""

TransformCheck = Callable[[Transform], Iterable[Finding]]
"""Tells what is wrong with a transform, with paths inside of it."""

_NAME: Final = "must match [a-z0-9][a-z0-9._-]{0,127}"
_MOST_WEIGHT: Final = 1_000_000


def _anything(transform: Transform) -> Sequence[Finding]:
    return ()


KNOWN: Final[TransformCheck] = _anything
"""Takes every transform for right."""


class Others(Protocol):
    """The models and routes that a target is checked beside."""

    def has_model(self, model_id: str) -> bool:
        """True if there is a model of that id."""

    def target_of(self, route_id: str) -> Target | None:
        """What a route leads to; None if there is no such route."""

    def leading_to(self, link: Link) -> Collection[str]:
        """Ids of the routes whose targets name a model or route."""


# --- In itself ------------------------------------------------------------------------------------


def in_itself(target: Target, *, check_transform: TransformCheck = KNOWN) -> list[Finding]:
    """Everything that is wrong with a target whatever else there is.

    Args:
        target: what to check.
        check_transform: tells what is wrong with a transform.
    """
    findings = [
        (path, "must hold the id of a model or route")
        for path, link in links_of(target)
        if not is_model_id(link.id)
    ]
    match target:
        case One():
            pass
        case Split():
            findings += _of_split(target)
        case SequenceTarget():
            findings += _of_sequence(target, check_transform)
        case Ensemble():
            findings += _of_ensemble(target)
        case Shadow():
            if target.shadow.kind != "models":
                findings.append(("shadow.shadow", 'must be a model, "models/{model}"'))
            if not 0 < target.sample <= 1:
                findings.append(("shadow.sample", "must be above 0 and at most 1"))
        case Fallback():
            findings += _count("fallback.targets", target.targets, 2, 16)
        case Versions():
            findings += _of_versions(target)
        case _:
            assert_never(target)
    return findings


def _of_split(split: Split) -> Iterator[Finding]:
    yield from _count("split.branches", split.branches, 2, 64)
    yield from _names("split.branches", [branch.name for branch in split.branches])
    for i, branch in enumerate(split.branches):
        if not 0 <= branch.weight <= _MOST_WEIGHT:
            yield f"split.branches[{i}].weight", f"must be 0 to {_MOST_WEIGHT}"
    if split.branches and all(branch.weight == 0 for branch in split.branches):
        yield "split.branches", "every weight is 0: one at least must not be"
    if not 0 <= split.warm_tolerance <= 1:
        yield "split.warm_tolerance", "must be 0 to 1"
    if "\0" in split.salt:
        yield "split.salt", "must not hold the character 0"


def _of_sequence(sequence: SequenceTarget, check_transform: TransformCheck) -> Iterator[Finding]:
    yield from _count("sequence.steps", sequence.steps, 1, 16)
    names = [step.name or str(i) for i, step in enumerate(sequence.steps)]
    yield from _names("sequence.steps", names)
    if sequence.steps and all(isinstance(step.does, Transform) for step in sequence.steps):
        yield "sequence.steps", "one of them at least must be a target"
    for i, step in enumerate(sequence.steps):
        path = f"sequence.steps[{i}]"
        if isinstance(step.does, Transform):
            for field, text in check_transform(step.does):
                yield f"{path}.transform.{field}", text
        yield from _of_rename(f"{path}.rename", step)


def _of_rename(path: str, step: Step) -> Iterator[Finding]:
    if "" in step.rename and len(step.rename) > 1:
        yield path, 'the name "" is for a step that has one output: then there is no other'
    new = list(step.rename.values())
    for name in dict.fromkeys(new):
        if not name:
            yield path, "a new name must not be empty"
        elif new.count(name) > 1:
            yield path, f"two outputs cannot both be called {name[:64]!r}"


def _of_ensemble(ensemble: Ensemble) -> Iterator[Finding]:
    yield from _count("ensemble.members", ensemble.members, 2, 16)
    yield from _names("ensemble.members", [member.name for member in ensemble.members])
    for i, member in enumerate(ensemble.members):
        # Not "<= 0", which is false for what is no number at all.
        if not 0 < member.weight < float("inf"):
            yield f"ensemble.members[{i}].weight", "must be a number above 0"


def _of_versions(versions: Versions) -> Iterator[Finding]:
    yield from _count("versions.versions", versions.versions, 1, 64)
    names = [version.name for version in versions.versions]
    yield from _names("versions.versions", names)
    for alias, name in versions.aliases.items():
        path = f"versions.aliases.{alias[:64]}"
        if not MODEL_ID_PATTERN.fullmatch(alias):
            yield "versions.aliases", f"{alias[:64]!r}: a name {_NAME}"
        elif alias in names:
            yield path, "is the name of a version already"
        if name not in names:
            yield path, f"there is no version {name[:64]!r}"
    if versions.find(versions.current) is None:
        yield "versions.current", _no_version(versions.current)
    if versions.canary is not None:
        if versions.find(versions.canary.version) is None:
            yield "versions.canary.version", _no_version(versions.canary.version)
        if not 0 <= versions.canary.percent <= 100:
            yield "versions.canary.percent", "must be 0 to 100"


def _no_version(name: str) -> str:
    return f"there is no version or alias {name[:64]!r}" if name else "is missing"


def _count(path: str, there: Sequence[object], low: int, high: int) -> Iterator[Finding]:
    if not low <= len(there) <= high:
        yield path, f"must be {low} to {high}, got {len(there)}"


def _names(path: str, names: Sequence[str]) -> Iterator[Finding]:
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        if not MODEL_ID_PATTERN.fullmatch(name):
            yield f"{path}[{i}].name", _NAME
        elif first.setdefault(name, i) != i:
            yield f"{path}[{i}].name", f"{name!r} is the name of {path}[{first[name]}] already"


# --- Beside others --------------------------------------------------------------------------------


def missing(target: Target, others: Others) -> list[tuple[str, Link]]:
    """What a target leads to that is not there, each with its path."""
    return [
        (path, link)
        for path, link in links_of(target)
        if not (
            others.has_model(link.id)
            if link.kind == "models"
            else others.target_of(link.id) is not None
        )
    ]


def beside(route_id: str, target: Target, others: Others) -> list[Finding]:
    """Everything that would be wrong between routes, were this the target of that one.

    What is not there is told by `missing`, and leads nowhere here.

    Args:
        route_id: the route; it need not be there yet.
        target: what it is to lead to.
        others: all models and routes. What it says of the route itself does not count.
    """
    then = _Then(route_id, target, others)
    findings: list[Finding] = []
    for path, link in links_of(target):
        if link.kind == "routes" and (way := _way(link.id, route_id, then)) is not None:
            names = " -> ".join(f"routes/{each}" for each in (route_id, *way))
            findings.append((path, f"leads in a circle: {names}"))
    if findings:
        return findings  # In a circle nothing below comes to an end.
    above = _above(route_id, then)
    height = max(above.values())
    down: dict[str, int] = {}
    for path, link in links_of(target):
        if link.kind == "routes":
            depth = height + _depth(link.id, then, down)
            if depth > DEEPEST:
                findings.append((path, f"leads through {depth} routes; {DEEPEST} may be"))
    for above_id in above:
        leads = then.target_of(above_id)
        if not isinstance(leads, Ensemble):
            continue
        for i, member in enumerate(leads.members):
            text = _no_member(member.target, then)
            field = f"ensemble.members[{i}].target"
            if text and above_id == route_id:
                findings.append((field, text))
            elif text and _reaches(member.target, route_id, then):
                findings.append(("target", f"{field} of routes/{above_id}: {text}"))
    return findings


def only_model(link: Link, others: Others) -> str | None:
    """Id of the one model that a link leads to whoever asks; None if it leads to anything else.

    So leads a link to a model; one to a route of a model; to a sequence with one model among its
    transformations; and to versions without a canary, of which the current one counts.
    """
    passed: set[str] = set()
    while link.kind == "routes":
        if link.id in passed:
            return None  # A circle of a file that is being checked.
        passed.add(link.id)
        match others.target_of(link.id):
            case One(model=model):
                return model
            case SequenceTarget(steps=steps):
                links = [step.does for step in steps if isinstance(step.does, Link)]
                if len(links) != 1:
                    return None
                (link,) = links
            case Versions(canary=None) as versions if version := versions.find(versions.current):
                link = version.target
            case _:
                return None
    return link.id


def models_needed(link: Link, others: Others) -> tuple[str, ...] | None:
    """Ids of all models that a request which is led there needs; None if it depends on the request.

    What is only tried is not needed. Versions without a canary count as their current one.
    """
    if link.kind == "models":
        return (link.id,)
    needed: list[Link]
    match others.target_of(link.id):
        case One(model=model):
            return (model,)
        case SequenceTarget(steps=steps):
            needed = [step.does for step in steps if isinstance(step.does, Link)]
        case Ensemble(members=members):
            needed = [member.target for member in members]
        case Shadow(target=target):
            needed = [target]
        case Versions(canary=None) as versions if version := versions.find(versions.current):
            needed = [version.target]
        case _:
            return None
    found: dict[str, None] = {}
    for each in needed:
        below = models_needed(each, others)
        if below is None:
            return None
        found.update(dict.fromkeys(below))
    return tuple(found)


def ensembles_above(route_id: str, target: Target, others: Others) -> dict[str, tuple[str, ...]]:
    """The members of each ensemble that a route is, or leads to, as it would be with a target.

    Args:
        route_id: the route; it need not be there yet.
        target: what it is to lead to; `beside` finds nothing wrong with it.
        others: all models and routes.

    Returns:
        For each route the ids of the models that are its members.
    """
    then = _Then(route_id, target, others)
    found = {}
    for above_id in _above(route_id, then):
        if isinstance(leads := then.target_of(above_id), Ensemble):
            models = (only_model(member.target, then) for member in leads.members)
            found[above_id] = tuple(dict.fromkeys(model for model in models if model is not None))
    return found


def _no_member(link: Link, others: Others) -> str:
    """Why a link cannot be a member of an ensemble; empty if it can."""
    if only_model(link, others) is not None:
        return ""
    seen = list(_routes_below(link, others))
    why = next((text for each in seen if (text := _choice(others.target_of(each)))), "")
    if why == "" and any(others.target_of(each) is None for each in seen):
        return ""  # Which is told as what it is.
    return f"{link} leads to {why or 'more than one model'}: a member must be one model"


def _choice(target: Target | None) -> str:
    match target:
        case Split():
            return "a split"
        case Fallback():
            return "a fallback"
        case Versions(canary=canary) if canary is not None:
            return "versions with a canary"
        case Shadow():
            return "a shadow"
        case _:
            return ""


@dataclass(frozen=True, slots=True)
class _Then:
    """The others, as they would be with another target for one route."""

    route_id: str
    target: Target
    others: Others

    def has_model(self, model_id: str) -> bool:
        return self.others.has_model(model_id)

    def target_of(self, route_id: str) -> Target | None:
        return self.target if route_id == self.route_id else self.others.target_of(route_id)

    def leading_to(self, link: Link) -> Collection[str]:
        there = self.others.leading_to(link)
        leads = any(each == link for _, each in links_of(self.target))
        if leads == (self.route_id in there):
            return there
        rest = [each for each in there if each != self.route_id]
        return [*rest, self.route_id] if leads else rest


def _next(route_id: str, others: Others) -> Iterable[str]:
    """The routes that a route leads to at once."""
    target = others.target_of(route_id)
    if target is None:
        return ()
    return dict.fromkeys(link.id for _, link in links_of(target) if link.kind == "routes")


def _routes_below(link: Link, others: Others) -> Iterable[str]:
    """All routes that a link leads to, it included, nearest first."""
    found = dict.fromkeys([link.id] if link.kind == "routes" else [])
    todo = list(found)
    for route_id in todo:
        fresh = [each for each in _next(route_id, others) if each not in found]
        found.update(dict.fromkeys(fresh))
        todo += fresh
    return found


def _reaches(link: Link, route_id: str, others: Others) -> bool:
    return route_id in _routes_below(link, others)


def _way(start: str, end: str, others: Others) -> list[str] | None:
    """The shortest way from a route to another, both included; None if there is none."""
    came: dict[str, str | None] = {start: None}
    todo = [start]
    for route_id in todo:
        if route_id == end:
            way: list[str] = []
            step: str | None = route_id
            while step is not None:
                way.append(step)
                step = came[step]
            return way[::-1]
        for each in _next(route_id, others):
            if each not in came:
                came[each] = route_id
                todo.append(each)
    return None


def _depth(route_id: str, others: Others, known: dict[str, int]) -> int:
    """Most routes on a way that begins with a route.

    Below it may be a circle of others, in a file that is being checked: it is told of them.
    """
    if route_id not in known:
        known[route_id] = 0
        below = (_depth(each, others, known) for each in _next(route_id, others))
        known[route_id] = 1 + max(below, default=0)
    return known[route_id]


def _above(route_id: str, others: Others) -> dict[str, int]:
    """All routes that lead to a route, it included, with most routes on a way from each to it."""
    # By layers: a route is found again whenever a longer way to it is.
    found = {route_id: 1}
    layer: Iterable[str] = [route_id]
    for depth in range(2, DEEPEST + 2):
        layer = {each: None for below in layer for each in others.leading_to(Link("routes", below))}
        found.update(dict.fromkeys(layer, depth))
    return found
