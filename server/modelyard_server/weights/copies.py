"""Copies of tensors that stay in host memory when the models that had them leave their devices.

A copy is what a model's tensors look like from here: those by whose identity the pool holds them.
Copies of models that have tensors in common hold them once. A take that finds a tensor here copies
it from here instead of reading a file; what it has made then is as much its own as if it had come
from one, and the copy stays what it was.

    held and read     A tensor's copy is there as long as a copy of a model holds it or a take reads
                      it. Takes look only for what is held: a copy that was released is not begun
                      with any more, but one that is being read stays until that has ended.
    whose bytes       What nobody holds and what is still there belongs to whoever held it last,
                      until somebody holds it again. That is what a copy says of itself when it has
                      been released, so that no byte is told to be back that is not, and none is
                      told to be held twice.
    no order of locks Who makes a copy fills its own share, and then waits for what others fill.

On anonymous memory pages go with the last tensor that has a byte in them, and a copy is charged for
all pages that it has a byte in. Pinned memory goes back as a whole: what nobody holds in it waits
for the others, and its last holder is charged for it meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from weakref import finalize

import torch

from modelyard_server.runtimes.api import KeptWeights
from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.weights.reading.accelerators import synchronize
from modelyard_server.weights.reading.copied import CopyMemory, Room, make_rooms
from modelyard_server.weights.reading.mailbox import Mailbox

__all__ = ["Copies", "Copy"]

_WAIT_S = 0.05


@dataclass(slots=True, eq=False, kw_only=True)
class _Entry:
    """The copy of a tensor.

    Attributes:
        identity: of the tensor.
        room: where it is; None while it is being made, and when it has gone.
        holders: copies of models that have it.
        readers: takes that copy from it.
        is_leaving: nobody has it, and its memory is being given back.
        left_by: the copy of a model that was the last to hold it; None as long as one does.
    """

    identity: str
    room: Room | None = None
    holders: int = 0
    readers: int = 0
    is_leaving: bool = False
    left_by: Copy | None = None


class Copy(KeptWeights):
    """The copy of a model's tensors; see KeptWeights. Made by Copies.keep.

    One that is dropped without having been released releases itself.
    """

    def __init__(
        self, copies: Copies, entries: Sequence[_Entry], shared: Mapping[str, int]
    ) -> None:
        self._copies = copies
        self._entries = tuple(entries)
        self._shared = MappingProxyType(dict(shared))
        self._own_bytes = _charged_bytes(entries) - sum(shared.values())
        self._is_released = False
        self._finalizer = finalize(self, copies._leave_later, self._entries)
        self._finalizer.atexit = False

    @property
    def own_bytes(self) -> int:
        """What it holds beside `shared`, with what is lost between tensors."""
        return self._own_bytes

    @property
    def shared(self) -> Mapping[str, int]:
        """The tensors that it may hold together with other copies: bytes by identity."""
        return self._shared

    def release(self) -> None:
        """Lets go of it. Memory that nobody reads and no other copy holds is back on return."""
        if self._finalizer.detach() is None:
            return
        self._copies._leave(self._entries, self)
        self._is_released = True

    @property
    def is_held(self) -> bool:
        """True while any of its memory that is not another copy's is there."""
        if not self._is_released:
            return True
        self._entries = tuple(entry for entry in self._entries if entry.left_by is self)
        return bool(self._entries)


