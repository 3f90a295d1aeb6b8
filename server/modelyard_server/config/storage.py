"""What is where on the disk: ``[catalog]`` and ``[weights]``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from modelyard_server.config.problems import quoted
from modelyard_server.config.sections import DAY_S

__all__ = ["MAX_KEEP_S", "READ_MODES", "CatalogConfig", "WeightsConfig"]

READ_MODES: Final = ("map", "owned", "arena")
"""How weights come into host memory."""
MAX_KEEP_S: Final = 36_500 * DAY_S
"""Longest that a store keeps what nobody uses, in seconds: for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogConfig:
    """Where models, keys and plans are kept that come over the wire: ``[catalog]``.

    Raises:
        ValueError: the path is not absolute.
    """

    path: Path | None = None
    """Absolute path of the database; None keeps them in memory, until the server stops."""

    def __post_init__(self) -> None:
        if self.path is not None and not self.path.is_absolute():
            raise ValueError(f"catalog: the path must be absolute, got {quoted(str(self.path))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    """Where weights are kept and how they are read: ``[weights]``.

    Raises:
        ValueError: a field breaks its rule, or the store's path is not absolute.
    """

    store: Path | None = None
    """Absolute path of the folder of the server's own copies; None reads models where they lie."""
    read: str = "map"
    """How they come into host memory: ``map``, ``owned`` or ``arena``."""
    arena: int = 0
    """Most bytes that an arena keeps for the next model while nobody uses them."""
    keep_unused_s: float = 86_400.0
    """For how long the store keeps what nobody uses any more, in seconds."""

    def __post_init__(self) -> None:
        if self.store is not None and not self.store.is_absolute():
            raise ValueError(f"weights: the path must be absolute, got {quoted(str(self.store))}")
        if self.read not in READ_MODES:
            raise ValueError(f"weights: read must be one of {', '.join(READ_MODES)}")
        if self.arena < 0:
            raise ValueError("weights: arena must not be negative")
        if not 0 <= self.keep_unused_s <= MAX_KEEP_S:
            raise ValueError(f"weights: keep_unused_s must be 0 to {MAX_KEEP_S:g}")
