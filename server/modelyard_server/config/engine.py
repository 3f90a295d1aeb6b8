"""Where models run: ``[engine]``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from modelyard_server.config import rules
from modelyard_server.config.rules import Finding
from modelyard_server.config.sections import DAY_S, check, ruled
from modelyard_server.devices.sizes import MAX_SIZE_BYTES

__all__ = ["EngineConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Where models run: ``[engine]``.

    Raises:
        ValueError: a field breaks its rule.
    """

    kind: str = field(default="process", metadata=ruled(rules.one_of("process", "thread")))
    """``process``: in worker processes, so that a model can break only itself; ``thread``: in the
    server's own."""
    run_limit_s: float = field(default=60.0, metadata=ruled(rules.seconds(0.01, DAY_S)))
    """A run that takes longer hangs: its worker is ended. In seconds."""
    load_limit_s: float = field(default=900.0, metadata=ruled(rules.seconds(0.1, DAY_S)))
    """The same for a load."""
    headroom: int = field(default=2 * 1024**3, metadata=ruled(rules.size(0, MAX_SIZE_BYTES)))
    """What a worker may allocate beside what its devices' budgets allow, in bytes."""
    strikes: int = field(default=3, metadata=ruled(rules.integer(1, 1000)))
    """Workers a model may bring down within ten minutes before it is not loaded any more."""
    max_batch_rows: int = field(default=64, metadata=ruled(rules.integer(1, 1024)))
    """Most rows that requests share a run with; 1: every request has its own."""
    max_batch_bytes: int = field(
        default=64 * 1024**2, metadata=ruled(rules.size(1, MAX_SIZE_BYTES))
    )
    """Most bytes of such a run's inputs, padding included."""

    def __post_init__(self) -> None:
        check(self)

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Finding]:
        """See ``Section``."""
        yield from ()
