"""Which of many keys means which target: an immutable table, and the ways to make the next one.

Made from mappings of many keys to one target. The keys of a mapping are a *cohort*, and its first
key is the cohort's id. The rules are those of Beam's keyed models where theirs are right
(tests/conformance has them case by case), and these where they are not:

* A key that is given twice in one mapping is taken once, and a warning says so. In two mappings it
  is an error that names the key and both targets.
* A bare string is no list of keys.
* An update says what changes; what it does not name stays. Keys are added and removed while the
  table is in use: who reads an older table reads on undisturbed.

Keys are any hashable values, told apart as a dict tells them apart: 1 and True are one key. Over
gRPC keys are strings; the contract says which.

A table costs its size when it is made, and one look-up of a dict when it is asked. Immutable, so
it may be shared between threads.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, TypeVar

__all__ = ["Cohort", "KeyChange", "KeyMapping", "KeyTable", "KeyUpdate", "Updated"]

TargetT = TypeVar("TargetT", bound=Hashable)


@dataclass(frozen=True, slots=True)
class KeyMapping(Generic[TargetT]):
    """Keys that mean one target.

    Args:
        keys: at least one, in order; the first is the cohort's id.
        target: what they mean; None cannot be one.

    Raises:
        TypeError: the keys are a bare string, or no sequence, or one cannot be hashed; the target
            is None.
        ValueError: there is no key.
    """

    keys: Sequence[Hashable]
    target: TargetT

    def __post_init__(self) -> None:
        if self.target is None:
            raise TypeError(f"keys {self.keys!r} need a target, got None")
        object.__setattr__(self, "keys", _checked_keys(self.keys, self.target))


@dataclass(frozen=True, slots=True)
class Cohort(Generic[TargetT]):
    """Keys of a table that mean the same by one mapping.

    Attributes:
        id: one of the keys, the first when the cohort was made.
        keys: all of them, in order.
        target: what they mean.
    """

    id: Hashable
    keys: tuple[Hashable, ...]
    target: TargetT


@dataclass(frozen=True, slots=True)
class KeyChange(Generic[TargetT]):
    """What became of a key from one table to the next.

    Attributes:
        key: the key.
        before: what it meant; None: nothing.
        after: what it means; None: nothing.
    """

    key: Hashable
    before: TargetT | None
    after: TargetT | None


@dataclass(frozen=True, slots=True)
class KeyUpdate(Generic[TargetT]):
    """A cohort that an update gave a target.

    Attributes:
        cohort: id of the cohort, as it is now.
        target: what it means now.
        origin: id of the cohort its keys were in before; the cohort's own id if it was not split.
    """

    cohort: Hashable
    target: TargetT
    origin: Hashable


@dataclass(frozen=True, slots=True, kw_only=True)
class Updated(Generic[TargetT]):
    """The next table, and what is different in it.

    Attributes:
        table: the next table.
        changes: keys that mean something else than before, in the order in which they were named.
        updates: the cohorts that an update named, by their origin in the table's order.
    """

    table: KeyTable[TargetT]
    changes: tuple[KeyChange[TargetT], ...] = ()
    updates: tuple[KeyUpdate[TargetT], ...] = ()


class KeyTable(Generic[TargetT]):
    """An immutable table from keys to targets. Make one with `of` or `single`.

    Invariants: a key is in one cohort; a cohort has at least one key, and its id is one of them.
    """

    __slots__ = ("_cohorts", "_keys", "_only", "_warnings")

    _cohorts: Mapping[Hashable, Cohort[TargetT]]
    _keys: Mapping[Hashable, Cohort[TargetT]]
    _only: TargetT | None
    _warnings: tuple[str, ...]

    def __init__(self) -> None:
        """An empty table."""
        self._cohorts = {}
        self._keys = {}
        self._only = None
        self._warnings = ()

    @staticmethod
    def of(mappings: Iterable[KeyMapping[TargetT]]) -> KeyTable[TargetT]:
        """A table of mappings.

        Raises:
            TypeError: something else than mappings.
            ValueError: a key is in two mappings.
        """
        return KeyTable[TargetT]().added(mappings).table

    @staticmethod
    def single(target: TargetT) -> KeyTable[TargetT]:
        """A table in which every key means one target. Raises `TypeError` if it is None."""
        if target is None:
            raise TypeError("the target must not be None")
        table = KeyTable[TargetT]()
        table._only = target
        return table

    @property
    def cohorts(self) -> tuple[Cohort[TargetT], ...]:
        """The cohorts, in the order in which they were made."""
        return tuple(self._cohorts.values())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the maker of the table should know and is no error."""
        return self._warnings

    def __len__(self) -> int:
        """How many keys there are; 0 where every key means one target."""
        return len(self._keys)

    def __iter__(self) -> Iterator[Hashable]:
        """The keys, in the order of their cohorts."""
        return (key for cohort in self._cohorts.values() for key in cohort.keys)

    def get(self, key: Hashable) -> TargetT | None:
        """What a key means; None: nothing."""
        cohort = self._keys.get(key)
        return self._only if cohort is None else cohort.target

    def cohort_of(self, key: Hashable) -> Cohort[TargetT] | None:
        """The cohort of a key; None if it has none."""
        return self._keys.get(key)

    def targets(self) -> Mapping[Hashable, TargetT]:
        """What each key means."""
        return MappingProxyType({key: self._keys[key].target for key in self})

    def added(self, mappings: Iterable[KeyMapping[TargetT]]) -> Updated[TargetT]:
        """A table with further mappings, each a cohort of its own.

        Raises:
            TypeError: something else than mappings.
            ValueError: a key has a meaning already, or would have two.
            RuntimeError: every key means one target.
        """
        if self._only is not None:
            raise RuntimeError("keys cannot be added where every key means one model")
        cohorts, keys = dict(self._cohorts), dict(self._keys)
        warnings, changes = list(self._warnings), []
        for mapping in mappings:
            if not isinstance(mapping, KeyMapping):
                raise TypeError(f"must be mappings of keys, got a {type(mapping).__name__}")
            distinct = dict.fromkeys(mapping.keys)
            cohort = Cohort(mapping.keys[0], tuple(distinct), mapping.target)
            for key in distinct:
                if (other := keys.get(key)) is not None:
                    raise ValueError(
                        f"key {key} maps to multiple model handlers. All keys must map to exactly "
                        f"one: it is given to {other.target!s} and to {mapping.target!s}"
                    )
                keys[key] = cohort
                changes.append(KeyChange(key, None, mapping.target))
            warnings += _repeats(mapping)
            cohorts[cohort.id] = cohort
        return Updated(table=self._next(cohorts, keys, warnings), changes=tuple(changes))

    def extended(self, cohort: Hashable, keys: Sequence[Hashable]) -> Updated[TargetT]:
        """A table in which a cohort has further keys, behind those it has.

        Args:
            cohort: any of its keys.
            keys: at least one; what the cohort has already stays as it is.

        Raises:
            KeyError: no cohort has that key.
            TypeError, ValueError: as those of `KeyMapping` and `added`.
        """
        if (old := self._keys.get(cohort)) is None:
            raise KeyError(cohort)
        wanted = dict.fromkeys(_checked_keys(keys, old.target))
        fresh = [key for key in wanted if self._keys.get(key) is not old]
        if not fresh:
            return Updated(table=self)
        # The very check, and the very text, of a table that is made anew.
        changes = self.added([KeyMapping(fresh, old.target)]).changes
        return Updated(table=self._with(old, (*old.keys, *fresh), old.target), changes=changes)

    def without(self, keys: Sequence[Hashable]) -> Updated[TargetT]:
        """A table without some keys. A cohort whose id goes gets the next of its keys as its id.

        Raises:
            KeyError: a key that means nothing.
            TypeError: the keys are a bare string, or no sequence.
        """
        gone = dict.fromkeys(_checked_keys(keys, None, some=False))
        table, changes = self, []
        for key in gone:
            if (cohort := table._keys.get(key)) is None:
                raise KeyError(key)
            changes.append(KeyChange(key, cohort.target, None))
        for cohort in {id(self._keys[key]): self._keys[key] for key in gone}.values():
            left = tuple(key for key in cohort.keys if key not in gone)
            table = table._with(cohort, left, cohort.target)
        return Updated(table=table, changes=tuple(changes))

    def updated(
        self, updates: Iterable[KeyMapping[TargetT]], *, partial: bool = True
    ) -> Updated[TargetT]:
        """A table in which keys mean other targets.

        Keys of one cohort that are given different targets part: those that are given the same
        stay together, and the part without the cohort's id has its first named key as its own. The
        keys that the update does not name keep their target, and so does their part. Cohorts that
        are given the same target stay two. To give a cohort the target that it has changes nothing.

        Args:
            updates: keys and what they are to mean. No update is no change.
            partial: what is not named stays. If False, every key has to be named.

        Raises:
            ValueError: a key is named twice, or is not in the table, or (unless partial) is not
                named; a target is empty text. The table stays as it is.
            TypeError: something else than mappings.
            RuntimeError: every key means one target; see `retargeted`.
        """
        wanted = list(updates)
        if not wanted:
            return Updated(table=self)
        if self._only is not None:
            raise RuntimeError(
                "Invalid model update: sent many model paths to update, but KeyedModelHandlers "
                "whose keys all mean one model take one path"
            )
        named = self._named(wanted)
        missing = [] if partial else [key for key in self if key not in named]
        if missing:
            raise ValueError(
                f"Invalid model update: {missing[0]} appears in the original configuration, but "
                "not in the update"
            )
        # By cohort, and in each by target, in the order of the update.
        parts: dict[Hashable, dict[TargetT, list[Hashable]]] = {}
        for key, target in named.items():
            parts.setdefault(self._keys[key].id, {}).setdefault(target, []).append(key)
        cohorts, keys = dict(self._cohorts), dict(self._keys)
        told, changes = [], []
        for origin, by_target in parts.items():
            cohort = self._cohorts[origin]
            told_targets = tuple(by_target)
            for key in cohort.keys:
                if key not in named:
                    by_target.setdefault(cohort.target, []).append(key)
            for part in _split(cohort, by_target):
                cohorts[part.id] = part
                keys.update(dict.fromkeys(part.keys, part))
                if part.target in told_targets:
                    told.append(KeyUpdate(part.id, part.target, origin))
        for key, target in named.items():
            if (before := self._keys[key].target) != target:
                changes.append(KeyChange(key, before, target))
        if not changes:
            return Updated(table=self, updates=tuple(told))
        table = self._next(cohorts, keys, self._warnings)
        return Updated(table=table, changes=tuple(changes), updates=tuple(told))

    def retargeted(self, target: TargetT) -> KeyTable[TargetT]:
        """A table in which every key means another one target.

        Raises:
            TypeError: the target is None.
            RuntimeError: this table has keys; see `updated`.
        """
        if self._only is None:
            raise RuntimeError(
                "Model updates are currently not supported for KeyedModelHandlers with several "
                "models by one path alone: say which keys it is for"
            )
        return KeyTable.single(target)

    def _named(self, updates: Sequence[KeyMapping[TargetT]]) -> dict[Hashable, TargetT]:
        """Each key that an update names and its target. Raises as `updated`."""
        named: dict[Hashable, TargetT] = {}
        for update in updates:
            if not isinstance(update, KeyMapping):
                raise TypeError(f"must be mappings of keys, got a {type(update).__name__}")
            if update.target == "":
                raise ValueError(f"Invalid model update, path for {list(update.keys)} is empty")
            for key in update.keys:
                if key in named:
                    raise ValueError(
                        f"Invalid model update: {key} appears in multiple update lists. A single "
                        "model is what each key can be given"
                    )
                if key not in self._keys:
                    raise ValueError(
                        f"Invalid model update: {key} appears in update, but not in the original "
                        "configuration: add it first, which needs no restart"
                    )
                named[key] = update.target
        return named

    def _with(
        self, cohort: Cohort[TargetT], names: tuple[Hashable, ...], target: TargetT
    ) -> KeyTable[TargetT]:
        """A table in which a cohort has these keys and this target; without it if it has none."""
        keys = dict(self._keys)
        for key in cohort.keys:
            del keys[key]
        changed = None
        if names:
            changed = Cohort(cohort.id if cohort.id in names else names[0], names, target)
            keys.update(dict.fromkeys(names, changed))
        if changed is not None and changed.id == cohort.id:
            cohorts = dict(self._cohorts)
            cohorts[cohort.id] = changed
        else:  # In its place, by another name.
            there = (changed if other is cohort else other for other in self._cohorts.values())
            cohorts = {other.id: other for other in there if other is not None}
        return self._next(cohorts, keys, self._warnings)

    def _next(
        self,
        cohorts: Mapping[Hashable, Cohort[TargetT]],
        keys: Mapping[Hashable, Cohort[TargetT]],
        warnings: Sequence[str],
    ) -> KeyTable[TargetT]:
        table = KeyTable[TargetT]()
        table._cohorts, table._keys, table._warnings = cohorts, keys, tuple(warnings)
        return table


