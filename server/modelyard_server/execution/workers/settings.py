"""What can be set of the workers, and how they come by their runtimes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelyard_server.execution.batcher import BatchLimits
from modelyard_server.runtimes.api import JsonValue, Runtime

__all__ = ["RuntimeSource", "WorkerSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSource:
    """How to make the runtimes: in the server for what is checked, in each worker for all else.

    The zygote makes them as well, to warm them up, but no worker gets those: what is opened before
    a fork is closed after it.

    Attributes:
        maker: "module:function" of what makes them; it gets the factories, and arguments by name.
        allowed_factories: of runtime "torch".
        arguments: values of JSON.
        worker_arguments: more of them, in workers only: for what must be opened there, like the
            store of weights.
    """

    maker: str = "modelyard_server.runtimes.registry:make_runtimes"
    allowed_factories: frozenset[str] = frozenset()
    arguments: Mapping[str, JsonValue] = field(default_factory=dict)
    worker_arguments: Mapping[str, JsonValue] = field(default_factory=dict)

    def make(self, *, in_worker: bool = False) -> Mapping[str, Runtime]:
        """Makes the runtimes, by name.

        Args:
            in_worker: this process is a worker.
        """
        arguments = {**self.arguments, **(self.worker_arguments if in_worker else {})}
        module, _, function = self.maker.partition(":")
        make: Any = getattr(importlib.import_module(module), function)
        runtimes: Mapping[str, Runtime] = make(self.allowed_factories, **arguments)
        return runtimes


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Limits of the workers. A worker that breaks one is killed.

    Attributes:
        run_limit_s: longest that a run may take, from when it begins on its lane.
        load_limit_s: longest that a load may take, from when it begins; and longest that keeping a
            copy of a model's weights may.
        price_limit_s: longest that looking at a model's files may take, from when it begins.
        start_limit_s: longest until a new worker is ready, imports included.
        ping_interval_s: how often a worker is asked whether it is there.
        ping_limit_s: longest that it may not answer. A model that keeps the interpreter's lock to
            itself keeps its worker from answering.
        headroom_bytes: private memory that a worker may have beside what it had when it started
            and the budgets of its devices and of copies: libraries, inputs and outputs, what runs
            need.
        start_tries: failed starts in a row after which calls are refused instead of kept waiting.
        batches: of what lanes run at one time. Not broken but kept to.

    Raises:
        ValueError: a limit that is none.
    """

    run_limit_s: float = 60.0
    load_limit_s: float = 900.0
    price_limit_s: float = 300.0
    start_limit_s: float = 120.0
    ping_interval_s: float = 5.0
    ping_limit_s: float = 30.0
    headroom_bytes: int = 2 * 2**30
    start_tries: int = 5
    batches: BatchLimits = field(default_factory=BatchLimits)

    def __post_init__(self) -> None:
        for name in (
            "run_limit_s",
            "load_limit_s",
            "price_limit_s",
            "start_limit_s",
            "ping_interval_s",
            "ping_limit_s",
        ):
            limit = getattr(self, name)
            if not (limit > 0 and math.isfinite(limit)):
                raise ValueError(f"{name} must be a positive number of seconds, not {limit}")
        if self.headroom_bytes < 0 or self.start_tries < 1:
            raise ValueError("headroom_bytes must not be negative, start_tries not below 1")
        if self.ping_limit_s < self.ping_interval_s:
            raise ValueError("ping_limit_s must not be less than ping_interval_s")

    @property
    def tick_s(self) -> float:
        """How often the limits are looked at."""
        least = min(self.run_limit_s, self.load_limit_s, self.price_limit_s, self.ping_interval_s)
        return min(1.0, max(0.01, least / 10))
