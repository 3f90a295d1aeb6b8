"""What the keys of a route can mean: the kinds of targets, as values.

What each kind promises is in docs/routes.md. What a target leads to is a resource name,
``models/{model}`` or ``routes/{route}``; a bare id is a model's. What a target says is judged by
the server, which tells everything that is wrong with it at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeAlias

from modelyard._names import link_name

__all__ = [
    "Branch",
    "Canary",
    "Combine",
    "EnsembleTarget",
    "FallbackTarget",
    "Member",
    "ModelTarget",
    "RouteTarget",
    "SequenceStep",
    "SequenceTarget",
    "ShadowTarget",
    "SplitTarget",
    "Transform",
    "Version",
    "VersionsTarget",
]


class Combine(Enum):
    """How the answers of an ensemble become one."""

    UNKNOWN = "unknown"
    """A way this version does not know."""
    MEAN = "mean"
    """The weighted mean of floating outputs of one name and shape."""
    VOTE = "vote"
    """Of each row the value that has most votes, by weight."""
    CONCAT = "concat"
    """Outputs of one name behind one another, along the last dimension."""
    ALL = "all"
    """All outputs, as ``{member}.{output}``."""

    def __str__(self) -> str:
        return self.value


class _Kind:
    """What all kinds of targets can do."""

    __slots__ = ()

    kind: ClassVar[str]
    """Name of the kind."""

    def to_dict(self) -> dict[str, Any]:
        """Return the target as the configuration file has it, in its table: ``{kind: {...}}``."""
        return {self.kind: _plain(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTarget(_Kind):
    """Every key means one model.

    Args:
        model: which.

    Raises:
        TypeError: no str.
    """

    kind: ClassVar[str] = "model"

    model: str

    def __post_init__(self) -> None:
        _set_links(self, "model")

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"model": ...}``, as the configuration file has it."""
        return {self.kind: self.model}


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A branch of a split.

    Args:
        name: what answers and statistics call it. Goes into the choice.
        target: what answers.
        weight: its part of the sum of all weights, 0 to 1,000,000.

    Raises:
        TypeError: the target is no str.
    """

    name: str
    target: str
    weight: int

    def __post_init__(self) -> None:
        _set_links(self, "target")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitTarget(_Kind):
    """A request goes to one branch, by weight; the same affinity to the same one.

    Args:
        branches: which, 2 to 64.
        warm_tolerance: how far from its weight a branch may get because it is resident, as a share
            of the requests without affinity, 0 to 1.
        salt: goes into the choice; empty means the route's id.

    Raises:
        TypeError: what is to be a sequence is none.
    """

    kind: ClassVar[str] = "split"

    branches: Sequence[Branch]
    warm_tolerance: float = 0.0
    salt: str = ""

    def __post_init__(self) -> None:
        _set_tuple(self, "branches")

    @classmethod
    def by_weight(cls, weights: Mapping[str, int]) -> Self:
        """Return a split over models, or routes, by their weights.

        Args:
            weights: what answers, and its weight. A branch is named as the id.
        """
        return cls(
            branches=tuple(
                Branch(name=_id_of(target), target=target, weight=weight)
                for target, weight in weights.items()
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """A transformation that the server has.

    Args:
        name: which; ``pooling``, ``top_k``, ``label_to_text``, ``template``.
        parameters: how.

    Raises:
        TypeError: the parameters are no mapping.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _set_mapping(self, "parameters")


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceStep:
    """A step of a sequence: a target or a transform.

    Args:
        target: what runs; None for a transform.
        transform: what makes other tensors out of the tensors; None for a target.
        name: what errors call it; empty means its position.
        rename: what outputs of the step before are called for this one; ``{"": name}`` where there
            is one. Those that are not named are left out; empty leaves all as they are.

    Raises:
        TypeError: the target is no str, or the names are no mapping.
        ValueError: neither target nor transform, or both.
    """

    target: str | None = None
    transform: Transform | None = None
    name: str = ""
    rename: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if (self.target is None) == (self.transform is None):
            raise ValueError("a step has either a target or a transform")
        if self.target is not None:
            _set_links(self, "target")
        _set_mapping(self, "rename")


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTarget(_Kind):
    """Each step gets the outputs of the one before; the last one's are the answer.

    Args:
        steps: which, 1 to 16.

    Raises:
        TypeError: what is to be a sequence is none.
    """

    kind: ClassVar[str] = "sequence"

    steps: Sequence[SequenceStep]

    def __post_init__(self) -> None:
        _set_tuple(self, "steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A member of an ensemble.

    Args:
        name: what answers and errors call it.
        target: what answers: one model, without choice.
        weight: of its answer in a mean or vote, above 0.

    Raises:
        TypeError: the target is no str.
    """

    name: str
    target: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        _set_links(self, "target")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleTarget(_Kind):
    """Every member answers, and the answers become one.

    Args:
        members: which, 2 to 16.
        combine: how.

    Raises:
        TypeError: what is to be a sequence is none.
        ValueError: no ``Combine``.
    """

    kind: ClassVar[str] = "ensemble"

    members: Sequence[Member]
    combine: Combine

    def __post_init__(self) -> None:
        _set_tuple(self, "members")
        object.__setattr__(self, "combine", Combine(self.combine))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowTarget(_Kind):
    """One target answers; a model is only tried, on some of the same requests.

    Args:
        target: what answers.
        shadow: the model that is tried.
        sample: the share of requests that it gets, above 0, at most 1.

    Raises:
        TypeError: a name is no str.
    """

    kind: ClassVar[str] = "shadow"

    target: str
    shadow: str
    sample: float

    def __post_init__(self) -> None:
        _set_links(self, "target", "shadow")


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackTarget(_Kind):
    """The first of several that can answer in time.

    Args:
        targets: who is asked, in this order, 2 to 16.
        prefer_warm: before anybody is waited for, the first that is resident is taken.

    Raises:
        TypeError: what is to be a sequence is none, or a name is no str.
    """

    kind: ClassVar[str] = "fallback"

    targets: Sequence[str]
    prefer_warm: bool = False

    def __post_init__(self) -> None:
        _set_tuple(self, "targets")
        object.__setattr__(self, "targets", tuple(map(link_name, self.targets)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A version.

    Args:
        name: what it is called.
        target: what answers.

    Raises:
        TypeError: the target is no str.
    """

    name: str
    target: str

    def __post_init__(self) -> None:
        _set_links(self, "target")


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A version on trial.

    Args:
        version: a version or alias.
        percent: the share of requests without a version that it gets, 0 to 100.
    """

    version: str
    percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionsTarget(_Kind):
    """Versions of one thing, one of which a key means at a time.

    Args:
        versions: which, 1 to 64.
        current: a version or alias: what a key means.
        aliases: other names for versions.
        canary: a version on trial.

    Raises:
        TypeError: what is to be a sequence or mapping is none.
    """

    kind: ClassVar[str] = "versions"

    versions: Sequence[Version]
    current: str
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False)
    canary: Canary | None = None

    def __post_init__(self) -> None:
        _set_tuple(self, "versions")
        _set_mapping(self, "aliases")

    @classmethod
    def of(cls, versions: Mapping[str, str], *, current: str) -> Self:
        """Return versions by their names.

        Args:
            versions: the names, and what answers.
            current: which of them a key means.
        """
        return cls(
            versions=tuple(Version(name=name, target=target) for name, target in versions.items()),
            current=current,
        )


RouteTarget: TypeAlias = (
    ModelTarget
    | SplitTarget
    | SequenceTarget
    | EnsembleTarget
    | ShadowTarget
    | FallbackTarget
    | VersionsTarget
)
"""What the keys of a route mean."""


def _set_links(value: Any, *names: str) -> None:
    for name in names:
        object.__setattr__(value, name, link_name(getattr(value, name)))


def _set_tuple(value: Any, name: str) -> None:
    given = getattr(value, name)
    # A str is a sequence too, and would become one part per letter.
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{name} must be a list, got a {type(given).__name__}")
    object.__setattr__(value, name, tuple(given))


def _set_mapping(value: Any, name: str) -> None:
    given = getattr(value, name)
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a mapping, got a {type(given).__name__}")
    object.__setattr__(value, name, MappingProxyType(dict(given)))


def _id_of(target: str) -> str:
    return link_name(target).rpartition("/")[2]


def _plain(value: Any) -> Any:
    """A value's fields as JSON has them; what has its default is left out."""
    match value:
        case Mapping():
            return {key: _plain(each) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
        case Enum():
            return str(value)
        case None | bool() | int() | float() | str():
            return value
    given = ((each, getattr(value, each.name)) for each in fields(value))
    return {each.name: _plain(part) for each, part in given if part != _default_of(each)}


def _default_of(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()
