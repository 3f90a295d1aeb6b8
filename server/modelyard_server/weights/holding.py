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
    copies                   What is not there may have been kept in host memory when a model left
                             its device (Holding.keep). It is copied from there then, not read.

Sharing means that a model which writes to a tensor writes to everybody's. Only tensors that models
do not write to may be taken with an identity; see WeightPool.write_protected for those who do not
believe it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from weakref import finalize, ref

import torch

from modelyard_server.runtimes.api import (
    KeptWeights,
    LoadSource,
    ModelFilesError,
    StopCheck,
)
from modelyard_server.runtimes.frames import forget_frames
from modelyard_server.weights.copies import Copies
from modelyard_server.weights.mapping import Extent, is_aligned
from modelyard_server.weights.model_files import FolderLike, shown
from modelyard_server.weights.origin import NOWHERE, Origin
from modelyard_server.weights.reading.api import (
    Allocation,
    FilePart,
    Placed,
    Reader,
    Reading,
    ReadMode,
)
from modelyard_server.weights.reading.arena import ArenaReader
from modelyard_server.weights.reading.copied import fill_from_copies
from modelyard_server.weights.reading.mapped import MappedReader
from modelyard_server.weights.reading.owned import OwnedReader
from modelyard_server.weights.reading.slab import SlabReader
from modelyard_server.weights.safetensors_files import FileHeader, TensorHeader
from modelyard_server.weights.shelf import Borrowed, Entry, Shelf, allocation_of
from modelyard_server.weights.stored import StoredModel

__all__ = ["Holding", "ReadMode", "WeightPool"]

_Keep = Callable[[Collection[str], Mapping[str, int]], KeptWeights | None]


