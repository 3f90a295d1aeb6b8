"""What a key means, and what a request for it is to do. Pure.

`resolve` finds the model or route of a key. `plan_of` makes the choices of a route for one request:
what is left is a plan, which says what is to be run, in which order, and what becomes of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, assert_never

from modelyard_server.catalog.model import Model, is_key
from modelyard_server.catalog.route import Route
from modelyard_server.catalog.route_view import RouteView
from modelyard_server.errors import Reason, Refusal, Resource, Violation
from modelyard_server.routing.affinity import choose
from modelyard_server.routing.balance import Balance
from modelyard_server.routing.checks import DEEPEST
from modelyard_server.routing.targets import (
    Combine,
    Ensemble,
    Fallback,
    Link,
    One,
    Sequence,
    Shadow,
    Split,
    Target,
    Transform,
    Version,
    Versions,
)

__all__ = [
    "Absent",
    "Beside",
    "Chain",
    "Group",
    "Part",
    "Plan",
    "Run",
    "Try",
    "plan_of",
    "resolve",
    "runs_of",
]

_CANARY: Final = "canary"
_CURRENT: Final = "current"


# --- Plans ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """Runs a model.

    Attributes:
        model: which.
        branch: the names of the routes' parts that led to it, with "/" between.
        version: the version that was chosen on the way; empty if none was.
    """

    model: Model
    branch: str
    version: str


@dataclass(frozen=True, slots=True)
class Absent:
    """What a route leads to is not there.

    Attributes:
        refusal: of whoever asks for it.
        branch: as of a run.
    """

    refusal: Refusal
    branch: str


@dataclass(frozen=True, slots=True)
class Part:
    """A step of a chain or a member of a group.

    Attributes:
        name: what errors call it.
        does: what it does; a transformation only in a chain.
        rename: what outputs of the step before are called for this one; empty for as they are.
        weight: of a member.
    """

    name: str
    does: Plan | Transform
    rename: Mapping[str, str]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Chain:
    """One step after the other.

    Attributes:
        steps: at least one.
    """

    steps: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Several at once.

    Attributes:
        members: at least two.
        combine: how their answers become one.
    """

    members: tuple[Part, ...]
    combine: Combine


@dataclass(frozen=True, slots=True)
class Try:
    """The first that can answer.

    Attributes:
        options: at least one.
        prefer_warm: one whose models are resident is asked first.
        drawn: only one of them is asked at all, and which is not known yet.
    """

    options: tuple[Plan, ...]
    prefer_warm: bool = False
    drawn: bool = False


@dataclass(frozen=True, slots=True)
class Beside:
    """One that answers, and one that is tried beside it.

    Attributes:
        answer: what answers.
        shadow: what is tried, if this request is one to try it with.
    """

    answer: Plan
    shadow: Run | None


Plan = Run | Absent | Chain | Group | Try | Beside
"""What a request is to do, when all choices are made."""


def runs_of(plan: Plan) -> Iterator[Run]:
    """The models that a plan may run before it answers, in its order."""
    match plan:
        case Run():
            yield plan
        case Absent():
            pass
        case Chain(parts) | Group(parts, _):
            for part in parts:
                if not isinstance(part.does, Transform):
                    yield from runs_of(part.does)
        case Try():
            for option in plan.options:
                yield from runs_of(option)
        case Beside():
            yield from runs_of(plan.answer)
        case _:
            assert_never(plan)


# --- Keys -----------------------------------------------------------------------------------------


def resolve(table: Mapping[str, Model], routes: RouteView, key: str) -> Model | Route:
    """What a key means.

    Args:
        table: what each key means that means one model.
        routes: what all others mean.
        key: what the client asks for.

    Raises:
        Refusal: KEY_NOT_FOUND, or INVALID_FIELD for what can be no key.
    """
    model = table.get(key)
    if model is not None:
        return model
    if not is_key(key):
        text = "must match [A-Za-z0-9][A-Za-z0-9._:/-]{0,255} and hold no '..'"
        raise Refusal(Reason.INVALID_FIELD, f"key: {text}", violations=(Violation("key", text),))
    route = routes.routed(key)
    if route is not None:
        if not isinstance(route.target, One):
            return route
        try:
            return routes.get(route.target.model)
        except Refusal:
            pass  # Its model is gone, and its keys mean nothing.
    shown = key if len(key) <= 64 else f"{key[:61]}..."
    raise Refusal(
        Reason.KEY_NOT_FOUND,
        f"no model goes by the key {shown!r}",
        resource=Resource("key", shown),
    )


# --- Choices --------------------------------------------------------------------------------------


def plan_of(
    routes: RouteView,
    route: Route,
    *,
    affinity: str = "",
    version: str = "",
    is_resident: Callable[[Model], bool],
    balance_of: Callable[[str, Split], Balance],
    draw: Callable[[], str] | None = lambda: f"{random.getrandbits(64):x}",
) -> Plan:
    """What a request for a route is to do.

    Args:
        routes: the routes and models there are.
        route: the route that its key means.
        affinity: what choices go by; empty for none: each choice is drawn.
        version: the version or alias that is meant; empty for the current one.
        is_resident: whether a model is resident now.
        balance_of: what the branches of a split have had, by the route's id and the split. Choices
            that go by no affinity are noted there.
        draw: gives an affinity to a request that has none. None: what would be drawn is left open,
            and the plan has every branch; see Try.drawn.

    Raises:
        Refusal: INVALID_FIELD: there is no such version, or nothing has versions.
    """
    chooser = _Chooser(routes, affinity, version, is_resident, balance_of, draw)
    plan = chooser.of_target(route.id, route.target, "", "", DEEPEST)
    if version and not chooser.version_used:
        raise _no_version(version, f"routes/{route.id} has no versions")
    return plan


