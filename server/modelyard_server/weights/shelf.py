"""Where the pool's tensors of one device stand: who holds each of them, and who is reading it."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from weakref import ref

import torch

from modelyard_server.runtimes.api import LoadCancelled, StopCheck
from modelyard_server.weights.reading.api import Allocation, Placed
from modelyard_server.weights.reading.mailbox import Mailbox
from modelyard_server.weights.safetensors_files import TensorHeader

__all__ = ["Borrowed", "Entry", "Shelf", "allocation_of"]

_STOP_CHECK_S = 0.05


@dataclass(slots=True, weakref_slot=True, eq=False, kw_only=True)
class Entry:
    """A tensor on a shelf.

    Attributes:
        size_bytes: of the tensor.
        placed: it; None while it is being read.
        holders: holdings that have it. None, once it has been read: its last one has left, and its
            bytes wait for the rest of its allocation. Who wants it until then joins it.
    """

    size_bytes: int
    placed: Placed | None = None
    holders: int = 0


def allocation_of(entry: Entry) -> Allocation | None:
    """The allocation of a device that a tensor is in, if it is in one."""
    return None if entry.placed is None else entry.placed.allocation


class Shelf:
    """The pool's tensors on one device. Thread-safe.

    An entry is there from the moment a take claims it. Until it is published it belongs to that
    take; then it has holders, and with the last of them it goes: alone, or with the last of all
    that are in its allocation. Until then it can be joined, because its bytes are there anyway.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._mailbox: Mailbox[tuple[str, ...]] = Mailbox(self._left)
        self._changed = threading.Condition(self._mailbox.lock)
        self.size_bytes = 0

    def board(self, pending: dict[str, TensorHeader], joined: dict[str, Entry]) -> list[str]:
        """Joins the tensors that are there and claims those that nobody reads.

        Args:
            pending: what is wanted, by identity; what others are reading is left in it.
            joined: gets the entries of those that are there.

        Returns:
            Identities that the caller has to read, and publish or disclaim.
        """
        claimed = []
        with self._locked():
            for identity, tensor in list(pending.items()):
                entry = self._entries.get(identity)
                if entry is None:
                    self._entries[identity] = Entry(size_bytes=tensor.size_bytes)
                    claimed.append(identity)
                elif entry.placed is not None:
                    self._hold(entry)
                    joined[identity] = entry
                else:
                    continue
                del pending[identity]
        return claimed

    def publish(self, ready: Mapping[str, Placed], joined: dict[str, Entry]) -> None:
        """Puts what was claimed and read onto the shelf, held by the caller."""
        with self._locked():
            for identity, placed in ready.items():
                entry = self._entries[identity]
                entry.placed = placed
                self._hold(entry)
                joined[identity] = entry
                if placed.allocation is not None:
                    placed.allocation.pooled.append(identity)
            self._changed.notify_all()

    def disclaim(self, claimed: Iterable[str]) -> None:
        """Leaves to others what was claimed and has not been read."""
        with self._locked():
            for identity in claimed:
                del self._entries[identity]
            self._changed.notify_all()

    def wait(self, pending: Collection[str], stop: StopCheck) -> None:
        """Waits until one of the tensors that others are reading is there, or is left to others.

        Raises:
            LoadCancelled: stop said so.
        """
        while True:
            if stop():
                raise LoadCancelled
            with self._locked():
                if any(self._is_settled(identity) for identity in pending):
                    return
                self._changed.wait(_STOP_CHECK_S)

    def tensors(self, identities: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors that the caller holds, by identity."""
        with self._locked():
            placed = {identity: self._entries[identity].placed for identity in identities}
        return {identity: each.base for identity, each in placed.items() if each is not None}

    def leave(self, identities: Sequence[str]) -> set[Entry]:
        """Takes a holder off tensors. What can go then is dropped, outside of the lock.

        Returns:
            Those that have no holder any more and still are there.
        """
        with self._locked():
            left, dropped = self._leave(identities)
        return left.difference(dropped)

    def leave_later(self, identities: tuple[str, ...]) -> None:
        """The same for a finalizer, which cannot wait for the lock."""
        self._mailbox.post(identities)

    def holders(self, identity: str) -> int:
        """Number of holdings that have a tensor."""
        with self._locked():
            entry = self._entries.get(identity)
            return entry.holders if entry is not None else 0

    def stranded_bytes(self) -> int:
        """See WeightPool."""
        with self._locked():
            return sum(
                entry.size_bytes
                for entry in self._entries.values()
                if entry.placed is not None and not entry.holders
            )

    def _hold(self, entry: Entry) -> None:
        entry.holders += 1
        if entry.holders == 1:
            self.size_bytes += entry.size_bytes
            if (allocation := allocation_of(entry)) is not None:
                allocation.held_count += 1

    def _leave(self, identities: Sequence[str]) -> tuple[set[Entry], list[Entry]]:
        """Returns who has no holder any more, and who is not on the shelf any more."""
        left, dropped = set(), []
        for identity in identities:
            entry = self._entries[identity]
            entry.holders -= 1
            if entry.holders:
                continue
            self.size_bytes -= entry.size_bytes
            left.add(entry)
            allocation = allocation_of(entry)
            if allocation is None:
                dropped.append(self._entries.pop(identity))
                continue
            allocation.held_count -= 1
            if not allocation.held_count:
                dropped += [self._entries.pop(pooled) for pooled in allocation.pooled]
        return left, dropped

    def _left(self, identities: tuple[str, ...]) -> None:
        self._leave(identities)

    def _is_settled(self, identity: str) -> bool:
        entry = self._entries.get(identity)
        return entry is None or entry.placed is not None

    def _locked(self) -> AbstractContextManager[None]:
        return self._mailbox.locked()


class Borrowed:
    """The tensors of a holding that other takes brought into allocations of a device.

    Called like a weak reference to what keeps memory of it: with a tensor that is there, or None.
    Once the holding is released, only those count of which it was the last holder and which have
    not been joined since: they are nobody's, and their bytes come back with their allocation.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = tuple(map(ref, entries))
        self._is_released = False

    def __call__(self) -> object:
        """One that is there, or None."""
        for reference in self._entries:
            entry = reference()
            if entry is not None and not (self._is_released and entry.holders):
                return entry
        return None

    def __bool__(self) -> bool:
        return bool(self._entries)

    def release(self, left: Collection[Entry]) -> None:
        """The holding was released; `left` are the tensors that it was the last holder of."""
        self._entries = tuple(reference for reference in self._entries if reference() in left)
        self._is_released = True