def _split(
    cohort: Cohort[TargetT], parts: Mapping[TargetT, Sequence[Hashable]]
) -> Iterator[Cohort[TargetT]]:
    """A cohort in parts; the one that has its id keeps it."""
    for target, names in parts.items():
        inside = set(names)
        ordered = tuple(key for key in cohort.keys if key in inside)
        yield Cohort(cohort.id if cohort.id in inside else names[0], ordered, target)


def _checked_keys(keys: object, target: object, *, some: bool = True) -> tuple[Hashable, ...]:
    """Keys as they are kept. Raises as `KeyMapping`."""
    if isinstance(keys, str | bytes):
        raise TypeError(f"keys must be a list, got the bare string {keys!r}: write [{keys!r}]")
    if not isinstance(keys, Sequence):
        raise TypeError(f"keys must be a list, which has an order, got a {type(keys).__name__}")
    if some and not keys:
        raise ValueError(f"Empty list maps to model handler {target!s}: give it at least one key")
    for key in keys:
        try:
            hash(key)
        except TypeError:
            raise TypeError(f"a key must be hashable, got a {type(key).__name__}") from None
    return tuple(keys)


def _repeats(mapping: KeyMapping[TargetT]) -> Iterator[str]:
    seen: set[Hashable] = set()
    told: set[Hashable] = set()
    for key in mapping.keys:
        if key in seen and key not in told:
            told.add(key)
            yield f"key {key} is given more than once for {mapping.target!s}: it counts once"
        seen.add(key)