class Copies:
    """The copies of a process. Thread-safe."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._mailbox: Mailbox[tuple[_Entry, ...]] = Mailbox(self._left)
        self._changed = threading.Condition(self._mailbox.lock)
        self._size_bytes = 0

    @property
    def is_empty(self) -> bool:
        """True if there are none."""
        return not self._entries

    @property
    def size_bytes(self) -> int:
        """Bytes of the memory of all copies, also while it is filled or given back."""
        with self._mailbox.locked():
            return self._size_bytes

    def keep(self, tensors: Mapping[str, torch.Tensor], shared: Mapping[str, int]) -> Copy | None:
        """Copies tensors that have not been copied yet, and joins the copies of the others.

        Args:
            tensors: by identity, all on one device. They do not change.
            shared: those of which the copy says that others may hold them: bytes by identity.

        Returns:
            The copy; None if it would hold nothing, or not all of `shared`.

        Raises:
            MemoryError: there is no memory. Nothing is held after this or another error.
        """
        pending = {identity: tensor for identity, tensor in tensors.items() if tensor.nbytes}
        if not pending or not shared.keys() <= tensors.keys():
            return None
        joined: dict[str, _Entry] = {}
        claimed: list[_Entry] = []
        try:
            while pending:
                claimed = self._board(pending, joined)
                if claimed:
                    rooms = self._make([tensors[entry.identity] for entry in claimed])
                    self._publish(claimed, rooms, joined)
                    claimed = []
                if pending:
                    self._wait(pending)
            return Copy(self, tuple(joined.values()), shared)
        except BaseException as error:
            forget_frames(error)
            self._disclaim(claimed)
            self._leave(tuple(joined.values()), None)
            raise

    @contextmanager
    def reading(self, identities: Iterable[str]) -> Iterator[dict[str, Room]]:
        """The places of the tensors that are held. They stay as long as this is open.

        Nothing refers to them afterwards: neither the caller, nor the frames of an error.
        """
        entries: list[_Entry] = []
        with self._mailbox.locked():
            for identity in identities:
                entry = self._entries.get(identity)
                if entry is not None and entry.holders:
                    entry.readers += 1
                    entries.append(entry)
        kept = {entry.identity: entry.room for entry in entries if entry.room is not None}
        try:
            yield kept
        except BaseException as error:
            forget_frames(error)
            raise
        finally:
            kept.clear()
            if entries:
                self._end_reading(entries)

    def _board(self, pending: dict[str, torch.Tensor], joined: dict[str, _Entry]) -> list[_Entry]:
        """Joins the copies that are there, and claims those that nobody makes.

        What others are making, or giving back, is left in `pending`.
        """
        claimed = []
        with self._mailbox.locked():
            for identity in list(pending):
                entry = self._entries.get(identity)
                if entry is None:
                    entry = self._entries[identity] = _Entry(identity=identity)
                    claimed.append(entry)
                    del pending[identity]
                elif entry.room is not None and not entry.is_leaving:
                    self._hold(entry)
                    joined[identity] = entry
                    del pending[identity]
        return claimed

    def _make(self, tensors: Sequence[torch.Tensor]) -> tuple[Room, ...]:
        device = tensors[0].device
        memory, rooms = make_rooms([tensor.nbytes for tensor in tensors], device)
        with self._mailbox.locked():
            self._size_bytes += memory.size_bytes
        try:
            try:
                for room, tensor in zip(rooms, tensors, strict=True):
                    room.fill(tensor)
            finally:
                # Also after an error: what is on its way goes to memory that is about to be freed.
                synchronize(device)
        except BaseException as error:
            forget_frames(error)
            memory.clear()
            with self._mailbox.locked():
                self._size_bytes -= memory.size_bytes
            raise
        return rooms

    def _publish(
        self, claimed: Sequence[_Entry], rooms: Sequence[Room], joined: dict[str, _Entry]
    ) -> None:
        with self._mailbox.locked():
            for entry, room in zip(claimed, rooms, strict=True):
                entry.room = room
                self._hold(entry)
                joined[entry.identity] = entry
            self._changed.notify_all()

    def _disclaim(self, claimed: Sequence[_Entry]) -> None:
        with self._mailbox.locked():
            for entry in claimed:
                del self._entries[entry.identity]
            self._changed.notify_all()

    def _wait(self, pending: Collection[str]) -> None:
        """Waits until one of the tensors has been copied, or has gone and can be copied again."""
        with self._mailbox.locked():
            while not any(map(self._is_settled, pending)):
                self._changed.wait(_WAIT_S)

    def _is_settled(self, identity: str) -> bool:
        entry = self._entries.get(identity)
        return entry is None or (entry.room is not None and not entry.is_leaving)

    def _hold(self, entry: _Entry) -> None:
        assert entry.room is not None
        if not entry.holders and not entry.readers:
            entry.room.memory.users += 1
        entry.holders += 1
        entry.left_by = None

    def _leave(self, entries: Sequence[_Entry], copy: Copy | None) -> None:
        with self._mailbox.locked():
            leaving = self._unhold(entries, copy)
        self._give_back(leaving)
        with self._mailbox.locked():
            self._forget(leaving)

    def _leave_later(self, entries: tuple[_Entry, ...]) -> None:
        """The same for a finalizer, which cannot wait for the lock."""
        self._mailbox.post(entries)

    def _left(self, entries: tuple[_Entry, ...]) -> None:
        leaving = self._unhold(entries, None)
        self._give_back(leaving)
        self._forget(leaving)

    def _end_reading(self, entries: Sequence[_Entry]) -> None:
        with self._mailbox.locked():
            leaving = _Leaving()
            for entry in entries:
                entry.readers -= 1
                self._put_down(entry, leaving)
        self._give_back(leaving)
        with self._mailbox.locked():
            self._forget(leaving)

    def _unhold(self, entries: Sequence[_Entry], copy: Copy | None) -> _Leaving:
        leaving = _Leaving()
        for entry in entries:
            entry.holders -= 1
            if not entry.holders:
                entry.left_by = copy
                self._put_down(entry, leaving)
        return leaving

    def _put_down(self, entry: _Entry, leaving: _Leaving) -> None:
        """Called when somebody has let go of an entry; says what can go if it was the last one."""
        if entry.holders or entry.readers:
            return
        assert entry.room is not None
        memory = entry.room.memory
        memory.users -= 1
        if not memory.is_pinned:
            leaving.ranges.append((memory, *memory.leave(entry.room)))
            leaving.add(entry)
        elif not memory.users:
            leaving.whole.append(memory)
            for other in self._entries.values():
                if other.room is not None and other.room.memory is memory:
                    leaving.add(other)

    def _give_back(self, leaving: _Leaving) -> None:
        for memory, begin, end in leaving.ranges:
            memory.give_back(begin, end)
        for memory in leaving.whole:
            memory.clear()

    def _forget(self, leaving: _Leaving) -> None:
        """Called under the lock for what has gone."""
        for entry in leaving.entries:
            del self._entries[entry.identity]
            entry.room = None
            entry.left_by = None
        self._size_bytes -= sum(end - begin for _, begin, end in leaving.ranges)
        self._size_bytes -= sum(memory.size_bytes for memory in leaving.whole)
        if leaving.entries:
            self._changed.notify_all()


class _Leaving:
    """What is to be given back.

    Attributes:
        entries: that are gone then.
        ranges: pages of memory that stays, as bytes from first to last.
        whole: memory that goes.
    """

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self.ranges: list[tuple[CopyMemory, int, int]] = []
        self.whole: list[CopyMemory] = []

    def add(self, entry: _Entry) -> None:
        """An entry that is gone when all this has been given back."""
        entry.is_leaving = True
        self.entries.append(entry)


def _charged_bytes(entries: Sequence[_Entry]) -> int:
    rooms: dict[CopyMemory, list[Room]] = {}
    for entry in entries:
        assert entry.room is not None
        rooms.setdefault(entry.room.memory, []).append(entry.room)
    return sum(memory.charged_bytes(inside) for memory, inside in rooms.items())
