"""Targets of routes as plain JSON, which is what the store and the configuration file hold. Pure.

The shape is that of the fields of modelyard.v1.Route: an object with one member, which is named as
the kind. Enums are their last word in lower case ("mean"). Of the kind "model" the value is the
model itself:

    {"model": "sentiment"}
    {"split": {"branches": [{"name": "a", "target": "models/m", "weight": 90},
                            {"name": "b", "target": "models/n", "weight": 10}]}}

Reading is strict. Whatever is not of its kind (a name that no field has, text for a number, a field
that is missing) is told at once, each with its path: "split.branches[1].weight". What a target that
can be read says is judged by `routing.checks`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final, TypeVar, assert_never, get_args

from modelyard_server.routing.targets import (
    KINDS,
    Branch,
    Canary,
    Combine,
    Ensemble,
    Fallback,
    Link,
    Member,
    One,
    Sequence,
    Shadow,
    Split,
    Step,
    Target,
    Transform,
    Version,
    Versions,
    kind_of,
)
from modelyard_server.runtimes.api import JsonValue

__all__ = ["Finding", "TargetError", "path_parts", "read_target", "target_to_json"]

Finding = tuple[str, str]
"""Where something is wrong, as a path of fields, and what."""

T = TypeVar("T")

_COMBINES: Final[tuple[Combine, ...]] = get_args(Combine)
_DEEPEST: Final = 16
# Parameters travel as google.protobuf.Struct, whose numbers are doubles.
_LARGEST_INTEGER: Final = 2**53
_SHOWN: Final = 64


class TargetError(ValueError):
    """What was to be a target is none.

    Attributes:
        findings: everything that is wrong with it.
    """

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("; ".join(f"{path}: {text}" if path else text for path, text in findings))


def read_target(value: object) -> Target:
    """A target from its JSON.

    Args:
        value: an object with one member, as the module says.

    Raises:
        TargetError: it is none, with everything that is wrong with it.
    """
    reader = _Reader()
    target = reader.target(value)
    if reader.findings or target is None:
        raise TargetError(reader.findings)
    return target


def target_to_json(target: Target) -> dict[str, JsonValue]:
    """The JSON of a target, which `read_target` takes. What has its default is left out."""
    return {kind_of(target): _value_of(target)}


def path_parts(path: str) -> tuple[str | int, ...]:
    """The parts of a finding's path, numbers for the places in arrays."""
    return tuple(
        name or int(place) for name, place in re.findall(r"([^.\[\]]+)|\[([0-9]+)\]", path)
    )


def _value_of(target: Target) -> JsonValue:
    match target:
        case One():
            return target.model
        case Split():
            return _without_defaults(
                branches=[
                    {"name": each.name, "target": str(each.target), "weight": each.weight}
                    for each in target.branches
                ],
                warm_tolerance=(target.warm_tolerance, 0.0),
                salt=(target.salt, ""),
            )
        case Sequence():
            return {"steps": [_step_value(step) for step in target.steps]}
        case Ensemble():
            return {
                "members": [
                    _without_defaults(
                        name=each.name, target=str(each.target), weight=(each.weight, 1.0)
                    )
                    for each in target.members
                ],
                "combine": target.combine,
            }
        case Shadow():
            return {
                "target": str(target.target),
                "shadow": str(target.shadow),
                "sample": target.sample,
            }
        case Fallback():
            return _without_defaults(
                targets=[str(link) for link in target.targets],
                prefer_warm=(target.prefer_warm, False),
            )
        case Versions(canary=canary):
            return _without_defaults(
                versions=[
                    {"name": each.name, "target": str(each.target)} for each in target.versions
                ],
                current=target.current,
                aliases=(dict(target.aliases), {}),
                canary=(
                    canary and {"version": canary.version, "percent": canary.percent},
                    None,
                ),
            )
        case _:
            assert_never(target)