class Holding:
    """A model's tensors, until they are released. Made by WeightPool.take.

    A holding that is dropped without having been released releases itself. The tensors that were
    taken from it stay usable in both cases.

    Attributes:
        shared: bytes of the tensors it holds in the pool, by identity.
        allocations: weak references to the allocations of a device that were made for this take.
            Such a one goes back as a whole: as long as another holding has a tensor in it, what
            this one had alone stays allocated as well.
        borrowed: its tensors in allocations that were made for other takes.
        padding_bytes: what was allocated for this take beyond the bytes of the tensors that it has
            read: the end of the last page of a region. Nobody else counts them.
        origin: where those came from that were brought by this take.
    """

    def __init__(
        self,
        *,
        placed: dict[str, Placed],
        shared: dict[str, int],
        allocations: tuple[ref[Allocation], ...],
        borrowed: Borrowed,
        padding_bytes: int,
        origin: Origin,
        keep: _Keep,
        leave: Callable[[], None],
        leave_later: Callable[[], None],
    ) -> None:
        self._placed = placed
        self.shared = shared
        self.allocations = allocations
        self.borrowed = borrowed
        self.padding_bytes = padding_bytes
        self.origin = origin
        self._keep = keep
        self._leave = leave
        self._finalizer = finalize(self, leave_later)
        self._finalizer.atexit = False

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Them by their names in the model; empty once it is released."""
        # Detached: another object over the same memory.
        return {name: placed.base.detach() for name, placed in self._placed.items()}

    @cached_property
    def extents(self) -> dict[str, Extent]:
        """Where those lie that are in a mapped file, by name; empty once it is released."""
        return {
            name: extent
            for name, placed in self._placed.items()
            if (extent := placed.extent) is not None
        }

    def bases(self) -> dict[str, torch.Tensor]:
        """The pool's own objects, for who makes others over their memory and keeps only those."""
        return {name: placed.base for name, placed in self._placed.items()}

    @property
    def source(self) -> LoadSource:
        """Where the tensors came from; those that were joined say nothing about that."""
        return self.origin.source

    def keep(self, shared: Mapping[str, int]) -> KeptWeights | None:
        """Copies the tensors that are in the pool to host memory, for takes to come.

        Args:
            shared: those that the copy is to say others may hold as well: bytes by identity.

        Returns:
            The copy; None if it would hold nothing, or not all of `shared`.

        Raises:
            MemoryError: there is no memory. Nothing is held after this or another error.
        """
        try:
            return self._keep(self.shared, shared)
        except BaseException as error:
            forget_frames(error)
            raise

    def release(self) -> None:
        """Lets go of the tensors. A second call does nothing.

        The memory of those that no other holding has is back when this returns, if nobody refers to
        the tensors any more. Otherwise it comes back with the last reference; in arena mode parts
        of a slab come back at the pool's next take, release or trim after that.
        """
        if self._finalizer.detach() is None:
            return
        self._placed.clear()
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
        write_protected: in ReadMode.MAP, and if it comes from a copy to the host in any mode but
            SLAB, a write to a tensor with an identity ends the process by a signal. For processes
            that can be spared: nobody else's weights change.
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
        self._write_protected = write_protected
        self._copies = Copies()
        self._arena = ArenaReader(arena_bytes)
        self._slabs = SlabReader(staging_bytes)
        self._readers: Mapping[ReadMode, Reader] = {
            ReadMode.MAP: MappedReader(write_protected=write_protected),
            ReadMode.OWNED: OwnedReader(),
            ReadMode.ARENA: self._arena,
            ReadMode.SLAB: self._slabs,
        }
        self._shelves: dict[tuple[int, str], Shelf] = {}
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
        file, are the holding's own. Those of which there is a copy are copied from that.

        Args:
            stored: the model.
            position: of the device.
            torch_device: torch's name of it.
            names: of the tensors that are wanted; None for all.
            mode: how those are read that are not there yet. None: mapped on the host, else a slab.
                From copies they go into a slab, or on the host into a new region in other modes.
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
            return self._read(
                mode, stored.packs, wanted, position=position, torch_device=torch_device, stop=stop
            )

        taking = _Taking(shelf, parts, mapped=mode is ReadMode.MAP)
        try:
            taking.run(read, stop)
            return taking.holding(self._arena.settle, partial(self._keep, shelf))
        except BaseException as error:
            # A reading that failed half way is held by its frames, and the error may be kept.
            forget_frames(error)
            taking.undo()
            self._arena.settle()
            raise

    @property
    def copies_bytes(self) -> int:
        """Bytes of host memory that copies take, each once, with what is lost between tensors."""
        return self._copies.size_bytes

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

    def _read(
        self,
        mode: ReadMode,
        packs: FolderLike,
        wanted: Sequence[FilePart],
        *,
        position: int,
        torch_device: str,
        stop: StopCheck,
    ) -> Reading:
        """Brings tensors into memory: out of copies what is there, the rest out of files."""
        read_files = partial(
            self._readers[mode].read,
            packs,
            position=position,
            torch_device=torch_device,
            stop=stop,
        )
        if self._copies.is_empty:
            return read_files(wanted)
        identities = [tensor.identity for part in wanted for tensor in part.tensors]
        with self._copies.reading(identities) as kept:
            if not kept:
                return read_files(wanted)
            if mode is ReadMode.SLAB:
                return self._slabs.read(
                    packs,
                    wanted,
                    position=position,
                    torch_device=torch_device,
                    stop=stop,
                    kept=kept,
                )
            names = {
                tensor.name
                for part in wanted
                for tensor in part.tensors
                if tensor.identity in kept or not tensor.size_bytes
            }
            copied, filed = _parts_of(wanted, names), _parts_without(wanted, names)
            reading = fill_from_copies(
                copied, kept, write_protected=self._write_protected, stop=stop
            )
            return reading.joined_with(read_files(filed)) if filed else reading

    def _keep(
        self, shelf: Shelf, identities: Collection[str], shared: Mapping[str, int]
    ) -> KeptWeights | None:
        """See Holding.keep."""
        return self._copies.keep(shelf.tensors(identities), shared)

    def _shelf(self, position: int, torch_device: str) -> Shelf:
        with self._shelves_lock:
            return self._shelves.setdefault((position, torch_device), Shelf())

    def _shelves_at(self, position: int) -> list[Shelf]:
        with self._shelves_lock:
            return [shelf for (at, _), shelf in self._shelves.items() if at == position]


