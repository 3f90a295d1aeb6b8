"""Which prefix of a key counts: an immutable table of prefixes, the longest of which wins.

A look-up asks a dict once for each length that a prefix of the table has, so it costs the number
of different lengths and not that of prefixes. Immutable, so it may be shared between threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

__all__ = ["PrefixTable"]

TargetT = TypeVar("TargetT")


class PrefixTable(Generic[TargetT]):
    """Prefixes and what each means. The empty prefix is one of every key.

    Args:
        targets: what each prefix means.
    """

    __slots__ = ("_lengths", "_targets")

    def __init__(self, targets: Mapping[str, TargetT] | None = None) -> None:
        self._targets = dict(targets or {})
        self._lengths = tuple(sorted(set(map(len, self._targets)), reverse=True))

    def __len__(self) -> int:
        """How many prefixes there are."""
        return len(self._targets)

    def get(self, prefix: str) -> TargetT | None:
        """What exactly this prefix means; None if it is not in the table."""
        return self._targets.get(prefix)

    def find(self, key: str) -> TargetT | None:
        """What the longest prefix of a key means; None if it has none."""
        targets, size = self._targets, len(key)
        for length in self._lengths:
            if length <= size and (target := targets.get(key[:length])) is not None:
                return target
        return None

    def changed(
        self, gone: Iterable[str] = (), added: Mapping[str, TargetT] | None = None
    ) -> PrefixTable[TargetT]:
        """A table without some prefixes, and then with some others.

        Raises:
            KeyError: a prefix that is to go is not there.
        """
        targets = dict(self._targets)
        for prefix in gone:
            del targets[prefix]
        return PrefixTable({**targets, **(added or {})})
