"""Where the runtimes of a process have weights from, and what their models hold together.

Imports torch only where weights are held, so that a server of models without torch never does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from modelyard_server.runtimes.api import (
    KeptWeights,
    LoadSource,
    ModelSpec,
    StopCheck,
    Witness,
)
from modelyard_server.runtimes.targets import Place
from modelyard_server.weights.model_files import folder_of
from modelyard_server.weights.origin import NOWHERE, Origin
from modelyard_server.weights.store import WeightStore, in_place
from modelyard_server.weights.stored import StoredModel

if TYPE_CHECKING:
    import torch

    from modelyard_server.weights.holding import Holding, WeightPool
    from modelyard_server.weights.storages import Spread

__all__ = ["HeldWeights", "ModelWeights", "PoolSource", "content_key"]

PoolSource = Callable[[], "WeightPool"]
"""Makes or returns the pool when it is first needed: it needs torch."""


class ModelWeights:
    """The store and the pool of a runtime. Thread-safe.

    Args:
        store: has the models; None: they are read where they lie.
        pool: holds what models share, or what gives it; None: one of its own.
    """

    def __init__(
        self, store: WeightStore | None = None, pool: WeightPool | PoolSource | None = None
    ) -> None:
        self._store = store
        self._pool = pool
        self._lock = threading.Lock()

    @contextmanager
    def found(self, spec: ModelSpec, *, stop: StopCheck = lambda: False) -> Iterator[StoredModel]:
        """The files of a model; from the store, if there is one, which takes it in first.

        They stay where they are until the end of the block. What is mapped then stays for good.

        Raises:
            ModelFilesError: it has none, or they are damaged.
            LoadCancelled: stop said so.
        """
        folder = folder_of(spec)
        if self._store is None:
            yield in_place(folder)
            return
        with self._store.leased(folder, stop=stop) as stored:
            yield stored

    @property
    def pool(self) -> WeightPool:
        """Holds what models share."""
        with self._lock:
            if self._pool is None:
                from modelyard_server.weights.holding import WeightPool

                self._pool = WeightPool()
            elif callable(self._pool):
                self._pool = self._pool()
            return self._pool

    def take(
        self, stored: StoredModel, names: Collection[str], *, place: Place, stop: StopCheck
    ) -> Holding:
        """Brings tensors to the home device of a place, or joins models that have them there.

        Raises:
            ModelFilesError: the files are not those whose headers were read.
            LoadCancelled: stop said so.
        """
        return self.pool.take(
            stored,
            position=place.target.home,
            torch_device=place.home,
            names=names,
            stop=stop,
        )


class HeldWeights:
    """What a loaded model holds of the pool.

    Args:
        holding: its tensors; a module hangs over their memory.
        home: position of their device.
        shared: bytes by identity of those that the model's price calls shared.
        origin: where that came from which was loaded beside the holding.
    """

    def __init__(
        self,
        holding: Holding,
        *,
        home: int,
        shared: Mapping[str, int],
        origin: Origin = NOWHERE,
    ) -> None:
        self._holding = holding
        self._home = home
        self._shared = shared
        self._source = (holding.origin + origin).source

    def measured_bytes(self, module: torch.nn.Module, spread: Spread) -> dict[int, int]:
        """Bytes that a model over these tensors holds, by position; see LoadedModel.

        Of what is held here the tensors count, not the storages: those of a slab are all one. What
        lies between them is the allocator's, like all that it rounds up.
        """
        addresses, size_bytes = self._held
        sizes = spread.measured_bytes(module, aside=addresses)
        sizes[self._home] += size_bytes
        return sizes

    @cached_property
    def _held(self) -> tuple[frozenset[int], int]:
        """Where the tensors are, and their bytes."""
        tensors = self._holding.bases().values()
        addresses = frozenset(tensor.data_ptr() for tensor in tensors)
        return addresses, sum(tensor.nbytes for tensor in tensors)

    def shared_bytes(self) -> dict[int, dict[str, int]]:
        """See LoadedModel."""
        return {self._home: dict(self._shared)} if self._shared else {}

    @property
    def source(self) -> LoadSource:
        """See LoadedModel."""
        return self._source

    def keep(self) -> KeptWeights | None:
        """See LoadedModel."""
        return self._holding.keep(self._shared)

    def witnesses(self) -> tuple[Witness, ...]:
        """Weak references to the allocations that it has tensors in; see LoadedModel.

        One that others keep is not back when the model has gone, and must not be taken for free: be
        it made for this model, or for another one before, of which this one had the last tensor.
        """
        holding = self._holding
        # Nobody can keep one in which nothing was given to the pool.
        references: list[Callable[[], object]] = [
            allocation for allocation in holding.allocations if allocation() is not None
        ]
        if holding.borrowed:
            references.append(holding.borrowed)
        return tuple(Witness(device=self._home, reference=each) for each in references)

    def release(self) -> None:
        """Lets go of them; a second call does nothing."""
        self._holding.release()


def content_key(stored: StoredModel) -> tuple[object, ...]:
    """The same for exactly the models that have the same weights in the same files.

    For a model of the store it stands for all its other files as well; for one that is read in
    place it says nothing of them.
    """
    if stored.digest:
        return stored.digest, stored.packs
    files = ((header.name, header.identity) for header in stored.checkpoint.files)
    return stored.folder, *files
