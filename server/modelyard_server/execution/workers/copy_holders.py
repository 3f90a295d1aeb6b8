"""Which worker keeps a copy of which model's weights, as the server knows it."""

from __future__ import annotations

import asyncio

from modelyard_server.execution.workers.worker_process import WorkerProcess

__all__ = ["CopyHolders"]


class CopyHolders:
    """The copies in all workers. For the loop's thread only.

    Invariants: a model has at most one copy, a copy that is being made included. A copy is there
    until it is known to be dropped, or the process of its worker is over.
    """

    def __init__(self) -> None:
        self._making: set[int] = set()
        self._holders: dict[int, WorkerProcess] = {}

    def begin(self, model: int) -> None:
        """Says that a copy will be made; `end` must follow.

        Raises:
            ValueError: there is one, or memory of one that was let go of.
        """
        holder = self.holder(model)
        # What a worker that has gone may still hold is nobody's copy any more.
        if model in self._making or (holder is not None and not holder.is_gone):
            raise ValueError(f"there is a copy of model {model} already")
        self._making.add(model)

    def end(self, model: int, worker: WorkerProcess | None) -> None:
        """Says what the making of a copy came to.

        Args:
            model: whose weights were to be kept.
            worker: that keeps them; None if there is no copy.
        """
        self._making.discard(model)
        if worker is not None:
            self._holders[model] = worker

    def is_being_made(self, model: int) -> bool:
        """True between `begin` and `end`."""
        return model in self._making

    def holder(self, model: int) -> WorkerProcess | None:
        """The worker whose process may hold a copy of a model; None if there is none."""
        return self._holders.get(model)

    def forget(self, model: int, worker: WorkerProcess) -> None:
        """The copy that a worker held is dropped."""
        if self._holders.get(model) is worker:
            del self._holders[model]

    def lost(self, worker: WorkerProcess) -> frozenset[int]:
        """A worker has gone: whose copies it kept. They are forgotten once its process is over."""
        models = frozenset(model for model, holder in self._holders.items() if holder is worker)

        def forget(exited: asyncio.Future[None]) -> None:
            for model in models:
                self.forget(model, worker)

        worker.exited.add_done_callback(forget)
        return models

    def clear(self) -> None:
        """All workers are over."""
        self._making.clear()
        self._holders.clear()
