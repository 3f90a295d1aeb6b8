"""What a route's keys can mean: the kinds of targets, as plain values. Pure.

modelyard.v1.Route says what each kind promises. What is here has been checked to be of its kind (a
weight is a number, a branch has a name); what a target says in itself and beside others is judged
by `routing.checks`, so that every violation is told at once.

A target names what it leads to by a resource name, "models/{id}" or "routes/{id}"; see Link.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal, Self, assert_never

from modelyard_server.runtimes.api import JsonValue

__all__ = [
    "KINDS",
    "Branch",
    "Canary",
    "Combine",
    "Ensemble",
    "Fallback",
    "Link",
    "Member",
    "One",
    "Sequence",
    "Shadow",
    "Split",
    "Step",
    "Target",
    "Transform",
    "Version",
    "Versions",
    "kind_of",
    "links_of",
    "single_model",
]

Combine = Literal["mean", "vote", "concat", "all"]
"""How the answers of an ensemble become one."""


@dataclass(frozen=True, slots=True, order=True)
class Link:
    """What a target leads to: a model or a route.

    Attributes:
        kind: which of them.
        id: of the model or route.
    """

    kind: Literal["models", "routes"]
    id: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.id}"

    @classmethod
    def of(cls, name: str) -> Self:
        """The link of a resource name; a bare id is a model's.

        Raises:
            ValueError: it is no name of a model or route.
        """
        kind, slash, rest = name.partition("/")
        if not slash:
            kind, rest = "models", name
        if kind == "models" and rest:
            return cls("models", rest)
        if kind == "routes" and rest:
            return cls("routes", rest)
        raise ValueError(f'must be "models/{{model}}" or "routes/{{route}}", got {name!r}')


@dataclass(frozen=True, slots=True)
class One:
    """Every key means one model.

    Attributes:
        model: the model's id.
    """

    model: str


@dataclass(frozen=True, slots=True)
class Branch:
    """A branch of a split.

    Attributes:
        name: what answers call it; goes into the choice.
        target: what answers.
        weight: its part of the sum of all weights.
    """

    name: str
    target: Link
    weight: int


@dataclass(frozen=True, slots=True)
class Split:
    """A request goes to one branch, by weight.

    Attributes:
        branches: which.
        warm_tolerance: how far from its weight, as a share of requests, a branch may get because it
            is resident and others are not.
        salt: goes into the choice; empty means the route's id.
    """

    branches: tuple[Branch, ...]
    warm_tolerance: float = 0.0
    salt: str = ""


@dataclass(frozen=True, slots=True)
class Transform:
    """A registered transformation, with how.

    Attributes:
        name: of the transformation.
        parameters: how.
    """

    name: str
    parameters: Mapping[str, JsonValue] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a sequence.

    Attributes:
        name: what errors call it; empty means its position.
        does: what it does.
        rename: what outputs of the step before are called for this one; empty leaves them alone.
    """

    name: str
    does: Link | Transform
    rename: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Sequence:
    """Each step gets the outputs of the one before.

    Attributes:
        steps: in their order.
    """

    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Member:
    """A member of an ensemble.

    Attributes:
        name: what answers and errors call it.
        target: what answers.
        weight: of its answer in a mean or vote.
    """

    name: str
    target: Link
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Every member answers, and the answers become one.

    Attributes:
        members: which.
        combine: how.
    """

    members: tuple[Member, ...]
    combine: Combine


@dataclass(frozen=True, slots=True)
class Shadow:
    """One answers, another is only tried.

    Attributes:
        target: what answers.
        shadow: the model that is tried.
        sample: the share of requests that it gets.
    """

    target: Link
    shadow: Link
    sample: float


@dataclass(frozen=True, slots=True)
class Fallback:
    """The first that can answer in time.

    Attributes:
        targets: who is asked, in this order.
        prefer_warm: nobody is waited for while one of them is resident.
    """

    targets: tuple[Link, ...]
    prefer_warm: bool = False


@dataclass(frozen=True, slots=True)
class Version:
    """A version.

    Attributes:
        name: what it is called.
        target: what answers.
    """

    name: str
    target: Link


@dataclass(frozen=True, slots=True)
class Canary:
    """A version on trial.

    Attributes:
        version: a version or alias.
        percent: the share of requests that it gets, of those that name no version.
    """

    version: str
    percent: float


@dataclass(frozen=True, slots=True)
class Versions:
    """Versions of one thing, one of which a key means at a time.

    Attributes:
        versions: which.
        current: a version or alias: what a key means.
        aliases: other names for versions.
        canary: a version on trial; None for none.
    """

    versions: tuple[Version, ...]
    current: str
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    canary: Canary | None = None

    def find(self, name: str) -> Version | None:
        """The version of a name or alias; None if there is none."""
        wanted = self.aliases.get(name, name)
        return next((version for version in self.versions if version.name == wanted), None)


Target = One | Split | Sequence | Ensemble | Shadow | Fallback | Versions
"""What a route's keys mean."""

KINDS: Final[Mapping[str, type[Target]]] = MappingProxyType(
    {
        "model": One,
        "split": Split,
        "sequence": Sequence,
        "ensemble": Ensemble,
        "shadow": Shadow,
        "fallback": Fallback,
        "versions": Versions,
    }
)
"""The kinds by name, which is that of the field of modelyard.v1.Route."""


def kind_of(target: Target) -> str:
    """The name of a target's kind."""
    return next(name for name, kind in KINDS.items() if isinstance(target, kind))


def single_model(target: Target) -> str | None:
    """Id of the model that is all a target means; None if it means anything else."""
    return target.model if isinstance(target, One) else None


def links_of(target: Target) -> Iterator[tuple[str, Link]]:
    """Everything a target leads to, each with the path of its field in modelyard.v1.Route."""
    match target:
        case One():
            yield "model.model", Link("models", target.model)
        case Split():
            for i, branch in enumerate(target.branches):
                yield f"split.branches[{i}].target", branch.target
        case Sequence():
            for i, step in enumerate(target.steps):
                if isinstance(step.does, Link):
                    yield f"sequence.steps[{i}].target", step.does
        case Ensemble():
            for i, member in enumerate(target.members):
                yield f"ensemble.members[{i}].target", member.target
        case Shadow():
            yield "shadow.target", target.target
            yield "shadow.shadow", target.shadow
        case Fallback():
            for i, link in enumerate(target.targets):
                yield f"fallback.targets[{i}]", link
        case Versions():
            for i, version in enumerate(target.versions):
                yield f"versions.versions[{i}].target", version.target
        case _:
            assert_never(target)
