"""The tensors that loaded models hold together: each in memory once, however many models have it.

A pool knows the tensors of a process by position of the device and identity. A model takes a
holding: its own tensor objects over memory that other holdings may be using as well. What is there
already is joined, what somebody else is just reading is waited for, the rest is read. When the last
holding of a tensor goes, so does its memory.

    one holding, one model   A holding's tensors are objects of its own. Weak references to them
                             tell whether this model has been let go of, whatever others do.
    memory follows objects   The pool counts holders, but it never frees under anybody: memory goes
                             back when nothing over it is left, be it a tensor that leaked.
    no order of locks        A take reads and waits without a lock, and waits for others only when
                             it has read and published its own share: two takes that want each
                             other's tensors both come to their end.

Sharing means that a model which writes to a tensor writes to everybody's. Only tensors that models
do not write to may be taken with an identity; see WeightPool.write_protected for those who do not
believe it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import finalize, ref

import torch

from modelyard_server.runtimes.api import LoadCancelled, ModelFilesError, StopCheck
from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.weights.mapping import Extent, is_aligned
from modelyard_server.weights.model_files import shown
from modelyard_server.weights.reading.api import (
    Allocation,
    FilePart,
    Placed,
    Reader,
    Reading,
    ReadMode,
)
from modelyard_server.weights.reading.arena import ArenaReader
from modelyard_server.weights.reading.mailbox import Mailbox
from modelyard_server.weights.reading.mapped import MappedReader
from modelyard_server.weights.reading.owned import OwnedReader
from modelyard_server.weights.reading.slab import SlabReader
from modelyard_server.weights.safetensors_files import FileHeader, TensorHeader
from modelyard_server.weights.stored import StoredModel

__all__ = ["Holding", "ReadMode", "WeightPool"]

_STOP_CHECK_S = 0.05


class Borrowed:
    """The tensors of a holding that other takes brought into allocations of a device.

    Called like a weak reference to what keeps memory of it: with a tensor that is there, or None.
    Once the holding is released, only those count of which it was the last holder and which have
    not been joined since: they are nobody's, and their bytes come back with their allocation.
    """

    def __init__(self, entries: Iterable[_Entry]) -> None:
        self._entries = tuple(map(ref, entries))
        self._is_released = False

    def __call__(self) -> object:
        for reference in self._entries:
            entry = reference()
            if entry is not None and not (self._is_released and entry.holders):
                return entry
        return None

    def __bool__(self) -> bool:
        return bool(self._entries)

    def release(self, left: Collection[_Entry]) -> None:
        """The holding was released; `left` are the tensors that it was the last holder of."""
        self._entries = tuple(reference for reference in self._entries if reference() in left)
        self._is_released = True


class Holding:
    """A model's tensors, until they are released. Made by WeightPool.take.

    A holding that is dropped without having been released releases itself. The tensors that were
    taken from it stay usable in both cases.

    Attributes:
        tensors: by their names in the model; empty once it is released.
        extents: where those lie that are in a mapped file, by name.
        shared: bytes of the tensors it holds in the pool, by identity.
        allocations: weak references to the allocations of a device that were made for this take.
            Such a one goes back as a whole: as long as another holding has a tensor in it, what
            this one had alone stays allocated as well.
        borrowed: its tensors in allocations that were made for other takes.
        padding_bytes: what was allocated for this take beyond the bytes of the tensors that it has
            read: the end of the last page of a region. Nobody else counts them.
    """

    def __init__(
        self,
        *,
        tensors: dict[str, torch.Tensor],
        extents: dict[str, Extent],
        shared: dict[str, int],
        allocations: tuple[ref[Allocation], ...],
        borrowed: Borrowed,
        padding_bytes: int,
        leave: Callable[[], None],
        leave_later: Callable[[], None],
    ) -> None:
        self.tensors = tensors
        self.extents = extents
        self.shared = shared
        self.allocations = allocations
        self.borrowed = borrowed
        self.padding_bytes = padding_bytes
        self._leave = leave
        self._finalizer = finalize(self, leave_later)
        self._finalizer.atexit = False

    def release(self) -> None:
        """Lets go of the tensors. A second call does nothing.

        The memory of those that no other holding has is back when this returns, if nobody refers to
        the tensors any more. Otherwise it comes back with the last reference; in arena mode parts
        of a slab come back at the pool's next take, release or trim after that.
        """
        if self._finalizer.detach() is None:
            return
        self.tensors.clear()
        self.extents.clear()
        self.shared = {}
        self.padding_bytes = 0
        self._leave()


class WeightPool:
    """The tensors that the models of a process hold. Thread-safe.

    Args:
        arena_bytes: most host memory that ReadMode.ARENA keeps for reuse while nobody uses it.
        staging_bytes: host memory through which ReadMode.SLAB copies; kept from its first use on,
            until trim.
        write_protected: in ReadMode.MAP a write to a tensor with an identity ends the process by a
            signal. For processes that can be spared: nobody else's weights change.
        host_mode: how host memory is filled by a take that does not say.
    """

    def __init__(
        self,
        *,
        arena_bytes: int = 0,
        staging_bytes: int = 64 << 20,
        write_protected: bool = False,
        host_mode: ReadMode = ReadMode.MAP,
    ) -> None:
        self._host_mode = host_mode
        self._arena = ArenaReader(arena_bytes)
        self._slabs = SlabReader(staging_bytes)
        self._readers: Mapping[ReadMode, Reader] = {
            ReadMode.MAP: MappedReader(write_protected=write_protected),
            ReadMode.OWNED: OwnedReader(),
            ReadMode.ARENA: self._arena,
            ReadMode.SLAB: self._slabs,
        }
        self._shelves: dict[tuple[int, str], _Shelf] = {}
        self._shelves_lock = threading.Lock()

    def take(
        self,
        stored: StoredModel,
        *,
        position: int,
        torch_device: str,
        names: Collection[str] | None = None,
        mode: ReadMode | None = None,
        stop: StopCheck,
    ) -> Holding:
        """Brings tensors of a model into memory, or joins those who have them there.

        Tensors that have no identity, and those that cannot be used where they lie in a mapped
        file, are the holding's own.

        Args:
            stored: the model.
            position: of the device.
            torch_device: torch's name of it.
            names: of the tensors that are wanted; None for all.
            mode: how those are read that are not there yet. None: mapped on the host, else a slab.
            stop: asked between steps and while others read.

        Raises:
            ModelFilesError: the model has no tensor of such a name, or its files are not those
                whose headers were checked, or cannot be read.
            MemoryError: there is no memory.
            torch.OutOfMemoryError: the device has none.
            LoadCancelled: stop said so.
            ValueError: the mode does not fit the device.

        After an error nothing is held.
        """
        on_host = torch.device(torch_device).type == "cpu"
        if mode is None:
            mode = self._host_mode if on_host else ReadMode.SLAB
        if not on_host and mode is not ReadMode.SLAB:
            raise ValueError(f"{torch_device} is not filled in the mode {mode}")
        self._arena.settle()
        parts = _select(stored, names)
        shelf = self._shelf(position, torch_device)

        def read(wanted: Sequence[FilePart]) -> Reading:
            return self._readers[mode].read(
                stored.packs, wanted, position=position, torch_device=torch_device, stop=stop
            )

        taking = _Taking(shelf, parts, mapped=mode is ReadMode.MAP)
        try:
            taking.run(read, stop)
            return taking.holding(self._arena.settle)
        except BaseException as error:
            # A reading that failed half way is held by its frames, and the error may be kept.
            forget_frames(error)
            taking.undo()
            self._arena.settle()
            raise

    def bytes(self, position: int) -> int:
        """Bytes of the tensors that holdings have together at a position, each once."""
        return sum(shelf.size_bytes for shelf in self._shelves_at(position))

    def stranded_bytes(self, position: int) -> int:
        """Bytes of tensors that nobody holds, in allocations that others of their tensors keep.

        Only in ReadMode.SLAB: the allocation of a device goes back as a whole.
        """
        return sum(shelf.stranded_bytes() for shelf in self._shelves_at(position))

    def idle_bytes(self, position: int) -> int:
        """Bytes that ReadMode.ARENA keeps for a position while nobody uses them."""
        return self._arena.idle_bytes(position)

    def holders(self, position: int, identity: str) -> int:
        """Number of holdings that have a tensor at a position."""
        return sum(shelf.holders(identity) for shelf in self._shelves_at(position))

    def trim(self) -> None:
        """Gives back what is kept for later: idle slabs of the arena, staging buffers."""
        self._arena.trim()
        self._slabs.trim()

    def _shelf(self, position: int, torch_device: str) -> _Shelf:
        with self._shelves_lock:
            return self._shelves.setdefault((position, torch_device), _Shelf())

    def _shelves_at(self, position: int) -> list[_Shelf]:
        with self._shelves_lock:
            return [shelf for (at, _), shelf in self._shelves.items() if at == position]


def _select(stored: StoredModel, names: Collection[str] | None) -> list[FilePart]:
    """What is wanted of a model, by file."""
    files = stored.checkpoint.files
    if names is None:
        return [FilePart(header=header, tensors=header.tensors) for header in files]
    wanted = set(names)
    parts = [
        FilePart(
            header=header, tensors=[tensor for tensor in header.tensors if tensor.name in wanted]
        )
        for header in files
    ]
    missing = wanted - {tensor.name for part in parts for tensor in part.tensors}
    if missing:
        raise ModelFilesError(f"the model has no tensor {shown(min(missing))}")
    return [part for part in parts if part.tensors]


class _Taking:
    """One take, from its first look at the shelf to the holding.

    Args:
        shelf: where the pool's tensors are.
        parts: what is wanted.
        mapped: it is read by mapping the files.
    """

    def __init__(self, shelf: _Shelf, parts: Sequence[FilePart], *, mapped: bool) -> None:
        self._shelf = shelf
        self._parts = parts
        self._pending: dict[str, TensorHeader] = {}
        self._headers: dict[str, FileHeader] = {}
        self._claimed: list[str] = []
        self._joined: dict[str, _Entry] = {}
        self._own: dict[str, Placed] = {}
        self._allocations: dict[int, ref[Allocation]] = {}
        self._padding_bytes = 0
        for part in parts:
            for tensor in part.tensors:
                identity = tensor.identity
                if identity and not (mapped and not is_aligned(part.header, tensor)):
                    self._pending[identity] = tensor

    def run(self, read: Callable[[Sequence[FilePart]], Reading], stop: StopCheck) -> None:
        """Joins, reads and waits until there is nothing left to do.

        Raises:
            What reading raises.
            LoadCancelled: stop said so.
        """
        wanted = dict(self._pending)
        own = {
            tensor.name
            for part in self._parts
            for tensor in part.tensors
            if tensor.identity not in wanted
        }
        while True:
            self._claimed = self._shelf.board(self._pending, self._joined)
            if self._claimed or own:
                chosen = own | {wanted[identity].name for identity in self._claimed}
                reading = read(_parts_of(self._parts, chosen))
                self._padding_bytes += reading.padding_bytes
                for placed in reading.placed.values():
                    if placed.allocation is not None:
                        self._allocations[id(placed.allocation)] = ref(placed.allocation)
                self._own.update((name, reading.placed[name]) for name in own)
                own = set()
                ready = {name: reading.placed[wanted[name].name] for name in self._claimed}
                self._shelf.publish(ready, self._joined)
                self._claimed = []
            if not self._pending:
                return
            self._shelf.wait(self._pending, stop)

    def holding(self, settle: Callable[[], None]) -> Holding:
        """The holding of what has been taken."""
        tensors: dict[str, torch.Tensor] = {}
        extents: dict[str, Extent] = {}
        for part in self._parts:
            for tensor in part.tensors:
                entry = self._joined.get(tensor.identity)
                placed = self._own[tensor.name] if entry is None else entry.placed
                assert placed is not None
                # Detached: another object over the same memory.
                tensors[tensor.name] = placed.base.detach()
                if placed.extent is not None:
                    extents[tensor.name] = placed.extent
        identities = tuple(self._joined)
        shelf = self._shelf
        borrowed = Borrowed(
            entry
            for entry in self._joined.values()
            if (allocation := _allocation_of(entry)) is not None
            and id(allocation) not in self._allocations
        )

        def leave() -> None:
            borrowed.release(shelf.leave(identities))
            settle()

        return Holding(
            tensors=tensors,
            extents=extents,
            shared={identity: entry.size_bytes for identity, entry in self._joined.items()},
            allocations=tuple(self._allocations.values()),
            borrowed=borrowed,
            padding_bytes=self._padding_bytes,
            leave=leave,
            leave_later=lambda: shelf.leave_later(identities),
        )

    def undo(self) -> None:
        """Lets go of everything, after an error."""
        self._own.clear()
        self._shelf.disclaim(self._claimed)
        self._shelf.leave(tuple(self._joined))
        self._joined.clear()


def _parts_of(parts: Sequence[FilePart], names: Collection[str]) -> list[FilePart]:
    chosen = (
        FilePart(
            header=part.header, tensors=[tensor for tensor in part.tensors if tensor.name in names]
        )
        for part in parts
    )
    return [part for part in chosen if part.tensors]


@dataclass(slots=True, weakref_slot=True, eq=False, kw_only=True)
class _Entry:
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


def _allocation_of(entry: _Entry) -> Allocation | None:
    return None if entry.placed is None else entry.placed.allocation


class _Shelf:
    """The pool's tensors on one device. Thread-safe.

    An entry is there from the moment a take claims it. Until it is published it belongs to that
    take; then it has holders, and with the last of them it goes: alone, or with the last of all
    that are in its allocation. Until then it can be joined, because its bytes are there anyway.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._mailbox: Mailbox[tuple[str, ...]] = Mailbox(self._left)
        self._changed = threading.Condition(self._mailbox.lock)
        self.size_bytes = 0

    def board(self, pending: dict[str, TensorHeader], joined: dict[str, _Entry]) -> list[str]:
        """Joins the tensors that are there and claims those that nobody reads.

        Args:
            pending: what is wanted, by identity; what others are reading is left in it.
            joined: gets the entries of those that are there.

        Returns:
            Identities that the caller has to read, and publish or disclaim.
        """
        claimed = []
        with self._locked():
            for identity in list(pending):
                entry = self._entries.get(identity)
                if entry is None:
                    size_bytes = pending.pop(identity).size_bytes
                    self._entries[identity] = _Entry(size_bytes=size_bytes)
                    claimed.append(identity)
                elif entry.placed is not None:
                    del pending[identity]
                    self._hold(entry)
                    joined[identity] = entry
        return claimed

    def publish(self, ready: Mapping[str, Placed], joined: dict[str, _Entry]) -> None:
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

    def leave(self, identities: Sequence[str]) -> set[_Entry]:
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

    def _hold(self, entry: _Entry) -> None:
        entry.holders += 1
        if entry.holders == 1:
            self.size_bytes += entry.size_bytes
            if (allocation := _allocation_of(entry)) is not None:
                allocation.held_count += 1

    def _leave(self, identities: Sequence[str]) -> tuple[set[_Entry], list[_Entry]]:
        """Returns who has no holder any more, and who is not on the shelf any more."""
        left, dropped = set(), []
        for identity in identities:
            entry = self._entries[identity]
            entry.holders -= 1
            if entry.holders:
                continue
            self.size_bytes -= entry.size_bytes
            left.add(entry)
            allocation = _allocation_of(entry)
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

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._mailbox.locked():
            yield
