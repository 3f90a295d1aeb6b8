"""What keys mean, and how routes fit to each other and to models: ``[[routes]]``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from modelyard_server.config import rules
from modelyard_server.config.models import TASKS
from modelyard_server.config.problems import KeyPath, key_text, quoted
from modelyard_server.config.rules import Finding
from modelyard_server.config.sections import check, fields_of, ruled
from modelyard_server.routing.checks import beside, only_model
from modelyard_server.routing.step_types import known_signature, steps_that_do_not_meet
from modelyard_server.routing.target_json import path_parts
from modelyard_server.routing.targets import (
    KINDS,
    Ensemble,
    Fallback,
    Link,
    One,
    Shadow,
    Split,
    Target,
    Versions,
    links_of,
)
from modelyard_server.routing.targets import Sequence as SequenceTarget
from modelyard_server.runtimes.signature import Signature

__all__ = ["RouteConfig", "route_conflicts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteConfig:
    """What keys mean: ``[[routes]]``. Exactly one of the kinds is set.

    Raises:
        ValueError: a field breaks its rule, or there is no key, or not one kind.
    """

    id: str = field(metadata=ruled(rules.identifier))
    """Its id, which is no key."""
    keys: tuple[str, ...] = field(default=(), metadata=ruled(rules.route_keys))
    """The keys, at least one unless there are prefixes. One that is listed twice counts once."""
    prefixes: tuple[str, ...] = field(default=(), metadata=ruled(rules.route_prefixes))
    """Beginnings of keys; "" is one of every key. One that is listed twice counts once."""
    model: str | None = field(default=None, metadata=ruled(rules.identifier))
    """Id of the model that they mean; one of ``[models]``, as what the other kinds lead to is."""
    split: Split | None = field(default=None, metadata=ruled(rules.target("split")))
    """They mean one of several, by weight."""
    sequence: SequenceTarget | None = field(default=None, metadata=ruled(rules.target("sequence")))
    """They mean several, one after the other."""
    ensemble: Ensemble | None = field(default=None, metadata=ruled(rules.target("ensemble")))
    """They mean all of several, combined."""
    shadow: Shadow | None = field(default=None, metadata=ruled(rules.target("shadow")))
    """They mean one, and another is tried."""
    fallback: Fallback | None = field(default=None, metadata=ruled(rules.target("fallback")))
    """They mean the first of several that can answer in time."""
    versions: Versions | None = field(default=None, metadata=ruled(rules.target("versions")))
    """They mean one of several versions."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def target(self) -> Target:
        """What its keys mean."""
        target = _target_of(fields_of(self))
        assert target is not None  # It has been checked that there is one.
        return target

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Finding]:
        """See ``Section``."""
        if not given.get("keys", True) and not given.get("prefixes", True):
            yield ("keys",), "must hold at least one key, or there must be prefixes"
        kinds = [kind for kind in KINDS if given.get(kind) is not None]
        broken = any(kind not in given for kind in KINDS)
        if len(kinds) > 1:
            yield (kinds[1],), f"is a second meaning beside {kinds[0]}: make it a route of its own"
        elif not kinds and not broken:
            yield (), f"means nothing: give it one of {', '.join(KINDS)}"


def route_conflicts(
    routes: Sequence[Mapping[str, Any]], models: Mapping[str, Mapping[str, Any]]
) -> Iterator[Finding]:
    """Yield what is wrong between routes, and between them and models, that are each right.

    Args:
        routes: for each route the fields that passed their rules, by name.
        models: as ``plan_conflicts`` takes them.
    """
    ids: dict[str, int] = {}
    owners: dict[str, KeyPath] = {key: ("models", key) for key in models}
    for model_id, given in models.items():
        for key in given.get("keys", ()):
            owners.setdefault(key, ("models", model_id))
    prefixes: dict[str, KeyPath] = {}
    for index, given in enumerate(routes):
        here: KeyPath = ("routes", index)
        if "id" in given and (first := ids.setdefault(given["id"], index)) != index:
            yield (
                (*here, "id"),
                f"{quoted(given['id'])} is the id of {key_text(('routes', first))} already",
            )
        for name, taken in (("keys", owners), ("prefixes", prefixes)):
            for position, key in enumerate(given.get(name, ())):
                if key is not None and (other := taken.setdefault(key, here)) != here:
                    what = "key" if name == "keys" else "prefix"
                    yield (
                        (*here, name, position),
                        f"{quoted(key)} is a {what} of {key_text(other)} already",
                    )
    yield from _link_conflicts(routes, models, ids)


def _link_conflicts(
    routes: Sequence[Mapping[str, Any]],
    models: Mapping[str, Mapping[str, Any]],
    ids: Mapping[str, int],
) -> Iterator[Finding]:
    """Yield what is wrong between what routes lead to."""
    declared = _Declared(models, {name: _target_of(routes[index]) for name, index in ids.items()})
    for index, given in enumerate(routes):
        here: KeyPath = ("routes", index)
        target = _target_of(given)
        if target is None:
            continue
        for path, link in links_of(target):
            there: Collection[str] = models if link.kind == "models" else ids
            if link.id not in there:
                known = ", ".join(sorted(there)) or "none"
                yield (
                    # That of a model is its value itself.
                    (*here, *path_parts(path.removeprefix("model."))),
                    f"{quoted(link.id)} is not in [{link.kind}] (there: {known})",
                )
        if ids.get(given.get("id", "")) != index:
            continue  # Nobody knows which of two routes of one name another one means.
        findings = beside(given["id"], target, declared)
        if isinstance(target, SequenceTarget):
            findings += steps_that_do_not_meet(target, declared.signature_of)
        for path, text in findings:
            if path != "target":  # That is told of the other route, too.
                yield (*here, *path_parts(path)), text


class _Declared:
    """The models and routes of a file, for what is checked between them."""

    def __init__(
        self, models: Mapping[str, Mapping[str, Any]], targets: Mapping[str, Target | None]
    ) -> None:
        self._models = models
        self._targets = targets
        self._leading: dict[Link, list[str]] = {}
        for name, target in targets.items():
            for _, link in () if target is None else links_of(target):
                self._leading.setdefault(link, []).append(name)

    def has_model(self, model_id: str) -> bool:
        return model_id in self._models

    def target_of(self, route_id: str) -> Target | None:
        return self._targets.get(route_id)

    def leading_to(self, link: Link) -> Collection[str]:
        return self._leading.get(link, ())

    def signature_of(self, link: Link) -> Signature | None:
        given = self._models.get(only_model(link, self) or "", {})
        runtime, task = given.get("runtime", ""), given.get("task") or ""
        if task not in TASKS.get(runtime, ()):
            return None
        return known_signature(runtime, task, given.get("options", {}))


def _target_of(given: Mapping[str, Any]) -> Target | None:
    """What the fields of a route say that it leads to; None if that is not known."""
    kind = next((kind for kind in KINDS if given.get(kind) is not None), None)
    if kind is None:
        return None
    return One(given[kind]) if kind == "model" else cast("Target", given[kind])