def _step_value(step: Step) -> JsonValue:
    if isinstance(step.does, Link):
        return _without_defaults(
            name=(step.name, ""), target=str(step.does), rename=(dict(step.rename), {})
        )
    return _without_defaults(
        name=(step.name, ""),
        transform=_without_defaults(
            name=step.does.name, parameters=(dict(step.does.parameters), {})
        ),
        rename=(dict(step.rename), {}),
    )


def _without_defaults(**fields: JsonValue) -> dict[str, JsonValue]:
    """An object; of a pair the first is the value, which is left out if it is the second."""
    return {
        name: value[0] if isinstance(value, tuple) else value
        for name, value in fields.items()
        if not isinstance(value, tuple) or value[0] != value[1]
    }


_NOWHERE: Final = Link("models", "")
"""Stands for what could not be read, until that is told."""


class _Reader:
    """Reads one target, noting everything that is not of its kind."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def target(self, value: object) -> Target | None:
        table = self._table(value, "", optional=KINDS)
        if table is None:
            return None
        kinds = [kind for kind in KINDS if kind in table]
        if len(kinds) != 1:
            names = ", ".join(kinds) or "none"
            self._note("", f"must have exactly one of {', '.join(KINDS)}; there is {names}")
        if len(kinds) != 1 or self.findings:
            return None
        (kind,) = kinds
        if kind == "model":
            return One(self._model(table[kind]))
        readers: Mapping[str, Callable[[object, str], Target | None]] = {
            "split": self._split,
            "sequence": self._sequence,
            "ensemble": self._ensemble,
            "shadow": self._shadow,
            "fallback": self._fallback,
            "versions": self._versions,
        }
        return readers[kind](table[kind], kind)

    def _model(self, value: object) -> str:
        link = self._link(value, "model")
        if link.kind != "models":
            self._note("model", f'must be "models/{{model}}", got {_shown(value)}')
        return link.id

    def _split(self, value: object, path: str) -> Split | None:
        table = self._table(value, path, ("branches",), ("warm_tolerance", "salt"))
        return (
            None
            if table is None
            else Split(
                branches=self._array(table, path, "branches", self._branch),
                warm_tolerance=self._number(table, path, "warm_tolerance", 0.0),
                salt=self._text(table, path, "salt"),
            )
        )

    def _branch(self, value: object, path: str) -> Branch | None:
        table = self._table(value, path, ("name", "target", "weight"))
        return (
            None
            if table is None
            else Branch(
                name=self._text(table, path, "name"),
                target=self._link_in(table, path, "target"),
                weight=self._integer(table, path, "weight"),
            )
        )

    def _sequence(self, value: object, path: str) -> Sequence | None:
        table = self._table(value, path, ("steps",))
        return None if table is None else Sequence(self._array(table, path, "steps", self._step))

    def _step(self, value: object, path: str) -> Step | None:
        table = self._table(value, path, optional=("name", "target", "transform", "rename"))
        if table is None:
            return None
        if ("target" in table) == ("transform" in table):
            self._note(path, "must have either a target or a transform")
        does: Link | Transform = _NOWHERE
        if "transform" in table:
            does = self._transform(table["transform"], f"{path}.transform") or _NOWHERE
        elif "target" in table:
            does = self._link_in(table, path, "target")
        return Step(
            name=self._text(table, path, "name"),
            does=does,
            rename=self._texts(table, path, "rename"),
        )

    def _transform(self, value: object, path: str) -> Transform | None:
        table = self._table(value, path, ("name",), ("parameters",))
        if table is None:
            return None
        inner = f"{path}.parameters"
        parameters = self._object(table.get("parameters", {}), inner)
        return Transform(
            name=self._text(table, path, "name"),
            parameters=MappingProxyType(
                {key: self._plain(each, _join(inner, key), 1) for key, each in parameters.items()}
            ),
        )

    def _ensemble(self, value: object, path: str) -> Ensemble | None:
        table = self._table(value, path, ("members", "combine"))
        if table is None:
            return None
        members = self._array(table, path, "members", self._member)
        given = table.get("combine", "mean")
        combine = next((each for each in _COMBINES if each == given), None)
        if combine is None:
            text = f"must be one of {', '.join(_COMBINES)}, got {_shown(given)}"
            self._note(f"{path}.combine", text)
        return Ensemble(members, combine or "mean")

    def _member(self, value: object, path: str) -> Member | None:
        table = self._table(value, path, ("name", "target"), ("weight",))
        return (
            None
            if table is None
            else Member(
                name=self._text(table, path, "name"),
                target=self._link_in(table, path, "target"),
                weight=self._number(table, path, "weight", 1.0),
            )
        )

    def _shadow(self, value: object, path: str) -> Shadow | None:
        table = self._table(value, path, ("target", "shadow", "sample"))
        return (
            None
            if table is None
            else Shadow(
                target=self._link_in(table, path, "target"),
                shadow=self._link_in(table, path, "shadow"),
                sample=self._number(table, path, "sample", 1.0),
            )
        )

    def _fallback(self, value: object, path: str) -> Fallback | None:
        table = self._table(value, path, ("targets",), ("prefer_warm",))
        return (
            None
            if table is None
            else Fallback(
                targets=self._array(table, path, "targets", self._link),
                prefer_warm=self._boolean(table, path, "prefer_warm"),
            )
        )

    def _versions(self, value: object, path: str) -> Versions | None:
        table = self._table(value, path, ("versions", "current"), ("aliases", "canary"))
        return (
            None
            if table is None
            else Versions(
                versions=self._array(table, path, "versions", self._version),
                current=self._text(table, path, "current"),
                aliases=self._texts(table, path, "aliases"),
                canary=self._canary(table["canary"], f"{path}.canary")
                if "canary" in table
                else None,
            )
        )

    def _version(self, value: object, path: str) -> Version | None:
        table = self._table(value, path, ("name", "target"))
        return (
            None
            if table is None
            else Version(
                name=self._text(table, path, "name"), target=self._link_in(table, path, "target")
            )
        )

    def _canary(self, value: object, path: str) -> Canary | None:
        table = self._table(value, path, ("version", "percent"))
        return (
            None
            if table is None
            else Canary(
                version=self._text(table, path, "version"),
                percent=self._number(table, path, "percent", 0.0),
            )
        )

    # --- Values. What is missing has been noted by _table, and gets what does not matter. ---------

    def _table(
        self,
        value: object,
        path: str,
        required: Iterable[str] = (),
        optional: Iterable[str] = (),
    ) -> Mapping[str, object] | None:
        """An object with these members; None if it is none. What is wrong with it is noted."""
        if not isinstance(value, Mapping):
            self._note(path, f"must be an object, got {_kind(value)}")
            return None
        known = (*required, *optional)
        for name in value:
            if name not in known:
                self._note(_join(path, name), f"unknown field; known here: {', '.join(known)}")
        for name in required:
            if name not in value:
                self._note(_join(path, name), "is missing")
        return value

    def _array(
        self,
        table: Mapping[str, object],
        path: str,
        name: str,
        read: Callable[[object, str], T | None],
    ) -> tuple[T, ...]:
        value, path = table.get(name, []), f"{path}.{name}"
        if not isinstance(value, list | tuple):
            self._note(path, f"must be an array, got {_kind(value)}")
            return ()
        found = [read(each, f"{path}[{i}]") for i, each in enumerate(value)]
        return tuple(each for each in found if each is not None)

    def _object(self, value: object, path: str) -> Mapping[str, object]:
        """An object with any members."""
        if not isinstance(value, Mapping):
            self._note(path, f"must be an object, got {_kind(value)}")
            return {}
        for name in value:
            self._unicode(name, path)
        return value

    def _texts(self, table: Mapping[str, object], path: str, name: str) -> Mapping[str, str]:
        """An object whose members are all text."""
        path = f"{path}.{name}"
        members = self._object(table.get(name, {}), path)
        return MappingProxyType(
            {key: self._text(members, path, key, shown=_shown(key)) for key in members}
        )

    def _text(self, table: Mapping[str, object], path: str, name: str, *, shown: str = "") -> str:
        value, path = table.get(name, ""), f"{path}.{shown or name}"
        if not isinstance(value, str):
            self._note(path, f"must be text, got {_kind(value)}")
            return ""
        return self._unicode(value, path)

    def _unicode(self, text: str, path: str) -> str:
        """Text as it is. JSON can name halves of a surrogate pair, which nothing can send."""
        try:
            text.encode()
        except UnicodeEncodeError:
            self._note(path, "must be valid Unicode")
        return text

    def _number(self, table: Mapping[str, object], path: str, name: str, default: float) -> float:
        value = table.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._note(f"{path}.{name}", f"must be a number, got {_kind(value)}")
            return default
        if abs(value) > _LARGEST_INTEGER:
            self._note(f"{path}.{name}", "is out of range")
            return default
        return float(value)

    def _integer(self, table: Mapping[str, object], path: str, name: str) -> int:
        value = table.get(name, 0)
        # Exactly int: true is an int to Python.
        if type(value) is not int:
            self._note(f"{path}.{name}", f"must be an integer, got {_kind(value)}")
            return 0
        if abs(value) > _LARGEST_INTEGER:
            self._note(f"{path}.{name}", "is out of range")
            return 0
        return value

    def _boolean(self, table: Mapping[str, object], path: str, name: str) -> bool:
        value = table.get(name, False)
        if not isinstance(value, bool):
            self._note(f"{path}.{name}", f"must be true or false, got {_kind(value)}")
            return False
        return value

    def _link_in(self, table: Mapping[str, object], path: str, name: str) -> Link:
        return self._link(table[name], f"{path}.{name}") if name in table else _NOWHERE

    def _link(self, value: object, path: str) -> Link:
        if not isinstance(value, str):
            self._note(path, f"must be text, got {_kind(value)}")
            return _NOWHERE
        try:
            return Link.of(self._unicode(value, path))
        except ValueError:
            self._note(path, f'must be "models/{{model}}" or "routes/{{route}}", {_got(value)}')
            return _NOWHERE

    def _plain(self, value: object, path: str, depth: int) -> JsonValue:
        """A deep copy of a value, noting what google.protobuf.Struct cannot say."""
        if isinstance(value, Mapping | list | tuple) and depth >= _DEEPEST:
            self._note(path, f"must not be nested more than {_DEEPEST} deep")
            return None
        match value:
            case Mapping():
                members = self._object(value, path)
                return {
                    key: self._plain(each, _join(path, key), depth + 1)
                    for key, each in members.items()
                }
            case list() | tuple():
                return [
                    self._plain(each, f"{path}[{i}]", depth + 1) for i, each in enumerate(value)
                ]
            case float() if not math.isfinite(value):
                self._note(path, "must be a finite number")
            case int() if abs(value) > _LARGEST_INTEGER:
                self._note(path, "must be an integer of at most 2**53")
            case str():
                return self._unicode(value, path)
            case None | bool() | int() | float():
                return value
            case _:
                self._note(path, f"must be JSON, got {_kind(value)}")
        return None

    def _note(self, path: str, text: str) -> None:
        self.findings.append((path, text))


def _join(path: str, name: object) -> str:
    shown = name if isinstance(name, str) and len(name) <= _SHOWN else _shown(name)
    return f"{path}.{shown}" if path else f"{shown}"


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list() | tuple():
            return "an array"
        case Mapping():
            return "an object"
        case _:
            return f"a {type(value).__name__}"


def _got(value: object) -> str:
    return f"got {_shown(value)}" if value else "got nothing"


def _shown(value: object) -> str:
    """A value for an error's text: short, and without what cannot be printed."""
    if not isinstance(value, str):
        return _kind(value)
    return ascii(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}...")