@dataclass(slots=True)
class _Chooser:
    routes: RouteView
    affinity: str
    version: str
    is_resident: Callable[[Model], bool]
    balance_of: Callable[[str, Split], Balance]
    draw: Callable[[], str] | None
    version_used: bool = False

    def of_target(self, route: str, target: Target, branch: str, version: str, depth: int) -> Plan:
        """The plan of a route's target.

        Args:
            route: id of the route.
            target: what it means.
            branch: how it was come here.
            version: that was chosen on the way.
            depth: how many routes it may still lead through.
        """

        def follow(link: Link, name: str, chosen: str = version) -> Plan:
            return self.of_link(link, f"{branch}/{name}".strip("/"), chosen, depth)

        match target:
            case One():
                return follow(Link("models", target.model), "")
            case Split():
                return self._of_split(route, target, follow)
            case Sequence():
                steps = []
                for i, step in enumerate(target.steps):
                    name = step.name or str(i)
                    does = (
                        step.does if isinstance(step.does, Transform) else follow(step.does, name)
                    )
                    steps.append(Part(name, does, step.rename))
                return Chain(tuple(steps))
            case Ensemble():
                members = tuple(
                    Part(each.name, follow(each.target, each.name), {}, each.weight)
                    for each in target.members
                )
                return Group(members, target.combine)
            case Shadow():
                shadow: Plan | None = None
                odds = [("tried", target.sample), ("left", 1.0 - target.sample)]
                if (affinity := self._affinity()) is None or choose(route, odds, affinity) == 0:
                    shadow = follow(target.shadow, "shadow")
                return Beside(
                    follow(target.target, ""), shadow if isinstance(shadow, Run) else None
                )
            case Fallback():
                options = tuple(follow(link, link.id) for link in target.targets)
                return Try(options, target.prefer_warm)
            case Versions():
                return self._of_versions(route, target, follow)
            case _:
                assert_never(target)

    def of_link(self, link: Link, branch: str, version: str, depth: int) -> Plan:
        """The plan of what a target leads to."""
        try:
            if link.kind == "models":
                return Run(self.routes.get(link.id), branch, version)
            route = self.routes.get_route(link.id)
        except Refusal as refusal:
            return Absent(refusal, branch)
        if depth <= 1:  # Checked when routes are registered; what is in a file may be older.
            text = f"routes/{route.id}: routes lead to one another more than {DEEPEST} deep"
            return Absent(Refusal(Reason.ROUTE_NOT_FOUND, text), branch)
        return self.of_target(route.id, route.target, branch, version, depth - 1)

    def _of_split(self, route: str, split: Split, follow: Callable[[Link, str], Plan]) -> Plan:
        weights = [(branch.name, float(branch.weight)) for branch in split.branches]
        affinity = self._affinity()
        if affinity is None:
            options = [follow(each.target, each.name) for each in split.branches if each.weight]
            return Try(tuple(options), drawn=True)
        position = choose(split.salt or route, weights, affinity)
        if not self.affinity and split.warm_tolerance > 0:
            balance = self.balance_of(route, split)
            if not self._is_warm(follow, split, position):
                warm = [
                    i
                    for i, branch in enumerate(split.branches)
                    if i != position and branch.weight and self._is_warm(follow, split, i)
                ]
                position = balance.instead_of(position, warm)
            balance.note(position)
        branch = split.branches[position]
        return follow(branch.target, branch.name)

    def _is_warm(self, follow: Callable[[Link, str], Plan], split: Split, position: int) -> bool:
        branch = split.branches[position]
        runs = list(runs_of(follow(branch.target, branch.name)))
        return bool(runs) and all(self.is_resident(run.model) for run in runs)

    def _of_versions(
        self, route: str, versions: Versions, follow: Callable[[Link, str, str], Plan]
    ) -> Plan:
        wanted = versions.current
        if self.version and not self.version_used:
            wanted = self.version
            self.version_used = True
        elif versions.canary is not None:
            share = versions.canary.percent
            odds = [(_CURRENT, 100.0 - share), (_CANARY, share)]
            affinity = self._affinity()
            if affinity is None and 0.0 < share < 100.0:
                both = [
                    self._found(versions, wanted),
                    self._found(versions, versions.canary.version),
                ]
                options = [follow(each.target, "", each.name) for each in both]
                return Try(tuple(options), drawn=True)
            if choose(route, odds, affinity or "") == 1:
                wanted = versions.canary.version
        found = self._found(versions, wanted)
        return follow(found.target, "", found.name)

    @staticmethod
    def _found(versions: Versions, name: str) -> Version:
        found = versions.find(name)
        if found is None:
            known = ", ".join(version.name for version in versions.versions)
            raise _no_version(name, f"there are {known}")
        return found

    def _affinity(self) -> str | None:
        """What a choice goes by; None if it is left open."""
        if self.affinity:
            return self.affinity
        return None if self.draw is None else self.draw()


def _no_version(version: str, why: str) -> Refusal:
    shown = version if len(version) <= 64 else f"{version[:61]}..."
    text = f"there is no version {shown!r}: {why}"
    return Refusal(
        Reason.INVALID_FIELD, f"version: {text}", violations=(Violation("version", text),)
    )
