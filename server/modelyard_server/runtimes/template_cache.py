"""Templates of the architectures that were loaded lately."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING

from modelyard_server.weights.safetensors_files import Checkpoint

if TYPE_CHECKING:
    from modelyard_server.weights.templates import ModuleTemplate

__all__ = ["TemplateCache", "tensors_digest"]

_MAX_TEMPLATES = 64
_MAX_CONSTANT_BYTES = 32 << 20
"""Of all templates together: memory that belongs to no model and that no device is charged for."""


class TemplateCache:
    """Templates by what decides the module, and which architectures have none. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._templates: OrderedDict[Hashable, ModuleTemplate | None] = OrderedDict()
        self._constant_bytes = 0

    def find(self, key: Hashable) -> tuple[bool, ModuleTemplate | None]:
        """Whether an architecture is known, and its template; None if it can have none."""
        with self._lock:
            if key not in self._templates:
                return False, None
            self._templates.move_to_end(key)
            return True, self._templates[key]

    def put(self, key: Hashable, template: ModuleTemplate | None) -> None:
        """Remembers what was found out about an architecture; the oldest are forgotten."""
        with self._lock:
            self._forget(key)
            self._templates[key] = template
            self._constant_bytes += template.constant_bytes if template is not None else 0
            while (
                len(self._templates) > _MAX_TEMPLATES or self._constant_bytes > _MAX_CONSTANT_BYTES
            ):
                self._forget(next(iter(self._templates)))

    def _forget(self, key: Hashable) -> None:
        template = self._templates.pop(key, None)
        if template is not None:
            self._constant_bytes -= template.constant_bytes


def tensors_digest(checkpoint: Checkpoint) -> bytes:
    """The same for exactly the checkpoints whose tensors have the same names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\n".encode())
    return digest.digest()
