"""What each model has done since the server started, whoever asked and by whichever protocol."""

from __future__ import annotations

from collections.abc import Collection
from time import monotonic_ns, time_ns

from modelyard_server.services.request_log import RequestFacts

__all__ = ["ModelTallies", "ModelTally"]

_SPARE = 1_024
"""So many models that are gone may be remembered before they are forgotten."""


class ModelTally:
    """What a model has done. Durations are nanoseconds, and all of it only grows.

    Attributes:
        answered_count: requests it answered.
        row_count: their rows.
        answered_ns: from their arrival to their answer.
        waited_ns: the part of that before they had the model.
        run_ns: the part of that with the model.
        failed_count: requests that were refused or failed.
        failed_ns: from their arrival to that.
        last_ns: when the last one of either kind ended, of the monotonic clock; 0 if none has.
    """

    __slots__ = (
        "answered_count",
        "answered_ns",
        "failed_count",
        "failed_ns",
        "last_ns",
        "row_count",
        "run_ns",
        "waited_ns",
    )

    def __init__(self) -> None:
        self.answered_count = 0
        self.row_count = 0
        self.answered_ns = 0
        self.waited_ns = 0
        self.run_ns = 0
        self.failed_count = 0
        self.failed_ns = 0
        self.last_ns = 0

    @property
    def last_epoch_ms(self) -> int:
        """When its last request ended, in milliseconds since 1970; 0 if none has."""
        if not self.last_ns:
            return 0
        return (time_ns() - (monotonic_ns() - self.last_ns)) // 1_000_000


class ModelTallies:
    """The tallies, by the models' ids. A model that comes again goes on with the old one."""

    def __init__(self) -> None:
        self._tallies: dict[str, ModelTally] = {}

    def of(self, model_id: str) -> ModelTally:
        """What a model has done. Not to be changed."""
        return self._tallies.get(model_id) or ModelTally()

    def note_answered(self, facts: RequestFacts) -> None:
        """Counts a request that was answered: for each model that ran for it."""
        if facts.steps:
            for step in facts.steps:
                self._note_run(step)
        else:
            self._note_run(facts)

    def _note_run(self, facts: RequestFacts) -> None:
        tally = self._make(facts.model)
        tally.answered_count += 1
        tally.row_count += facts.row_count
        tally.answered_ns += facts.ended_ns - facts.arrived_ns
        tally.waited_ns += facts.leased_ns - facts.arrived_ns
        tally.run_ns += facts.ended_ns - facts.leased_ns
        tally.last_ns = facts.ended_ns

    def note_failed(self, facts: RequestFacts) -> None:
        """Counts a request that a model was asked for and that was not answered.

        Of a route's request only if no model had run for it: which one was to blame is not known
        here, and it is not the one that had.
        """
        if not facts.model or facts.ended_ns:
            return
        tally = self._make(facts.model)
        tally.last_ns = monotonic_ns()
        tally.failed_count += 1
        tally.failed_ns += tally.last_ns - facts.arrived_ns

    def forget_all_but(self, model_ids: Collection[str]) -> None:
        """Forgets models that are not among these, once there are many of them."""
        if len(self._tallies) > len(model_ids) + _SPARE:
            kept = set(model_ids)
            self._tallies = {name: each for name, each in self._tallies.items() if name in kept}

    def _make(self, model_id: str) -> ModelTally:
        tally = self._tallies.get(model_id)
        if tally is None:
            tally = self._tallies[model_id] = ModelTally()
        return tally
