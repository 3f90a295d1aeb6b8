"""Which runs are measured: the first of each bucket of batches."""

from __future__ import annotations

import threading

from modelyard_server.weights.activation_model import bucket_of

__all__ = ["FirstRuns"]


class FirstRuns:
    """Picks the first run of each bucket of batches, for measurements that are not for every run.

    Buckets are those of activation_model.bucket_of. Thread-safe.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        self._picks = True

    @classmethod
    def none(cls) -> FirstRuns:
        """One that picks no run at all."""
        nothing = cls()
        nothing._picks = False
        return nothing

    def take(self, batch: int, length: int) -> bool:
        """True for the first batch of its bucket.

        Args:
            batch: rows, at least 1.
            length: tokens a row, at least 1; 1 for what has no length.
        """
        if not self._picks:
            return False
        bucket = bucket_of(batch, length)
        with self._lock:
            is_first = bucket not in self._seen
            self._seen.add(bucket)
        return is_first

    def give_back(self, batch: int, length: int) -> None:
        """Says that a run that was taken has come to nothing: the next of its bucket is the first.

        Args:
            batch: as given to take.
            length: as given to take.
        """
        with self._lock:
            self._seen.discard(bucket_of(batch, length))
