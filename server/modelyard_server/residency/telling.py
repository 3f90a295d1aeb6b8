"""Tells the journal what the core has decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelyard_server import _core
from modelyard_server.residency.decisions import publish_decision
from modelyard_server.residency.journal import Journal
from modelyard_server.residency.values import ModelHandle

__all__ = ["Teller"]

_ASKED_FOR = frozenset({"QUEUED", "LOAD_STARTED"})
"""What is decided at once when somebody asks for a model."""

_REFUSALS_APART_NS = 1_000_000_000
"""Refused requests of one model are told this far apart at least: the journal is bounded."""


class Teller:
    """Carries the core's explanations to the journal, each once.

    Args:
        yard: what explains itself.
        journal: what is told.
        handles: models by the core's id for them; a live view.
        device_names: resource names of the devices, by position.
    """

    def __init__(
        self,
        yard: _core.Yard,
        journal: Journal,
        *,
        handles: Mapping[int, ModelHandle],
        device_names: Sequence[str],
    ) -> None:
        self._yard = yard
        self._journal = journal
        self._handles = handles
        self._device_names = tuple(device_names)
        self._told = 0
        self._refused_ns: dict[int, int] = {}

    def tell(self, *, asked: int = 0) -> None:
        """Tells what was decided since the last time.

        Args:
            asked: the core's id for a model that an operator asked for just now; 0 for none. The
                core does not know who asks.
        """
        last = self._yard.last_explained
        if last == self._told:
            return
        records = self._yard.explanations_after(self._told)
        self._told = last
        for record in records:
            if record["decision"] == "REFUSED" and self._was_just_told(record):
                continue
            if asked == record["model"] and record["decision"] in _ASKED_FOR:
                record["why"] = "OPERATOR"
            handle = self._handles.get(record["model"])
            if record["why"] == "REMOVED" and handle is not None and handle.successor is not None:
                record["why"] = "REPLACED"
            publish_decision(
                self._journal,
                record,
                name_of=self.name_of,
                device_name_of=self._device_names.__getitem__,
            )

    def name_of(self, core_id: int) -> str:
        """A model's id, by the core's id for it."""
        handle = self._handles.get(core_id)
        return "a removed model" if handle is None else handle.name

    def forget(self, core_id: int) -> None:
        """A model is gone for good."""
        self._refused_ns.pop(core_id, None)

    def _was_just_told(self, record: Mapping[str, Any]) -> bool:
        """True for a refusal soon after another of its model: a flood is one event a second."""
        model, at_ns = record["model"], record["at_ns"]
        last_ns = self._refused_ns.get(model)
        if last_ns is not None and at_ns - last_ns < _REFUSALS_APART_NS:
            self._journal.changed(self.name_of(model))
            return True
        self._refused_ns[model] = at_ns
        return False
