"""The runtimes there are."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import MappingProxyType

from modelyard_server.runtimes.api import Runtime
from modelyard_server.runtimes.hf.runtime import TransformersRuntime
from modelyard_server.runtimes.identity import IdentityRuntime
from modelyard_server.runtimes.torch_runtime import TorchRuntime

__all__ = ["make_runtimes"]


def make_runtimes(allowed_factories: frozenset[str]) -> Mapping[str, Runtime]:
    """Makes one of each runtime. Imports no framework; `warm_up` of each does.

    Args:
        allowed_factories: "module:function" of what runtime "torch" may call to build a module.

    Returns:
        The runtimes by their names.
    """
    # One lock for both: what transformers does while it builds a model (default type, patched
    # constructors) is seen by every other thread that builds one.
    construction = threading.Lock()
    runtimes: tuple[Runtime, ...] = (
        IdentityRuntime(),
        TorchRuntime(allowed_factories=allowed_factories, construction_lock=construction),
        TransformersRuntime(construction_lock=construction),
    )
    return MappingProxyType({runtime.name: runtime for runtime in runtimes})
