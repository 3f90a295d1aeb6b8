"""The runtimes there are."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from modelyard_server.runtimes.api import Runtime
from modelyard_server.runtimes.hf.runtime import TransformersRuntime
from modelyard_server.runtimes.identity import IdentityRuntime
from modelyard_server.runtimes.torch_runtime import TorchRuntime

if TYPE_CHECKING:
    from modelyard_server.runtimes.model_weights import PoolSource
    from modelyard_server.weights.holding import WeightPool
    from modelyard_server.weights.store import WeightStore

__all__ = ["make_runtimes"]


def make_runtimes(
    allowed_factories: frozenset[str],
    *,
    store: WeightStore | None = None,
    pool: WeightPool | PoolSource | None = None,
    predicts_runs: bool = False,
) -> Mapping[str, Runtime]:
    """Makes one of each runtime. Imports no framework; `warm_up` of each does.

    Args:
        allowed_factories: "module:function" of what runtime "torch" may call to build a module.
        store: has the models' files; None: they are read where they lie.
        pool: holds what models share, or gives it when it is first needed; None: one for all
            runtimes, which nobody else sees.
        predicts_runs: prices say what runs take as well, where the runtime can tell, and first runs
            are measured to correct that.

    Returns:
        The runtimes by their names.
    """
    # One lock for both: what transformers does while it builds a model (default type, patched
    # constructors) is seen by every other thread that builds one.
    construction = threading.Lock()
    pool = pool or _LatePool()
    runtimes: tuple[Runtime, ...] = (
        IdentityRuntime(),
        TorchRuntime(
            allowed_factories=allowed_factories,
            construction_lock=construction,
            store=store,
            pool=pool,
            measures_runs=predicts_runs,
        ),
        TransformersRuntime(
            construction_lock=construction, store=store, pool=pool, predicts_runs=predicts_runs
        ),
    )
    return MappingProxyType({runtime.name: runtime for runtime in runtimes})


class _LatePool:
    """Makes a pool when it is first asked for one; it needs torch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: WeightPool | None = None

    def __call__(self) -> WeightPool:
        from modelyard_server.weights.holding import WeightPool

        with self._lock:
            if self._pool is None:
                self._pool = WeightPool()
            return self._pool
