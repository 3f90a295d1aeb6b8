"""The runtimes as a server needs them: with its store, and with a pool of the process's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from modelyard_server.runtimes.api import Runtime
from modelyard_server.runtimes.registry import make_runtimes
from modelyard_server.weights.store import WeightStore

if TYPE_CHECKING:
    from modelyard_server.weights.holding import WeightPool

__all__ = ["make_serving_runtimes"]


def make_serving_runtimes(
    allowed_factories: frozenset[str],
    *,
    store_folder: str | None = None,
    read: str = "map",
    arena_bytes: int = 0,
    write_protected: bool = False,
) -> Mapping[str, Runtime]:
    """Makes one of each runtime. Imports no framework; `warm_up` of each does.

    Its arguments are plain, so that a worker process can be told them.

    Args:
        allowed_factories: "module:function" of what runtime "torch" may call to build a module.
        store_folder: of the store, which is opened; None: models are read where they lie.
        read: how weights come into host memory, a name of weights.holding.ReadMode.
        arena_bytes: see WeightPool.
        write_protected: see WeightPool.

    Raises:
        StoreError: the store cannot be used.
    """

    def make_pool() -> WeightPool:
        from modelyard_server.weights.holding import ReadMode, WeightPool

        return WeightPool(
            arena_bytes=arena_bytes, write_protected=write_protected, host_mode=ReadMode(read)
        )

    store = None if store_folder is None else WeightStore.open(Path(store_folder), leasing=True)
    return make_runtimes(allowed_factories, store=store, pool=make_pool, predicts_runs=True)