def _select(stored: StoredModel, names: Collection[str] | None) -> list[FilePart]:
    """What is wanted of a model, by file."""
    files = stored.checkpoint.files
    if names is None or stored.checkpoint.tensors.keys() == names:
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

    def __init__(self, shelf: Shelf, parts: Sequence[FilePart], *, mapped: bool) -> None:
        self._shelf = shelf
        self._parts = parts
        self._pending: dict[str, TensorHeader] = {}
        self._headers: dict[str, FileHeader] = {}
        self._claimed: list[str] = []
        self._joined: dict[str, Entry] = {}
        self._own: dict[str, Placed] = {}
        self._allocations: dict[int, ref[Allocation]] = {}
        self._padding_bytes = 0
        self._origin = NOWHERE
        self._own_names: set[str] = set()
        for part in parts:
            for tensor in part.tensors:
                identity = tensor.identity
                if identity and not (mapped and not is_aligned(part.header, tensor)):
                    self._pending[identity] = tensor
                else:
                    self._own_names.add(tensor.name)

    def run(self, read: Callable[[Sequence[FilePart]], Reading], stop: StopCheck) -> None:
        """Joins, reads and waits until there is nothing left to do.

        Raises:
            What reading raises.
            LoadCancelled: stop said so.
        """
        wanted, own = dict(self._pending), self._own_names
        while True:
            self._claimed = self._shelf.board(self._pending, self._joined)
            if self._claimed or own:
                reading = read(self._parts_with(own, wanted))
                self._padding_bytes += reading.padding_bytes
                self._origin += reading.origin
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

    def _parts_with(
        self, own: Collection[str], wanted: Mapping[str, TensorHeader]
    ) -> Sequence[FilePart]:
        """What is to be read: the holding's own, and what has been claimed of the wanted ones."""
        if len(self._claimed) == len(wanted) and len(own) == len(self._own_names):
            return self._parts
        return _parts_of(self._parts, {*own, *(wanted[each].name for each in self._claimed)})

    def holding(self, settle: Callable[[], None], keep: _Keep) -> Holding:
        """The holding of what has been taken."""
        found: dict[str, Placed] = {}
        for part in self._parts:
            for tensor in part.tensors:
                entry = self._joined.get(tensor.identity)
                placed = self._own[tensor.name] if entry is None else entry.placed
                assert placed is not None
                found[tensor.name] = placed
        identities = tuple(self._joined)
        shelf = self._shelf
        borrowed = Borrowed(
            entry
            for entry in self._joined.values()
            if (allocation := allocation_of(entry)) is not None
            and id(allocation) not in self._allocations
        )

        def leave() -> None:
            borrowed.release(shelf.leave(identities))
            settle()

        return Holding(
            placed=found,
            shared={identity: entry.size_bytes for identity, entry in self._joined.items()},
            allocations=tuple(self._allocations.values()),
            borrowed=borrowed,
            padding_bytes=self._padding_bytes,
            origin=self._origin,
            keep=keep,
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
    return _chosen(parts, lambda tensor: tensor.name in names)


def _parts_without(parts: Sequence[FilePart], names: Collection[str]) -> list[FilePart]:
    return _chosen(parts, lambda tensor: tensor.name not in names)


def _chosen(parts: Sequence[FilePart], is_chosen: Callable[[TensorHeader], bool]) -> list[FilePart]:
    chosen = (
        FilePart(
            header=part.header, tensors=[tensor for tensor in part.tensors if is_chosen(tensor)]
        )
        for part in parts
    )
    return [part for part in chosen if part.tensors]
