"""Which tensors models have in common, as shares of the core.

The core charges a share once on each device, however many models hold it. It counts bytes and knows
no tensors; here is which tensors a share stands for. Shares are as few as can be: the tensors of a
share are the same ones in every model that has any of them. A model with only some of them cuts the
share in two. So fifty fine-tunes that differ in their heads have one share in common and one each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from modelyard_server import _core

__all__ = ["SharedTensors"]


@dataclass(slots=True, eq=False)
class _Group:
    """The tensors of a share.

    Attributes:
        share: the core's id for it.
        identities: of its tensors, with their bytes.
        models: the core's ids of the models that are made of it.
    """

    share: int
    identities: dict[str, int]
    models: set[int]


class SharedTensors:
    """Keeps the core's shares in step with the tensors of registered models.

    Invariant: a tensor is in one group at most, and a model is made of whole groups.

    Args:
        yard: where the shares are.
    """

    def __init__(self, yard: _core.Yard) -> None:
        self._yard = yard
        self._group_of: dict[str, _Group] = {}
        self._groups_of: dict[int, list[_Group]] = {}
        # No model is made of them any more; one that was may hold them still.
        self._lingering: dict[int, _Group] = {}

    def claim(self, shared: Mapping[str, int]) -> list[int]:
        """Makes shares for exactly these tensors, and returns the core's ids of them.

        What is claimed is to be assigned to a model, or to be given up with `forget_unused`.

        Args:
            shared: bytes by identity.
        """
        self._sweep()
        met: dict[int, tuple[_Group, dict[str, int]]] = {}
        rest: dict[str, int] = {}
        for identity, size_bytes in shared.items():
            if size_bytes <= 0:
                continue
            group = self._group_of.get(identity)
            if group is None:
                rest[identity] = size_bytes
            else:
                met.setdefault(group.share, (group, {}))[1][identity] = size_bytes
        shares = [
            group.share if len(part) == len(group.identities) else self._split(group, part)
            for group, part in met.values()
        ]
        if rest:
            share = self._yard.add_share(sum(rest.values()))
            self._know(_Group(share, rest, set()))
            shares.append(share)
        return shares

    def assign(self, model: int, shared: Iterable[str]) -> None:
        """Notes of which tensors a model is made from now on. They have been claimed.

        Args:
            model: the core's id for it.
            shared: identities.
        """
        before = self._groups_of.pop(model, [])
        groups = {
            group.share: group
            for identity in shared
            if (group := self._group_of.get(identity)) is not None
        }
        for group in groups.values():
            group.models.add(model)
            self._lingering.pop(group.share, None)
        if groups:
            self._groups_of[model] = list(groups.values())
        for group in before:
            if group.share not in groups:
                group.models.discard(model)
                if not group.models:
                    self._lingering[group.share] = group
        self._sweep()

    def drop(self, model: int) -> None:
        """A model is gone."""
        self.assign(model, ())

    def forget_unused(self, shares: Iterable[int]) -> None:
        """Gives up shares that were claimed and are not assigned to any model."""
        wanted = set(shares)
        for group in list(self._group_of.values()):
            if group.share in wanted and not group.models:
                self._lingering[group.share] = group
        self._sweep()

    def known(self, shared: Mapping[str, int]) -> tuple[list[int], int]:
        """The shares that are made of some of these tensors and no others, for a forecast.

        Returns:
            The core's ids, and the bytes of them all.
        """
        counts: dict[int, tuple[_Group, int]] = {}
        for identity in shared:
            if (group := self._group_of.get(identity)) is not None:
                counts[group.share] = (group, counts.get(group.share, (group, 0))[1] + 1)
        whole = [group for group, count in counts.values() if count == len(group.identities)]
        return [group.share for group in whole], sum(
            sum(group.identities.values()) for group in whole
        )

    def _split(self, group: _Group, part: dict[str, int]) -> int:
        share = self._yard.split_share(group.share, sum(part.values()))
        for identity in part:
            del group.identities[identity]
        cut = _Group(share, part, set(group.models))
        self._know(cut)
        if not cut.models:
            self._lingering[share] = cut
        for model in cut.models:
            self._groups_of[model].append(cut)
        return share

    def _know(self, group: _Group) -> None:
        for identity in group.identities:
            self._group_of[identity] = group

    def _sweep(self) -> None:
        """Forgets the groups that no model is made of and none holds."""
        for share, group in list(self._lingering.items()):
            try:
                self._yard.forget_share(share)
            except _core.WrongStateError:
                continue  # Its tensors are still in memory: a new model may take them over.
            except _core.StaleIdError:
                pass  # The core has forgotten it with its last holder.
            del self._lingering[share]
            for identity in group.identities:
                del self._group_of[identity]
